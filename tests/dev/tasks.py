"""The tasks of farmhand's own development: its tests, linters, figures and labs. They are there where
the tests are: in a checkout."""

from __future__ import annotations

from collections.abc import Sequence

from cli import options
from cli.command import command
from cli.run import TaskResult, TaskRun

Names = Sequence[str] | None


@command(
    {
        "fast": "Without the tests that start VMs, and without the lab.",
        "only": "Only these test files or directories; repeatable.",
        "match": "Only tests whose names match (pytest -k).",
    },
    iterable=["only"],
)
def test(run: TaskRun, fast: bool = False, only: Names = None, match: str = "") -> TaskResult:
    """Run ruff, mypy and the tests, in the lab too."""
    from tests.dev import suite

    return suite.test(run, fast=fast, only=tuple(only or ()), match=match)


@command({"security": "Run bandit and pip-audit instead: pip install them where your PATH finds them."})
def lint(run: TaskRun, security: bool = False) -> TaskResult:
    """Run ruff and mypy."""
    from tests.dev import suite

    return suite.security(run) if security else suite.lint(run)


@command(
    {
        "rounds": "Rounds that medians are taken of.",
        "repositories": "Package repositories of 20,000 packages, beside aptly, reprepro, createrepo_c.",
        "warm": "Warm resets at three sizes of memory, beside cold boots, virsh and kcli.",
        "plot": "With --warm: a file for a drawing of them, as SVG.",
        "lab": "The stores and Xen, beside the bare commands, in labs; XenAPI's calls.",
        "name": "With --lab: a running lab to use; absent: one of its own, ended afterwards.",
    },
)
def bench(
    run: TaskRun,
    rounds: str = "5",
    lab: bool = False,
    name: str = "",
    repositories: bool = False,
    warm: bool = False,
    plot: str = "",
) -> TaskResult:
    """Measure clone, reset and start-up times."""
    number = options.count("--rounds", rounds)
    if lab:
        from tests.dev import labs

        return labs.bench(run, name, rounds=number)
    from tests.dev import suite

    if warm:
        return suite.bench_warm(run, rounds=number, plot=plot)
    return suite.bench(run, rounds=number, repositories=repositories)


# ---- The labs: hosts with KVM or Xen, ZFS and LVM under QEMU, for farmhand's own tests.

_LAB = "The lab's name; several can run at once."
_USUAL = " Absent: lab, or xen."
_COLD = "Boot it, instead of going on from the saved state."


@command(
    {
        "name": _LAB + _USUAL,
        "xen": "A Xen lab.",
        "cold": _COLD,
        "memory": "Its memory, such as 12G; absent: 4G. Starts from cold.",
        "disk": "The size of each spare disk, such as 100G; absent: 8G. Starts from cold.",
    },
)
def lab_up(
    run: TaskRun, name: str = "", xen: bool = False, cold: bool = False, memory: str = "", disk: str = ""
) -> TaskResult:  # fmt: skip
    """Start a lab with clean disks; its image is built once."""
    from tests.dev import labs

    run.resume = "type the same again: what is built is kept"
    return labs.up(run, name, xen=xen, cold=cold, memory=memory, disk=disk)


@command(
    {
        "name": _LAB + _USUAL,
        "xen": "The usual Xen lab.",
        "command": "A command to run there instead of a login shell.",
    },
)
def lab_ssh(run: TaskRun, name: str = "", xen: bool = False, command: str = "") -> TaskResult | None:
    """Log in to a lab as root, or run a command there."""
    from tests.dev import labs

    return labs.ssh(run, name, command, xen=xen)


@command(
    {
        "name": "A running lab to use; absent: one of its own, ended afterwards.",
        "kvm": "In the KVM lab only; with a choice of tests it is the usual one.",
        "xen": "In the Xen lab only.",
        "cold": _COLD,
        "only": "Only these test files or directories; repeatable.",
        "match": "Only tests whose names match (pytest -k).",
        "brief": "The few minutes of them that ./invoke test runs.",
        "minutes": "End a lab that hangs after so long.",
    },
    iterable=["only"],
)
def lab_test(
    run: TaskRun, name: str = "", kvm: bool = False, xen: bool = False, cold: bool = False,
    only: Names = None, match: str = "", brief: bool = False, minutes: str = "180",
) -> TaskResult:  # fmt: skip
    """Run the contract suites and the labs' own tests there."""
    from tests.dev import labs

    run.resume = "the lab is ended; what it left over is removed by the next lab command"
    most, paths = options.count("--minutes", minutes), tuple(only or ())
    return labs.test(
        run, name, kvm=kvm, xen=xen, cold=cold, only=paths, match=match, minutes=most, brief=brief
    )


@command({"name": _LAB + _USUAL, "xen": "The usual Xen lab.", "all_": "All labs of this user."})
def lab_down(run: TaskRun, name: str = "", xen: bool = False, all_: bool = False) -> TaskResult:
    """End a lab, and remove its disks."""
    from tests.dev import labs

    return labs.down(run, name, xen=xen, all_=all_)
