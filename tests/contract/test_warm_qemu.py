"""Warm checkpoints of real QEMU machines."""

import re
import time

import pytest
from machine_rigs import FARM, LibvirtRig

from hypervisors.api import Power

PULSE = re.compile(r"PULSE=(\d+) DISK=(\d+) RANDOM=([0-9a-f]+)")


def pulses(rig: LibvirtRig, vm: str, *, after: int = 0, count: int = 1) -> list[tuple[int, int, str]]:
    """What the guest has counted, in memory and on its disk, and a random number; at least so many."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        log = rig.hypervisor().console(f"{FARM}-{vm}").log
        text = log.read_bytes()[after:].decode(errors="replace") if log else ""
        found = [(int(n), int(d), r) for n, d, r in PULSE.findall(text)]
        if len(found) >= count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"the guest did not go on:\n{text}")


def booted(rig: LibvirtRig, vm: str) -> str:
    spec = rig.spec(vm, options="pulse=0.1")
    rig.hypervisor().define(spec, rig.template)
    rig.boot(vm)
    pulses(rig, vm, count=5)
    return spec.name


def test_disk_and_memory_are_of_one_moment(real: LibvirtRig) -> None:
    name = booted(real, "prod")
    driver = real.hypervisor()
    made = driver.checkpoint_all([name], "ready")[name]
    assert made.id
    kept = driver.memories(name)["ready"]
    print(kept)
    at = pulses(real, "prod")[-1][0]
    later = pulses(real, "prod", count=at + 8)
    assert all(n == d for n, d, _ in later), "it ran on, on its disk"
    randoms = set()
    for _ in range(3):
        driver.stop(name, grace=0)
        assert driver.find(name).power is Power.STOPPED
        real.disks().restore(name, "ready")
        assert driver.find(name).power is Power.SUSPENDED
        t = time.monotonic()
        driver.start(name)
        print("start", time.monotonic() - t)
        assert driver.find(name).power is Power.RUNNING
        seen = pulses(real, "prod", count=5)
        assert seen[0][0] <= at + 1, "it went on from the checkpoint"
        assert all(n == d for n, d, _ in seen[1:])
        randoms.add(seen[2][2])
    print(randoms)
