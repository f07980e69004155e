"""Our volumes in a group: the store's lock, names, links, activation, and removing what is ours.

The locks lie in a directory of the machine that has the group, whatever state directories its users
have: the store's, and one for each part that is being filled. The links, and what a copy has noted of
how far it came, are to outlast a boot, and lie in the state directory."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from host import paths
from host.file_lock import FileLock
from host.files import make_directory, own_directory, reachable, sync
from host.run import Runner
from hypervisors.api import StepFn, WarnFn, no_step, no_warning
from hypervisors.disks.devices import give
from hypervisors.disks.lvm.command import LogicalVolume, Lvm, users_of
from hypervisors.disks.lvm.state import HeldLock, LvmState
from hypervisors.marks import DamagedMarks
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, FarmhandError, NotFound, UsageError, WrongState

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FRESH = 15.0  # seconds for which a look's figures of room will do


class LvmVolumes:
    """A group with a lock, links to present volumes, and care in removing."""

    def __init__(
        self,
        vg: str,
        farm: FarmIdentity,
        runner: Runner,
        *,
        links: Path,
        step: StepFn = no_step,
        reader_uid: int | None = None,
        headroom: int = 256 * 2**20,
        warn: WarnFn = no_warning,
    ) -> None:
        """``links``: a directory of ours, the same for all farms of the host. ``reader_uid``: who QEMU
        runs as, if not ourselves. ``headroom``: bytes that must be free beyond what is made."""
        self._lvm = Lvm(vg, runner)
        self._vg = vg
        self._farm = farm
        self._runner = runner
        self._links = links.absolute() / vg
        self._step = step
        self._reader = None if reader_uid == os.geteuid() else reader_uid
        self._headroom = headroom
        self._warn = warn
        self._damaged = DamagedMarks(warn)
        self._locks = paths.SHARED / "stores" / f"lvm-{vg}"
        self._lock = FileLock(self._locks / "lock")
        self._last: tuple[str, LvmState] | None = None  # the stamp, and what was seen under it

    def _look(self) -> LvmState:
        group = self._lvm.report()
        for volume in group.volumes:
            if volume.damaged:
                self._damaged.tell(f"volume {self._vg}/{volume.name}", volume.damaged)
        return LvmState(group, self._links)

    def _glance(self) -> LvmState:
        """What is there now, seen without the store's lock. Whoever takes the lock next may go on from
        it: a report is a third of what a clone takes. The lock file holds a stamp that is new whenever
        somebody has the lock; if it is still the same, nobody changed anything of ours."""
        stamp, quiet = self._stamp(), not self._lock.held()
        seen = self._look()
        if quiet and not self._lock.held() and stamp and stamp == self._stamp():
            self._last = (stamp, seen)
        return seen

    def _stamp(self) -> str:
        try:
            return (self._locks / "lock").read_text()
        except OSError:
            return ""

    def _take_over(self) -> LvmState | None:
        """What was seen last, if that still holds good. Called when the lock has just been taken; writes
        a new stamp."""
        last, self._last = self._last, None
        good = last and last[0] == self._stamp() and time.monotonic() - last[1].when < _FRESH
        (self._locks / "lock").write_text(secrets.token_hex(8))
        return last[1] if last and good else None

    def _remember(self, seen: LvmState, new: LogicalVolume, *, space: int) -> None:
        """Keep what is there now for the next call: ``seen``, and ``new``, which this call made under
        the lock as its only change."""
        group = seen.group
        group = replace(group, free=group.free - space, volumes=(*group.volumes, new))
        self._last = (self._stamp(), LvmState(group, self._links, seen.when))

    @contextlib.contextmanager
    def _locked(self, *, read: bool = False) -> Iterator[HeldLock]:
        """Hold the store's lock against all processes and farms. ``read``: where there is no store yet,
        hold nothing."""
        if read and not self._links.is_dir():
            yield HeldLock(None)
            return
        make_directory(self._links, mode=0o711)
        if self._reader is not None:
            reachable(self._links, self._reader)
        own_directory(self._locks, mode=0o700)
        with HeldLock(self._lock) as held:
            held.seen = self._take_over()
            yield held

    def _filling(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A lock to hold while a part is being filled: without it, the part is a dead process's."""
        return FileLock(self._part_lock(name)).hold(remove=True)

    def _alive(self, name: str) -> bool:
        return FileLock(self._part_lock(name)).held()

    def _part_lock(self, name: str) -> Path:
        return self._locks / f"{name}.lock"

    def _record(self, name: str) -> Path:
        return self._links / f".{name}.copied"

    def _forget(self, name: str) -> None:
        """Remove the files that belong to a part."""
        self._record(name).unlink(missing_ok=True)
        if not self._alive(name):
            self._part_lock(name).unlink(missing_ok=True)

    def _strays(self, seen: LvmState) -> Iterator[Path]:
        """Files that killed operations left. The caller holds the store's lock, so nobody is making
        any."""
        names = {v.name for v in seen.group.volumes}
        for path in (*sorted(self._links.glob(".fh.*")), *sorted(self._locks.glob("fh.*"))):
            name = path.name.removeprefix(".").rpartition(".")[0]
            if name not in names and not self._alive(name):
                yield path
        yield from sorted(self._links.glob(".*.link"))

    def _sweep(self, seen: LvmState) -> None:
        for path in self._strays(seen):
            path.unlink(missing_ok=True)

    @staticmethod
    def _name(*words: str) -> str:
        """A new volume's name. It has no underscore: LVM reserves names by what they contain, such as
        "_tdata"."""
        text = re.sub(r"[^A-Za-z0-9.-]", ".", ".".join(words))[:40]
        return f"fh.{text}.{secrets.token_hex(4)}"

    def _change(self, name: str, *arguments: str) -> None:
        if arguments:  # lvchange(8) refuses to change nothing
            self._lvm.change("lvchange", "-y", *arguments, f"{self._vg}/{name}")

    def _point(self, machine: str, name: str) -> None:
        fresh = self._links / f".{machine}.{os.getpid()}.{secrets.token_hex(2)}.link"
        fresh.symlink_to(self._lvm.node(name))
        fresh.replace(self._links / machine)
        sync(self._links)

    def _give(self, name: str) -> None:
        """Let QEMU's user read and write the volume; besides it root alone can."""
        give(self._lvm.ready(name), self._reader)

    def _path(self, disk: LogicalVolume) -> Path:
        """The disk's path: its link, or the device itself where the link is lost."""
        link, node = self._links / disk.facts["machine"], self._lvm.node(disk.name)
        try:
            return link if link.readlink() == node else node
        except OSError:
            return node

    def _unused(self, volume: LogicalVolume) -> None:
        """Busy if somebody has it open. udev looks at a new device for a moment: that doesn't count."""
        if volume.open and users_of(self._lvm.node(volume.name)):
            raise self._lvm.busy(volume.name)

    @staticmethod
    def _check_dependents(seen: LvmState, volumes: Sequence[LogicalVolume]) -> None:
        """WrongState if other volumes are snapshots of these: lvremove would remove them too, whoever
        made them."""
        names = {v.name for v in volumes}
        others = [
            v.name for v in seen.group.volumes
            if v.snapshot and v.origin in names and v.name not in names
        ]  # fmt: skip
        if others:
            raise WrongState(
                f"volumes {', '.join(others)} are snapshots of {seen.group.name}/"
                f"{', '.join(sorted(names))} and would go with it",
                remedy="remove them first, if nobody needs them",
            )

    def _remove(self, seen: LvmState, volumes: Sequence[LogicalVolume]) -> None:
        self._check_dependents(seen, volumes)
        self._lvm.remove([v.name for v in volumes])
        for volume in volumes:
            self._forget(volume.name)

    def _remove_old(self, names: Sequence[str]) -> None:
        """Remove volumes that were swapped out. What can't be removed now is a leftover, not a failed
        reset."""
        try:
            self._lvm.remove(names)
        except FarmhandError as error:
            self._warn((f"{error.message}; ", Call("gc"), " will remove it later"))

    def _drop(self, name: str) -> None:
        """Remove a volume that this very call made."""
        with contextlib.suppress(NotFound):
            self._lvm.remove([name])
        self._forget(name)

    def _drop_all(self, machine: str) -> None:
        seen = self._look()
        self._remove(seen, seen.of(machine))


def plain(name: str) -> str:
    """The name, if it is plain, for names get into paths and tags. UsageError if it isn't; the loader
    checks them as well."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a plain name: letters, digits, '.', '_' and '-'")
    return name


def when(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
