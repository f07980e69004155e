"""A step that failed, looked into before the build goes on: a shell in its VM, in the directory where
its script stood, with the script's environment.

The script leaves both in a file in the login's home, as sh(1) can read it back (``export -p``). A script
that was killed, or that has an EXIT trap of its own, leaves none: then it is the home, and the
environment that the script was given."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inventory.errors import FarmhandError
from provision.member import Member

if TYPE_CHECKING:
    from builds.step_kind import StepKind
    from builds.step_run import StepFailed, StepRun

_FILE = '"$HOME/.farmhand-failed"'
_KEEP = f"(umask 077; export PWD; export -p >{_FILE}) || :"
REMEMBER = f"rm -f {_FILE}; trap '[ $? -eq 0 ] || {_KEEP}' EXIT\n"
"""What a script begins with that is to leave its directory and environment if it fails."""
_KEEP_GIVEN = f"[ -s {_FILE} ] || {_KEEP}"
# The terminal is the shell's own, and not that of the script, which had none.
_ENTER = f't=${{TERM:-dumb}}; . {_FILE}; TERM=$t; cd -- "$PWD"; exec "${{SHELL:-/bin/sh}}"'
_ENTER_AS_ROOT = f'exec sudo -n -- env HOME="$HOME" sh -c {shlex.quote(_ENTER)}'
_LIMIT = 60.0


@dataclass(frozen=True, slots=True)
class FailedPlace:
    """``argv``: the command that opens a shell there, on a terminal."""

    step: str
    vm: str
    failure: str
    message: str
    argv: tuple[str, ...]


Debugger = Callable[[FailedPlace], Awaitable[None]]
"""Told of a step that failed, before anything else is done."""


async def failed_place(step: StepKind, work: StepRun, failed: StepFailed) -> FailedPlace | None:
    """Where a step failed; None where there is nothing to look into: its VM was being reset, or does not
    answer."""
    from provision.guest.ssh_connection import in_thread

    if step.RENEWS or not step.vms:
        return None
    vm = step.changes
    try:
        connection = await work.machines.connection(vm)
        env = {**work.environment(vm), **await work.machines.source(vm)}
        kept = await connection.run(
            _KEEP_GIVEN, env=env, timeout=_LIMIT, log=lambda _: None, root=step.needs_root
        )
        member = Member(work.site, vm)
        by_sudo = step.needs_root and work.site.farm.ssh.user != "root"
        enter = f"exec sh -c {shlex.quote(_ENTER_AS_ROOT if by_sudo else _ENTER)}"
        ssh, *rest = await in_thread(lambda: member.ssh_argv(member.endpoint(), enter))
    except FarmhandError as error:
        work.site.reporter.warn(f"{step.name} can't be looked into: {error.message}", vm=vm)
        return None
    if kept.status:
        work.site.reporter.warn(f"{step.name} can't be looked into: its home can't be written", vm=vm)
        return None
    return FailedPlace(step.name, vm, failed.failure, str(failed), (ssh, "-t", *rest))
