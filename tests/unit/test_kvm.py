"""KVM's verdict: our guest itself, and stand-ins for QEMU that do what half-working KVM does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from host.run import Runner, which
from hypervisors.libvirt import kvm, kvm_guest
from hypervisors.libvirt.kvm import KvmVerdict, asked_for, distrust_kvm, judge, kvm_usable, try_guest
from inventory.errors import UsageError

# In place of QEMU: its guest comes so far, answers so (ticks of the clock), and QEMU then does that.
_STAND_IN = """#!{python}
import os, signal, sys, time
def kvm():
    {kvm}
def tcg():
    {tcg}
def told(stages, ticks=None, sum=bytes.fromhex("{sum}")):
    [path] = [a.partition("path=")[2] for a in sys.argv if "path=" in a]
    with open(path, "wb") as file:
        file.write(stages + (b"" if ticks is None else sum + ticks.to_bytes(4, "little")))
def answered(ticks):
    told(b"FLPIA", ticks)
    sys.exit({status})
with open("{ran}", "a") as file:
    print(sys.argv[2], file=file)
globals()[sys.argv[sys.argv.index("-accel") + 1]]()
"""
_SUM = kvm_guest._sum().to_bytes(8, "little")
_HANG = "told(b'%s'); time.sleep(60)"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``verdict(kvm=..., tcg=...)``, of what they are made to do."""
    device = tmp_path / "kvm"
    device.touch()
    ran = tmp_path / "ran"
    ran.touch()
    monkeypatch.setattr(kvm, "_DEVICE", device)
    monkeypatch.setattr(kvm, "_KVM_LIMIT", 20.0)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("FARMHAND_ACCELERATOR", raising=False)
    qemu = tmp_path / "bin" / "qemu-system-x86_64"
    qemu.parent.mkdir()

    def make(kvm: str = "answered(35795)", tcg: str = "answered(501133)") -> None:
        text = _STAND_IN.format(
            python=sys.executable, kvm=kvm, tcg=tcg, sum=_SUM.hex(), status=kvm_guest.STATUS, ran=ran
        )
        qemu.write_text(text)
        qemu.chmod(0o755)

    def verdict(**does: str) -> KvmVerdict:
        make(**does)
        return kvm_usable(Runner(), tmp_path / "cache")

    make()
    return SimpleNamespace(
        verdict=verdict, make=make, ran=lambda: ran.read_text().split(), cache=tmp_path / "cache",
        device=device, qemu=qemu,
    )  # fmt: skip


# -- the guest ----------------------------------------------------------------------------------------


def test_the_guests_bytes_are_what_the_listing_says(tmp_path: Path) -> None:
    source = [line.partition("|")[2] for line in kvm_guest.LISTING.splitlines()]
    (tmp_path / "guest.s").write_text("\n".join([".intel_syntax noprefix", *source, ""]))
    subprocess.run(["as", "--64", "-o", "guest.o", "guest.s"], cwd=tmp_path, check=True)
    copy = ["objcopy", "-O", "binary", "-j", ".text", "guest.o", "guest"]
    subprocess.run(copy, cwd=tmp_path, check=True)
    assert (tmp_path / "guest").read_bytes() == kvm_guest.IMAGE
    assert kvm_guest.__doc__ and f"{len(kvm_guest.IMAGE)} bytes" in kvm_guest.__doc__


def test_the_sum_is_that_of_the_steps_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm_guest, "_ROUNDS", 7)
    monkeypatch.setattr(kvm_guest, "_LINES", 13)
    total = 0
    for seed in (1, 2, 3):
        value = seed
        for _ in range(7 * 13):
            value = (value * 6364136223846793005 + 1442695040888963407) % 2**64
        total += value
    assert kvm_guest._sum() == total % 2**64


def test_it_runs_under_emulation() -> None:
    qemu = which("qemu-system-x86_64")
    assert qemu
    trial = try_guest(Runner(), qemu, "tcg", 60)
    assert trial.why == ""
    assert 0 < trial.work < trial.whole


def test_where_it_hangs_it_is_known_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under real emulation; the guest is one that turns off interrupts where it should let them in."""
    sti, hlt = b"\xfb\xf4", b"\xfa\xf4"
    assert kvm_guest.IMAGE.count(sti) == 1
    monkeypatch.setattr(kvm, "IMAGE", kvm_guest.IMAGE.replace(sti, hlt))
    trial = try_guest(Runner(), str(which("qemu-system-x86_64")), "tcg", 2)
    assert trial.why == (
        "QEMU's emulation failed: its guest did not come to its end in 2 s: it had no timer interrupt"
    )


def test_a_guest_that_crashes_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a page fault that finds no IDT."""
    lidt = b"\x0f\x01\x1c\x25"
    assert kvm_guest.IMAGE.count(lidt) == 1
    broken = kvm_guest.IMAGE.replace(lidt + kvm_guest.IMAGE.partition(lidt)[2][:4], b"\x90" * 8)
    monkeypatch.setattr(kvm, "IMAGE", broken)
    trial = try_guest(Runner(), str(which("qemu-system-x86_64")), "tcg", 60)
    assert trial.why == (
        "QEMU's emulation failed: QEMU exited with 0, and as for its guest, it had no page fault"
    )


# -- the verdict --------------------------------------------------------------------------------------

WORKS = KvmVerdict(True, "KVM runs a guest 14 times as fast as emulation")
HALF = {
    "works": ("answered(35795)", WORKS.why),
    "refuses": (
        "sys.exit('qemu-system-x86_64: warning: x\\nqemu-system-x86_64: error: failed to set MSR 0x1')",
        "KVM failed: failed to set MSR 0x1",
    ),
    "refuses and dies": (
        "sys.stderr.write('qemu-system-x86_64: no MSR\\n'); sys.stderr.flush(); os.abort()",
        "KVM failed: no MSR",
    ),
    "dies": ("os.kill(os.getpid(), signal.SIGSEGV)", "KVM failed: QEMU was killed by SIGSEGV"),
    "slow": ("answered(1002266)", "KVM runs a guest, but 2.0 times slower than emulation"),
    "wrong": (
        "told(b'FLPIA', 1, bytes(8)); sys.exit({status})",
        "KVM runs a guest that can't be trusted: its work came to a wrong sum",
    ),
    "no answer": (
        "told(b'FLPI'); sys.exit({status})",
        "KVM runs a guest that can't be trusted: its work came to a wrong sum",
    ),
    "no clock": ("answered(0)", "KVM runs a guest that can't be trusted: its clock stands still"),
    "crashes": (
        "told(b'FL'); sys.exit(0)",
        "KVM failed: QEMU exited with 0, and as for its guest, it had no page fault",
    ),
}


@pytest.mark.parametrize("kind", HALF)
def test_a_verdict(stand_in: SimpleNamespace, kind: str) -> None:
    does, why = HALF[kind]
    verdict = stand_in.verdict(kvm=does.replace("{status}", str(kvm_guest.STATUS)))
    assert verdict == KvmVerdict(kind == "works", why)
    assert stand_in.ran() == ["tcg", "kvm"]


@pytest.mark.parametrize(
    ("stages", "missing"),
    [
        ("", "none of its code ran"),
        ("F", "it did not get into long mode"),
        ("FL", "it had no page fault"),
        ("FLP", "it had no timer interrupt"),
        ("FLPI", "it had no timer interrupt of its local APIC"),
        ("FLPIA", "it did not end its work"),
    ],
)
def test_kvm_that_hangs_is_given_up(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, stages: str, missing: str
) -> None:
    """Within seconds, and it says how far its guest came."""
    monkeypatch.setattr(kvm, "_KVM_LIMIT", 1.0)
    verdict = stand_in.verdict(kvm=_HANG % stages)
    assert not verdict.usable
    wanted = rf"KVM failed: its guest did not come to its end in [\d.]+ s: {missing}"
    assert re.fullmatch(wanted, verdict.why)


def test_kvm_is_waited_for_longer_where_emulation_takes_long(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An honest KVM in a host that is emulated itself."""
    monkeypatch.setattr(kvm, "_KVM_LIMIT", 0.001)
    verdict = stand_in.verdict(tcg="time.sleep(1); answered(501133)", kvm="answered(35795)")
    assert verdict == WORKS


def test_without_emulation_kvm_is_judged_by_itself(stand_in: SimpleNamespace) -> None:
    verdict = stand_in.verdict(tcg="sys.exit('qemu-system-x86_64: invalid accelerator tcg')")
    assert verdict == KvmVerdict(
        True,
        "KVM runs a guest; not compared with emulation: "
        "QEMU's emulation failed: invalid accelerator tcg",
    )


def test_without_qemu(stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(stand_in.cache))
    verdict = kvm_usable(Runner(), stand_in.cache)
    assert verdict == KvmVerdict(
        False, "qemu-system-x86_64 is not installed: apt-get install qemu-system-x86"
    )
    distrust_kvm(stand_in.cache, "for nothing")
    assert kvm_usable(Runner(), stand_in.cache) == verdict


def test_a_verdict_is_kept_until_something_changes(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert stand_in.verdict() == WORKS == kvm_usable(Runner(), stand_in.cache)
    assert stand_in.ran() == ["tcg", "kvm"]
    monkeypatch.setattr("host.processes.BOOT_ID", tmp_path / "boot")
    (tmp_path / "boot").write_text("another")
    assert kvm_usable(Runner(), stand_in.cache) == WORKS
    assert len(stand_in.ran()) == 4
    monkeypatch.setattr(kvm, "IMAGE", kvm.IMAGE + b"\0")
    assert kvm_usable(Runner(), stand_in.cache) == WORKS
    assert len(stand_in.ran()) == 6


def test_kvm_that_failed_a_guest_is_not_used_until_it_is_to_be_tried_again(
    stand_in: SimpleNamespace,
) -> None:
    assert stand_in.verdict() == WORKS
    distrust_kvm(stand_in.cache, "dev2 said nothing")
    found = kvm_usable(Runner(), stand_in.cache)
    assert (found.usable, found.why) == (False, "dev2 said nothing")
    [command] = re.findall(r"rm (\S+),", found.remedy)
    Path(command).unlink()
    assert kvm_usable(Runner(), stand_in.cache) == WORKS


def test_a_spoilt_note_is_made_anew(stand_in: SimpleNamespace) -> None:
    stand_in.verdict()
    [note] = stand_in.cache.iterdir()
    for text in ("", "[]", "{}", "1", json.dumps({**json.loads(note.read_text()), "more": 1})):
        note.write_text(text)
        assert kvm_usable(Runner(), stand_in.cache) == WORKS


# -- what was asked for -------------------------------------------------------------------------------


def test_the_environment_goes_before_the_farm_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARMHAND_ACCELERATOR", raising=False)
    assert (asked_for(), asked_for("tcg")) == ("auto", "tcg")
    monkeypatch.setenv("FARMHAND_ACCELERATOR", "")
    assert asked_for("kvm") == "kvm"
    monkeypatch.setenv("FARMHAND_ACCELERATOR", "auto")
    assert asked_for("tcg") == "auto"
    monkeypatch.setenv("FARMHAND_ACCELERATOR", "KVM")
    with pytest.raises(UsageError, match="FARMHAND_ACCELERATOR is 'KVM', none of auto, kvm, tcg"):
        asked_for("tcg")


def test_nothing_is_tried_where_emulation_is_asked_for(stand_in: SimpleNamespace) -> None:
    verdict = judge("tcg", Runner(), stand_in.cache)
    assert verdict == KvmVerdict(False, "emulation is what was asked for (accelerator: tcg)")
    assert stand_in.ran() == []
    assert judge("kvm", Runner(), stand_in.cache) == WORKS
