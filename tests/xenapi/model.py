"""XenAPI's data model, as the server holds a caller to it: calls, their arity and types, errors and
their parameters."""

from __future__ import annotations

import json
import re
import xmlrpc.client
from pathlib import Path
from typing import Any

NULL = "OpaqueRef:NULL"
NEVER = "19700101T00:00:00Z"
_DATA = json.loads(Path(__file__).with_name("datamodel.json").read_text(encoding="utf-8"))
CALLS, CLASSES, ENUMS = _DATA["calls"], _DATA["classes"], _DATA["enums"]
# Names that a real server answers with and the generated table lacks, as measured (VM_IS_SNAPSHOT); and
# the storage's own, by their numbers: no room, not there, no such size.
ERRORS = _DATA["errors"] | {
    "VM_IS_SNAPSHOT": ["vm", "operation"],
    **{f"SR_BACKEND_FAILURE_{number}": ["status", "output", "error"] for number in (44, 46, 79)},
}


class Failure(Exception):
    """An answer with Status Failure. The code must be one that XenAPI has, with its parameters."""

    def __init__(self, code: str, *parameters: str) -> None:
        assert code in ERRORS, f"XenAPI has no error {code}"
        declared = ERRORS[code]
        assert len(parameters) == len(declared), f"{code} has {declared}, not {parameters}"
        self.description = [code, *map(str, parameters)]
        super().__init__(str(self.description))


class Ref(str):
    """So that a reference is told from a text."""

    __slots__ = ()


def check(kind: str, value: Any, name: str) -> Any:
    """The value as the server keeps it; FIELD_TYPE_ERROR [field]. Integers come as decimal strings, as
    XenAPI has them."""
    wrong = Failure("FIELD_TYPE_ERROR", name)
    if match := re.fullmatch(r"\((.+?) -> (.+)\) map", kind):
        if not isinstance(value, dict):
            raise wrong
        return {check(match[1], k, name): check(match[2], v, name) for k, v in value.items()}
    if kind.endswith(" set"):
        if not isinstance(value, list | tuple):
            raise wrong
        return [check(kind.removesuffix(" set"), item, name) for item in value]
    if kind.endswith(" ref"):
        if not isinstance(value, str):
            raise wrong
        return Ref(value)
    if kind.startswith("enum "):
        known = ENUMS[kind.removeprefix("enum ")]
        if value not in known:
            raise wrong
        return value
    if kind.endswith(" record"):
        return _record(kind.removesuffix(" record"), value, wrong)
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, str):
            raise wrong
        if not re.fullmatch(r"-?\d+", str(value)):
            raise wrong
        return int(value)
    if kind == "float":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong
        return float(value)
    plain = {"string": str, "bool": bool, "datetime": xmlrpc.client.DateTime}
    if not isinstance(value, plain[kind]):
        raise wrong
    return value


def _record(class_: str, value: Any, wrong: Failure) -> dict[str, Any]:
    """A constructor's argument: fields without a default must be there, others may."""
    if not isinstance(value, dict):
        raise wrong
    made = {}
    for field, (kind, qualifier, default) in CLASSES[class_].items():
        if field in value and qualifier != "RO/runtime":
            made[field] = check(kind, value[field], field)
        elif qualifier != "RO/runtime" and default is None:
            raise Failure("INTERNAL_ERROR", f"{class_}.create: field {field} is missing")
    return made


def empty(class_: str) -> dict[str, Any]:
    """A record with each field's default, or what stands for nothing in its type."""
    made: dict[str, Any] = {}
    for field, (kind, _, default) in CLASSES[class_].items():
        made[field] = _nothing(kind, default)
    return made


def _nothing(kind: str, default: str | None) -> Any:
    if kind.endswith(" map"):
        return {}
    if kind.endswith(" set"):
        return []
    if kind.endswith(" ref"):
        return Ref(NULL)
    if kind.startswith("enum "):
        known = ENUMS[kind.removeprefix("enum ")]
        return default if default in known else known[0]
    match kind:
        case "int":
            return int(default or 0)
        case "float":
            return float(default or 0)
        case "bool":
            return default == "true"
        case "datetime":
            return NEVER
    return (default or "").strip('"')


def on_the_wire(kind: str, value: Any, *, json_: bool = False) -> Any:
    """As it is sent: integers as strings (numbers in JSON), times as dateTime.iso8601."""
    if match := re.fullmatch(r"\((.+?) -> (.+)\) map", kind):
        return {str(k): on_the_wire(match[2], v, json_=json_) for k, v in value.items()}
    if kind.endswith(" set"):
        return [on_the_wire(kind.removesuffix(" set"), item, json_=json_) for item in value]
    if kind.endswith(" record") and kind.removesuffix(" record") in CLASSES:
        fields = CLASSES[kind.removesuffix(" record")]
        return {f: on_the_wire(fields[f][0], v, json_=json_) for f, v in value.items()}
    if kind == "int":
        return int(value) if json_ else str(value)
    if kind == "datetime":
        return str(value) if json_ else xmlrpc.client.DateTime(str(value))
    if kind == "void":
        return ""
    return str(value) if isinstance(value, Ref) else value


def arity(name: str, given: int) -> None:
    parameters = CALLS[name]["params"]
    required = sum(1 for p in parameters if p[2])
    if not required <= given <= len(parameters):
        raise Failure("MESSAGE_PARAMETER_COUNT_MISMATCH", name, str(required), str(given))
