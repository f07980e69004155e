"""docs/tutorial.md without VMs: each of its commands is one, and what it says of files is so.
tests/system/test_tutorial.py types it on VMs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from invoke.parser import Parser
from test_typed_words import TASKS, core

from cli.typed_words import WordReader
from inventory.endings import FAILED
from tests.typed_page import ROOT, TypedPage, difference, typed_in, typed_page

__all__ = ["core"]
PLANNED = {context.name for context in TASKS.to_contexts() if "--plan" in context.flags}


TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
LINES = tuple(typed_in(TEXT))


@pytest.fixture
def page() -> Iterator[TypedPage]:
    with typed_page("tutorial.md") as made:
        yield made


def words_of(command: str) -> list[str]:
    """Of farmhand's own commands."""
    words = shlex.split(command)
    return words[1:] if words[0] == "./invoke" else []


def test_each_command_is_understood(core: WordReader) -> None:
    commands = [typed.command for typed in LINES] + re.findall(r"`(\./invoke [^`]+)`", TEXT)
    found = [words for command in commands if (words := words_of(command))]
    assert len(found) > 20
    for words in found:
        at = words.index("--") if "--" in words else len(words)
        plain = core.plain(words[:at], words[at + 1 :])
        core.task = ""
        _, *contexts = Parser(initial=core.core, contexts=TASKS.to_contexts()).parse_argv(plain)
        assert len(contexts) == 1, words


def test_three_commands_and_one_file_from_the_clone_to_a_passed_cycle() -> None:
    """Beside the template's build; nothing else of farmhand's is typed, and nothing edited."""
    commands = [typed.command for typed in LINES]
    began, *_ = (i for i, line in enumerate(commands) if line.startswith("git clone"))
    passed, *_ = (i for i, typed in enumerate(LINES) if "  passed, " in str(typed.shown))
    between = commands[began + 1 : passed + 1]
    ours = [words_of(line)[0] for line in between if words_of(line)]
    assert ours == ["new", "template-build", "clone-farm", "cycle"]
    others = [line.split()[0] for line in between if not words_of(line)]
    assert others == ["cd", "cp", "git"], "there, and a project, if there is none"


def test_its_lines_do_what_it_says_as_far_as_they_need_no_vm(page: TypedPage) -> None:
    """Of those that want VMs, what they would do is asked for (--plan), where they tell: nothing is made
    yet, but they are no wrong words, and no defect."""
    with page.shell() as shell:
        for typed in page.lines:
            command, words = typed.command, words_of(typed.command)
            if words and words[0] == "new":
                printed = shell.type(command)
                assert not difference(typed.shown, printed), printed
                farm = page.home / "farmhand" / "farm.yaml"
                for block in page.blocks("yaml"):
                    assert block in farm.read_text()
            elif words and words[0] in PLANNED:
                printed = shell.type(f"{command} --plan")
                if shell.status == FAILED.status:
                    shell.status = 0
            elif words or command.startswith("echo"):
                continue
            else:
                printed = shell.type(command)
            assert shell.status == 0, f"line {typed.number}: {command}: {printed}"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["a 1.0"], "a 1.0\n", True),
        (["a 1.0"], "a 1.1\n", False),
        (["a"], "a\nb\n", False),
        (["a", "…"], "a\nb\n", True),
        (["…", "c"], "a\nb\nc\n", True),
        (["a", "c"], "a\nb\nc\n", False),
        (["…", "c", "a"], "a\nc\n", False),
        ([], "a\n", False),
        ([], "", True),
        (["a … z"], "a b c z\n", True),
        (["took  2m40s  3.0K"], "took  9.1s   12M\n", True),
        (["took 2m40s"], "took ages\n", False),
        (["20:13:50 at 2026-11-29 20:13"], "01:02:03 at 2027-01-01 00:00\n", True),
        (["723ac72 of 20261129T201350Z-723ac72"], "0f0f0f1 of 20270101T000000Z-0f0f0f1\n", True),
        (["at most 30m, 512M of 1G"], "at most 31m, 512M of 1G\n", False),
    ],
)
def test_what_is_compared(shown: list[str], printed: str, same: bool) -> None:
    assert (difference(shown, printed) == "") is same
