"""Several VMs' disks changed as one: all of them, or none.

1. The VMs are stopped. Nothing is changed yet: killed or refused here, those that ran are started
   again, and that is all. A guest that was asked to shut down goes on with it even if we are killed. So
   the journal notes when it was asked, and recovery waits for it.
2. The decision is noted in the journal.
3. Each store changes all its disks (``FarmDisks``). An error means that none is changed, and step 1 is
   undone, too. Killed from here on, recovery does this step again, to its end.

A farm on several stores changes one store after the other, and disks that go back to different
checkpoints are changed one checkpoint after the other. If the second fails, the first can't be taken
back. Then the activity stays unfinished and the VMs stay stopped. None of them is started, cloned or
reset (``runner.refuse_half_done``) until a recovery has changed the rest, too. A store without
``FarmDisks`` is treated the same way, disk by disk. So is the way back to a warm checkpoint
(``WarmDisks``), which can't be taken back once it is begun."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from hypervisors.api import Disks, FarmDisks, Machine, WarmDisks
from inventory.errors import Call, FarmhandError, Interrupted, NoSpace, WrongState
from provision.engine.facts import Facts
from provision.engine.journal import Entry, current_step
from provision.engine.operation import Recovery
from provision.engine.parallel import side_by_side
from provision.engine.record import Record
from provision.member import Member, is_half_started, is_on, runs_unnoted, settle
from provision.power import power_on
from provision.site import Site
from provision.vm_activity import VmActivity

_LOOK = 0.5  # seconds between looks at a VM that goes down


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFacts(Facts):
    """``was_on``: the VMs that ran at the beginning. ``asked``: when guests were asked to shut down;
    ``grace``: the seconds they had for it. ``decided``: step 3 was begun. ``changed``: it is done."""

    was_on: tuple[str, ...]
    asked: datetime | None = None
    grace: float = 0.0
    decided: bool = False
    changed: bool = False


F = TypeVar("F", bound=GroupFacts)


class GroupActivity(VmActivity[F]):
    """A change of several VMs' disks as one. Recovery undoes it if it was not decided yet, and starts
    again those that ran. Once decided, recovery does it again, to its end."""

    starts = True

    def grace(self) -> float:
        """Seconds that each guest gets to shut down."""
        return 0.0

    @abstractmethod
    def change(self, facts: F, store: Disks, members: Sequence[Member]) -> None:
        """Change these VMs' disks in their store: all of them, or raise an error and change none. It
        gets several only if the store changes them as one. Safe to do again."""

    def alike(self, _facts: F, _vm: str) -> str:
        """A store changes those VMs as one for which this is the same."""
        return ""

    def boots(self, _facts: F, _vm: str) -> bool:
        """Whether a VM that runs afterwards boots, whatever memory is kept for its disk."""
        return False

    @abstractmethod
    def done(self, members: Sequence[Member], entry: Entry[F]) -> None:
        """Called after step 3, before any VM runs again. It notes what is known, and ``changed``."""

    @abstractmethod
    def words(self, facts: F) -> str:
        """What is done to the disks, in words, such as "put back to clean"."""

    @abstractmethod
    def then_on(self, facts: F, vms: Sequence[str]) -> Sequence[str]:
        """Those of the VMs that run afterwards."""

    def half_done(self, facts: F) -> bool:
        return facts.decided and not facts.changed

    # Doing it

    def carry_out(self, members: Sequence[Member], entry: Entry[F]) -> None:
        """Steps 1 to 3, see the module's docstring. Afterwards all VMs are stopped and changed. Left by
        an error, it is unfinished unless all is as it was."""
        entry.must_finish = True
        grace = self.grace()
        if grace > 0:
            entry.note(replace(entry.facts, asked=datetime.now(UTC), grace=grace))
        try:
            stop_all(members, grace=grace)
            entry.note(replace(entry.facts, decided=True))
        except Interrupted:
            raise
        except FarmhandError:
            entry.must_finish = not as_before(members, entry.facts.was_on, entry.facts)
            raise
        self.finish(members, entry)

    def finish(self, members: Sequence[Member], entry: Entry[F], *, forward: bool = False) -> None:
        """Step 3 and what comes right after it. ``forward``: it must get to its end, as in a
        recovery."""
        changed: list[str] = []
        for store, here in self._groups(entry.facts, members):
            try:
                self.change(entry.facts, store, here)
            except Interrupted:
                raise
            except FarmhandError as error:
                if forward or changed or any(is_half_back(store, member.machine) for member in here):
                    raise _halfway(error, changed, [member.vm for member in members]) from error
                entry.note(replace(entry.facts, decided=False))
                entry.must_finish = not as_before(members, entry.facts.was_on, entry.facts)
                raise
            changed += [member.vm for member in here]
        self.done(members, entry)
        entry.must_finish = False

    def _groups(self, facts: F, members: Sequence[Member]) -> Iterator[tuple[Disks, list[Member]]]:
        """The VMs that can be changed as one, in groups."""
        for host, how in dict.fromkeys((one.host, self.alike(facts, one.vm)) for one in members):
            here = [one for one in members if (one.host, self.alike(facts, one.vm)) == (host, how)]
            store = here[0].store
            if isinstance(store, FarmDisks):
                yield store, here
            else:
                yield from ((store, [member]) for member in here)

    # After a kill

    def recover(self, site: Site, record: Record, facts: F) -> Recovery[F]:
        self.check_names(site, record, facts)
        declared = [Member(site, vm) for vm in record.vms if vm in site.farm.vms]
        found = [(one, machine) for one in declared if one.can_power and (machine := one.look())]
        if not found:
            return Recovery("its machine is gone, or not ours to power; noted")
        members = [member for member, _ in found]
        standing = [member for member, machine in found if is_half_started(member, machine)]
        unnoted = [member for member, machine in found if runs_unnoted(machine)]
        cut_off = (*standing, *unnoted)
        off = {one.vm for one, machine in found if one in standing or not is_on(machine)}

        def start(vms: Sequence[str]) -> None:
            settle(*cut_off)
            wanted = [one for one in members if one.vm in vms]
            boots = {one.vm: facts.decided and self.boots(facts, one.vm) for one in wanted}
            side_by_side(
                site, {one.vm: partial(run_again, one, facts, cold=boots[one.vm]) for one in wanted}
            )

        def redo(entry: Entry[F]) -> None:
            settle(*cut_off)
            stop_all(members, grace=self.grace())
            self.finish(members, entry, forward=True)
            start(then)

        # A server that goes down amid a call may have begun it, though it was seen not to have.
        half = {one.vm for one in members if is_half_back(one.store, one.machine)}
        if not (facts.decided or half):
            ran = [one.vm for one in members if one.vm in facts.was_on]
            return self._not_begun(facts, ran, off, start, settles=bool(cut_off))
        then = self.then_on(facts, [member.vm for member in members])
        done = self.words(facts)
        if not facts.changed:
            return Recovery(done + (f" and start {', '.join(then)}" if then else ""), redo)
        wanted = [vm for vm in then if vm in off]
        if not wanted:
            return Recovery("its disks are done; noted", lambda _: start(()))
        if half.intersection(wanted):
            return Recovery(f"{done} once more and start {', '.join(then)}", redo)
        return Recovery(f"start {', '.join(wanted)}", lambda _: start(wanted))

    @staticmethod
    def _not_begun(
        facts: F,
        ran: Sequence[str],
        off: set[str],
        start: Callable[[Sequence[str]], None],
        *,
        settles: bool,
    ) -> Recovery[F]:
        again = [vm for vm in ran if vm in off]
        text = "it had not begun, all disks are as they were"
        if facts.asked and ran:
            runs = f"{', '.join(ran)} {'run' if len(ran) > 1 else 'runs'}"
            return Recovery(f"{text}; see that {runs} as before", lambda _: start(ran))
        if not again:
            return Recovery(text, (lambda _: start(())) if settles else None)
        return Recovery(f"{text}; start {', '.join(again)} again", lambda _: start(again))


def is_half_back(store: Disks, machine: str) -> bool:
    """Whether a VM is on an interrupted way to a warm checkpoint. True as well if nobody can tell now:
    recovery looks again."""
    if not isinstance(store, WarmDisks):
        return False
    try:
        return bool(store.half_back(machine))
    except FarmhandError:
        return True


def as_before(members: Sequence[Member], was_on: Sequence[str], asked: GroupFacts | None = None) -> bool:
    """Start again the VMs that ran. ``asked``: they may still be shutting down, see ``run_again``. One
    that can't be started is a warning, for the error that led here comes first; then it is False."""
    whole = True
    for member in members:
        try:
            if member.vm not in was_on:
                continue
            if asked is not None and asked.asked is not None:
                run_again(member, asked, cold=False)
            elif not is_on(member.look()):
                power_on(member, wait=False)
        except Interrupted:
            raise
        except FarmhandError as error:
            text = f"could not be started again: {error.message}"
            member.site.reporter.warn(text, vm=member.vm)
            whole = False
    return whole


def on_or_off_as_before(member: Member, facts: GroupFacts, *, grace: float) -> None:
    """Start it if it ran, shut it down if it was off; amid a warm checkpoint it is settled before.
    ``grace``: see ``Hypervisor.stop``."""
    settle(member)
    was_on, on = member.vm in facts.was_on, is_on(member.look())
    if was_on and not on:
        run_again(member, facts, cold=False)
    elif on and not was_on:
        current_step("shut it down again")
        member.driver.stop(member.machine, grace=grace)


def then_on_or_off(machine: Machine, was_on: Sequence[str]) -> str:
    """What that is, in words, to be added to others."""
    if is_on(machine) == bool(was_on):
        return ""
    return "; start it again" if was_on else "; shut it down again"


def stop_all(members: Sequence[Member], *, grace: float) -> None:
    """Stop the VMs side by side. Stopped ones are left alone."""
    if members:
        stops = {one.vm: partial(one.driver.stop, one.machine, grace=grace) for one in members}
        side_by_side(members[0].site, stops)


def run_again(member: Member, facts: GroupFacts, *, cold: bool) -> None:
    """Start a VM that ran before. If it may still be shutting down, because it was asked to, that is
    waited for. If it doesn't listen, it runs on, which is as before, too. For want of memory it stays
    stopped; nothing is lost with that."""
    end, reporter = time.monotonic() + _left(facts), member.site.reporter
    if is_on(member.look()) and time.monotonic() < end:
        text = "it was asked to shut down: when it has, it is started again"
        reporter.working(text, vm=member.vm)
    while is_on(member.look()):
        if time.monotonic() > end:
            return
        time.sleep(_LOOK)
    try:
        power_on(member, wait=False, cold=cold)
    except NoSpace as error:
        reporter.warn(f"stays stopped: {error.message}", vm=member.vm)


def _left(facts: GroupFacts) -> float:
    """Seconds left of those that the guests had to shut down. A clock that was set back does not add to
    them."""
    if facts.asked is None:
        return 0.0
    gone = datetime.now(UTC) - facts.asked
    return max(0.0, min(facts.grace, facts.grace - gone.total_seconds()))


def _halfway(error: FarmhandError, changed: Sequence[str], vms: Sequence[str]) -> WrongState:
    rest = ", ".join(vm for vm in vms if vm not in changed)
    if changed:
        state = f"{', '.join(changed)} is done, {rest} not yet"
    else:
        state = f"some of {rest} may be done, others not yet"
    first = (error.remedy, "; then ") if error.remedy else ""
    return WrongState(
        f"{error.message}; {state}: all stay stopped until they are at one",
        remedy=(first, Call("recover"), " takes the rest there"),
        detail=error.detail,
    )
