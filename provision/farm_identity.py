"""The farm's identity, kept with its state: made once, before anything is marked with it.

It belongs to one state directory and one farm file. Where either turns out to be another's, every
command is refused, and names both; ``adopt`` alone goes on. A file, or a state directory, that was moved
is the same one: it is gone where it was. So is a copy of the farm file with the same content, for as
long as it has that."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from host.documents import Malformed, damaged, json_object, made, read_file
from host.files import file_error, own_directory, same_place, sync, write_atomic, write_new
from host.processes import account
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, FarmhandError, NotOurs
from inventory.model import Farm
from inventory.reading import read

_FORMAT = 1
_NUMBER = re.compile(r"[0-9a-f]{32}")
_MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True, slots=True)
class _Note:
    """What the file holds. ``place``: the directory that it is in. ``machine``: see ``_machine``."""

    id: str
    file: str
    controller: str
    machine: str
    place: str


class IdentityKeeper:
    """One farm's identity, as one process sees it."""

    def __init__(self, farm: Farm, root: Path, *, adopting: bool = False) -> None:
        """``root``: the farm's state. ``adopting``: it may be another's, and is only looked at until
        ``take_over``. Nothing is read yet."""
        self._farm = farm
        self.path = root / "identity.json"
        self._adopting = adopting
        self._identity: FarmIdentity | None = None
        self._fresh = secrets.token_hex(16)

    @property
    def identity(self) -> FarmIdentity:
        """As it is kept; until it is, a new one, which nothing has for its mark. WrongState for a file
        that can't be read."""
        if self._identity is None:
            note = self._read()
            if note is None or (self._adopting and self._elsewhere(note)):
                self._identity = self._of(self._fresh)
            else:
                self._identity = self._of(note.id)
        return self._identity

    def check(self) -> None:
        """NotOurs where the state is another farm file's, or was copied here."""
        note = self._read()
        if note is None:
            return
        if why := self._elsewhere(note):
            instead = "go on there; or, if the farm is to go on here alone, take over: "
        elif why := self._of_another_file(note):
            instead = "give this farm another name; or, if the other is to end, take over: "
        else:
            return
        raise NotOurs(why, remedy=(instead, Call("adopt")))

    def taken_over(self) -> str:
        """What ``adopt`` changes of it, in words; "" where nothing is another's."""
        note = self._read()
        if note is None:
            return ""
        if why := self._elsewhere(note):
            return f"{why}: this farm gets an identity of its own"
        why = self._of_another_file(note)
        return f"{why}: from now on it is {self._farm.path}'s" if why else ""

    def keep(self) -> bool:
        """Write it durably, unless it is there as it is to be. True if it is another than it seemed
        before. NotOurs as ``check``."""
        own_directory(self.path.parent, mode=0o711)
        before, self._identity = self._identity, None
        if self._read() is None:
            self._make()
            self._identity = None
        if self._adopting and self.taken_over():
            return False
        self.check()  # another farm file may have been quicker
        self._write()
        return before not in (None, self.identity)

    def take_over(self) -> None:
        """Make it this farm file's, here, whoever's it was."""
        self._adopting = True
        self._write()

    def _write(self) -> None:
        wanted = self._note(self.identity)
        if self._read() != wanted:
            write_atomic(self.path, _document(wanted), mode=0o600)

    def _make(self) -> None:
        """Of several that begin at once, one's is everybody's."""
        note = self._note(self.identity)
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            write_new(fresh, _document(note), mode=0o600)
            with contextlib.suppress(FileExistsError):
                os.link(fresh, self.path)
            sync(self.path.parent)
        except OSError as error:
            raise file_error(error, self.path, "write") from error
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)

    def _read(self) -> _Note | None:
        try:
            found = json_object(read_file(self.path))
            if found.get("format") != _FORMAT:
                raise Malformed("it is in another farmhand's format")
            note = made(_Note, found)
            if not _NUMBER.fullmatch(note.id):
                raise Malformed("its id is no number of a farm's")
            if "\0" in note.file + note.place:
                raise Malformed("a path in it is none")
        except FileNotFoundError:
            return None
        except (OSError, Malformed) as error:
            remedy = ("put it back; or remove it, then take the VMs over: ", Call("adopt"))
            raise damaged(self.path, "whose the farm's VMs are", error, remedy) from error
        return note

    def _of(self, number: str) -> FarmIdentity:
        controller = f"{account(os.geteuid())}@{os.uname().nodename}"
        return FarmIdentity(self._farm.farm, number, str(self._file), controller)

    def _note(self, identity: FarmIdentity) -> _Note:
        return _Note(
            identity.id, identity.file, identity.controller, _machine(), str(self.path.parent.resolve())
        )

    @property
    def _file(self) -> Path:
        return self._farm.path.absolute()

    def _elsewhere(self, note: _Note) -> str:
        """Why the state isn't where it was made; "" if it is."""
        of = f"the state of farm {self._farm.farm} in {self.path.parent}"
        if note.machine and _machine() and note.machine != _machine():
            return (
                f"{of} was made by {note.controller} for {note.file} on a machine with another "
                f"{_MACHINE_ID}: it was copied here, or this machine's number is new"
            )
        there = Path(note.place, self.path.name)
        if not same_place(there, self.path) and _number_in(there) == note.id:
            return f"{of} is a copy of the one in {note.place}, which is there, too"
        return ""

    def _of_another_file(self, note: _Note) -> str:
        """Why the state is another farm file's; "" if it isn't."""
        noted = Path(note.file)
        if noted == self._file or not _says(noted, self._farm.farm):
            return ""
        try:
            if same_place(noted, self._file) or read(noted) == read(self._file):
                return ""
        except FarmhandError:
            pass
        return (
            f"farm {self._farm.farm} of {self.path.parent} is that of {note.file} ({note.id[:8]}, "
            f"{note.controller}); {self._file} has the same name and says something else"
        )


def _document(note: _Note) -> bytes:
    return (json.dumps({"format": _FORMAT, **asdict(note)}, indent=1) + "\n").encode()


def _number_in(path: Path) -> object:
    try:
        return json_object(read_file(path)).get("id")
    except (OSError, Malformed):
        return None


def _says(file: Path, farm: str) -> bool:
    """Whether that farm file is there and, as far as can be seen, names this farm."""
    try:
        text = file.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):  # something else by now
        return False
    except OSError:  # somebody's who doesn't show it
        return True
    return bool(re.search(rf"^['\"]?farm['\"]?\s*:\s*['\"]?{re.escape(farm)}['\"]?\s*(#|$)", text, re.M))


def _machine() -> str:
    """Tells this machine from others; "" where that isn't known. Not the id itself, which is to stay
    here (machine-id(5))."""
    try:
        found = _MACHINE_ID.read_bytes().strip()
    except OSError:
        return ""
    return hashlib.sha256(b"farmhand identity " + found).hexdigest()[:32] if found else ""
