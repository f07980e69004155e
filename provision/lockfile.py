"""What the VMs of a farm were given, in a file for people and version control: JSON, one VM a line."""

from __future__ import annotations

import contextlib
import json
import socket
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address
from json.encoder import encode_basestring_ascii as _quoted
from operator import itemgetter, le
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from host.files import file_error, foreign, write_atomic
from inventory.errors import WrongState

_ABOUT = (
    "Written by farmhand: which MAC, address and ssh port each VM of this farm was given. "
    "Keep it with the farm file; removing it lets VMs not yet made get others."
)


class Resting(NamedTuple):
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
        with contextlib.suppress(OSError):  # one that can't be reached is _text's to say
            which = _which(self.path)
        seen = self._seen
        if seen is None or not which or seen[0] != which:
            seen = self._seen = (which, self._load())
        return seen[1]

    def _load(self) -> LockFileContent:
        text = _text(self.path)
        data = _object(self.path, text)
        found = data.get("format")
        if text.strip() and found != _FORMAT:
            remedy = f"move it aside (mv {self.path} {self.path}.aside): VMs may then be given others"
            raise foreign(self.path, found, _FORMAT, remedy)
        try:
            vms = data.get("vms", {})
            _check(vms)
            resting = {
                IPv4Address(address): Resting(str(one["vm"]), datetime.fromisoformat(one["until"]))
                for address, one in data.get("resting", {}).items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise _unreadable(self.path, f"{type(error).__name__} {error}") from error
        return LockFileContent(vms, resting, text)

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
    """Entries' fields by their types, and addresses in their one form (inet_pton(3) takes no other):
    KeyError, TypeError, OSError."""
    entries = vms.values()
    if odd := [vm for vm, entry in vms.items() if len(entry) != len(_FIELDS)]:
        raise TypeError(f"of {odd[0]}: {vms[odd[0]]}")
    macs, addresses, ports = (list(map(itemgetter(name), entries)) for name in _FIELDS)
    if {*map(type, macs)} - {str} or {*map(type, ports)} - {int}:
        raise TypeError("a MAC that is no text, or a port that is no number")
    for address in addresses:
        if address is not None:
            socket.inet_pton(socket.AF_INET, address)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise _unreadable(path, str(error)) from error
    except OSError as error:
        raise file_error(error, path, "read") from error


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        data = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(data, dict):
        raise _unreadable(path, "not an object")
    return data


def _unreadable(path: Path, why: str) -> WrongState:
    return WrongState(
        f"{path} is not readable as farmhand's record of what was given out: {why}",
        remedy="put it back from version control, or mend it; each VM's entry is one line",
    )
