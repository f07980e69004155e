"""The engine goes by what was made beforehand: that is what pydantic itself would say, in every case."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inventory import schema, values
from inventory.annotations import adapter
from inventory.engine import ValidationError
from inventory.model import Farm
from inventory.validation import validated
from inventory.yamltree import parse, plain
from tests.unit import test_inventory_properties as properties
from tests.unit import test_inventory_refusals as refusals
from tests.unit import test_inventory_services as services

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.name: path.read_text() for path in sorted((ROOT / "inventory").glob("*.yaml"))}
HOSTILE = [
    *(refusals.vm(line) for line in refusals.VM_VALUES),
    *(f"{refusals.BASE}{line}\n" for line in refusals.TOP),
    *(f"{refusals.BASE}cycle:\n  steps:\n    - {step}\n" for step in refusals.STEPS),
    *(f"{refusals.BASE}hosts: {{here: {{{keys}}}}}\n" for keys in refusals.XENAPI),
    *(services.BASE.replace("SERVICES", each).replace("{VM}", "{}") for each in services.SERVICES),
    *(services.BASE.replace("SERVICES", "bind:").replace("VM", each) for each in services.VMS),
]


def said(validate: Any, content: Mapping[str, Any]) -> object:
    """The farm, to the types of all that is in it; or every error with its place and limits."""
    try:
        return repr(validate(content))
    except ValidationError as error:
        return [
            {**each, "ctx": {key: repr(value) for key, value in each.get("ctx", {}).items()}}
            for each in error.errors(include_url=False)
        ]


def agree(content: Mapping[str, Any]) -> bool:
    """Whether it is a farm."""
    found = said(validated, content)
    assert found == said(adapter(Farm).validate_python, content)
    return isinstance(found, str)


@pytest.mark.parametrize("name", FILES)
def test_of_farms_it_says_the_same(name: str) -> None:
    tree, _ = parse(FILES[name].encode(), name)
    assert tree is not None
    content = plain(tree)
    agree(content)
    for service, keys in content.get("services", {}).items():
        content["services"][service] = keys or {}  # its name alone, as the loader has it
    assert agree(content)


def test_of_wrong_ones_it_says_the_same() -> None:
    refused = 0
    for text in HOSTILE:
        tree, _ = parse(text.encode(), "f.yaml")
        assert tree is not None, text
        refused += not agree(plain(tree))
    assert refused > 100  # the checks refuse the others


@settings(max_examples=100, deadline=None)
@given(properties.farms())
def test_of_any_farm_it_says_the_same(content: dict[str, Any]) -> None:
    assert agree(content)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_of_a_farm_with_any_parts_replaced_it_says_the_same(data: st.DataObject) -> None:
    content = yaml.load(properties.RICH, Loader=yaml.BaseLoader)
    for path in data.draw(st.lists(st.sampled_from(properties.PATHS[1:]), min_size=1, max_size=3)):
        holder: Any = content
        try:
            for part in path[:-1]:
                holder = holder[part]
            holder[path[-1]] = data.draw(properties.trees)
        except (KeyError, IndexError, TypeError):
            continue
    agree(content)


def test_a_function_that_would_not_be_found_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """pydantic's own ones, for one: a limit behind a function instead of before it."""
    monkeypatch.setattr(values, "check_label", lambda value: value)
    with pytest.raises(TypeError, match="check_label"):
        schema.core_schema()


def test_who_imports_pydantic_later_finds_the_same_engine() -> None:
    code = (
        "import inventory.engine as engine, sys; assert 'pydantic_core' not in sys.modules;"
        "import pydantic, pydantic_core, pydantic_core.core_schema;"
        "assert pydantic.ValidationError is pydantic_core.ValidationError is engine.ValidationError;"
        "assert pydantic.TypeAdapter(int).validate_python('3') == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
