"""Disk stores that several farms and strangers share, for the tests that show the strangers untouched.

Each rig says how a farm file names the store (``section``), puts things beside ours that look like ours
(``put``), and takes their prints: everything that could change about them, content included."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import lvm_rig
import zfs_rig

from hypervisors.disks.devices import await_node

MIB = 2**20
Prints = Mapping[str, str]


def file_prints(*roots: Path) -> dict[str, str]:
    """Of all files and links below."""
    found: dict[str, str] = {}
    for path in (p for root in roots for p in (root, *sorted(root.rglob("*")))):
        info = path.lstat()
        facts = [oct(info.st_mode), info.st_uid, info.st_ino, info.st_nlink]
        if path.is_symlink():
            facts += [str(path.readlink())]
        elif path.is_file():
            facts += [info.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()]
        found[str(path)] = " ".join(map(str, facts))
    return found


def device_print(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(2 * MIB)).hexdigest()


def scribble(path: Path, text: str) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(handle, text.encode() * 1000, 0)
        os.fsync(handle)
    finally:
        os.close(handle)


class Qcow2Neighbours:
    kind = "qcow2"

    def __init__(self, place: Path) -> None:
        self.root = place / "disks"
        self.section = {"store": "qcow2", "path": str(self.root)}
        self.strangers: list[Path] = []

    def put(self) -> None:
        vms, templates = self.root / "vms", self.root / "templates"
        copy = Path(shutil.copytree(vms / "kata-prod", vms / "kata-prod.bak"))  # its mark and all
        notes = vms / "kata-notes"
        notes.mkdir()
        (notes / "disk.qcow2").write_bytes(b"QFI\xfb of somebody's")
        begins_like_ours = vms / "kata-production"
        begins_like_ours.mkdir()
        (begins_like_ours / "owner.json").write_text('{"farm": "kata"}')
        links = [vms / "kata-link", vms / ".farmhand-new-link", templates / ".farmhand-new-link"]
        for link in links:
            link.symlink_to(copy)
        image = templates / "base@7.qcow2"
        image.write_bytes(b"an image without a description")
        inside = vms / "kata-prod" / "notes.txt"
        inside.write_text("somebody's, in our own directory")
        self.strangers = [copy, notes, begins_like_ours, *links, image, inside]

    def prints(self) -> Prints:
        return file_prints(*self.strangers)

    def close(self) -> None:
        """The directory goes with the test's."""


class ZfsNeighbours:
    kind = "zfs"

    def __init__(self, place: Path) -> None:
        del place
        self.pool = zfs_rig.POOL
        self.base = f"{self.pool}/n{os.urandom(3).hex()}"
        self.root = f"{self.base}/fh"
        zfs_rig.zfs("create", self.base)
        self.section = {
            "store": "zfs", "pool": self.pool, "dataset": self.root.removeprefix(f"{self.pool}/"),
        }  # fmt: skip
        self.strangers: list[str] = []

    def put(self) -> None:
        names = ("fh/vms/kata-prod", "fh/vms/kata-prod.bak.1", "kata-prod.1", "fh/vms/kata-dev2.99")
        volumes = [f"{self.base}/{name}" for name in names]
        for volume in volumes:
            zfs_rig.zfs("create", "-s", "-V", "8M", "-o", "volmode=dev", volume)
            await_node(Path("/dev/zvol", volume))
            scribble(Path("/dev/zvol", volume), volume)
            zfs_rig.zfs("snapshot", f"{volume}@clean")
        mine = f"{self.root}/mine"
        zfs_rig.zfs("create", "-o", "com.example:farm=kata", mine)
        self.strangers = [*volumes, mine]

    def prints(self) -> Prints:
        found = {}
        for name in self.strangers:
            fields = "name,guid,creation,refer,written,origin,userrefs"
            found[name] = zfs_rig.zfs("list", "-Hp", "-r", "-t", "all", "-o", fields, name)
            found[name] += zfs_rig.zfs("get", "-Hp", "-s", "local", "all", name)
            if not name.endswith("/mine"):
                found[name] += device_print(Path("/dev/zvol", name))
        return found

    def close(self) -> None:
        zfs_rig.zfs("destroy", "-r", self.base)


class LvmNeighbours:
    """``kind``: thin or classic."""

    def __init__(self, place: Path, rig: lvm_rig.LvmRig) -> None:
        del place
        self.rig = rig
        self.kind = rig.kind
        self.section = {"store": "lvm", "pool": rig.vg}
        if rig.pool:
            self.section = {"store": "lvm-thin", "pool": rig.vg, "dataset": rig.pool}
        self.strangers: list[str] = []

    def put(self) -> None:
        tags = {"kata-prod": [], "fh.kata-prod.0badcafe": [], "fh.kata-dev2.notes": ["farmhand-notes"],
                "kata-2-prod": ["fh.farm=kata", "fh.kind=disk", "fh.machine=kata-prod"]}  # fmt: skip
        for name, marks in tags.items():
            words = [word for tag in marks for word in ("--addtag", tag)]
            thin = name.startswith("fh.") and self.rig.pool
            where = ["-V", "8M", "--thinpool", self.rig.pool] if thin else ["-L", "8M"]
            lvm_rig.run("lvcreate", "-q", "-y", "-Wn", *where, "-n", name, *words, self.rig.vg)
            scribble(Path("/dev", self.rig.vg, name), name)
        self.strangers = list(tags)

    def prints(self) -> Prints:
        found = {}
        for name in self.strangers:
            fields = "lv_name,lv_uuid,lv_tags,lv_size,lv_permissions,lv_active,lv_time"
            text = lvm_rig.run("lvs", "--noheadings", "-o", fields, f"{self.rig.vg}/{name}")
            found[name] = text + device_print(Path("/dev", self.rig.vg, name))
        return found

    def close(self) -> None:
        self.rig.close()
