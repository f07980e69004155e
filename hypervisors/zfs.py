"""Disks as ZFS volumes: a template is a sealed snapshot, a VM's disk a clone of it.

    POOL/DATASET/templates/NAME.N           a generation's volume, read-only, no device
                          NAME.N@sealed     the template: marked and held (zfs-hold(8)), so that a
                                            ``zfs destroy -R`` fails instead of taking all VMs
    POOL/DATASET/vms/MACHINE.K              the disk: of the machine's volumes in state "disk" the one
                                            with the highest K
                    MACHINE.K@_start        what it was when it became the disk
                    MACHINE.K@CHECKPOINT    a checkpoint; former disks stay for these

What a volume is, is in properties set on it (zfs_state.py). They are given with ``zfs clone``, in one
system call, so a process killed anywhere leaves a volume marked "new", with its maker, or none; only a
power cut can swallow the marks of a volume made in that second, which then is known by being empty.

**Going back.** Where the checkpoint is the newest snapshot, the volume is rolled back: one process, one
transaction, the same device. Else the checkpoint is cloned beside and marked the disk, while the former
disk becomes a mere carrier of its checkpoints, or goes: again one transaction (zfs_store.lua). No
checkpoint moves, so none can be lost. The disk's path then ends in another number; it always was the old
or the new, and ``ready`` says which right before a start.

**Several at once.** A channel program (zfs-program(8)) checks all and then changes all within one
transaction group, be it checkpoints or resets: ``checkpoint_all``, ``restore_all``.

Rejected:
- *Renames* (old aside, new in its place): two steps, and between them the name leads nowhere; the links
  below /dev/zvol lag behind even then.
- *Promote*: moves snapshots between volumes, collides on equal names, and doesn't move the name.
- *``zfs rollback``*: works beneath a running guest, silently. The program's rollback answers EBUSY.
- *A dataset per VM, with a property that names its present volume*: one more transaction a clone, and
  two truths.
- *pyzfs*: takes longer to import than a command takes to run, and ``zfs program`` is as atomic and can
  be pasted.

``written`` counts in steps of transaction groups, so the proof of a pristine disk first syncs.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from hypervisors import zfs_state as state
from hypervisors.api import Capacity, Checkpoint, Disk, Leftover, Owner, StepFn, Template, no_step
from hypervisors.devices import alive, await_node, give, myself
from hypervisors.images import sha256_file
from hypervisors.qcow2_format import measure
from hypervisors.qcow2_store import blocks, sync
from hypervisors.run import Runner
from hypervisors.zfs_command import Zfs
from hypervisors.zfs_state import CLEAN, SEALED, Look, plain
from inventory.errors import Busy, Conflict, NoSpace, NotFound, NotOurs, UsageError, WrongState
from inventory.sizes import format_size

_DEV = Path("/dev/zvol")
_BLOCK = 16 * 2**10
_HOLD = "farmhand"
_FRESH = 15.0  # seconds for which a reading of the pool's room will do
_POOL = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_QUIET = ("-o", "mountpoint=none", "-o", "canmount=off", "-o", "com.sun:auto-snapshot=false")


class ZfsDisks:
    """Implements ``hypervisors.api.Disks``, ``FarmDisks`` and ``DeviceDisks``. Thread-safe; any number
    of processes and farms may share a dataset. Needs root: channel programs do."""

    def __init__(
        self,
        pool: str,
        dataset: str,
        farm: str,
        runner: Runner,
        *,
        step: StepFn = no_step,
        reader_uid: int | None = None,
        headroom: int = 256 * 2**20,
    ) -> None:
        """``reader_uid``: who QEMU runs as, if not ourselves: its disks' device nodes are given to it.
        ``headroom``: bytes that must be available (quota and reservations taken off) before a disk is
        made. UsageError for names that can't be a pool's or a dataset's."""
        if not _POOL.fullmatch(pool) or not _DATASET.fullmatch(dataset):
            raise UsageError(f"{pool}/{dataset} is no name of a ZFS dataset")
        self._pool = pool
        self._root = f"{pool}/{dataset}"
        self._farm = farm
        self._runner = runner
        self._step = step
        self._reader = None if reader_uid == os.geteuid() else reader_uid
        self._headroom = headroom
        self._zfs = Zfs(runner, pool, self._root, farm)
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
                if known.snapshots[0].marks.get("image") != identity:
                    raise Conflict(
                        f"template {template.label} exists already",
                        remedy="seal it as the next generation",
                    )
                self._hold(volume)  # killed right before its last steps
                image.unlink()
                return sealed
            if known.marks.get("state") != "new":
                raise NotOurs(f"{volume} exists and isn't farmhand's", remedy=f"zfs rename {volume} ...")
            if alive(known.marks.get("maker", "")):
                raise Busy(f"template {template.label} is being sealed already")
        self._need(blocks(image), f"template {template.label}")
        kind, size = measure(image)
        size = -(-size // _BLOCK) * _BLOCK
        self._step(f"seal template {template.label}")
        self._ensure_places()
        if any(known.name == volume for known in look.templates):
            self._zfs.program("drop", volume, "new")
        done = replace(template, ref=f"{volume}@{SEALED}", sha256=sha256_file(image), size=size)
        self._create(
            volume, "create", "-s", "-V", str(size), "-b", str(_BLOCK),
            *state.options({"state": "new", "maker": myself()}),
        )  # fmt: skip
        with self._dropped_on_failure(volume):
            device = _DEV / volume
            await_node(device, nudge=self._zfs.nudge)
            self._runner.change(
                "qemu-img", "convert", "-n", "--target-is-zero", "-f", kind, "-O", "raw", image, device,
                timeout=3600,
            )  # fmt: skip
            sync(device)
            self._zfs.change("set", "readonly=on", "volmode=none", volume)
            marks = state.options(state.template_marks(done, identity))
            self._zfs.change("snapshot", *marks, done.ref)
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
            raise NotFound(f"no template {label}", remedy="./invoke template-list shows them")
        clones = sorted({c for s in volume.snapshots for c in s.clones})
        if clones:
            prefix = f"{self._vms}/"
            users = sorted(
                {c[len(prefix) :].rpartition(".")[0] if c.startswith(prefix) else c for c in clones}
            )
            raise WrongState(
                f"template {label} is in use by {', '.join(users)}",
                remedy="destroy them, or clone them from a newer generation, first",
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

    # -- disks ------------------------------------------------------------------------------------

    def find(self, machine: str) -> Disk | None:
        """Any farm's: its ``owner`` tells."""
        return state.read_disk(self._look(plain(machine)), machine)

    def list(self) -> Sequence[Disk]:
        look = self._look()
        disks = (state.read_disk(look, machine) for machine in look.machines())
        return [disk for disk in disks if disk and disk.owner.farm == self._farm]

    def ready(self, machine: str) -> Disk:
        """See ``DeviceDisks.ready``."""
        look = self._look(plain(machine))
        disk = self._disk(look, machine)
        self._open_up(str(disk.path.relative_to(_DEV)))
        return disk

    def clone(self, template: Template, machine: str, owner: Owner, size: int) -> Disk:
        """Two processes where nothing hints at an earlier disk: ``zfs clone``, and the program that
        takes ``_start`` and makes it the disk. The snapshot is what resets are rolled back to."""
        plain(machine)
        if size < template.size:
            raise UsageError(
                f"{machine}: a disk of {format_size(size)} is smaller than template {template.label}, "
                f"{format_size(template.size)}",
                remedy="leave 'disk' out, or make it at least as large",
            )
        source = f"{self._templates}/{plain(template.name)}.{template.generation}@{SEALED}"
        target = f"{self._vms}/{machine}.1"
        # A machine's first volume goes at its first reset, so its name being free proves nothing. The
        # device links do, without a process: what exists has had one since before its maker returned.
        if any((_DEV / self._vms).glob(f"{machine}.*")):
            target = self._make_way(machine)
        self._need(0, f"the disk of {machine}")
        self._step(f"clone the disk of {machine} from {template.label}")
        marks = state.disk_marks(machine, owner, template.label, CLEAN, size)
        while True:
            try:
                self._clone(source, target, marks, size if size > template.size else 0)
                break
            except NotFound:
                raise NotFound(
                    f"no template {template.label} in {self._root}",
                    remedy="./invoke template-list shows them",
                ) from None
            except Conflict:  # a volume whose device isn't there: not ours, or just being made
                other = self._make_way(machine)
                if other == target:
                    raise
                target = other
        with self._dropped_on_failure(target):
            self._open_up(target)
            self._zfs.program("switch", f"first:{target}")
        made = Checkpoint(name=CLEAN, created=datetime.fromisoformat(marks["created"]))
        return Disk(
            machine=machine, owner=owner, path=_DEV / target, format="raw",
            size=_rounded(size), used=0, template=template.label, base=CLEAN, checkpoints=(made,),
        )  # fmt: skip

    def checkpoint(self, machine: str, name: str) -> Checkpoint:
        return self.checkpoint_all([machine], name)[machine]

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        """See ``FarmDisks.checkpoint_all``."""
        plain(name)
        look = self._look(machines[0] if len(machines) == 1 else "")
        for machine in machines:
            disk = self._disk(look, machine)
            if name in (c.name for c in disk.checkpoints):
                raise Conflict(
                    f"{machine} has a checkpoint {name} already", remedy="give the new one another name"
                )
            if disk.path.exists():  # QEMU may have been told not to sync: from here on it must last
                sync(disk.path)
        self._need(0, f"checkpoint {name} of {', '.join(machines)}")
        self._step(f"freeze the disk of {', '.join(machines)} as {name}")
        made = self._zfs.program("checkpoint", name, *machines)["made"]
        return {m: Checkpoint(name=name, created=state.when(made[m]["created"])) for m in machines}

    def restore(self, machine: str, name: str) -> Disk:
        plain(machine)
        self._step(f"put the disk of {machine} back to {name}")
        answer = self._zfs.program("restore", machine, name)
        look = state.read_look(answer)
        if answer.get("done"):
            return self._disk(look, machine)
        return self._grow([machine], name, look)[0]

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        """See ``FarmDisks.restore_all``."""
        self._step(f"put the disks of {', '.join(machines)} back to {name}")
        return self._grow(machines, name, self._look())

    def pristine(self, machine: str, name: str, *, quick: bool = False) -> bool:
        """Grown from that checkpoint, and ``written`` since (zfsprops(7)) exactly 0."""
        del quick  # it is, but for the sync of a pool that is being written to
        path = self._disk(self._look(plain(machine)), machine).path
        if path.exists():
            sync(path)  # what a writer that still has it open put into the page cache
        look = self._look(machine, synced=True)
        volume = look.disk(machine)
        return bool(volume and volume.newest and volume.base == name and volume.written == 0)

    def destroy(self, machine: str) -> None:
        """Nothing there: nothing done. All its volumes, in one transaction."""
        look = self._look(plain(machine))
        if not look.of(machine):
            return
        self._check_farm(look, machine)
        self._step(f"remove the disk of {machine}")
        self._zfs.program("destroy", machine)

    def leftovers(self) -> Sequence[Leftover]:
        return state.find_leftovers(self._look(), self._farm)

    def discard(self, leftover: Leftover) -> None:
        """Looked up again first: what came to be in use since, or is gone, is left alone."""
        if leftover.ref not in (now.ref for now in self.leftovers()):
            return
        self._step(f"remove the leftover {leftover.ref}")
        if leftover.kind == "disk":
            self._zfs.program("destroy", leftover.ref.rpartition("/")[2])
        else:
            self._zfs.program("drop", leftover.ref)

    def capacity(self) -> Capacity:
        """Of the dataset: quotas, reservations and what ZFS keeps for itself are taken off. Clones and
        templates are sparse: none reserves anything."""
        look = self._look()
        return Capacity(look.total, look.free)

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

    def _look(self, machine: str = "", *, synced: bool = False) -> Look:
        look = state.read_look(self._zfs.look(machine, synced=synced))
        self._room = (time.monotonic(), look.free)
        return look

    def _disk(self, look: Look, machine: str) -> Disk:
        disk = state.read_disk(look, machine)
        if disk is None:
            raise NotFound(f"{machine} has no disk here", remedy="./invoke clone-farm makes it")
        self._check_farm(look, machine)
        return disk

    def _check_farm(self, look: Look, machine: str) -> None:
        for volume in look.of(machine):
            if volume.marks.get("farm") != self._farm:
                raise NotOurs(f"the disk of {machine} belongs to farm {volume.marks.get('farm')}")

    def _need(self, size: int, what: str) -> None:
        if self._room is None or time.monotonic() - self._room[0] > _FRESH:
            self._look()
        assert self._room
        if self._room[1] < size + self._headroom:
            raise NoSpace(
                f"{self._root}: {format_size(self._room[1])} available, "
                f"{what} needs {format_size(size + self._headroom)}",
                remedy=f"make room (./invoke gc; zfs list -o space -r {self._pool}), or raise its quota",
            )

    # -- changes ----------------------------------------------------------------------------------

    def _ensure_places(self) -> None:
        """The two datasets, marked. NotOurs where somebody else's have their names."""
        found = self._runner.read(
            "zfs", "get", "-Hp", "-d", "1", "-o", "name,value,source", "farmhand:store", self._root,
            ok=(0, 1),
        )  # fmt: skip
        known = {line.split("\t")[0]: line.split("\t") for line in found.stdout.splitlines()}
        for place in (self._templates, self._vms):
            if place not in known:
                with contextlib.suppress(Conflict):  # another process was quicker
                    self._zfs.change(
                        "create", "-p", *_QUIET, "-o", "compression=on", "-o", "volmode=dev",
                        *state.options({"store": "1"}), place,
                    )  # fmt: skip
            elif known[place][1:] != ["1", "local"]:
                inside = self._runner.read("zfs", "list", "-Hp", "-d", "1", "-o", "name", place).stdout
                if inside.strip() != place:
                    raise NotOurs(
                        f"{place} exists and isn't farmhand's",
                        remedy="name another 'dataset' in the farm file",
                    )
                # made, but killed before it was marked
                self._zfs.change("set", "farmhand:store=1", "volmode=dev", "mountpoint=none", place)

    def _make_way(self, machine: str) -> str:
        """The name of a machine's next volume, after finishing a destroy that was killed. Conflict where
        it has a disk."""
        look = self._look(machine)
        if look.disk(machine):
            self._check_farm(look, machine)
            raise Conflict(f"{machine} has a disk already", remedy="destroy it first")
        if any(v.state != "new" for v in look.of(machine)):
            self._check_farm(look, machine)
            self.destroy(machine)
            look = self._look(machine)
        return look.next_name(self._vms, machine)

    def _clone(self, source: str, target: str, marks: Mapping[str, str], size: int) -> None:
        """A volume "new". ``size``: 0 for the source's. Conflict where the name is taken."""
        resized = ["-o", f"volsize={_rounded(size)}"] if size else []
        self._create(target, "clone", *state.options({**marks, "state": "new"}), *resized, source)

    def _create(self, volume: str, *argv: str) -> None:
        try:
            self._zfs.change(*argv, volume)
        except Conflict:  # another's, who may be at work on it
            raise
        except BaseException:
            self._drop(volume)
            raise

    def _open_up(self, volume: str) -> None:
        """Wait for its device. The kernel writes to a new volume once when it makes that (zil_replay),
        so only from then on ``written`` tells what others wrote."""
        await_node(_DEV / volume, nudge=self._zfs.nudge)
        give(_DEV / volume, self._reader)

    def _grow(self, machines: Sequence[str], name: str, look: Look) -> Sequence[Disk]:
        """Put machines' disks back: fresh clones, or rolled back where that will do, all in one
        transaction. The disks as they then are."""
        items: list[str] = []
        disks: list[Disk] = []
        with contextlib.ExitStack() as undo:
            for machine in machines:
                disk, volume = self._disk(look, machine), look.disk(machine)
                assert volume
                known = [c.name for c in disk.checkpoints]
                if name not in known:
                    raise NotFound(
                        f"{machine} has no checkpoint {name}", remedy=f"it has: {', '.join(known)}"
                    )
                if volume.newest and volume.base == name and volume.snapshots[-1].name == volume.newest:
                    items.append(f"{volume.name}@{volume.newest}")
                    disks.append(disk)
                    continue
                self._need(0, f"the disk of {machine}")
                target = look.next_name(self._vms, machine)
                marks = state.disk_marks(machine, disk.owner, disk.template, name, disk.size)
                marks["created"] = disk.checkpoints[0].created.isoformat()
                source = self._source(look, machine, disk, name)
                self._clone(source, target, marks, disk.size if name == CLEAN else 0)
                undo.enter_context(self._dropped_on_failure(target))
                self._open_up(target)
                items.append(target)
                disks.append(replace(disk, path=_DEV / target, base=name))
            self._step(f"swap in the disk of {', '.join(machines)} from {name}")
            self._zfs.program("switch", *items)
        return disks

    def _source(self, look: Look, machine: str, disk: Disk, name: str) -> str:
        if name == CLEAN:
            return self._template_snapshot(disk.template)
        for volume in look.of(machine):
            for kept in volume.checkpoints():
                if kept.marks.get("name") == name:
                    return f"{volume.name}@{kept.name}"
        raise NotFound(f"{machine} has no checkpoint {name}")

    @contextlib.contextmanager
    def _dropped_on_failure(self, volume: str) -> Iterator[None]:
        """A volume under construction goes again; one that came to be what it was for, stays."""
        try:
            yield
        except BaseException:
            self._drop(volume)
            raise

    def _drop(self, volume: str) -> None:
        with contextlib.suppress(Exception):  # the first error is the one that matters
            self._zfs.program("drop", volume, "new")

    def _hold(self, volume: str) -> None:
        """At most once: a second hold by the same name is an error, and means that it is there."""
        with contextlib.suppress(Conflict):
            self._zfs.change("hold", _HOLD, f"{volume}@{SEALED}")


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
