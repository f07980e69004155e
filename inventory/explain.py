"""The model's refusals in an admin's words, and the farm without what was refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin

from inventory import kinds
from inventory.base import KeyProblem, Model, quote
from inventory.engine import ValidationError
from inventory.errors import Problem
from inventory.hosts import DEFAULT_DRIVER, Host, host_section
from inventory.model import Farm, step_section
from inventory.places import Path, Places
from inventory.subscribers import subscriber_kind, subscriber_section
from inventory.values import step_kind
from inventory.yamltree import MappingNode, ScalarNode, SequenceNode

_UNKNOWN = "unexpected_keyword_argument"  # pydantic's word for a key that the section has not
_SECTION = "section"  # ours for what a section itself refuses
_STAND_IN: dict[str, Any] = {"farm": "x", "vms": {"x": {}}}  # for what a farm can't be without


def _kinds() -> str:
    *first, last = (f"'{name}'" for name in kinds.steps)
    return f"{', '.join(first)} and {last}"


def nearest(word: str, known: Collection[str]) -> str:
    """The end of a message about an unknown word: ``; did you mean 'memory'?``, else what there is, or
    ""."""
    close = difflib.get_close_matches(word[:100], list(known), 1, 0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    if 0 < len(known) <= 24:
        return f"; known: {', '.join(sorted(known))}"
    return ""


class Pruner:
    """Takes out of a farm file's content what the model refuses, and keeps why."""

    def __init__(self, content: dict[str, Any], places: Places) -> None:
        self.content = content
        self.places = places
        self.problems: list[Problem] = []
        self._meant: set[Path] = set()  # what unknown keys seem to stand for

    def prune(self, error: ValidationError) -> bool:
        """Take out what the error is about. False if nothing could be taken out: then there is no use in
        validating again."""
        gone: set[Path] = set()
        changed = False
        details = error.errors(include_url=False, include_input=False)
        places = [detail["loc"] for detail in details]
        # Unknown keys first: what they seem to stand for isn't missing as well.
        for detail in sorted(details, key=lambda detail: detail["type"] != _UNKNOWN):
            kind, context = detail["type"], detail.get("ctx", {})
            if isinstance(context.get("error"), KeyProblem):
                kind = _SECTION
            loc = detail["loc"]
            if kind == "too_short" and any(len(p) > len(loc) and p[: len(loc)] == loc for p in places):
                continue  # it counts only what it accepted
            path = self.places.in_file(self._without_tags(loc))
            if (
                path
                and isinstance(path[-1], int)
                and isinstance(self.places.node(path[:-1]), ScalarNode)
            ):
                path = path[:-1]  # one text where there could be a list of them
            of_key = bool(path) and path[-1] == "[key]"
            path = path[:-1] if of_key else path
            node = self.places.node(path)
            if isinstance(node, ScalarNode) and node.missing and self._filled(path, kind):
                changed = True
                continue
            consequence = self._consequence(path, kind, context)
            concerned, message = self._explained(path, kind, context, detail["msg"], of_key)
            if not consequence:
                whole = kind in (_UNKNOWN, "missing")
                name = self.places.name(concerned[:-1] if whole else concerned)
                if of_key or kind == _UNKNOWN or (kind == _SECTION and concerned == path):
                    place = self.places.of_key(concerned)
                else:
                    place = self.places.of_value(concerned)
                text = f"{name}: {message}" if name else message
                self.problems.append(Problem(self.places.file, *place, text))
            gone.add(path[:-1] if kind == "missing" and len(path) > 1 else concerned)
        for path in sorted(gone, key=len, reverse=True):
            changed = self._take_out(path) or changed
        return changed

    def _without_tags(self, loc: tuple[str | int, ...]) -> Path:
        """pydantic puts the driver behind a host's name, the kind of step behind its number, and that of
        a subscriber behind its name."""
        if loc[:1] == ("hosts",) and len(loc) > 2 and loc[2] in kinds.hosts:
            return (*loc[:2], *loc[3:])
        if loc[:1] == ("events",) and len(loc) > 2 and loc[2] in kinds.subscribers:
            return (*loc[:2], *loc[3:])
        if loc[:2] == ("cycle", "steps") and len(loc) > 3 and loc[3] in kinds.steps:
            return (*loc[:3], *loc[4:])
        return loc

    def _consequence(self, path: Path, kind: str, context: Mapping[str, Any]) -> bool:
        """Whether a key is refused only because of something that has been told: it was taken out, or is
        misspelt."""
        told = self.places.bad | self._meant
        if path[:1] == ("hosts",) and len(path) > 2 and (*path[:2], "driver") in told:
            return kind in (_SECTION, _UNKNOWN, "missing")  # which keys it has, nobody knows
        if kind == _SECTION:
            return any((*path, key) in told for key in context["error"].keys)
        if kind == "missing":
            return path in told
        if kind == "union_tag_not_found":
            known = (*kinds.steps, *kinds.subscribers)
            return any((*path, key) in told for key in known)
        return kind == "too_short" and any(bad[: len(path)] == path for bad in told)

    def _filled(self, path: Path, kind: str) -> bool:
        """``prod:`` with nothing behind it is a VM with all its defaults."""
        empty: Any
        if kind in ("dataclass_type", "dict_type"):
            empty = {}
        elif kind in ("tuple_type", "list_type"):
            empty = []
        else:
            return False
        holder, key = self._holder(path)
        if holder is None or holder[key] in ({}, []):
            return False
        holder[key] = empty
        return True

    def _explained(
        self, path: Path, kind: str, context: Mapping[str, Any], words: str, of_key: bool
    ) -> tuple[Path, str]:
        """What is concerned, and what is wrong with it."""
        node = self.places.node(path)
        text = node.text if isinstance(node, ScalarNode) else ""
        found = (
            "a list" if isinstance(node, SequenceNode)
            else "keys with values" if isinstance(node, MappingNode)
            else quote(text)
        )  # fmt: skip
        if kind == _SECTION:
            problem: KeyProblem = context["error"]
            return (*path, problem.key) if problem.key else path, str(problem)
        if kind == "missing":
            return self._missing(path)
        if kind == _UNKNOWN:
            return path, self._unknown_key(path)
        if path[:1] == ("hosts",) and kind in ("union_tag_not_found", "union_tag_invalid"):
            return self._unknown_driver(path)
        if path[:1] == ("events",) and kind == "union_tag_not_found":
            return path, self._unknown_subscriber(node)
        if kind == "union_tag_not_found":
            return path, self._unknown_step(node)
        if not of_key and isinstance(node, ScalarNode) and node.missing:
            return path, "it has no value: give it one, or leave the key out"
        if kind == "value_error":
            return path, str(context["error"])
        if kind in ("dataclass_type", "dict_type"):
            return path, f"keys with values are expected here, not {found}"
        if kind in ("tuple_type", "list_type"):
            return path, f"a list is expected here, not {found}"
        if kind == "too_short":
            return path, "it is empty" if isinstance(node, ScalarNode) else "at least one is needed"
        if not isinstance(node, ScalarNode):
            return path, f"a single value is expected here, not {found}"
        if kind == "literal_error":
            known = re.findall(r"'([^']+)'", context["expected"])
            return path, f"{found} is not one of {', '.join(known)}{_only_close(text, known)}"
        if kind == "string_too_short":
            return path, "it is empty"
        if kind == "string_too_long":
            return path, f"longer than {context['max_length']} characters"
        if kind in ("greater_than_equal", "greater_than"):
            with_it = "ge" in context
            least = f"{context['ge']:.15g} or more" if with_it else f"more than {context['gt']:.15g}"
            return path, f"{text} is too little: it must be {least}"
        if kind == "less_than_equal":
            return path, f"{text} is too much: at most {context['le']:.15g}"
        return path, f"{found}: {words[:1].lower()}{words[1:]}"

    def _missing(self, path: Path) -> tuple[Path, str]:
        model, key = self._model_at(path[:-1]), str(path[-1])
        if model and issubclass(model, Host) and key in model.NEEDED:
            words = f"driver {model.INFO.name} needs '{key}', {model.NEEDED[key]}"
            return (*path[:-1], "driver"), words
        return path, f"'{key}' is missing"

    def _unknown_driver(self, path: Path) -> tuple[Path, str]:
        path = (*path, "driver")
        node = self.places.node(path)
        if not isinstance(node, ScalarNode):
            found = "a list" if isinstance(node, SequenceNode) else "keys with values"
            return path, f"a single value is expected here, not {found}"
        if node.missing:
            return path, "it has no value: give it one, or leave the key out"
        known = list(kinds.hosts)
        close = _only_close(node.text, known)
        return path, f"{quote(node.text)} is not one of {', '.join(known)}{close}"

    def _of_other_drivers(self, key: str, host: type[Host]) -> str:
        """What to say to a key that other drivers have; "": none has."""
        if key in host.INSTEAD:
            return host.INSTEAD[key]
        others = [name for name in kinds.hosts if key in _keys_of(host_section(name))]
        if not others:
            return ""
        names = " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))
        return f"'{key}' is for driver {names}; the driver is {host.INFO.name}"

    def _unknown_key(self, path: Path) -> str:
        key = str(path[-1])
        model = self._model_at(path[:-1])
        if model and issubclass(model, Host) and (words := self._of_other_drivers(key, model)):
            return words
        known = _keys_of(model) if model else set()
        if close := difflib.get_close_matches(key[:100], known, 1, 0.6):
            self._meant.add((*path[:-1], close[0]))
        return f"unknown key {quote(key)}{nearest(key, known)}"

    def _unknown_step(self, node: object) -> str:
        if not isinstance(node, MappingNode):
            return "a step is made of keys with values, such as 'name' and 'run'"
        found = [kind for kind in kinds.steps if kind in node.keys]
        if found:
            return f"a step has one of {_kinds()}; this one has {' and '.join(found)}"
        for key in node.keys:
            if close := difflib.get_close_matches(key[:100], [*kinds.steps], 1, 0.6):
                return f"unknown key {quote(key)}; did you mean '{close[0]}'?"
        return f"a step has one of {_kinds()}, which say what it does"

    def _unknown_subscriber(self, node: object) -> str:
        known = list(kinds.subscribers)
        found = [kind for kind in known if isinstance(node, MappingNode) and kind in node.keys]
        words = f"a subscriber has one of {' and '.join(map(repr, known))}, which says where it is"
        return f"{words}; this one has {' and '.join(found)}" if found else words

    def _model_at(self, path: Path) -> type[Model] | None:
        """The part of the model that describes what is at this path of the file."""
        from inventory.annotations import hints

        kind: Any = Farm
        for depth, part in enumerate(path):
            if depth == 1 and path[0] == "hosts":
                kind = host_section(self._driver_at(path[:2]))
            elif depth == 1 and path[0] == "events":
                node = self.places.node(path[:2])
                told = subscriber_kind(node.keys if isinstance(node, MappingNode) else None)
                kind = subscriber_section(told) if told else None
            elif depth == 2 and path[:2] == ("cycle", "steps"):
                node = self.places.node(path[:3])
                name = step_kind(node.keys if isinstance(node, MappingNode) else None)
                kind = step_section(name) if name else None
            elif isinstance(kind, type) and issubclass(kind, Model):
                of_fields = hints(kind).items()
                kind = next((hint for name, hint in of_fields if kind.key_of(name) == part), None)
            elif get_origin(kind) is dict:
                kind = get_args(kind)[1]
            else:
                kind = get_args(kind)[0] if get_args(kind) else None
            if get_origin(kind) in (Union, UnionType):
                kind = next(arg for arg in get_args(kind) if arg is not type(None))
        return kind if isinstance(kind, type) and issubclass(kind, Model) else None

    def _driver_at(self, host: Path) -> str:
        node = self.places.node((*host, "driver"))
        driver = node.text if isinstance(node, ScalarNode) else ""
        return driver if driver in kinds.hosts else DEFAULT_DRIVER

    def _holder(self, path: Path) -> tuple[Any, Any]:
        """What holds this in the content, and under which key or number now; None if nothing does."""
        value: Any = self.content
        holder: Any = None
        key: Any = None
        for depth, part in enumerate(path):
            key = part
            if isinstance(value, list):
                numbers = self.places.kept.get(path[:depth])
                if numbers is not None:
                    if part not in numbers:
                        return None, None
                    key = numbers.index(int(part))
                elif not isinstance(part, int) or part >= len(value):
                    return None, None
            elif not isinstance(value, dict) or part not in value:
                return None, None
            holder, value = value, value[key]
        return holder, key

    def _take_out(self, path: Path) -> bool:
        """Take what is at this path of the file out of the content, or what holds it."""
        places = self.places
        holder, key = self._holder(path)
        if holder is None:
            if not path:
                return False
            if len(path) == 1 and path[0] in _STAND_IN:
                places.bad.add(path)
                self.content[str(path[0])] = _STAND_IN[str(path[0])]
                return True
            return self._take_out(path[:-1])
        places.bad.add(path)
        if isinstance(holder, list):
            numbers = places.kept.setdefault(path[:-1], list(range(len(holder))))
            del holder[key], numbers[key]
        elif len(path) == 1 and key in _STAND_IN:
            if holder[key] is _STAND_IN[key]:
                return False
            holder[key] = _STAND_IN[key]
        else:
            del holder[key]
        return True


def _keys_of(model: type[Model]) -> set[str]:
    return {model.key_of(field.name) for field in fields(model)}


def _only_close(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word[:100].lower(), list(known), 1, 0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
