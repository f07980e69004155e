"""Another user with the state of somebody's farm, whose VM runs: told whose it is, by whatever he types;
never that there is nothing."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest
from neighbour import NEEDS_ROOT, UID

from host.files import check_whose, matching
from inventory.errors import NotOurs, WrongState
from tests import boot_sector
from tests.unit.cli_farm import CommandLine

FARM = "farm: try\ntemplates: {small: {import: small.img}}\nvms: {one: {memory: 64M}}\n"
WORDS = (
    ["status"], ["history"], ["log"], ["clone-farm"], ["clone-farm", "--plan"], ["reset", "--vm", "one"],
    ["ssh", "--vm", "one"], ["console", "--vm", "one", "--log"], ["destroy", "--all", "--yes"], ["gc"],
    ["recover"], ["adopt"], ["template-list"],
)  # fmt: skip


@pytest.fixture(scope="module")
def farm() -> Iterator[CommandLine]:
    directory = Path(tempfile.mkdtemp(prefix="fh"))
    try:
        (directory / "r").mkdir()
        for path in (directory, directory / "r"):
            path.chmod(0o755)
        line = CommandLine(directory, directory / "r")
        line.farm.write_text(FARM)
        (directory / "small.img").write_bytes(boot_sector.IDLE)
        try:
            assert line("clone-farm", "--no-wait").status == 0
            yield line
        finally:
            assert line("destroy", "--all", "--yes").status == 0
    finally:
        rmtree(directory)


def as_stranger(line: CommandLine, *words: str) -> tuple[int, str]:
    """The status, and all that is said. He may read the checkout and its Python, wherever they are."""
    drop = ["setpriv", "--reuid", f"{UID}", "--regid", f"{UID}", "--clear-groups"]
    if not as_other_can_read(Path(__file__)):
        drop += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    cache = {"FARMHAND_CACHE_DIR": "/nonexistent/cache", "HOME": "/nonexistent"}
    done = subprocess.run(
        [*drop, *line.argv(*words)], cwd="/", env={**line.environment, **cache},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def as_other_can_read(path: Path) -> bool:
    found = subprocess.run(
        ["setpriv", "--reuid", f"{UID}", "--regid", f"{UID}", "--clear-groups", "cat", path],
        capture_output=True, check=False,
    )  # fmt: skip
    return found.returncode == 0


@NEEDS_ROOT
@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_he_is_told_whose_it_is(farm: CommandLine, words: list[str]) -> None:
    status, said = as_stranger(farm, *words)
    assert status == 1
    assert f"farmhand: {farm.directory}/state/farms/try, the state of farm try, belongs to root" in said
    assert "go on as root" in said
    assert "Traceback" not in said and "defect" not in said and "nothing is made" not in said


@NEEDS_ROOT
def test_also_where_a_directory_above_hides_it(farm: CommandLine) -> None:
    state = farm.directory / "state"
    mode = state.stat().st_mode
    state.chmod(0o700)
    try:
        status, said = as_stranger(farm, "status")
    finally:
        state.chmod(mode)
    assert status == 1
    assert "belongs to root" in said and "defect" not in said and "nothing is made" not in said


@NEEDS_ROOT
def test_the_runtime_directory_of_another(farm: CommandLine, tmp_path: Path) -> None:
    theirs = farm.directory / "theirs"
    theirs.mkdir()
    os.chown(theirs, UID, UID)
    here = CommandLine(farm.directory, farm.directory / "r")
    here.farm.write_text(FARM)  # it has written one of its own there
    here.environment["FARMHAND_STATE_DIR"] = str(theirs)
    status, said = as_stranger(here, "status")
    assert status == 1 and "where farm try runs, belongs to root" in said


@NEEDS_ROOT
def test_a_farm_file_that_he_may_not_read_is_there(farm: CommandLine) -> None:
    hidden = farm.directory / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "try.yaml").write_text(FARM)
    status, said = as_stranger(farm, "status", "--farm", str(hidden / "try.yaml"))
    assert "it can't be read: Permission denied" in said and "Traceback" not in said, (status, said)


def test_ones_own_and_what_is_not_there_pass(tmp_path: Path) -> None:
    check_whose(tmp_path, "a directory")
    check_whose(tmp_path / "a" / "b", "a directory")
    (tmp_path / "file").touch()
    check_whose(tmp_path / "file" / "b", "a directory")
    assert matching(tmp_path / "a", "*") == []


@NEEDS_ROOT
def test_a_directory_that_can_not_be_read_is_not_empty(farm: CommandLine) -> None:
    """Whatever looks into it: a VM's disk, a note of a QEMU that runs."""
    child = os.fork()
    if child == 0:
        got = 1
        try:
            os.setgroups([])
            os.setuid(UID)
            try:
                matching(farm.directory / "state/farms/try/disks/vms", "*")
            except WrongState:
                try:
                    check_whose(farm.directory / "state", "a directory")
                except NotOurs:
                    got = 0
        finally:
            os._exit(got)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
