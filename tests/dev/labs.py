"""The labs of farmhand's own tests: Debian hosts under QEMU, with KVM or Xen, ZFS and LVM. See
docs/lab.md; what they do is in tests/lab/."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cli.run import TaskResult, TaskRun
from cli.terminal import replace_process
from host.run import Runner
from inventory.errors import NotFound, UsageError
from inventory.sizes import parse_size

if TYPE_CHECKING:
    from tests.lab.kinds import Kind


def prepare(run: TaskRun, kind: Kind | None = None) -> None:
    """Build the image of that kind of lab, else the KVM lab's, where there is none: minutes, with
    progress on the screen."""
    from tests.lab import image
    from tests.lab.kinds import KVM

    image.ensure(Runner(), run.screen.say, kind or KVM)


def up(run: TaskRun, name: str, *, xen: bool, cold: bool, memory: str, disk: str) -> TaskResult:
    """A lab with clean disks and the working tree in it; one that runs is left as it is. UsageError."""
    from tests.lab import machine as machines
    from tests.lab import qemu
    from tests.lab.kinds import KVM, XEN

    kind = XEN if xen else KVM
    name = name or usual_name(xen)

    try:
        size = qemu.Size(
            parse_size(memory) if memory else qemu.USUAL.memory,
            parse_size(disk) if disk else qemu.USUAL.disk,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error

    started = time.monotonic()
    machines.sweep(Runner(), run.screen.say)
    machine = machines.Machine(name, Runner(), run.screen.say)
    there = machine.running()
    if there and machine.kind != kind:
        raise UsageError(
            f"the lab {name} runs already, and is a {machine.kind.title} lab",
            remedy=f"./invoke lab-down --name {name}, or give the new one another name",
        )
    if not there:
        machine.start(kind, warm=not cold, size=size)
        machine.deliver_tree()
    seconds = time.monotonic() - started
    facts = machine.facts
    how = "runs already" if there else f"is up, from {'its saved state' if facts.warm else 'cold'}"
    data = {"lab": name, "kind": kind.name, "port": facts.port, "pid": facts.process.pid,
            "warm": facts.warm, "started": not there, "seconds": round(seconds, 1),
            "engine": facts.engine}  # fmt: skip
    option = _option(name)
    text = (
        f"{name} ({kind.title}) {how} ({seconds:.1f} s; {facts.engine})\n"
        f"the working tree is in /root/farmhand; spare disks: /dev/vdb, /dev/vdc, /dev/vdd\n"
        f"go in: ./invoke lab-ssh{option}; end it: ./invoke lab-down{option}"
    )
    return TaskResult(data, text)


def usual_name(xen: bool) -> str:
    return "xen" if xen else "lab"


def _option(name: str) -> str:
    """What a command must say for it to be meant."""
    usual = {usual_name(False): "", usual_name(True): " --xen"}
    return usual.get(name, f" --name {name}")


def ssh(run: TaskRun, name: str, command: str, *, xen: bool) -> TaskResult | None:
    """Log in as root, in place of this process. NotFound where no such lab runs."""
    from tests.lab import machine as machines

    name = name or usual_name(xen)
    machine = machines.Machine(name, Runner(), run.screen.say)
    if not machine.running():
        raise NotFound(f"the lab {name} is not running", remedy=f"./invoke lab-up{_option(name)}")
    argv = machine.ssh_argv(*([command] if command else []))
    if run.json:
        return TaskResult({"argv": argv}, "")
    return replace_process(run, argv)


def down(run: TaskRun, name: str, *, xen: bool, all_: bool) -> TaskResult:
    """End labs and remove their disks."""
    from tests.lab import machine as machines

    if all_ and (name or xen):
        given = "--name" if name else "--xen"
        raise UsageError(f"{given} and --all together: which is meant?", remedy="give one of them")
    one = machines.Machine(name or usual_name(xen), Runner(), run.screen.say)
    chosen = machines.known(Runner(), run.screen.say) if all_ else (one,)
    there = [machine for machine in chosen if machine.directory.exists()]
    for machine in there:
        machine.remove()
    names = [machine.name for machine in there]
    text = f"ended: {', '.join(names)}" if names else "no such lab: nothing to do"
    return TaskResult({"ended": names}, text)


def test(
    run: TaskRun,
    name: str,
    *,
    kvm: bool,
    xen: bool,
    cold: bool,
    only: tuple[str, ...],
    match: str,
    minutes: int,
    brief: bool,
) -> TaskResult:
    """In the running lab ``name``, or a choice in a lab of its own, the KVM lab but with ``xen``; or
    all, of both kinds or of one: a lab for each portion, two side by side where the machine has the
    cores, and the tests of the labs themselves, on this host. pytest's closing line is the last on
    stdout. UsageError."""
    from tests.lab import machine as machines
    from tests.lab.kinds import KVM, XEN

    if kvm and xen:
        raise UsageError("--kvm and --xen together: that is all of it", remedy="give neither")
    one = partial(_in_a_lab, run, cold=cold, only=only, minutes=minutes, brief=brief)
    if name:
        return one(machines.Machine(name, Runner(), run.screen.say).kind, name, match=match)
    if only or match or brief:
        return one(XEN if xen else KVM, "", match=match)
    from tests.dev import suite

    kinds = (KVM,) if kvm else (XEN,) if xen else (XEN, KVM)  # what takes longer comes first
    waiting = deque((kind, words) for kind in kinds for words in kind.portions)

    def taken() -> Iterator[tuple[Kind, str]]:
        """Each to whoever is first to ask for it."""
        with contextlib.suppress(IndexError):
            while True:
                yield waiting.popleft()

    aside: Iterable[Sequence[str]] = ()
    if len(os.sched_getaffinity(0)) >= _CORES:
        for kind in kinds:
            prepare(run, kind)
        options = ("--minutes", str(minutes), *(["--cold"] if cold else []))
        aside = (("lab-test", f"--{kind.name}", "--match", words, *options) for kind, words in taken())
    with suite.Aside(run, aside) as others:
        parts = [one(kind, "", match=words) for kind, words in taken()]
        if KVM in kinds:
            parts.append(suite.of_the_lab(run))
        parts += others.finish()
    problems = [part.problem for part in parts if not part.ok]
    data = {"parts": [part.data for part in parts]}
    return TaskResult(data, "", ok=not problems, problem="; ".join(problems))


_CORES = 2  # a lab's tests seldom keep more than one busy


def _in_a_lab(
    run: TaskRun,
    kind: Kind,
    name: str,
    *,
    cold: bool,
    only: tuple[str, ...],
    match: str,
    minutes: int,
    brief: bool,
) -> TaskResult:
    from tests.lab import run as labrun

    show: Callable[[bytes], None] = (lambda _: None) if run.json else labrun.to_terminal
    choice = labrun.Choice(only, match, brief)
    report = labrun.run_tests(
        Runner(), run.screen.say, name=name, kind=kind, warm=not cold, choice=choice,
        limit=minutes * 60, show=show,
    )  # fmt: skip
    run.screen.say(f"results, journals and logs of the {kind.title} lab: {report.results}")
    problem = ""
    if not report.ok:
        problem = f"the tests in the {kind.title} lab failed (pytest's status {report.status})"
    return TaskResult(report.as_dict(), "", ok=report.ok, problem=problem)


def bench(run: TaskRun, name: str, *, rounds: int) -> TaskResult:
    """The figures of the disk stores, of Xen and of XenAPI's calls; with ``name`` those of that
    lab alone. Not ok where one is over its limit."""
    from tests import bench_xenapi
    from tests.figures import Figure, Figures
    from tests.lab import run as labrun
    from tests.lab.kinds import KVM, XEN

    found: list[Figure] = []
    for kind in (KVM,) if name else (KVM, XEN):
        data = labrun.run_bench(Runner(), run.screen.say, name=name, kind=kind, rounds=rounds)
        found += Figures.from_dict(data).figures
    if not name:
        found += bench_xenapi.measure()
    figures = Figures(tuple(found))
    problem = "" if figures.all_within else "a figure is over its limit"
    return TaskResult(figures.as_dict(), figures.text(), ok=figures.all_within, problem=problem)
