"""The tasks of a repository's experimental flows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cli import options, repository_views, views
from cli.command import command
from cli.options import FlagValues
from cli.repository_asked import COMPONENT, NOTE, REPO, opened, record_of, wanted
from cli.run import TaskResult, TaskRun
from inventory.errors import Call, UsageError, WrongState

if TYPE_CHECKING:
    from provision.site import Site
    from repositories.repository import Repository

_FLOW = "The flow."
_GENERATION = "The generation that was tested; refused where that isn't the one to be tested."
_BUILD = "The build that tested it, by its id, or 'last': its record says which generation."


@command(
    {
        "flow": "What it is called.",
        "to": "The channel that it aims at; absent: tested.",
        "path": "A package's file, or a directory with packages; repeatable.",
        "build": "In place of files: what this build made, by its id, or 'last'.",
        "more": "Add them to those of the flow, if it is open.",
        "component": COMPONENT,
        "repo": REPO,
        "note": NOTE,
    },
    iterable=["path"],
    does=("flow-begin",),
    bare="flow",
)
def flow_begin(
    run: TaskRun, flow: str = "", to: str = "tested", path: FlagValues = None, build: str = "",
    more: bool = False, component: str = "", repo: str = "", note: str = "",
) -> TaskResult:  # fmt: skip
    """Make a candidate for a channel, to be tested."""
    name = options.needed("--flow", flow, "what it is called")
    with opened(run, repo) as (site, repository):
        paths, build = wanted(site, repository, path, build)
        done = run.perform(
            site, "flow-begin", repo=repository.name, flow=name, channel=to, paths=paths,
            component=component, build=build, note=note, more=more,
        )  # fmt: skip
        return views.outcome(done)


@command(
    {"flow": _FLOW, "generation": _GENERATION, "build": _BUILD, "repo": REPO, "note": NOTE},
    does=("flow-pass",),
    bare="flow",
)
def flow_pass(
    run: TaskRun, flow: str = "", generation: str = "", build: str = "", repo: str = "", note: str = ""
) -> TaskResult:
    """Give a channel what a flow has, if nothing else came."""
    with _verdict(run, flow, generation, build, repo) as (site, asked, passed):
        if not passed:
            bisect = Call("flow-bisect", flow=flow, build=build, repo=str(asked["repo"]))
            raise WrongState(
                f"build {asked['build']} did not pass, so it passes no flow",
                remedy=("find out which package it is: ", bisect),
            )
        return views.outcome(run.perform(site, "flow-pass", note=note, **asked))


@command(
    {"flow": _FLOW, "generation": _GENERATION, "build": _BUILD, "repo": REPO, "note": NOTE},
    does=("flow-fail",),
    bare="flow",
)
def flow_fail(
    run: TaskRun, flow: str = "", generation: str = "", build: str = "", repo: str = "", note: str = ""
) -> TaskResult:
    """End a flow: its channel gets nothing of it."""
    with _verdict(run, flow, generation, build, repo) as (site, asked, _):
        return views.outcome(run.perform(site, "flow-fail", note=note, **asked))


@command(
    {
        "flow": _FLOW,
        "failed": "The generation that was to be tested fails.",
        "passed": "It passes.",
        "build": "In place of either: the build that tested it, by its id, or 'last'.",
        "generation": _GENERATION,
        "repo": REPO,
        "note": NOTE,
    },
    does=("flow-bisect",),
    bare="flow",
)
def flow_bisect(
    run: TaskRun, flow: str = "", failed: bool = False, passed: bool = False, build: str = "",
    generation: str = "", repo: str = "", note: str = "",
) -> TaskResult:  # fmt: skip
    """Find out which of a flow's packages fail, by verdicts."""
    if failed + passed + bool(build) != 1:
        raise UsageError("what was its verdict?", remedy="--failed, or --passed, or --build ID")
    with _verdict(run, flow, generation, build, repo) as (site, asked, verdict):
        passed = verdict if build else passed
        return views.outcome(run.perform(site, "flow-bisect", note=note, passed=passed, **asked))


@command({"repo": REPO, "over": "Also those that are over."})
def flow_list(run: TaskRun, repo: str = "", over: bool = False) -> TaskResult:
    """List the flows of a repository."""
    with opened(run, repo) as (_, repository):
        found = [flow for flow in repository.flows.all() if over or flow.state == "open"]
        return repository_views.flows(repository, found)


@command({"flow": _FLOW, "repo": REPO}, bare="flow")
def flow_show(run: TaskRun, flow: str = "", repo: str = "") -> TaskResult:
    """Show a flow: its packages, its tests, what was found."""
    name = options.needed("--flow", flow, "the flow's name")
    with opened(run, repo) as (_, repository):
        return repository_views.flow(repository, repository.flows.read(name))


@contextmanager
def _verdict(
    run: TaskRun, flow: str, generation: str, build: str, repo: str
) -> Iterator[tuple[Site, Mapping[str, object], bool]]:
    """The farm, opened; what the operations are told of a flow's test; and whether it passed."""
    name = options.needed("--flow", flow, "the flow's name")
    with opened(run, repo) as (site, repository):
        found, passed = _tested(site, repository, name, generation, build)
        yield site, {"repo": repository.name, "flow": name, **found}, passed


def _tested(
    site: Site, repository: Repository, flow: str, generation: str, build: str
) -> tuple[Mapping[str, object], bool]:
    """What the operations are told of a test, and whether it passed. WrongState: the build did not test
    the flow, or tells nothing of it."""
    number = options.count("--generation", generation) if generation else 0
    if not build:
        return {"generation": number, "build": "", "vms": ()}, True
    record = record_of(site, build)
    found = repository.flows.open(flow)
    used = [one for one in record.repositories if one.repository == repository.name]
    tested = [one for one in used if one.generation == found.to_test]
    if not tested:
        had = ", ".join(dict.fromkeys(str(one.generation) for one in used)) or "none"
        raise WrongState(
            f"build {record.id} did not test generation {found.to_test}, which flow {flow} is to be "
            f"tested on: it used {had} of {repository.name}",
            remedy=("give the cycle a step 'use' with this flow: ", Call("cycle")),
        )
    step = record.failed_step
    good = record.result in ("passed", "partial")
    if not good and (step is None or step.failure in ("", "infrastructure")):
        raise WrongState(
            f"build {record.id} tells nothing of the flow: {record.verdict}"
            + (f", {step.failure} in step {step.name}" if step and step.failure else ""),
            remedy=("do it again: ", Call("cycle"), "; or say what it was by hand"),
        )
    return {
        "generation": number or found.to_test,
        "build": record.id,
        "vms": tuple(dict.fromkeys(one.vm for one in tested)),
    }, good
