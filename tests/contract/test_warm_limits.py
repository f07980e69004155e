"""What stands in the way of more than docs/warm.md promises, tried with the real things. A test that
fails here is good news: then that page, and perhaps the design, can change."""

import mmap
import os
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest
from machine_rigs import FARM, LibvirtRig
from test_warm_qemu import WarmVm

from hypervisors.api import Owner
from hypervisors.libvirt.warm.definition import resumed
from hypervisors.libvirt.warm.images import DEFINITION, STATE
from hypervisors.libvirt.warm.monitor import Monitor
from tests.identities import KATA


def test_a_standby_would_be_quick_but_libvirt_cannot_make_it_the_machine(
    real: LibvirtRig, record_property: Callable[[str, object], None]
) -> None:
    """A second, paused QEMU of the same checkpoint, ready beside the first: the switch takes
    milliseconds. But libvirt knows a running QEMU by one name for good, and takes over none that it
    hasn't started: the machine would be another domain after each reset, to virsh, its console, its
    marks."""
    vm = WarmVm(real, "prod")
    vm.boot()
    at = vm.keep("ready")
    vm.back("ready")
    vm.driver.start(vm.name)
    connection = libvirt.open(real.uri())
    first = connection.lookupByName(vm.name)
    standby = _standby(vm, connection)
    assert standby.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    own = _private(standby)
    began = time.monotonic()
    assert vm.driver._kind.cut_power(vm.name, first.UUIDString())
    standby.resume()
    took = time.monotonic() - began
    vm.rig.wait_for("next", f"PULSE={at.stop + 1} ")
    record_property(
        "standby", f"its CPUs ran after {took * 1000:.0f} ms; it had {own >> 20} MiB of its own"
    )
    print(f"standby: its CPUs ran after {took * 1000:.0f} ms; it had {own >> 20} MiB of its own")
    first.undefine()
    with pytest.raises(libvirt.libvirtError, match="cannot rename active domain"):
        standby.rename(vm.name)
    standby.destroy()
    connection.close()


def test_a_mapped_memory_is_not_safe_to_share(tmp_path: Path) -> None:
    """What QEMU does to the file that it maps when a guest inflates its balloon (test_warm_qemu.py shows
    that it does) is seen by everybody who maps it privately and has not touched that page yet: a clone
    could take pages from its siblings' memory. From 8.2 on, QEMU can open the file for reading only."""
    path = tmp_path / "memory"
    path.write_bytes(b"x" * 8 * mmap.PAGESIZE)
    with path.open("r+b") as one, path.open("rb") as other:
        sibling = mmap.mmap(other.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        keep, punch = 1, 2  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE: linux/falloc.h
        assert _fallocate(one.fileno(), keep | punch, 0, mmap.PAGESIZE) == 0
        assert sibling[:1] == b"\0" and sibling[mmap.PAGESIZE :][:1] == b"x"


def _fallocate(handle: int, mode: int, start: int, length: int) -> int:
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return int(call(handle, mode, start, length))


def _standby(vm: WarmVm, connection: libvirt.virConnect) -> libvirt.virDomain:
    """A paused machine of the checkpoint ``ready``, with a disk of its own."""
    home, disks = vm.home("ready"), vm.rig.disks()
    disks.clone(vm.rig.template, f"{FARM}-next", Owner(KATA, "next"), vm.rig.template.size)
    disk = disks.find(f"{FARM}-next").path
    kept = disks.find(vm.name).path.with_name("checkpoint-ready.qcow2")
    vm.driver._runner.change(
        "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", kept, disk, timeout=60
    )
    if vm.rig.reader is not None:
        os.chown(disk, vm.rig.reader, -1)
    now = ET.fromstring(connection.lookupByName(vm.name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    now.find("name").text, now.find("uuid").text = f"{FARM}-next", str(uuid.uuid4())
    for mark in now.find("metadata"):
        mark.attrib.update(name=f"{FARM}-next", vm="next")
    now.find("devices/serial/log").set("file", str(vm.rig.place / "next.log"))
    memory = home / "face"
    text = resumed(
        (home / DEFINITION).read_text(), ET.tostring(now, encoding="unicode"), disk, memory,
        vm.machine().memory,
    )  # fmt: skip
    domain = connection.createXML(text, libvirt.VIR_DOMAIN_START_PAUSED)
    monitor = Monitor(domain)
    state = os.open(home / STATE, os.O_RDONLY)
    monitor.run("getfd", file=state, fdname="farmhand")
    os.close(state)
    monitor.run("migrate-incoming", uri="fd:farmhand")
    assert monitor.wait("completed", limit=60)
    return domain


def _private(domain: libvirt.virDomain) -> int:
    """Bytes that its QEMU shares with nobody (proc(5), smaps_rollup)."""
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if domain.UUIDString().encode() in line.read_bytes():
                rollup = line.with_name("smaps_rollup").read_text()
                return sum(
                    int(row.split()[1]) * 1024 for row in rollup.splitlines()
                    if row.startswith("Private_")
                )  # fmt: skip
        except OSError:
            continue
    raise AssertionError("it has no QEMU")
