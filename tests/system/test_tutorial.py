"""docs/tutorial.md as a newcomer follows it: each line typed in a shell, on real VMs, and what it prints
compared with what the page shows.

Eight minutes where the guests are emulated, five more where no template of its is in the cache, so
./invoke test leaves it out:
./invoke test --only tests/system/test_tutorial.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.typed_page import TypedPage, difference, typed_page

pytestmark = [pytest.mark.system, pytest.mark.timeout(5400)]


@pytest.fixture
def page() -> Iterator[TypedPage]:
    with typed_page("tutorial.md") as made:
        yield made
        with made.shell() as shell:
            shell.type("cd farmhand && ./invoke destroy --all --purge --yes")


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
