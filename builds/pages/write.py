"""Which pages are written when. None holds up what they are about: where one can't be written, that is
said, and the work goes on.

- A package's build has ended: its page, and its package's.
- It was compared with what came out once more: its page.
- A run has ended: the pages of the packages that it built, the graph's, the farm's, the index.
- A cycle has begun or ended: the page of builds, the index. Its own is written all the while
  (``builds.page``); of one that was killed, by who recovers it.
- ``pages``: all of them.

What is imported late is what an index needs none of: it is written by each cycle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from builds import page as cycle_page
from builds.packages.runs import RunRecord, RunRecords
from builds.pages import builds, index
from builds.pages.places import PagePlaces, replace_page
from builds.pages.summary import PackageSummaries
from builds.record import BuildRecord, all_records
from inventory.errors import Call, FarmhandError, NotFound, WrongState
from provision.site import Site

if TYPE_CHECKING:
    from builds.packages.drawing import GraphPicture
    from builds.packages.record import PackageRecord
    from builds.pages.channels import ChannelContents

_RUNS = 20
"""That are looked at: who was in none of them was last built long ago."""


@dataclass(frozen=True, slots=True)
class WrittenPages:
    """``count``: of pages. ``unreadable``: a line each, of records that have none."""

    count: int
    unreadable: tuple[str, ...]


def package_ended(site: Site, record: PackageRecord) -> None:
    """``record``: as it was saved."""
    with _told(site):
        pages = _Pages(site)
        pages.build(record)
        pages.package(record.package)
        if not pages.places.index.exists():  # which both lead to
            pages.index()


def record_changed(site: Site, record: PackageRecord) -> None:
    """Something was put beside it that its page shows."""
    with _told(site):
        _Pages(site).build(record)


def run_ended(site: Site, run: RunRecord, picture: GraphPicture) -> None:
    """``picture``: of the graph of all packages (``builds.packages.drawing.picture_of``)."""
    with _told(site):
        pages = _Pages(site)
        built = {entry.package for entry in run.packages if entry.state in ("passed", "failed")}
        for name in sorted(built):  # channels have others now
            pages.package(name)
        pages.graph(picture)
        pages.farm()
        pages.index()


def cycle_began_or_ended(site: Site, *, killed: str = "") -> None:
    """``killed``: the build of one that nobody carries on."""
    with _told(site):
        pages = _Pages(site)
        for cycle in pages.cycles:
            if cycle.id == killed:
                cycle_page.write(cycle)
        pages.builds()
        pages.index()


def write_all(site: Site) -> WrittenPages:
    """NoSpace, WrongState."""
    pages = _Pages(site)
    unreadable = [error.message for error in pages.unreadable.values()]
    for cycle in pages.cycles:
        if cycle.result != "running":  # whoever runs it writes it
            cycle_page.write(cycle)
            pages.count += 1
    records = pages.summaries.records
    for package in records.names():
        numbers = records.numbers(package)
        unreadable += filter(None, (pages.recorded(package, number) for number in numbers))
        if numbers:
            pages.package(package)
    pages.graph()
    pages.farm()
    pages.builds()
    pages.index()
    return WrittenPages(pages.count, tuple(unreadable))


class _Pages:
    """What is read for them is read once."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._farm = site.farm.farm
        self.places = PagePlaces.of(site.paths)
        self.summaries = PackageSummaries(site.paths)
        self.count = 0

    def build(self, record: PackageRecord) -> None:
        from builds.pages import package_build

        page = self.places.build(record.package, record.number)
        shown = self.summaries.settled(record)
        replace_page(page, package_build.render(shown, self.places, str(self._site.farm.path)))
        self.count += 1

    def recorded(self, package: str, number: int) -> str:
        """As its record says now. Returns what is wrong with that."""
        try:
            while True:
                record = self.summaries.records.read(package, number)
                self.build(record)
                if record.result != "running" or record == self.summaries.records.read(package, number):
                    return ""  # else it ended meanwhile, and whoever built it wrote a newer page
        except NotFound:  # it was killed before it began
            return ""
        except WrongState as error:
            return error.message

    def package(self, name: str) -> None:
        """And the pages of its builds that are missing: a killed one wrote none."""
        from builds.pages import history

        for number in self.summaries.records.numbers(name)[: history.BUILDS]:
            if not self.places.build(name, number).exists():
                self.recorded(name, number)
        text = history.render(self._farm, name, self.places, self.summaries, self._channels)
        replace_page(self.places.package(name), text)
        self.count += 1

    def graph(self, picture: GraphPicture | None = None) -> None:
        """None: as the last run had it, if that is known."""
        from builds.pages import graph

        if picture is not None:
            graph.keep_picture(self.places, picture)
        picture = picture or graph.known_picture(self.places)
        if picture is not None:
            graph.write(self._farm, self.places, picture, self.runs)
            self.count += 1

    def farm(self) -> None:
        from builds.pages import farm

        text = farm.render(self._site, self.places, self.runs, self.cycles)
        replace_page(self.places.farm, text)
        self.count += 1

    def builds(self) -> None:
        if self.cycles or self.unreadable:
            text = builds.render(self._farm, self.places, self.cycles, self.unreadable)
            replace_page(self.places.builds, text)
            self.count += 1

    def index(self) -> None:
        packages = self.summaries.packages()
        text = index.render(self._farm, self.places, packages, self.runs, self.cycles, self.unreadable)
        replace_page(self.places.index, text)
        self.count += 1

    @cached_property
    def _channels(self) -> ChannelContents:
        from builds.pages.channels import ChannelContents

        return ChannelContents(self._site.farm)

    @cached_property
    def runs(self) -> Sequence[RunRecord]:
        """The newest first."""
        return tuple(islice(RunRecords(self._site.paths).all(), _RUNS))

    @property
    def cycles(self) -> Sequence[BuildRecord]:
        """The newest first."""
        return self._all_cycles[0]

    @property
    def unreadable(self) -> Mapping[str, WrongState]:
        """What is wrong with cycles' records, by their ids."""
        return self._all_cycles[1]

    @cached_property
    def _all_cycles(self) -> tuple[Sequence[BuildRecord], Mapping[str, WrongState]]:
        return all_records(self._site.paths)


@contextlib.contextmanager
def _told(site: Site) -> Iterator[None]:
    try:
        yield
    except FarmhandError as error:
        later = (f"not all pages were written: {error.message}; later: ", Call("pages"))
        site.reporter.warn(later)
