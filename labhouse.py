"""The labs of farmhand's own tests: Debian hosts under QEMU, with KVM or Xen, ZFS and LVM. See
docs/lab.md; what they do is in tests/lab/."""

from __future__ import annotations

import time
from collections.abc import Callable

from hypervisors.run import Runner
from inventory.errors import NotFound, UsageError
from inventory.sizes import parse_size

from cli import Result, Run, replace_process


def prepare(run: Run) -> None:
    """Build the labs' images, where there are none: minutes, with progress on the screen."""
    from tests.lab import image
    from tests.lab.kinds import KINDS

    for kind in KINDS.values():
        image.ensure(Runner(), run.screen.say, kind)


def up(run: Run, name: str, *, xen: bool, cold: bool, memory: str, disk: str) -> Result:
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
    option = "" if name == "lab" else f" --name {name}"
    text = (
        f"{name} ({kind.title}) {how} ({seconds:.1f} s; {facts.engine})\n"
        f"the working tree is in /root/farmhand; spare disks: /dev/vdb, /dev/vdc, /dev/vdd\n"
        f"go in: ./invoke lab-ssh{option}; end it: ./invoke lab-down{option}"
    )
    return Result(data, text)


def usual_name(xen: bool) -> str:
    return "xen" if xen else "lab"


def ssh(run: Run, name: str, command: str) -> Result | None:
    """Log in as root, in place of this process. NotFound where no such lab runs."""
    from tests.lab import machine as machines

    machine = machines.Machine(name, Runner(), run.screen.say)
    if not machine.running():
        raise NotFound(f"the lab {name} is not running", remedy=f"./invoke lab-up --name {name}")
    argv = machine.ssh_argv(*([command] if command else []))
    if run.json:
        return Result({"argv": argv}, "")
    return replace_process(run, argv)


def down(run: Run, name: str, *, all_: bool) -> Result:
    """End labs and remove their disks."""
    from tests.lab import machine as machines

    if all_ and name:
        raise UsageError("--name and --all together: which is meant?", remedy="give one of them")
    one = machines.Machine(name or "lab", Runner(), run.screen.say)
    chosen = machines.known(Runner(), run.screen.say) if all_ else (one,)
    there = [machine for machine in chosen if machine.directory.exists()]
    for machine in there:
        machine.remove()
    names = [machine.name for machine in there]
    text = f"ended: {', '.join(names)}" if names else "no such lab: nothing to do"
    return Result({"ended": names}, text)


def test(
    run: Run,
    name: str,
    *,
    xen: bool = False,
    cold: bool,
    only: tuple[str, ...],
    match: str,
    minutes: int,
) -> Result:
    """In the running lab ``name``; else in a Xen lab with ``xen``, and without in one of each kind, one
    after the other. pytest's closing line is the last on stdout."""
    from tests.lab import machine as machines
    from tests.lab import run as labrun
    from tests.lab.kinds import KINDS, XEN

    show: Callable[[bytes], None] = (lambda _: None) if run.json else labrun.to_terminal
    kinds = [XEN] if xen else list(KINDS.values())
    if name:
        kinds = [machines.Machine(name, Runner(), run.screen.say).kind]
    reports = []
    for kind in kinds:
        report = labrun.run_tests(
            Runner(), run.screen.say, name=name, kind=kind, warm=not cold, only=only, match=match,
            limit=minutes * 60, show=show,
        )  # fmt: skip
        run.screen.say(f"results, journals and logs of the {kind.title} lab: {report.results}")
        reports.append(report)
    # a choice may well have tests for one of them only
    ran = [report for report in reports if not (report.nothing and (only or match))] or reports[:1]
    bad = [report for report in ran if not report.ok]
    problem = "; ".join(
        f"the tests in the {KINDS[report.kind].title} lab failed (pytest's status {report.status})"
        for report in bad
    )
    data = {**(bad or ran)[0].as_dict(), "labs": [report.as_dict() for report in reports]}
    return Result(data, "", ok=not bad, problem=problem)


def bench(run: Run, name: str, *, rounds: int) -> Result:
    """The disk stores' figures, from a lab; not ok where one is over its limit."""
    from tests.figures import Figures
    from tests.lab import run as labrun

    figures = Figures.from_dict(labrun.run_bench(Runner(), run.screen.say, name=name, rounds=rounds))
    problem = "" if figures.all_within else "a figure is over its limit"
    return Result(figures.as_dict(), figures.text(), ok=figures.all_within, problem=problem)
