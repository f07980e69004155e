"""What a build will do, by real reads: the very jobs that it then carries out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from builds.lineage import Lineage, look_back, reset_first
from builds.record import BuildRecord, find_record
from builds.repositories import meant_now
from builds.root import no_root
from builds.source import NoRevision, Resolved, check_contents, resolve
from builds.step_kind import StepKind, steps_of
from host.check import install
from host.run import which
from hypervisors.api import Power
from inventory.autobuild import default_cycle
from inventory.errors import (
    Call,
    FarmhandError,
    NotFound,
    UnknownName,
    Unsupported,
    UsageError,
    WrongState,
    did_you_mean,
)
from inventory.loader import place
from inventory.model import Cycle, Farm
from inventory.sizes import format_size
from provision.engine.report import Action
from provision.member import Member

if TYPE_CHECKING:
    from builds.machines import Machines
    from provision.site import Site


def cycle_of(site: Site) -> Cycle:
    """The farm's cycle, or the Autobuild cycle where it has dev2 and prod, for this farm's VMs. NotFound
    without either."""
    cycle = _declared_cycle(site)
    return replace(cycle, steps=tuple(step.on(site.farm) for step in cycle.steps))


def _declared_cycle(site: Site) -> Cycle:
    if site.farm.cycle is not None:
        return site.farm.cycle
    missing = [vm for vm in ("dev2", "prod") if vm not in site.farm.vms]
    if missing:
        raise NotFound(
            f"{site.name}: it has no 'cycle', and the default one is for VMs dev2 and prod",
            remedy="write a 'cycle' with its steps, see docs/inventory.md",
        )
    return default_cycle()


def choose(cycle: Cycle, start_from: str | None, only: Sequence[str]) -> frozenset[str]:
    """Names of the steps to take. ``start_from`` skips those before it, ``only`` skips all others; with
    both, what both leave. UnknownName names the nearest step."""
    names = [step.name for step in cycle.steps]
    for name in (*only, *((start_from,) if start_from is not None else ())):
        if name not in names:
            raise UnknownName(
                f"the cycle has no step {name!r}",
                remedy=did_you_mean(name, names, f"its steps: {', '.join(names)}"),
            )
    chosen = names[names.index(start_from) :] if start_from is not None else names
    chosen = [name for name in chosen if not only or name in only]
    if not chosen:
        raise UsageError(f"none of {', '.join(only)} is a step from {start_from} on: nothing is left")
    return frozenset(chosen)


def check(site: Site, steps: Sequence[StepKind], *, whole: bool) -> list[str]:
    """Check all that can be known beforehand: the VMs exist, can be driven over ssh, and have the
    checkpoints they are to be reset to; those not reset first are running. In a ``whole`` cycle each VM
    with a disk of ours is reset before it is built on: a build begins on a proven disk. Returns, where
    only a plan is made, the VMs that are not made yet; else there must be none.

    Errors: NotFound, Unsupported, WrongState, UsageError."""
    ready: set[str] = set()
    absent: list[str] = []
    for step in steps:
        for vm in step.vms:
            site.vms([vm])
            first = vm not in ready and not step.RENEWS
            member = Member(site, vm)
            if whole and first and member.has_store:
                raise UsageError(
                    f"{site.name}: step {step.name} uses {vm} before the cycle resets it: "
                    "its disk is no known state to build on",
                    remedy=(
                        f"put a step 'reset: {vm}' before it; or build on it as it is, and have the "
                        "record say so: ",
                        Call("cycle", from_=steps[0].name),
                    ),
                )
            driver = member.info
            if not driver.guests and not step.RENEWS:
                raise Unsupported(
                    f"{site.name}: step {step.name}: {vm} is on {driver.called}, "
                    "where nothing can be run",
                    remedy=(
                        Call("cycle", plan=True),
                        " shows it; a farm with driver kvm or ssh can run it",
                    ),
                )
            if vm in ready:
                continue
            ready.add(vm)
            check_root(site, steps, vm)
            machine = site.hypervisor(member.host, look=True).find(member.machine)
            if machine is None and site.plan:
                absent.append(vm)
                continue
            if machine is None:
                raise NotFound(f"{site.name}: {vm} is not made yet", remedy=Call("clone-farm", vm=vm))
            down = (Power.STOPPED, Power.SUSPENDED, Power.PANICKED)
            if not step.RENEWS and machine.power in down:
                back = "reset" if machine.power is Power.PANICKED else "start"
                raise WrongState(
                    f"{site.name}: step {step.name} needs {vm}, which is {machine.power}",
                    remedy=Call(back, vm=vm),
                )
        for tool in step.TOOLS:
            if which(tool) is None:
                raise Unsupported(
                    f"{site.name}: step {step.name} needs {tool} on this machine",
                    remedy=install(tool),
                )
        if not (step.RENEWS and step.first in absent):
            step.check(site)
    return absent


def wants_root(site: Site, steps: Iterable[StepKind], vm: str) -> str:
    """The first of the steps that needs root in the VM, where the login is another; "" if none does."""
    if site.farm.ssh.user == "root":
        return ""
    return next((step.name for step in steps if step.needs_root and vm in step.vms), "")


def check_root(site: Site, steps: Iterable[StepKind], vm: str) -> None:
    """Unsupported where a step needs root, and the login is ``unprivileged``."""
    if unprivileged(site, vm) and (step := wants_root(site, steps, vm)):
        raise no_root(site, vm, f"step {step}")


def unprivileged(site: Site, vm: str) -> bool:
    """Whether the farm file itself says that the VM's login can't be root: farmhand makes its VMs'
    logins, and this one has no `sudo`. Of others' images only they know."""
    template = site.farm.templates.get(site.farm.template_of(vm) or "")
    if template is None or template.first_boot != "farmhand":
        return False
    return site.farm.ssh.user != "root" and site.farm.ssh.user not in site.farm.ssh.sudo


def resolve_source(site: Site, revision: str | None, *, snapshot: bool) -> Resolved | None:
    """The commit that ``source`` and ``--revision`` mean now; None for a farm without a source."""
    source = site.farm.source
    if source is None:
        if revision is not None:
            raise UsageError(
                f"{site.name} has no 'source', so revision {revision} means nothing",
                remedy="write 'source: repository:' into the farm file",
            )
        return None
    with _placed(site.farm):
        return resolve(
            site.runner,
            source.place,
            revision if revision is not None else source.revision,
            base=site.farm.path.parent,
            sources=site.paths.root / "sources",
            snapshot=snapshot,
        )


def check_source(farm: Farm, steps: Iterable[StepKind], source: Resolved | None) -> None:
    """Unsupported if the source has what the cycle would leave out: see ``builds.source``."""
    if source is not None:
        with _placed(farm):
            check_contents(source, (script for step in steps for script in step.scripts))


@contextmanager
def _placed(farm: Farm) -> Iterator[None]:
    try:
        yield
    except FarmhandError as error:
        error.message = f"{source_place(farm)}: {error.message}"
        error.args = (error.message,)
        raise


def source_place(farm: Farm) -> str:
    """The place where the farm file names its source, such as ``farm.yaml:42:15``."""
    key = "example" if farm.source is not None and farm.source.example else "repository"
    return place(farm, "source", key)


def source_for(
    site: Site, before: Lineage, revision: str | None, *, steps: Sequence[StepKind], snapshot: bool
) -> Resolved | None:
    """What is built: what the skipped steps were given, if there are any; else ``revision``, or the farm
    file's. WrongState if the VMs hold another commit than ``revision``."""
    held = before.source if site.farm.source else None
    if held is None or not held.commit or (before.why and revision is not None):
        return resolve_source(site, revision, snapshot=snapshot)
    asked = held.commit if revision is None else revision
    try:
        found = resolve_source(site, asked, snapshot=snapshot)
    except NoRevision as error:
        if error.revision != held.commit:
            raise
        raise NotFound(  # nobody has typed that one
            f"{error.message}, the commit that the VMs hold",
            remedy=("build what is there now: ", Call("cycle")),
        ) from None
    if found is None or revision is None:
        return found and replace(
            found, asked=held.asked, subject=found.subject or held.subject,
            branch=found.branch or held.branch, version=found.version or held.version,
        )  # fmt: skip
    if found.commit == held.commit or (not snapshot and not found.commit and found.repository):
        return found
    name, build = next(iter(before.done.items()))
    is_now = found.commit[:10] or "only known to the VM"
    vm = next(step for step in steps if step.name == name).changes
    raise WrongState(
        f"{site.name}: {vm} holds commit {held.commit[:10]} ({held.asked}, build {build}), but "
        f"{revision} is {is_now}, and step {name} is skipped",
        remedy=(
            "build that one: ",
            Call("cycle", from_=name, revision=revision),
            "; or go on with what is there: ",
            Call("cycle", from_=name),
        ),
    )


def built_in(site: Site, build: BuildRecord) -> str | None:
    """The revision that a build was given; None where the farm has no source. WrongState: nobody knows
    it."""
    if site.farm.source is None:
        return None
    if build.source.unverified or not build.source.commit:
        raise WrongState(
            f"{site.name}: nobody knows which commit build {build.id} was of"
            + (f": {build.source.unverified}" if build.source.unverified else ""),
            remedy=("say which: ", Call("cycle", like=build.id, revision="REVISION")),
        )
    return build.source.commit


class BuildUnderWay(Protocol):
    """What the jobs ask of the build that carries them out."""

    machines: Machines

    async def step(self, step: StepKind, /) -> bool:
        """Carry one step out. Returns whether it passed."""

    def close(self) -> None:
        """Write the record's end."""


@dataclass(frozen=True, slots=True)
class BuildJob:
    """A line of the plan, and what a build does for it. ``run``: returns whether it went well; None: the
    line is all. ``step``: the step that it is, if it is one."""

    action: Action
    run: Callable[[BuildUnderWay], Awaitable[bool]] | None = None
    step: StepKind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """All that a build does, in its order. ``jobs``: until one fails. ``give_back``: side by side,
    whatever became of the jobs. ``close``: at the end."""

    cycle: Cycle
    steps: tuple[StepKind, ...]
    chosen: frozenset[str]
    before: Lineage
    like: BuildRecord | None
    source: Resolved | None
    jobs: tuple[BuildJob, ...]
    give_back: tuple[BuildJob, ...]
    close: BuildJob

    @property
    def lines(self) -> tuple[Action, ...]:
        return tuple(job.action for job in (*self.jobs, *self.give_back, self.close))

    @property
    def vms(self) -> tuple[str, ...]:
        return vms_of(step for step in self.steps if step.name in self.chosen)


def vms_of(steps: Iterable[StepKind]) -> tuple[str, ...]:
    """The VMs of these steps, each once, in the order in which they are used."""
    return tuple(dict.fromkeys(vm for step in steps for vm in step.vms))


def plan_build(
    site: Site,
    start_from: str | None,
    only: Sequence[str],
    revision: str | None,
    *,
    like: str = "",
    snapshot: bool,
) -> BuildPlan:
    """What such a cycle does, by real reads. Nothing is changed; only with ``snapshot`` the source's
    present state is committed. ``like``: the build whose repositories, and revision, it is to have.
    Errors: as of ``check``, ``source_for``, ``built_in`` and ``builds.repositories.meant_now``."""
    cycle = cycle_of(site)
    every = steps_of(cycle)
    chosen = choose(cycle, start_from, only)
    steps = [step for step in every if step.name in chosen]
    absent = check(site, steps, whole=start_from is None and not only)
    earlier = find_record(site.paths, like) if like else None
    if earlier is not None and revision is None:
        revision = built_in(site, earlier)
    meant_now(site, steps, earlier)
    before = look_back(site, every, chosen)
    source = source_for(site, before, revision, steps=every, snapshot=snapshot)
    check_source(site.farm, every, source)
    notes = [Action("note", vm, ("not made yet: first ", Call("clone-farm", vm=vm))) for vm in absent]
    known = (*notes, *_shared(site, cycle), *_beforehand(before, source, steps))
    jobs = [BuildJob(action) for action in known]
    raised: set[str] = set()
    for step in every:
        if step.name not in chosen:
            jobs.append(BuildJob(Action("skip", step.first, f"{step.name}: skipped")))
            continue
        for vm in step.vms:
            member = Member(site, vm)
            if step.BUILDS and vm not in raised and member.idles:
                raised.add(vm)
                full = format_size(member.declared.memory)
                run = partial(_inflate, vm)
                jobs.append(BuildJob(Action("balloon", vm, f"memory to {full}"), run))
        text = f"{step.name}: {step.does()}"
        action = Action(step.KIND, step.first, text, step.scripts)
        jobs.append(BuildJob(action, partial(_step, step), step))
    give_back = []
    for vm in vms_of(steps):
        member = Member(site, vm)
        if member.idles:
            idle = format_size(member.declared.idle_memory or 0)
            give_back.append(BuildJob(Action("balloon", vm, f"memory to {idle}"), partial(_deflate, vm)))
    text = f"write the build record below {site.paths.builds}"
    return BuildPlan(
        cycle=cycle,
        steps=every,
        chosen=chosen,
        before=before,
        like=earlier,
        source=source,
        jobs=tuple(jobs),
        give_back=tuple(give_back),
        close=BuildJob(Action("record", "", text), _close),
    )


def _shared(site: Site, cycle: Cycle) -> Iterator[Action]:
    """The lock that is held all through, if others share one, and the cache for packages. Errors: as of
    ``builds.cycle_lock`` and ``builds.package_cache``."""
    if cycle.package_cache:
        from builds.package_cache import PROGRAM, sources_of

        if which(PROGRAM) is None:
            raise Unsupported(
                f"{site.name}: package_cache needs {PROGRAM} on this machine", remedy=install(PROGRAM)
            )
        text = f"packages through a cache from {', '.join(sources_of(site.farm))}"
        yield Action("note", "", text)
    if cycle.lock is not None:
        from builds.cycle_lock import opened

        opened(site, cycle.lock)  # what it needs here is looked at now
        yield Action("lock", "", f"hold {cycle.lock.webdav}, the lock that others share, to the end")


def _beforehand(before: Lineage, source: Resolved | None, steps: Sequence[StepKind]) -> Iterator[Action]:
    """Lines that say what is built, and on what. Nothing is done for them."""
    if source is not None:
        if source.commit:
            what = f"{source.short} ({source.subject})" if source.subject else source.short
        else:
            where = "found in the VM" if source.repository is None else "its present state"
            what = f"{source.asked}, {where}"
        text = f"build {source.shown} at {what}"
        if before.why:
            text = f"build what the VMs hold of {source.shown}; GIT_REVISION is {what}"
        yield Action("source", "", text)
        yield from (Action("note", "", note) for note in source.notes)
    yield from (Action("note", "", note) for note in before.notes)
    for vm in vms_of(steps):
        if not reset_first(steps, vm):
            yield Action("note", vm, "taken as it is, not reset: the record will say so")


def batches(jobs: Iterable[BuildJob]) -> list[list[BuildJob]]:
    """The jobs in their order, in batches. Resets of different VMs that follow one another are one
    batch, and run side by side."""
    result: list[list[BuildJob]] = []
    for job in jobs:
        if job.run is None:
            continue
        last = result[-1] if result else []
        if last and all(_beside(job.step, other.step) for other in last):
            last.append(job)
        else:
            result.append([job])
    return result


def _beside(one: StepKind | None, other: StepKind | None) -> bool:
    if one is None or other is None:
        return False
    return one.RENEWS and other.RENEWS and not set(one.vms) & set(other.vms)


async def _step(step: StepKind, build: BuildUnderWay) -> bool:
    return await build.step(step)


async def _inflate(vm: str, build: BuildUnderWay) -> bool:
    await build.machines.inflate(vm)
    return True


async def _deflate(vm: str, build: BuildUnderWay) -> bool:
    await build.machines.deflate(vm)
    return True


async def _close(build: BuildUnderWay) -> bool:
    build.close()
    return True
