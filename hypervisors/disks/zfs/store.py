"""A dataset of ours in a pool: its places, its room, its templates; and what is made in it goes again
where making fails. What it is all about is told in ``disks``."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from host.files import blocks, open_node
from host.processes import Process
from host.run import Runner
from hypervisors.api import (
    Disk,
    StepFn,
    Template,
    WarnFn,
    check_template,
    label_taken,
    no_step,
    no_warning,
    not_ours,
    template_in_use,
)
from hypervisors.disks.images import sha256_file
from hypervisors.disks.qcow2.format import measure
from hypervisors.disks.zfs import state
from hypervisors.disks.zfs.command import Zfs
from hypervisors.disks.zfs.dataset_kinds import DatasetKind, RawFiles, Zvols
from hypervisors.disks.zfs.state import SEALED, ZfsState, plain
from hypervisors.marks import DamagedMarks
from hypervisors.ownership import FarmIdentity
from inventory.errors import Busy, Call, Conflict, NoSpace, NotFound, NotOurs, UsageError
from inventory.sizes import format_size

_HOLD = "farmhand"
_FRESH = 15.0  # seconds for which a reading of the pool's room will do
_POOL = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_QUIET = ("-o", "com.sun:auto-snapshot=false", "-o", "compression=on")


class ZfsStore:
    """Templates, and what disks are made with."""

    def __init__(
        self,
        pool: str,
        dataset: str,
        farm: FarmIdentity,
        runner: Runner,
        *,
        step: StepFn = no_step,
        reader_uid: int | None = None,
        headroom: int = 256 * 2**20,
        files: Path | None = None,
        warn: WarnFn = no_warning,
    ) -> None:
        """``reader_uid``: who QEMU runs as, if not ourselves: its disks are given to it. ``files``: a
        directory of ours below which datasets with raw files are mounted; without it, volumes.
        ``headroom``: bytes that must be available (quota and reservations taken off) before a disk is
        made. UsageError for names that can't be a pool's or a dataset's."""
        if not _POOL.fullmatch(pool) or not _DATASET.fullmatch(dataset):
            raise UsageError(f"{pool}/{dataset} is no name of a ZFS dataset")
        self._pool = pool
        self._root = f"{pool}/{dataset}"
        self._farm = farm
        self._runner = runner
        self._step = step
        reader = None if reader_uid == os.geteuid() else reader_uid
        self._headroom = headroom
        self._damaged = DamagedMarks(warn)
        self._zfs = Zfs(runner, pool, self._root, farm.id)
        self._kind: DatasetKind = (
            RawFiles(reader, self._zfs, runner, files) if files else Zvols(reader, self._zfs)
        )
        self._room: tuple[float, int] | None = None  # when it was read, available

    # -- templates --------------------------------------------------------------------------------

    def seal(self, image: Path, template: Template) -> Template:
        """See ``Disks.seal``. UsageError for an image that needs a backing file."""
        plain(template.name)
        volume = f"{self._templates}/{template.name}.{template.generation}"
        if not image.exists():
            raise NotFound(f"no image {image}")
        here = image.stat()
        identity = f"{here.st_dev}:{here.st_ino}:{here.st_mtime_ns}"
        look = self._look()
        for known in look.templates:
            if known.name != volume:
                continue
            if sealed := state.read_template(known):
                if sealed.farm != self._farm or known.snapshots[0].marks.get("image") != identity:
                    raise label_taken(template.label, sealed.farm, self._farm)
                self._hold(volume)  # killed right before its last steps
                image.unlink()
                return sealed
            if known.marks.get("state") != "new":
                raise NotOurs(f"{volume} exists and isn't farmhand's", remedy=f"zfs rename {volume} ...")
            if state.made_now(known):
                raise Busy(f"template {template.label} is being sealed already")
        self._need(blocks(image), f"template {template.label}")
        kind, size = measure(image)
        size = self._kind.rounded(size)
        self._step(f"seal template {template.label}")
        self._ensure_places()
        if any(known.name == volume for known in look.templates):
            self._kind.shut(self._kind.opened(f"{self._templates}/{template.name}"))
            self._zfs.program("drop", volume, "state=new")
        self._kind.await_gone(volume)  # such as the one that was just dropped
        done = replace(
            template, ref=f"{volume}@{SEALED}", sha256=sha256_file(image), size=size, farm=self._farm
        )
        marks = {"state": "new", "maker": Process.this().mark, "token": secrets.token_hex(8)}
        self._create(volume, marks, "create", *self._kind.made(size), "-o", "sync=disabled")
        with self._dropped_on_failure(volume, marks):
            self._kind.open_up(volume, size)
            device = self._kind.path(volume)
            with os.fdopen(open_node(device, os.O_RDONLY)):  # else qemu-img might have to try twice
                self._runner.change(
                    "qemu-img", "convert", "-n", "--target-is-zero", "-f", kind, "-O", "raw", image,
                    device, timeout=3600,
                )  # fmt: skip
            self._zfs.flush(device)
            self._kind.seal(volume)
            properties = state.options(state.template_marks(done, identity))
            self._zfs.change("snapshot", *properties, done.ref)
        self._hold(volume)
        image.unlink(missing_ok=True)
        return done

    def templates(self) -> Sequence[Template]:
        found = (state.read_template(volume) for volume in self._look().templates)
        return sorted((t for t in found if t), key=lambda t: (t.name, t.generation))

    def remove_template(self, label: str) -> None:
        """See ``Disks.remove_template``; clones of every farm that shares the store count, and such as
        aren't farmhand's."""
        for volume in self._look().templates:
            known = state.read_template(volume)
            if known and known.label == label:
                break
        else:
            raise NotFound(f"no template {label}", remedy=(Call("template-list"), " shows them"))
        check_template(label, known.farm, self._farm)
        clones = [c for s in volume.snapshots for c in s.clones]
        if clones:
            prefix = f"{self._vms}/"
            raise template_in_use(
                label,
                (c[len(prefix) :].rpartition(".")[0] if c.startswith(prefix) else c for c in clones),
            )
        self._step(f"remove template {label}")
        with contextlib.suppress(NotFound):  # killed after this in an earlier attempt
            self._zfs.change("release", _HOLD, f"{volume.name}@{SEALED}")
        try:
            self._zfs.program("drop", volume.name)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one that matters
                self._hold(volume.name)
            raise

    def adopt_template(self, label: str, whose: FarmIdentity) -> None:
        for volume in self._look().templates:
            known = state.read_template(volume)
            if known and known.label == label and known.farm == whose:
                self._step(f"mark {known.ref} as ours")
                self._zfs.change("set", f"farmhand:farm={self._farm.mark}", known.ref)

    # -- looking ----------------------------------------------------------------------------------

    @property
    def _templates(self) -> str:
        return f"{self._root}/templates"

    @property
    def _vms(self) -> str:
        return f"{self._root}/vms"

    def _template_snapshot(self, label: str) -> str:
        name, _, generation = label.rpartition("@")
        return f"{self._templates}/{name}.{generation}@{SEALED}"

    def _look(self, machine: str = "", *, synced: bool = False) -> ZfsState:
        look = state.read_state(self._zfs.look(machine, synced=synced))
        self._room = (time.monotonic(), look.free)
        for dataset in (*look.templates, *look.volumes):
            if dataset.damaged:
                self._damaged.tell(dataset.name, dataset.damaged)
        return look

    def _disk(self, look: ZfsState, machine: str) -> Disk:
        disk = state.read_disk(look, machine, self._kind.path)
        if disk is None:
            raise NotFound(f"{machine} has no disk here", remedy=(Call("clone-farm"), " makes it"))
        self._check_farm(look, machine)
        return disk

    def _check_farm(self, look: ZfsState, machine: str) -> None:
        for volume in look.of(machine):
            if not volume.belongs(self._farm):
                raise not_ours(f"the disk of {machine}", volume.owner, self._farm)

    def _need(self, size: int, what: str) -> None:
        if self._room is None or time.monotonic() - self._room[0] > _FRESH:
            self._room = (time.monotonic(), self._zfs.space()[1])
        if self._room[1] < size + self._headroom:
            raise NoSpace(
                f"{self._root}: {format_size(self._room[1])} available, "
                f"{what} needs {format_size(size + self._headroom)}",
                remedy=(
                    "make room (",
                    Call("gc"),
                    f"; zfs list -o space -r {self._pool}), or raise its quota",
                ),
            )

    # -- changes ----------------------------------------------------------------------------------

    def _ensure_places(self) -> None:
        """Make the store's two datasets, with our mark, unless they are there. NotOurs if their names
        are taken by somebody else's."""
        found = self._runner.read(
            "zfs", "get", "-Hp", "-d", "1", "-o", "name,value,source", "farmhand:store", self._root,
            ok=(0, 1),
        )  # fmt: skip
        known = {line.split("\t")[0]: line.split("\t") for line in found.stdout.splitlines()}
        for place in (self._templates, self._vms):
            if place not in known:
                with contextlib.suppress(Conflict):  # another process was quicker
                    self._zfs.change(
                        "create", "-p", *_QUIET, *self._kind.parents,
                        *state.options({"store": self._kind.name}), place,
                    )  # fmt: skip
            elif known[place][1:] != [self._kind.name, "local"]:
                if known[place][1:] in (["1", "local"], ["files", "local"]):
                    raise Conflict(
                        f"{place} holds disks of another kind (volumes, or files)",
                        remedy="set 'store' (zfs, zfs-files) as it was, or name another 'dataset'",
                    )
                inside = self._runner.read("zfs", "list", "-Hp", "-d", "1", "-o", "name", place).stdout
                if inside.strip() != place:
                    raise NotOurs(
                        f"{place} exists and isn't farmhand's",
                        remedy="name another 'dataset' in the farm file",
                    )
                # made, but killed before it was marked
                properties = [word for word in self._kind.parents if word != "-o"]
                self._zfs.change("set", f"farmhand:store={self._kind.name}", *properties, place)

    def _create(self, volume: str, marks: Mapping[str, str], command: str, *argv: str) -> None:
        try:
            self._zfs.change(command, *state.options(marks), *argv, volume)
        except Conflict:  # another's, who may be at work on it
            raise
        except BaseException:
            self._drop(volume, marks)
            raise

    @contextlib.contextmanager
    def _dropped_on_failure(self, volume: str, marks: Mapping[str, str]) -> Iterator[None]:
        """After an error remove what this very call made, unless it has become what it was to be."""
        try:
            yield
        except BaseException:
            self._drop(volume, marks)
            raise

    def _drop(self, volume: str, marks: Mapping[str, str]) -> None:
        with contextlib.suppress(Exception):  # the first error is the one that matters
            self._kind.shut([volume])
            self._zfs.program("drop", volume, f"state={marks['state']}", f"token={marks['token']}")

    def _hold(self, volume: str) -> None:
        """Put a hold on a snapshot, unless it has that one: a second hold of the same name is an error
        of zfs."""
        with contextlib.suppress(Conflict):
            self._zfs.change("hold", _HOLD, f"{volume}@{SEALED}")
