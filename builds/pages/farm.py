"""The page of the farm as it is now: what `status` tells, who builds what, what the channels have."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from builds.packages.runs import RunRecord
from builds.pages.index import counts
from builds.pages.places import PagePlaces, link, link_if_there
from builds.record import BuildRecord, now
from host.html import page_template
from host.program import typed
from inventory.errors import FarmhandError, spelled
from inventory.model import Farm
from provision.package_repositories import opened
from provision.site import Site
from provision.status import FarmStatus, status

_LAST = 5
"""Of cycles and of runs."""


@dataclass(frozen=True, slots=True)
class _ShownBuilder:
    """``build`` and ``link``: what it builds now; "": nothing."""

    vm: str
    state: str
    build: str
    link: str


@dataclass(frozen=True, slots=True)
class _ShownHead:
    """What a channel points to; ``generation`` 0: nothing yet."""

    repository: str
    channel: str
    url: str
    generation: int = 0
    count: int = 0
    size: int = 0
    made: str = ""
    error: str = ""


def render(
    site: Site, places: PagePlaces, runs: Sequence[RunRecord], cycles: Sequence[BuildRecord]
) -> str:
    """The page as text. Takes no lock, starts nothing, changes nothing. The newest runs and cycles
    first."""
    page, seen = places.farm, _seen(site)
    room = shutil.disk_usage(places.top)
    return page_template("farm-now.html.j2").render(
        farm=site.farm.farm,
        way=[(f"Farm {site.farm.farm}", link(page, places.index)), ("Now", "")],
        written=now(),
        glance=_glance(seen),
        seen=seen,
        builders=list(_builders(site.farm, seen, places, runs)),
        room=room,
        heads=list(_heads(site.farm)),
        runs=runs[:_LAST],
        cycles=cycles[:_LAST],
        counts=counts,
        to_cycle=lambda cycle: link_if_there(page, cycle.page),
        spelled=partial(spelled, how=partial(typed, farm=str(site.farm.path))),
    )


def _seen(site: Site) -> FarmStatus:
    """What we hold ourselves, a run that has ended, is free when this is read."""
    seen = status(site)
    vms = (
        replace(vm, holder=None) if vm.holder and vm.holder.pid == os.getpid() else vm for vm in seen.vms
    )
    return replace(seen, vms=tuple(vms))


def _glance(seen: FarmStatus) -> str:
    states = Counter(vm.state for vm in seen.vms)
    parts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{len(seen.vms)} VM{'s' * (len(seen.vms) != 1)}: {parts}." if seen.vms else "No VMs."


def _builders(
    farm: Farm, seen: FarmStatus, places: PagePlaces, runs: Sequence[RunRecord]
) -> Iterator[_ShownBuilder]:
    states = {vm.vm: vm.state for vm in seen.vms}
    now_ = _under_way(runs)
    for vm in farm.build.all_builders if farm.build else ():
        name, package, number = now_.get(vm, ("", "", 0))
        to = link_if_there(places.farm, places.build(package, number)) if number else ""
        yield _ShownBuilder(vm, states.get(vm, "unknown"), name, to)


def _under_way(runs: Sequence[RunRecord]) -> Mapping[str, tuple[str, str, int]]:
    """What is built in each VM: its name, its package's, its number."""
    return {
        entry.vm: (entry.name, entry.package, entry.number)
        for run in runs[:1]
        if run.result == "running"
        for entry in run.packages
        if entry.state == "running"
    }


def _heads(farm: Farm) -> Iterator[_ShownHead]:
    for name in farm.repositories:
        repository = opened(farm, name)
        url = repository.settings.url
        for channel in repository.settings.channels:
            try:
                head = repository.head(channel)
            except FarmhandError as error:
                yield _ShownHead(name, channel, url, error=error.message)
                continue
            if head is None:
                yield _ShownHead(name, channel, url)
            else:
                made = head.made.isoformat()
                yield _ShownHead(name, channel, url, head.sequence, head.count, head.size, made)
