"""Which steps a cycle takes, and the plan's lines, from real reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from builds.again import command, cycle_command
from builds.lineage import Before, look_back, reset_first, vms_of
from builds.source import Resolved, check_contents, resolve
from hypervisors.api import Power
from inventory.autobuild import default_cycle
from inventory.errors import FarmhandError, NotFound, Unsupported, UsageError, WrongState
from inventory.loader import place
from inventory.model import Cycle, Farm, ResetStep, RunStep, Step, TransferStep
from inventory.sizes import format_duration, format_size
from provision.engine.report import Action
from provision.operations.reset import check_checkpoint

if TYPE_CHECKING:
    from provision.site import Site


def cycle_of(site: Site) -> Cycle:
    """The farm's cycle, or the Autobuild cycle where it has dev2 and prod. NotFound without either."""
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
    """Names of the steps to take. ``start_from`` skips those before it, ``only`` all others; both:
    what both leave. NotFound names the nearest step."""
    names = [step.name for step in cycle.steps]
    for name in (*only, *((start_from,) if start_from is not None else ())):
        if name not in names:
            near = get_close_matches(name, names, 1)
            raise NotFound(
                f"the cycle has no step {name!r}",
                remedy=f"did you mean {near[0]}?" if near else f"its steps: {', '.join(names)}",
            )
    chosen = names[names.index(start_from) :] if start_from is not None else names
    chosen = [name for name in chosen if not only or name in only]
    if not chosen:
        raise UsageError("--from and --only together leave no step")
    return frozenset(chosen)


def batches(steps: Iterable[Step]) -> list[list[Step]]:
    """Steps in their order; resets that follow one another, of different VMs, side by side."""
    result: list[list[Step]] = []
    for step in steps:
        last = result[-1] if result else []
        if (
            isinstance(step, ResetStep)
            and last
            and all(isinstance(s, ResetStep) and s.reset != step.reset for s in last)
        ):
            last.append(step)
        else:
            result.append([step])
    return result


def check(site: Site, steps: Sequence[Step], *, whole: bool) -> None:
    """Everything that can be known beforehand: the VMs exist, can be driven over ssh, have what they
    are to be reset to, and those not reset first are running. In a ``whole`` cycle each VM with a disk
    of ours is reset before it is built on: a build begins on a proven disk. NotFound, Unsupported,
    WrongState, UsageError."""
    ready: set[str] = set()
    for step in steps:
        for vm in vms_of(step):
            site.vms([vm])
            first = vm not in ready and not isinstance(step, ResetStep)
            member = site.member(vm)
            if whole and first and member.has_store:
                raise UsageError(
                    f"{site.name}: step {step.name} uses {vm} before the cycle resets it: "
                    "its disk is no known state to build on",
                    remedy=f"put a step 'reset: {vm}' before it; or build on it as it is, and have the "
                    f"record say so: {command('cycle', '--from', steps[0].name)}",
                )
            driver = member.info
            if not driver.guests and not isinstance(step, ResetStep):
                raise Unsupported(
                    f"{site.name}: step {step.name}: {vm} is on {driver.called}, "
                    "where nothing can be run",
                    remedy="--plan shows the cycle; a farm with driver kvm or ssh can run it",
                )
            if vm in ready:
                continue
            ready.add(vm)
            machine = site.hypervisor(member.host, look=True).find(member.machine)
            if machine is None:
                raise NotFound(
                    f"{site.name}: {vm} is not made yet", remedy=f"./invoke clone-farm --vm {vm}"
                )
            if isinstance(step, ResetStep):
                _check_reset(site, step)
            elif machine.power in (Power.STOPPED, Power.SUSPENDED):
                raise WrongState(
                    f"{site.name}: step {step.name} needs {vm}, which is {machine.power}",
                    remedy=f"./invoke start --vm {vm}",
                )


def _check_reset(site: Site, step: ResetStep) -> None:
    """That there is what it goes back to, and not a warm one: a guest whose memory runs on writes to its
    disk, which is never proven to be its checkpoint."""
    if check_checkpoint(site.member(step.reset), step.to):
        raise Unsupported(
            f"{site.name}: step {step.name}: {step.reset}'s checkpoint {step.to} is warm, and a build "
            "begins on a proven disk",
            remedy="reset it to a cold checkpoint",
        )


def resolve_source(site: Site, revision: str | None, *, snapshot: bool) -> Resolved | None:
    """What ``source`` and ``--revision`` mean now; None for a farm without a source."""
    source = site.farm.source
    if source is None:
        if revision is not None:
            raise UsageError(
                f"{site.name} has no 'source', so --revision {revision} means nothing",
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


def check_source(farm: Farm, cycle: Cycle, source: Resolved | None) -> None:
    """Unsupported where it has what the cycle would leave out: see ``builds.source``."""
    if source is not None:
        with _placed(farm):
            steps = (step for step in cycle.steps if isinstance(step, RunStep))
            check_contents(source, (script for step in steps for script in step.run))


@contextmanager
def _placed(farm: Farm) -> Iterator[None]:
    try:
        yield
    except FarmhandError as error:
        error.message = f"{source_place(farm)}: {error.message}"
        error.args = (error.message,)
        raise


def source_place(farm: Farm) -> str:
    """Where the farm file names its source: ``farm.yaml:42:15``."""
    key = "example" if farm.source is not None and farm.source.example else "repository"
    return place(farm, "source", key)


def source_for(
    site: Site, before: Before, revision: str | None, *, cycle: Cycle, snapshot: bool
) -> Resolved | None:
    """What is built: what the skipped steps were given, where there are such; else ``revision`` or the
    farm file's. WrongState where the VMs hold another commit than ``revision``."""
    held = before.source if site.farm.source else None
    if held is None or not held.commit or (before.why and revision is not None):
        return resolve_source(site, revision, snapshot=snapshot)
    asked = held.commit if revision is None else revision
    try:
        found = resolve_source(site, asked, snapshot=snapshot)
    except NotFound as error:
        if held.commit not in error.message:
            raise
        raise NotFound(  # nobody has typed that one
            f"{error.message}, the commit that the VMs hold",
            remedy=f"build what is there now: {command('cycle')}",
        ) from None
    if found is None or revision is None:
        return found and replace(found, asked=held.asked, subject=found.subject or held.subject)
    if found.commit == held.commit or (not snapshot and not found.commit and found.repository):
        return found
    name, build = next(iter(before.done.items()))
    is_now = found.commit[:10] or "only known to the VM"
    vm = vms_of(next(step for step in cycle.steps if step.name == name))[-1]
    raise WrongState(
        f"{site.name}: {vm} holds commit {held.commit[:10]} ({held.asked}, build {build}), but "
        f"--revision {revision} is {is_now}, and step {name} is skipped",
        remedy=f"build that one: {cycle_command(name, ('--revision', revision))}; "
        "or go on with what is there: leave --revision away",
    )


def plan_cycle(
    site: Site,
    *,
    start_from: str | None = None,
    only: Sequence[str] = (),
    revision: str | None = None,
) -> tuple[Action, ...]:
    """What ``run_cycle`` would do, line by line, nothing done."""
    cycle = cycle_of(site)
    chosen = choose(cycle, start_from, only)
    steps = [step for step in cycle.steps if step.name in chosen]
    check(site, steps, whole=start_from is None and not only)
    before = look_back(site, cycle, chosen)
    source = source_for(site, before, revision, cycle=cycle, snapshot=False)
    check_source(site.farm, cycle, source)
    lines: list[Action] = []
    if source is not None:
        if source.commit:
            what = f"{source.short} ({source.subject})" if source.subject else source.short
        else:
            where = "found in the VM" if source.repository is None else "its present state"
            what = f"{source.asked}, {where}"
        text = f"build {source.shown} at {what}"
        if before.why:
            text = f"build what the VMs hold of {source.shown}; GIT_REVISION is {what}"
        lines.append(Action("source", "", text))
        lines += [Action("note", "", note) for note in source.notes]
    lines += [Action("note", "", note) for note in before.notes]
    for vm in dict.fromkeys(vm for step in steps for vm in vms_of(step)):
        if not reset_first(steps, vm):
            lines.append(Action("note", vm, "taken as it is, not reset: the record will say so"))
    inflated: set[str] = set()
    for step in cycle.steps:
        if step.name not in chosen:
            lines.append(Action("skip", vms_of(step)[0], f"{step.name}: skipped"))
            continue
        for vm in vms_of(step):
            declared = site.farm.vms[vm]
            idle = declared.idle_memory
            if isinstance(step, RunStep) and idle not in (None, declared.memory) and vm not in inflated:
                inflated.add(vm)
                lines.append(Action("balloon", vm, f"memory to {format_size(declared.memory)}"))
        lines.append(Action(_verb(step), vms_of(step)[0], f"{step.name}: {describe(step)}"))
    for vm in sorted(inflated):
        idle = site.farm.vms[vm].idle_memory
        assert idle is not None
        lines.append(Action("balloon", vm, f"memory to {format_size(idle)}"))
    lines.append(Action("record", "", f"write the build record below {site.paths.builds}"))
    return tuple(lines)


def describe(step: Step) -> str:
    """What a step does, in a few words."""
    limit = f"at most {format_duration(step.timeout)}"
    if isinstance(step, ResetStep):
        return f"reset to {step.to}, start, wait until its ssh answers, {limit}"
    if isinstance(step, TransferStep):
        return f"carry {', '.join(step.transfer)} to {step.to}:{step.into}, {limit}"
    first = next((ln.strip() for ln in step.run[0].splitlines() if ln.strip()), "")
    many = len(step.run) > 1 or len(step.run[0].strip().splitlines()) > 1
    fetched = f", fetch {', '.join(step.artifacts)}" if step.artifacts else ""
    return f"run {first[:60]}{' ...' if many or len(first) > 60 else ''}, {limit}{fetched}"


def _verb(step: Step) -> str:
    return {ResetStep: "reset", RunStep: "run", TransferStep: "transfer"}[type(step)]
