"""A QEMU's end, as whoever is at the other end of its sockets sees it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import closing

from hypervisors.libvirt import qemu_process

_CODE = (
    "import socket, sys, time; s = socket.socket(fileno=int(sys.argv[1])); s.send(b'x'); time.sleep(600)"
)


def test_its_sockets_stay_open_until_it_is_gone() -> None:
    near, far = socket.socketpair()
    with closing(near), closing(far):
        argv = [sys.executable, "-c", _CODE, str(far.fileno()), "-uuid", "u", "guest=g,"]
        with subprocess.Popen(argv, pass_fds=[far.fileno()]) as qemu:
            far.close()
            assert near.recv(1) == b"x"
            handle = os.pidfd_open(qemu.pid)
            with qemu_process._kept_open(qemu.pid, handle):
                qemu.kill()
                qemu.wait()
                near.setblocking(False)
                try:
                    assert near.recv(1) == b"", "nothing was said"
                    raise AssertionError("it was closed before its process was gone")
                except BlockingIOError:
                    pass
            os.close(handle)
            assert near.recv(1) == b""


def test_it_is_killed_by_its_name_and_uuid() -> None:
    near, far = socket.socketpair()
    with closing(near), closing(far):
        argv = [sys.executable, "-c", _CODE, str(far.fileno()), "-uuid", "u-1", "guest=g,x"]
        with subprocess.Popen(argv, pass_fds=[far.fileno()]) as qemu:
            assert near.recv(1) == b"x"
            assert not qemu_process.kill_qemu("g", "u-2")
            reaper = threading.Thread(target=qemu.wait)
            reaper.start()
            assert qemu_process.kill_qemu("g", "u-1")
            reaper.join()
            assert qemu.returncode == -9
