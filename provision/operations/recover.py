"""What killed processes left half-done: finished or undone, by the journal and by what is there.

    clone       no machine: undone; a machine: it is complete, the next clone-farm goes on
    reset       not decided yet: undone, those that ran are started again; decided: all are put back,
                and started if that was asked (see provision.engine.group_change)
                back to a warm one: also put back again where its start was cut off
    checkpoint  likewise; a warm one is there or not, nothing is to be finished
    balloon     finished: the memory was there for it, and stays reserved until then
    merge       gone on with
    destroy     finished
    cycle       its VMs' memory goes down again; the build record says by itself how far it came
    network-apply   the old files are put back, and the daemons told
    others      noted as interrupted: each is safe to call again

Each operation is recovered under its VMs' locks, and stays unfinished until its recovery is complete:
a recovery that is killed is recovered by the next. One that can't succeed is in nobody else's way: the
others are recovered, then its error is told, and noted. It is tried again by each command, and told by
those for its VMs, by ``recover`` and ``status``; by others only where it is another error than before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from host.files import sweep
from inventory.errors import Busy, FarmhandError, Interrupted, NoSpace, Several, WrongState
from inventory.sizes import format_size
from provision.engine.group_change import (
    as_before,
    finish,
    is_half_back,
    ran_before,
    run_again,
    stop_all,
)
from provision.engine.journal import Record, current_operation
from provision.engine.report import Action, Outcome
from provision.engine.work import Job, is_on, lock_of, side_by_side
from provision.guest.identity import sweep_seeds
from provision.leftovers import discard_of, discard_unowned
from provision.operations.balloon import finish_balloon
from provision.operations.checkpoint import GRACE, keep, merge_on
from provision.operations.clone import undo_clone
from provision.operations.destroy import erase, finish_farm, last_of
from provision.operations.reset import proven, restore
from provision.power import deflate
from provision.site import Site


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


def recover_all(site: Site, vms: Sequence[str] = (), *, strict: bool = False) -> tuple[Action, ...]:
    """What was (in a plan: would be) done. What others hold a lock on is left to them. ``vms``: those of
    the command that asks."""
    actions: list[Action] = []
    failed: dict[str, FarmhandError] = {}
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
        except Interrupted:
            raise
        except FarmhandError as error:
            failed.setdefault(", ".join(record.vms) or record.verb, error)
            # one for the VMs of a half-done change is refused, and told why
            concerned = not record.half_done and set(vms) & set(record.vms)
            if not strict and (concerned or _whole(error) != record.in_its_way):
                text = f"could not recover its {record.verb}: {_whole(error)}"
                site.reporter.warn(text, vm=record.vm)
    if actions and not site.plan:
        _sweep(site)
    if strict and failed:
        raise next(iter(failed.values())) if len(failed) == 1 else Several(failed)
    return tuple(actions)


def _recover_one(site: Site, record: Record) -> Action:
    with site.journal.resume(record) as operation:
        try:
            job = _job(site, record)
            if job.run is not None:
                job.run()
        except (Busy, Interrupted):
            raise
        except FarmhandError as error:
            if record.in_its_way != _whole(error):
                with contextlib.suppress(FarmhandError):  # then it is told once more
                    operation.note(in_its_way=_whole(error))
            raise
        vms = [vm for vm in record.vms if vm in site.farm.vms and record.verb != "cycle"]
        _discard_rest(site, vms)
        sweep_seeds(site.paths, {site.farm.machine_of(vm) for vm in vms})
    with contextlib.suppress(WrongState):  # the journal may have gone with its farm
        site.journal.settle(record.id, "recovered", job.action.text)
    site.reporter.warn(job.action.text, vm=record.vm)
    return job.action


def _discard_rest(site: Site, vms: Sequence[str]) -> None:
    """What the operation left over. Where that can't be removed now, the operation is recovered all the
    same: gc finds it again, and fails as long as it is there."""
    try:
        discard_of(list(map(site.member, vms)))
    except (Busy, Interrupted):
        raise
    except FarmhandError as error:
        text = f"something of it is left over, for ./invoke gc: {_whole(error)}"
        site.reporter.warn(text, vm=vms[0] if len(vms) == 1 else "")


def _whole(error: FarmhandError) -> str:
    return f"{error.message} ({error.remedy})" if error.remedy else error.message


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
    if record.verb in ("reset", "checkpoint"):
        return _several(site, record, what)
    if record.verb == "network-apply":
        from provision.network.undo import recover_apply

        text, run = recover_apply(site, record)
        return job(text, run)
    if record.verb in ("template-seal", "template-remove"):
        return job("what was left of it is removed", lambda: discard_unowned(site))
    if vm not in site.farm.vms:
        return job("noted" if not vm else "it is no longer declared; noted")
    if not site.member(vm).can_power:
        return job("noted; on an ssh host nothing is undone")
    machine = site.member(vm).look()
    if record.verb == "clone":
        if machine is not None:
            whole = (
                "the machine is as it was" if record.facts.get("again") else "the machine is complete"
            )
            return job(f"{whole}; clone-farm goes on from there")
        return job("undone, nothing of it stays", lambda: undo_clone(site, vm))
    if machine is None:
        return job("its machine is gone; noted")
    target = record.facts.get("target")
    if record.verb == "balloon" and is_on(machine) and isinstance(target, int):
        return job(f"set its memory to {format_size(target)}", lambda: finish_balloon(site, vm, target))
    if record.verb == "merge":
        return job("merge it to the end", lambda: _merge(site, record))
    return job("noted")


def _several(site: Site, record: Record, what: str) -> Job:
    """A reset or a checkpoint of one VM or more."""
    declared = [vm for vm in record.vms if vm in site.farm.vms and site.member(vm).can_power]
    machines = {vm: machine for vm in declared if (machine := site.member(vm).look())}
    vms, facts = list(machines), record.facts
    resets, name = record.verb == "reset", str(facts.get("to" if record.verb == "reset" else "name"))
    off = [vm for vm in vms if not is_on(machines[vm])]
    ran = [vm for vm in ran_before(site, facts) if vm in vms]

    def job(text: str, run: Callable[[], None] | None = None) -> Job:
        of = f" of {', '.join(record.vms)}" if len(record.vms) > 1 else ""
        text = f"{what.replace(record.verb, record.verb + of, 1)}: {text}"
        return Job(Action("recover", record.vm, text), run)

    def start_one(vm: str) -> None:
        try:
            run_again(site, vm, facts)
        except NoSpace as error:  # of memory: nothing is lost with that
            site.reporter.warn(f"stays stopped: {error.message}", vm=vm)

    def start(wanted: Sequence[str]) -> None:
        side_by_side(site, {vm: partial(start_one, vm) for vm in wanted})

    if not vms:
        return job("its machine is gone, or not ours to power; noted")
    if facts.get("warm") and not resets:
        return job("it is there or not, and complete; noted")
    if not facts.get("decided"):
        again = [vm for vm in ran if vm in off]
        text = "it had not begun, all disks are as they were"
        if "asked" in facts and ran:
            runs = f"{', '.join(ran)} {'run' if len(ran) > 1 else 'runs'}"
            return job(f"{text}; see that {runs} as before", lambda: start(ran))
        if not again:
            return job(text)
        return job(f"{text}; start {', '.join(again)} again", lambda: start(again))
    then = (vms if facts.get("start") else []) if resets else ran
    done = f"put back to {name}" if resets else f"keep as {name}"

    def redo() -> None:
        operation = current_operation()
        assert operation is not None, "recovered within its operation"
        operation.must_finish = True
        stop_all(site, vms, grace=0 if resets else GRACE)
        if resets:
            finish(site, operation, vms, partial(restore, name))
            proven(site, operation, vms, name)
        else:
            finish(site, operation, vms, partial(keep, name))
            operation.note(changed=True)
        start(then)

    if facts.get("changed"):
        wanted = [vm for vm in then if vm in off]
        if not wanted:
            return job("its disks are done; noted")
        half = [vm for vm in wanted if is_half_back(site.member(vm).store, site.member(vm).machine)]
        if half:
            return job(f"{done} once more and start {', '.join(then)}", redo)
        return job(f"start {', '.join(wanted)}", lambda: start(wanted))

    return job(done + (f" and start {', '.join(then)}" if then else ""), redo)


def _merge(site: Site, record: Record) -> None:
    merge_on(site, record.vm)
    as_before(site, record.facts)


def _cycle(site: Site, record: Record, what: str) -> Job:
    inflated = []
    for vm in (vm for vm in record.vms if vm in site.farm.vms):
        member = site.member(vm)
        machine = member.look() if member.can_power else None
        idle = member.declared.idle_memory
        if machine is not None and is_on(machine) and idle is not None and machine.current > idle:
            inflated.append(vm)

    def calm() -> None:
        for vm in inflated:
            deflate(site.member(vm))

    text = f"balloon down {', '.join(inflated)}" if inflated else "noted"
    return Job(Action("recover", "", f"{what}: {text}; log shows how far it came"), calm)


def _destroy(site: Site, record: Record, what: str) -> Job:
    if record.facts.get("whole"):
        purge = bool(record.facts.get("purge"))
        return Job(
            Action("recover", "", f"{what}: finish it, the whole farm goes"),
            lambda: finish_farm(site, purge=purge),
        )
    of = f" of {', '.join(record.vms)}" if len(record.vms) > 1 else ""
    text = f"{what.replace(record.verb, record.verb + of, 1)}: finish it"
    return Job(Action("recover", record.vm, text), lambda: erase(site, record.vms))


def _sweep(site: Site) -> None:
    """Temporary files of killed writers."""
    paths, lock_file = site.paths, site.allocator.lock_file
    for directory in (paths.root, paths.seeds, paths.keys, paths.keys / "hostkeys"):
        sweep(directory)
    sweep(lock_file.parent, lock_file.name)


def _locks(site: Site, record: Record) -> tuple[str, ...]:
    if record.facts.get("whole"):
        return tuple(map(lock_of, site.farm.vms))
    if record.verb == "network-apply":
        return ("network",)
    return tuple(map(lock_of, record.vms)) or ("recover",)
