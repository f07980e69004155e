"""Build records: what was built from what, where, how long it took and what came out.

A record is a directory ``builds/<id>/``: ``record.json`` (this module's values), ``index.html``
(``builds.page``), a log a step, ``artifacts/``. It is written anew, atomically, after every step, so
that a killed cycle leaves what it knew. Nothing in it is secret: directories 0755, files 0644.

Times are ISO 8601 in UTC, durations seconds, sizes bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from host.documents import Malformed, damaged, json_object, made, moment, read_file
from host.files import file_error, foreign, make_directory, matching, open_new, write_atomic
from host.paths import FarmPaths
from host.printable import as_json
from inventory.errors import Call, NotFound, Remedy, Text, WrongState, remedy_as_data, remedy_of
from provision.clean_state import AddedTools
from provision.engine.locks import Holder, Locks
from provision.engine.requester import NOBODY, Requester

CYCLE_LOCK = "cycle"
LAST_GOOD = "last-good"
FORMAT = 2
_SHORTEST = 4
"""Characters of a commit's beginning, as git has it (core.abbrev)."""
_NEVER_REMOVED = ("running",)
_WHOLE = Call("cycle")

Status = Literal["waiting", "running", "passed", "failed", "skipped", "interrupted"]
"""Of a step. Skipped: by ``--from``, ``--only``, or after a failure."""
BuildOutcome = Literal["running", "passed", "partial", "failed", "interrupted"]
"""Of a build. Partial: all that was asked for passed, but steps were left out by ``--from`` or
``--only``: that is no good build by itself."""


Direction = Literal["in", "out", ""]
"""Of a file: into the build, out of it into the record, or within it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file that went in or came out. ``path``: relative to the record, or its place in ``vm``."""

    name: str
    size: int
    sha256: str
    step: str = ""
    vm: str = ""
    path: str = ""
    flow: Direction = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    name: str
    kind: str
    vm: str  # the first that it uses
    to: str = ""  # the VM that it carries something to from there
    status: Status = "waiting"
    chosen: bool = True  # False: left out by --from or --only
    done_in: str = ""  # left out: the build in which it passed, whose state the VM held
    unverified: str = ""  # left out, and needed by what was run: why it isn't known to have been done
    started: str = ""
    offset: float = 0.0  # seconds since the build's start
    seconds: float = 0.0
    limit: float = 0.0
    details: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what its kind says of it
    exit: int | None = None
    failure: str = ""  # its class
    message: str = ""  # one line: what failed
    remedy: Remedy = ""  # what to do, where that is known
    tail: str = ""  # the last lines of the log, as builds.log_text shows them
    ours: tuple[int, ...] = ()  # numbers of the log's lines that are farmhand's own; the first is 1
    console: str = ""  # the VM's console, where the VM or its connection was lost
    log: str = ""  # file name within the record
    files: tuple[FileRecord, ...] = ()  # fetched or carried by it


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRecord:
    """A VM as it was when this build first used it."""

    vm: str
    host: str = ""
    driver: str = ""
    template: str = ""  # generation, such as base@3
    checkpoint: str = ""
    # its disk was that checkpoint when this build began on it, as the store proves; False: it was taken
    # as it was; None: on the word of its reset command, or not used yet
    pristine: bool | None = None
    tools: AddedTools | None = None  # where that is its clean: what it has beside its template
    memory_seal: str = ""  # sha256 of the memory that it ran on from, a warm checkpoint's; "": it booted
    beyond_proof: str = ""  # what disk and memory being that checkpoint does not prove
    boot_id: str = ""
    clock_skew: float | None = None  # seconds, guest minus host, as found
    clock_set: bool = False
    memory: int = 0  # bytes while building
    packages: str = ""  # file within the record: what was installed before the build
    packages_sha256: str = ""
    packages_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    repository: str = ""
    asked: str = ""
    commit: str = ""  # "" where nobody knows
    tree: str = ""
    subject: str = ""
    branch: str = ""  # that was asked for, or that HEAD was on; "" if none was
    version: str = ""  # by debian/changelog, or by its tags
    previous: str = ""  # the commit of the whole build before
    changed: bool | None = None  # since that one; None: there was none, or nobody knows
    unverified: str = ""  # why nobody knows which commit the VMs held: steps that fetch were left out

    def is_named(self, revision: str) -> bool:
        """Whether that is the beginning of its commit, its branch or version, or what was asked for."""
        return self.begins(revision) or revision in {self.branch, self.version, self.asked} - {""}

    def begins(self, revision: str) -> bool:
        """Whether its commit does so."""
        return len(revision) >= _SHORTEST and self.commit.startswith(revision.lower())


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedGeneration:
    """A generation of a package repository that a VM was pointed to. ``url``: of its tree, for ever;
    "": it went through the VM's connection."""

    repository: str
    channel: str
    generation: int
    url: str
    vm: str
    step: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRecord:
    """One build. ``directory``: where it lies now; it is not part of the JSON."""

    id: str
    farm: str
    result: BuildOutcome
    started: str
    ended: str = ""
    seconds: float = 0.0
    controller_seconds: float = 0.0  # neither waiting for guests nor for hypervisors
    guest_seconds: float = 0.0  # at least one guest worked
    hypervisor_seconds: float = 0.0  # no guest worked, but a hypervisor or disk store did
    requester: Requester = NOBODY
    pid: int = 0
    command: str = ""
    farm_file: str = ""
    asked: Call = _WHOLE  # what the cycle was told, beside where to begin
    source: SourceRecord = SourceRecord()
    vms: tuple[VmRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    inputs: tuple[FileRecord, ...] = ()
    outputs: tuple[FileRecord, ...] = ()
    repositories: tuple[UsedGeneration, ...] = ()
    notes: tuple[str, ...] = ()
    directory: Path = Path()

    @property
    def failed_step(self) -> StepRecord | None:
        return next((step for step in self.steps if step.status in ("failed", "interrupted")), None)

    @property
    def partial(self) -> str:
        """``1/7`` if one of seven steps was asked for; "" if all were."""
        chosen = sum(step.chosen for step in self.steps)
        return f"{chosen}/{len(self.steps)}" if chosen < len(self.steps) else ""

    @property
    def verdict(self) -> str:
        """The result in words, such as ``passed``, ``partial 1/7``, ``failed, partial 3/7``."""
        if not self.partial:
            return self.result
        return f"{'' if self.result == 'partial' else f'{self.result}, '}partial {self.partial}"

    @property
    def path(self) -> Path:
        return self.directory / "record.json"

    @property
    def page(self) -> Path:
        return self.directory / "index.html"

    def as_dict(self) -> dict[str, object]:
        """The record for ``--json``; ``record`` and ``page`` say where it lies."""
        return {**self._stored(), "record": str(self.path), "page": str(self.page)}

    def _stored(self, text: Callable[[Text], object] = lambda known: known) -> dict[str, object]:
        values = dataclasses.asdict(self)
        del values["directory"]
        for step, known in zip(values["steps"], self.steps, strict=True):
            step["remedy"] = text(known.remedy)
        values["asked"] = text(self.asked)
        return {"format": FORMAT, **values, "partial": self.partial}

    def save(self, *, durable: bool = True) -> None:
        """Replace record.json in one step. NoSpace, WrongState if the disk refuses."""
        text = as_json(self._stored(remedy_as_data), indent=1) + "\n"
        replace_file(self.path, text, durable=durable)


def replace_file(path: Path, text: str, *, durable: bool) -> None:
    """Replace a file in one step, with mode 0644. While a build runs it need not be ``durable``: if this
    process dies, the old file or the new is there all the same, and a disk's flush may take longer than
    a step."""
    if durable:
        write_atomic(path, text.encode())
        return
    part = path.with_name(f".{path.name}.part")
    try:
        with open_new(part, mode=0o644) as file:
            file.write(text.encode())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise file_error(error, path, "write") from error


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_directory(paths: FarmPaths, commit: str) -> Path:
    """Make a record's directory. Its name is the build's id: UTC second and short commit."""
    base = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ") + (f"-{commit[:7]}" if commit else "")
    return fresh_directory(paths.builds, base, ".")


def fresh_directory(top: Path, base: str, joint: str) -> Path:
    """Make a directory of that name; where it is taken, with a number after ``joint``. WrongState,
    NoSpace."""
    make_directory(top, mode=0o755)
    number = 1
    while True:
        directory = top / (base if number == 1 else f"{base}{joint}{number}")
        try:
            directory.mkdir(mode=0o755)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise file_error(error, directory, "make the directory") from error
        directory.chmod(0o755)
        return directory


def point_last(paths: FarmPaths, build: str) -> None:
    """Make ``builds/last`` point to the build begun last."""
    link = paths.builds / f".last.{secrets.token_hex(4)}"
    link.symlink_to(build)
    link.replace(paths.builds / "last")


def load_records(paths: FarmPaths) -> tuple[BuildRecord, ...]:
    """All of a farm's records that can be read, the newest first."""
    return all_records(paths)[0]


def all_records(paths: FarmPaths) -> tuple[tuple[BuildRecord, ...], Mapping[str, WrongState]]:
    """A farm's records, the newest first, and what is wrong with those that are damaged or in another
    farmhand's format, by their ids. A record that says it is running, though no living cycle is, is
    shown as interrupted."""
    holder = Locks(paths.locks).holder(CYCLE_LOCK)
    records, unreadable = [], {}
    for directory in _directories(paths):
        try:
            record = _read(directory)
        except FileNotFoundError:  # a cycle killed before its first step left nothing to tell
            continue
        except WrongState as error:
            unreadable[directory.name] = error
            continue
        records.append(_settled(record, holder))
    newest_first = sorted(records, key=lambda record: (record.started, record.id), reverse=True)
    return tuple(newest_first), unreadable


def read_record(paths: FarmPaths, build: str) -> BuildRecord:
    """The record with that id, as ``all_records`` has it. NotFound, WrongState."""
    try:
        return _settled(_read(paths.builds / build), Locks(paths.locks).holder(CYCLE_LOCK))
    except FileNotFoundError:
        raise NotFound(f"build {build} has no record any more") from None


def _settled(record: BuildRecord, holder: Holder | None) -> BuildRecord:
    """``holder``: of the lock that who writes it holds."""
    if record.result == "running" and (holder is None or holder.pid != record.pid):
        return as_interrupted(record)
    return record


def _directories(paths: FarmPaths) -> list[Path]:
    """Of records, the newest first."""
    seen = matching(paths.builds, "[!.]*")
    return [path for path in reversed(seen) if path.is_dir() and not path.is_symlink()]


def find_record(paths: FarmPaths, build: str = "last") -> BuildRecord:
    """The record with that id, or with an id that begins so; the "last"; the "last-good", that passed
    whole; or the newest of a commit, by its beginning, of a branch, a tag, a version. Errors: NotFound
    (it names the nearest), WrongState (it is damaged, or in another farmhand's format)."""
    records, unreadable = all_records(paths)
    known = {record.id: record for record in records}
    if build == "last":
        with contextlib.suppress(OSError):  # begun last, whatever the clock was since
            last = (paths.builds / "last").readlink().name
            if last in known:
                return known[last]
            build = last if (paths.builds / last / "record.json").exists() else build
    if build not in known and build not in ("last", LAST_GOOD):
        others = [error for name, error in unreadable.items() if name.startswith(build)]
        if len(others) == 1 and not any(name.startswith(build) for name in known):
            raise others[0]
    if not records and unreadable:
        raise next(iter(unreadable.values()))
    if not records:
        raise NotFound(f"farm {paths.farm} has no build record", remedy=(Call("cycle"), " makes one"))
    if build == "last":
        return records[0]
    if build == LAST_GOOD:
        if good := next((record for record in records if record.result == "passed"), None):
            return good
        raise NotFound(
            f"farm {paths.farm} has no build that passed", remedy=("all there are: ", Call("history"))
        )
    found: Sequence[BuildRecord] = [record for record in records if record.id == build]
    found = found or [record for record in records if record.id.startswith(build)]
    found = found or _of_source(records, build)
    if len(found) == 1:
        return found[0]
    names = [*known, *dict.fromkeys(r.source.branch for r in records if r.source.branch)]
    near = [r.id for r in found[:3]] or get_close_matches(build, names, 3, 0.5) or names[:3]
    raise NotFound(
        f"farm {paths.farm} has {'several builds' if found else 'no build'} {build!r}",
        remedy=f"perhaps {' or '.join(near)}",
    )


def _of_source(records: Sequence[BuildRecord], revision: str) -> Sequence[BuildRecord]:
    """The newest build of what was built by that name; of each commit, where several begin so."""
    found: dict[str, BuildRecord] = {}
    for record in records:
        if record.source.is_named(revision):
            found.setdefault(record.source.commit, record)
    return [one for one in found.values() if one.source.begins(revision)] or [*found.values()][:1]


def prune(paths: FarmPaths, keep: int, *, current: str) -> tuple[str, ...]:
    """Remove all but ``keep`` records: old successful builds first, failed ones last, the current one
    never. Returns the ids removed."""
    for rest in paths.builds.glob(".trash-*"):  # from a killed one
        shutil.rmtree(rest, ignore_errors=True)
    records = [r for r in load_records(paths) if r.id != current and r.result not in _NEVER_REMOVED]
    surplus = len(records) + 1 - keep
    if surplus <= 0:
        return ()
    good = ("passed", "partial")
    oldest_first = sorted(records, key=lambda record: (record.result not in good, record.started))
    gone = tuple(record.id for record in oldest_first[:surplus])
    for build in gone:
        trash = paths.builds / f".trash-{build}"
        (paths.builds / build).rename(trash)  # one step: nobody meets half a record
        shutil.rmtree(trash, ignore_errors=True)
    return gone


def as_interrupted(record: BuildRecord) -> BuildRecord:
    """The record of a cycle that was killed, as it should read."""
    steps = tuple(
        dataclasses.replace(step, status="interrupted" if step.status == "running" else "skipped")
        if step.status in ("running", "waiting")
        else step
        for step in record.steps
    )
    note = "the cycle was killed: nothing was written after this"
    return dataclasses.replace(
        record, result="interrupted", steps=steps, notes=(*record.notes, note)
    )  # fmt: skip


def _read(directory: Path) -> BuildRecord:
    """The record in that directory. FileNotFoundError: there is none, as where a cycle was killed before
    its first step. WrongState: it is damaged, or in another farmhand's format."""
    path = directory / "record.json"
    try:
        return _record(directory, json_object(read_file(path)))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        page = directory / "index.html"
        remedy = f"what it said is lost, but for what {page} has; the logs beside it stay"
        raise damaged(path, "a build's record", error, remedy) from error


def _record(directory: Path, data: Mapping[str, Any]) -> BuildRecord:
    """ValueError, WrongState."""
    if data.get("format") != FORMAT:
        remedy = f"read {directory / 'index.html'} instead"
        raise foreign(directory / "record.json", data.get("format"), FORMAT, remedy)
    steps = data.get("steps")
    if not isinstance(steps, list):
        raise Malformed("steps is no list")
    asked = remedy_of(data.get("asked"))
    if not isinstance(asked, Call):
        raise Malformed("asked is no task")
    record = made(BuildRecord, data, asked=asked, directory=directory, steps=tuple(map(_step, steps)))
    if record.id != directory.name:
        raise Malformed("it is of another build")
    moment(record.started, "started")
    return record


def _step(data: object) -> StepRecord:
    remedy = remedy_of(data.get("remedy", "")) if isinstance(data, dict) else ""
    step = made(StepRecord, data, remedy=remedy)
    if step.log != Path(step.log).name:  # it is read
        raise Malformed(f"the log of {step.name} is no name of a file")
    return step
