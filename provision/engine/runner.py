"""How an operation is carried out: recover what killed ones left, take its locks, plan, act.

``--plan`` stops after the plan. A run shows the same lines, and carries each out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from inventory.errors import Busy, Call, WrongState, some, spelled
from provision.engine.locks import has_lease, leased, lock_of
from provision.engine.report import Action, Outcome, R
from provision.engine.run import Run

if TYPE_CHECKING:
    from provision.engine.operation import Operation
    from provision.site import Site


def perform(site: Site, operation: Operation[R]) -> Outcome[R]:
    """Carry the operation out; under ``site.plan`` say what would be done. What somebody else holds is
    waited for as long as ``site.patience`` says, with nothing begun.

    Errors: Busy (a VM is in use), WrongState (a VM is part of a change that recovery could not finish),
    and those that the operation names."""
    within = has_lease()  # another operation that holds locks: nobody is to wait for it meanwhile
    while True:
        begun = False
        vms = operation.affected(site)
        try:
            with begin(
                site, operation.name, vms, doing=operation.doing(vms), locks=operation.locks(site),
                at_any_time=operation.at_any_time, recovers_first=operation.recovers_first,
                refused=partial(operation.refused, site), is_build=operation.is_build,
            ) as run:  # fmt: skip
                plan = operation.plan(run)
                begun = True
                site.patience.over()
                run.carry_out(plan.stages)
                return Outcome(run.name, site.plan, tuple(run.actions), plan.result())
        except Busy as error:
            if begun or within or not site.patience.again(error):
                raise


@contextlib.contextmanager
def begin(
    site: Site,
    name: str,
    vms: Sequence[str],
    *,
    doing: str = "",
    locks: Sequence[str] = (),
    at_any_time: bool = False,
    recovers_first: bool = True,
    refused: Callable[[Busy], Busy] | None = None,
    is_build: bool = False,
) -> Iterator[Run]:
    """Begin an operation: recover, then hold the locks. A plan says what would be recovered, and takes
    no lock. ``refused``: makes the error to raise when another operation holds a lock."""
    run = Run(site, name, tuple(vms))
    if site.plan:
        if recovers_first:
            run.add(*_recovered(site, vms))
        if not at_any_time:
            refuse_half_done(site, vms)
        yield run
        return
    if recovers_first or site.paths.root.exists():  # to recover alone makes no farm
        site.prepare()
    with leased() as lease:
        if recovers_first:
            with lease.recovering:
                recovered = _recovered(site, vms)
            if recovered:
                run.add(*recovered)
                site.prepare()  # for that may have been the end of the whole farm
        doing = doing or f"{name} {some(vms)}".strip()
        with contextlib.ExitStack() as stack:
            try:
                held = site.locks.hold(*map(lock_of, vms), *locks, doing=doing, is_build=is_build)
                stack.enter_context(held)
            except Busy as error:
                raise (refused(error) if refused else error) from None
            if not at_any_time:
                refuse_half_done(site, vms)
            yield run


def refuse_half_done(site: Site, vms: Sequence[str]) -> None:
    """WrongState where one of the VMs is part of a change of several disks that recovery could not
    finish: some disks are changed and others are not, so none may be used. So also for one that is no
    longer declared, where any recovery of it failed. In a plan: that recovery could not even plan."""
    from provision.engine.recovery import can_be_foreseen, unusable

    wanted = frozenset(vms)
    for record in site.journal.unfinished():
        both = unusable(site, record, wanted)
        if both and not (site.plan and can_be_foreseen(site, record)):
            why = f"; in its way: {spelled(record.in_its_way)}" if record.in_its_way else ""
            raise WrongState(
                f"{site.name}: a {record.verb} of {', '.join(record.vms)} is half done: "
                f"{', '.join(both)} can't be used before it is finished{why}",
                remedy=(
                    Call("recover"),
                    " tries again; or ",
                    Call("destroy"),
                    " a VM that can't be brought there",
                ),
            )


def _recovered(site: Site, vms: Sequence[str]) -> Sequence[Action]:
    """What was recovered (in a plan: would be). There is hardly ever anything, so it looks before it
    imports the code."""
    if not site.journal.unfinished():
        return ()
    from provision.engine.recovery import recover_all

    return recover_all(site, vms)
