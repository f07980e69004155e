"""The farm's packages as `build` would take them now, to ask about them. What is in the way is told, not
refused."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from builds.packages.commits import since_passed
from builds.packages.plan import settings_of, template_of
from builds.packages.planning import graph_of_sources, plan_of
from builds.packages.prepare import outside_of
from builds.packages.runs import RunRecords
from builds.packages.sources import read_sources
from builds.packages.why import Asking, PackagesNow
from inventory.errors import FarmhandError

if TYPE_CHECKING:
    from builds.packages.record import PackageRecord
    from builds.packages.source import SourceState
    from host.run import Runner
    from provision.site import Site


def packages_now(site: Site, revision: str | None = None) -> PackagesNow:
    """No VM is touched. ``revision``: GIT_REVISION, in place of the farm file's. NotFound: the farm
    builds no packages."""
    settings = settings_of(site)
    sources = read_sources(site, revision)
    graph = graph_of_sources(sources, outside_of(site))
    template, unproven = "", None
    try:
        template = template_of(site, settings.all_builders[0], settings.to)
    except FarmhandError as error:
        unproven = error
    return PackagesNow(
        plan=plan_of(site, sources, graph, template=template),
        unproven=unproven,
        unread={problem.package: str(problem) for problem in sources.problems},
        unknown=tuple(state.name for state in sources.states.values() if state.control is None),
        running=_running(site),
    )


def asking(site: Site, now: PackagesNow) -> Asking:
    """``Asking``, which looks for the commits since a package last passed."""
    return Asking(now, partial(_since, site.runner))


def _since(
    runner: Runner, failed: PackageRecord, passed: PackageRecord | None, state: SourceState
) -> tuple[str, ...]:
    return since_passed(runner, failed, passed, state.repository)


def _running(site: Site) -> Mapping[str, str]:
    """By builds' names, who builds them."""
    run = RunRecords(site.paths).last()
    if run is None or run.result != "running":
        return {}
    since = f"{datetime.fromisoformat(run.started).astimezone():%Y-%m-%d %H:%M}"
    return {
        entry.name: f"{entry.package}/{entry.number} on {entry.vm}, in a run of {run.requester} since "
        f"{since}"
        for entry in run.packages
        if entry.state == "running"
    }
