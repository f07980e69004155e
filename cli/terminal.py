"""The terminal: asked for a word, or handed over to another program."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from cli.run import TaskResult, TaskRun
from inventory.errors import Call, FarmhandError, NotFound, Text, Unsupported, UsageError

if TYPE_CHECKING:
    from builds.debugging import Debugger, FailedPlace
    from hypervisors.api import Console


def agree(run: TaskRun, look: Callable[[], tuple[object, Text]]) -> None:
    """On a terminal: show what ``look`` finds (a value to compare, and its text; no text: nothing to
    ask about), and go on at "yes" alone, as long as it is the same then. FarmhandError: nothing was
    done. Where nobody can answer, nothing is asked: a script means what it says."""
    if run.plan or run.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    go_on, run.resume = run.resume, "nothing was done"
    what, text = look()
    while text:
        run.close()
        if _answer(f'{run.words.text(text)}\n\nType "yes" to {run.task} it: ') != b"yes":
            raise FarmhandError(f'nothing was done: only "yes" would {run.task} it')
        agreed = what
        what, text = look()
        if what == agreed:
            break
        run.screen.warn("nothing was done: the farm has changed meanwhile, and is now as follows")
    run.resume = go_on


def asked(question: str, likely: str) -> str:
    """What is answered; nothing: ``likely``. UsageError at the end of input."""
    line = _answer(f"{question} [{likely}]: " if likely else f"{question}: ", whole=True)
    if not line:
        raise UsageError("nothing was done: no answer", remedy="the task's flags say it, too")
    return line.decode(errors="replace").strip() or likely


def _answer(question: str, *, whole: bool = False) -> bytes:
    """A line, with its end if it is to be ``whole``; none at the end of input (Ctrl-D), or of a terminal
    that is gone."""
    line = b""
    try:
        sys.stderr.write(question)
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            line = sys.stdin.buffer.readline()
    finally:
        if not line.endswith(b"\n"):
            sys.stderr.write("\n")
    return line if whole else line.strip()


def ssh(run: TaskRun, argv: Sequence[str]) -> TaskResult | None:
    """Log in: OpenSSH in our place. Unsupported where it isn't installed."""
    from host.run import which

    program = which(argv[0])
    if program is None:
        raise Unsupported(
            "ssh is not installed",
            remedy="as root: apt-get install -y --no-install-recommends openssh-client",
        )
    if run.plan or run.json:
        return TaskResult({"argv": list(argv)}, shlex.join(argv))
    return replace_process(run, [program, *argv[1:]])


def debugger(run: TaskRun) -> Debugger:
    """A shell where a step failed: on a terminal it is opened; elsewhere it is said how to get there."""

    async def look_into(at: FailedPlace) -> None:
        from host.run import Runner, which

        there = sys.stdin.isatty() and sys.stdout.isatty() and not run.json
        if not there or which(at.argv[0]) is None:
            run.screen.say(f"to look into it, type: {shlex.join(at.argv)}", vm=at.vm)
            return
        run.screen.warn(f"{at.step} failed, {at.failure}: {at.message}", vm=at.vm)
        run.screen.say(f"a shell where {at.step} failed; leave it by 'exit', to go on", vm=at.vm)
        with run.screen.aside():
            await Runner(changes=False).hand_over(*at.argv)

    return look_into


def console(run: TaskRun, vm: str, found: Console, *, log: bool, lines: int) -> TaskResult | None:
    """Attach to the console, or show the end of its log. Unsupported where there is none."""
    if log or (run.json and not run.plan):
        if found.log is None:
            raise Unsupported(
                "this host keeps no console log", vm=vm, remedy="console --vm attaches to it"
            )
        from provision.guest.remote import tail_of

        if not found.log.exists():
            raise NotFound("no console log yet", vm=vm, remedy=("start it: ", Call("start", vm=vm)))
        text = tail_of(found.log, lines=lines, limit=200 * lines + 4096)
        return TaskResult({"vm": vm, "log": str(found.log), "text": text}, text)
    if not found.argv:
        raise Unsupported(
            "its console can't be attached to",
            vm=vm,
            remedy=("see its log: ", Call("console", vm=vm, log=True)),
        )
    if run.plan:
        return TaskResult({"argv": list(found.argv)}, shlex.join(found.argv))
    if not sys.stdin.isatty():
        raise UsageError(
            "a console needs a terminal", remedy=("see its log: ", Call("console", vm=vm, log=True))
        )
    sys.stderr.write(f"console of {vm}; leave with Ctrl-]\n")
    return replace_process(run, found.argv)


def replace_process(run: TaskRun, argv: Sequence[str]) -> NoReturn:
    """Hand the terminal over to another program: ssh, or a console. Nothing of ours stays behind:
    handlers of signals end with this program, and two signals are ignored by Python for itself. But
    the umask does: all that they write is our list of known hosts."""
    from host.run import environment

    run.close()
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(argv[0], list(argv), environment())  # noqa: S606 - in our place: the terminal is theirs
