"""What stands between invoke and the use cases: common flags, errors in words, output, exit status.

``@command`` goes where ``@task`` would. It adds ``--farm``, ``--json`` and ``--quiet``, ``--plan`` and
``--wait`` to what changes something, opens nothing by itself, and turns every ending into one of four:
a result on stdout; one line and a remedy on stderr for what an admin can cause; one line and a file
with the traceback for what only we can cause; and a word on how to go on after Ctrl-C.

The exit status (``inventory.endings``) tells what was done, whoever reads: a failed build is one also
where nobody does. A result that nobody takes (stdout closed, ``| head``) is dropped. One that was
wanted and is lost (a full disk) is said, with what was done all the same, and a good end becomes
``UNWRITTEN``. Signals that are ignored when we start (``nohup``, ``&`` in a script) stay ignored.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from invoke.exceptions import Exit
from invoke.tasks import task as invoke_task

from cli import composition, streams  # noqa: F401 - the first, before a farm file is read
from cli.run import TaskResult, TaskRun
from cli.task_words import TaskWords, task_words
from host.files import UMASK, of_the_disk, out_of_files
from host.printable import as_json
from inventory.endings import DEFECT, DONE, UNWRITTEN, Ending
from inventory.errors import FarmhandError, Interrupted, InventoryError, Remedy

if TYPE_CHECKING:
    from types import FrameType

_LONGEST = 2000  # characters of a line of an error: --json has the whole

COMMON = ("farm", "json", "quiet")  # flags of every task
_COMMON_HELP = {
    "farm": "The farm file; else $FARMHAND_FARM, ./farm.yaml, or farmhand's own default farm.",
    "json": "Print one JSON object on stdout, also for an error.",
    "plan": "Show what would be done, and do nothing.",
    "quiet": "Print errors and warnings alone: no progress, and no result but that of --json.",
    "wait": "Wait for who holds a lock that is needed: so many seconds, or without a number until it is "
    "free.",
}


def command(
    help: Mapping[str, str] | None = None,
    *,
    does: Sequence[str] = (),
    iterable: Sequence[str] = (),
    plans: bool = False,
    name: str | None = None,
    bare: str = "vm",
    rest: str = "",
    shown: str = "",
) -> Callable[[Callable[..., TaskResult | None]], object]:
    """The decorator under which a task stands. ``does``: names of the operations that it may carry out,
    as ``provision.engine.registry`` has them; a task with none changes nothing. ``plans``: it has --plan
    all the same. ``bare``, ``rest``, ``shown``: see TaskWords; ``bare`` counts where there is such a
    flag. The function gets a TaskRun first."""
    texts = dict(help or {})

    def decorate(body: Callable[..., TaskResult | None]) -> object:
        own = list(inspect.signature(body).parameters.values())
        task = name or body.__name__.replace("_", "-")
        flags = [*COMMON, *(("plan",) if does or plans else ()), *(("wait",) if does else ())]
        extra = [
            inspect.Parameter(
                flag, inspect.Parameter.KEYWORD_ONLY, default="" if flag in ("farm", "wait") else False
            )
            for flag in flags
        ]
        takes = bare if any(parameter.name == bare for parameter in own) else ""
        task_words[task] = TaskWords(takes, takes in iterable, rest, bool(does), shown)

        @functools.wraps(body)
        def shell(_context: object, **options: Any) -> None:
            run = TaskRun(
                task=task,
                farm=str(options.pop("farm")),
                json=bool(options.pop("json")),
                plan=bool(options.pop("plan", False)),
                does=tuple(does),
                quiet=bool(options.pop("quiet")),
                wait=options.pop("wait", ""),
            )
            _carry_out(run, functools.partial(body, run, **options))

        shell.__signature__ = inspect.Signature(own[:1] + own[1:] + extra)  # type: ignore[attr-defined]
        return invoke_task(
            name=name,
            iterable=list(iterable),
            optional=["wait"] if does else (),
            help={**texts, **{flag: _COMMON_HELP[flag] for flag in flags}},
            auto_shortflags=False,
        )(shell)

    return decorate


class _Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP, made to unwind as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    raise _Ended(number)


def _carry_out(run: TaskRun, body: Callable[[], TaskResult | None]) -> None:
    """Run a task's body; every way it can end, ends here."""
    atexit.unregister(streams.at_end)
    os.umask(UMASK)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, _on_signal)
    result = None
    try:
        try:
            result = body()
        finally:
            run.close()
        ending = _show(run, result) if result is not None else DONE
    except Exit:
        raise
    except KeyboardInterrupt as error:
        ended_by = error.number if isinstance(error, _Ended) else int(signal.SIGINT)
        refuse(run, _interrupted(run, ended_by, result), 128 + ended_by)
    except FarmhandError as error:
        refuse(run, error)
    except Exception as error:  # noqa: BLE001 - a defect of ours: shown as one, with its traceback kept
        if short := out_of_files(error, "go on"):
            refuse(run, short)
        if isinstance(error, OSError) and (known := of_the_disk(error)):
            refuse(run, known)
        where = _keep_traceback(run)
        refuse(
            run,
            Defect(
                f"a defect in farmhand itself: {type(error).__name__}: {_first_line(error)}",
                remedy=f"report it with {where}; VMs are safe, 'status' shows them as they are",
            ),
        )
    if ending.status:
        raise Exit(code=ending.status)


class Defect(FarmhandError):
    """Of farmhand itself: nothing that an admin can cause."""

    ending = DEFECT


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _interrupted(run: TaskRun, number: int, result: TaskResult | None) -> Interrupted:
    how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    if result is not None:  # a reader that waits, a terminal that was held (Ctrl-S)
        run.json = False  # its object was begun: no second one
        return Interrupted(f"{how} while the result was being written{_was_done(run, result)}")
    remedy = "the next command finishes or undoes what was under way, as recover does"
    return Interrupted(how, remedy=run.resume or (remedy if run.does else ""))


def _was_done(run: TaskRun, result: TaskResult) -> str:
    return f"; {run.task} was done" if result.ok and run.acts else ""


def _lost(run: TaskRun, result: TaskResult, why: str) -> str:
    again = "status, log and history show" if run.acts else "then type the same for"
    return (
        f"farmhand: the result could not be written: {why}{_was_done(run, result)}\n"
        f"  make room where it goes; {again} what is lost\n"
    )


def _show(run: TaskRun, result: TaskResult) -> Ending:
    ending = DONE if result.ok else result.ending
    if run.json:
        known = {"task": run.task, "ok": result.ok, **({} if result.ok else {"class": ending.word})}
        _write_json(run.words.data({**known, **result.data}))
    elif not run.quiet and (text := run.words.text(result.text)):
        sys.stdout.write(text.rstrip("\n") + "\n")
    if why := streams.unwritten():
        sys.stderr.write(_lost(run, result, why))
    if result.problem:
        lines = [*_told(result.problem), *_remedy(run, result.remedy)]
        sys.stderr.write("\n".join(lines) + "\n")
    return UNWRITTEN if why and result.ok else ending


def _write_json(data: Mapping[str, object]) -> None:
    sys.stdout.write(as_json(data, indent=2, encoding=sys.stdout.encoding) + "\n")


def _told(message: str) -> list[str]:
    """Only the first line is farmhand's own word: nothing that a message quotes can look like one."""
    first, *more = message.splitlines() or [""]
    return [f"farmhand: {_cut(first)}", *(f"  {_cut(line)}" for line in more)]


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _remedy(run: TaskRun, remedy: Remedy) -> list[str]:
    return [f"  {line}" for line in run.words.text(remedy).splitlines()]


def refuse(run: TaskRun, error: FarmhandError, status: int = 0) -> NoReturn:
    """The error as an admin reads it, the most important last; as one object with --json. ``status``:
    the exit status, where it is not that of the error's ending."""
    if run.json:
        _write_json(run.words.data({"task": run.task, "ok": False, **error.as_dict()}))
        sys.stdout.flush()
    lines = [f"  | {_cut(line)}" for line in error.detail.splitlines()]
    if isinstance(error, InventoryError):  # each with its place: as they are, for editors to jump to
        lines += error.message.splitlines()
        count_ = f"{len(error.problems)} problems" if len(error.problems) > 1 else "1 problem"
        lines.append(f"farmhand: {count_} in the farm file; nothing was done")
    else:
        lines += _told(error.message or type(error).__name__)
    lines += _remedy(run, error.remedy)
    sys.stderr.write("\n".join(lines) + "\n")
    raise Exit(code=status or error.ending.status) from None


def _keep_traceback(run: TaskRun) -> Path:
    import platform
    import tempfile
    import traceback

    from host.files import open_new, own_directory
    from host.paths import state_dir

    text = (
        f"{time.strftime('%Y-%m-%d %H:%M:%S%z')}  {run.task}\n{sys.argv}\n"
        f"{platform.platform()} Python {platform.python_version()}\n\n{traceback.format_exc()}"
    )
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    data = text.encode(errors="backslashreplace")
    with contextlib.suppress(FarmhandError, OSError):
        own_directory(state_dir() / "logs", mode=0o700)
        with open_new(state_dir() / "logs" / name) as file:
            file.write(data)
        return state_dir() / "logs" / name
    with contextlib.suppress(OSError):  # where everybody may write: under a name that is nobody's yet
        handle, made = tempfile.mkstemp(prefix=f"farmhand-{name}-")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return Path(made)
    sys.stderr.write(text)
    return Path("the text above")
