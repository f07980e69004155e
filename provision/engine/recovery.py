"""What killed processes left half-done: finished or undone, by the journal and by what is there.

Each activity is recovered under its own locks, as its class says (``Activity.recover``). It stays
unfinished until its recovery is complete, so a recovery that is killed is done again by the next.

A recovery that fails holds up no other one: the others go on, then its error is noted and told. Each
command tries it again. Commands for its VMs, ``recover`` and ``status`` tell the error each time; others
only if it is another one than before."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from host.files import sweep
from inventory.errors import Busy, Call, FarmhandError, Interrupted, Text, WrongState, spelled
from provision.engine import registry
from provision.engine.operation import Recovery
from provision.engine.report import Action

if TYPE_CHECKING:
    from provision.engine.record import Record
    from provision.site import Site


def recover_all(site: Site, vms: Sequence[str] = ()) -> tuple[Action, ...]:
    """Recover all that is unfinished, except what others hold a lock on. Returns what was done (in a
    plan: what would be). ``vms``: those of the command that asks. Errors become warnings."""
    actions: list[Action] = []
    for record in site.journal.unfinished():
        try:
            recovery = foresee(site, record) if site.plan else recover(site, record)
            if recovery is not None:
                actions.append(told(record, recovery))
        except Busy as error:
            site.reporter.warn(f"not recovered now: {error.message}", vm=record.vm)
        except Interrupted:
            raise
        except FarmhandError as error:
            # who is refused for it is told why there
            concerned = set(vms) & set(record.vms) and not unusable(site, record, vms)
            if concerned or whole(error) != record.in_its_way:
                text = (f"could not recover its {record.verb}: ", whole(error))
                site.reporter.warn(text, vm=record.vm)
    if actions and not site.plan:
        sweep_temporary(site)
    return tuple(actions)


def whole(error: FarmhandError) -> Text:
    return (error.message, " (", error.remedy, ")") if error.remedy else error.message


def half_done(record: Record) -> bool:
    """Whether the disks of its VMs must not be used until it is recovered. True as well for a record
    that nobody here can read."""
    try:
        activity = registry.activity(record.verb)
        return activity.half_done(activity.facts_of(record))
    except WrongState:
        return True


def leaves_as_it_was(record: Record) -> bool:
    """As its activity says. False for a record that nobody here can read."""
    try:
        activity = registry.activity(record.verb)
        activity.facts_of(record)
    except WrongState:
        return False
    return activity.leaves_as_it_was


def made_anew(record: Record, vm: str, clean: str) -> bool:
    """As its activity says. False for a record that nobody here can read."""
    try:
        activity = registry.activity(record.verb)
        return activity.made_anew(activity.facts_of(record), vm, clean)
    except WrongState:
        return False


def unusable(site: Site, record: Record, vms: Collection[str]) -> list[str]:
    """Those of ``vms`` that can't be used before it is recovered: of a half-done change; and one that
    the farm file names no more, which may be called something else by now."""
    try:
        activity = registry.activity(record.verb)
        concerned = activity.concerns(site, record, activity.facts_of(record))
    except WrongState:
        concerned = record.vms
    asked = [vm for vm in concerned if vm in vms]
    return asked if asked and half_done(record) else [vm for vm in asked if vm not in site.farm.vms]


def half_done_vms(site: Site) -> dict[str, str]:
    """The VMs whose disks must not be used until an activity is recovered; each with its verb."""
    return {vm: one.verb for one in site.journal.unfinished() if half_done(one) for vm in one.vms}


def without_disk(record: Record) -> str:
    """Why its VM may have no disk; "" if it has one."""
    try:
        return registry.activity(record.verb).without_disk
    except WrongState:
        return ""


def build_of(record: Record) -> str:
    """The id of the build that it was; "" for a record that nobody here can read."""
    try:
        activity = registry.activity(record.verb)
        return activity.build_of(activity.facts_of(record))
    except WrongState:
        return ""


def giving(site: Site, record: Record, vm: str) -> int:
    """Bytes of memory that the VM may still be getting from an activity that was cut off. For a record
    that nobody here can read: all that the VM may have."""
    try:
        activity = registry.activity(record.verb)
        return activity.giving(site, vm, activity.facts_of(record))
    except WrongState:
        return site.farm.vms[vm].memory


def foresee(site: Site, record: Record) -> Recovery[Any]:
    """How it would be recovered now, found by real reads. WrongState if this farmhand can't read the
    record."""
    activity = registry.activity(record.verb)
    with _unforeseen(record):
        return activity.recover(site, record, activity.facts_of(record))


@contextlib.contextmanager
def _unforeseen(record: Record) -> Iterator[None]:
    """What nobody foresaw becomes a WrongState: it holds up no other recovery, either."""
    try:
        yield
    except FarmhandError:
        raise
    except Exception as error:
        raise WrongState(
            f"the recovery of its {record.verb} met {type(error).__name__}: {error}",
            remedy=("if that is its host's trouble, see to it, then ", Call("recover"),
                    "; else it is a defect in farmhand"),
        ) from error  # fmt: skip


def can_be_foreseen(site: Site, record: Record) -> bool:
    """Whether nothing that can be seen now is in its recovery's way."""
    try:
        foresee(site, record)
    except Interrupted:
        raise
    except FarmhandError:
        return False
    return True


def recover(site: Site, record: Record) -> Recovery[Any] | None:
    """Recover it, under its activity's locks, and say so. Returns how; None: somebody else did
    meanwhile. Busy if another operation holds one of the locks; other errors are noted in the
    journal."""
    activity = registry.activity(record.verb)
    locks = activity.locks(site, record, activity.facts_of(record))
    with site.locks.hold(*locks, doing=f"recover {record.verb} {record.vm}".strip()):
        now = site.journal.find(record.id)
        if now is None or now.settled:  # before we had the locks
            return None
        with _noted(site, now):
            facts = activity.facts_of(now)
            with _unforeseen(now), site.journal.resume(now, facts) as entry:
                recovery = activity.recover(site, now, facts)
                if recovery.run is not None:
                    recovery.run(entry)
                activity.after(site, now)
        text = told(now, recovery).text
        with contextlib.suppress(WrongState):  # the journal may have gone with its farm
            build = activity.build_of(facts)
            site.journal.settle(now.id, "recovered", spelled(text), build=build)
        site.reporter.warn(text, vm=now.vm)
        return recovery


@contextlib.contextmanager
def _noted(site: Site, record: Record) -> Iterator[None]:
    """Note in the journal an error of its recovery."""
    try:
        yield
    except (Busy, Interrupted):
        raise
    except FarmhandError as error:
        if record.in_its_way != whole(error):
            with contextlib.suppress(FarmhandError):  # then it is told once more
                site.journal.hinder(record.id, whole(error))
        raise


def told(record: Record, recovery: Recovery[Any]) -> Action:
    return Action("recover", record.vm, f"{cut_off(record)}: {recovery.text}")


def cut_off(record: Record) -> str:
    """What was cut off, in words."""
    began = record.started.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    of = f" of {', '.join(record.vms)}" if len(record.vms) > 1 else ""
    return f"a {record.verb}{of} of {began} (pid {record.process.pid}) was interrupted"


def sweep_temporary(site: Site) -> None:
    """Remove temporary files of writers that were killed."""
    paths, lock_file = site.paths, site.allocator.lock_file
    for directory in (paths.root, paths.seeds, paths.keys, paths.keys / "hostkeys"):
        sweep(directory)
    sweep(lock_file.parent, lock_file.name)
