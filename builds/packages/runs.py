"""Runs of `build`: what each was asked for, and what became of every package.

A directory a run, ``package-runs/ID/run.json`` in the farm's state. Beside them ``revision.json``: the
name that GIT_REVISION had in the last run, and how often another name has cleared the graph."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from builds.record import BuildOutcome, fresh_directory, replace_file
from host.documents import Malformed, damaged, json_object, made, read_file
from host.files import foreign, make_directory, matching, write_atomic
from host.paths import FarmPaths
from host.printable import as_json
from inventory.errors import Call, NotFound, WrongState
from provision.engine.locks import Locks
from provision.engine.requester import NOBODY, Requester

PACKAGES_LOCK = "build"
_FORMAT = 1
_KEPT = 100
"""Runs; what each package's builds were is in their own records."""

BuildState = Literal["waiting", "running", "passed", "failed", "skipped", "taken"]
"""Of a package in a run. Taken: from the record of an earlier build, for nothing has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """A package in a run. ``name``: the build's, ``package``: the farm's name of it. ``number``: of its
    record, also of the one that was taken; 0: none. ``because``: why it was skipped, or built. ``vm``:
    where it is built."""

    name: str
    package: str
    state: BuildState = "waiting"
    number: int = 0
    because: str = ""
    vm: str = ""
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """``revision``: the name that GIT_REVISION was. ``asked``: packages by name, where not all were
    asked for. ``base``: the channel's generation that it began with; ``generation``: the one that the
    channel got; 0: none. ``flow``: what holds the packages that it made; "": it made none."""

    id: str
    farm: str
    result: BuildOutcome
    started: str
    ended: str = ""
    seconds: float = 0.0
    controller_seconds: float = 0.0
    guest_seconds: float = 0.0
    hypervisor_seconds: float = 0.0
    requester: Requester = NOBODY
    pid: int = 0
    command: str = ""
    farm_file: str = ""
    revision: str = ""
    asked: tuple[str, ...] = ()
    builders: tuple[str, ...] = ()
    repository: str = ""
    channel: str = ""
    base: int = 0
    flow: str = ""
    generation: int = 0
    packages: tuple[RunEntry, ...] = ()
    notes: tuple[str, ...] = ()
    directory: Path = Path()

    @property
    def path(self) -> Path:
        return self.directory / "run.json"

    def count(self, *states: BuildState) -> int:
        return sum(entry.state in states for entry in self.packages)

    def as_dict(self) -> dict[str, object]:
        """The record for ``--json``."""
        return {**self._stored(), "record": str(self.path)}

    def save(self, *, durable: bool) -> None:
        """Replace run.json in one step. NoSpace, WrongState if the disk refuses."""
        replace_file(self.path, as_json(self._stored(), indent=1) + "\n", durable=durable)

    def _stored(self) -> dict[str, object]:
        values = dataclasses.asdict(self)
        del values["directory"]
        return {"format": _FORMAT, **values}


class RunRecords:
    """A farm's runs. ``begin``, ``prune`` and ``know_revision`` are for whoever holds the lock."""

    def __init__(self, paths: FarmPaths) -> None:
        self.top = paths.root / "package-runs"
        self._locks = paths.locks

    def all(self) -> Iterator[RunRecord]:
        """The newest first, as they are read; damaged ones are left out. One that says it is running,
        though no living `build` is it, is shown as interrupted."""
        for directory in sorted(matching(self.top, "[!.]*"), reverse=True):
            if directory.is_dir() and not directory.is_symlink():
                with contextlib.suppress(NotFound, WrongState):
                    yield self._read(directory)

    def last(self) -> RunRecord | None:
        return next(self.all(), None)

    def find(self, run: str) -> RunRecord:
        """By its id, or "last". NotFound, WrongState."""
        if run == "last":
            found = self.last()
            if found is None:
                raise NotFound("nothing was built yet", remedy=Call("build"))
            return found
        return self._read(self.top / Path(run).name)

    def _read(self, directory: Path) -> RunRecord:
        path = directory / "run.json"
        try:
            data = json_object(read_file(path))
            if data.get("format") != _FORMAT:
                raise foreign(path, data.get("format"), _FORMAT, "the packages' own records stay")
            found = made(RunRecord, data, directory=directory)
        except FileNotFoundError:
            raise NotFound(f"there is no run {directory.name}") from None
        except (OSError, Malformed, ValueError) as error:
            remedy = "the packages' own records stay"
            raise damaged(path, "the record of a run", error, remedy) from error
        holder = Locks(self._locks).holder(PACKAGES_LOCK) if found.result == "running" else None
        if found.result == "running" and (holder is None or holder.pid != found.pid):
            return as_killed(found)
        return found

    def begin(self) -> Path:
        """Make a run's directory. Its name is the run's id: the UTC second."""
        return fresh_directory(self.top, datetime.now(UTC).strftime("%Y%m%dt%H%M%Sz"), "-")

    def prune(self) -> None:
        """Remove all but the newest."""
        for old in sorted(matching(self.top, "[!.]*"), reverse=True)[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    # -- GIT_REVISION -----------------------------------------------------------------------------

    def cleared(self, revision: str | None = None) -> int:
        """How often GIT_REVISION has cleared the graph. ``revision``: if it is that one now."""
        name, count = self._known()
        return count + (revision is not None and name not in ("", revision))

    def know_revision(self, revision: str, *, only_changed: bool) -> None:
        """Durably: that is its name from now on. ``only_changed``: another one clears nothing."""
        name, count = self._known()
        if name == revision:
            return
        count += bool(name) and not only_changed
        make_directory(self.top, mode=0o755)
        data = json.dumps({"name": revision, "cleared": count}).encode()
        write_atomic(self.top / ".revision.json", data)

    def _known(self) -> tuple[str, int]:
        try:
            found = json_object(read_file(self.top / ".revision.json"))
        except FileNotFoundError:
            return "", 0
        except (OSError, ValueError) as error:
            path = self.top / ".revision.json"
            remedy = f"remove it: everything is built once more then, if GIT_REVISION is another: {path}"
            raise damaged(path, "what GIT_REVISION was", error, remedy) from error
        name, count = found.get("name"), found.get("cleared")
        if isinstance(name, str) and isinstance(count, int) and count >= 0:
            return name, count
        return "", 0


def flow_of(run: str) -> str:
    """The name of a run's flow, from its id."""
    return f"build-{run}"


def as_killed(run: RunRecord) -> RunRecord:
    """A run that was killed, as it should read."""
    states: Mapping[str, BuildState] = {"running": "failed", "waiting": "skipped"}
    packages = tuple(
        dataclasses.replace(one, state=states.get(one.state, one.state), message="killed")
        if one.state in states
        else one
        for one in run.packages
    )
    note = "the run was killed: nothing was written after this"
    return dataclasses.replace(run, result="interrupted", packages=packages, notes=(*run.notes, note))
