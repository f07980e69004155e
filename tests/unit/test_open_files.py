"""Too few files that may be open: said in words, not by GLib, which ends the process."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hypervisors.libvirt.private import PrivateLibvirt
from tests.unit.cli_farm import CommandLine, command_line

ROOT = Path(__file__).resolve().parents[2]
cli = pytest.fixture(command_line)

# All but so many of the files that may be open are; then a connection is made, by libvirt's binding
# itself or by ours.
CONNECT = f"""\
import os, resource, sys
import libvirt
sys.path.insert(0, {str(ROOT)!r})
from hypervisors.libvirt.connecting import connect
from inventory.errors import WrongState
way, left, uri = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    for handle in held[: int(left)]:
        os.close(handle)
try:
    (libvirt.open if way == "libvirt" else connect)(uri)
except WrongState as error:
    print(error.message, error.remedy, sep="; ")
"""


def connected(way: str, left: int, path: Path) -> subprocess.CompletedProcess[str]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        uri = f"qemu+unix:///system?socket={path}"
        argv = [sys.executable, "-P", "-c", CONNECT, way, str(left), uri]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_glib_ends_a_process_that_has_no_file_left_for_a_connection(tmp_path: Path) -> None:
    """If it no longer does, what we see to beforehand is not needed any more."""
    done = connected("libvirt", 1, tmp_path / "s")
    assert done.returncode == -signal.SIGTRAP
    assert "GLib-ERROR" in done.stderr and "GWakeup: Too many open files" in done.stderr


@pytest.mark.parametrize("left", [1, 4, 31])
def test_a_connection_is_refused_before(tmp_path: Path, left: int) -> None:
    done = connected("farmhand", left, tmp_path / "s")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "cannot connect to libvirt: Too many open files; "
        "let it have more files open at once: ulimit -n, limits.conf(5)\n"
    )


def test_the_private_libvirtd_may_have_more_files_open_than_a_shell() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with tempfile.TemporaryDirectory(prefix="fh") as name:
        place = Path(name)
        place.chmod(0o711)  # QEMU's user passes through
        daemon = PrivateLibvirt(place / "s", place / "r", place / "c", True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            daemon.uri()
            pid = int((place / "r" / "run" / "libvirtd.pid").read_text())
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (
                8192 if hard == resource.RLIM_INFINITY else min(8192, hard),
                hard,
            )
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            daemon.stop(force=True)


def test_wherever_a_command_meets_the_limit_it_says_so(cli: CommandLine) -> None:
    assert cli("clone-farm", "--no-start").status == 0
    for files in range(6, 14):
        argv = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash", *cli.argv("clone-farm")]
        done = subprocess.run(
            argv, env=cli.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        assert done.returncode == 0 or "ulimit -n" in done.stderr
