"""From what was asked to a plan: sources read, graph made, all that is in the way told at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from builds.packages.archive import Outside
from builds.packages.graph import Graph, SourcePackage, graph_of
from builds.packages.lookup import EarlierBuilds
from builds.packages.plan import (
    Channel,
    PackagePlan,
    foresee,
    inputs_of,
    settings_of,
    target,
    template_of,
    wanted_of,
)
from builds.packages.prepare import check_all, outside_of
from builds.packages.record import PackageRecords
from builds.packages.runs import RunRecords, flow_of
from builds.packages.source import SourceState
from builds.packages.sources import PackageSources, read_sources
from inventory.errors import Call, FarmhandError, WrongState
from inventory.packages import PackageBuilds
from provision.engine.runner import perform
from provision.operations.flows import FlowFail
from provision.package_repositories import opened
from provision.site import Site

_NOTES = 20


def graph_of_sources(sources: PackageSources, outside: Outside | None = None) -> Graph:
    """The graph of all that was read. ``outside``: as of ``graph_of``."""
    states = [state for state in sources.states.values() if state.control is not None]
    return graph_of(
        [SourcePackage(state.control, version=state.given) for state in states if state.control],
        target(),
        outside,
        bootstrap={
            state.control.name: state.declared.bootstrap
            for state in states
            if state.control and state.declared.bootstrap
        },
        profiles={
            state.control.name: state.declared.profiles
            for state in states
            if state.control and state.declared.profiles
        },
    )


def plan_packages(
    site: Site, packages: Sequence[str], *, with_dependants: bool, revision: str | None,
    only_changed: bool,
) -> PackagePlan:  # fmt: skip
    """What such a run does. Nothing is changed. NotFound; one error with all that is in its way."""
    settings = settings_of(site)
    template, unlike = "", None
    try:
        template = common_template(site, settings)
    except FarmhandError as error:  # first the rest of what is in the way
        unlike = error
    sources, unread = with_specs(site, read_sources(site, revision), template)
    graph = graph_of_sources(sources, None if unread else outside_of(site))
    check_all(site, sources, graph)
    if unlike is not None:
        raise unlike
    plan = plan_of(
        site, sources, graph, packages, with_dependants=with_dependants, only_changed=only_changed,
        template=template,
    )  # fmt: skip
    return replace(plan, unread=unread)


def with_specs(
    site: Site, sources: PackageSources, template: str
) -> tuple[PackageSources, tuple[SourceState, ...]]:
    """With what was read before of rpm packages' specs, and those of which nothing was."""
    if all(state.format != "rpm" for state in sources.states.values()):
        return sources, ()
    from builds.packages.spec_reading import SpecReader

    known = SpecReader(site, template).known(sources)
    return known.sources, tuple(known.sources.states[name] for name in known.unread)


def plan_of(
    site: Site, sources: PackageSources, graph: Graph, packages: Sequence[str] = (), *,
    with_dependants: bool = False, only_changed: bool = False, template: str | None = None,
) -> PackagePlan:  # fmt: skip
    """The plan for what was read, whatever is in its way. ``template``: as of ``template_of``; None: it
    is looked at. NotFound."""
    settings = settings_of(site)
    channel = Channel(opened(site.farm, settings.repository), settings.channel)
    runs, records = RunRecords(site.paths), PackageRecords(site.paths)
    now = runs.cleared(sources.revision)
    before = runs.cleared() if only_changed else now
    if template is None:
        template = common_template(site, settings)
    states = {state.control.name: state for state in sources.states.values() if state.control}
    wanted = wanted_of(graph, states, packages, dependants=with_dependants)
    plan = PackagePlan(
        settings=settings,
        revision=sources.revision,
        only_changed=only_changed,
        cleared=now != runs.cleared(),
        states=states,
        graph=graph,
        wanted=wanted,
        asked=tuple(packages),
        inputs={
            name: inputs_of(
                graph.builds[name], states[graph.builds[name].package.name], settings, template, before
            )
            for name in wanted
        },
        builders=settings.all_builders,
        template=template,
        channel=channel,
        earlier=EarlierBuilds(records),
        records=records,
        notes=(*sources.notes, *_notes(states[graph.builds[name].package.name] for name in wanted)),
    )
    return replace(plan, foreseen=foresee(plan))


def _notes(states: Iterable[SourceState]) -> tuple[str, ...]:
    """What is to be said of the sources themselves; of many, some."""
    found = tuple(dict.fromkeys(f"{state.name}: {note}" for state in states for note in state.notes))
    more = len(found) - _NOTES
    return found if more < 2 else (*found[:_NOTES], f"and {more} notes more of this kind")


def common_template(site: Site, settings: PackageBuilds) -> str:
    """What the builders' disks are: all alike, or what is built would depend on who was free.
    WrongState: they are not."""
    found = {vm: template_of(site, vm, settings.to) for vm in settings.all_builders}
    if len({*found.values()}) > 1:
        raise WrongState(
            f"{site.name}: the builders are not alike: "
            + "; ".join(f"{vm} is {what}" for vm, what in found.items()),
            remedy=(
                "make those of the older one anew: ",
                Call("destroy", vm="NAME"),
                ", ",
                Call("clone-farm"),
            ),
        )
    return next(iter(found.values()))


def end_old_flows(site: Site, plan: PackagePlan) -> None:
    """The flows that earlier runs left open: this one has all of what they were to bring. Whoever was
    killed may have begun his, and not noted it."""
    repository = plan.channel.repository
    if not repository.exists:
        return
    for run in RunRecords(site.paths).all():
        if run.generation or run.repository != repository.name:
            continue
        with contextlib.suppress(FarmhandError):
            found = repository.flows.find(flow_of(run.id))
            if found is not None and found.state == "open":
                note = "a later run of build took its place"
                perform(site, FlowFail(repo=repository.name, flow=found.name, note=note))
