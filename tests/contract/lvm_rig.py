"""A volume group of its own on a spare disk of the lab, and both LVM stores on it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from hypervisors.api import Disks
from hypervisors.lvm_classic import LvmClassicDisks
from hypervisors.lvm_thin import LvmThinDisks
from hypervisors.run import Runner

MIB = 2**20
SIZE = 64 * MIB
FARM = "kata"
DEVICE = os.environ.get("FARMHAND_LAB_LVM_DEVICE", "/dev/vdb")


def run(*argv: str | Path, check: bool = True) -> str:
    done = subprocess.run(
        [str(a) for a in argv], check=False, capture_output=True, text=True,
        env={**os.environ, "LVM_SUPPRESS_FD_WARNINGS": "1"},
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class LvmRig:
    """A letter at 1 MiB stands for a disk's content."""

    kind = ""
    pool = ""

    def __init__(self, size: str = "") -> None:
        self.vg = f"fhtest{secrets.token_hex(3)}"
        self.place = Path(tempfile.mkdtemp(prefix="fh-"))
        self.place.chmod(0o711)
        self.links = self.place / "links"
        run("vgcreate", "-q", "-y", self.vg, DEVICE)
        if size:
            run("lvcreate", "-q", "-l", "100%FREE", "-n", "filler", self.vg)
            run("lvreduce", "-q", "-f", "-L", f"-{size}", f"{self.vg}/filler")

    def disks(self, farm: str = FARM, **options) -> Disks:
        raise NotImplementedError

    def image(self) -> Path:
        path = self.place / f"image-{secrets.token_hex(3)}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {ord('T')} 1M 64k", path)
        return path

    def path(self, machine: str) -> Path:
        disk = self.disks().find(machine)
        assert disk
        return disk.path

    def write(self, machine: str, letter: str, at: int = MIB, count: int = 65536) -> None:
        handle = os.open(self.path(machine), os.O_RDWR)
        try:
            os.pwrite(handle, letter.encode() * count, at)
        finally:
            os.close(handle)

    def read(self, machine: str) -> str:
        with self.path(machine).open("rb") as file:
            file.seek(MIB)
            return chr(file.read(1)[0])

    def everything(self) -> list[str]:
        """Names of volumes and mappings, and files beside the links."""
        names = run("lvs", "-a", "--noheadings", "-o", "lv_name", self.vg).split()
        mapped = [m for m in run("dmsetup", "ls").split() if m.startswith(self.vg)]
        files = [p.name for p in self.links.glob("**/*") if p.name != ".lock"]
        return sorted(names) + sorted(mapped) + sorted(files)

    def __enter__(self) -> LvmRig:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        run("vgremove", "-q", "-f", "-y", self.vg)
        run("pvremove", "-q", "-f", "-y", DEVICE)
        shutil.rmtree(self.place)


class ThinRig(LvmRig):
    kind = "lvm-thin"
    pool = "pool"

    def __init__(self, data: str = "2G", metadata: str = "8M", size: str = "") -> None:
        super().__init__(size)
        run(
            "lvcreate", "-q", "--type", "thin-pool", "-L", data, "--poolmetadatasize", metadata,
            "-n", self.pool, self.vg,
        )  # fmt: skip

    def disks(self, farm: str = FARM, **options) -> LvmThinDisks:
        return LvmThinDisks(self.vg, self.pool, farm, Runner(), links=self.links, **options)


class ClassicRig(LvmRig):
    kind = "lvm-linked"

    def disks(self, farm: str = FARM, **options) -> LvmClassicDisks:
        return LvmClassicDisks(self.vg, farm, Runner(), links=self.links, copy="linked", **options)


class FullRig(LvmRig):
    kind = "lvm-full"

    def disks(self, farm: str = FARM, **options) -> LvmClassicDisks:
        return LvmClassicDisks(self.vg, farm, Runner(), links=self.links, copy="full", **options)


RIGS = (ThinRig, ClassicRig, FullRig)
