"""Shell scripts of a step, carried out in its VM and judged. What they get is in docs/cycle.md."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from builds.classify import classify
from builds.debugging import REMEMBER
from builds.step_run import StepFailed, StepRun
from inventory.sizes import format_duration, format_size
from provision.member import Member

if TYPE_CHECKING:
    from inventory.model import FailureClass
    from provision.guest.connection import Connection

VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "SOURCE_URL": "where git fetches the source from, during this step; empty without a source",
        "GIT_REVISION": "the commit to build",
        "BUILD_ID": "the build record's name",
        "FARM": "the farm's name",
        "LC_ALL": "C.UTF-8",
    }
)
"""What each script finds in its environment beside what its login has."""
SHELL: Final = "sh -eu"
DIRECTORY: Final = "the login's home"

_OFFLINE = (
    "name what it installs under 'packages:' of the farm's template and build that anew; give the "
    "cycle a 'package_cache'; or let the guests out: 'internet: yes' under 'network:'"
)


async def run_scripts(
    work: StepRun,
    vm: str,
    scripts: Sequence[str],
    *,
    timeout: float,
    root: bool = False,
    declared: FailureClass | None = None,
) -> Connection:
    """Run the scripts one after the other. ``timeout``: seconds for the whole step. ``declared``: the
    class of its failures, if the farm file has it. Returns the VM's connection. StepFailed if one of
    them fails."""
    machines = work.machines
    async with asyncio.timeout(max(timeout - work.seconds, 0)):
        connection = await machines.connection(vm)
        await machines.list_packages(vm)
        await work.before_run(vm, work.log)
        environment = {
            **work.environment(vm), **await machines.source(vm), **await machines.package_cache(vm)
        }  # fmt: skip
    for number, script in enumerate(scripts, 1):
        work.log.mark()
        with work.meter.guest():
            result = await connection.run(
                REMEMBER + script if work.remembers else script,
                env=environment,
                timeout=max(timeout - work.seconds, 0.001),
                log=work.log.write,
                most=work.log.room,
                root=root,
            )
        work.exit = result.status
        served = connection.git_said()
        for line in served:
            work.log.say(f"git says here, on this machine: {line}")
        if result.cut:
            raise _too_much(work, declared)
        if result.status:
            which = f"script {number} of {len(scripts)} " if len(scripts) > 1 else ""
            limit = timeout if result.timed_out else None
            raise _failed(work, vm, which, limit, served, declared)
    return connection


def _failed(
    work: StepRun,
    vm: str,
    which: str,
    limit: float | None,
    served: Sequence[str],
    declared: FailureClass | None,
) -> StepFailed:
    """``limit``: the one that was over; None: it ended by itself."""
    assert work.exit is not None
    alone = _has_no_network(work, vm)
    kind, evidence = classify(
        work.log.text(), status=work.exit, timed_out=limit is not None, declared=declared,
        offline=alone,
    )  # fmt: skip
    if limit is not None:
        message = f"not done within its limit of {format_duration(limit)}; ended there"
    elif evidence and kind == "network" and alone:
        message = f"the guest has no network: {evidence}"
    elif evidence:
        message = evidence
    else:
        message = f"{which}exited with {work.exit}"
    if served:
        message += f"; git says here, on this machine: {served[0]}"
    remedy = _OFFLINE if kind == "network" and alone else ""
    return StepFailed(kind, message, remedy=remedy, exit=work.exit)


def _has_no_network(work: StepRun, vm: str) -> bool:
    """Whether the farm file itself gives the VM none, and no packages in another way."""
    farm = work.site.farm
    closed = farm.network.mode == "user" and not farm.network.internet
    given = farm.repositories or (farm.cycle and farm.cycle.package_cache)
    return closed and not given and Member(work.site, vm).info.forwards


def _too_much(work: StepRun, declared: FailureClass | None) -> StepFailed:
    most = format_size(work.limits.log_size)
    work.log.say(f"cut here: this step's log may have {most} (limits: log_size)")
    return StepFailed(
        declared or "source",
        f"printed more than {most}; ended there",
        remedy=work.limits.remedy("log_size"),
        exit=work.exit,
    )
