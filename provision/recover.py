"""What killed processes left half-done: finished or undone, by the journal and by what is there.

    clone       no machine: undone; a machine: it is complete, the next clone-farm goes on
    reset       power was cut: done again, and started if that was asked; not yet begun: nothing
    checkpoint  what was half-made goes; started again if it ran before
    destroy     finished
    cycle       its VMs' memory goes down again; the build record says by itself how far it came
    network-apply   the old files are put back, and the daemons told
    others      noted as interrupted: each is safe to call again

Each operation is recovered under its VM's lock, and stays unfinished until its recovery is complete:
a recovery that is killed is recovered by the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from inventory.errors import Busy, FarmhandError, WrongState
from provision.clone import undo_clone
from provision.destroy import erase, finish_farm, last_of
from provision.files import sweep
from provision.gc import discard_of
from provision.identity import sweep_seed
from provision.journal import Record, current_operation
from provision.paths import state_dir
from provision.power import can_power, deflate, power_on
from provision.report import Action, Outcome
from provision.reset import put_back
from provision.site import Site
from provision.work import Job, is_on, lock_of, look


def recover(site: Site) -> Outcome:
    """Finish or undo all that was left; also what every changing use case does first. Errors are
    raised here, where it is all that was asked; there they are warnings."""
    if not site.plan and site.paths.root.exists():
        site.prepare()
    razed = any(
        record.verb == "destroy" and record.facts.get("whole") for record in site.journal.unfinished()
    )
    actions = recover_all(site, strict=True)
    if razed and not site.plan:
        last_of(site)
    if not actions:
        actions = (Action("keep", "", "nothing was left unfinished"),)
    return Outcome("recover", site.plan, actions)


def recover_all(site: Site, *, strict: bool = False) -> tuple[Action, ...]:
    """What was (in a plan: would be) done. What others hold a lock on is left to them."""
    actions: list[Action] = []
    for record in site.journal.unfinished():
        try:
            if site.plan:
                actions.append(_job(site, record).action)
                continue
            with site.locks.hold(
                *_locks(site, record), doing=f"recover {record.verb} {record.vm}".strip()
            ):
                now = site.journal.find(record.id)
                if now is not None and not now.settled:
                    actions.append(_recover_one(site, now))
        except Busy as error:
            site.reporter.warn(f"not recovered now: {error.message}", vm=record.vm)
        except FarmhandError as error:
            if strict:
                raise
            site.reporter.warn(f"could not recover its {record.verb}: {error.message}", vm=record.vm)
    if actions and not site.plan:
        _sweep(site)
    return tuple(actions)


def _recover_one(site: Site, record: Record) -> Action:
    job = _job(site, record)
    with site.journal.resume(record):
        if job.run is not None:
            job.run()
        if record.vm in site.farm.vms:
            discard_of(site, record.vm)
            sweep_seed(site.paths, site.machine(record.vm))
    with contextlib.suppress(WrongState):  # the journal may have gone with its farm
        site.journal.settle(record.id, "recovered", job.action.text)
    site.reporter.warn(job.action.text, vm=record.vm)
    return job.action


def _job(site: Site, record: Record) -> Job:
    began = record.started.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    what = f"a {record.verb} of {began} (pid {record.process.pid}) was interrupted"
    vm = record.vm

    def job(text: str, run: Callable[[], None] | None = None) -> Job:
        return Job(Action("recover", vm, f"{what}: {text}"), run)

    if record.verb == "destroy":
        return _destroy(site, record, what)
    if record.verb == "cycle":
        return _cycle(site, record, what)
    if record.verb == "network-apply":
        from provision.network.apply import recover_apply

        text, run = recover_apply(site, record)
        return job(text, run)
    if vm not in site.farm.vms:
        return job("noted" if not vm else "it is no longer declared; noted")
    if not can_power(site, vm):
        return job("noted; on an ssh host nothing is undone")
    machine = look(site, vm)
    if record.verb == "clone":
        if machine is not None:
            return job("the machine is complete; clone-farm goes on from there")
        return job("undone, nothing of it stays", lambda: undo_clone(site, vm))
    if machine is None:
        return job("its machine is gone; noted")
    if record.verb == "reset":
        return _reset(site, record, what, on=is_on(machine))
    if record.verb == "checkpoint" and record.facts.get("was_on") and not is_on(machine):
        return job("start it again", lambda: power_on(site, vm, wait=False))
    return job("noted")


def _reset(site: Site, record: Record, what: str, *, on: bool) -> Job:
    vm, to = record.vm, str(record.facts.get("to", "clean"))
    start = bool(record.facts.get("start"))
    if on and not record.facts.get("swapped"):
        # Cutting its power is the first thing a reset does: nothing else was done.
        return Job(Action("recover", vm, f"{what}: it had not begun, its disk is the old one"))
    if record.facts.get("swapped") and (on or not start):
        return Job(Action("recover", vm, f"{what}: its disk is {to}; noted"))

    def redo() -> None:
        if not record.facts.get("swapped"):
            proof = put_back(site, vm, to)
            if operation := current_operation():  # before it runs again: see the first case above
                operation.note(proof=proof, swapped=True)
        if start:
            power_on(site, vm, wait=False)

    text = "start it" if record.facts.get("swapped") else f"put it back to {to}"
    if start and not record.facts.get("swapped"):
        text += " and start it"
    return Job(Action("recover", vm, f"{what}: {text}"), redo)


def _cycle(site: Site, record: Record, what: str) -> Job:
    inflated = []
    for vm in _vms_of(site, record):
        machine = look(site, vm) if can_power(site, vm) else None
        idle = site.farm.vms[vm].idle_memory
        if machine is not None and is_on(machine) and idle is not None and machine.current > idle:
            inflated.append(vm)

    def calm() -> None:
        for vm in inflated:
            deflate(site, vm)

    text = f"balloon down {', '.join(inflated)}" if inflated else "noted"
    return Job(Action("recover", "", f"{what}: {text}; log shows how far it came"), calm)


def _vms_of(site: Site, record: Record) -> tuple[str, ...]:
    named = record.facts.get("vms")
    return tuple(vm for vm in site.farm.vms if isinstance(named, list) and vm in named)


def _destroy(site: Site, record: Record, what: str) -> Job:
    if record.facts.get("whole"):
        purge = bool(record.facts.get("purge"))
        return Job(
            Action("recover", "", f"{what}: finish it, the whole farm goes"),
            lambda: finish_farm(site, purge=purge),
        )
    return Job(Action("recover", record.vm, f"{what}: finish it"), lambda: erase(site, record.vm))


def _sweep(site: Site) -> None:
    """Temporary files of killed writers."""
    paths, lock_file = site.paths, site.allocator.lock_file
    for directory in (paths.root, paths.seeds, paths.keys, paths.keys / "hostkeys"):
        sweep(directory)
    sweep(lock_file.parent, lock_file.name)
    sweep(state_dir(), "claims.json")


def _locks(site: Site, record: Record) -> tuple[str, ...]:
    if record.facts.get("whole"):
        return tuple(map(lock_of, site.farm.vms))
    if record.verb == "cycle":
        return tuple(map(lock_of, _vms_of(site, record)))
    if record.verb == "network-apply":
        return ("network",)
    return (lock_of(record.vm) if record.vm else "recover",)
