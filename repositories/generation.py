"""Generations: what each is made of, as a document of ours; and which of them each channel had."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from host.documents import Malformed, damaged, json_object, made, read_file
from host.files import file_error, write_atomic
from host.printable import one_line
from inventory.errors import NotFound, WrongState
from repositories.chunks import ChunkRef
from repositories.format import IndexFile, Release
from repositories.layout import Layout

_NUMBER = re.compile(r"[1-9][0-9]{0,17}")

Verb = Literal["make", "add", "remove", "promote", "roll back", "import", "flow", "pass", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A state of a channel's packages, for ever. ``sequence``: its number in the repository, given under
    the lock, never again. ``by``: who asked. ``base``: the generation whose place it was made to take;
    0: none. ``origin``: the one that its packages are of, where it is a promotion or a roll-back.
    ``flow``: of what flow it is a candidate; "": none."""

    sequence: int
    channel: str
    verb: Verb
    made: datetime
    by: str
    base: int = 0
    origin: int = 0
    flow: str = ""
    note: str = ""
    chunks: tuple[ChunkRef, ...] = ()
    indexes: tuple[IndexFile, ...] = ()
    components: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    description: str = ""
    keys: str = ""
    """The SHA-256 of the public keys that it is signed by (``Layout.known_key``); "": not signed."""
    date: datetime
    """What its signed file says: later than that of each generation that the channel had before."""

    @property
    def count(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def size(self) -> int:
        """Bytes of its packages' files."""
        return sum(chunk.size for chunk in self.chunks)

    def release(self, repository: str) -> Release:
        return Release(
            repository=repository,
            channel=self.channel,
            sequence=self.sequence,
            date=self.date,
            description=self.description,
            components=self.components,
            architectures=self.architectures,
        )


@dataclass(frozen=True, slots=True)
class Reason:
    """Why there is a new generation, or a channel moves. ``by``: who asked. ``flow``: what flow it is
    of; "": none."""

    verb: Verb
    by: str
    note: str = ""
    flow: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One move of a channel's pointer. ``sequence``: where it leads to; 0: the channel was dropped.
    ``before``: where it led to; 0: nowhere yet. ``origin``: as the generation has it, which may be
    collected by now. ``indexes``: its own, under the names of their content, below its tree."""

    at: datetime
    sequence: int
    before: int
    verb: Verb
    by: str
    note: str = ""
    origin: int = 0
    indexes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        generation: Generation,
        before: int,
        at: datetime,
        reason: Reason,
        indexes: tuple[str, ...],
    ) -> LogEntry:
        return cls(
            at=at, sequence=generation.sequence, before=before, verb=reason.verb, by=reason.by,
            note=reason.note, origin=generation.origin, indexes=indexes,
        )  # fmt: skip


_LOGS = 32
_recent_logs: dict[Path, tuple[bytes, tuple[LogEntry, ...]]] = {}
"""Of those read lately by this process: the bytes, and the entries in them. Lines are only appended."""


class Documents:
    """The documents of a repository's generations, and its channels' logs."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[int, Generation] = {}
        self._logs: dict[str, tuple[tuple[int, int, int], tuple[LogEntry, ...]]] = {}

    def read(self, sequence: int) -> Generation:
        """NotFound: there is none. WrongState: it is damaged."""
        if sequence not in self._known:
            self._known[sequence] = self._read(sequence)
        return self._known[sequence]

    def _read(self, sequence: int) -> Generation:
        path = self._layout.document(sequence)
        try:
            return made(Generation, json_object(read_file(path)))
        except FileNotFoundError:
            have = some_sequences(self.sequences())
            raise NotFound(f"{self._layout.top} has no generation {sequence}: it has {have}") from None
        except (OSError, Malformed) as error:
            raise damaged(
                path,
                f"the list of generation {sequence}'s packages",
                error,
                "put it back from a backup or a mirror; the generation can't be used until then",
            ) from error

    def sequences(self) -> tuple[int, ...]:
        """Of all there are, in their order."""
        names = (name[:-5] for name in _names(self._layout.documents) if name.endswith(".json"))
        return tuple(sorted(int(name) for name in names if _NUMBER.fullmatch(name)))

    def all(self) -> Iterator[Generation]:
        return map(self.read, self.sequences())

    def write(self, generation: Generation) -> None:
        """Durably: from then on it is one."""
        data = json.dumps(asdict(generation), default=_text, indent=None).encode() + b"\n"
        write_atomic(self._layout.document(generation.sequence), data, mode=0o600)
        self._known[generation.sequence] = generation

    def remove(self, sequence: int) -> None:
        """Durably: from then on it is none."""
        path = self._layout.document(sequence)
        path.unlink(missing_ok=True)
        self._known.pop(sequence, None)
        sync_directory(path.parent)

    def next_sequence(self) -> int:
        """A number that none had, and none will have. The lock is held."""
        path = self._layout.last_sequence
        try:
            last = made(_Last, json_object(read_file(path))).sequence
        except FileNotFoundError:
            last = 0
        except (OSError, Malformed):  # then what is there says enough
            last = 0
        numbers = [int(name) for name in _names(self._layout.trees) if _NUMBER.fullmatch(name)]
        sequence = max(last, *self.sequences(), *numbers, *self._logged(), 0) + 1
        write_atomic(path, json.dumps({"sequence": sequence}).encode(), mode=0o600)
        return sequence

    def _logged(self) -> Iterator[int]:
        for channel in self.channels():
            for entry in self.moves(channel):
                yield entry.sequence

    # -- channels ------------------------------------------------------------------------------------

    def head(self, channel: str) -> int:
        """The number of the generation that the channel points to; 0: none yet. WrongState: what has
        the pointer's name is none."""
        pointer = self._layout.pointer(channel)
        try:
            leads = str(pointer.readlink())
        except FileNotFoundError:
            return 0
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise file_error(error, pointer, "read the link") from error
            leads = ""
        place, _, name = leads.rpartition("/")
        if place == f"../published/{channel}" and _NUMBER.fullmatch(name):
            return int(name)
        what = f"leads to {one_line(leads, 100)}" if leads else "is no link"
        raise WrongState(
            f"{pointer} {what}, and should lead to a generation that was published in {channel}",
            remedy="move it away: the next change puts it back, by the channel's log",
        )

    def channels(self) -> tuple[str, ...]:
        """Those that have a log: all that ever were, sorted."""
        names = (name for name in _names(self._layout.logs) if name.endswith(".jsonl"))
        return tuple(sorted(name.removesuffix(".jsonl") for name in names))

    def log(self, channel: str) -> tuple[LogEntry, ...]:
        """Oldest first, since it was begun: if it was ever dropped, since then."""
        entries = self.moves(channel)
        drops = (number for number, entry in enumerate(entries, 1) if not entry.sequence)
        return entries[max(drops, default=0) :]

    def moves(self, channel: str) -> tuple[LogEntry, ...]:
        """All that its name ever led to. A line that can't be read is left out: a power cut may take the
        last one, and ``tidy`` writes it anew."""
        path = self._layout.log(channel)
        try:
            found = path.stat()
            state = found.st_ino, found.st_size, found.st_mtime_ns
            known, kept = self._logs.get(channel, (None, ()))
            if known == state:
                return kept
            data = read_file(path)
        except FileNotFoundError:
            return ()
        except (OSError, Malformed) as error:
            raise damaged(path, f"{channel}'s log", error, "move it aside: history is lost") from error
        before, its = _recent_logs.get(path, (b"", ()))
        if not data.startswith(before):  # somebody changed it
            before, its = b"", ()
        fresh = []
        for line in data[len(before) :].splitlines():
            with contextlib.suppress(Malformed):
                fresh.append(made(LogEntry, json_object(line)))
        entries = (*its, *fresh)
        if data.endswith(b"\n"):
            while len(_recent_logs) >= _LOGS:
                _recent_logs.pop(next(iter(_recent_logs)), None)
            _recent_logs[path] = data, entries
        self._logs[channel] = state, entries
        return entries

    def append(self, channel: str, entry: LogEntry) -> None:
        """Durably."""
        path = self._layout.log(channel)
        line = json.dumps(asdict(entry), default=_text).encode()
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(handle).st_size
                torn = size and os.pread(handle, 1, size - 1) != b"\n"
                data = (b"\n" if torn else b"") + line + b"\n"
                if os.write(handle, data) < len(data):  # write(2) says so once the disk is full
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise file_error(error, path, "write") from error

    def superseded(self, channel: str, grace: float, now: datetime) -> tuple[int, ...]:
        """Numbers of the generations that the channel left no longer than ``grace`` seconds ago, the
        latest first, without the present one."""
        head = self.head(channel)
        left = (e.before for e in reversed(self.moves(channel)) if (now - e.at).total_seconds() <= grace)
        return tuple(number for number in dict.fromkeys(left) if number not in (0, head))


@dataclass(frozen=True, slots=True)
class _Last:
    sequence: int


def later_than(before: datetime | None) -> datetime:
    """Now, in whole seconds; after ``before`` also where the clock went back."""
    now = datetime.now(UTC).replace(microsecond=0)
    if before is not None and now <= before:
        return datetime.fromtimestamp(before.timestamp() + 1, UTC)
    return now


def some_sequences(sequences: tuple[int, ...]) -> str:
    few = [*map(str, sequences[:2]), "...", str(sequences[-1])] if len(sequences) > 6 else sequences
    return ", ".join(map(str, few)) or "none yet"


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(directory: Path) -> list[str]:
    try:
        return [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        return []


def _text(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()
