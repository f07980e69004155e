"""The toolkit's figures, measured in one run beside the bare tools they are built on.

Real qemu-img, a private libvirtd and real QEMU, on guests without an operating system: booting is
the guest's matter. A ratio says more than milliseconds, for machines differ and may be busy; each
figure is a median, with the least beside it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from uuid import uuid4

from host.run import Runner
from hypervisors.api import Forward, Hypervisor, MachineSpec, Nic, Owner, Template
from tests import bench_growth, bench_packages, bench_repositories, bench_warm
from tests.bench_commands import measure as commands
from tests.figures import Figure, Figures, timed
from tests.identities import identity

ROOT = Path(__file__).resolve().parents[1]
_FARM = identity("bench")
_MANY = 10


_PACKAGES, _ALL_PACKAGES = 2000, 20_000
"""Of a repository that is measured: among all figures, and by itself."""


def repositories(*, rounds: int, say: Callable[[str], None]) -> Figures:
    """The package repositories' figures alone, at their full size."""
    with tempfile.TemporaryDirectory(prefix="fhb") as name:
        return Figures(tuple(bench_repositories.measure(Path(name), _ALL_PACKAGES, rounds, say)))


def warm(*, rounds: int, say: Callable[[str], None]) -> tuple[Figures, str]:
    """The figures of warm resets alone, and a drawing of them, as SVG."""
    with tempfile.TemporaryDirectory(prefix="fhb") as name:
        directory = Path(name)
        directory.chmod(0o711)  # QEMU runs as another user and passes through
        figures = bench_warm.measure(directory, rounds, say)
    return figures, bench_warm.chart(figures)


def measure(*, rounds: int, say: Callable[[str], None]) -> Figures:
    """All figures. Needs QEMU and libvirtd; leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="fhb") as name:
        directory = Path(name)
        directory.chmod(0o711)  # QEMU runs as another user and passes through
        figures = [*_drivers(directory, rounds, say), *commands(directory, rounds, say)]
        figures += _network(rounds, say)
        figures += bench_growth.measure(say)
        figures += import_module("tests.contract.far_figures").measure(rounds, say)
        place = directory / "packages"
        place.mkdir()
        figures += bench_repositories.measure(place, _PACKAGES, rounds, say)
        sources = directory / "sources"
        sources.mkdir()
        figures += bench_packages.measure(sources, rounds, say)
        built = directory / "builds"
        built.mkdir()
        figures += import_module("tests.unit.build_figures").measure(built, rounds, say)
    return Figures(tuple(figures))


def _network(rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """On real daemons in a network namespace: for root."""
    if os.geteuid() != 0:
        say("the network services' figures need root: left out")
        return
    measured = import_module("tests.services.figures").measure  # beside the tests' own modules
    for name, seconds, limit, beside in measured(rounds, say):
        yield Figure(name, seconds, limit, beside)


# ---- Drivers: a disk and a definition, against qemu-img and libvirt by themselves.


def _spec(name: str, port: int) -> MachineSpec:
    return MachineSpec(
        name=name,
        owner=Owner(_FARM, name),
        memory=128 * 2**20,
        vcpus=1,
        disk_size=2**30,
        nic=Nic(
            mac=f"52:54:00:be:{port >> 8 & 255:02x}:{port & 255:02x}",
            mode="user",
            forwards=(Forward(port, 22),),
        ),
    )


@contextmanager
def _hypervisor(directory: Path) -> Iterator[tuple[Hypervisor, Template, str]]:
    from host.paths import cache_dir
    from hypervisors.disks.qcow2.disks import Qcow2Disks
    from hypervisors.libvirt.domain_types import Qemu
    from hypervisors.libvirt.driver import LibvirtHypervisor
    from hypervisors.libvirt.kvm import asked_for, judge
    from hypervisors.libvirt.private import PrivateLibvirt

    runner = Runner()
    kvm = judge(asked_for(), runner, cache_dir())
    private = PrivateLibvirt(directory / "l", directory / "r", cache_dir(), not kvm.usable)
    disks = Qcow2Disks(directory / "d", _FARM, runner, reader_uid=private.qemu_uid())
    image = directory / "image.qcow2"
    runner.change("qemu-img", "create", "-q", "-f", "qcow2", image, "1G")
    template = disks.seal(
        image,
        Template(
            name="empty",
            generation=1,
            ref="",
            size=2**30,
            sha256="",
            created=datetime.now(UTC),
            origin="bench",
            firstboot="none",
        ),
    )
    hypervisor = LibvirtHypervisor(private.uri(), _FARM, disks, runner, kind=Qemu(kvm))
    try:
        yield hypervisor, template, private.uri()
    finally:
        for machine in hypervisor.list():
            hypervisor.destroy(machine.name)
        hypervisor.close()
        private.stop(force=True)


def _drivers(directory: Path, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    import libvirt

    say("starting a private libvirtd")
    with _hypervisor(directory) as (hypervisor, template, uri):
        hypervisor.define(_spec("first", 40000), template)  # the first define probes QEMU
        connection = libvirt.open(uri)
        xml = connection.lookupByName("first").XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        ref, runner = Path(template.ref), Runner()

        def bare(name: str) -> None:
            disk = directory / f"{name}.qcow2"
            runner.change("qemu-img", "create", "-q", "-f", "qcow2", "-b", ref, "-F", "qcow2", disk)
            text = re.sub(r"<uuid>.*?</uuid>", f"<uuid>{uuid4()}</uuid>", xml)
            text = text.replace("<name>first</name>", f"<name>{name}</name>")
            text = re.sub(r"(<source file=')[^']*(')", rf"\g<1>{disk}\g<2>", text, count=1)
            text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
            connection.defineXML(text)

        baseline, cloned, parallel, stopped, running = [], [], [], [], []

        def one(name: str, port: int) -> None:
            hypervisor.define(_spec(name, port), template)

        for turn in range(rounds):
            say(f"clones, round {turn + 1} of {rounds}")
            baseline.append(timed(bare, f"bare{turn}"))
            cloned.append(timed(one, f"one{turn}", 40100 + turn))
            parallel.append(timed(_many, hypervisor, template, turn))
            stopped.append(timed(hypervisor.reset, "first", "clean"))
            for i in range(_MANY):
                hypervisor.destroy(f"many{turn}-{i}")
        for turn in range(rounds):
            say(f"resets of a running machine, round {turn + 1} of {rounds}")
            hypervisor.start("first")
            running.append(timed(hypervisor.reset, "first", "clean"))
        for turn in range(rounds):
            connection.lookupByName(f"bare{turn}").undefine()
        connection.close()
    floor = "qemu-img create -b, define"
    yield Figure(floor, tuple(baseline))
    yield Figure("clone of one more VM", tuple(cloned), 1.5, floor)
    yield Figure(f"clone of {_MANY} in parallel", tuple(parallel), 0.5)
    yield Figure("reset, stopped", tuple(stopped), 0.3)
    yield Figure("reset, running, no boot", tuple(running), 0.3)


def _many(hypervisor: Hypervisor, template: Template, turn: int) -> None:
    with ThreadPoolExecutor(_MANY) as pool:
        specs = [_spec(f"many{turn}-{i}", 41000 + turn * 100 + i) for i in range(_MANY)]
        for _ in pool.map(lambda spec: hypervisor.define(spec, template), specs):
            pass
