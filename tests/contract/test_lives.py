"""A real guest that lives twice from one moment: QEMU itself, no libvirt. Its kernel has no driver for
vmgenid (Debian's for clouds), so both lives would go on with the same random numbers."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_guest

from provision.guest.resume import program

# Programs are read from the console, each up to a line END.
INIT = r"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
stty -echo
numbers() { head -c 16 /dev/urandom | hexdump -ve '1/1 "%02x"'; }
echo "FIRST=$(numbers)"
while :; do
    p=$(while IFS= read -r l; do [ "$l" = END ] && break; printf '%s\n' "$l"; done)
    (eval "$p")
    echo "RANDOM=$(numbers)"
done
"""


def with_perl() -> list[tuple[str, int, bytes]]:
    """As each Debian has it (perl-base is essential), with what it is linked to."""
    perl = shutil.which("perl")
    assert perl
    linked = subprocess.run(["ldd", perl], check=True, capture_output=True, text=True).stdout
    found = [Path(path) for path in re.findall(r"(/\S+) \(", linked)]
    files = [(d, 0o040755, b"") for d in ("lib64", "usr", "usr/lib")]
    files += [("bin/perl", 0o100755, Path(perl).read_bytes())]
    files += [(f"{d}/{p.name}", 0o100755, p.read_bytes()) for p in found for d in ("lib64", "usr/lib")]
    return files


class Machine:
    """A QEMU with its monitor (qmp-spec) and the guest's console."""

    def __init__(self, place: Path, name: str, guest: small_guest.Guest, *, incoming: bool) -> None:
        self.monitor = self.console = b""
        sockets = [place / f"{name}.{kind}" for kind in ("monitor", "console")]
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "pc", "-accel", "tcg", "-cpu", "max", "-m", "192",
             "-nodefaults", "-no-user-config", "-display", "none", "-S",
             "-kernel", guest.kernel, "-initrd", place / "initrd",
             "-append", "console=ttyS0 quiet panic=-1 LD_LIBRARY_PATH=/lib64",
             "-device", "vmgenid,guid=auto",
             "-qmp", f"unix:{sockets[0]},server=on,wait=off", "-serial",
             f"unix:{sockets[1]},server=on,wait=off", *(["-incoming", "defer"] if incoming else [])]
        )  # fmt: skip
        limit = time.monotonic() + 60
        self.ends = []
        for path in sockets:
            end = socket.socket(socket.AF_UNIX)
            while end.connect_ex(str(path)):
                assert time.monotonic() < limit and self.process.poll() is None
                time.sleep(0.01)
            self.ends.append(end)
        self.answers = self.ends[0].makefile("rb")
        self.answers.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> dict:
        self.ends[0].sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self.answers.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def moved(self) -> None:
        limit = time.monotonic() + 120
        while self.ask("query-migrate").get("status") != "completed":
            assert time.monotonic() < limit
            time.sleep(0.01)

    def hear(self, pattern: str) -> re.Match[str]:
        self.ends[1].settimeout(120)
        while not (found := re.search(pattern, self.console.decode(errors="replace"))):
            said = self.ends[1].recv(4096)
            assert said, self.console
            self.console += said
        return found

    def tell(self, text: str) -> None:
        self.ends[1].sendall(text.encode())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for end in (*self.ends, self.answers):
            end.close()


@pytest.fixture
def lives(tmp_path: Path, guest: small_guest.Guest) -> Iterator[list[Machine]]:
    """Two lives, paused, of a guest that was kept once it ran."""
    extra = [("init", 0o100755, INIT.encode()), *with_perl()]
    more = gzip.compress(small_guest.newc(extra), 1)
    (tmp_path / "initrd").write_bytes(guest.initrd.read_bytes() + more)
    kept = f"{tmp_path}/memory"
    with contextlib.ExitStack() as stack:

        def life(name: str, *, incoming: bool) -> Machine:
            machine = Machine(tmp_path, name, guest, incoming=incoming)
            stack.callback(machine.end)
            return machine

        first = life("first", incoming=False)
        first.ask("cont")
        first.hear("FIRST=")
        first.ask("stop")
        first.ask("migrate", uri=f"exec:cat >{kept}")
        first.moved()
        later = [life(name, incoming=True) for name in ("b", "c")]
        for machine in later:
            machine.ask("migrate-incoming", uri=f"exec:cat {kept}")
            machine.moved()
        yield later


def test_two_lives_of_one_moment_have_a_clock_and_random_numbers_of_their_own(
    lives: list[Machine],
) -> None:
    random = set()
    for machine in lives:
        machine.ask("cont")
        machine.tell(f"{program(lived=0, leased=True)}\nEND\n")
        said = machine.hear(r"([0-9a-f-]{36}) ([0-9.]+) (\w+) (\w+) (\d+)")
        assert said[3] == "ioctl", machine.console
        assert said[4] == "none"
        now = int(time.time())
        machine.tell(f"{now + 3600}.250\n")
        assert 0 <= int(machine.hear(r"\n(\d{10})\.")[1]) - now - 3600 < 60
        machine.tell("\x04")
        random.add(machine.hear(r"RANDOM=([0-9a-f]{32})")[1])
    assert len(random) == 2
