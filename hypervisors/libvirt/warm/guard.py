"""Lets paused machines run on if whoever paused them dies.

A process of its own, begun before the first is paused. It waits for a word on a pipe; if the pipe ends
without one, its other end was killed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence

from host.printable import one_line
from host.run import Runner, end_talk
from inventory.errors import DriverFailed

_PATIENCE = 5.0  # seconds
_CODE = """\
import contextlib, json, sys
import libvirt, libvirt_qemu
libvirt.registerErrorHandler(lambda *_: None, None)
uri, names = json.loads(sys.argv[1])
connection = libvirt.open(uri)
print("ready", flush=True)
if not sys.stdin.buffer.read(1):
    for name in names:
        try:
            domain = connection.lookupByName(name)
            with contextlib.suppress(libvirt.libvirtError):  # another hypervisor has no monitor
                libvirt_qemu.qemuMonitorCommand(domain, '{"execute": "migrate_cancel"}', 0)
            if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
        except libvirt.libvirtError:
            pass
"""


@contextlib.contextmanager
def guarded(runner: Runner, uri: str, names: Sequence[str]) -> Iterator[None]:
    """Within it these machines run on if this process is killed. What was half done stays so, for
    whoever recovers it. DriverFailed where that process can't begin: nothing is paused then."""
    process = runner.talk(sys.executable, "-I", "-c", _CODE, json.dumps([uri, list(names)]))
    assert process.stdin and process.stdout
    with process:
        try:
            if process.stdout.readline() != b"ready\n":
                said = end_talk(process, _PATIENCE).decode(errors="replace").split("\n")
                raise DriverFailed(
                    f"nobody would let {', '.join(names)} run on if this command were killed: "
                    f"{one_line(next(filter(None, reversed(said)), 'it ended'))}"
                )
            yield
        finally:
            with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended
                process.stdin.write(b".")
                process.stdin.flush()
