"""The disk stores' figures: each beside the bare commands that an admin would type for the same result,
in turns, on the same pool or group. Runs in the lab (``./invoke bench --lab``), on its spare disks.

    clone      zfs clone -o ..., and its device there; lvcreate -s
    reset      zfs rollback; lvremove of the old and lvcreate -s under its name
    written    the same reset right after the disk was written to, while udev looks at it
    older      a reset to another checkpoint than the newest: zfs clone, two renames, zfs destroy
    farm       that many clones at once, as clone-farm does it; the bare clones in a loop

Right before it clones, a store is asked for its templates, as by clone-farm, which has to find them:
from that look it goes on. That look is in no figure, as finding the template is not in the bare one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from host.run import Runner
from hypervisors.api import Disks, Owner, Template
from hypervisors.disks.lvm.classic import LvmClassicDisks
from hypervisors.disks.lvm.thin import LvmThinDisks
from hypervisors.disks.zfs.disks import ZfsDisks
from tests.figures import Figure, Figures, timed
from tests.identities import identity

FARM = identity("bench")
MIB = 2**20
LIMIT = 1.3
MANY = 20
HUNDRED = 100
HUGE = 30 * 2**30
ROOM = 100 * MIB  # for a hundred clones
LVM_DEVICE = os.environ.get("FARMHAND_LAB_LVM_DEVICE", "/dev/vdb")
ZFS_DEVICE = os.environ.get("FARMHAND_LAB_ZFS_DEVICE", "/dev/vdc")
_AT_ONCE = 10  # VMs side by side

Say = Callable[[str], None]


def run(*argv: str | Path) -> str:
    """A bare command, its error in full. Typed again where udev was just looking at a new device."""
    while True:
        done = subprocess.run(
            [str(a) for a in argv], check=False, capture_output=True, text=True,
            env={**os.environ, "LVM_SUPPRESS_FD_WARNINGS": "1"},
        )  # fmt: skip
        if "dataset is busy" not in done.stderr:
            break
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def template(name: str, size: int) -> Template:
    return Template(
        name=name, generation=1, ref="", size=size, sha256="", created=datetime.now(UTC),
        origin="bench", firstboot="none",
    )  # fmt: skip


def image(place: Path, size: int) -> Path:
    """Sparse, with 8 MiB of data."""
    raw, path = place / "image.raw", place / "image.qcow2"
    raw.write_bytes(os.urandom(8 * MIB))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    run("qemu-img", "resize", "-q", "-f", "qcow2", path, str(size))
    return path


def write(path: Path) -> None:
    """What a short build leaves: 1 MiB."""
    with path.open("r+b") as file:
        file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


def at_rest() -> None:
    """Until udev has looked at what was written. ``zfs rollback`` works beneath whoever has a volume
    open, and so beneath udev; ours refuses that, and waits for udev."""
    run("udevadm", "settle")


def until(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def clone_all(disks: Disks, sealed: Template, machines: Sequence[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(lambda m: disks.clone(sealed, m, Owner(FARM, m), sealed.size), machines):
            pass


_MORE = ("checkpoint", "reset, just written")  # they do more than the bare command: flush, wait for udev
Work = tuple[Any, ...]  # the sample's name, what to call, its arguments


class Measured:
    """Samples by name, taken in turns."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._seconds: dict[str, list[float]] = {}

    def take(self, name: str, work: Callable[..., object], *arguments: object) -> None:
        self._seconds.setdefault(name, []).append(timed(work, *arguments))

    def both(self, bare: Work, ours: Work) -> None:
        """One after the other; who is first changes from time to time, for the second one has what udev
        and the pool still do for the first."""
        turns = len(self._seconds.get(bare[0], ()))
        for name, work, *arguments in (bare, ours) if turns % 2 == 0 else (ours, bare):
            self.take(name, work, *arguments)

    def figures(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Figure]:
        """Bare and ours, in this order."""
        for bare, ours in pairs:
            first = f"{self._store}: {bare}"
            yield Figure(first, tuple(self._seconds[bare]))
            limit = None if ours in _MORE else LIMIT
            yield Figure(f"{self._store}: {ours}", tuple(self._seconds[ours]), limit, first)


# ---- ZFS


@contextlib.contextmanager
def pool() -> Iterator[str]:
    name = f"fhbench{os.getpid()}"
    run("modprobe", "zfs")
    run("zpool", "create", "-f", "-O", "mountpoint=none", "-O", "compression=on", name, ZFS_DEVICE)
    try:
        yield name
    finally:
        subprocess.run(["udevadm", "settle", "--timeout=20"], check=False)
        run("zpool", "destroy", "-f", name)
        run("wipefs", "-qaf", ZFS_DEVICE)


def zfs(place: Path, rounds: int, say: Say) -> Iterator[Figure]:
    with pool() as name:
        disks = ZfsDisks(name, "farm", FARM, Runner())
        sealed = disks.seal(image(place, 2**30), template("base", 2**30))
        run("zfs", "create", f"{name}/bare")
        at, measured = f"{name}/bare", Measured("zfs")

        def device(volume: str) -> Path:
            return Path("/dev/zvol", volume)

        def write_both(theirs: str, ours: str) -> None:
            for path in (device(theirs), disks.ready(ours).path):
                write(path)

        def bare_clone(volume: str) -> None:
            run("zfs", "clone", "-o", "bench:vm=prod", "-o", "bench:farm=kata", sealed.ref, volume)
            until(device(volume))

        def bare_older(volume: str) -> None:
            run("zfs", "clone", "-o", "bench:vm=prod", sealed.ref, f"{volume}.new")
            run("zfs", "rename", volume, f"{volume}.old")
            run("zfs", "rename", f"{volume}.new", volume)
            run("zfs", "destroy", "-r", f"{volume}.old")
            until(device(volume))

        for turn in range(rounds):
            say(f"ZFS volumes, round {turn + 1} of {rounds}")
            theirs, ours = f"{at}/vm{turn}", f"vm{turn}"
            owner = Owner(FARM, ours)
            disks.templates()
            measured.both(
                ("zfs clone", bare_clone, theirs), ("clone", disks.clone, sealed, ours, owner, 2**30)
            )
            write_both(theirs, ours)
            measured.both(
                ("zfs clone, rename, destroy", bare_older, theirs),
                ("first reset", disks.restore, ours, "clean"),
            )
            run("zfs", "snapshot", f"{theirs}@start")
            write_both(theirs, ours)
            measured.both(
                ("zfs rollback, just written", run, "zfs", "rollback", f"{theirs}@start"),
                ("reset, just written", disks.restore, ours, "clean"),
            )
            write_both(theirs, ours)
            at_rest()
            measured.both(
                ("zfs rollback", run, "zfs", "rollback", f"{theirs}@start"),
                ("reset", disks.restore, ours, "clean"),
            )
            measured.both(
                ("zfs snapshot", run, "zfs", "snapshot", f"{theirs}@one"),
                ("checkpoint", disks.checkpoint, ours, "one"),
            )
            write_both(theirs, ours)
            measured.both(
                ("zfs clone, rename, destroy (older)", bare_older, theirs),
                ("reset to an older one", disks.restore, ours, "clean"),
            )
        for turn in range(max(1, rounds // 2)):
            say(f"ZFS volumes, a farm of {MANY}, round {turn + 1}")
            names = [f"f{turn}-{n}" for n in range(MANY)]

            def loop(names: list[str] = names) -> None:
                for vm in names:
                    run("zfs", "clone", "-o", "bench:vm=prod", "-o", "bench:farm=kata", sealed.ref,
                        f"{at}/{vm}")  # fmt: skip
                for vm in names:
                    until(device(f"{at}/{vm}"))

            measured.take(f"zfs clone, {MANY} in a loop", loop)
            run("udevadm", "settle")
            measured.take(f"farm of {MANY}", clone_all, disks, sealed, names)
            run("udevadm", "settle")
            for vm in names:
                disks.destroy(vm)
            run("zfs", "destroy", "-r", at)
            run("zfs", "create", at)
        yield from measured.figures(
            [
                ("zfs clone", "clone"),
                ("zfs rollback", "reset"),
                ("zfs rollback, just written", "reset, just written"),
                ("zfs clone, rename, destroy", "first reset"),
                ("zfs clone, rename, destroy (older)", "reset to an older one"),
                ("zfs snapshot", "checkpoint"),
                (f"zfs clone, {MANY} in a loop", f"farm of {MANY}"),
            ]
        )
        say(f"ZFS volumes, space of {HUNDRED} clones")
        yield space("zfs", disks, place, lambda: zfs_used(name))
    with pool() as name:
        say(f"ZFS files, space of {HUNDRED} clones")
        files = ZfsDisks(name, "farm", FARM, Runner(), files=place / "mounts")
        yield space("zfs-files", files, place, lambda: zfs_used(name))
        for mount in (place / "mounts").glob("*"):
            run("umount", mount)


def zfs_used(name: str) -> int:
    run("zpool", "sync", name)
    return int(run("zfs", "get", "-Hpo", "value", "used", name))


def space(store: str, disks: Disks, place: Path, used: Callable[[], int]) -> Figure:
    """What a hundred clones of a large template take of the pool, all together."""
    huge = disks.seal(image(place, HUGE), template("huge", HUGE))
    before = used()
    clone_all(disks, huge, [f"h{n}" for n in range(HUNDRED)])
    taken = used() - before
    return Figure(f"{store}: space of {HUNDRED} clones of 30G", (float(taken),), ROOM, unit="B")


# ---- LVM


@contextlib.contextmanager
def group() -> Iterator[str]:
    name = f"fhbench{os.getpid()}"
    run("vgcreate", "-q", "-y", name, LVM_DEVICE)
    try:
        yield name
    finally:
        run("vgremove", "-q", "-f", "-y", name)
        run("pvremove", "-q", "-f", "-y", LVM_DEVICE)


@dataclass(frozen=True, slots=True)
class Group:
    """A volume group with a sealed template, ``disks`` of ours in it, and what clones that by hand."""

    name: str
    disks: LvmThinDisks | LvmClassicDisks
    sealed: Template
    options: tuple[str, ...]  # lvcreate's

    def bare_clone(self, volume: str) -> None:
        run("lvcreate", "-q", "-y", "-s", *self.options, "-kn", "-ay", "-n", volume, "--addtag", "vm",
            self.sealed.ref)  # fmt: skip

    def bare_reset(self, volume: str) -> None:
        run("lvremove", "-q", "-f", f"{self.name}/{volume}")
        self.bare_clone(volume)


@contextlib.contextmanager
def thin(place: Path) -> Iterator[Group]:
    with group() as vg:
        run("lvcreate", "-q", "--type", "thin-pool", "-L", "6G", "--poolmetadatasize", "64M",
            "-n", "pool", vg)  # fmt: skip
        disks = LvmThinDisks(vg, "pool", FARM, Runner(), links=place / "links")
        sealed = disks.seal(image(place, 2**30), template("base", 2**30))
        yield Group(vg, disks, sealed, ("-prw",))


@contextlib.contextmanager
def classic(place: Path) -> Iterator[Group]:
    with group() as vg:
        disks = LvmClassicDisks(vg, FARM, Runner(), links=place / "links", share=0.1)
        sealed = disks.seal(image(place, 2**30), template("base", 2**30))
        yield Group(vg, disks, sealed, ("-L", "100M", "-c", "4096b"))


def lvm_thin(place: Path, rounds: int, say: Say) -> Iterator[Figure]:
    with thin(place) as made:
        yield from lvm("lvm-thin", made, rounds, say)
        say(f"LVM thin, space of {HUNDRED} clones")

        def used() -> int:
            """By the kernel's count: metadata blocks of 4 KiB, data blocks of the pool's chunk size
            (kernel: admin-guide/device-mapper/thin-provisioning)."""
            words = run("dmsetup", "status", f"{made.name}-pool-tpool").split()
            metadata, data = (int(word.partition("/")[0]) for word in words[4:6])
            argv = ("lvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "chunk_size")
            return metadata * 4096 + data * int(run(*argv, f"{made.name}/pool"))

        yield space("lvm-thin", made.disks, place, used)


def lvm_classic(place: Path, rounds: int, say: Say) -> Iterator[Figure]:
    with classic(place) as made:
        yield from lvm("lvm", made, rounds, say)


def lvm(store: str, made: Group, rounds: int, say: Say) -> Iterator[Figure]:
    yield from lvm_disks(store, made, rounds, say)
    yield from lvm_farm(store, made, rounds, say)


def lvm_disks(store: str, made: Group, rounds: int, say: Say) -> Iterator[Figure]:
    """Disk by disk."""
    measured, vg, disks, sealed = Measured(store), made.name, made.disks, made.sealed
    for turn in range(rounds):
        say(f"{store}, round {turn + 1} of {rounds}")
        theirs, ours = f"bare{turn}", f"vm{turn}"
        owner = Owner(FARM, ours)
        disks.templates()
        measured.both(
            ("lvcreate -s", made.bare_clone, theirs), ("clone", disks.clone, sealed, ours, owner, 2**30)
        )
        for path in (Path("/dev", vg, theirs), disks.ready(ours).path):
            write(path)
        measured.both(
            ("lvremove, lvcreate -s", made.bare_reset, theirs),
            ("reset", disks.restore, ours, "clean"),
        )
    for turn in range(rounds):
        disks.destroy(f"vm{turn}")
        run("lvremove", "-q", "-f", f"{vg}/bare{turn}")
    yield from measured.figures([("lvcreate -s", "clone"), ("lvremove, lvcreate -s", "reset")])


def lvm_farm(store: str, made: Group, rounds: int, say: Say) -> Iterator[Figure]:
    measured, disks = Measured(store), made.disks
    loop = [f"loop{n}" for n in range(MANY)]

    def one_by_one() -> None:
        for volume in loop:
            made.bare_clone(volume)

    for turn in range(max(1, rounds // 2)):
        say(f"{store}, a farm of {MANY}, round {turn + 1}")
        measured.take(f"lvcreate -s, {MANY} in a loop", one_by_one)
        run("lvremove", "-q", "-f", *(f"{made.name}/{n}" for n in loop))
        names = [f"f{n}" for n in range(MANY)]
        measured.take(f"farm of {MANY}", clone_all, disks, made.sealed, names)
        for name in names:
            disks.destroy(name)
    yield from measured.figures([(f"lvcreate -s, {MANY} in a loop", f"farm of {MANY}")])


Measure = Callable[[Path, int, Say], Iterator[Figure]]
STORES: Mapping[str, Measure] = {"zfs": zfs, "lvm-thin": lvm_thin, "lvm": lvm_classic}


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(stores: Mapping[str, Measure] = STORES) -> int:
    """One JSON object on standard output, progress on standard error."""
    parser = argparse.ArgumentParser(description="Measure the disk stores. Takes the spare disks.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("stores", nargs="*", choices=[[], *stores], default=[])
    options = parser.parse_args()
    found: list[Figure] = []
    for name in options.stores or stores:
        with tempfile.TemporaryDirectory(prefix="fhb") as place:
            for figure in stores[name](Path(place), options.rounds, tell):
                tell(f"{figure.name}: {figure.show(figure.median)}")
                found.append(figure)
    json.dump(Figures(tuple(found)).as_dict(), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
