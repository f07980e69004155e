"""All that a farm says, value by value, with defaults: each with its path in the file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path as FilePath
from typing import Any

from inventory.base import Model
from inventory.model import Farm
from inventory.places import Path
from inventory.sizes import format_duration, format_size
from inventory.values import is_directory, is_public_key

_DURATIONS = ("Seconds", "LeaseTime", "TimeToLive", "TimeLimit")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value that isn't a section. ``path``: of the file. ``key``: the same with names in place of
    numbers, so that it is the same thing in another file. ``kind``: its annotation."""

    path: Path
    key: Path
    kind: str
    value: object

    def __str__(self) -> str:
        """As a farm file could say it, but for secrets."""
        return self.shown(_written(self.value, self.kind))

    def shown(self, text: str) -> str:
        """What the file says there, without what may be a secret in URLs; of a webhook its server
        alone."""
        if self.path[0] == "events" and self.path[-1] == "webhook":
            return re.sub(r"(://[^/]*/).+", r"\1…", text)
        return re.sub(r"(://[^\s?]*\?)\S+", r"\1…", re.sub(r"(://)[^/\s]*@", r"\1…@", text))


def leaves(farm: Farm) -> Iterator[Leaf]:
    """All of the farm, in the model's order. Of sections that are absent: nothing."""
    yield from _of(farm, (), ())


def _of(section: Model, path: Path, key: Path) -> Iterator[Leaf]:
    for field in fields(section):
        value, name = getattr(section, field.name), section.key_of(field.name)
        yield from _found(value, str(field.type), (*path, name), (*key, name))


def _found(value: Any, kind: str, path: Path, key: Path) -> Iterator[Leaf]:
    if isinstance(value, Model):
        yield from _of(value, path, key)
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from _found(one, kind, (*path, name), (*key, name))
    elif isinstance(value, tuple) and value and all(isinstance(one, Model) for one in value):
        for number, one in enumerate(value):
            # steps are the same step by their name; what else has names may get others
            name = one.name if path == ("cycle", "steps") else number
            yield from _of(one, (*path, number), (*key, name))
    elif value is not None and not (value == () and kind.startswith("tuple[")):  # no sections
        yield Leaf(path, key, kind, value)


def _written(value: object, kind: str) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_written(one, kind) for one in value)}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "Size" in kind:
        return format_size(value)
    if isinstance(value, int | float) and any(name in kind for name in _DURATIONS):
        return format_duration(value)
    return str(value)


def relative_paths(farm: Farm) -> Iterator[tuple[Path, str]]:
    """What is a path relative to the farm file: where it stands, and the absolute one."""
    for leaf in leaves(farm):
        many = leaf.value if isinstance(leaf.value, tuple) else (leaf.value,)
        for number, value in enumerate(many):
            path = (*leaf.path, number) if isinstance(leaf.value, tuple) else leaf.path
            if _is_relative(leaf.path, number, value):
                yield path, str(farm.path.parent / str(value))


def placed(leaf: Leaf, farm: Farm) -> object:
    """Its value, with paths that are relative to the farm file made absolute."""

    def one(number: int, value: object) -> object:
        relative = _is_relative(leaf.path, number, value)
        return str(farm.path.parent / str(value)) if relative else value

    if isinstance(leaf.value, tuple):
        return tuple(one(number, value) for number, value in enumerate(leaf.value))
    found = one(0, leaf.value)
    return str(found) if isinstance(found, FilePath) else found


def _is_relative(path: Path, number: int, value: object) -> bool:
    return _is_path(path, number, value) and not str(value).startswith(("/", "~"))


def _is_path(path: Path, number: int, value: object) -> bool:
    match path:
        case ("source", "repository"):
            return is_directory(str(value)) and not str(value).startswith("file:")
        case ("ssh", "authorized_keys") | ("ssh", "users", _):
            return not is_public_key(str(value))
        case ("events", _, "command"):
            return number == 0 and "/" in str(value)
    return isinstance(value, FilePath)
