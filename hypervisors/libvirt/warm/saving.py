"""Warm checkpoints where memory can't be mapped (Xen, a QEMU whose files its host guards): libvirt saves
the machine, which ends it, and restores it. Its memory is written and read whole, so it stands still for
as long as that takes.

1. What each is is noted in a directory under construction. All are paused; one that can't be ends it,
   and all run on. Xen's are not: libxl pauses one itself, when it is saved.
2. Each is saved into its directory, and is off.
3. The disk stores keep the disks, as of stopped machines.
4. Each is restored from what was saved, and runs on. Nothing was written to its disk in between.
5. The files are sealed and get their name.

Cut off between 2 and 4, a machine is off, and its memory is in that directory alone: ``settle`` restores
it, before anything else is done with the machine. Where that fails, or the host has booted since, which
may have lost some of it or of the disk, the directory is set apart: it stays, but the machine may be
started from then on, and its disk becomes another one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from host.files import sync, write_atomic
from hypervisors.api import Callbacks, Checkpoint, Disks, FarmDisks
from hypervisors.libvirt.domain_state import resume
from hypervisors.libvirt.domain_xml import read_domain, with_disk
from hypervisors.libvirt.warm.images import (
    APART,
    DEFINITION,
    HELD,
    ONLY,
    SAVED,
    MemoryImages,
    Seal,
    is_of_this_boot,
    note_only,
    set_apart,
)
from inventory.errors import DriverFailed

if TYPE_CHECKING:
    import libvirt

# libvirt/libvirt-domain.h, a module imported late
_SECURE, _INACTIVE = 1, 2
_RUNNING, _PAUSED = 2, 4
_ENDS = 120.0  # seconds until a machine that was being saved when its saver was killed is off
_LOOK = 0.1
_ENDED = (1, 2, 3)  # VIR_DOMAIN_SHUTOFF_SHUTDOWN, _DESTROYED, _CRASHED: it ran since it was saved


class Saving:
    """One machine's."""

    def __init__(self, domain: libvirt.virDomain, name: str, *, paused: bool) -> None:
        """``paused``: it is saved paused; else libvirt wants it to run until then."""
        self.machine = domain.name()
        self.domain = domain
        self._name = name
        self._paused = paused
        self._seen = read_domain(domain.XMLDesc(_SECURE))
        self._began = 0.0
        self.place = Path()
        self.pause = 0.0
        self.kept: Checkpoint | None = None

    @property
    def stands(self) -> bool:
        """Whether it isn't known to run on since it was held."""
        return bool(self._began)

    @property
    def size(self) -> int:
        return self._seen.memory

    def hold(self) -> None:
        """Step 1."""
        definition = self.domain.XMLDesc(_SECURE | _INACTIVE)
        write_atomic(self.place / DEFINITION, definition.encode(), mode=0o600)
        (self.place / HELD).touch()
        self._began = time.monotonic()
        if self._paused:
            self.domain.suspend()

    def save(self) -> None:
        """Step 2."""
        note_only(self.place)
        if self._seen.disk:  # from here on nothing but it and what is saved has what the machine had
            with contextlib.suppress(OSError):
                sync(self._seen.disk)
        # libxlDomainSaveFlags takes no flags: what it saves runs on when it is restored.
        self.domain.saveFlags(str(self.place / SAVED), None, _PAUSED if self._paused else 0)

    def run_on(self, disks: Disks) -> None:
        """Step 4, however far it came. Safe to call again."""
        bring_back(self.domain, self.place, disks, paused=self._paused)
        if self._began:
            self.pause, self._began = time.monotonic() - self._began, 0.0

    def seal(self, images: MemoryImages, runs_on: Mapping[str, str]) -> None:
        """Step 5."""
        assert self.kept and self._seen.owner
        owner = self._seen.owner
        images.finish(
            self.place,
            Seal(
                farm=owner.farm.mark, vm=owner.vm, machine=self.machine, checkpoint=self._name,
                disk=self.kept.id, created=datetime.now(UTC), how="read", size=self.size,
                pause=round(self.pause, 3), frozen=0.0, quiesced=False,
                runs_on=dict(runs_on), files={},
            ),
        )  # fmt: skip


def save_all(savings: Sequence[Saving], disks: Disks, name: str, told: Callbacks) -> None:
    """Steps 1 to 4."""
    names = [saving.machine for saving in savings]
    told.step(f"keep {', '.join(names)}, disk and memory, as {name}; it stands still meanwhile")
    with contextlib.ExitStack() as releases:
        for saving in savings:
            releases.callback(saving.run_on, disks)  # each, whatever becomes of the others
        for saving in savings:
            saving.hold()
        for saving in savings:
            told.working(f"saving the memory of {saving.machine}")
            saving.save()
        if isinstance(disks, FarmDisks):
            made = disks.checkpoint_all(names, name)
        else:
            made = {machine: disks.checkpoint(machine, name) for machine in names}
        for saving in savings:
            saving.kept = made[saving.machine]
        told.working(f"giving {', '.join(names)} their memory back")


def bring_back(domain: libvirt.virDomain, place: Path, disks: Disks, *, paused: bool) -> None:
    """Let a machine run on that is paused, or off and saved there. ``paused``: see ``Saving``."""
    import libvirt

    if domain.isActive():
        if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED and (place / HELD).exists():
            resume(domain)
    elif (place / SAVED).exists():
        restore(domain, place, disks, paused=paused)
    for mark in (ONLY, HELD):
        (place / mark).unlink(missing_ok=True)


def restore(domain: libvirt.virDomain, place: Path, disks: Disks, *, paused: bool) -> None:
    """Let a machine that is off run on from what was saved there, on its present disk. ``paused``: see
    ``Saving``. DriverFailed if its store has moved the disk to where that can't be told of it."""
    import libvirt

    disk = disks.find(domain.name())
    if disk is None:
        raise DriverFailed(f"{domain.name()} has no disk that its memory belongs to")
    definition = (place / DEFINITION).read_text(encoding="utf-8")
    moved: str | None = None
    if read_domain(definition).disk != disk.path:
        moved = with_disk(definition, disk.path)
    saved = str(place / SAVED)
    try:
        domain.connect().restoreFlags(saved, moved, _RUNNING if paused else 0)
    except libvirt.libvirtError as error:
        if moved is None or error.get_error_code() != libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED:
            raise
        raise DriverFailed(
            f"{domain.name()}: this libvirt can't give memory to a disk at another path, {disk.path}",
            remedy="boot it from that checkpoint's disk, by a cold reset",
        ) from error


def settle(domain: libvirt.virDomain, place: Path, name: str, disks: Disks, *, paused: bool) -> str:
    """After a kill: ``bring_back``, once a daemon that was saving it as ``name`` has come to its end.
    Returns what was done, in words; "": nothing. What can't be given back is set apart."""
    import libvirt

    if (place / APART).exists():
        return ""
    stood = domain.isActive() and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    limit = time.monotonic() + _ENDS
    while domain.isActive() and (place / SAVED).exists() and time.monotonic() < limit:
        if domain.jobInfo()[0] == 0:  # VIR_DOMAIN_JOB_NONE
            break
        time.sleep(_LOOK)
    was_on = domain.isActive()
    try:
        if not was_on:
            if not (place / ONLY).exists():  # it ran on since
                return ""
            if not is_of_this_boot(place):
                raise DriverFailed("the host has booted since, and may have lost some of it")
            _check_same_disk(domain, name, disks)
        bring_back(domain, place, disks, paused=paused)
    except (libvirt.libvirtError, DriverFailed) as error:
        if was_on:
            raise
        why = error.get_error_message() if isinstance(error, libvirt.libvirtError) else error.message
        set_apart(place)
        return f"its memory can't be given back ({why}): it is off; what was saved stays in {place}"
    if not was_on:
        return "it was off while its memory was kept, and runs on" if domain.isActive() else ""
    return "it stood still, and runs on" if stood else ""


def _check_same_disk(domain: libvirt.virDomain, name: str, disks: Disks) -> None:
    """DriverFailed where the disk of a saved machine isn't as it was then any more, for all that can be
    seen: somebody started it, or put the disk back."""
    machine = domain.name()
    disk = disks.find(machine)
    there = disk is not None and name in [kept.name for kept in disk.checkpoints]
    if domain.state()[1] in _ENDED or (there and disks.pristine(machine, name) is False):
        raise DriverFailed("its disk has changed since")
