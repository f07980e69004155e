"""Another user of the machine: a real one, with no rights to what is ours."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from shutil import rmtree

import pytest

UID = 65534  # nobody's: no account is needed for that
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
_OPENS = """
import json, os, sys
got = []
for path in json.loads(sys.argv[1]):
    for flags in (os.O_RDONLY, os.O_WRONLY):
        try:
            os.close(os.open(path, flags | os.O_NONBLOCK))
            got.append(path)
        except OSError:
            pass
print(json.dumps(got))
"""


_LOCKS = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""

_SQUATS = """
import socket, sys
family, address = (socket.AF_INET6, "::") if sys.argv[2] == "::" else (socket.AF_INET, sys.argv[2])
with socket.socket(family) as squat:
    squat.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    squat.bind((address, int(sys.argv[1])))
    squat.listen()
    print("ready", flush=True)
    while True:
        guest, _ = squat.accept()
        guest.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\\r\\n")
"""


@pytest.fixture
def square() -> Iterator[Path]:
    """A directory where everybody may make files, as /tmp is; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="fh"))
    path.chmod(0o1777)
    yield path
    rmtree(path)


def stranger(program: str, *arguments: str | Path) -> str:
    """What the Python program says, run as the other user."""
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", program, *map(str, arguments)],
        check=True, capture_output=True, text=True, cwd="/", user=UID, group=UID, extra_groups=[],
        umask=0,
    )  # fmt: skip
    return done.stdout


@contextlib.contextmanager
def locked_by_stranger(path: Path) -> Iterator[int]:
    """Within it the other user holds a shared lock on it: its pid."""
    holder = subprocess.Popen(
        ["/usr/bin/python3", "-I", "-c", _LOCKS, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd="/", user=UID, group=UID, extra_groups=[],
    )  # fmt: skip
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        yield holder.pid
    finally:
        holder.communicate()


def opened_by_stranger(paths: Iterable[Path]) -> list[str]:
    """Which of these the other user can open, in any way: enough to lock it."""
    return list(json.loads(stranger(_OPENS, json.dumps([str(path) for path in paths]))))


@contextlib.contextmanager
def squatted(port: int, address: str = "127.0.0.1") -> Iterator[int]:
    """Within it the other user's program listens there: its pid."""
    argv = ["/usr/bin/python3", "-I", "-c", _SQUATS, str(port), address]
    squatter = subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, cwd="/", user=UID, group=UID, extra_groups=[]
    )
    with squatter:
        try:
            assert squatter.stdout and squatter.stdout.readline() == "ready\n"
            yield squatter.pid
        finally:
            squatter.kill()
