"""What has to change in the live files, found by reading them. Nothing is written here."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import islice
from pathlib import Path

from host.files import file_error
from hypervisors.ownership import FarmIdentity
from inventory.collector import without_collector
from inventory.errors import Call, Conflict, FarmhandError, NotOurs, Text, WrongState
from inventory.model import Farm
from provision.allocate import Allocation
from provision.network.document import (
    Document,
    LiveFile,
    Ownership,
    embed,
    read,
    whole,
    with_plain_marks,
)
from provision.network.file_change import FileChange
from provision.network.render import documents_of, host_files, part_of
from provision.network.renderer import Renderer
from provision.network.serial import following, serial_of, with_serial
from provision.network.service import Service
from provision.network.service import services as used
from provision.network.state import NetworkState
from provision.network.view import View

_SHOWN = 200  # lines of a file's difference
_COMPARED = 20_000  # lines of it that are compared one with the other
ASIDE = ".before-farmhand"
"""What the name of a file ends with that was in the way and was taken aside."""


@dataclass(frozen=True, slots=True)
class Changes:
    """``files``: in the order they are written. ``documents``: all that should be, changed or not.
    ``gone``: paths of ours that should no longer be, whether they go now or went before. ``edited``:
    paths where somebody edited what is ours. ``serials``: the zones' serials after the change. ``view``:
    of all VMs, or of those that were asked about. ``kept``: files that are as they should be.
    ``trouble``: why files can't be written, by their services. ``left``: in words, what can't be taken
    away."""

    files: tuple[FileChange, ...]
    documents: tuple[Document, ...]
    gone: tuple[str, ...]
    edited: tuple[str, ...]
    serials: Mapping[str, int]
    view: View
    kept: tuple[FileChange, ...] = ()
    trouble: tuple[tuple[str, FarmhandError], ...] = ()
    left: tuple[str, ...] = ()


class Examiner:
    """Compares one farm's documents with the live files. ``force``: files of this very farm file are
    ours, whatever its identity was. ``aside``: an admin's file that is in the way is taken aside."""

    def __init__(
        self,
        farm: Farm,
        identity: FarmIdentity,
        state: NetworkState,
        *,
        today: date,
        force: bool = False,
        aside: bool = False,
    ) -> None:
        self._farm = farm
        self._identity = identity
        self._state = state
        self._today = today
        self._force = force
        self._aside = aside
        self._edited: list[str] = []
        self._serials: dict[str, int] = {}
        self._kept: list[FileChange] = []
        self._trouble: list[tuple[str, FarmhandError]] = []

    @without_collector()
    def examine(
        self,
        allocations: Mapping[str, Allocation],
        services: Sequence[str],
        vms: Collection[str] | None = None,
    ) -> Changes:
        """What applying these services would change. ``vms``: only these came, changed or went; then
        services that keep VMs apart (files of hosts, dynamic zones) look at nothing else.

        Trouble: NotOurs (a whole file of ours would replace another's), WrongState (marks in disorder,
        unreadable files). Errors: TemplateFailed, Conflict (one path twice)."""
        meant = [service for service in used(self._farm) if service.NAME in services]
        apart = (
            [s for s in meant if s.live_records or s.host_files(self._farm)] if vms is not None else []
        )
        whole_ones = [service for service in meant if service not in apart]
        names = [service.NAME for service in whole_ones]
        serials = self._live_serials(whole_ones)
        renderer = Renderer(self._farm, allocations, serials=serials)
        documents = documents_of(renderer, names)
        paths: set[str] = set()
        spread = [service for service in apart if service.host_files(self._farm)]
        if vms is not None and spread:
            hosts, paths = host_files(self._farm, allocations, vms, spread, self._state.files)
            documents += hosts
        changes: dict[str, FileChange] = {}
        for document in documents:
            if document.path in changes:
                raise Conflict(f"{document.path} would be written twice", remedy="give one another path")
            try:
                text, known = _read(document.path)
                live = read(document, self._identity, text)
            except FarmhandError as error:
                self._trouble.append((document.service, error))
                continue
            if document.renumbered and document.own == "file" and not self._same(document, live):
                serial = self._next_serial(document, text)
                document = document.renumbered(serial)  # noqa: PLW2901
                self._serials[document.zone] = serial
            changes |= self._tried(document, live, text, known)
        gone = self._gone({d.path for d in documents}, names, paths)
        taken: list[str] = []
        for document in gone:
            try:
                changes |= self._removal(document)
                taken.append(document.path)
            except FarmhandError as error:
                self._trouble.append((document.service, error))
        files = tuple(changes.values())
        if vms is not None:
            some = {vm: self._farm.vms[vm] for vm in vms if vm in self._farm.vms}
            renderer = Renderer(part_of(self._farm, some), allocations)
        return Changes(
            files,
            documents,
            tuple(taken),
            tuple(self._edited),
            dict(self._serials),
            renderer.view,
            tuple(self._kept),
            tuple(self._trouble),
        )

    @without_collector()
    def leave(self, allocations: Mapping[str, Allocation]) -> Changes:
        """What takes all that is ours out of all services, with what was there before us put back.
        ``allocations``: of all VMs. What is another's stays; trouble: what can't be read or told apart
        does, too."""
        found = dict(self._state.files)
        left: list[str] = []
        renderer = Renderer(self._farm, allocations)
        for service in used(self._farm):
            try:
                found |= {document.path: document for document in service.documents(renderer)}
            except FarmhandError as error:  # it can't be rendered any more: what is known of it goes
                left.append(f"{service.NAME}: {error.message}")
        changes: dict[str, FileChange] = {}
        for document in found.values():
            try:
                if document.initial and Path(document.path).exists():
                    left.append(f"{document.path}: the server's own: records by hand may be in it")
                else:
                    changes |= self._removal(document)
            except NotOurs as error:
                left.append(error.message)
            except FarmhandError as error:
                self._trouble.append((document.service, error))
        files, gone = tuple(changes.values()), tuple(self._state.files)
        nobody = Renderer(part_of(self._farm, {}), {}).view
        edited, serials = tuple(self._edited), dict(self._serials)
        trouble = tuple(self._trouble)
        return Changes(
            files, (), gone, edited, serials, nobody, trouble=trouble, left=tuple(left)
        )  # fmt: skip

    def _live_serials(self, services: Sequence[Service]) -> dict[str, int]:
        """For a comparison that leaves unchanged zones alone: each zone's as its file has it."""
        found = {}
        renderer = Renderer(self._farm, {})
        for zone in (zone for service in services for zone in service.zones(renderer)):
            text, _ = _read(zone.path)
            serial = serial_of(text) if text is not None else self._state.serials.get(zone.name)
            if serial is not None:
                found[str(zone.name)] = serial
        return found

    def _same(self, document: Document, live: LiveFile) -> bool:
        if document.initial and live.whose is not Ownership.ABSENT:
            return True  # the server's own by now
        return live.whose is Ownership.OURS and live.body == document.text

    def _next_serial(self, document: Document, text: str | None) -> int:
        known = [serial_of(text) if text else None, self._state.serials.get(document.zone)]
        return following([serial for serial in known if serial is not None], self._today)

    def _tried(
        self, document: Document, live: LiveFile, text: str | None, known: os.stat_result | None
    ) -> dict[str, FileChange]:
        """The changes, where there are some and they can be made."""
        try:
            found = self._change(document, live, text, known)
        except FarmhandError as error:
            self._trouble.append((document.service, error))
            return {}
        if not found:
            self._kept.append(_file_change(document, text, text, known))
        return found

    def _change(
        self, document: Document, live: LiveFile, text: str | None, known: os.stat_result | None
    ) -> dict[str, FileChange]:
        if self._same(document, live):
            return {}
        if live.whose is Ownership.EDITED:
            self._edited.append(document.path)
        if live.whose is Ownership.FARMS or (live.whose is Ownership.FORMER and not self._force):
            raise _of_a_farm(document, live, self._farm)
        found = {}
        if document.own == "file":
            if live.whose is Ownership.OTHERS:
                found = self._taken_aside(document, text, known)
            after = whole(document, self._identity)
        else:
            after = embed(document, self._identity, text or "")
            if after == (text or ""):
                return {}
            if document.zone:
                if text is None or serial_of(text) is None:
                    raise WrongState(
                        f"{document.path}: no SOA record is in it, and 'own: block' takes one as given",
                        remedy="write the zone's head, or let farmhand own the file ('own: file')",
                    )
                serial = self._next_serial(document, text)
                after = with_serial(after, serial)
                self._serials[document.zone] = serial
        return {**found, document.path: _file_change(document, text, after, known)}

    def _taken_aside(
        self, document: Document, text: str | None, known: os.stat_result | None
    ) -> dict[str, FileChange]:
        """The change that keeps an admin's file beside ours. No service reads that."""
        drop_in = _key_of(document, self._farm, lambda service: service.DROP_INS)
        if not self._aside or drop_in:
            raise NotOurs(
                f"{document.path} is there, and is not farmhand's: it is not touched",
                remedy=_make_room(document, self._farm, drop_in),
            )
        path = f"{document.path}{ASIDE}"
        if Path(path).exists():
            raise NotOurs(
                f"{document.path} can't be taken aside: {path} is there", remedy="move that elsewhere"
            )
        return {path: replace(_file_change(document, None, text, known), service="", path=path, zone="")}

    def _gone(self, wanted: set[str], services: Sequence[str], paths: set[str]) -> list[Document]:
        """What we once wrote and what should no longer be: of these services and paths, or of services
        that the farm has given up."""
        used = self._farm.services.used
        return [
            document
            for path, document in self._state.files.items()
            if path not in wanted
            and (path in paths or document.service in services or document.service not in used)
        ]

    def _removal(self, document: Document) -> dict[str, FileChange]:
        """Nothing where the file isn't ours. A file that was taken aside for it is put back."""
        text, known = _read(document.path)
        live = read(document, self._identity, text)
        if live.whose is Ownership.FORMER:
            raise _of_a_farm(document, live, self._farm)
        if live.whose is Ownership.EDITED:
            self._edited.append(document.path)
        elif live.whose is not Ownership.OURS:
            return {}
        if document.own == "block":
            after = embed(replace(document, text=""), self._identity, text or "")
            if document.zone and serial_of(after) is not None:
                after = with_serial(after, self._next_serial(document, text))
            return {document.path: _file_change(document, text, after, known)}
        path = f"{document.path}{ASIDE}"
        theirs, status = _read(path)
        if theirs is None:
            return {document.path: _file_change(document, text, None, known)}
        kept = replace(_file_change(document, theirs, None, status), service="", path=path, zone="")
        return {document.path: _file_change(document, text, theirs, status), path: kept}


def difference(change: FileChange) -> str:
    """A unified diff, with plain marks. Lines of an admin's around a block of ours, and a file that is
    taken aside or put back, are left out: they may hold secrets."""
    if change.path.endswith(ASIDE):
        return f"--- {change.path}\n+++ {change.path}\n"
    before = with_plain_marks(change.before or "").splitlines(keepends=True)
    after = with_plain_marks(change.after or "").splitlines(keepends=True)
    start, limit = 0, min(len(before), len(after))
    while start < limit and before[start] == after[start]:
        start += 1
    end = 0
    while end < limit - start and before[-1 - end] == after[-1 - end]:
        end += 1
    old, new = before[start : len(before) - end], after[start : len(after) - end]
    head = f"--- {change.path}\n+++ {change.path}\n"
    if len(old) > _COMPARED and len(new) > _COMPARED:
        return f"{head}@@ {len(old)} lines become {len(new)} @@\n"
    lines = difflib.unified_diff(old, new, n=0)
    shown = [line if line.endswith("\n") else f"{line}\n" for line in islice(lines, 2, _SHOWN + 2)]
    shown = [_numbered(line, start) for line in shown]
    more = sum(1 for _ in lines)
    return head + "".join(shown) + (f"... and {more} lines more\n" if more else "")


def _numbered(line: str, offset: int) -> str:
    """A hunk's head with the file's line numbers."""
    if not line.startswith("@@"):
        return line
    parts = []
    for part in line.split()[1:3]:
        number, _, count = part[1:].partition(",")
        parts.append(f"{part[0]}{int(number) + offset}{f',{count}' if count else ''}")
    return f"@@ {' '.join(parts)} @@\n"


def _read(path: str) -> tuple[str | None, os.stat_result | None]:
    """Text and status of a live file; None if there is none. WrongState if it isn't a regular file."""
    try:
        with Path(path).open("rb") as file:
            known = os.fstat(file.fileno())
            if not stat.S_ISREG(known.st_mode):
                raise WrongState(f"{path} is not a regular file", remedy="give the service another path")
            return file.read().decode(errors="surrogateescape"), known
    except FileNotFoundError:
        return None, None
    except OSError as error:
        raise file_error(error, Path(path), "read") from error


def _file_change(
    document: Document, before: str | None, after: str | None, known: os.stat_result | None
) -> FileChange:
    if known is None:
        return FileChange(
            document.service, document.path, before, after, document.mode, zone=document.zone
        )
    mode = stat.S_IMODE(known.st_mode)
    return FileChange(
        document.service, document.path, before, after, mode, known.st_uid, known.st_gid, document.zone
    )


def _key_of(
    document: Document, farm: Farm, keys: Callable[[Service], Sequence[str]] = lambda s: s.FILES
) -> str:
    """Which of these keys of its service has the document's path; "" if none."""
    for service in used(farm):
        if document.service == service.NAME:
            found = (key for key in keys(service) if getattr(service, key) == document.path)
            return next((f"services.{service.NAME}.{key}" for key in found), "")
    return ""


def _make_room(document: Document, farm: Farm, drop_in: str) -> Text:
    if drop_in:
        return f"give the service another path ({drop_in}), or take it away: all that is there is read"
    aside = (Call("network-apply", take_aside=True), f" keeps it as {document.path}{ASIDE}")
    if document.zone or _key_of(document, farm, lambda service: service.CAN_SHARE):
        return (
            "keep it and set 'own: block'; or move its content into the farm file (network-import): ",
            *aside,
        )
    return ("give the service another path; or: ", *aside)


def _of_a_farm(document: Document, live: LiveFile, farm: Farm) -> NotOurs:
    """Another farm's file, which its services read."""
    what = f"{document.path} is that of farm {live.farm}: it is not touched"
    if live.whose is Ownership.FORMER:
        return NotOurs(
            what,
            remedy=(
                "it has this farm file and another state; if that is lost: ",
                Call("network-apply", force=True),
            ),
        )
    choices = []
    if document.zone:
        choices.append(f"another zone (services.{document.service}.zone), or subnet")
    elif key := _key_of(document, farm):
        path = Path(document.path)
        choices.append(f"another file ({key}: {path.with_stem(f'{path.stem}-{farm.farm}')})")
    if document.zone or _key_of(document, farm, lambda service: service.CAN_SHARE):
        choices.append("a file of yours, with 'own: block' in both farm files, which they share")
    return NotOurs(what, remedy=f"choose for this farm: {'; or '.join(choices) or 'another path'}")
