"""Several VMs' disks changed as one: all of them, or none.

1. The VMs are stopped. Up to here nothing was changed: killed, or refused, those that ran are started
   again, and that was all. A guest that was asked to shut down goes on with it, whoever is killed: when
   it was asked is noted, and recovery waits for it.
2. The decision is noted in the journal.
3. Each store changes all its disks (``FarmDisks``: an error means that none is changed, and undoes step
   1 too). Killed from here on, recovery does this step again, to its end.

A farm on several stores takes them one after the other. There nobody can take the first one back when
the second fails: the activity then stays unfinished, the VMs stay stopped, and until a recovery got
the rest there too, none of them is started, cloned or reset (``runner.refuse_half_done``). A store that
does not implement ``FarmDisks`` is treated the same, disk by disk. Nor can anybody take back the way to
a warm checkpoint once it is begun (``WarmDisks``): then it stays unfinished, too.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from hypervisors.api import Disks, FarmDisks, WarmDisks
from inventory.errors import Call, FarmhandError, Interrupted, NoSpace, WrongState
from provision.engine.facts import Facts
from provision.engine.journal import Entry, Record
from provision.engine.operation import Recovery
from provision.engine.parallel import side_by_side
from provision.member import Member, is_on
from provision.power import power_on
from provision.site import Site
from provision.vm_activity import VmActivity

_LOOK = 0.5  # seconds between looks at a VM that goes down


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFacts(Facts):
    """``was_on``: the VMs that ran when it began. ``asked``: when guests were asked to shut down, who
    had ``grace`` seconds for it. ``decided``: step 3 was begun; ``changed``: it is done."""

    was_on: tuple[str, ...]
    asked: datetime | None = None
    grace: float = 0.0
    decided: bool = False
    changed: bool = False


F = TypeVar("F", bound=GroupFacts)


class GroupActivity(VmActivity[F]):
    """A change of several VMs' disks as one. Not decided yet, it is undone, and those that ran are
    started again; decided, it is done again, to its end."""

    starts = True

    def grace(self) -> float:
        """Seconds that each guest gets to shut down."""
        return 0.0

    @abstractmethod
    def change(self, facts: F, store: Disks, machines: Sequence[str]) -> None:
        """Of these machines' disks in their store, all or none of them, or an error; several only where
        the store does them as one. Safe to do again."""

    @abstractmethod
    def done(self, members: Sequence[Member], entry: Entry[F]) -> None:
        """After step 3, before any of them runs again: notes what is known, and ``changed``."""

    @abstractmethod
    def words(self, facts: F) -> str:
        """What is done to the disks: "put back to clean"."""

    @abstractmethod
    def then_on(self, facts: F, vms: Sequence[str]) -> Sequence[str]:
        """Those of the VMs that run afterwards."""

    def half_done(self, facts: F) -> bool:
        return facts.decided and not facts.changed

    # Doing it

    def carry_out(self, members: Sequence[Member], entry: Entry[F]) -> None:
        """See the module's head. Afterwards all are stopped and changed."""
        grace = self.grace()
        if grace > 0:
            entry.note(replace(entry.facts, asked=datetime.now(UTC), grace=grace))
        try:
            stop_all(members, grace=grace)
        except Interrupted:
            raise
        except FarmhandError:
            as_before(members, entry.facts.was_on)
            raise
        entry.note(replace(entry.facts, decided=True))
        self.finish(members, entry)

    def finish(self, members: Sequence[Member], entry: Entry[F]) -> None:
        """Step 3, and what comes right after it. Also for recovery, which must get to its end:
        ``must_finish``."""
        changed: list[str] = []
        for store, here in _groups(members):
            try:
                self.change(entry.facts, store, [member.machine for member in here])
            except Interrupted:
                raise
            except FarmhandError as error:
                if any(is_half_back(store, member.machine) for member in here):
                    entry.must_finish = True
                if entry.must_finish:
                    raise _halfway(error, changed, [member.vm for member in members]) from error
                entry.note(replace(entry.facts, decided=False))
                as_before(members, entry.facts.was_on)
                raise
            changed += [member.vm for member in here]
            entry.must_finish = True
        entry.must_finish = False
        self.done(members, entry)

    # After a kill

    def recover(self, site: Site, record: Record, facts: F) -> Recovery[F]:
        declared = [site.member(vm) for vm in record.vms if vm in site.farm.vms]
        found = [(one, machine) for one in declared if one.can_power and (machine := one.look())]
        if not found:
            return Recovery("its machine is gone, or not ours to power; noted")
        members = [member for member, _ in found]
        off = {member.vm for member, machine in found if not is_on(machine)}

        def start(vms: Sequence[str]) -> None:
            wanted = {one.vm: partial(_run_again, one, facts) for one in members if one.vm in vms}
            side_by_side(site, wanted)

        def redo(entry: Entry[F]) -> None:
            entry.must_finish = True
            stop_all(members, grace=self.grace())
            self.finish(members, entry)
            start(then)

        if not facts.decided:
            return self._not_begun(
                facts, [one.vm for one in members if one.vm in facts.was_on], off, start
            )
        then = self.then_on(facts, [member.vm for member in members])
        done = self.words(facts)
        if not facts.changed:
            return Recovery(done + (f" and start {', '.join(then)}" if then else ""), redo)
        wanted = [vm for vm in then if vm in off]
        if not wanted:
            return Recovery("its disks are done; noted")
        if any(one.vm in wanted and is_half_back(one.store, one.machine) for one in members):
            return Recovery(f"{done} once more and start {', '.join(then)}", redo)
        return Recovery(f"start {', '.join(wanted)}", lambda _: start(wanted))

    @staticmethod
    def _not_begun(
        facts: F, ran: Sequence[str], off: set[str], start: Callable[[Sequence[str]], None]
    ) -> Recovery[F]:
        again = [vm for vm in ran if vm in off]
        text = "it had not begun, all disks are as they were"
        if facts.asked and ran:
            runs = f"{', '.join(ran)} {'run' if len(ran) > 1 else 'runs'}"
            return Recovery(f"{text}; see that {runs} as before", lambda _: start(ran))
        if not again:
            return Recovery(text)
        return Recovery(f"{text}; start {', '.join(again)} again", lambda _: start(again))


def is_half_back(store: Disks, machine: str) -> bool:
    """Also where nobody can tell at the moment: then recovery looks again."""
    if not isinstance(store, WarmDisks):
        return False
    try:
        return bool(store.half_back(machine))
    except FarmhandError:
        return True


def as_before(members: Sequence[Member], was_on: Sequence[str]) -> None:
    """Start again those that ran. One that can't be is a warning: an error led here, and comes first."""
    for member in members:
        try:
            if member.vm in was_on and not is_on(member.look()):
                power_on(member, wait=False)
        except FarmhandError as error:
            text = f"could not be started again: {error.message}"
            member.site.reporter.warn(text, vm=member.vm)


def stop_all(members: Sequence[Member], *, grace: float) -> None:
    """Side by side; those that are stopped are left alone."""
    if members:
        stops = {one.vm: partial(one.driver.stop, one.machine, grace=grace) for one in members}
        side_by_side(members[0].site, stops)


def _groups(members: Sequence[Member]) -> Iterator[tuple[Disks, list[Member]]]:
    """What can be changed as one."""
    for host in dict.fromkeys(member.host for member in members):
        here = [member for member in members if member.host == host]
        store = here[0].store
        if isinstance(store, FarmDisks):
            yield store, here
        else:
            yield from ((store, [member]) for member in here)


def _run_again(member: Member, facts: GroupFacts) -> None:
    """Start one that ran before. Where it may have been asked to shut down and not have got there yet,
    that is waited for; if it doesn't listen, it runs on, and that is as before, too. For want of
    memory it stays stopped: nothing is lost with that."""
    end, reporter = time.monotonic() + _left(facts), member.site.reporter
    if is_on(member.look()) and time.monotonic() < end:
        text = "it was asked to shut down: when it has, it is started again"
        reporter.working(text, vm=member.vm)
    while is_on(member.look()):
        if time.monotonic() > end:
            return
        time.sleep(_LOOK)
    try:
        power_on(member, wait=False)
    except NoSpace as error:
        reporter.warn(f"stays stopped: {error.message}", vm=member.vm)


def _left(facts: GroupFacts) -> float:
    """Seconds that are left of those which the guests were given to shut down; a clock that was set
    back makes them no more."""
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
