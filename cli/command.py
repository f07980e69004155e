"""What stands between invoke and the use cases: common flags, errors in words, output, exit status.

``@command`` goes where ``@task`` would. It adds ``--farm``, ``--json`` and ``--plan``, opens nothing by
itself, and turns every ending into one of four: a result on stdout; one line and a remedy on stderr
for what an admin can cause; one line and a file with the traceback for what only we can cause; and a
word on how to go on after Ctrl-C. Options reach a task as strings and are judged here, since invoke's
own conversion (``--count abc``) shows a traceback.

The exit status tells what was done, whoever reads: a failed build is 1 also where nobody does. A result
that nobody takes (stdout closed, ``| head``) is dropped. One that was wanted and is lost (a full disk)
is said, with what was done all the same, and makes a good end 74. Signals that are ignored when
we start (``nohup``, ``&`` in a script) stay ignored.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import json as jsonlib
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from invoke.exceptions import Exit
from invoke.tasks import task as invoke_task

from cli import streams
from host.files import UMASK
from inventory.errors import (
    FarmhandError,
    Interrupted,
    InventoryError,
    NotFound,
    Several,
    Unsupported,
    UsageError,
    some,
)

if TYPE_CHECKING:
    from types import FrameType

    from cli.screen import Screen
    from hypervisors.api import Console
    from provision.site import Site

ROOT = Path(__file__).resolve().parents[1]
_TASKS: set[str] = set()  # names of those that @command made; each takes --farm
DEFECT = 70  # EX_SOFTWARE of sysexits.h(3head)

_COMMON_HELP = {
    "farm": "The farm file; else $FARMHAND_FARM, ./farm.yaml, or farmhand's own default farm.",
    "json": "Print one JSON object on stdout, also for an error.",
    "plan": "Show what would be done, and do nothing.",
}


@dataclass(frozen=True, slots=True)
class Result:
    """What a task prints: ``data`` with --json, else ``text``. ``ok`` False makes the status 1;
    ``problem`` and ``remedy`` then go to stderr, as an error's do."""

    data: Mapping[str, object]
    text: str
    ok: bool = True
    problem: str = ""
    remedy: str = ""


@dataclass(slots=True)
class Run:
    """One run of one task: what the common flags said."""

    task: str
    farm: str
    json: bool
    plan: bool
    changes: bool = True  # VMs, or what belongs to them
    resume: str = ""  # what to type after an interruption
    _screen: Screen | None = field(default=None)

    @property
    def screen(self) -> Screen:
        """The reporter: a live line on a terminal, dated lines elsewhere; always on stderr."""
        if self._screen is None:
            from cli.screen import open_screen

            self._screen = open_screen(sys.stderr)
        return self._screen

    def farm_file(self) -> Path:
        """The farm file meant. NotFound, saying where the name came from."""
        set_in = os.environ.get("FARMHAND_FARM", "")
        for text, source in ((self.farm, "--farm"), (set_in, "$FARMHAND_FARM")):
            if text:
                path = Path(text).expanduser()
                if not path.is_file():
                    raise NotFound(
                        f"{source}: no farm file {path}", remedy="give the path of a farm file"
                    )
                return path.absolute()
        here = Path.cwd() / "farm.yaml"
        return here if here.is_file() else ROOT / "inventory" / "default.yaml"

    def site(self, *, plan: bool = False) -> Site:
        """The farm, opened, with ``plan`` for looking only. A context manager."""
        from provision.engine.requester import Requester
        from provision.site import open_site

        return open_site(
            self.farm_file(),
            reporter=self.screen,
            plan=plan or self.plan,
            requester=Requester.of_process(),
        )

    @property
    def acts(self) -> bool:
        """Whether it is to change anything."""
        return self.changes and not self.plan

    def close(self) -> None:
        if self._screen is not None:
            self._screen.close()
            self._screen = None


def command(
    help: Mapping[str, str] | None = None,
    *,
    iterable: Sequence[str] = (),
    plans: bool = True,
    name: str | None = None,
) -> Callable[[Callable[..., Result | None]], object]:
    """The decorator under which a task stands. ``plans`` False: the task has no --plan, for it changes
    nothing. The function gets a Run first."""
    texts = dict(help or {})

    def decorate(body: Callable[..., Result | None]) -> object:
        _TASKS.add(name or body.__name__.replace("_", "-"))
        own = list(inspect.signature(body).parameters.values())
        flags = ["farm", "json", "plan"] if plans else ["farm", "json"]
        extra = [
            inspect.Parameter(
                flag, inspect.Parameter.KEYWORD_ONLY, default="" if flag == "farm" else False
            )
            for flag in flags
        ]

        @functools.wraps(body)
        def shell(_context: object, **options: Any) -> None:
            run = Run(
                task=name or body.__name__.replace("_", "-"),
                farm=str(options.pop("farm")),
                json=bool(options.pop("json")),
                plan=bool(options.pop("plan", False)),
                changes=plans,
            )
            work = functools.partial(body, run, **options)
            _carry_out(run, functools.partial(_naming_the_farm, run, work))

        shell.__signature__ = inspect.Signature(own[:1] + own[1:] + extra)  # type: ignore[attr-defined]
        return invoke_task(
            name=name,
            iterable=list(iterable),
            help={**texts, **{flag: _COMMON_HELP[flag] for flag in flags}},
            auto_shortflags=False,
        )(shell)

    return decorate


def with_farm(text: str, run: Run) -> str:
    """The text with ``--farm`` in each ``./invoke TASK`` of it, where without it the same words would be
    about another farm."""
    try:
        path = run.farm_file()
        if not run.farm or path == replace(run, farm="").farm_file():
            return text
    except FarmhandError:  # there is no such farm: nothing is to be typed about it
        return text
    flag = f" --farm {shlex.quote(str(path))}"
    known = "|".join(sorted(_TASKS, key=len, reverse=True))
    return re.sub(rf"(\./invoke (?:{known}))(?![\w-])(?! --farm\b)", lambda found: found[1] + flag, text)


def _naming_the_farm(run: Run, body: Callable[[], Result | None]) -> Result | None:
    """The task's body; what it says is to be typed then is about this farm."""
    try:
        result = body()
    except FarmhandError as error:
        for each in (error, *(error.errors.values() if isinstance(error, Several) else ())):
            each.remedy = with_farm(each.remedy, run)
        raise
    finally:
        run.resume = with_farm(run.resume, run)
    if result is None or not result.remedy:
        return result
    remedy = with_farm(result.remedy, run)
    data = {**result.data, "remedy": remedy} if "remedy" in result.data else result.data
    return replace(result, data=data, remedy=remedy)


class _Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP, made to unwind as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    raise _Ended(number)


def _carry_out(run: Run, body: Callable[[], Result | None]) -> None:
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
        status = _show(run, result) if result is not None else 0
    except Exit:
        raise
    except KeyboardInterrupt as error:
        ended_by = error.number if isinstance(error, _Ended) else int(signal.SIGINT)
        _refuse(run, _interrupted(run, ended_by, result), 128 + ended_by)
    except FarmhandError as error:
        _refuse(run, error, error.exit_status)
    except Exception as error:  # noqa: BLE001 - a defect of ours: shown as one, with its traceback kept
        where = _keep_traceback(run)
        _refuse(
            run,
            FarmhandError(
                f"a defect in farmhand itself: {type(error).__name__}: {_first_line(error)}",
                remedy=f"report it with {where}; VMs are safe, 'status' shows them as they are",
            ),
            DEFECT,
        )
    if status:
        raise Exit(code=status)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _interrupted(run: Run, number: int, result: Result | None) -> Interrupted:
    how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    if result is not None:  # a reader that waits, a terminal that was held (Ctrl-S)
        run.json = False  # its object was begun: no second one
        return Interrupted(f"{how} while the result was being written{_was_done(run, result)}")
    remedy = "the next command finishes or undoes what was under way, as recover does"
    return Interrupted(how, remedy=run.resume or (remedy if run.changes else ""))


def _was_done(run: Run, result: Result) -> str:
    return f"; {run.task} was done" if result.ok and run.acts else ""


def _lost(run: Run, result: Result, why: str) -> str:
    again = "status, log and history show" if run.acts else "then type the same for"
    return (
        f"farmhand: the result could not be written: {why}{_was_done(run, result)}\n"
        f"  make room where it goes; {again} what is lost\n"
    )


def _show(run: Run, result: Result) -> int:
    """The exit status."""
    if run.json:
        write_json({"task": run.task, "ok": result.ok, **result.data})
    elif result.text:
        sys.stdout.write(result.text.rstrip("\n") + "\n")
    if why := streams.unwritten():
        sys.stderr.write(_lost(run, result, why))
    if result.problem:
        remedy = f"  {result.remedy}\n" if result.remedy else ""
        sys.stderr.write(f"farmhand: {result.problem}\n{remedy}")
    return 1 if not result.ok else streams.UNWRITTEN if why else 0


def write_json(data: Mapping[str, object]) -> None:
    text = jsonlib.dumps(data, indent=2, default=str, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = jsonlib.dumps(data, indent=2, default=str)
    sys.stdout.write(text + "\n")


def _refuse(run: Run, error: FarmhandError, status: int) -> NoReturn:
    """The error as an admin reads it, the most important last; as one object with --json."""
    if run.json:
        write_json({"task": run.task, "ok": False, **error.as_dict()})
        sys.stdout.flush()
    lines = [f"  | {line}" for line in error.detail.splitlines()]
    first, *more = (error.message or type(error).__name__).splitlines()
    if isinstance(error, InventoryError):  # each with its place: as they are, for editors to jump to
        count_ = f"{len(error.problems)} problems" if more else "1 problem"
        lines += [first, *more, f"farmhand: {count_} in the farm file; nothing was done"]
    else:
        lines += [f"farmhand: {first}", *(f"  {line}" for line in more)]
    if error.remedy:
        lines.append(f"  {error.remedy}")
    sys.stderr.write("\n".join(lines) + "\n")
    raise Exit(code=status) from None


def _keep_traceback(run: Run) -> Path:
    import platform
    import tempfile
    import traceback

    from host.files import make_directory, open_new
    from host.paths import state_dir

    text = (
        f"{time.strftime('%Y-%m-%d %H:%M:%S%z')}  {run.task}\n{sys.argv}\n"
        f"{platform.platform()} Python {platform.python_version()}\n\n{traceback.format_exc()}"
    )
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for directory in (state_dir() / "logs", Path(tempfile.gettempdir())):
        try:
            make_directory(directory, mode=0o700)
            with open_new(directory / name) as file:
                file.write(text.encode(errors="backslashreplace"))
        except (FarmhandError, OSError):
            continue
        return directory / name
    sys.stderr.write(text)
    return Path("the text above")


# ---- Options, judged.


def names(
    values: Iterable[str] | None, option: str = "--vm", of: str = "a VM of the farm"
) -> tuple[str, ...]:
    """``--vm a --vm b`` and ``--vm a,b`` alike; each once, in their order."""
    found = [part.strip() for value in values or () for part in str(value).split(",")]
    if not all(found):
        raise UsageError(f"{option}: an empty name", remedy=f"give the name of {of}")
    return tuple(dict.fromkeys(found))


def vms_or_all(site: Site, vm: Iterable[str] | None, all_: bool) -> tuple[str, ...]:
    """The VMs meant, known ones only."""
    return site.vms(some_or_all(site, vm, all_))


def some_or_all(site: Site, vm: Iterable[str] | None, all_: bool) -> tuple[str, ...] | None:
    """The names given; None for --all. An empty choice is refused: it is never "all" by accident."""
    chosen = names(vm)
    if chosen and all_:
        raise UsageError("--vm and --all together: which is meant?", remedy="give one of them")
    if not chosen and not all_:
        raise UsageError(
            "which VMs?",
            remedy=f"--vm NAME (repeatable) or --all; the farm has {some(site.farm.vms)}",
        )
    return chosen or None


def one_vm(site: Site, vm: str) -> str:
    """The one VM meant; where the farm has a single one, that."""
    if not vm and len(site.farm.vms) > 1:
        raise UsageError("which VM?", remedy=f"--vm NAME; the farm has {some(site.farm.vms)}")
    return site.vms(names([vm]) if vm else None)[0]


def size(option: str, text: str) -> int:
    """Bytes."""
    from inventory.sizes import parse_size

    if not text:
        raise UsageError(f"{option} is missing", remedy=f"{option} SIZE, such as {option} 512M")
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None


def count(option: str, text: str, *, least: int = 1) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise UsageError(
            f"{option}: {text!r} is not a whole number from {least} on", remedy=f"{option} 20"
        )
    return int(text)


def needed(option: str, text: str, meaning: str) -> str:
    """An option that has no sensible default."""
    if not text.strip():
        raise UsageError(f"{option} is missing", remedy=f"{option}: {meaning}")
    return text.strip()


def template(site: Site, name: str, *, built: bool) -> str:
    """The template meant: the named one, or the only one that is built (or imported)."""
    from difflib import get_close_matches

    known = site.farm.templates
    if name:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise NotFound(
                f"{site.farm.path}: there is no template {name!r}",
                remedy=f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}",
            )
        return name
    fitting = [key for key, source in known.items() if (source.build is not None) == built]
    if len(fitting) != 1:
        kind = "built" if built else "imported"
        raise UsageError(
            f"which template? the farm has {len(fitting)} that are {kind}",
            remedy=f"--name NAME: {', '.join(fitting or known) or 'declare one in the farm file'}",
        )
    return fitting[0]


# ---- Asking.


def agree(run: Run, look: Callable[[], tuple[object, str]]) -> None:
    """On a terminal: show what ``look`` finds (a value to compare, and its text; no text: nothing to
    ask about), and go on at "yes" alone, as long as it is the same then. FarmhandError: nothing was
    done. Where nobody can answer, nothing is asked: a script means what it says."""
    if run.plan or run.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    go_on, run.resume = run.resume, "nothing was done"
    what, text = look()
    while text:
        run.close()
        if _answer(f'{text}\n\nType "yes" to {run.task} it: ') != b"yes":
            raise FarmhandError(f'nothing was done: only "yes" would {run.task} it')
        agreed = what
        what, text = look()
        if what == agreed:
            break
        run.screen.warn("nothing was done: the farm has changed meanwhile, and is now as follows")
    run.resume = go_on


def _answer(question: str) -> bytes:
    """A line; none at the end of input (Ctrl-D), or of a terminal that is gone."""
    line = b""
    try:
        sys.stderr.write(question)
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            line = sys.stdin.buffer.readline()
    finally:
        if not line.endswith(b"\n"):
            sys.stderr.write("\n")
    return line.strip()


# ---- Handing the terminal over.


def ssh(run: Run, argv: Sequence[str]) -> Result | None:
    """Log in: OpenSSH in our place. Unsupported where it isn't installed."""
    from host.run import which

    program = which(argv[0])
    if program is None:
        raise Unsupported(
            "ssh is not installed",
            remedy="as root: apt-get install -y --no-install-recommends openssh-client",
        )
    if run.plan or run.json:
        return Result({"argv": list(argv)}, shlex.join(argv))
    return replace_process(run, [program, *argv[1:]])


def console(run: Run, vm: str, found: Console, *, log: bool, lines: int) -> Result | None:
    """Attach to the console, or show the end of its log. Unsupported where there is none."""
    if log or (run.json and not run.plan):
        if found.log is None:
            raise Unsupported(
                f"{vm}: this host keeps no console log", remedy="console --vm attaches to it"
            )
        from provision.guest.remote import tail_of

        if not found.log.exists():
            raise NotFound(f"{vm}: no console log yet", remedy=f"start it: ./invoke start --vm {vm}")
        text = tail_of(found.log, lines=lines, limit=200 * lines + 4096)
        return Result({"vm": vm, "log": str(found.log), "text": text}, text)
    if not found.argv:
        raise Unsupported(
            f"{vm}: its console can't be attached to",
            remedy=f"see its log: ./invoke console --vm {vm} --log",
        )
    if run.plan:
        return Result({"argv": list(found.argv)}, shlex.join(found.argv))
    if not sys.stdin.isatty():
        raise UsageError(
            "a console needs a terminal", remedy=f"see its log: ./invoke console --vm {vm} --log"
        )
    sys.stderr.write(f"console of {vm}; leave with Ctrl-]\n")
    return replace_process(run, found.argv)


def replace_process(run: Run, argv: Sequence[str]) -> NoReturn:
    """Hand the terminal over to another program: ssh, or a console. Nothing of ours stays behind:
    handlers of signals end with this program, and two signals are ignored by Python for itself. But
    the umask does: all that they write is our list of known hosts."""
    run.close()
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(argv[0], list(argv))  # noqa: S606 - in our place: the terminal is theirs
