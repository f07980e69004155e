"""A VM changed in a way that its answer confirms; without one it is rolled back.

1. The VM is shut down, and its present state kept as a checkpoint.
2. It is noted that its disk may be another one from here on. The VM is changed, and started.
3. Its ssh answers: that is noted. What was kept for the way back is removed, and a VM that was off is
   shut down again.

If anything fails before that answer, or the command is killed, the VM goes back to the state of step 1:
old or new, never between."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from hypervisors.api import Machine
from inventory.errors import FarmhandError, Interrupted
from provision.engine.journal import Entry
from provision.engine.operation import Recovery
from provision.member import Member
from provision.operations import checkpoint
from provision.operations.group_change import (
    GroupFacts,
    as_before,
    on_or_off_as_before,
    run_again,
    then_on_or_off,
)
from provision.power import power_on
from provision.vm_activity import OneVmActivity


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmedFacts(GroupFacts):
    """``kept``: the checkpoint of the state before. ``decided``: from here on its disk may be another
    one; no more so once it went back. ``changed``: it answered. ``finished``: what was kept for the way
    back is removed. ``at_rest``: after that answer it was seen to be on or off as before; what it is
    later is its user's doing."""

    kept: str
    finished: bool = False
    at_rest: bool = False


F = TypeVar("F", bound=ConfirmedFacts)


class ConfirmedActivity(OneVmActivity[F]):
    """The change of one VM, see the module's docstring. Recovery finishes it if the VM had answered,
    else takes it back."""

    starts = True

    @abstractmethod
    def finish(self, member: Member, facts: F) -> None:
        """Once it answered: remove what was kept for the way back. Safe to do again."""

    @abstractmethod
    def roll_back(self, member: Member, facts: F) -> None:
        """The stopped VM's disk, and all that was changed with it, as they were in step 1. Safe to do
        again."""

    @abstractmethod
    def rolled_back(self, facts: F) -> str:
        """What it is then, in words."""

    @abstractmethod
    def finish_words(self, facts: F) -> str:
        """What recovery does once it answered, such as "it is on base@2; remove ..."."""

    @abstractmethod
    def roll_back_words(self, facts: F) -> str:
        """What recovery does where it did not, such as "go back to base@1"."""

    @abstractmethod
    def failure(self, facts: F) -> str:
        """What failed, such as "base@2 failed"."""

    def recovered(self, _member: Member, _facts: F) -> None:
        """Called where recovery finished it: what is left for somebody to do can be told here."""

    def half_done(self, facts: F) -> bool:
        return facts.decided and not facts.changed

    def go_on(self, member: Member, machine: Machine, facts: F) -> Recovery[F]:
        if facts.changed:
            text = "it is done" if facts.finished else self.finish_words(facts)
            text += "" if facts.at_rest else then_on_or_off(machine, facts.was_on)
            return Recovery(text, lambda entry: self._finish_later(member, entry))
        runs = " and start it again" if facts.was_on else ""
        if facts.decided:
            text = self.roll_back_words(facts) + runs
            return Recovery(text, lambda entry: self._go_back_later(member, entry))
        if not facts.was_on:
            return Recovery("its disk is as it was")
        text = "its disk is as it was; see that it runs as before"
        return Recovery(text, lambda _: run_again(member, facts, cold=False))

    # Doing it

    def carry_out(
        self,
        member: Member,
        entry: Entry[F],
        change: Callable[[F], F],
        *,
        wait: bool = True,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Steps 1 to 3. ``change`` changes the stopped VM and leaves it stopped; it returns the facts
        with what is known then. Without ``wait`` the start is taken for the answer. ``then``: done once
        it answered and what was kept is removed. One that was off is shut down after that, also where it
        fails. Errors of all these. Until it answered, the VM is as it was then, or the entry unfinished;
        later it is so only for what is left to remove."""
        vm = member.vm
        entry.must_finish = True
        self._keep(member, entry)
        try:
            changed = change(entry.facts)
            power_on(member, wait=wait)
        except Interrupted:
            raise
        except FarmhandError as error:
            why = error.message.removeprefix(f"{vm}: ")
            member.site.reporter.warn(f"{self.failure(entry.facts)}: {why}; it goes back", vm=vm)
            self._go_back(member, entry)
            entry.must_finish = not as_before([member], entry.facts.was_on)
            raise
        entry.note(replace(changed, changed=True))
        try:
            self._finish(member, entry)
            if then is not None:
                then()
        except Interrupted:
            raise
        except FarmhandError:
            with contextlib.suppress(FarmhandError):  # recovery does it, then
                self._off_again(member, entry)
                entry.note(replace(entry.facts, at_rest=True))
                entry.must_finish = not entry.facts.finished
            raise
        self._off_again(member, entry)
        entry.must_finish = False

    @staticmethod
    def _keep(member: Member, entry: Entry[F]) -> None:
        """Step 1, and the decision, without which it isn't left."""
        if entry.facts.was_on:
            entry.note(replace(entry.facts, asked=datetime.now(UTC), grace=checkpoint.GRACE))
        facts = entry.facts
        try:
            entry.step("shut it down")
            member.driver.stop(member.machine, grace=checkpoint.GRACE)
            entry.step(f"keep its state as {facts.kept}")
            member.store.checkpoint(member.machine, facts.kept)
            entry.note(replace(facts, decided=True))
        except Interrupted:
            raise
        except FarmhandError:
            entry.must_finish = not as_before([member], facts.was_on, facts)
            raise

    def _go_back(self, member: Member, entry: Entry[F]) -> None:
        """To the state of step 1, stopped. Safe to do again."""
        member.driver.stop(member.machine, grace=0)
        self.roll_back(member, entry.facts)
        entry.note(replace(entry.facts, decided=False))  # it may be used from here on
        member.site.reporter.say(self.rolled_back(entry.facts), vm=member.vm)

    def _go_back_later(self, member: Member, entry: Entry[F]) -> None:
        """By recovery."""
        self._go_back(member, entry)
        if entry.facts.was_on:
            run_again(member, entry.facts, cold=False)

    def _finish(self, member: Member, entry: Entry[F]) -> None:
        self.finish(member, entry.facts)
        entry.note(replace(entry.facts, finished=True))

    @staticmethod
    def _off_again(member: Member, entry: Entry[F]) -> None:
        """If it was off."""
        if not entry.facts.was_on:
            entry.step("shut it down again")
            member.driver.stop(member.machine, grace=checkpoint.GRACE)

    def _finish_later(self, member: Member, entry: Entry[F]) -> None:
        """By recovery. What can't be removed now keeps no VM on that was off."""
        if not entry.facts.at_rest:
            on_or_off_as_before(member, entry.facts, grace=checkpoint.GRACE)
            entry.note(replace(entry.facts, at_rest=True))
        if not entry.facts.finished:
            self._finish(member, entry)
        self.recovered(member, entry.facts)
