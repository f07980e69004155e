"""What lists say of a package's build: of its record as much as they show, for a record is long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from builds.packages.record import FORMAT, PackageOutcome, PackageRecord, PackageRecords
from builds.packages.runs import RunRecords
from builds.record import FileRecord
from host.documents import json_object, made, read_file
from host.paths import FarmPaths
from inventory.errors import NotFound, WrongState


@dataclass(frozen=True, slots=True)
class _SummedInputs:
    version: str


@dataclass(frozen=True, slots=True)
class _SummedOrigin:
    place: str
    asked: str = ""
    commit: str = ""
    subject: str = ""


@dataclass(frozen=True, slots=True)
class _SummedBuilder:
    vm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSummary:
    """Fields of a ``PackageRecord``, called as they are there."""

    package: str
    name: str
    number: int
    run: str
    result: PackageOutcome
    started: str
    inputs: _SummedInputs
    source: _SummedOrigin
    builder: _SummedBuilder
    ended: str = ""
    seconds: float = 0.0
    why: tuple[str, ...] = ()
    failure: str = ""
    message: str = ""
    outputs: tuple[FileRecord, ...] = ()
    unchanged: int = 0

    @property
    def version(self) -> str:
        return self.inputs.version


class PackageSummaries:
    """Those of a farm. A build that says it runs, though its run doesn't, is shown as interrupted."""

    def __init__(self, paths: FarmPaths) -> None:
        self._runs = RunRecords(paths)
        self._running: dict[str, bool] = {}
        self.records = PackageRecords(paths)

    def packages(self) -> Mapping[str, BuildSummary]:
        """The newest of each package that has one that can be read, by the packages' names."""
        newest = ((name, next(self.of(name), None)) for name in self.records.names())
        return {name: found for name, found in newest if found is not None}

    def of(self, package: str) -> Iterator[BuildSummary]:
        """The newest first, as they are read; those that can't be are left out."""
        for number in self.records.numbers(package):
            path = self.records.top / package / str(number) / "record.json"
            try:
                data = json_object(read_file(path))
                found = made(BuildSummary, data)
            except (OSError, ValueError):
                continue
            if data.get("format") == FORMAT and (found.package, found.number) == (package, number):
                killed = found.result == "running" and not self.runs(found.run)
                yield replace(found, result="interrupted") if killed else found

    def settled(self, record: PackageRecord) -> PackageRecord:
        """As it is to be shown."""
        killed = record.result == "running" and not self.runs(record.run)
        return replace(record, result="interrupted") if killed else record

    def runs(self, run: str) -> bool:
        """Whether somebody is at it."""
        if run not in self._running:
            try:
                self._running[run] = self._runs.find(run).result == "running"
            except (NotFound, WrongState):
                self._running[run] = False
        return self._running[run]
