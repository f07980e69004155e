"""A step of a cycle, carried out and judged: whatever goes wrong has its class."""

from __future__ import annotations

import asyncio

from builds.step_kind import StepKind
from builds.step_run import StepFailed, StepRun
from inventory.errors import ConnectionLost, FarmhandError
from inventory.sizes import format_duration


async def carry_out(step: StepKind, work: StepRun) -> None:
    """Carry the step out. StepFailed, with its class, for everything that can go wrong."""
    machines = work.machines
    try:
        await machines.look()
        async with asyncio.timeout(step.limit):
            await step.carry_out(work)
    except TimeoutError:
        raise StepFailed(
            "time-out",
            f"not done within its limit of {format_duration(step.timeout)}",
            console=machines.console(step.changes) if step.RENEWS else "",
        ) from None
    except FarmhandError as error:
        raise await _judged(step, work, error) from error


async def _judged(step: StepKind, work: StepRun, error: FarmhandError) -> StepFailed:
    """StepFailed for an error of ours, with its class. What a guest's scripts print is judged
    elsewhere."""
    failure = step.class_of(error)
    failed = StepFailed(failure, error.message, remedy=error.remedy)
    if failure != "infrastructure" or not step.vms:
        return failed
    vm = error.vm if error.vm in step.vms else step.first
    if isinstance(error, ConnectionLost):
        state = await asyncio.to_thread(work.machines.state, vm)
        failed.args = (f"{error.message} ({state})",) if state else failed.args
    failed.console = error.detail or work.machines.console(vm)
    return failed
