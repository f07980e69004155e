"""Which pages are written when. None holds up what they are about: where one can't be written, that is
said, and the work goes on.

- A package's build has ended: its page, and its package's.
- A run has ended: the pages of the packages that it built, the graph's, the farm's, the index.
- A cycle has ended: the index. Its own page is written all the while (``builds.page``).
- ``pages``: all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from builds import page as cycle_page
from builds.packages.record import PackageRecord
from builds.packages.runs import RunRecord, RunRecords
from builds.pages import farm, graph, history, index, package_build
from builds.pages.channels import ChannelContents
from builds.pages.places import PagePlaces, replace_page
from builds.pages.summary import PackageSummaries
from builds.record import BuildRecord, all_records
from inventory.errors import FarmhandError, WrongState
from provision.site import Site

if TYPE_CHECKING:
    from builds.packages.drawing import GraphPicture

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


def run_ended(site: Site, run: RunRecord, picture: GraphPicture) -> None:
    """``picture``: of the graph of all packages (``builds.packages.drawing.picture_of``)."""
    with _told(site):
        pages = _Pages(site)
        built = {entry.package for entry in run.packages if entry.state in ("passed", "failed")}
        for name in sorted(built):  # channels have others now
            pages.package(name)
        graph.keep_picture(pages.places, picture)
        pages.graph()
        pages.farm()
        pages.index()


def cycle_ended(site: Site) -> None:
    with _told(site):
        _Pages(site).index()


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
        for number in records.numbers(package):
            try:
                pages.build(records.read(package, number))
            except WrongState as error:
                unreadable.append(error.message)
        pages.package(package)
    pages.graph()
    pages.farm()
    pages.index()
    return WrittenPages(pages.count, tuple(unreadable))


class _Pages:
    """What is read for them is read once."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._farm = site.farm.farm
        self.places = PagePlaces.of(site.paths)
        self.summaries = PackageSummaries(site.paths)
        self._channels = ChannelContents(site.farm)
        self.count = 0

    def build(self, record: PackageRecord) -> None:
        page = self.places.build(record.package, record.number)
        shown = self.summaries.settled(record)
        replace_page(page, package_build.render(shown, self.places, str(self._site.farm.path)))
        self.count += 1

    def package(self, name: str) -> None:
        text = history.render(self._farm, name, self.places, self.summaries, self._channels)
        replace_page(self.places.package(name), text)
        self.count += 1

    def graph(self) -> None:
        """As the last run had it."""
        picture = graph.known_picture(self.places)
        if picture is not None:
            graph.write(self._farm, self.places, picture, self.runs)
            self.count += 1

    def farm(self) -> None:
        text = farm.render(self._site, self.places, self.runs, self.cycles)
        replace_page(self.places.farm, text)
        self.count += 1

    def index(self) -> None:
        packages = self.summaries.packages()
        text = index.render(self._farm, self.places, packages, self.runs, self.cycles, self.unreadable)
        replace_page(self.places.index, text)
        self.count += 1

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
        site.reporter.warn(f"pages: {error.message}")
