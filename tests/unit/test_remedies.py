"""Remedies are data: text and calls of tasks, worded by the face that shows them."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.words import Words
from hypervisors.far.wire import decode, encode
from inventory.errors import (
    Call,
    FarmhandError,
    NotFound,
    Several,
    calls_in,
    joined,
    remedy_as_data,
    remedy_of,
    spelled,
)
from tests.unit.test_imports import SOURCES, parse

ONLY = Call("cycle", from_="pack", only=("pack", "it's"), keep_going=True, revision=None)
REMEDY = ("look: ", (Call("status"), ", "), ONLY, "; or wait")


def test_a_call_in_words() -> None:
    typed = ["cycle", "--from", "pack", "--only", "pack", "--only", "it's", "--keep-going"]
    assert list(ONLY.words()) == typed == shlex.split(str(ONLY))
    assert spelled(REMEDY) == f"look: status, {ONLY}; or wait"
    assert calls_in(REMEDY) == (Call("status"), ONLY)
    assert Call("ssh", vm="a", all=False, only=()) == Call("ssh", vm="a")


def test_several_as_one() -> None:
    assert joined(["a", "b"]) == "a; b"
    assert joined(["a", Call("gc")], ", ") == ("a", ", ", Call("gc"))
    error = Several({"a": NotFound("gone", remedy=REMEDY), "b": NotFound("gone", remedy=REMEDY)})
    assert calls_in(error.remedy) == calls_in(REMEDY)  # each once


@pytest.mark.parametrize("remedy", ["", "text", ONLY, REMEDY])
def test_as_data_and_back(remedy: object) -> None:
    assert remedy_of(json.loads(json.dumps(remedy_as_data(remedy)))) == remedy
    error = FarmhandError("no", vm="prod", remedy=remedy)
    back = decode(json.loads(json.dumps(encode(error))))
    assert (back.remedy, back.vm, str(back)) == (remedy, "prod", "prod: no")


def test_an_object_has_its_calls_beside_its_text() -> None:
    words = Words("/a farm.yaml")
    remedy = ("try ", Call("gc", vm="a"))
    told = words.data({"checks": [{"remedy": remedy, "text": "x"}], "n": (1, None)})
    assert told == {
        "checks": [
            {
                "remedy": "try ./invoke gc --farm '/a farm.yaml' --vm a",
                "text": "x",
                "calls": [{"task": "gc", "flags": {"farm": "/a farm.yaml", "vm": "a"}}],
            }
        ],
        "n": [1, None],
    }
    assert words.text(Call("gc", farm="b")) == "./invoke gc --farm b"


def literal_calls() -> Iterator[tuple[str, str, list[str]]]:
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Call":
                [task] = node.args
                flags = [keyword.arg for keyword in node.keywords if keyword.arg]
                if isinstance(task, ast.Constant):
                    yield f"{path}:{node.lineno}", task.value, flags


def test_every_call_is_one_of_a_task_with_flags_that_it_has() -> None:
    from invoke.collection import Collection

    import tasks

    known = {
        context.name: {flag.lstrip("-") for flag in context.flags}
        for context in Collection.from_module(tasks).to_contexts()
    }
    found = list(literal_calls())
    for where, task, flags in found:
        assert task in known, where
        assert {flag.rstrip("_").replace("_", "-") for flag in flags} <= known[task], where


def test_how_farmhand_is_called_stands_in_one_place() -> None:
    """Not counting what only developers read."""
    found = set()
    for path in SOURCES:
        tree = parse(path)
        ours = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in ours else None
            if isinstance(text, str) and "./invoke" in text:
                found.add(str(path))
    assert found == {"host/program.py"}


COMMAND_LINE = (
    "cli/", "tasks.py", "inventory/endings.py", "inventory/reading.py", "provision/twins/",
    "provision/network/importing.py", "provision/network/rendered.py", "builds/new_farm.py",
)  # fmt: skip
"""Where what was typed is judged: also by what only makes files of what was typed."""


def test_no_message_spells_a_flag() -> None:
    """Other faces have none. A flag of another program's is no flag here, or stands alone as in an
    argument list."""
    from invoke.collection import Collection

    import tasks

    contexts = Collection.from_module(tasks).to_contexts()
    flags = {flag for context in contexts for flag in context.flags if flag.startswith("--")}
    found = []
    for path in SOURCES:
        if str(path).startswith(COMMAND_LINE):
            continue
        for node in ast.walk(parse(path)):
            remedy = isinstance(node, ast.keyword) and node.arg == "remedy"
            error = isinstance(node, ast.Call) and ast.unparse(node.func)[0].isupper()
            if not (remedy or error):
                continue
            for each in ast.walk(node):
                text = each.value if isinstance(each, ast.Constant) else None
                if isinstance(text, str) and text not in flags and "lvconvert" not in text:
                    spelt = flags.intersection(re.findall(r"--[a-z][a-z-]*", text))
                    found += [f"{path}:{each.lineno}: {one}" for one in spelt]
    assert found == []


def test_a_package_that_a_build_lacks_goes_into_the_template() -> None:
    from builds.scripts import into_the_template
    from inventory.loader import loads

    text = """\
farm: x
hosts: {here: {driver: fake}, desk: {driver: ssh}}
templates: {base: {build: debian-12}, other: {import: disk.qcow2}}
vms:
  a: {host: here, template: base}
  b: {host: here, template: other}
  c: {host: desk, address: 127.0.0.1, reset: ["true"]}
"""
    farm = loads(text.encode(), Path("f.yaml"))
    remedy = into_the_template(farm, "a")
    calls = [str(call) for call in calls_in(remedy)]
    assert calls == ["template-build --name base", "renew --all", "cycle", "ssh --vm a"]
    assert "under 'packages:' of template base" in spelled(remedy)
    assert into_the_template(farm, "b") == into_the_template(farm, "c") == ""
