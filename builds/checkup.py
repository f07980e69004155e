"""What a cycle needs, looked at beforehand: its source, and the tools of its steps. For ``doctor``,
``demo`` and ``clone-farm --plan``.

Nothing is fetched, nothing written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builds.plan import source_place
from builds.source import mask, resolve, secret_of
from builds.step_kind import steps_of
from host.check import Check, install
from host.paths import FarmPaths
from host.run import Runner, which
from inventory.errors import CommandFailed, FarmhandError, TimedOut
from inventory.loader import load
from inventory.model import Farm
from inventory.values import is_directory
from provision.checkup import CheckReport
from provision.engine.report import Action, Outcome, R

_PATIENCE = 10.0  # seconds for a URL


def with_source(report: CheckReport, farm_file: Path, *, ask: bool) -> CheckReport:
    """The report, with what there is to say of the farm's source and steps. ``ask``: whether to ask a
    URL, which may take seconds. A farm file that can't be read adds nothing here: the report has it
    already."""
    try:
        farm = load(farm_file)
    except FarmhandError:
        return report
    found = (check for check in (examine(farm, ask=ask), _tools(farm)) if check)
    return CheckReport((*report.checks, *found))


def _tools(farm: Farm) -> Check | None:
    """Tools of the cycle's steps that must be here; none if they need none."""
    steps = steps_of(farm.cycle) if farm.cycle else ()
    wanted = sorted({tool for step in steps for tool in step.TOOLS})
    if farm.cycle and farm.cycle.package_cache:
        from builds.package_cache import PROGRAM

        wanted.append(PROGRAM)
    if not wanted:
        return None
    missing = [tool for tool in wanted if which(tool) is None]
    if not missing:
        return Check("step tools", True, "needed", ", ".join(wanted))
    text = f"{', '.join(missing)} not found, which the cycle's steps need"
    return Check("step tools", False, "needed", text, install(" ".join(missing)))


def noted(farm: Farm, outcome: Outcome[R]) -> Outcome[R]:
    """The plan, with a note if the source is broken: otherwise only the cycle would find that."""
    found = examine(farm, ask=False)
    if found is None or found.ok:
        return outcome
    return replace(outcome, actions=(*outcome.actions, Action("note", "", f"source: {found.text}")))


def examine(farm: Farm, *, ask: bool) -> Check | None:
    """Whether the source is there, is a git repository, and has the revision; None without a source. A
    URL that doesn't answer from here is a note at most: it is the VM that must reach it."""
    source = farm.source
    if source is None:
        return None
    if not is_directory(source.place):
        return _url(farm, source.place, source.revision, ask=ask)
    try:
        found = resolve(
            Runner(changes=False),
            source.place,
            source.revision,
            base=farm.path.parent,
            sources=FarmPaths(farm.farm).root / "sources",
            snapshot=False,
        )
    except FarmhandError as error:
        text = f"{source_place(farm)}: {error.message}"
        return Check("source", False, "needed", text, error.remedy or "correct it in the farm file")
    at = f"{found.asked} is {found.short}" if found.commit else "no git repository: built as it is now"
    return Check("source", True, "needed", f"{found.shown}: {at}")


def _url(farm: Farm, url: str, revision: str, *, ask: bool) -> Check:
    if not ask:
        return Check("source", True, "note", f"{mask(url)}: not asked")
    env = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=5"}
    quiet = Runner(changes=False, secrets=[secret_of(url)])
    try:
        answer = quiet.read("git", "ls-remote", "--", url, revision, env=env, timeout=_PATIENCE)
    except TimedOut:
        why = f"no answer within {_PATIENCE:g} s"
    except CommandFailed as error:
        why = (error.stderr.strip().splitlines() or [error.message])[0]
    except FarmhandError as error:
        why = error.message
    else:
        known = "" if answer.stdout else f", but has no branch or tag {revision}: the VM looks it up"
        return Check("source", True, "note", f"{mask(url)} answers{known}")
    return Check(
        "source",
        False,
        "note",
        f"{source_place(farm)}: {mask(url)} can't be reached from here: {why}",
        f"right if the VM reaches it all the same; else: git ls-remote {mask(url)}",
    )
