"""Values of ``hypervisors.api`` as JSON, for the ``frames`` they travel in.

What JSON doesn't have is an object with one key, the type's name: ``{"Path": "/dev/vg/lv"}``. Sequences
come back as tuples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import cache
from ipaddress import IPv4Address
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from host.progress import Pulse
from hypervisors import api
from hypervisors.disks.stores import StorePlace
from hypervisors.libvirt.opening import Place
from hypervisors.look import HostLook
from hypervisors.marks import is_name, moment
from hypervisors.ownership import FarmIdentity
from inventory import errors
from inventory.errors import Call, FarmhandError, remedy_of

_VALUES: Mapping[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        FarmIdentity, api.Owner, api.Template, api.Checkpoint, api.Disk, api.Leftover, api.Capacity,
        api.Foreign, api.Forward, api.Nic, api.MachineSpec, api.Machine, api.MemoryUse,
        api.FileSystem, api.KeptMemory, api.MemoryShare, api.Capabilities, api.Console, Pulse, Place,
        StorePlace, HostLook,
    )
}  # fmt: skip
_PLAIN: Mapping[str, Callable[[str], object]] = {
    "Path": Path, "IPv4Address": IPv4Address, "Power": api.Power, "datetime": moment,
}  # fmt: skip

_NAMES: Mapping[str, tuple[str, ...]] = {
    "FarmIdentity": ("name",), "Owner": ("vm",), "Foreign": ("machine",), "Template": ("name",),
    "Checkpoint": ("name",), "KeptMemory": ("checkpoint",), "Disk": ("machine",),
    "Machine": ("name",), "MachineSpec": ("name",),
}  # fmt: skip
"""What names are made of: of locks, files and messages."""


def encode(value: object) -> Any:
    """TypeError for what is no value of a driver's."""
    if isinstance(value, api.Power):  # which is a str, too
        return {"Power": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, Path):
        return {"Path": str(value)}
    if isinstance(value, IPv4Address):
        return {"IPv4Address": str(value)}
    if isinstance(value, datetime):
        return {"datetime": value.isoformat()}
    if isinstance(value, Mapping):
        return {"": {str(key): encode(item) for key, item in value.items()}}
    if isinstance(value, FarmhandError):
        known = {name: item for name, item in vars(value).items() if not name.startswith("_")}
        return {f"!{type(value).__name__}": encode(known)}
    if isinstance(value, Call):
        return {"Call": value.as_dict()}
    if is_dataclass(value) and type(value).__name__ in _VALUES:
        return {type(value).__name__: {f.name: encode(getattr(value, f.name)) for f in fields(value)}}
    raise TypeError(f"not a value of a driver's: {type(value).__name__}")


def decode(value: Any) -> Any:
    """ValueError, KeyError or TypeError for what ``encode`` never made: who speaks at the other end may
    be anybody."""
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    [(name, content)] = value.items()
    if name in _PLAIN:
        return _PLAIN[name](content)
    if name.startswith("!"):
        return _error(name[1:], decode(content))
    if name == "Call":
        return remedy_of(content)
    found = {key: decode(item) for key, item in content.items()}
    return _value(name, found) if name else found


def _value(name: str, found: Mapping[str, object]) -> object:
    hints = _hints(name)
    for field, value in found.items():
        if not _fits(value, hints[field]):
            raise TypeError(f"the {field} of a {name} is a {type(value).__name__}")
    for field in _NAMES.get(name, ()):
        if isinstance(text := found[field], str) and text and not is_name(text):
            raise ValueError(f"the {field} of a {name} is no name")
    return _VALUES[name](**found)


@cache
def _hints(name: str) -> Mapping[str, object]:
    return get_type_hints(_VALUES[name])


def _fits(value: object, hint: object) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is Literal:
        return value in parts
    if hint in (None, NoneType):
        return value is None
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool):
        return type(value) is hint
    return isinstance(value, hint) if isinstance(hint, type) else True


def _is_text(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_text, value))
    return isinstance(value, str | Call)


def _is_errors(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(e, FarmhandError) for e in value.values())


_OF_ERRORS: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("message", "what", "vm", "detail", "stderr", "build"), lambda v: _fits(v, str)),
    "remedy": _is_text,
    "argv": lambda v: _fits(v, tuple[str, ...]),
    "status": lambda v: _fits(v, int | None),
    "errors": _is_errors,
}
"""What an error may carry."""


def _error(name: str, known: Mapping[str, object]) -> FarmhandError:
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, FarmhandError)):
        raise TypeError("an error of no kind that there is")
    if not known["message"] or not all(_OF_ERRORS[key](value) for key, value in known.items()):
        raise ValueError(f"a {name} that carries what none does")
    error: FarmhandError = kind.__new__(kind)
    FarmhandError.__init__(error, str(known["message"]))
    vars(error).update(known)
    return error
