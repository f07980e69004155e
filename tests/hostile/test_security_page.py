"""docs/security.md names what holds each line: all of this suite, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from host.program import ROOT

HERE = Path(__file__).parent


def test_each_line_names_its_test() -> None:
    page = (ROOT / "docs/security.md").read_text()
    rows = [line for line in page.splitlines() if "test_" in line]
    named = {name for row in rows for name in re.findall(r"`((?:tests/\w+/)?test_[\w*]+\.py)`", row)}
    found = {name: list((ROOT if "/" in name else HERE).glob(name)) for name in named}
    assert not [name for name, paths in found.items() if not paths]
    ours = {path for paths in found.values() for path in paths}
    assert set(HERE.glob("test_*.py")) - ours == {Path(__file__)}
