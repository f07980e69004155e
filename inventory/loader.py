"""A farm file, loaded: text to tree to model, and every problem with its line and column, all at once.

The model is asked again and again, each time without what it has refused, until it accepts the rest:
so one mistake doesn't hide another, and what concerns several parts of the file (``inventory.checks``)
is looked at even when something else is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inventory.autobuild import default_cycle, default_steps
from inventory.checks import check
from inventory.collector import without_collector
from inventory.engine import ValidationError
from inventory.errors import InventoryError, Problem
from inventory.model import Farm
from inventory.places import Places
from inventory.reading import MAX_BYTES, read, resolve
from inventory.validation import validated
from inventory.yamltree import parse, plain

__all__ = ["default_cycle", "load", "loads", "place", "places", "resolve"]

_ROUNDS = 50  # each takes at least one thing away; real files need three


def load(path: Path) -> Farm:
    """The farm in this file. Its ``cycle`` is the Autobuild cycle where the file has none and there are
    dev2, prod and a source.

    NotFound: no such file. InventoryError: all that is wrong with it."""
    return loads(read(path), path)


def loads(data: bytes, path: Path) -> Farm:
    """The farm in these bytes, as if they were that file's. InventoryError as of ``load``."""
    with without_collector():
        return _loads(data, path)


def _loads(data: bytes, path: Path) -> Farm:
    tree, problems = parse(data, str(path))
    if tree is None:
        raise InventoryError(problems)
    content = plain(tree)
    if _wants_default_cycle(content):
        content["cycle"] = default_steps("dev2", "prod")
    places = Places(tree, str(path))
    farm = None if problems else _accepted(content)
    if farm is None:
        farm = _accepted_in_parts(content, places, problems)
    else:
        problems += check(farm, places)
    if problems:
        raise InventoryError(tuple(dict.fromkeys(problems)))
    assert farm is not None
    if "cycle" not in tree.values:
        farm = _without_refused(farm)
    return farm.at(path.absolute())


def place(farm: Farm, *path: str | int) -> str:
    """Where in the farm file something stands, such as ``farm.yaml:42:15``, for messages about what is
    found wrong later. It reads the file again; if it can't, it returns the file's name alone."""
    return places(farm, [path])[0]


def places(farm: Farm, paths: Sequence[tuple[str | int, ...]]) -> tuple[str, ...]:
    """As ``place``, of several: the file is read once."""
    try:
        data = farm.path.read_bytes()[: MAX_BYTES + 1]
    except OSError:
        return (str(farm.path),) * len(paths)
    tree, _ = parse(data, str(farm.path))
    if tree is None:
        return (str(farm.path),) * len(paths)
    spots = (Places(tree, str(farm.path)).of_value(path) for path in paths)
    return tuple(f"{farm.path}:{line}:{column}" for line, column in spots)


def _wants_default_cycle(content: dict[str, Any]) -> bool:
    vms = content.get("vms")
    return (
        "cycle" not in content
        and "source" in content
        and isinstance(vms, dict)
        and "dev2" in vms
        and "prod" in vms
    )


def _without_refused(farm: Farm) -> Farm:
    """The farm without those steps of the default cycle that its VMs can't have: they are done by hand.
    The Autobuild paper has it that VMs without a reset command are reset "manually or by an own
    script"."""
    if farm.cycle is None:
        return farm
    steps = tuple(step for step in farm.cycle.steps if step.refusal(farm) is None)
    return replace(farm, cycle=replace(farm.cycle, steps=steps))


def _accepted(content: dict[str, Any]) -> Farm | None:
    try:
        return validated(content)
    except ValidationError:
        return None


def _accepted_in_parts(content: dict[str, Any], places: Places, problems: list[Problem]) -> Farm | None:
    """As much of the farm as is valid; None if nothing is. The problems of the model and of the checks
    are added to ``problems``."""
    from inventory.explain import Pruner

    pruner = Pruner(content, places)
    told = {(problem.line, problem.column) for problem in problems}
    farm = None
    for _ in range(_ROUNDS):
        try:
            farm = validated(pruner.content)
            break
        except ValidationError as error:
            if not pruner.prune(error):
                break
    found = pruner.problems + (check(farm, places) if farm else [])
    problems += [problem for problem in found if (problem.line, problem.column) not in told]
    if farm is None and not problems:
        problems.append(Problem(places.file, 1, 1, "this is not a farm file"))
    return farm
