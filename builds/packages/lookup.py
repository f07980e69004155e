"""Earlier builds that are as good as new ones: made from what a build would be made from now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from builds.packages.record import PackageRecords, RecordKey
from builds.record import FileRecord

_LOOKED_AT = 50
"""Builds of a package, the newest first: an older one may fit as well, and costs one build if it isn't
found."""


def package_name(file: FileRecord) -> str:
    """Of a built package, the name that its own file name begins with: deb-old(5) NAME_VERSION_ARCH.deb,
    rpm(8) NAME-VERSION-RELEASE.ARCH.rpm."""
    if file.name.endswith(".rpm"):
        return file.name.rsplit("-", 2)[0]
    return file.name.partition("_")[0]


def sums_of(files: Iterable[FileRecord]) -> Mapping[str, str]:
    """sha256 of packages by their names."""
    return {package_name(file): file.sha256 for file in files}


@dataclass(frozen=True, slots=True)
class EarlierBuild:
    """A build that passed. ``packages``: what it made, each there still. ``why_not``: what keeps it from
    being taken; "": nothing."""

    key: RecordKey
    packages: tuple[FileRecord, ...]
    why_not: str = ""

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.key.directory / file.path for file in self.packages)


class EarlierBuilds:
    """A farm's records, as `build` asks them. ``package``: the farm's name, ``name``: the build's."""

    def __init__(self, records: PackageRecords) -> None:
        self._records = records

    def last(self, package: str, name: str) -> EarlierBuild | None:
        """The newest that passed."""
        return next(self._passed(package, name), None)

    def fitting(
        self, package: str, name: str, asked: str, sums: Mapping[str, str]
    ) -> EarlierBuild | None:
        """One that was asked for the same (``BuildInputs.asked``), with just what ``sums`` has now of
        what was installed from the repository."""
        for found in self._passed(package, name):
            if found.key.asked == asked and not found.why_not and not changed(found.key, sums):
                return found
        return None

    def may_fit(self, package: str, name: str, asked: str) -> bool:
        """Whether one would, if what is installed for it were the same."""
        return any(one.key.asked == asked and not one.why_not for one in self._passed(package, name))

    def _passed(self, package: str, name: str) -> Iterator[EarlierBuild]:
        numbers = self._records.numbers(package)[:_LOOKED_AT]
        for number in numbers:
            key = self._records.key(package, number)
            if key is not None and key.passed and key.name == name:
                gone = next((file.name for file in key.packages if not _there(key, file)), "")
                yield EarlierBuild(key, key.packages, f"{gone} is gone" if gone else "")


def changed(key: RecordKey, sums: Mapping[str, str]) -> tuple[str, ...]:
    """Names of what was installed from the repository and is another one there now, or is gone."""
    return tuple(sorted(name for name, sum_ in key.ours.items() if sums.get(name) != sum_))


def _there(key: RecordKey, file: FileRecord) -> bool:
    try:
        return (key.directory / file.path).stat().st_size == file.size
    except OSError:
        return False
