"""Checks of a daemon's configuration with files that aren't live yet, by the daemon's own checker."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from host.files import open_new
from host.run import CommandResult, Runner, which
from inventory.errors import CommandFailed


class StagedFiles:
    """New files that a checker sees at their live places. Text None: the file is to be gone."""

    def __init__(self, runner: Runner, directory: Path, files: Mapping[str, str | None]) -> None:
        self._runner = runner
        self._over = directory / "over"
        self._over.mkdir()
        self._files: list[tuple[str | None, str]] = []
        for number, (live, text) in enumerate(files.items()):
            new = None
            if text is not None:
                path = directory / str(number)
                with open_new(path, mode=0o644) as file:
                    file.write(text.encode(errors="surrogateescape"))
                new = str(path)
            self._files.append((new, live))

    def check(
        self, argv: Sequence[str], *, shadow: Sequence[str] = (), timeout: float = 120
    ) -> CommandResult:
        """Run a checker. CommandFailed, naming it, if it refuses or isn't installed."""
        program = which(argv[0])
        if program is None:
            raise CommandFailed(
                f"cannot run {argv[0]}: not installed",
                argv=tuple(argv),
                remedy="install the service, or take it out of 'services:'",
            )
        order = {
            "over": str(self._over),
            "files": self._files,
            "shadow": list(shadow),
            "argv": [program, *argv[1:]],
        }
        helper = Path(__file__).with_name("_staged.py")
        result = self._runner.read(
            sys.executable, "-I", "-S", helper, json.dumps(order), timeout=timeout, ok=range(256),
            patient=True,
        )  # fmt: skip
        if result.status != 0:
            raise self._refused(argv, result)
        return result

    def _refused(self, argv: Sequence[str], result: CommandResult) -> CommandFailed:
        said = [line for text in (result.stderr, result.stdout) for line in text.strip().splitlines()]
        first = next((line for line in said if _tells(line)), said[-1] if said else "it says nothing")
        return CommandFailed(
            f"{argv[0]} refuses: {first.strip()}",
            argv=tuple(argv),
            status=result.status,
            stderr=result.stderr,
            detail="\n".join((f"$ {self._runner.show(argv)}", *said[-15:])),
        )


@contextmanager
def stage(runner: Runner, files: Mapping[str, str | None]) -> Iterator[StagedFiles]:
    """A staging area, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="farmhand-") as name:
        Path(name).chmod(0o711)  # checkers may run as the daemon's user
        yield StagedFiles(runner, Path(name), files)


def _tells(line: str) -> bool:
    """Whether a checker's line says what is wrong, and is not its greeting."""
    low = line.lower()
    return any(word in low for word in ("error", "emerg", "alert", "failed", "not ", "bad", "invalid"))
