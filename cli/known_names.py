"""Names that a farm or farmhand has, for words that may be one and for completion: from files, asking
nobody."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from inventory.errors import FarmhandError

if TYPE_CHECKING:
    from inventory.model import Farm


def _steps(farm: Farm) -> Collection[str]:
    cycle = farm.cycle
    if cycle is None and {"dev2", "prod"} <= farm.vms.keys():
        from inventory.autobuild import default_cycle

        cycle = default_cycle()
    return [step.name for step in cycle.steps] if cycle else ()


_OF: dict[str, Callable[[Farm], Collection[str]]] = {
    "vm": lambda farm: farm.vms,
    "cycle only": _steps,
    "cycle from": _steps,
    "log step": _steps,
    "template-build name": lambda farm: farm.templates,
    "template-import name": lambda farm: farm.templates,
    "service": lambda farm: farm.services.used,
    "repo": lambda farm: farm.repositories,
}
_BEGINNINGS: dict[str, Callable[[Farm], Collection[str]]] = {
    "cp path": lambda farm: [f"{vm}:" for vm in farm.vms],
    "template-remove template": lambda farm: [f"{name}@" for name in farm.templates],
}


def known_names(task: str, flag: str, farm: str) -> Collection[str] | None:
    """What a flag's value can be, by the flag or by task and flag. None where the file can't be read, or
    doesn't tell. ``farm``: as --farm has it; "": the usual one."""
    if (task, flag) == ("new", "kind"):
        from builds.new_farm import KINDS

        return KINDS
    return _told(_OF.get(f"{task} {flag}") or _OF.get(flag), task, farm)


def beginnings(task: str, flag: str, farm: str) -> Collection[str]:
    """What a flag's value can begin with, where the farm file tells no more: ``build:``, ``base@``."""
    return _told(_BEGINNINGS.get(f"{task} {flag}"), task, farm) or ()


def _told(of: Callable[[Farm], Collection[str]] | None, task: str, farm: str) -> Collection[str] | None:
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
