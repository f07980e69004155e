"""Records of package builds: a directory a build, ``packages/NAME/NUMBER/`` in the farm's state.

``record.json`` (this module's values), a log, ``artifacts/``, in ``attempt-N/`` what earlier attempts
left. Numbers are given in a package's order, never twice. Written when a build begins, and when it has
ended: one that says that it runs, and whose run doesn't, was killed. Nothing in it is secret:
directories 0755, files 0644. Times are ISO 8601 in UTC, durations seconds, sizes bytes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from builds.packages.inputs import BuildInputs
from builds.record import FileRecord, replace_file
from host.documents import Malformed, damaged, json_object, made, read_file
from host.files import file_error, foreign, make_directory
from host.paths import FarmPaths
from host.printable import as_json
from inventory.errors import (
    Call,
    NotFound,
    Remedy,
    Text,  # noqa: F401 - Remedy is made of it, and read by its name
    WrongState,
    did_you_mean,
    remedy_as_data,
    remedy_of,
)
from provision.clean_state import AddedTools

FORMAT = 1
LOG = "build.log"
ARTIFACTS = "artifacts"
PackageOutcome = Literal["running", "passed", "failed", "interrupted"]
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageAttempt:
    """An attempt that failed for no fault of the source, and was tried again. ``directory``: within the
    record."""

    vm: str
    failure: str
    message: str
    seconds: float
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageOrigin:
    """The source that was built. ``place``, ``tree``, ``stated`` and so on: as in ``SourceState``."""

    place: str
    tree: str
    stated: str
    when: int
    asked: str = ""
    commit: str = ""
    subject: str = ""
    path: str = ""
    files: tuple[FileRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderRecord:
    """The builder as it was. ``environment``: the variables that the build was given. ``features``: the
    CPU's, as the guest shows them; ``pristine``, ``tools``, ``memory_seal``, ``beyond_proof``: as
    in ``VmRecord``."""

    vm: str
    host: str = ""
    driver: str = ""
    template: str = ""
    checkpoint: str = ""
    pristine: bool | None = None
    tools: AddedTools | None = None
    memory_seal: str = ""
    beyond_proof: str = ""
    boot_id: str = ""
    memory: int = 0
    cpus: int = 0
    kernel: str = ""
    features: str = ""
    user: str = ""
    directory: str = ""  # in which it was built: paths get into what is made
    umask: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRecord:
    """One build of one package. ``name``: the build's, ``foo`` or ``foo (stage1)`` (``PackageBuild``);
    ``package``: the farm's name of it. ``run``: the run of `build` that it was part of. ``why``: what it
    was built for, a line each. ``generation``: of the repository, that its dependencies came from.
    ``unchanged``: the earlier build whose outputs are the same, byte for byte; 0: none. ``directory``:
    where it lies; no part of the JSON."""

    package: str
    name: str
    number: int
    farm: str
    run: str
    result: PackageOutcome
    started: str
    inputs: BuildInputs
    source: PackageOrigin
    ended: str = ""
    seconds: float = 0.0
    why: tuple[str, ...] = ()
    builder: BuilderRecord = BuilderRecord(vm="")
    repository: str = ""
    generation: int = 0
    failure: str = ""
    message: str = ""
    remedy: Remedy = ""
    exit: int | None = None
    tail: str = ""
    console: str = ""
    attempts: tuple[PackageAttempt, ...] = ()
    outputs: tuple[FileRecord, ...] = ()
    unchanged: int = 0
    notes: tuple[str, ...] = ()
    directory: Path = Path()

    @property
    def id(self) -> str:
        """``hello/7``."""
        return f"{self.package}/{self.number}"

    @property
    def version(self) -> str:
        return self.inputs.version

    @property
    def path(self) -> Path:
        return self.directory / "record.json"

    @property
    def packages(self) -> tuple[FileRecord, ...]:
        """Of its outputs those that a repository takes."""
        return packages_of(self.outputs)

    def as_dict(self) -> dict[str, object]:
        """The record for ``--json``."""
        return {**self._stored(), "record": str(self.path)}

    def save(self) -> None:
        """Replace record.json in one durable step. NoSpace, WrongState if the disk refuses."""
        data = {**self._stored(), "remedy": remedy_as_data(self.remedy)}
        replace_file(self.path, as_json(data, indent=1) + "\n", durable=True)

    def _stored(self) -> dict[str, object]:
        values = dataclasses.asdict(self)
        del values["directory"]
        return {"format": FORMAT, **values, "asked": self.inputs.asked, "digest": self.inputs.digest}


@dataclass(frozen=True, slots=True)
class RecordKey:
    """What a look-up wants of a record: quicker to be had than all of it. ``asked``, ``ours``: as of its
    ``BuildInputs``; ``tree``: of its source; ``packages``: as of the record."""

    package: str
    number: int
    name: str
    passed: bool
    version: str
    tree: str
    asked: str
    ours: Mapping[str, str]
    packages: tuple[FileRecord, ...]
    directory: Path


class PackageRecords:
    """A farm's records of package builds. Reading takes no lock; ``begin`` is for whoever holds the lock
    of `build`."""

    def __init__(self, paths: FarmPaths) -> None:
        self.top = paths.root / "packages"

    def names(self) -> tuple[str, ...]:
        """Packages that have records."""
        try:
            return tuple(
                sorted(path.name for path in self.top.iterdir() if not path.name.startswith("."))
            )
        except OSError:
            return ()

    def numbers(self, package: str) -> tuple[int, ...]:
        """The newest first."""
        try:
            found = [path.name for path in (self.top / package).iterdir()]
        except OSError:
            return ()
        return tuple(sorted((int(name) for name in found if _NUMBER.fullmatch(name)), reverse=True))

    def of(self, package: str) -> Iterator[PackageRecord]:
        """Its builds, the newest first, as they are read. Damaged ones are left out: ``find`` says what
        is the matter with one."""
        for number in self.numbers(package):
            try:
                yield self.read(package, number)
            except (NotFound, WrongState):
                continue

    def read(self, package: str, number: int) -> PackageRecord:
        """NotFound; WrongState: it is damaged, or in another farmhand's format."""
        directory = self.top / package / str(number)
        try:
            return _record(directory, json_object(read_file(directory / "record.json")))
        except FileNotFoundError:
            raise NotFound(f"there is no record {package}/{number}") from None
        except (OSError, ValueError) as error:
            remedy = f"the log beside it stays: {directory / LOG}"
            raise damaged(
                directory / "record.json", "a package build's record", error, remedy
            ) from error

    def key(self, package: str, number: int) -> RecordKey | None:
        """None: there is no such record, or it can't be read."""
        directory = self.top / package / str(number)
        try:
            data = json_object(read_file(directory / "record.json"))
            inputs, installed = data["inputs"], data["inputs"]["installed"]
            files = tuple(made(FileRecord, one) for one in data["outputs"])
            key = RecordKey(
                package, number, str(data["name"]), data["result"] == "passed",
                str(inputs["version"]), str(inputs["tree"]), str(data["asked"]),
                {str(one["name"]): str(one["sha256"]) for one in installed if one["sha256"]},
                packages_of(files), directory,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return key if data.get("format") == FORMAT else None

    def find(self, word: str) -> PackageRecord:
        """``hello/7``, or ``hello``: its newest. NotFound names the nearest; WrongState as of
        ``read``."""
        package, slash, number = word.partition("/")
        numbers = self.numbers(package)
        if not numbers:
            near = did_you_mean(package, self.names(), "")
            raise NotFound(
                f"no build of a package {package!r} is recorded", remedy=near or Call("build")
            )
        if not slash:
            return self.read(package, numbers[0])
        if not _NUMBER.fullmatch(number) or int(number) not in numbers:
            raise NotFound(
                f"package {package} has no build {number!r}",
                remedy=f"it has {', '.join(f'{package}/{known}' for known in numbers[:5])}",
            )
        return self.read(package, int(number))

    def passed(self, package: str, name: str) -> Iterator[PackageRecord]:
        """Its good builds under that name, the newest first."""
        return (r for r in self.of(package) if r.result == "passed" and r.name == name)

    def passed_keys(self, package: str) -> Iterator[RecordKey]:
        """Of its good builds, under whatever name, the newest first, as they are read."""
        keys = (self.key(package, number) for number in self.numbers(package))
        return (key for key in keys if key is not None and key.passed)

    def begin(self, package: str) -> tuple[int, Path]:
        """Make the next record's directory. Returns its number and where it is."""
        make_directory(self.top, mode=0o755)
        make_directory(self.top / package, mode=0o755)
        number = next(iter(self.numbers(package)), 0) + 1
        directory = self.top / package / str(number)
        try:
            directory.mkdir(mode=0o755)
        except OSError as error:
            raise file_error(error, directory, "make the directory") from error
        directory.chmod(0o755)
        return number, directory


def packages_of(files: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
    """Those that a repository takes. A source package is none of them, nor is what Debian's installer
    alone reads (.udeb): it stays in the record."""
    return tuple(
        file for file in files
        if file.name.endswith((".deb", ".rpm")) and not file.name.endswith(".src.rpm")
    )  # fmt: skip


def _record(directory: Path, data: Mapping[str, Any]) -> PackageRecord:
    """ValueError, WrongState."""
    if data.get("format") != FORMAT:
        remedy = f"the log beside it stays: {directory / LOG}"
        raise foreign(directory / "record.json", data.get("format"), FORMAT, remedy)
    known = {key: value for key, value in data.items() if key not in ("format", "remedy")}
    found = made(PackageRecord, known, remedy=remedy_of(data.get("remedy")), directory=directory)
    if (found.package, str(found.number)) != (directory.parent.name, directory.name):
        raise Malformed(f"it is the record of {found.id}")
    return found
