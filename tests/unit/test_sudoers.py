"""The rules for sudo(8) that farmhand's own first boot writes, by the very shell function."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from provision.guest.debian import TEMPLATES

FIRSTBOOT = (TEMPLATES / "firstboot" / "firstboot").read_text()


def write(etc: Path, *logins: str) -> str:
    found = re.search(r"^write_sudoers\(\)\n\{.*?^\}$", FIRSTBOOT, re.DOTALL | re.MULTILINE)
    assert found
    script = f"ETC=$1 sudoers=$2\n{found[0]}\nwrite_sudoers"
    argv = ["sh", "-eu", "-c", script, "sh", str(etc), "".join(f"{login}\n" for login in logins)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_a_rule_each_and_none_for_who_is_no_longer_named(tmp_path: Path) -> None:
    rules = tmp_path / "sudoers.d"
    rules.mkdir()
    (rules / "README").touch()
    write(tmp_path, "release", "aleksi")
    assert (rules / "farmhand-aleksi").read_text() == "aleksi ALL=(ALL) NOPASSWD:ALL\n"
    assert (rules / "farmhand-aleksi").stat().st_mode & 0o777 == 0o440
    write(tmp_path, "release")
    assert sorted(path.name for path in rules.iterdir()) == ["README", "farmhand-release"]


def test_an_image_without_sudo_says_so(tmp_path: Path) -> None:
    assert "sudo is not installed" in write(tmp_path, "release")
    assert write(tmp_path) == ""
