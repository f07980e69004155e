"""Lets paused machines run on, and thaws their guests' file systems, if whoever paused them dies.

A process of its own, begun before the first is paused. It waits for a word on a pipe: that all run, or
that they could not be made to; if the pipe ends without one, its other end was killed. It looks after
those alone whose image is under construction as it was then: whoever recovers them ends it by that. So
it is in nobody's way, and may go on while who began it ends, or does something else."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from host.printable import one_line
from host.run import Runner, end_talk, leave_talk
from hypervisors.libvirt.warm.images import FROZEN, HELD
from inventory.errors import DriverFailed

_PATIENCE = 5.0  # seconds that it is waited for
_LIMIT = 60.0
"""Seconds in which it tries again: libvirtd may be away, a guest's agent busy."""
_ALL_RUN, _DO_IT = b".", b"!"
_CODE = """\
import contextlib, json, os, sys, time
import libvirt, libvirt_qemu
libvirt.registerErrorHandler(lambda *_: None, None)
uri, places, held, frozen, limit = json.loads(sys.argv[1])
libvirt.open(uri).close()
print("ready", flush=True)

def runs_on(domain, place):
    if not domain.isActive():
        return True
    with contextlib.suppress(libvirt.libvirtError):  # another hypervisor has no monitor
        libvirt_qemu.qemuMonitorCommand(domain, '{"execute": "migrate_cancel"}', 0)
    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED and os.path.exists(f"{place}/{held}"):
        domain.resume()
    return True

def thaws(domain, place):
    if os.path.exists(f"{place}/{frozen}") and domain.isActive():
        domain.agentSetResponseTimeout(5)
        domain.fsThaw()
    return True

def done(connection, does, name, place):
    with contextlib.suppress(libvirt.libvirtError):
        return not os.path.exists(f"{place}/{held}") or does(connection.lookupByName(name), place)

if sys.stdin.buffer.read(1) != b".":
    end = time.monotonic() + limit
    left = [(does, *one) for does in (runs_on, thaws) for one in places.items()]
    while left and time.monotonic() < end:
        with contextlib.suppress(libvirt.libvirtError):
            connection = libvirt.open(uri)  # anew: the daemon may be another one by now
            left = [one for one in left if not done(connection, *one)]
        time.sleep(0.1)
"""


@contextlib.contextmanager
def guarded(runner: Runner, uri: str, places: Mapping[str, Path]) -> Iterator[Callable[[], None]]:
    """Within it these machines run on, and are thawed, if this process is killed, and after it unless
    what it gives was called: that all run. What was half done stays so, for whoever recovers it.
    ``places``: where each one's image is under construction, marked by ``HELD`` and ``FROZEN``.
    DriverFailed where that process can't begin: nothing is paused then."""
    there = {name: str(place) for name, place in places.items()}
    told = json.dumps([uri, there, HELD, FROZEN, _LIMIT])
    process = runner.talk(sys.executable, "-I", "-c", _CODE, told)
    assert process.stdin and process.stdout
    word = _DO_IT

    def all_run() -> None:
        nonlocal word
        word = _ALL_RUN

    try:
        if process.stdout.readline() != b"ready\n":
            said = end_talk(process, _PATIENCE).decode(errors="replace").split("\n")
            raise DriverFailed(
                f"nobody would let {', '.join(places)} run on if this command were killed: "
                f"{one_line(next(filter(None, reversed(said)), 'it ended'))}"
            )
        try:
            yield all_run
        finally:
            with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended
                process.stdin.write(word)
                process.stdin.flush()
    finally:
        leave_talk(process, _PATIENCE)
