"""What zfs says when it fails, as OpenZFS 2.1.11 says it, in our words. The command is a script that
says the same; the real one is held to it in tests/contract/test_zfs.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from host.processes import Process
from host.run import Runner
from hypervisors.disks.devices import await_node, holders
from hypervisors.disks.zfs.disks import ZfsDisks
from hypervisors.disks.zfs.state import options
from inventory.errors import (
    Busy,
    CommandFailed,
    Conflict,
    DriverFailed,
    NoSpace,
    NotFound,
    UsageError,
    spelled,
)
from tests.identities import KATA


@pytest.fixture
def failing(tmp_path: Path, monkeypatch):
    def make(said: str, status: int = 1) -> ZfsDisks:
        (tmp_path / "said").write_text(said)
        command = tmp_path / "zfs"
        command.write_text(f"#!/bin/sh\ncat {tmp_path}/said >&2\nexit {status}\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return ZfsDisks("tank", "kata", KATA, Runner())

    return make


@pytest.mark.parametrize(
    ("said", "error", "remedy"),
    [
        (
            "The ZFS modules are not loaded.\nTry running '/sbin/modprobe zfs' as root to load them.\n",
            DriverFailed,
            "modprobe zfs",
        ),
        ("cannot open 'tank': no such pool\ncannot open pool 'tank'\n", NotFound, "zpool import tank"),
        ("cannot open 'tank': pool I/O is currently suspended\n", DriverFailed, "zpool clear tank"),
        ("Channel program execution failed: Operation not permitted\n", DriverFailed, "root"),
        ("cannot create 'tank/kata': permission denied\n", DriverFailed, "root"),
        ("cannot create 'tank/kata/x': out of space\n", NoSpace, "gc"),
        ("cannot create 'tank/kata/x': dataset already exists\n", Conflict, "zfs list"),
        ("cannot open 'tank/kata/x': dataset does not exist\n", NotFound, "zfs list"),
        ("cannot destroy 'tank/kata/x': dataset is busy\n", Busy, "fuser"),
        ("internal error: out of memory\n", CommandFailed, ""),
    ],
)
def test_each_failure_has_its_words(failing, said, error, remedy):
    with pytest.raises(error) as got:
        failing(said).list()
    assert remedy in spelled(got.value.remedy)
    assert "\n" not in got.value.message


def test_without_the_command_it_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hypervisors.disks.zfs.command.which", lambda name: str(tmp_path / name))
    with pytest.raises(CommandFailed, match="cannot run"):
        ZfsDisks("tank", "kata", KATA, Runner()).list()


def test_values_of_properties_are_plain_text():
    assert options({"a": "b c=d"}) == ["-o", "farmhand:a=b c=d"]
    for bad in ("a\nb", "é", "x" * 1025):
        with pytest.raises(UsageError):
            options({"a": bad})


def test_a_maker_is_this_very_process():
    assert Process.parse(Process.this().mark).alive()
    boot, pid, start = Process.this().mark.split(":")
    assert not Process.parse(f"{boot}:{pid}:{int(start) + 1}").alive()
    assert not Process.parse(f"x{boot}:{pid}:{start}").alive()
    child = subprocess.Popen(["true"])
    child.wait()
    assert not Process.parse(f"{boot}:{child.pid}:{start}").alive()
    for nonsense in ("", "::", f"{boot}::", f"{boot}:x:1"):
        assert not Process.parse(nonsense).alive()


def test_a_device_that_never_comes_is_said(tmp_path):
    with pytest.raises(DriverFailed, match="never") as got:
        await_node(tmp_path / "never", timeout=0.05)
    assert "udevadm" in got.value.remedy
    assert holders(tmp_path / "never") == holders(tmp_path) == ()
