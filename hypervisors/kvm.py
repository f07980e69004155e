"""Does KVM really run a guest here? A /dev/kvm that opens proves nothing (nested virtualization that is
half there fails at the first MSR, or hangs): so a guest is started, under a time limit.

The guest is one boot sector: it writes a byte to the port of QEMU's isa-debug-exit device, and QEMU
then exits with that byte times two plus one. Only executed guest code can bring that status about.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from hypervisors.run import Runner, which
from inventory.errors import CommandFailed, TimedOut

_BYTE = 0x2A
_PORT = 0xF4
# mov al, BYTE; out PORT, al; cli; hlt; the rest zeros, and the BIOS's mark of a boot sector
BOOT_SECTOR = bytes([0xB0, _BYTE, 0xE6, _PORT, 0xFA, 0xF4]).ljust(510, b"\0") + b"\x55\xaa"
_STATUS = _BYTE * 2 + 1
# Seconds. With KVM it takes 0.3, but 5 and more in a host that is emulated itself on a busy machine, and
# a wrong verdict would stay until the next boot. KVM that hangs costs this once a boot.
_LIMIT = 20.0
_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class KvmVerdict:
    """``why``: one line for an admin, whichever way it went. ``remedy``: what to do for another verdict,
    where that is known."""

    usable: bool
    why: str
    remedy: str = ""


def kvm_usable(runner: Runner, cache: Path) -> KvmVerdict:
    """Tried once per boot, user and QEMU binary (0.3-20 s), then read from ``cache`` (0.1 ms)."""
    if not _DEVICE.exists():
        return KvmVerdict(
            False, "there is no /dev/kvm: no virtualization in this CPU, or it is switched off"
        )
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return KvmVerdict(False, "this user may not open /dev/kvm: add it to the group kvm")
    qemu = which("qemu-system-x86_64")
    if qemu is None:
        return KvmVerdict(False, "qemu-system-x86_64 is not installed: apt-get install qemu-system-x86")
    if kept := _remembered(cache, qemu):
        return kept
    verdict = try_boot(runner, qemu, "kvm")
    _remember(cache, qemu, verdict)
    return verdict


def distrust_kvm(cache: Path, why: str) -> None:
    """KVM failed a guest, whatever was found out before: ``kvm_usable`` says so, with ``why``, until this
    host boots again or its QEMU changes."""
    qemu = which("qemu-system-x86_64")
    if qemu is None:  # then it isn't usable anyway
        return
    remedy = f"to have it tried again: rm {_note(cache)}, or boot this host anew"
    _remember(cache, qemu, KvmVerdict(False, why, remedy))


def _note(cache: Path) -> Path:
    return cache / f"kvm-{os.geteuid()}.json"


def _key(qemu: str) -> str:
    """What a verdict is about: this boot, this user, this QEMU, this device."""
    seen, device = Path(qemu).stat(), _DEVICE.stat()
    facts = (_BOOT_ID.read_text(), os.geteuid(), qemu, seen.st_mtime_ns, seen.st_ino, device.st_rdev)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _remembered(cache: Path, qemu: str) -> KvmVerdict | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(_note(cache).read_text())
        if kept.pop("key") == _key(qemu):
            return KvmVerdict(**kept)
    return None


def _remember(cache: Path, qemu: str, verdict: KvmVerdict) -> None:
    with contextlib.suppress(OSError):  # a cache that can't be written costs time, no more
        cache.mkdir(parents=True, exist_ok=True)
        fresh = _note(cache).with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"key": _key(qemu), **asdict(verdict)}))
        fresh.replace(_note(cache))


def try_boot(runner: Runner, qemu: str, accelerator: str) -> KvmVerdict:
    """Run the boot sector under that QEMU accelerator ("kvm", "tcg")."""
    name = accelerator.upper()
    cpu = "host" if accelerator == "kvm" else "max"  # as our machines have it: its MSRs are a test too
    with tempfile.TemporaryDirectory(prefix="farmhand-kvm-") as directory:
        sector = Path(directory, "sector")
        sector.write_bytes(BOOT_SECTOR)
        command = [
            qemu, "-accel", accelerator, "-machine", "pc", "-cpu", cpu, "-m", "16",
            "-no-user-config", "-nodefaults", "-display", "none",
            "-device", f"isa-debug-exit,iobase={_PORT:#x},iosize=1",
            "-drive", f"file={sector},format=raw,if=ide,readonly=off,snapshot=on",
        ]  # fmt: skip
        try:
            result = runner.read(*command, timeout=_LIMIT, ok=range(256))
        except TimedOut:
            return KvmVerdict(
                False, f"{name} starts a guest but does not run its code: nothing in {_LIMIT:g} s"
            )
        except CommandFailed as error:  # killed by a signal
            lines = error.stderr.strip().splitlines() or [error.message]
            return KvmVerdict(False, f"{name} failed: {lines[0].removeprefix('qemu-system-x86_64: ')}")
    if result.status == _STATUS:
        return KvmVerdict(True, f"{name} ran a guest in {result.seconds:.1f} s")
    lines = result.stderr.strip().splitlines()
    return KvmVerdict(
        False, f"{name} failed: {lines[0] if lines else f'QEMU exited with {result.status}'}"
    )
