"""cp into a VM: a file or a directory of this machine, complete or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hypervisors.api import Machine
from inventory.sizes import rounded
from provision.engine.facts import Facts
from provision.engine.operation import Operation, Recovery
from provision.engine.plan import Plan, alone, job
from provision.engine.run import Run
from provision.guest.connection import Connection
from provision.guest.copying import CopiedTree, check_source, copy_in
from provision.guest.ssh_connection import in_thread
from provision.member import Member
from provision.power import bring_to_present, require_answer
from provision.site import Site
from provision.vm_activity import OneVmActivity


@dataclass(frozen=True, slots=True)
class CopyInFacts(Facts):
    """``source``: here. ``target``: as it was asked for, in the VM."""

    source: str
    target: str


class _CopyInActivity(OneVmActivity[CopyInFacts]):
    name = "cp"
    facts = CopyInFacts

    def go_on(self, _member: Member, _machine: Machine, facts: CopyInFacts) -> Recovery[CopyInFacts]:
        """Nobody looks into the guest for it, which may be off, or another one by now."""
        what = facts.target or "its login's home"
        return Recovery(f"noted; {what} has it as a whole or not at all, and .*.part beside is of it")


COPY_IN = _CopyInActivity()


@dataclass(frozen=True, slots=True)
class CopyInResult:
    """None: it is only planned."""

    copied: CopiedTree | None = None


@dataclass(frozen=True, slots=True)
class CopyIn(Operation[CopyInResult]):
    """Copy ``source`` to ``target`` in a VM that runs, as ``copy_in`` has it.

    Errors: NotFound, Conflict, WrongState (the VM is off, or the source can't be read), TimedOut (its
    ssh is silent), Unfit, Unsupported (no tar there), DriverFailed, Busy."""

    name = "cp"
    vm: str
    source: Path
    target: str

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms([self.vm])

    def plan(self, run: Run) -> Plan[CopyInResult]:
        member = Member(run.site, self.vm)
        check_source(self.source)
        require_answer(member)
        done: list[CopiedTree] = []
        text = f"{self.source} to {self.target or 'the home of its login'}"
        copy = job("copy", self.vm, text, partial(self._copy, member, done))
        return Plan([alone(copy)], lambda: CopyInResult(*done))

    def _copy(self, member: Member, done: list[CopiedTree]) -> None:
        done.append(asyncio.run(self._copied(member)))

    async def _copied(self, member: Member) -> CopiedTree:
        facts = CopyInFacts(str(self.source), self.target)
        async with reached(member) as connection:
            with member.site.journal.begin(COPY_IN, [self.vm], facts) as entry:
                entry.step(f"copy {self.source} into it")
                return await copy_in(connection, self.source, self.target, partial(told, member))


@contextlib.asynccontextmanager
async def reached(member: Member) -> AsyncIterator[Connection]:
    """A connection to a VM that answers, and that knows what time it is. Errors: as ``require_answer``,
    ``bring_to_present`` and ``Connection.open``."""
    endpoint = await in_thread(member.endpoint)
    await in_thread(partial(require_answer, member))
    await in_thread(partial(bring_to_present, member))
    async with await Connection.open(endpoint, runner=member.site.runner) as connection:
        yield connection


def told(member: Member, size: int) -> None:
    """Say how much is copied by now."""
    member.site.reporter.working(f"copying; {rounded(size)}", vm=member.vm)
