"""What a VM's checkpoint ``clean`` is: its template, or its template with tools, as the task ``clean``
made it.

A store's own ``clean`` is the template, and stays so. One with tools is a checkpoint called
clean-NUMBER-of-TEMPLATE-GENERATION: of the generation that the disk is on, the one with the highest
number is what the VM's ``clean`` means. So it becomes that in one step, the store's, which makes
checkpoints whole or not at all; it is found also where the farm's state is lost; and a VM that moves to
another generation has that one's own ``clean`` from the same step on.

What was added is in a file of the farm's state, which names the very checkpoint that it is of. Where
that is lost, nobody knows any more what was added, but that something was."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from host.documents import Malformed, json_object, made, read_file
from host.files import own_directory, remove, write_atomic
from host.paths import FarmPaths
from host.printable import as_json
from hypervisors.api import CLEAN, Checkpoint, Disk
from inventory.errors import Call, some
from provision.engine.facts import Facts

BEFORE = "before-"
"""Begins the name of the state that is kept until a new ``clean`` has answered."""
_RESERVED = re.compile(rf"(?:{BEFORE})?{CLEAN}-[0-9]+-of-.+")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTools(Facts):
    """What a ``clean`` has beside its template. ``checkpoint``, ``id``: the very checkpoint that it is
    of. ``asked``: packages, as they were asked for. ``packages``: those that came, also as what they
    need, each "NAME VERSION ARCHITECTURE" as dpkg or rpm tells. ``script``: the file's name;
    ``script_sha256``: of what it was. ``made``: ISO 8601, UTC. ``by``: who asked for it."""

    checkpoint: str
    id: str
    template: str
    asked: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    script: str = ""
    script_sha256: str = ""
    made: str = ""
    by: str = ""

    @property
    def words(self) -> str:
        """Such as "ccache, git, and what ca.sh did"; "" where nothing was added."""
        return wanted_words(self.asked, self.script)


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanState:
    """``checkpoint``: the name that the store has for it. ``tools``: None where it is the template's
    own, or nobody knows."""

    checkpoint: str
    template: str
    tools: AddedTools | None = None

    @property
    def words(self) -> str:
        """What it is, such as "base@1 with ccache, git"."""
        if self.tools is not None:
            return " with ".join(filter(None, (self.template, self.tools.words)))
        if self.checkpoint == CLEAN:
            return self.template
        return f"{self.template} with tools that nobody knows any more"

    @property
    def added(self) -> bool:
        """Whether it is more than its template, for all that is known."""
        return self.checkpoint != CLEAN and (self.tools is None or bool(self.tools.words))

    def again(self, vm: str) -> Call:
        """How the same tools are added once more."""
        tools = self.tools
        if tools is None:
            return Call("clean", vm=vm, packages="NAME")
        return Call("clean", vm=vm, packages=",".join(tools.asked) or None, script=tools.script or None)


def wanted_words(packages: Sequence[str], script: str) -> str:
    """Packages and a script's file, in words."""
    did = f"what {Path(script).name} did" if script else ""
    return ", and ".join(filter(None, (some(packages), did)))


def is_reserved(name: str) -> bool:
    """Whether only the task ``clean`` gives that name to checkpoints."""
    return bool(_RESERVED.fullmatch(name))


def is_made_for(name: str, template: str) -> bool:
    """Whether the task ``clean`` made it of that generation: a ``clean``, or the state before one."""
    return _number(name.removeprefix(BEFORE), template) > 0


def clean_of(checkpoints: Sequence[Checkpoint], template: str) -> str:
    """The name that the store has for what ``clean`` means, of a disk on that generation."""
    found = [kept.name for kept in checkpoints if _number(kept.name, template)]
    return max(found, key=lambda name: _number(name, template), default=CLEAN)


def next_clean(disk: Disk) -> str:
    """The name for another one."""
    names = [kept.name.removeprefix(BEFORE) for kept in disk.checkpoints]
    number = max((_number(name, disk.template) for name in names), default=0) + 1
    return f"{CLEAN}-{number}-of-{_plain(disk.template)}"


def clean_state(paths: FarmPaths, vm: str, disk: Disk) -> CleanState:
    """What the VM's ``clean`` is now. A quick look; a file is read only where tools were added."""
    name = clean_of(disk.checkpoints, disk.template)
    return CleanState(
        checkpoint=name, template=disk.template, tools=added_tools(paths, vm, disk.checkpoints, name)
    )


def added_tools(
    paths: FarmPaths, vm: str, checkpoints: Sequence[Checkpoint], name: str
) -> AddedTools | None:
    """What the checkpoint of that name has beside its template. None where it is none that the task
    ``clean`` made, or nobody knows any more."""
    kept = next((one for one in checkpoints if one.name == name and is_reserved(name)), None)
    if kept is None:
        return None
    try:
        tools = made(AddedTools, json_object(read_file(_file(paths, vm))))
        if datetime.fromisoformat(tools.made).tzinfo is None:
            return None
    except (OSError, Malformed, ValueError):
        return None
    return tools if (tools.checkpoint, tools.id) == (kept.name, kept.id) else None


def note_tools(paths: FarmPaths, vm: str, tools: AddedTools) -> None:
    """Keep it. NoSpace, WrongState if the disk refuses."""
    own_directory(_directory(paths), mode=0o700)
    write_atomic(_file(paths, vm), (as_json(dataclasses.asdict(tools), indent=1) + "\n").encode())


def tools_log(paths: FarmPaths, vm: str) -> Path:
    """The log of what was done last to make the VM's ``clean``."""
    return _directory(paths) / f"{vm}.log"


def rename_tools(paths: FarmPaths, vm: str, to: str) -> None:
    """Give what is kept of a VM to another, which has none. Safe to do again, or the other way round."""
    for old, new in ((_file(paths, vm), _file(paths, to)), (tools_log(paths, vm), tools_log(paths, to))):
        with contextlib.suppress(FileNotFoundError):
            old.replace(new)


def forget_tools(paths: FarmPaths, vm: str) -> None:
    """Of a VM that is destroyed."""
    remove(_file(paths, vm))
    remove(tools_log(paths, vm))


def _directory(paths: FarmPaths) -> Path:
    return paths.root / "tools"


def _file(paths: FarmPaths, vm: str) -> Path:
    return _directory(paths) / f"{vm}.json"


def _plain(template: str) -> str:
    return template.replace("@", "-")


def _number(name: str, template: str) -> int:
    """Of a ``clean`` of that generation; 0: it is none."""
    found = re.fullmatch(rf"{CLEAN}-([1-9][0-9]{{0,8}})-of-{re.escape(_plain(template))}", name)
    return int(found[1]) if found else 0
