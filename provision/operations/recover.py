"""recover: what killed commands left, finished or undone at once; see engine/recovery.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from inventory.errors import Busy, FarmhandError, Interrupted, Several
from provision.engine.operation import Operation, Recovery
from provision.engine.plan import Job, Plan, alone, job
from provision.engine.record import Record
from provision.engine.recovery import cut_off, foresee, recover, sweep_temporary, told, whole
from provision.engine.report import Action
from provision.engine.run import Run
from provision.operations.destroy import DESTROY, last_of
from provision.site import Site


@dataclass(frozen=True, slots=True)
class RecoveredActivity:
    """An activity that was cut off. ``id``: of its entry in the journal. ``verb``: its name there.
    ``how``: what finished or undid it, in words."""

    id: int
    verb: str
    vms: tuple[str, ...]
    how: str


@dataclass(frozen=True, slots=True)
class RecoverResult:
    """``activities``: those recovered (in a plan: that would be), oldest first."""

    activities: tuple[RecoveredActivity, ...] = ()


@dataclass(frozen=True, slots=True)
class Recover(Operation[RecoverResult]):
    """Finish or undo all that killed commands left. Every operation does so first, and warns of errors.
    Here, where it is all that was asked for, errors are raised, at the end.

    Each recovery holds its activity's locks, none is held all through. What another operation has a lock
    of is left alone.

    Errors: those of the recoveries; Several, if several failed."""

    name = "recover"
    at_any_time = True
    recovers_first = False

    def plan(self, run: Run) -> Plan[RecoverResult]:
        left = run.site.journal.unfinished()
        if not left:
            return Plan([alone(job("keep", "", "nothing was left unfinished"))], RecoverResult)
        recovering = _Recovering(run.site)
        jobs = [recovering.job(record) for record in left]
        return Plan([alone(*jobs, Job((), recovering.end))], recovering.result)


class _Recovering:
    """Recovers one activity after the other. Errors are told at the end."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._foreseen: list[RecoveredActivity] = []
        self._done: list[RecoveredActivity] = []
        self._failed: dict[str, FarmhandError] = {}
        self._razed = False

    def job(self, record: Record) -> Job:
        """What can't be planned is tried all the same: those before it may make it possible."""
        run = partial(self._recover, record)
        try:
            recovery = foresee(self._site, record)
        except Interrupted:
            raise
        except FarmhandError as error:
            text = (f"{cut_off(record)}: it can't be recovered as it is: ", whole(error))
            return Job((Action("note", record.vm, text),), run)
        self._foreseen.append(_recovered(record, recovery))
        return Job((told(record, recovery),), run)

    def _recover(self, record: Record) -> Sequence[Action]:
        """What it did: others may have changed something since the plan."""
        try:
            recovery = recover(self._site, record)
        except Busy as error:
            text = f"not recovered now: {error.message}"
            self._site.reporter.warn(text, vm=record.vm)
            return [Action("note", record.vm, text)]
        except Interrupted:
            raise
        except FarmhandError as error:
            self._failed.setdefault(", ".join(record.vms) or record.verb, error)
            return []
        if recovery is None:
            return []
        self._done.append(_recovered(record, recovery))
        if recovery.run is not None and record.verb == DESTROY.name:  # else it had not begun
            self._razed |= DESTROY.facts_of(record).whole
        return [told(record, recovery)]

    def end(self) -> None:
        if self._done:
            sweep_temporary(self._site)
        if self._failed:
            errors = list(self._failed.values())
            raise errors[0] if len(errors) == 1 else Several(self._failed)
        if self._razed:
            last_of(self._site)

    def result(self) -> RecoverResult:
        return RecoverResult(tuple(self._foreseen if self._site.plan else self._done))


def _recovered(record: Record, recovery: Recovery[Any]) -> RecoveredActivity:
    return RecoveredActivity(record.id, record.verb, record.vms, recovery.text)
