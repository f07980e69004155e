"""The task that writes a project's farm file."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cli import terminal
from cli.command import command
from cli.run import TaskResult, TaskRun
from inventory.errors import Call, NotFound, Text, UsageError, did_you_mean
from inventory.values import check_label, is_directory

if TYPE_CHECKING:
    from builds.new_farm import ProjectNeeds


@command(
    {
        "source": "What is built: the project's directory on this machine, or a git URL.",
        "kind": "How: deb, rpm, make or autobuild. Absent: as the directory has it.",
        "name": "The farm's name. Absent: the project's.",
        "test": "The cycle's last step: a script that shows, where it was installed, that it works.",
        "out": "The file; what is there is never overwritten.",
    },
    plans=True,
)
def new(
    run: TaskRun,
    source: str = "",
    kind: str = "",
    name: str = "",
    test: str = "",
    out: str = "farm.yaml",
) -> TaskResult:
    """Write a farm file for a project, from flags or by asking."""
    from builds.new_farm import KINDS, farm_text, in_the_way, write_new
    from builds.source import name_of

    path = Path(out).expanduser().absolute()
    if os.path.lexists(path) and not run.plan:
        raise in_the_way(path)
    answers = sys.stdin.isatty() and sys.stderr.isatty() and not run.json
    asks = answers and not source
    if asks:
        source = terminal.asked("The project: a directory, or a git URL", ".")
    if not source:
        raise UsageError("which project?", remedy="--source DIRECTORY, or a git URL")
    place, others = source, dict[str, "ProjectNeeds"]()
    if is_directory(source):
        place, others = _directory(source)
    if not kind and (asks or not others):
        kind = _ask_kind(list(others), answers)
    kind = kind or next(iter(others))
    if kind not in KINDS:
        raise UsageError(
            f"--kind: there is no kind {kind!r}", remedy=did_you_mean(kind, KINDS, f"{', '.join(KINDS)}")
        )
    likely = re.sub(r"[^a-z0-9-]+", "-", name_of(place, Path.cwd()).lower())[:40].strip("-") or "farm"
    if not name and asks:
        name = terminal.asked("The farm's name", likely)
    name = name or likely
    target = KINDS[kind].target
    if test and not target:
        raise UsageError(
            f"--test: the steps of kind {kind} are farmhand's own",
            remedy="leave it out; rpms/prod.spec may have a %check",
        )
    if not test and asks and target:
        test = terminal.asked(
            "A command that shows, once it is installed, that it works, if there is one", ""
        )
    try:
        check_label(name)
    except ValueError as error:
        raise UsageError(f"--name: {error}", remedy="--name ANOTHER") from None
    text = farm_text(name, KINDS[kind], others.get(kind, KINDS[kind].without), place, path, test=test)
    data = {"farm": name, "kind": kind, "source": place, "out": str(path), "text": text}
    if run.plan:
        return TaskResult(data, text)
    write_new(path, text)
    return TaskResult(data, _next(path, kind, [other for other in others if other != kind]))


def _directory(source: str) -> tuple[str, dict[str, ProjectNeeds]]:
    """A project's directory, and what it can be built as."""
    from builds.new_farm import kinds_of
    from builds.source import directory_of

    directory = directory_of(source, Path.cwd())
    if not directory.is_dir():
        raise NotFound(f"--source: there is no directory {directory}", remedy="--source DIRECTORY")
    return str(directory), kinds_of(directory)


def _ask_kind(found: list[str], answers: bool) -> str:
    from builds.new_farm import KINDS

    if answers:
        for name, kind in KINDS.items():
            sys.stderr.write(f"  {name:<10} {kind.what}\n")
        return terminal.asked("How it is built", found[0] if found else "make")
    raise UsageError(
        "it has no debian/, spec file or Makefile that says how it is built",
        remedy=f"--kind {', '.join(KINDS)}",
    )


def _next(path: Path, kind: str, others: list[str]) -> Text:
    also = f" (--kind {' or '.join(others)} would fit, too)" if others else ""
    here = path == Path.cwd() / "farm.yaml"
    more = {} if here else {"farm": str(path)}
    return (
        f"{path} written: kind {kind}{also}; go on with\n  ",
        Call("clone-farm", **more),
        "\n  ",
        Call("cycle", **more),
    )
