"""The lab's QEMU: its command line, its monitor (QMP, docs/interop/qmp-spec.txt of QEMU)."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import re
import select
import shlex
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from host.paths import cache_dir
from host.processes import Process
from host.run import Runner, which
from hypervisors.libvirt.kvm import asked_for, judge
from inventory.errors import CommandFailed, TimedOut, Unsupported
from tests.lab import emulator
from tests.lab.image import Image, place
from tests.lab.kinds import KVM, Kind

SPARE_DISKS = ("d1", "d2", "d3")  # /dev/vdb to /dev/vdd in the lab
_MACHINE = "farmhand-lab-"
EMULATED = "emulated"


@dataclass(frozen=True, slots=True)
class Size:
    """Of a lab, in bytes: its memory, and each of its spare disks."""

    memory: int = 4 * 2**30
    disk: int = 8 * 2**30


@dataclass(frozen=True, slots=True)
class Engine:
    """How this host can run the lab."""

    program: str
    version: str
    accelerator: tuple[str, ...]
    cpu: str
    cpus: int
    why: str  # one line for people
    kernel_words: str = ""  # for the kernel's command line

    def digest(self) -> str:
        """What a saved memory depends on, beside what is in it."""
        host = _cpu_flags() if self.cpu == "host" else ""
        facts = (self.version, self.accelerator, self.cpu, self.cpus, self.kernel_words, USUAL, host)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


USUAL = Size()


def engine(runner: Runner, say: emulator.Say, kind: Kind = KVM, *, beside: bool = False) -> Engine:
    """KVM where a guest really runs under it and can have guests of its own; else emulation, which
    offers AMD's SVM whatever this CPU is, by a newer QEMU where it can be had. ``beside``: another lab
    runs meanwhile. Unsupported without any."""
    program = which("qemu-system-x86_64")
    if program is None:
        raise Unsupported(
            "qemu-system-x86_64 is not installed", remedy="apt-get install qemu-system-x86"
        )
    version = runner.read(program, "--version").stdout.splitlines()[0]
    cores = len(os.sched_getaffinity(0))
    cpus = max(2, min(4, cores))
    asked = asked_for()
    verdict = judge(asked, runner, cache_dir())
    why = verdict.why
    if verdict.usable:
        if _nested():
            return Engine(program, version, ("kvm",), "host", cpus, "under KVM")
        why = "KVM works here, but gives its guests no KVM (module option nested=0)"
    if asked == "kvm":
        raise Unsupported(f"the lab can't run under KVM: {why}", remedy="unset FARMHAND_ACCELERATOR")
    if beside:
        # No more CPUs than there are cores for: each waits for the others to flush their TLBs, spinning,
        # and PV dom0 at each change of a page table. lvs(8) took 3.7 s in one of two Xen labs with two
        # CPUs each on two cores, and 0.5 s with one CPU each (alone: 0.4 s with two, 0.47 s with one).
        cpus = max(1, min(4, cores // 2))
    # one thread a virtual CPU; a translation buffer that a kernel with ZFS fits into
    accelerator, cpu = ("tcg,thread=multi,tb-size=512",), kind.emulated_cpu
    if kind.newer_cpu and (newer := emulator.newer(runner, place(), say)):
        program, cpu = str(newer), kind.newer_cpu
        version = runner.read(program, "--version").stdout.splitlines()[0]
    words = kind.emulated_kernel.format(tsc=tsc_khz())
    return Engine(program, version, accelerator, cpu, cpus, f"{EMULATED}: {why}", words)


def tsc_khz() -> int:
    """How fast this host's time-stamp counter is, which QEMU's emulation hands on to its guests
    (cpu_get_host_ticks() in its include/qemu/timer.h): to 10 MHz, from where a kernel finds the rest."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(bytes.fromhex("0f31 48c1e220 4809d0 c3"))  # rdtsc; shl rdx, 32; or rax, rdx; ret
        place = ctypes.c_char.from_buffer(page)
        counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))
        began, first = _at_once(counter)
        time.sleep(0.1)
        ended, last = _at_once(counter)
        del counter, place  # the page can't go while it is referred to
    return round((last - first) / (ended - began) / 1e7) * 10_000


def _at_once(counter: Callable[[], int]) -> tuple[float, int]:
    """time.monotonic() and the counter, of some tries the quickest."""
    tries = [(time.monotonic(), counter(), time.monotonic()) for _ in range(20)]
    before, ticks, after = min(tries, key=lambda one: one[2] - one[0])
    return (before + after) / 2, ticks


def _nested() -> bool:
    for module in ("kvm_intel", "kvm_amd"):
        with contextlib.suppress(OSError):
            if Path(f"/sys/module/{module}/parameters/nested").read_text().strip() in ("1", "Y"):
                return True
    return False


def _cpu_flags() -> str:
    found = re.search(r"^flags\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[0] if found else ""


def make_overlay(runner: Runner, base: Path, kind: str, out: Path) -> None:
    runner.change("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", kind, out)


def make_spare_disks(directory: Path, size: int) -> None:
    """Sparse, and raw: a write that was answered is in this host's page cache, whatever happens to QEMU.
    (qcow2 keeps its tables to itself until the guest flushes, and LVM never does after its metadata.)"""
    for name in SPARE_DISKS:
        with (directory / f"{name}.raw").open("wb") as file:
            file.truncate(size)


def start(
    runner: Runner, engine: Engine, image: Image, directory: Path, monitor: Path, name: str,
    *, kind: Kind = KVM, size: Size = USUAL, saved: Path | None = None,
) -> tuple[Process, int]:  # fmt: skip
    """Start it over the disks in ``directory``; returns the process and the port of its ssh.
    ``saved``: the memory of a saved state to go on from. It outlives us. CommandFailed with QEMU's
    words."""
    monitor.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pidfile = directory / "pid"
    for attempt in range(5):
        port = _free_port()
        monitor.unlink(missing_ok=True)
        pidfile.unlink(missing_ok=True)
        argv: list[str | Path] = [
            engine.program, "-name", f"{_MACHINE}{name}", "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-machine", "pc", "-accel", *engine.accelerator, "-cpu", engine.cpu,
            "-smp", str(engine.cpus), "-m", str(size.memory // 2**20),
            *kind.boot(image.directory, engine.kernel_words),
        ]  # fmt: skip
        disks = [("run.qcow2", "qcow2"), *((f"{name}.raw", "raw") for name in SPARE_DISKS)]
        for file, form in disks:
            path = str(directory / file).replace(",", ",,")
            options = (
                f"file={path},format={form},if=virtio,cache=unsafe,discard=unmap,detect-zeroes=unmap"
            )
            argv += ["-drive", options]
        argv += [
            "-netdev", f"user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22",
            "-device", "virtio-net-pci,netdev=n0,romfile=",
            "-device", "virtio-rng-pci",
            "-device", "vmgenid,guid=auto",  # tells the guest's kernel that it was cloned: it reseeds
            "-chardev", f"file,id=console,append=on,path={directory / 'console.log'}",
            "-serial", "chardev:console",
            "-qmp", f"unix:{monitor},server=on,wait=off",
            "-pidfile", pidfile, "-daemonize",
        ]  # fmt: skip
        if saved is not None:
            argv += ["-incoming", f"exec:exec cat {shlex.quote(str(saved))}"]
        try:
            runner.change(*argv, timeout=120)
            break
        except CommandFailed as error:  # somebody may have taken the port since we looked
            if attempt == 4 or "forwarding rule" not in error.detail + error.message + error.stderr:
                raise
    return Process.of(int(pidfile.read_text())), port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill(process: Process, limit: float = 20.0) -> bool:
    """SIGKILL to exactly that process; True when it is gone (or was)."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not process.alive():
            return True
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(limit * 1000)) or not process.alive()
    finally:
        os.close(handle)


class Monitor:
    """A QMP connection. A context manager."""

    def __init__(self, path: Path, limit: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(limit)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rwb")
        self._file.readline()  # the greeting
        self.do("qmp_capabilities")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def do(self, command: str, **arguments: object) -> dict[str, object]:
        """CommandFailed with the monitor's own words."""
        request = {"execute": command, "arguments": arguments}
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()
        while True:
            line = self._file.readline()
            if not line:
                raise CommandFailed(f"QEMU ended during the monitor command {command}")
            answer = json.loads(line)
            if "error" in answer:
                raise CommandFailed(f"QEMU refuses {command}: {answer['error'].get('desc')}")
            if "return" in answer:  # what else comes are events
                found = answer["return"]
                return found if isinstance(found, dict) else {"": found}


def save_memory(monitor: Path, out: Path, limit: float) -> None:
    """Write the machine's memory to ``out``, as for a migration; then it stands still, QEMU is there.
    (Stopped beforehand it would be restored as stopped too.)"""
    with Monitor(monitor) as qmp:
        qmp.do("migrate-set-parameters", **{"max-bandwidth": 4 * 2**30})
        qmp.do("migrate", uri=f"exec:exec cat > {shlex.quote(str(out))}")
        end = time.monotonic() + limit
        while time.monotonic() < end:
            state = qmp.do("query-migrate").get("status")
            if state == "completed":
                return
            if state in ("failed", "cancelled"):
                raise CommandFailed(f"QEMU could not save the lab's memory ({state})")
            time.sleep(0.05)
    raise TimedOut(f"QEMU did not save the lab's memory in {limit:g} s")


def quit_qemu(monitor: Path, process: Process) -> None:
    """End it in order: its tables are written out."""
    with contextlib.suppress(OSError, CommandFailed), Monitor(monitor) as qmp:
        qmp.do("quit")
    end = time.monotonic() + 20
    while process.alive() and time.monotonic() < end:
        time.sleep(0.02)
    kill(process)
