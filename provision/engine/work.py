"""How a use case runs: recover, lock, plan, act; its VMs side by side.

A plan is a list of jobs: an action (the line that is shown) and what carries it out. ``--plan`` stops
after the lines; a run shows the same lines and carries each out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass

from hypervisors.api import Disk, Machine, Power
from inventory.errors import FarmhandError, Interrupted, Several, some
from provision.engine.report import Action, Outcome
from provision.site import Site

ON = (Power.RUNNING, Power.PAUSED)
_AT_ONCE = 16  # threads: each mostly waits for a daemon or a guest


@dataclass(frozen=True, slots=True)
class Job:
    """``run`` None: only said."""

    action: Action
    run: Callable[[], None] | None = None


class Run:
    """One use case under way: what it does, and the facts it hands back. Facts may be added by any
    thread."""

    def __init__(self, site: Site, verb: str) -> None:
        self.site = site
        self.verb = verb
        self._actions: list[Action] = []
        self._facts: dict[str, object] = {}
        self._vms: dict[str, dict[str, object]] = {}
        self._guard = threading.Lock()

    def add(self, *actions: Action) -> None:
        with self._guard:
            self._actions += actions

    def fact(self, **facts: object) -> None:
        with self._guard:
            self._facts.update(facts)

    def vm_fact(self, vm: str, **facts: object) -> None:
        with self._guard:
            self._vms.setdefault(vm, {}).update(facts)

    def carry_out(self, jobs: Mapping[str, Sequence[Job]]) -> None:
        """The jobs of each VM in their order, the VMs side by side; in a plan only their lines."""
        for of_one in jobs.values():
            self.add(*(job.action for job in of_one))
        if self.site.plan:
            return
        for of_one in jobs.values():
            for job in of_one:
                if job.run is None:
                    self.site.reporter.say(job.action.text, vm=job.action.vm)

        def one(of_one: Sequence[Job]) -> None:
            for job in of_one:
                if job.run is not None:
                    job.run()

        tasks = {
            vm: (lambda of_one=of_one: one(of_one))
            for vm, of_one in jobs.items()
            if any(job.run for job in of_one)
        }
        side_by_side(self.site, tasks)

    def outcome(self) -> Outcome:
        with self._guard:
            facts = dict(self._facts)
            if self._vms:
                facts["vms"] = {vm: dict(of_one) for vm, of_one in self._vms.items()}
            return Outcome(self.verb, self.site.plan, tuple(self._actions), facts)


@contextlib.contextmanager
def begin(
    site: Site, verb: str, vms: Sequence[str], *, doing: str = "", locks: Sequence[str] = ()
) -> Iterator[Run]:
    """What every changing use case begins with: finish or undo what a killed one left, then lock the
    VMs (and what ``locks`` name besides). A plan says what would be recovered, and takes no lock.
    Busy if a VM is in use, WrongState if it is part of a change that can't be finished."""
    from provision.engine.group_change import refuse_unfinished

    run = Run(site, verb)
    if site.plan:
        run.add(*_recovered(site, vms))
        yield run
        return
    site.prepare()
    run.add(*_recovered(site, vms))
    with site.locks.hold(*map(lock_of, vms), *locks, doing=doing or f"{verb} {some(vms)}".strip()):
        refuse_unfinished(site, verb, vms)
        yield run


def _recovered(site: Site, vms: Sequence[str]) -> Sequence[Action]:
    """What was (in a plan: would be) finished or undone; hardly ever anything, and it has every use case
    with it."""
    if not site.journal.unfinished():
        return ()
    from provision.operations.recover import recover_all

    return recover_all(site, vms)


def lock_of(vm: str) -> str:
    return f"vm-{vm}"


def side_by_side(site: Site, tasks: Mapping[str, Callable[[], None]]) -> None:
    """Run each VM's task in a thread of its own, this one's context with it. All run to their end;
    then the error of the one that failed is raised, or Several. Ctrl-C lets each stop before its next
    step, then raises Interrupted."""
    if len(tasks) == 1:
        for task in tasks.values():
            task()
        return
    if not tasks:
        return
    with ThreadPoolExecutor(min(len(tasks), _AT_ONCE), thread_name_prefix="vm") as pool:
        futures: dict[str, Future[None]] = {
            vm: pool.submit(copy_context().run, task) for vm, task in tasks.items()
        }
        try:
            wait(futures.values())
        except KeyboardInterrupt:
            site.journal.interrupted.set()
            for future in futures.values():
                future.cancel()
            wait(futures.values())
            raise Interrupted(
                "interrupted; each VM stopped before its next step",
                remedy="the same command goes on from there; ./invoke recover puts things right first",
            ) from None
    errors: dict[str, FarmhandError] = {}
    for vm, future in futures.items():
        error = future.exception()
        if error is None:
            continue
        if not isinstance(error, FarmhandError):
            raise error
        errors[vm] = error
    if len(errors) > 1 and len({str(error) for error in errors.values()}) > 1:
        raise Several(errors)
    for error in errors.values():
        raise error


def is_warm(disk: Disk, checkpoint: str) -> bool:
    """Whether it holds a running machine's memory, too."""
    return any(kept.warm for kept in disk.checkpoints if kept.name == checkpoint)


def is_on(machine: Machine | None) -> bool:
    return machine is not None and machine.power in ON
