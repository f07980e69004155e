"""A volume group of its own on a spare disk of the lab, and both LVM stores on it.

To make a group and a pool takes longer than most tests, so one that a test left empty is the next one's;
and so is the template in it that a test got by ``sealed``.
"""

from __future__ import annotations

import abc
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from host.run import Runner
from hypervisors.api import Disks, Template
from hypervisors.disks.lvm.classic import LvmClassicDisks
from hypervisors.disks.lvm.thin import LvmThinDisks
from hypervisors.ownership import FarmIdentity
from tests.identities import KATA

MIB = 2**20
SIZE = 64 * MIB
FARM = "kata"
_kept: dict[str, str] = {}
"""By device: the group that the next test takes."""
_left: dict[str, Template] = {}
"""By device: the template in that group, which the next test takes by ``sealed``."""


def run(*argv: str | Path, check: bool = True) -> str:
    done = subprocess.run(
        [str(a) for a in argv], check=False, capture_output=True, text=True,
        env={**os.environ, "LVM_SUPPRESS_FD_WARNINGS": "1"},
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def drop(device: str) -> None:
    """The group that an earlier test left there."""
    _kept.pop(device, None)
    _left.pop(device, None)
    vg = run("pvs", "--noheadings", "-o", "vg_name", device, check=False).strip()
    if vg.startswith("fhtest"):
        run("vgremove", "-q", "-f", "-y", vg)
        run("pvremove", "-q", "-f", "-y", device)


def drop_all() -> None:
    for device in tuple(_kept):
        drop(device)


class LvmRig(abc.ABC):
    """A letter at 1 MiB stands for a disk's content. ``size``: the group has no more than this free."""

    kind = ""
    pool = ""
    device = "/dev/vdb"

    def __init__(self, size: str = "", *, usual: bool = True) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="fh-"))
        self.place.chmod(0o711)
        self.links = self.place / "links"
        self._usual = usual and not size
        self._own = True  # templates: until ``sealed`` is asked for one
        self.vg = _kept.pop(self.device, "") if self._usual else ""
        self.fresh = not self.vg
        if self.fresh:
            drop(self.device)
            self.vg = f"fhtest{secrets.token_hex(3)}"
            run("vgcreate", "-q", "-y", self.vg, self.device)
        if size:
            run("lvcreate", "-q", "-l", "100%FREE", "-n", "filler", self.vg)
            run("lvreduce", "-q", "-f", "-L", f"-{size}", f"{self.vg}/filler")

    @abc.abstractmethod
    def disks(self, farm: FarmIdentity = KATA, **options) -> Disks: ...

    def sealed(self, disks: Disks, template: Template) -> Template:
        """Of ``image``, as every such template here."""
        if self.device not in _left:
            _left[self.device] = disks.seal(self.image(), template)
        self._own = False
        return _left[self.device]

    def image(self) -> Path:
        """To be sealed by a test of templates of its own, so a template that was left goes."""
        if self._own and self.device in _left:
            run("lvremove", "-q", "-f", _left.pop(self.device).ref)
        path = self.place / f"image-{secrets.token_hex(3)}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {ord('T')} 1M 64k", path)
        return path

    def path(self, machine: str) -> Path:
        """As a guest has it: by the link, which says which volume is present. Where there is none the
        store is asked."""
        link = self.links / machine
        if link.exists():
            return link
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
        locks = Path("/run/farmhand/stores", f"lvm-{self.vg}")
        files = [p.name for place in (self.links, locks) for p in place.glob("**/*") if p.name != "lock"]
        return sorted(names) + sorted(mapped) + sorted(files)

    def __enter__(self) -> LvmRig:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        shutil.rmtree(self.place)
        if not self._usual:
            drop(self.device)
            return
        names = run("lvs", "--noheadings", "-o", "lv_name", self.vg).split()
        found = {f"{self.vg}/{name}" for name in names if name != self.pool}
        template = _left.get(self.device)
        if template and template.ref not in found:
            del _left[self.device]
        if others := found - {template.ref if template else ""}:
            run("lvremove", "-q", "-f", *sorted(others))
        _kept[self.device] = self.vg


class ThinRig(LvmRig):
    kind = "lvm-thin"
    pool = "pool"

    def __init__(self, data: str = "2G", metadata: str = "8M", size: str = "") -> None:
        super().__init__(size, usual=(data, metadata) == ("2G", "8M"))
        if self.fresh:
            run(
                "lvcreate", "-q", "--type", "thin-pool", "-L", data, "--poolmetadatasize", metadata,
                "-n", self.pool, self.vg,
            )  # fmt: skip

    def disks(self, farm: FarmIdentity = KATA, **options) -> LvmThinDisks:
        return LvmThinDisks(self.vg, self.pool, farm, Runner(), links=self.links, **options)


class ClassicRig(LvmRig):
    kind = "lvm-linked"
    device = "/dev/vdd"

    def disks(self, farm: FarmIdentity = KATA, **options) -> LvmClassicDisks:
        return LvmClassicDisks(self.vg, farm, Runner(), links=self.links, copy="linked", **options)


class FullRig(LvmRig):
    kind = "lvm-full"
    device = "/dev/vdd"

    def disks(self, farm: FarmIdentity = KATA, **options) -> LvmClassicDisks:
        return LvmClassicDisks(self.vg, farm, Runner(), links=self.links, copy="full", **options)


RIGS = (ThinRig, ClassicRig, FullRig)
