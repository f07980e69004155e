"""A page of docs/ whose console blocks are typed: its commands, and whether they print what it shows."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from host.paths import cache_dir

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_GAP = "…"
"""As a line: any number of lines; within one: any text."""
_VARIES = (
    r"\d{8}T\d{6}Z-[0-9a-f]{7}",  # a build's id
    r"\d{4}-\d\d-\d\d",
    r"\b127\.0\.0\.1:\d+\b",
    r"\d\d:\d\d(?::\d\d)?",
    r"\b(?=[0-9a-f]*\d)[0-9a-f]{7,64}\b",  # a commit, a sum
    r"\b(?:\d+h)?(?:\d+m)?\d+(?:\.\d+)?s\b",
    r"\b\d+(?:\.\d+)?[KMGTB]\b",
)
_PART = re.compile("|".join(f"({one})" for one in (*_VARIES, _GAP)))
_MARK = "--typed-page--"


@dataclass(frozen=True, slots=True)
class Typed:
    """``number``: the page's line. ``shown``: the lines that it prints, says the page."""

    number: int
    command: str
    shown: tuple[str, ...]


def typed_in(text: str) -> Iterator[Typed]:
    """What follows "$ " in the console blocks, with "> " its further lines."""
    for block in _BLOCK.finditer(text):
        number = text.count("\n", 0, block.start()) + 1
        command, began, shown = "", 0, list[str]()
        for line in block[1].splitlines():
            number += 1
            if line.startswith("$ "):
                if command:
                    yield Typed(began, command, tuple(shown))
                command, began, shown = line[2:], number, []
            elif line.startswith("> ") and not shown:
                command += f"\n{line[2:]}"
            else:
                shown.append(line)
        assert command, f"line {number}: a block without a command"
        yield Typed(began, command, tuple(shown))


def difference(shown: Sequence[str], printed: str) -> str:
    """The first line that the page has otherwise; "" if there is none. Times, dates, sizes, commits and
    builds may be others, and columns wider."""
    lines = [_narrow(line) for line in printed.splitlines()]
    at, gap = 0, False
    for line in shown:
        if line.strip() == _GAP:
            gap = True
            continue
        pattern = _pattern(line)
        found = next((i for i, one in enumerate(lines[at:], at) if pattern.fullmatch(one)), None)
        if found is None or (found > at and not gap):
            there = "nowhere" if found is None else f"after {lines[at]!r}"
            return f"the page has {line!r}, which was printed {there}"
        at, gap = found + 1, False
    if at < len(lines) and not gap:
        return f"the page has not {lines[at]!r}"
    return ""


def _narrow(line: str) -> str:
    return re.sub(r"  +", "  ", line.rstrip())


def _pattern(line: str) -> re.Pattern[str]:
    line, found, at = _narrow(line), "", 0
    for part in _PART.finditer(line):
        kind = part.lastindex or 0
        any_such = ".*" if kind > len(_VARIES) else f"(?:{_VARIES[kind - 1]})"
        found += re.escape(line[at : part.start()]) + any_such
        at = part.end()
    return re.compile(found + re.escape(line[at:]))


class Shell:
    """One bash, for all lines: where ``cd`` leads stays. ``status``: the last line's."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin and process.stdout
        self._typed, self._printed = process.stdin, process.stdout
        self.status = 0

    def type(self, command: str) -> str:
        """What it prints, on both streams."""
        # $? is the last line's, as it would be on a terminal.
        self._typed.write(f"(exit {self.status})\n{{ {command}\n}} </dev/null\necho {_MARK} $?\n")
        self._typed.flush()
        printed = ""
        for line in self._printed:
            before, mark, status = line.partition(_MARK)
            printed += before
            if mark:
                self.status = int(status)
                return printed
        raise AssertionError(f"{command}: the shell has ended; {printed}")


class TypedPage:
    """A page, and a home in which it is typed. The page's own home is that of a user who is called ada;
    what its ``git clone`` fetches is this tree as it is."""

    def __init__(self, page: Path, home: Path) -> None:
        self.text = page.read_text(encoding="utf-8").replace("/home/ada", str(home))
        self.lines = tuple(typed_in(self.text))
        self.home = home
        source = home / ".source"
        left = shutil.ignore_patterns(".git", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, source, symlinks=True, ignore=left)
        (home / ".gitconfig").write_text(
            "[user]\n\tname = Ada\n\temail = ada@example.org\n[init]\n\tdefaultBranch = main\n"
            f'[url "{source}"]\n\tinsteadOf = https://git.example.org/farmhand.git\n'
        )
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "FARMHAND_FARM"},
            "HOME": str(home),
            "LC_ALL": "C.UTF-8",
            "FARMHAND_STATE_DIR": str(home / ".local" / "state" / "farmhand"),
            "FARMHAND_RUNTIME_DIR": str(home / ".run"),
            "FARMHAND_CACHE_DIR": str(cache_dir()),
        }
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "this tree"]):
            subprocess.run(["git", *words], cwd=source, env=self.environment, check=True)

    @contextlib.contextmanager
    def shell(self) -> Iterator[Shell]:
        """One that begins at home."""
        process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"], cwd=self.home, env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with process:
            yield Shell(process)

    def blocks(self, language: str) -> list[str]:
        """What its fenced blocks of that language hold."""
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE)


@contextlib.contextmanager
def typed_page(name: str) -> Iterator[TypedPage]:
    """That page of docs/, with a new home, which is removed."""
    home = Path(tempfile.mkdtemp(prefix="fht"))
    home.chmod(0o711)  # QEMU runs as another user and passes through
    try:
        yield TypedPage(ROOT / "docs" / name, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
