"""Network namespaces: the test's own, and places beside it for what wants a network to itself."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()

# br0 with the gateway and a port, for IPv6 waits for a carrier.
BRIDGE = """
echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip addr add fd77::1/64 dev br0 nodad
ip link add port0 type veth peer name port1
ip link set port1 up
ip link set port0 master br0 up
ip link set br0 up
"""


def unique(kind: str) -> str:
    """A name for a namespace or a link that no other test run has: all share /run/netns."""
    return f"{kind}{os.getpid()}n{next(_numbers)}"


def ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, in a network namespace of its own with a bridge."""
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if _libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare: these tests need root")
        subprocess.run(["sh", "-eu", "-c", BRIDGE], check=True)
        yield
    finally:
        if _libc.setns(outside, CLONE_NEWNET):
            os._exit(70)  # else every later test would run in a lost network
        os.close(outside)


@contextlib.contextmanager
def place(*, bridge: bool = True) -> Iterator[str]:
    """A namespace beside, by name, with a bridge and gateway like the test's own. What still runs in it
    ends with it: nobody writes in a yard any more when this returns."""
    name = unique("fhp")
    ip(f"netns add {name}")
    try:
        ip(f"-n {name} link set lo up")
        if bridge:
            subprocess.run([*within(name), "sh", "-eu", "-c", BRIDGE], check=True)
        yield name
    finally:
        for pid in _inside(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not _inside(name))
        ip(f"netns del {name}")


def _inside(name: str) -> list[int]:
    argv = ["ip", "netns", "pids", name]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid in listed.split()]


def within(name: str) -> tuple[str, ...]:
    """What a command begins with to run there; "": here."""
    return ("nsenter", f"--net=/run/netns/{name}") if name else ()


def enter(name: str) -> None:
    """This thread, for good: for threads that a test starts. "": it stays."""
    if not name:
        return
    handle = os.open(Path("/run/netns") / name, os.O_RDONLY)
    try:
        if _libc.setns(handle, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {name}")
    finally:
        os.close(handle)


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it didn't happen"
        time.sleep(0.02)
