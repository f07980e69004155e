"""Several VMs' disks changed as one: all of them, or none.

1. The VMs are stopped. Up to here nothing was changed: killed, or refused, those that ran are started
   again, and that was all. A guest that was asked to shut down goes on with it, whoever is killed: when
   it was asked is noted, and recovery waits for it.
2. The decision is noted in the journal.
3. Each store changes all its disks (``FarmDisks``: an error means that none is changed, and undoes step
   1 too). Killed from here on, recovery does this step again, to its end.

A farm on several stores takes them one after the other. There nobody can take the first one back when
the second fails: the operation then stays unfinished, the VMs stay stopped, and until a recovery got
the rest there too, none of them is started, cloned or reset (``refuse_unfinished``). A store that does
not implement ``FarmDisks`` is treated the same, disk by disk. Nor can anybody take back the way to a
warm checkpoint once it is begun (``WarmDisks``): then it stays unfinished, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

from hypervisors.api import Disks, FarmDisks, WarmDisks
from inventory.errors import FarmhandError, Interrupted, WrongState
from provision.engine.journal import Operation
from provision.engine.work import is_on, side_by_side
from provision.power import power_on
from provision.site import Site

Change = Callable[[Disks, Sequence[str]], None]
"""What is done to these machines' disks in their store: all or none of them, or an error. Safe to do
again."""

_LOOK = 0.5  # seconds between looks at a VM that goes down
AT_ANY_TIME = ("destroy", "stop", "gc")
"""Use cases that a half-done change is not in the way of."""


def change_disks(
    site: Site, operation: Operation, vms: Sequence[str], change: Change, *, grace: float
) -> None:
    """Within ``operation``, whose facts name in ``was_on`` those that ran before; see the module's head.
    Afterwards all are stopped and changed; ``grace`` seconds are given to each to shut down."""
    if grace > 0:
        operation.note(asked=datetime.now(UTC).isoformat(), grace=grace)
    try:
        stop_all(site, vms, grace=grace)
    except Interrupted:
        raise
    except FarmhandError:
        as_before(site, operation.facts)
        raise
    operation.note(decided=True)
    finish(site, operation, vms, change)


def finish(site: Site, operation: Operation, vms: Sequence[str], change: Change) -> None:
    """Step 3. Also for recovery, which must get to its end: ``must_finish``."""
    changed: list[str] = []
    for store, here in _groups(site, vms):
        try:
            change(store, [site.farm.machine_of(vm) for vm in here])
        except Interrupted:
            raise
        except FarmhandError as error:
            if any(is_half_back(store, site.farm.machine_of(vm)) for vm in here):
                operation.must_finish = True
            if operation.must_finish:
                raise _halfway(error, changed, vms) from error
            operation.note(decided=False)
            as_before(site, operation.facts)
            raise
        changed += here
        operation.must_finish = True
    operation.must_finish = False


def is_half_back(store: Disks, machine: str) -> bool:
    """Also where nobody can tell at the moment: then recovery looks again."""
    if not isinstance(store, WarmDisks):
        return False
    try:
        return bool(store.half_back(machine))
    except FarmhandError:
        return True


def _groups(site: Site, vms: Sequence[str]) -> Iterator[tuple[Disks, list[str]]]:
    """What can be changed as one."""
    for host in dict.fromkeys(map(site.farm.host_of, vms)):
        store = site.disks(host)
        here = [vm for vm in vms if site.farm.host_of(vm) == host]
        if isinstance(store, FarmDisks):
            yield store, here
        else:
            yield from ((store, [vm]) for vm in here)


def as_before(site: Site, facts: object) -> None:
    """Start again those that ran. One that can't be is a warning: an error led here, and comes first."""
    for vm in ran_before(site, facts):
        try:
            if not is_on(site.member(vm).look()):
                power_on(site.member(vm), wait=False)
        except FarmhandError as error:
            site.reporter.warn(f"could not be started again: {error.message}", vm=vm)


def run_again(site: Site, vm: str, facts: object) -> None:
    """Start one that ran before. Where it may have been asked to shut down and not have got there yet,
    that is waited for; if it doesn't listen, it runs on, and that is as before, too."""
    member, end = site.member(vm), time.monotonic() + _asked_for(facts)
    if is_on(member.look()) and time.monotonic() < end:
        site.reporter.working("it was asked to shut down: when it has, it is started again", vm=vm)
    while is_on(member.look()):
        if time.monotonic() > end:
            return
        time.sleep(_LOOK)
    power_on(member, wait=False)


def _asked_for(facts: object) -> float:
    """Seconds that are left of those which the guests were given to shut down; a clock that was set
    back makes them no more."""
    if not isinstance(facts, dict) or "asked" not in facts:
        return 0.0
    grace = float(facts["grace"])
    gone = datetime.now(UTC) - datetime.fromisoformat(str(facts["asked"]))
    return max(0.0, min(grace, grace - gone.total_seconds()))


def ran_before(site: Site, facts: object) -> tuple[str, ...]:
    """Of an operation's facts: the declared VMs that ran when it began."""
    named = facts.get("was_on") if isinstance(facts, dict) else None
    return tuple(vm for vm in site.farm.vms if isinstance(named, list) and vm in named)


def stop_all(site: Site, vms: Sequence[str], *, grace: float) -> None:
    """Side by side; those that are stopped are left alone."""
    side_by_side(
        site,
        {one.vm: partial(one.driver.stop, one.machine, grace=grace) for one in map(site.member, vms)},
    )


def refuse_unfinished(site: Site, verb: str, vms: Sequence[str]) -> None:
    """WrongState where one of the VMs is part of a change that recovery could not finish: the disks of
    some are changed, of others not, and neither is to be used."""
    if verb in AT_ANY_TIME:
        return
    wanted = frozenset(vms)
    for record in site.journal.unfinished():
        both = [vm for vm in record.vms if vm in wanted]
        if record.half_done and both:
            why = f"; in its way: {record.in_its_way}" if record.in_its_way else ""
            raise WrongState(
                f"{site.name}: a {record.verb} of {', '.join(record.vms)} is half done: "
                f"{', '.join(both)} can't be used before it is finished{why}",
                remedy="./invoke recover tries again; or ./invoke destroy a VM that can't be brought "
                "there",
            )


def _halfway(error: FarmhandError, changed: Sequence[str], vms: Sequence[str]) -> WrongState:
    rest = ", ".join(vm for vm in vms if vm not in changed)
    if changed:
        state = f"{', '.join(changed)} is done, {rest} not yet"
    else:
        state = f"some of {rest} may be done, others not yet"
    first = f"{error.remedy}; then " if error.remedy else ""
    return WrongState(
        f"{error.message}; {state}: all stay stopped until they are at one",
        remedy=f"{first}./invoke recover takes the rest there",
        detail=error.detail,
    )
