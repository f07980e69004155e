"""The QEMU that emulated labs get: from the machine's own package sources, or none, with the reason."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.libvirt import kvm
from inventory.errors import CommandFailed, Unsupported
from tests.lab import emulator, qemu
from tests.lab.emulator import _backports, newer
from tests.lab.kinds import KVM


def test_sources_are_the_machines_own_for_the_backports() -> None:
    lines = (
        "deb [signed-by=/k] http://m/debian bookworm main\ndeb http://s/debian bookworm-updates main\n"
    )
    assert _backports(lines, stanzas=False) == (
        "deb [signed-by=/k] http://m/debian bookworm-backports main\n"
    )
    stanzas = (
        "Types: deb\nURIs: http://m/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\n"
        "Types: deb\nURIs: http://s/security\nSuites: bookworm-security\nComponents: main\n"
    )
    assert _backports(stanzas, stanzas=True) == (
        "Types: deb\nURIs: http://m/debian\nSuites: bookworm-backports\nComponents: main"
    )


def test_where_it_can_not_be_had_the_reason_is_told_and_kept_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def fail(_: Runner, cache: Path) -> Path:
        tried.append(cache)
        raise CommandFailed("apt-get exited with 100: no route")

    monkeypatch.setattr(emulator, "_fetch", fail)
    said: list[str] = []
    for _ in range(2):
        assert newer(Runner(), tmp_path, said.append) is None
    assert said == ["no newer QEMU: apt-get exited with 100: no route"] * 2
    assert len(tried) == 1
    yesterday = time.time() - 90_000
    os.utime(tmp_path / "qemu-none", (yesterday, yesterday))
    newer(Runner(), tmp_path, said.append)
    assert len(tried) == 2


def test_the_newest_that_is_there_is_taken(tmp_path: Path) -> None:
    for version in ("10.0.11", "10.0.8"):
        program = tmp_path / f"qemu-{version}/usr/bin/qemu-system-x86_64"
        program.parent.mkdir(parents=True)
        program.touch()
    found = newer(Runner(), tmp_path, pytest.fail)
    assert found == tmp_path / "qemu-10.0.11/usr/bin/qemu-system-x86_64"


def test_the_lab_is_accelerated_as_farms_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same verdict, and the same word of the environment."""
    kind = replace(KVM, newer_cpu="")
    monkeypatch.setattr(kvm, "_DEVICE", tmp_path / "none")
    for asked, why in (("auto", "there is no /dev/kvm"), ("tcg", "emulation is what was asked for")):
        monkeypatch.setenv("FARMHAND_ACCELERATOR", asked)
        engine = qemu.engine(Runner(), print, kind)
        assert engine.accelerator[0].startswith("tcg")
        assert engine.why.startswith(f"emulated: {why}")
    monkeypatch.setenv("FARMHAND_ACCELERATOR", "kvm")
    with pytest.raises(Unsupported, match="the lab can't run under KVM: there is no /dev/kvm"):
        qemu.engine(Runner(), print, kind)
