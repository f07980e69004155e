"""What the VMs of a farm were given, in a file for people and version control: JSON, one VM a line."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address
from json.encoder import encode_basestring_ascii as _quoted
from operator import itemgetter, le
from pathlib import Path
from typing import Any, TypedDict

from host.documents import Malformed, damaged, json_object, made, read_file, twice
from host.files import foreign, write_atomic
from inventory.errors import WrongState

_ABOUT = (
    "Written by farmhand: which MAC, address and ssh port each VM of this farm was given. "
    "Keep it with the farm file; removing it lets VMs not yet made get others."
)


@dataclass(frozen=True, slots=True)
class Resting:
    """An address that nobody else is given yet: the VM that had it, and until when."""

    vm: str
    until: datetime


class LockFileEntry(TypedDict):
    """One VM's entry in the lock file, already checked."""

    mac: str
    address: str | None
    ssh_port: int


_FORMAT = 1
_FIELDS = ("mac", "address", "ssh_port")
_KEYS = frozenset(_FIELDS)
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")


@dataclass(slots=True)
class LockFileContent:
    """What was read. Its readers share it; whoever changes it takes a copy."""

    vms: dict[str, LockFileEntry] = field(default_factory=dict)
    resting: dict[IPv4Address, Resting] = field(default_factory=dict)
    text: str = ""  # of the file
    _by: dict[str, Mapping[Any, str]] = field(default_factory=dict)

    def by(self, what: str) -> Mapping[Any, str]:
        """Who has what, by the value of that field of the entries. Made once."""
        if what not in self._by:
            found = map(itemgetter(what), self.vms.values())
            self._by[what] = dict(zip(found, self.vms, strict=True))
        return self._by[what]

    def copy(self) -> LockFileContent:
        return LockFileContent(dict(self.vms), dict(self.resting), self.text)


class LockFile:
    """One farm's lock file. Whoever writes it keeps all others from it. WrongState if it is damaged."""

    def __init__(self, farm: str, path: Path) -> None:
        self.path = path
        self._farm = farm
        self._seen: tuple[tuple[int, ...], LockFileContent] | None = (
            None  # which file, and what is in it
        )

    def read(self) -> LockFileContent:
        """The content. The file is only ever replaced, so an unchanged one is not read again."""
        which: tuple[int, ...] = ()
        with contextlib.suppress(OSError):  # one that can't be reached is _load's to say
            which = _which(self.path)
        seen = self._seen
        if seen is None or not which or seen[0] != which:
            seen = self._seen = (which, self._load())
        return seen[1]

    def _load(self) -> LockFileContent:
        try:
            data = read_file(self.path)
            if not data.strip():
                return LockFileContent(text=data.decode())
            found = json_object(data)
        except FileNotFoundError:
            return LockFileContent()
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        if found.get("format") != _FORMAT:
            remedy = f"move it aside (mv {self.path} {self.path}.aside): VMs may then be given others"
            raise foreign(self.path, found.get("format"), _FORMAT, remedy)
        try:
            vms, resting = found.get("vms", {}), found.get("resting", {})
            if not isinstance(vms, dict) or not isinstance(resting, dict):
                raise Malformed("'vms' and 'resting' are to be JSON objects")
            _check(vms)
            rest = {_address(address): made(Resting, one) for address, one in resting.items()}
        except ValueError as error:
            raise self._damaged(error) from error
        return LockFileContent(vms, rest, data.decode())

    def _damaged(self, error: Exception) -> WrongState:
        return damaged(
            self.path, "the record of what VMs were given", error,
            "put it back from version control, or mend it (each VM's entry is one line); moved aside, "
            "VMs not yet made may be given others",
        )  # fmt: skip

    def write(self, book: LockFileContent, changed: Iterable[str]) -> None:
        """Write it durably. ``changed``: all VMs whose entries differ from what was read, or are
        gone."""
        now = datetime.now(UTC)
        data = {
            "about": _ABOUT,
            "format": _FORMAT,
            "farm": self._farm,
            "vms": {},
            "resting": {
                str(a): {"vm": one.vm, "until": one.until.isoformat(timespec="seconds")}
                for a, one in sorted(book.resting.items())
                if one.until > now
            },
        }
        book.text = _pretty(data, _lines(book, changed))
        write_atomic(self.path, book.text.encode())
        self._seen = (_which(self.path), book)  # nobody else writes while we hold the locks


def _which(path: Path) -> tuple[int, ...]:
    now = path.stat()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def _pretty(data: dict[str, Any], lines: Sequence[str]) -> str:
    """As ``json.dumps(data, indent=2)``, but a line for each VM: good for people, diffs and speed."""
    text = json.dumps(data, indent=2)
    if not lines:
        return f"{text}\n"
    entries = ",\n".join(lines)
    return text.replace('"vms": {}', f"{_BEGIN}{entries}{_END}", 1) + "\n"


_BEGIN, _END = '"vms": {\n', "\n  }"


def _lines(book: LockFileContent, changed: Iterable[str]) -> Sequence[str]:
    """One line for each VM, by name. Lines of VMs that are not in ``changed`` are taken from the file,
    if it is as we write it."""
    lines = book.text.partition(_BEGIN)[2].partition(_END)[0].split(",\n")
    in_order = not any(map(le, lines[1:], lines))
    for vm in changed if in_order else ():
        start = f"    {_quoted(vm)}: "
        at = bisect_left(lines, start)
        there = at < len(lines) and lines[at].startswith(start)
        lines[at : at + there] = [_line(vm, book.vms[vm])] if vm in book.vms else []
    if in_order and len(lines) == len(book.vms):
        return lines
    return [_line(vm, book.vms[vm]) for vm in sorted(book.vms)]


def _line(vm: str, entry: LockFileEntry) -> str:
    address = f'"{entry["address"]}"' if entry["address"] else "null"
    start = f'    {_quoted(vm)}: {{"mac": {_quoted(entry["mac"])}, "address": {address}'
    return f'{start}, "ssh_port": {entry["ssh_port"]}}}'


def _check(vms: Mapping[str, LockFileEntry]) -> None:
    """Entries' fields by their types, each value in its one form, and what two of them have, which
    daemons would refuse: Malformed."""
    for vm, entry in vms.items():
        if not isinstance(entry, dict) or entry.keys() != _KEYS:
            raise Malformed(f"the entry of {vm!r} isn't {', '.join(_FIELDS)}")
    macs, addresses, ports = (list(map(itemgetter(name), vms.values())) for name in _FIELDS)
    for mac in macs:
        if type(mac) is not str or not _MAC.fullmatch(mac):
            raise Malformed(f"{mac!r} is no MAC")
    for port in ports:
        if type(port) is not int or not 0 < port < 2**16:
            raise Malformed(f"{port!r} is no port")
    given = [address for address in addresses if address is not None]
    for address in given:
        _address(address)
    for what, values in (("MAC", macs), ("address", given)):
        if len(set(values)) < len(values):
            shared = twice(values)
            names = " and ".join(vm for vm, entry in vms.items() if shared in entry.values())
            raise Malformed(f"{names} have the same {what}, {shared}")


def _address(text: object) -> IPv4Address:
    """Malformed: it isn't one in its one form (inet_pton(3) takes no other)."""
    try:
        return IPv4Address(socket.inet_pton(socket.AF_INET, text))  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError):
        raise Malformed(f"{text!r} is no address") from None
