"""Does KVM really run a guest here, and is it worth it? A /dev/kvm that opens proves nothing: nested
virtualization that is half there fails at the first MSR, or runs a boot sector and hangs in a kernel, or
takes a second for what takes emulation a tenth. So a guest of ours (hypervisors/libvirt/kvm_guest.py),
in a machine like those it is asked for, does what a kernel does and answers; under emulation first,
for its time is what KVM has to beat, and limits how long KVM is waited for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from host.documents import json_object, made, read_file
from host.files import write_note
from host.processes import boot_id
from host.run import Runner, which
from hypervisors.libvirt.kvm_guest import EXIT_PORT, IMAGE, STAGES, STATUS, read_answer
from inventory.errors import CommandFailed, FarmhandError, TimedOut, UsageError

# Seconds. Emulation takes 0.2, in a host that is emulated itself 10 to 60, and KVM then takes 5 to 25. A
# wrong verdict would stay until the next boot.
_EMULATION_LIMIT = 60.0
_KVM_LIMIT = 5.0
_KVM_TIMES = 3  # of what emulation took, where that is more: all of it, with QEMU's start and firmware
_DEVICE = Path("/dev/kvm")
_VARIABLE = "FARMHAND_ACCELERATOR"

Accelerator = Literal["auto", "kvm", "tcg"]
DO_WITHOUT = f"accelerator: auto (or {_VARIABLE}=auto) takes QEMU's emulation where KVM doesn't work"
"""What to do where KVM is asked for and doesn't work."""


@dataclass(frozen=True, slots=True)
class KvmVerdict:
    """``why``: one line for an admin, whichever way it went. ``remedy``: what to do for another verdict,
    where that is known."""

    usable: bool
    why: str
    remedy: str = ""


def asked_for(declared: Accelerator = "auto") -> Accelerator:
    """What a farm file declares for a host; FARMHAND_ACCELERATOR goes before it. UsageError."""
    match os.environ.get(_VARIABLE):
        case None | "":
            return declared
        case ("auto" | "kvm" | "tcg") as given:
            return given
        case other:
            raise UsageError(
                f"{_VARIABLE} is {other!r}, none of auto, kvm, tcg",
                remedy=f"unset {_VARIABLE}, or set it to one of these",
            )


def judge(accelerator: Accelerator, runner: Runner, cache: Path) -> KvmVerdict:
    """See ``kvm_usable``; for ``tcg`` nothing is tried."""
    if accelerator == "tcg":
        return KvmVerdict(False, "emulation is what was asked for (accelerator: tcg)")
    return kvm_usable(runner, cache)


def kvm_usable(runner: Runner, cache: Path) -> KvmVerdict:
    """Tried once per boot, user and QEMU binary (0.5 s, where KVM hangs 5 s), then read from ``cache``
    (0.1 ms)."""
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
    verdict = _compare(runner, qemu)
    _remember(cache, qemu, verdict)
    return verdict


def distrust_kvm(cache: Path, why: str) -> None:
    """KVM failed a guest, whatever was found out before: ``kvm_usable`` says so, with ``why``, until
    this host boots again or its QEMU changes."""
    qemu = which("qemu-system-x86_64")
    if qemu is None:  # then it isn't usable anyway
        return
    remedy = f"to have it tried again: rm {_note(cache)}, or boot this host anew"
    _remember(cache, qemu, KvmVerdict(False, why, remedy))


def _note(cache: Path) -> Path:
    return cache / f"kvm-{os.geteuid()}.json"


def _key(qemu: str) -> str:
    """What a verdict is about: this boot, user, QEMU and device, and our guest."""
    seen, device = Path(qemu).stat(), _DEVICE.stat()
    boot, user = boot_id(), os.geteuid()
    facts = (boot, user, qemu, seen.st_mtime_ns, seen.st_ino, device.st_rdev, IMAGE)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _remembered(cache: Path, qemu: str) -> KvmVerdict | None:
    with contextlib.suppress(OSError, ValueError):
        kept = json_object(read_file(_note(cache)))
        if kept.get("key") == _key(qemu):
            return made(KvmVerdict, kept)
    return None


def _remember(cache: Path, qemu: str, verdict: KvmVerdict) -> None:
    with contextlib.suppress(OSError, FarmhandError):  # not written it costs time, no more
        write_note(_note(cache), json.dumps({"key": _key(qemu), **asdict(verdict)}))


@dataclass(frozen=True, slots=True)
class Trial:
    """``why``: what failed; "": nothing. Seconds: ``work``, of the guest's work alone; ``whole``, with
    QEMU's start and its firmware."""

    why: str
    work: float
    whole: float


def _compare(runner: Runner, qemu: str) -> KvmVerdict:
    emulated = try_guest(runner, qemu, "tcg", _EMULATION_LIMIT)
    limit = max(_KVM_LIMIT, _KVM_TIMES * emulated.whole)
    accelerated = try_guest(runner, qemu, "kvm", limit)
    if accelerated.why:
        return KvmVerdict(False, accelerated.why)
    if emulated.why:
        return KvmVerdict(True, f"KVM runs a guest; not compared with emulation: {emulated.why}")
    speed = emulated.work / accelerated.work
    if speed < 1:
        return KvmVerdict(
            False, f"KVM runs a guest, but {_times(1 / speed)} times slower than emulation"
        )
    return KvmVerdict(True, f"KVM runs a guest {_times(speed)} times as fast as emulation")


def try_guest(runner: Runner, qemu: str, accelerator: Literal["kvm", "tcg"], limit: float) -> Trial:
    """Run the guest under that QEMU accelerator, for ``limit`` seconds at most."""
    name = "KVM" if accelerator == "kvm" else "QEMU's emulation"
    cpu = "host" if accelerator == "kvm" else "max"  # as our machines have it: its MSRs are a test too
    import tempfile  # 1 ms, and most commands find a verdict

    with tempfile.TemporaryDirectory(prefix="farmhand-kvm-") as directory:
        image, said = Path(directory, "image"), Path(directory, "said")
        image.write_bytes(IMAGE)
        said.touch()
        command = [
            qemu, "-accel", accelerator, "-machine", "pc", "-cpu", cpu, "-m", "512",
            "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
            "-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1",
            "-chardev", f"file,id=said,path={str(said).replace(',', ',,')}",
            "-device", "isa-debugcon,chardev=said", "-kernel", str(image),
        ]  # fmt: skip
        try:
            result = runner.read(*command, timeout=limit, ok=range(256))
        except TimedOut:
            stage, _ = read_answer(said.read_bytes())
            how = f"its guest did not come to its end in {limit:.3g} s: {STAGES[stage]}"
            return Trial(f"{name} failed: {how}", 0, limit)
        except CommandFailed as error:
            how = error.message
            if error.status is not None:
                how = _words(error.stderr) or f"QEMU was killed by {signal.Signals(-error.status).name}"
            return Trial(f"{name} failed: {how}", 0, 0)
        stage, seconds = read_answer(said.read_bytes())
    if result.status != STATUS:
        crashed = f"QEMU exited with {result.status}, and as for its guest, {STAGES[stage]}"
        return Trial(f"{name} failed: {_words(result.stderr) or crashed}", 0, result.seconds)
    if not seconds:
        what = "its clock stands still" if seconds == 0 else "its work came to a wrong sum"
        return Trial(f"{name} runs a guest that can't be trusted: {what}", 0, result.seconds)
    return Trial("", seconds, result.seconds)


def _words(stderr: str) -> str:
    """QEMU's first line that is more than a warning; "" if there is none."""
    lines = [line for line in stderr.strip().splitlines() if ": warning: " not in line]
    return lines[0].removeprefix("qemu-system-x86_64: ").removeprefix("error: ") if lines else ""


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.5 else f"{ratio:.1f}"
