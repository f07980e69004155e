"""What a cycle's steps do, in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli.run import TaskResult
from host.printable import printable
from inventory.sizes import format_duration, format_size

if TYPE_CHECKING:
    from builds.step_kind import StepKind
    from provision.site import Site


def explained(site: Site) -> TaskResult:
    """Each step with its whole scripts, and what scripts get. Only the farm file is looked at."""
    from builds.plan import cycle_of
    from builds.scripts import VARIABLES
    from builds.step_kind import steps_of

    cycle = cycle_of(site)
    every = steps_of(cycle)
    steps = [_step(site, step) for step in every]
    blocks = [
        "\n".join([f"{number}. {step.name} ({', '.join(step.vms)}): {step.does()}", *_how(site, step)])
        for number, step in enumerate(every, 1)
    ]
    if any(step.scripts for step in every):
        width = max(map(len, VARIABLES))
        lines = [f"  {name:<{width}}  {what}" for name, what in VARIABLES.items()]
        limits = (
            f"{key} {format_size(most) if key.endswith('size') else most}"
            for key, most in vars(cycle.limits).items()
        )
        blocks += [
            "\n".join(["Each script's environment, beside what its login has:", *lines]),
            f"Limits, where a step has no others: {', '.join(limits)}.",
        ]
    data = {"steps": steps, "variables": dict(VARIABLES), "limits": vars(cycle.limits)}
    return TaskResult(data, "\n\n".join(blocks))


def _step(site: Site, step: StepKind) -> dict[str, object]:
    found: dict[str, object] = {
        "name": step.name, "kind": step.KIND, "vms": list(step.vms), "does": step.does(),
        "seconds": step.timeout, **step.details(),
    }  # fmt: skip
    if step.scripts:
        from builds.scripts import DIRECTORY, SHELL

        found |= {
            "user": _user(site, step), "shell": SHELL, "directory": DIRECTORY,
            "scripts": list(step.scripts),
        }  # fmt: skip
    return found


def _how(site: Site, step: StepKind) -> list[str]:
    if not step.scripts:
        return []
    from builds.scripts import DIRECTORY, SHELL

    limit = format_duration(step.timeout)
    lines = [f"   as {_user(site, step)}, by {SHELL}, in {DIRECTORY}; killed after {limit}"]
    for number, script in enumerate(step.scripts, 1):
        if len(step.scripts) > 1:
            lines.append(f"   script {number} of {len(step.scripts)}:")
        lines += (f"     {printable(line)}".rstrip() for line in script.rstrip("\n").split("\n"))
    return lines


def _user(site: Site, step: StepKind) -> str:
    return "root" if step.needs_root else site.farm.ssh.user
