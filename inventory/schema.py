"""The JSON Schema for editors, the reference page, and what farm files are validated by: all made from
the model.

``python -m cli.schema`` writes them again: inventory/farm.schema.json, docs/inventory.md,
inventory/farm.core.json.
"""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import MISSING, fields
from functools import cache
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import inventory.model as model_module
from inventory import kinds
from inventory.annotations import adapter
from inventory.base import Model
from inventory.hosts import DEFAULT_DRIVER, host_section
from inventory.model import Farm, step_section
from inventory.services import section_named
from inventory.sizes import format_duration, format_size
from inventory.subscribers import subscriber_section
from inventory.validation import CLASS, CORE_FILE, DEFAULT, FUNCTION, SECTION, stands_for

SCHEMA_FILE = Path(__file__).with_name("farm.schema.json")
REFERENCE_FILE = Path(__file__).parent.parent / "docs" / "inventory.md"

_SECTIONS = (
    ("DiskStore", "hosts.NAME.disks"),
    ("Network", "network"),
    (kinds.ALL_SERVICES, "services"),
    *((place.rpartition(":")[2], f"services.{name}") for name, place in kinds.services.items()),
    ("TemplateSource", "templates.NAME"),
    ("Boot", "templates.NAME.boot"),
    ("Ssh", "ssh"),
    ("Vm", "vms.NAME"),
    ("Proxy", "vms.NAME.proxy[]"),
    ("Source", "source"),
    ("Cycle", "cycle"),
    ("Limits", "cycle.limits"),
    ("CycleLock", "cycle.lock"),
    *((step_section(name).__name__, f"cycle.steps[]: {name}") for name in kinds.steps),
    ("StepLimits", "cycle.steps[].limits"),
    ("PackageRepository", "repositories.NAME"),
    ("RepositoryKey", "repositories.NAME.signing[]"),
    ("PromotionRule", "repositories.NAME.promotions[]"),
    ("PackageSource", "packages.NAME"),
    ("Download", "packages.NAME.downloads[]"),
    ("PackageBuilds", "build"),
    ("ClonedBuilders", "build.cloned"),
)
_INTRODUCTION = """\
# Farm files

<!-- Made from the model, inventory/model.py, by `python -m cli.schema`: change it there. -->

A farm is one YAML file. `inventory/default.yaml` is a short one, commented; `--farm PATH` chooses
another. Editors that know `farm.schema.json` complete and check it while you type: the files in
`inventory/` name it in their first line.

YAML is read without its surprises. Every value is text until its key says what it is, so a MAC address
needs no quotes, `022` is refused instead of being 18, and `on` is `yes` only where yes or no is meant.
Duplicate keys, unknown keys, tags and merge keys are refused; aliases are fine. All mistakes in a file
are told at once, each with its line and column.

- A **size** is bytes, or a number with K, M, G or T, powers of 1024: `512M`, `1.5G`.
- A **duration** is seconds, or a number with s, m, h or d: `90s`, `1h30m`.
- **Yes or no** is also `true`, `false`, `on`, `off`.
- A **path** is relative to the farm file, or begins with `~`.
- Where a **list** is expected, it is written `[a, b]` or one item a line. One text
  will do for a list of texts.
"""


def _sections() -> dict[str, str]:
    """Where each section stands in a file, by its class's name, in the order of the reference page."""
    hosts = {host_section(driver).__name__: f"hosts.NAME, driver {driver}" for driver in kinds.hosts}
    told = {subscriber_section(kind).__name__: f"events.NAME, {kind}" for kind in kinds.subscribers}
    return {"Farm": "The file", **hosts, **dict(_SECTIONS), **told}


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a farm file. Numbers may stand for text and text for numbers,
    as people write it."""
    schema: dict[str, Any] = adapter(Farm).json_schema(by_alias=True)
    definitions = schema.pop("$defs")
    places = _sections()
    for name, definition in (*definitions.items(), ("Farm", schema)):
        kind = _section(name)
        documents = _documents(kind)
        definition["description"] = documents[""]
        definition["title"] = places[name]
        for field in fields(kind):
            key = kind.key_of(field.name)
            value = _written(definition["properties"][key])
            value["description"] = documents[field.name]
            definition["properties"][key] = value
    for driver in kinds.hosts.keys() - {DEFAULT_DRIVER}:  # which it says for itself
        definition = definitions[host_section(driver).__name__]
        definition["required"] = ["driver", *definition.get("required", [])]
    steps = definitions["Cycle"]["properties"]["steps"]
    # Which keys a step has decides; the schema's discriminator has no words for that.
    steps["items"] = {
        "anyOf": [{"$ref": f"#/$defs/{step_section(name).__name__}"} for name in kinds.steps]
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "$defs": dict(sorted(definitions.items())),
    }


def reference_markdown() -> str:
    """The text of docs/inventory.md: every key, what it takes, its default, what it means."""
    schema = json_schema()
    parts = [_INTRODUCTION]
    for name, where in _sections().items():
        definition = schema if name == "Farm" else schema["$defs"][name]
        parts.append(f"## {where}\n\n{_one_line(definition['description'])}\n")
        rows = ["| key | takes | if absent | meaning |", "|---|---|---|---|"]
        required = definition.get("required", [])
        kind = _section(name)
        for field in fields(kind):
            key = kind.key_of(field.name)
            value = definition["properties"][key]
            default = "**needed**" if key in required else _default(field.default, value)
            cells = f"`{key}`", _words(value, schema), default, _one_line(value["description"])
            rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _section(name: str) -> Any:
    return getattr(model_module, name, None) or section_named(name)


def _written(value: dict[str, Any]) -> dict[str, Any]:
    """A value's schema without what pydantic adds and a reader has no use for."""
    value = {key: inner for key, inner in value.items() if key != "default"}
    options = [o for o in value.pop("anyOf", []) if o.get("type") != "null"]
    if len(options) == 1:
        value = {**value, **options[0]}
    elif options:
        value["anyOf"] = options
    if "title" in value and "type" not in value and "enum" not in value:
        value.pop("title")
    if value.get("type") in ("array", "object") or "$ref" in value:
        value.pop("title", None)
    value = _or_one(value)
    if patterns := value.pop("patternProperties", None):
        [(pattern, inner)] = patterns.items()
        inner = _or_one(inner)
        # `prod:` with nothing behind it is a VM with all its defaults
        sections = inner.get("oneOf") or ([inner] if "$ref" in inner else [])
        inner = {"anyOf": [*sections, {"type": "null"}]} if sections else inner
        value |= {"propertyNames": {"pattern": pattern}, "additionalProperties": inner}
    return value


def _or_one(value: dict[str, Any]) -> dict[str, Any]:
    """A list's schema that takes one text as well, where it is a list of texts, as the model does."""
    if value.get("type") != "array" or "type" not in value.get("items", {}):
        return value
    of_array = ("type", "items", "minItems")
    rest = {key: inner for key, inner in value.items() if key not in (*of_array, "title")}
    array = {key: inner for key, inner in value.items() if key in of_array}
    return {**rest, "anyOf": [value["items"], array]}


def _documents(kind: type[Model]) -> dict[str, str]:
    """Descriptions of a section (under "") and its fields, with those it has from others: the strings
    below them in the source."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Model) and base is not Model:
            texts |= _written_in(base.__module__).get(base.__name__, {})
    if kind.__name__ == kinds.ALL_SERVICES:
        sections = (
            (name, kinds.section(place.rpartition(":")[2])) for name, place in kinds.services.items()
        )
        texts |= {name: _documents(section)[""] for name, section in sections if section}
    return texts


@cache
def _written_in(module: str) -> dict[str, dict[str, str]]:
    """The descriptions in a module's source, by class, then by field."""
    source = Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = {"": _one_line(ast.get_docstring(node) or "")}
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                texts[field.target.id] = _one_line(str(text.value.value))
        found[node.name] = texts
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _words(value: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        where = _sections()[name]
        anchor = "".join(c for c in where.lower().replace(" ", "-") if c.isalnum() or c in "-_")
        return f"[{where}](#{anchor})"
    if "anyOf" in value:
        options = [option for option in value["anyOf"] if option.get("type") != "null"]
        if options[-1].get("type") == "array" and len(options) == 2:
            return f"list: {_words(options[0], schema)}"
        return " or ".join(_words(option, schema) for option in options)
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        title = value.get("title")
        return title if title == "yes or no" else ", ".join(f"`{choice}`" for choice in value["enum"])
    if value.get("type") == "array":
        return f"list: {_words(value['items'], schema)}"
    if value.get("type") == "object":
        return f"name: {_words(value['additionalProperties'], schema)}"
    return str(value.get("title", "text"))


def _default(default: Any, value: dict[str, Any]) -> str:
    if default in (None, (), MISSING):
        return ""
    if isinstance(default, tuple) and all(isinstance(part, str) for part in default):
        return f"`[{', '.join(default)}]`"
    if isinstance(default, bool):
        return "yes" if default else "no"
    title = str(value.get("title", ""))
    if title.startswith("size"):
        return f"`{format_size(default)}`"
    if title.startswith("duration"):
        return f"`{format_duration(default)}`"
    if isinstance(default, str | int | IPv4Address):
        return f"`{default}`"
    return ""


# Of no account for validating Python's values.
_UNUSED = {"metadata", "ref", "serialization", "serialization_alias"}


def core_schema() -> dict[str, Any]:
    """pydantic's core schema of each section, as ``inventory.validation`` reads it."""
    whole: Any = adapter(Farm).core_schema
    sections: dict[str, Any] = {}
    definitions = {each["ref"]: each for each in whole["definitions"]}
    _core(whole["schema"], sections, definitions)
    return sections


def _core(value: Any, sections: dict[str, Any], definitions: dict[str, Any]) -> Any:
    """A core schema with stand-ins for what JSON has no word for; other sections are added to
    ``sections``. TypeError for something that ``inventory.validation`` would not find again."""
    if isinstance(value, list):
        return [_core(item, sections, definitions) for item in value]
    if not isinstance(value, dict):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        key, name = (CLASS, FUNCTION)[not isinstance(value, type)], getattr(value, "__name__", "")
        if stands_for(key, name) is not value:
            raise TypeError(f"{value!r}: farm files are validated by what inventory.values has")
        return {key: name}
    match value.get("type"):
        case "definition-ref":
            return _core(definitions[value["schema_ref"]], sections, definitions)
        case "json-or-python":
            return _core(value["python_schema"], sections, definitions)
        case "lax-or-strict":
            return _core(value["lax_schema"], sections, definitions)
    used = {key: inner for key, inner in value.items() if key not in _UNUSED}
    if value.get("type") != "dataclass":
        return {key: _core(inner, sections, definitions) for key, inner in used.items()}
    name = value["cls"].__name__
    if name not in sections:
        sections[name] = {}  # its place, before the sections in it
        used["schema"] = _with_defaults(name, value["schema"])
        sections[name] = {key: _core(inner, sections, definitions) for key, inner in used.items()}
    return {SECTION: name}


def _with_defaults(section: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a dataclass, with stand-ins for their defaults."""
    named = []
    for field in arguments["fields"]:
        schema = field["schema"]
        for key in schema.keys() & {"default", "default_factory"}:
            schema = {**schema, key: {DEFAULT: [section, field["name"]]}}
        named.append({**field, "schema": schema})
    return {**arguments, "fields": named}


def _a_line_each(sections: dict[str, Any]) -> str:
    lines = (f"{json.dumps(name)}: {json.dumps(section)}" for name, section in sections.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def render() -> dict[Path, str]:
    """All generated files with the text that they should have."""
    return {
        SCHEMA_FILE: json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        REFERENCE_FILE: reference_markdown(),
        CORE_FILE: _a_line_each(core_schema()),
    }


def main() -> None:
    for path, text in render().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{path} written\n")


if __name__ == "__main__":
    main()
