"""The page that leads to all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from builds.packages.runs import RunEntry, RunRecord
from builds.pages.places import PagePlaces, link, link_if_there
from builds.pages.summary import BuildSummary
from builds.record import BuildRecord, now
from host.html import page_template
from inventory.errors import WrongState

_CYCLES = 50
"""Shown of them."""


def render(
    farm: str,
    places: PagePlaces,
    packages: Mapping[str, BuildSummary],
    runs: Sequence[RunRecord],
    cycles: Sequence[BuildRecord],
    unreadable: Mapping[str, WrongState],
) -> str:
    """The page as text. ``packages``: the newest build of each. The newest runs and cycles first;
    ``unreadable``: cycles' records that can't be shown."""
    page = places.index
    bad = [build for build in packages.values() if build.result != "passed"]
    return page_template("farm-index.html.j2").render(
        farm=farm,
        glance=" ".join(_glance(packages, runs, cycles)),
        written=now(),
        others=[
            (name, link(page, to))
            for name, to in (
                ("The farm now", places.farm),
                ("All builds", places.builds),
                ("The graph of packages", places.graph),
            )
            if to.exists()
        ],
        bad=bad if len(bad) < len(packages) else [],
        packages=list(packages.values()),
        runs=runs,
        cycles=cycles[:_CYCLES],
        more_cycles=len(cycles) - _CYCLES,
        unreadable=unreadable,
        counts=counts,
        to_package=lambda name: link_if_there(page, places.package(name)),
        to_build=lambda build: link_if_there(page, places.build(build.package, build.number)),
        to_cycle=lambda cycle: link_if_there(page, cycle.page),
    )


def state_in_words(entry: RunEntry) -> str:
    """Words that are also the classes of their colour."""
    return "passed before" if entry.state == "taken" else entry.state


def counts(run: RunRecord) -> str:
    """What became of its packages, in words."""
    found = Counter(map(state_in_words, run.packages))
    return ", ".join(f"{count} {state}" for state, count in found.most_common()) or "none"


def _glance(
    packages: Mapping[str, BuildSummary], runs: Sequence[RunRecord], cycles: Sequence[BuildRecord]
) -> Iterator[str]:
    if packages:
        ends = Counter(build.result for build in packages.values())
        results = ", ".join(f"{count} {result}" for result, count in ends.most_common())
        yield f"{len(packages)} package{'s' * (len(packages) != 1)}, by their last builds: {results}."
    for what, found in (("run of build", runs), ("cycle", cycles)):
        if found:
            last = found[0].result
            yield f"The last {what} {'is running' if last == 'running' else _ENDED.get(last, last)}."
    if not packages and not runs and not cycles:
        yield "Nothing was built yet."


_ENDED = {"interrupted": "was interrupted", "partial": "passed, as far as it was asked for"}
