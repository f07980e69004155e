"""Farms to kill things in, each with a state of its own, and the summary of all kills."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bench import EACH, KILLS, MANY, SEED, Bench
from places import (
    FakePlace,
    FarPlace,
    LvmPlace,
    Machines,
    Place,
    Qcow2Place,
    StillQcow2Place,
    TwoFakes,
    XenApiPlace,
    XenMachines,
    ZfsPlace,
)

from tests import farm
from tests.contract import lvm_rig, xenapi_rig, zfs_rig
from tests.repos import FORMATS


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all farms here: libvirt probes QEMU once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    with zfs_rig.pool(f"fhkill{os.getpid()}") as name:
        yield name


@pytest.fixture(scope="module")
def group() -> Iterator[lvm_rig.ThinRig]:
    with lvm_rig.ThinRig(data="3G") as rig:
        yield rig


@pytest.fixture(scope="session")
def xenapi() -> Iterator[xenapi_rig.TestServer]:
    server = xenapi_rig.TestServer()
    yield server
    server.close()


_numbers = itertools.count(1)


def make_place(kind: str, request: pytest.FixtureRequest) -> Place:
    """``kind`` is its label."""
    store = kind.removeprefix("kvm+").removeprefix("xen+")
    if store == "zfs":
        place: Place = ZfsPlace(request.getfixturevalue("pool"), next(_numbers))
    elif store.startswith("lvm-"):
        rig = request.getfixturevalue("group")
        place = LvmPlace(rig.vg, rig.pool, store)
    elif store == "xenapi":
        server = request.getfixturevalue("xenapi")
        server.tell(begin=True)
        return XenApiPlace(xenapi_rig.XenApiRig(server.directory, server), server)
    else:
        return {
            "fake": FakePlace, "two fakes": TwoFakes, "kvm": Qcow2Place, "qcow2": StillQcow2Place,
            "far": FarPlace,
        }[store]()  # fmt: skip
    if kind.startswith("xen+"):
        return XenMachines(place)
    return Machines(place) if kind.startswith("kvm+") else place


# How many kills at steps and calls (None: all) and at random moments an operation gets, see Bench.
# Outside the lab the latter only with FARMHAND_KILLS=many: what they find is rare, and for whoever goes
# looking for it.
KILLS_EACH: dict[str, tuple[int | None, int]] = {
    "fake": (None, 8), "two fakes": (None, 8), "kvm": (None, 2), "qcow2": (None, 8), "xenapi": (3, 2),
    "zfs": (5, 5), "lvm-thin": (2, 2), "lvm-linked": (1, 2), "lvm-full": (1, 1), "kvm+zfs": (1, 1),
    "kvm+lvm-thin": (1, 1), "xen+lvm-thin": (1, 1), "far": (3, 1),
}  # fmt: skip
LABELS = tuple(KILLS_EACH)
AT_RANDOM = MANY or Path("/etc/lab/load").exists()
lab, xen = pytest.mark.lab, pytest.mark.xen
HERE = ("fake", "kvm", "xenapi", "far")
STORES = ("zfs", "lvm-thin", "lvm-linked", "lvm-full")


def of_lab(label: str) -> pytest.MarkDecorator:
    return xen if label.startswith("xen+") else lab


@contextmanager
def bench_on(place: Place, cache: Path, **options: Any) -> Iterator[Bench]:
    """Its farm has a state of its own. ``options``: see Bench."""
    # Short, and passable for QEMU's user: pytest's own directories are neither. In memory: what SIGKILL
    # leaves is the same there, and nobody waits for the journal's fsync; power cuts have their own test.
    directory = Path(tempfile.mkdtemp(prefix="fh-", dir="/dev/shm"))
    directory.chmod(0o711)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FARMHAND_STATE_DIR", str(directory / "s"))
        patch.setenv("FARMHAND_RUNTIME_DIR", str(directory / "r"))
        patch.setenv("FARMHAND_CACHE_DIR", str(cache))
        place.open()
        chosen, moments = KILLS_EACH[place.label]
        if not AT_RANDOM:
            moments = 0
        made = Bench(directory, place, chosen=chosen, moments=moments, **options)
        try:
            made.seal()
            yield made
        finally:
            made.close()
            with made.site() as site:
                farm.destroy(site)
            place.close()
        assert not (directory / "s" / "farms").exists(), "the whole farm was destroyed"
        shutil.rmtree(directory)


STORES_HERE = [
    *HERE,
    # a kill with all that goes with it takes half a minute there: see test_walk
    *(
        pytest.param(label, marks=of_lab(label))
        for label in LABELS
        if (MANY or EACH) and label not in (*HERE, "two fakes", "qcow2")
    ),
]
on_two_as_well = pytest.mark.parametrize("bench", [*STORES_HERE, "two fakes"], indirect=True)


@pytest.fixture(scope="module", params=STORES_HERE)
def bench(request: pytest.FixtureRequest, cache: Path) -> Iterator[Bench]:
    """One for all tests of a module: in the lab to make one takes as long as many kills."""
    with bench_on(make_place(request.param, request), cache) as made:
        yield made


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not KILLS.counts:
        return
    operations = list(dict.fromkeys(operation for operation, _ in KILLS.counts))
    labels = [d for d in (*LABELS, *FORMATS) if any(label == d for _, label in KILLS.counts)]
    width, columns = max(map(len, operations)), [max(len(label), 5) for label in labels]
    terminalreporter.section("kills")

    def line(first: str, cells: list[str]) -> None:
        row = "  ".join(f"{cell:>{column}}" for cell, column in zip(cells, columns, strict=True))
        terminalreporter.write_line(f"{first:{width}}  {row}")

    line("", labels)
    for operation in operations:
        line(operation, [str(KILLS.counts.get((operation, d), 0) or "-") for d in labels])
    line("", [str(sum(n for (_, d), n in KILLS.counts.items() if d == label)) for label in labels])
    failed = [r for end in ("failed", "error") for r in terminalreporter.stats.get(end, ())]
    failed = [r for r in failed if "_kills" in r.nodeid]
    for context in KILLS.open:
        terminalreporter.write_line(f"lost: {context}")
    lost = max(len(KILLS.open), len(failed))
    terminalreporter.write_line(
        f"{len(operations)} operations x {len(labels)} stores, {sum(KILLS.counts.values())} kills, "
        f"losses {lost} (FARMHAND_SEED={SEED})"
    )
