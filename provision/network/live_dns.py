"""Records of dynamic zones, by RFC 2136 updates signed with TSIG (RFC 8945).

Each name of ours has a TXT record with our mark, so that what somebody made by hand is known. Every
update has prerequisites: a name that is added is not in use, one that is changed or removed still has
exactly what we think it has. So nothing by hand is overwritten unseen, even between our look and the
update.

An update concerns one zone (``provision.network.records`` has their order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from inventory.errors import Call, Conflict, DriverFailed, FarmhandError
from provision.network.records import (
    LiveRecords,
    RecordChange,
    Records,
    Zones,
    batches,
    counted,
    ordered,
)

if TYPE_CHECKING:
    import dns.message
    import dns.tsig
    import dns.update

_TIMEOUT = 30.0
_OURS = ("A", "AAAA", "PTR")


class DnsServer:
    """One server's dynamic zones. ``ttl``: seconds, of what is added. ``mark``: what our names' TXT
    records say."""

    def __init__(self, address: str, port: int, key: dns.tsig.Key, *, ttl: int, mark: str) -> None:
        self._address, self._port, self._key, self._ttl = address, port, key, ttl
        self._mark = f'"{mark}"'

    def look(self, zone: str) -> dict[str, LiveRecords] | None:
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
                dns.query.inbound_xfr(self._address, content, query, port=self._port, timeout=_TIMEOUT)
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
            found[name.to_text(omit_final_dot=True)] = LiveRecords(tuple(sorted(records)), marked, other)
        return found

    def judge(
        self, known: Zones | None, wanted: Zones, *, force: bool
    ) -> tuple[list[RecordChange], list[str]]:
        """What is to be updated, by what the server has; and what is there by hand and in the way, in
        words. With ``force`` that is overwritten all the same. ``known``: what was applied last."""
        ops: list[RecordChange] = []
        trouble: list[str] = []
        for zone, names in wanted.items():
            there = self.look(zone) or {}
            before = (known or {}).get(zone, {})
            for name, new in names.items():
                live = there.get(name)
                if live is None or not live.records:
                    ops.append(
                        RecordChange(zone, name, (), new, live is not None and live.other, marked=False)
                    )
                elif live.records == new:
                    if not live.marked:
                        ops.append(RecordChange(zone, name, new, new, live.other, marked=False))
                else:
                    ours = live.marked and (
                        known is None or before.get(name, live.records) == live.records
                    )
                    if not ours:
                        trouble.append(f"{name} {_shown(live.records)}, by hand; ours: {_shown(new)}")
                    if ours or force:
                        ops.append(RecordChange(zone, name, live.records, new, live.other, live.marked))
            for name, live in there.items():
                if live.marked and name not in names:
                    edited = known is not None and before.get(name, live.records) != live.records
                    if edited:
                        trouble.append(f"{name} {_shown(live.records)}, by hand; ours: nothing")
                    if not edited or force:
                        ops.append(RecordChange(zone, name, live.records, (), live.other))
        return ordered(ops), trouble

    def update(self, ops: Sequence[RecordChange], step: Callable[[str], None]) -> None:
        """Carry them out in their order, a batch of one zone after the other; ``step`` is told before
        each. Conflict: a prerequisite isn't met, nothing of that batch was done. If one fails, those
        before it are undone."""
        done: list[RecordChange] = []
        try:
            for batch in batches(ops):
                step(f"update {batch[0].zone}: {counted(batch)}")
                self._send(batch)
                done += batch
        except FarmhandError:
            for batch in batches([op.inverse() for op in reversed(done)]):
                step(f"put back {batch[0].zone}: {counted(batch)}")
                self._send(batch)
            raise

    def revert(self, ops: Sequence[RecordChange]) -> None:
        """Undo what of these was done, for an update that was killed: each name that has exactly what
        it was to have, and our mark."""
        zones = {zone: self.look(zone) or {} for zone in dict.fromkeys(op.zone for op in ops)}
        done = []
        for op in ops:
            live = zones[op.zone].get(op.name, LiveRecords((), False, False))
            if live.records == op.new and op.old != op.new and live.marked == bool(op.new):
                done.append(RecordChange(op.zone, op.name, op.new, op.old, live.other))
        for batch in batches(list(reversed(done))):
            self._send(batch)

    def _send(self, batch: Sequence[RecordChange]) -> None:
        import dns.exception
        import dns.query
        import dns.rcode

        zone = batch[0].zone
        message = self._message(batch)
        try:
            answer = dns.query.tcp(message, self._address, port=self._port, timeout=_TIMEOUT)
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

    def _message(self, batch: Sequence[RecordChange]) -> dns.message.Message:
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
                    message.add(name, self._ttl, kind, *values)
            if not new:
                message.delete(name, "TXT", self._mark)
            elif not (op.old and op.marked):
                message.add(name, self._ttl, "TXT", self._mark)
        return message

    def _failed(self, zone: str, what: str, why: str) -> DriverFailed:
        return DriverFailed(
            f"{zone} at {self._address} port {self._port}: cannot {what}: {why}",
            remedy="the zone has to let our key transfer and update it; see the server's log",
        )


def _by_type(records: Records) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for kind, value in records:
        found.setdefault(kind, []).append(value)
    return found


def _shown(records: Records) -> str:
    return ", ".join(f"{kind} {value}" for kind, value in records)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
