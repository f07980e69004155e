"""Directories of ours that somebody else made first, or may write in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from neighbour import NEEDS_ROOT, UID, square, stranger

from cli import command
from cli.run import TaskRun
from host.files import own_directory
from hypervisors.libvirt.private import PrivateLibvirt
from inventory.errors import WrongState
from provision.engine.report import QuietReporter
from provision.site import open_site

__all__ = ["square"]
ROOT = Path(__file__).parents[2]
FARM = "farm: kata\nhosts: {here: {driver: fake}}\nvms: {prod: {memory: 512M}}\n"
_MAKES = {
    "open": "import os, sys; os.mkdir(sys.argv[1], 0o777)",
    "closed": "import os, sys; os.mkdir(sys.argv[1], 0o711)",
    "link": "import os, sys; os.symlink(sys.argv[2], sys.argv[1])",
    "dangling": "import os, sys; os.symlink(sys.argv[2] + '/none', sys.argv[1])",
    "file": "import sys; open(sys.argv[1], 'w').close()",
}
MADE = pytest.mark.parametrize("made", list(_MAKES))


def _plant(made: str, path: Path, square: Path) -> Path:
    """The stranger makes ``path``. Where a link leads: a directory of ours."""
    target = square / "ours"
    target.mkdir(mode=0o711)
    stranger(_MAKES[made], path, target)
    return target


@NEEDS_ROOT
@MADE
@pytest.mark.parametrize("which", ["STATE", "CACHE", "RUNTIME"])
def test_what_somebody_else_made_first_is_not_used(
    square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, which: str
) -> None:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name))
    place = square / "farmhand-0"
    monkeypatch.setenv(f"FARMHAND_{which}_DIR", str(place))
    target = _plant(made, place, square)
    file = tmp_path / "kata.yaml"
    file.write_text(FARM)
    with pytest.raises(WrongState) as refused:
        open_site(file, reporter=QuietReporter())
    assert str(place) in refused.value.message and "\n" not in refused.value.message
    assert refused.value.remedy
    assert not list(target.iterdir())
    assert place.lstat().st_uid == UID


@NEEDS_ROOT
@MADE
@pytest.mark.parametrize("level", ["root", "farm"])
def test_a_private_daemon_is_not_looked_for_in_somebody_else_s_directory(
    square: Path, made: str, level: str
) -> None:
    """The stranger's own daemon listens there, as far as there is a there."""
    place = square / "farmhand-0"
    if level == "farm":
        place.mkdir(mode=0o711)
        place = place / "kata"
        place.parent.chmod(0o777)
        _plant(made, place, square)
        place.parent.chmod(0o711)
    else:
        _plant(made, place, square)
    farm = square / "farmhand-0" / "kata"
    daemon = PrivateLibvirt(square / "state", farm, square / "cache", hide_kvm=True)
    with socket.socket(socket.AF_UNIX) as listening:
        if place.is_dir():
            (farm / "run").mkdir(parents=True)
            listening.bind(str(farm / "run" / "libvirt-sock"))
            listening.listen()
        with pytest.raises(WrongState, match=str(place)):
            daemon.uri()
    assert not (square / "state").exists(), "nothing was started"


@NEEDS_ROOT
def test_the_way_out_below_tmp_is_checked_for_an_ordinary_user(square: Path) -> None:
    """Without XDG_RUNTIME_DIR. It runs as a user of its own, uid 65533."""
    program = (
        "import os, sys; from host import paths; from host.files import own_directory\n"
        "from inventory.errors import WrongState\n"
        "try:\n    own_directory(paths.runtime_dir(), mode=0o700)\n    print(paths.runtime_dir())\n"
        "except WrongState as error:\n    print(error.message)\n"
    )

    def said(before: str) -> str:
        environment = {"TMPDIR": str(square), "HOME": str(square), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [sys.executable, "-c", before + program], cwd=ROOT, env=environment, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.strip()

    becomes = "import inventory.errors, host.files, host.paths, os, tempfile; os.setuid(65533)\n"
    place = square / "farmhand-65533"
    assert said(becomes) == str(place)
    assert (place.stat().st_uid, place.stat().st_mode & 0o777) == (65533, 0o700)
    place.rmdir()
    stranger(_MAKES["open"], place)
    assert said(becomes).startswith(f"{place} belongs to ")


@NEEDS_ROOT
def test_a_crash_file_is_written_under_no_name_that_can_be_guessed(
    square: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (square / "state").touch()  # no directory: on to the way out
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(square / "state"))
    monkeypatch.setattr("tempfile.tempdir", str(square))
    monkeypatch.setattr(command.time, "strftime", lambda _format: "now")
    victim = square / "victim"
    victim.write_text("precious")
    stranger(_MAKES["link"], square / f"crash-now-{os.getpid()}.txt", victim)
    try:
        raise ValueError("a defect")
    except ValueError:
        kept = command._keep_traceback(TaskRun("status", "", json=False, plan=False))
    assert victim.read_text() == "precious"
    assert "a defect" in kept.read_text()
    assert (kept.parent, kept.stat().st_mode & 0o777) == (square, 0o600)


def test_modes_that_an_admin_chose_stay_and_are_fine(tmp_path: Path) -> None:
    place = tmp_path / "state"
    place.mkdir()
    place.chmod(0o750)
    own_directory(place, mode=0o711)
    assert place.stat().st_mode & 0o777 == 0o750
    (tmp_path / "moved").symlink_to(place)  # the admin's own link, to another disk
    own_directory(tmp_path / "moved", mode=0o711)
    place.chmod(0o770)
    with pytest.raises(WrongState, match="others may write") as refused:
        own_directory(place, mode=0o711)
    assert f"chmod go-w {place}" in refused.value.remedy
