"""How this copy of farmhand is called: by its wrapper in a checkout, else by its name."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from inventory.errors import Call

ROOT = Path(__file__).resolve().parents[1]
"""What holds the rooms, the templates, the example farms: a checkout, or the installed package's own."""

CHECKOUT = (ROOT / "invoke").is_file()
_START = "start.py"
PROGRAM = "./invoke" if CHECKOUT else "farmhand"


def absolute_program() -> str:
    """How a command that knows no directory calls this copy, such as one that systemd runs."""
    if CHECKOUT:
        return str(ROOT / "invoke")
    return str(Path(sys.argv[0]).resolve())


def as_typed(argv: Sequence[str]) -> str:
    """The command line that began a process, as it was typed. ``argv``: sys.argv."""
    program, *words = argv
    name = Path(program).name
    if name == _START and words[:1] == ["--search-root"]:  # the wrapper's own
        name, words = PROGRAM, words[2:]
    return shlex.join([name, *words])


def typed(call: Call, *, farm: str = "") -> str:
    """A call as it is typed in a shell. ``farm``: the farm file to name in it if the call names none;
    "": none needs to be named."""
    task, *rest = call.words()
    named = farm and all(name != "farm" for name, _ in call.flags)
    return " ".join((PROGRAM, shlex.join([task, *(("--farm", farm) if named else ()), *rest])))
