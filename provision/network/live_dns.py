"""Records of dynamic zones, by RFC 2136 updates signed with TSIG (RFC 8945).

Each name of ours has a TXT record with our mark, so that what somebody made by hand is known. Every
update has prerequisites: a name that is added is not in use, one that is changed or removed still has
exactly what we think it has. So nothing by hand is overwritten unseen, even between our look and the
update.

An update concerns one zone; forward and reverse are ordered: a pointer goes before its name and comes
after it, so that no pointer leads to nowhere.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from host.files import file_error
from inventory.errors import Call, Conflict, DriverFailed, FarmhandError, WrongState
from inventory.services import Bind
from provision.network.view import View

if TYPE_CHECKING:
    import dns.message
    import dns.tsig
    import dns.update

BATCH = 400
"""Names an update holds: a message has 64 KiB at most, a name of ours takes up to 160 bytes of it."""
KEY_VARIABLE = "FARMHAND_TSIG_KEY"
_TIMEOUT = 30.0
_OURS = ("A", "AAAA", "PTR")

Records = tuple[tuple[str, str], ...]
"""Type and value of each, sorted; of the types above."""
Zones = Mapping[str, Mapping[str, Records]]
"""By zone and name, both without the last dot; the mark is not among them."""


@dataclass(frozen=True, slots=True)
class Op:
    """One name of one zone: from ``old`` to ``new``, either may be empty. ``shared``: the name is also
    in use for something else, which stays. ``marked``: it has our mark already."""

    zone: str
    name: str
    old: Records
    new: Records
    shared: bool = False
    marked: bool = True

    def inverse(self) -> Op:
        return Op(self.zone, self.name, self.new, self.old, self.shared)


@dataclass(frozen=True, slots=True)
class Live:
    """What a zone has at one name."""

    records: Records
    marked: bool
    other: bool  # records of other types, or other texts


def desired(view: View, zone: str, *, reverse: bool) -> dict[str, dict[str, Records]]:
    """The records of a farm's VMs."""
    found: dict[str, dict[str, list[tuple[str, str]]]] = {zone: {}}
    for row in view.vms:
        for name in row.full:
            records = found[zone].setdefault(str(name), [])
            for kind, address in (("A", row.address), ("AAAA", row.address6)):
                if address and (kind, address) not in records:
                    records.append((kind, str(address)))
    for back in view.reverse if reverse else ():
        pointers = found.setdefault(str(back.name), {})
        for name, fqdn in back.records:
            pointers[str(name)] = [("PTR", f"{fqdn}.")]
    return {
        name: {owner: tuple(sorted(records)) for owner, records in names.items() if records}
        for name, names in found.items()
    }


def owners(view: View, zones: Zones) -> dict[tuple[str, str], str]:
    """Which VM each zone's name is of."""
    vms = {str(name): str(row.vm) for row in view.vms for name in row.full}
    found = {}
    for zone, names in zones.items():
        for name, records in names.items():
            owner = vms.get(name) or vms.get(records[0][1].removesuffix("."), "")
            found[zone, name] = owner
    return found


def compare(known: Zones, wanted: Zones) -> list[Op]:
    """From what was applied last, without asking the server."""
    ops = []
    for zone, names in wanted.items():
        before = known.get(zone, {})
        for name in {**before, **names}:
            old, new = tuple(before.get(name, ())), names.get(name, ())
            if old != new:
                ops.append(Op(zone, name, old, new, marked=bool(old)))
    return ordered(ops)


def ordered(ops: Iterable[Op]) -> list[Op]:
    """Pointers that go; names; pointers that come or change."""

    def rank(op: Op) -> tuple[int, str]:
        pointer = op.zone.endswith(".arpa")
        return (1 if not pointer else 0 if not op.new else 2, op.zone)

    return sorted(ops, key=rank)


class Server:
    """One BIND server's dynamic zones. ``mark``: what our names' TXT records say."""

    def __init__(self, bind: Bind, mark: str) -> None:
        self._bind = bind
        self._mark = f'"{mark}"'
        self._at = f"{bind.address} port {bind.port}"
        self._key = tsig_key(bind)

    def look(self, zone: str) -> dict[str, Live] | None:
        """All of a zone, by a signed transfer; None: the server has no such zone. DriverFailed."""
        import dns.exception
        import dns.name
        import dns.query
        import dns.rcode
        import dns.rdatatype
        import dns.tsig
        import dns.xfr
        import dns.zone

        origin = dns.name.from_text(zone)
        for key in (self._key, None):
            content = dns.zone.Zone(origin, relativize=False)
            query, _ = dns.xfr.make_query(content, keyring=key)
            try:
                dns.query.inbound_xfr(
                    str(self._bind.address), content, query, port=self._bind.port, timeout=_TIMEOUT
                )
                break
            except dns.tsig.PeerBadKey as error:
                if key is None:
                    raise self._failed(zone, "transfer it", _words(error)) from error
                # It learns the key with the zone statements that are about to be written.
            except dns.xfr.TransferError as error:
                if error.rcode == dns.rcode.NOTAUTH:
                    return None
                raise self._failed(zone, "transfer it", str(error)) from error
            except (dns.exception.DNSException, OSError, EOFError) as error:
                raise self._failed(zone, "transfer it", _words(error)) from error
        found = {}
        for name, node in content.nodes.items():
            records, marked, other = [], False, False
            for rdataset in node.rdatasets:
                kind = dns.rdatatype.to_text(rdataset.rdtype)
                for rdata in rdataset:
                    text = rdata.to_text()
                    if kind in _OURS:
                        records.append((kind, text))
                    elif kind == "TXT" and text == self._mark:
                        marked = True
                    else:
                        other = True
            found[name.to_text(omit_final_dot=True)] = Live(tuple(sorted(records)), marked, other)
        return found

    def judge(self, known: Zones | None, wanted: Zones, *, force: bool) -> tuple[list[Op], list[str]]:
        """What is to be updated, by what the server has; and what is there by hand and in the way, in
        words. With ``force`` that is overwritten all the same. ``known``: what was applied last."""
        ops: list[Op] = []
        trouble: list[str] = []
        for zone, names in wanted.items():
            there = self.look(zone) or {}
            before = (known or {}).get(zone, {})
            for name, new in names.items():
                live = there.get(name)
                if live is None or not live.records:
                    ops.append(Op(zone, name, (), new, live is not None and live.other, marked=False))
                elif live.records == new:
                    if not live.marked:
                        ops.append(Op(zone, name, new, new, live.other, marked=False))
                else:
                    ours = live.marked and (
                        known is None or before.get(name, live.records) == live.records
                    )
                    if not ours:
                        trouble.append(f"{name} {_shown(live.records)}, by hand; ours: {_shown(new)}")
                    if ours or force:
                        ops.append(Op(zone, name, live.records, new, live.other, live.marked))
            for name, live in there.items():
                if live.marked and name not in names:
                    edited = known is not None and before.get(name, live.records) != live.records
                    if edited:
                        trouble.append(f"{name} {_shown(live.records)}, by hand; ours: nothing")
                    if not edited or force:
                        ops.append(Op(zone, name, live.records, (), live.other))
        return ordered(ops), trouble

    def update(self, ops: Sequence[Op], step: Callable[[str], None]) -> None:
        """Carry them out in their order, a batch of one zone after the other; ``step`` is told before
        each. Conflict: a prerequisite isn't met, nothing of that batch was done. If one fails, those
        before it are undone."""
        done: list[Op] = []
        try:
            for batch in batches(ops):
                step(f"update {batch[0].zone}: {_counted(batch)}")
                self._send(batch)
                done += batch
        except FarmhandError:
            for batch in batches([op.inverse() for op in reversed(done)]):
                step(f"put back {batch[0].zone}: {_counted(batch)}")
                self._send(batch)
            raise

    def revert(self, ops: Sequence[Op]) -> None:
        """Undo what of these was done, for an update that was killed: each name that has exactly what
        it was to have, and our mark."""
        zones = {zone: self.look(zone) or {} for zone in dict.fromkeys(op.zone for op in ops)}
        done = []
        for op in ops:
            live = zones[op.zone].get(op.name, Live((), False, False))
            if live.records == op.new and op.old != op.new and live.marked == bool(op.new):
                done.append(Op(op.zone, op.name, op.new, op.old, live.other))
        for batch in batches(list(reversed(done))):
            self._send(batch)

    def _send(self, batch: Sequence[Op]) -> None:
        import dns.exception
        import dns.query
        import dns.rcode

        zone = batch[0].zone
        message = self._message(batch)
        try:
            answer = dns.query.tcp(
                message, str(self._bind.address), port=self._bind.port, timeout=_TIMEOUT
            )
        except (dns.exception.DNSException, OSError, EOFError) as error:
            raise self._failed(zone, "update it", _words(error)) from error
        code = answer.rcode()
        if code in (dns.rcode.YXDOMAIN, dns.rcode.YXRRSET, dns.rcode.NXRRSET, dns.rcode.NXDOMAIN):
            raise Conflict(
                f"{zone}: a name of this update is not as it was left: somebody changed it by hand",
                remedy=(Call("network-apply", plan=True), " names it"),
            )
        if code != dns.rcode.NOERROR:
            raise self._failed(zone, "update it", dns.rcode.to_text(code))

    def _message(self, batch: Sequence[Op]) -> dns.message.Message:
        import dns.name
        import dns.update

        message = dns.update.UpdateMessage(dns.name.from_text(batch[0].zone), keyring=self._key)
        for op in batch:
            name = dns.name.from_text(op.name)
            old, new = _by_type(op.old), _by_type(op.new)
            if not old and not op.shared:
                message.absent(name)
            for kind in {*old, *new} if op.shared or old else ():
                if kind in old:
                    message.present(name, kind, *old[kind])
                else:
                    message.absent(name, kind)
            for kind in old:
                if old[kind] != new.get(kind):
                    message.delete(name, kind)
            for kind, values in new.items():
                if values != old.get(kind):
                    message.add(name, int(self._bind.ttl), kind, *values)
            if not new:
                message.delete(name, "TXT", self._mark)
            elif not (op.old and op.marked):
                message.add(name, int(self._bind.ttl), "TXT", self._mark)
        return message

    def _failed(self, zone: str, what: str, why: str) -> DriverFailed:
        return DriverFailed(
            f"{zone} at {self._at}: cannot {what}: {why}",
            remedy="the zone has to let our key transfer and update it; see the server's log",
        )


def batches(ops: Sequence[Op]) -> list[list[Op]]:
    found: list[list[Op]] = []
    for op in ops:
        if not found or found[-1][0].zone != op.zone or len(found[-1]) == BATCH:
            found.append([])
        found[-1].append(op)
    return found


def difference(ops: Sequence[Op]) -> str:
    """As of files: a line for each record that goes or comes."""
    lines = []
    for zone in dict.fromkeys(op.zone for op in ops):
        lines.append(f"--- zone {zone}\n+++ zone {zone}\n")
        for op in ops:
            if op.zone == zone:
                lines += [f"-{op.name}. {k} {v}\n" for k, v in op.old if (k, v) not in op.new]
                lines += [f"+{op.name}. {k} {v}\n" for k, v in op.new if (k, v) not in op.old]
    return "".join(lines)


def summary(ops: Sequence[Op]) -> list[str]:
    """One line a zone."""
    zones = dict.fromkeys(op.zone for op in ops)
    return [f"bind: update {zone}: {_counted([o for o in ops if o.zone == zone])}" for zone in zones]


def _counted(ops: Sequence[Op]) -> str:
    counts = {
        "add": sum(1 for op in ops if not op.old),
        "change": sum(1 for op in ops if op.old and op.new and op.old != op.new),
        "mark": sum(1 for op in ops if op.old and op.old == op.new),
        "remove": sum(1 for op in ops if not op.new),
    }
    return ", ".join(f"{verb} {count}" for verb, count in counts.items() if count)


def _by_type(records: Records) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for kind, value in records:
        found.setdefault(kind, []).append(value)
    return found


def _shown(records: Records) -> str:
    return ", ".join(f"{kind} {value}" for kind, value in records)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


# ---- The key


_KEY = re.compile(r'key\s+"?(?P<name>[A-Za-z0-9_.-]+)"?\s*\{(?P<body>[^}]*)\}', re.IGNORECASE)
_FIELD = re.compile(r'\b(algorithm|secret)\s+"?([A-Za-z0-9+/=_.-]+)"?\s*;', re.IGNORECASE)


def tsig_key(bind: Bind) -> dns.tsig.Key:
    """From the key's file, or from the environment: a key statement as tsig-keygen(8) writes it, or
    there the bare secret of an hmac-sha256 key. WrongState, without a word of what is in it."""
    import dns.name
    import dns.tsig

    if bind.key is not None:
        where, text = bind.key, _private(Path(bind.key))
    else:
        where, text = f"${KEY_VARIABLE}", os.environ.get(KEY_VARIABLE, "")
    if not text.strip():
        raise WrongState(
            f"a dynamic zone needs a TSIG key: {where} is empty",
            remedy="tsig-keygen farmhand > FILE, mode 0640, then services.bind.key: FILE",
        )
    match = _KEY.search(text)
    fields = {k.lower(): v for k, v in _FIELD.findall(match["body"])} if match else {}
    if match is None and bind.key is None:
        fields = {"secret": text.strip()}
    name = match["name"] if match else bind.key_name
    algorithm = fields.get("algorithm", "hmac-sha256").lower()
    try:
        secret = base64.b64decode(fields["secret"], validate=True)
    except (KeyError, binascii.Error):
        raise WrongState(
            f"{where} is no TSIG key", remedy="it should be as tsig-keygen writes it"
        ) from None
    if name != bind.key_name:
        raise WrongState(
            f"{where} holds a key named {name}, and the zones let {bind.key_name} update them",
            remedy=f"set services.bind.key_name: {name}",
        )
    return dns.tsig.Key(dns.name.from_text(name), secret, dns.name.from_text(algorithm))


def _private(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o004:
            raise WrongState(
                f"{path} can be read by everybody", remedy=f"chown root:bind {path} && chmod 0640 {path}"
            )
        return path.read_text(errors="replace")
    except OSError as error:
        raise file_error(error, path, "read the TSIG key") from error
