"""Names that a farm has, for words that may be one and for completion: from its file, asking nobody."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from inventory.errors import FarmhandError

if TYPE_CHECKING:
    from inventory.model import Farm

_OF: dict[str, Callable[[Farm], Collection[str]]] = {
    "vm": lambda farm: farm.vms,
    "only": lambda farm: [step.name for step in farm.cycle.steps] if farm.cycle else (),
    "template-build name": lambda farm: farm.templates,
    "template-import name": lambda farm: farm.templates,
}
_OF["from"] = _OF["only"]


def known_names(task: str, flag: str, farm: str) -> Collection[str] | None:
    """What a flag's value can be, by the flag or by task and flag. None where the file can't be read, or
    doesn't tell. ``farm``: as --farm has it; "": the usual one."""
    of = _OF.get(f"{task} {flag}") or _OF.get(flag)
    if of is None:
        return None
    from cli import composition  # noqa: F401 - before a farm file is read
    from cli.run import TaskRun
    from host.paths import cache_dir
    from provision.farm_cache import known_farm

    try:
        path = TaskRun(task, farm, json=False, plan=False).farm_file()
        return of(known_farm(path, cache_dir(), keep=False))
    except FarmhandError:
        return None
