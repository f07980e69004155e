"""The figures of a VM under Xen, each beside what an admin would type for the same result, in turns.
Runs in the Xen lab (``./invoke bench --lab``), on its spare disk.

    clone, reset    of a disk alone, on thin and classic LVM: as bench_stores.py has it
    whole reset     of a running PV guest on thin LVM: xl destroy, lvremove, lvcreate -s, xl create
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from host.paths import cache_dir
from host.run import Runner
from hypervisors.api import MachineSpec, Nic, Owner
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.libxl import Xen
from tests import bench_stores
from tests.bench_stores import FARM, MIB, Group, Measure, Measured, Say, run
from tests.contract import small_guest
from tests.figures import Figure

LIMIT = 1.2  # of a whole reset
_MEMORY = 192 * MIB
_URI = "xen:///system"
_BY_HAND = "xl destroy, lvremove, lvcreate -s, xl create"
_PATIENCE = 300  # seconds for a guest's start


def _in_dom0(measure: Measure) -> Measure:
    """Its figures by names of their own."""

    def measured(place: Path, rounds: int, say: Say) -> Iterator[Figure]:
        for figure in measure(place, rounds, say):
            beside = f"Xen {figure.beside}" if figure.beside else ""
            yield replace(figure, name=f"Xen {figure.name}", beside=beside)

    return measured


def _disks(store: str, opened: Callable[[Path], AbstractContextManager[Group]]) -> Measure:
    def measure(place: Path, rounds: int, say: Say) -> Iterator[Figure]:
        with opened(place) as made:
            yield from bench_stores.lvm_disks(store, made, rounds, say)

    return measure


def _whole(place: Path, rounds: int, say: Say) -> Iterator[Figure]:
    guest = small_guest.build(cache_dir())
    words = "console=hvc0 quiet panic=-1"
    with bench_stores.thin(place) as made:
        ours, theirs = f"{FARM}-ours", "theirs"
        spec = MachineSpec(
            name=ours, owner=Owner(FARM, "ours"), memory=_MEMORY, vcpus=1, disk_size=2**30,
            nic=Nic(mac="00:16:3e:0b:0b:01", mode="bridge", target="xenbr0"),
            kernel=guest.kernel, initrd=guest.initrd, cmdline=words,
        )  # fmt: skip
        config = place / "theirs.cfg"
        config.write_text(
            f"name = '{theirs}'\nkernel = '{guest.kernel}'\nramdisk = '{guest.initrd}'\n"
            f"extra = '{words}'\nmemory = {_MEMORY // MIB}\nvcpus = 1\n"
            f"vif = ['mac=00:16:3e:0b:0b:02,bridge=xenbr0']\n"
            f"disk = ['phy:/dev/{made.name}/{theirs},xvda,w']\n"
        )
        hypervisor = LibvirtHypervisor(
            lambda: _URI, FARM, made.disks, Runner(), kind=Xen(Runner(), "pv")
        )

        def by_hand() -> None:
            run("xl", "destroy", theirs)
            made.bare_reset(theirs)
            run("xl", "create", "-q", config)

        def reset() -> None:
            hypervisor.reset(ours, "clean")
            hypervisor.start(ours)

        hypervisor.define(spec, made.sealed)
        try:
            made.bare_clone(theirs)
            _up(theirs, lambda: run("xl", "create", "-q", config))
            _up(ours, lambda: hypervisor.start(ours))
            measured = Measured("lvm-thin")
            for turn in range(rounds):
                say(f"whole resets under Xen, round {turn + 1} of {rounds}")
                _up(theirs, lambda: measured.take(_BY_HAND, by_hand))
                _up(ours, lambda: measured.take("whole reset", reset))
        finally:
            subprocess.run(["xl", "destroy", theirs], check=False)
            hypervisor.destroy(ours)
            hypervisor.close()
        first, second = measured.figures([(_BY_HAND, "whole reset")])
        yield from (first, replace(second, limit=LIMIT))


def _up(name: str, start: Callable[[], object]) -> None:
    """Start it, and wait until it has nothing more to do: its console is in xenconsoled's log."""
    log = Path(f"/var/log/xen/console/guest-{name}.log")
    before = log.stat().st_size if log.exists() else 0
    start()
    deadline = time.monotonic() + _PATIENCE
    while not log.exists() or b"READY" not in log.read_bytes()[before:]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{name} never was up: see {log}")
        time.sleep(0.05)


STORES = {
    "lvm-thin": _in_dom0(_disks("lvm-thin", bench_stores.thin)),
    "lvm": _in_dom0(_disks("lvm", bench_stores.classic)),
    "whole": _in_dom0(_whole),
}

if __name__ == "__main__":
    sys.exit(bench_stores.main(STORES))
