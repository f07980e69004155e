"""docs/tutorial.md as a newcomer follows it: each line typed in a shell, on real VMs, and what it prints
compared with what the page shows.

A quarter of an hour where the guests are emulated, so ./invoke test leaves it out:
./invoke test --only tests/system/test_tutorial.py
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.typed_page import ROOT, TypedPage, difference

pytestmark = [pytest.mark.system, pytest.mark.timeout(5400)]


@pytest.fixture
def page() -> Iterator[TypedPage]:
    home = Path(tempfile.mkdtemp(prefix="fht"))
    home.chmod(0o711)  # QEMU runs as another user and passes through
    made = TypedPage(ROOT / "docs" / "tutorial.md", home)
    try:
        yield made
    finally:
        with made.shell() as shell:
            shell.type("cd farmhand && ./invoke destroy --all --purge --yes")
        shutil.rmtree(home, ignore_errors=True)


def test_each_line_prints_what_the_page_shows(page: TypedPage) -> None:
    printed = ""
    with page.shell() as shell:
        for typed in page.lines:
            told = shell.status == 0 or typed.command == "echo $?"
            assert told, f"line {typed.number}: the page doesn't say that it failed before: {printed}"
            printed = shell.type(typed.command)
            wrong = difference(typed.shown, printed)
            assert not wrong, f"line {typed.number}: {typed.command}: {wrong}\n{printed}"
        assert shell.status == 0
