"""Keeping a warm checkpoint of running machines: disk and memory of one moment, while they run but for
some tens of milliseconds.

1. Refuse what can't be: nothing is changed yet. The directory where the image is made is marked: until
   that mark is gone, the machine may stand still, or its disk be in between. Then the guests' file
   systems are frozen, where they have an agent, which is marked before it is asked for: later QEMU may
   have paused a quiet guest by itself.
2. QEMU writes its migration stream to us while the guest runs on; pages that it writes to come again.
3. All was read once: QEMU is told how long the rest may take. Of several machines all come here first.
4. QEMU pauses the guest before the stream's end (capability pause-before-switchover). The disk store
   keeps the disk: what QEMU had in memory of it is written out by then, and QEMU still has it open, so
   it can be made to go on in another file. Of several machines all are paused before the first disk is
   kept.
5. The stream's end: the last pages, the devices. The guest runs on, and then it is thawed: an agent in a
   guest that stands still hears nothing.
6. It is noted that all is there. The files are synced, summed and sealed, and get their name: it is a
   warm checkpoint from here on.

Whatever fails, the guest runs on, thawed; so it does if we are killed (guard.py). Then the disk's
checkpoint may be there without memory, as a cold one. A directory under construction that nobody works
on any more tells that this was cut off; ``settle`` brings it to its end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from host.files import blocks, file_error
from hypervisors.answers import answer_of
from hypervisors.api import Callbacks, Checkpoint, LiveDisks, Owner
from hypervisors.libvirt import guest_agent
from hypervisors.libvirt.domain_xml import MEMORY_ID, read_domain
from hypervisors.libvirt.warm.definition import has_memory_object, memory_file
from hypervisors.libvirt.warm.images import (
    DEFINITION,
    FROZEN,
    HELD,
    MEMORY,
    STATE,
    MemoryImages,
    Seal,
    need,
)
from hypervisors.libvirt.warm.migration_stream import StreamSplitter
from hypervisors.libvirt.warm.monitor import Monitor
from inventory.errors import Call, Conflict, DriverFailed, FarmhandError, WrongState

if TYPE_CHECKING:
    import libvirt

_SECURE = 1  # libvirt.VIR_DOMAIN_XML_SECURE, a module imported late
_PIPE = 2**20  # bytes: what a user may have (fs.pipe-max-size)
_DOWNTIME = 30  # ms that the rest of the stream may take while the guest is paused
_AS_LONG_AS_IT_TAKES = 2_000_000  # ms: QEMU's most
_FAST = 2**40  # bytes a second: no limit
_PATIENCE = 30.0  # seconds after the first pass, before a guest that writes faster is paused anyway
_OTHERS = 1.0  # and as soon as another one stands still
_LIMIT = 3600.0  # seconds: a dead QEMU is noticed long before
_LAST = 120.0  # seconds for the stream's end
_CANCELLED = 5.0
_CLOSELY, _LOOK = 0.001, 0.005
_UNDER_WAY = ("setup", "active", "pre-switchover", "device", "cancelling")


class Keeping:
    """One machine's. Between ``begin`` and ``release`` it may stand still."""

    def __init__(
        self,
        domain: libvirt.virDomain,
        disks: LiveDisks,
        images: MemoryImages,
        name: str,
        told: Callbacks,
    ) -> None:
        """WrongState, Conflict."""
        self.machine = domain.name()
        self.domain = domain
        self.monitor = Monitor(domain)
        self._disks = disks
        self._images = images
        self._name = name
        self.told = told
        self._xml = domain.XMLDesc(_SECURE)
        self._seen = read_domain(self._xml)
        self._error: BaseException | None = None
        self._reader: threading.Thread | None = None
        self._paused_at: float | None = None
        self._asked_at: float | None = None
        self._held = False  # until ``begin``
        self.place = Path()  # where the image is made
        self.pause = 0.0  # seconds
        self.frozen = 0.0  # seconds that its guest's file systems may have been frozen
        self.kept: Checkpoint | None = None
        self.quiesced = False
        self._seal: Seal | None = None
        if not has_memory_object(self._xml):
            raise WrongState(
                f"{self.machine} was started by another farmhand, which gave its memory no name",
                remedy="stop it and start it again, then keep it",
            )

    @property
    def owner(self) -> Owner:
        assert self._seen.owner
        return self._seen.owner

    @property
    def size(self) -> int:
        """Bytes of its memory."""
        return self._seen.memory

    def needs(self) -> int:
        """Bytes that its memory may take as a file: what it has touched, or all of the file that it is
        mapped from. Where it comes to more, ``_has_room`` ends it."""
        has: int = self.domain.memoryStats().get("rss", self.size // 1024)
        face = memory_file(self._xml)
        return min(self.size, max(has * 1024, blocks(face) if face else 0))

    def mark(self) -> None:
        """Step 1. Until ``settle`` takes the mark away, recovery has to look after the machine."""
        (self.place / HELD).touch()

    def begin(self) -> None:
        """Step 2, its beginning. OSError."""
        self._held = True
        memory = os.open(self.place / MEMORY, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(memory, self.size)
            reading, writing = os.pipe()
        except BaseException:
            os.close(memory)
            raise
        stream = os.fdopen(reading, "rb", _PIPE)
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, _PIPE)
            self._able(pauses=True)
            self.monitor.run("migrate-set-parameters", max_bandwidth=_FAST, downtime_limit=0)
            self.monitor.run("getfd", file=writing, fdname="farmhand")
        finally:
            os.close(writing)
        self._reader = threading.Thread(target=self._read, args=(stream, memory), daemon=True)
        self._reader.start()
        self.monitor.run("migrate", uri="fd:farmhand")

    def copied(self) -> bool:
        """Step 2: whether all was read once. The guest runs, or is paused by QEMU, which does so by
        itself as soon as nothing more is to be sent."""
        seen = self.monitor.migration()
        status, passes = seen.get("status"), seen.get("ram", {}).get("dirty-sync-count", 0)
        if status == "pre-switchover":
            self._note_pause()
        elif passes <= 1:
            self._alive()
            if status not in ("setup", "active", "device", None):
                raise DriverFailed(f"{self.machine}: QEMU {status} its migration")
            return False
        return True

    def freeze(self) -> None:
        """Step 1. An agent that hangs, or isn't there, is asked for nothing; one that won't has nothing
        to thaw."""
        if guest_agent.hears(self.domain):
            self._asked_at = time.monotonic()
            (self.place / FROZEN).touch()
            said = guest_agent.freeze(self.domain)
            self.quiesced = said is True
            if said is False:
                self._asked_at = None
                (self.place / FROZEN).unlink(missing_ok=True)

    def go_on(self, downtime: int = _DOWNTIME) -> None:
        """Step 3: until so many ms would do for the rest."""
        self.monitor.run("migrate-set-parameters", downtime_limit=downtime)

    def stands(self) -> bool:
        """Step 4: whether it is paused by now."""
        if self._paused_at is None and self.monitor.comes_to("pre-switchover", self._alive):
            self._note_pause()
        return self._paused_at is not None

    def _note_pause(self) -> None:
        if self._paused_at is None:
            self._paused_at = time.monotonic()

    def keep_disk(self) -> None:
        """Nobody is told here, and the journal isn't written: the machine stands still."""
        self.kept = self._disks.checkpoint_live(self.machine, self._name, self._move)

    def end(self) -> None:
        """Step 5, before it runs on."""
        self.monitor.run("migrate-continue", state="pre-switchover")
        if not self.monitor.wait("completed", limit=_LAST, alive=self._alive):
            raise DriverFailed(f"{self.machine}: QEMU did not come to the end of its migration")
        self._joined()

    def release(self) -> None:
        """Let it run on, however far this came. Safe to call again."""
        import libvirt

        run_on(self.domain, self.monitor)
        if self._paused_at is not None:
            self.pause, self._paused_at = time.monotonic() - self._paused_at, None
        with contextlib.suppress(FarmhandError, libvirt.libvirtError):  # the next one sets it anew
            self._able(pauses=False)
        self._held = False

    def thawed(self, *, heard: bool) -> None:
        """Step 5, its end. ``heard``: its agent said so."""
        if self._asked_at is None:
            return
        self.frozen, self._asked_at = time.monotonic() - self._asked_at, None
        (self.place / FROZEN).unlink(missing_ok=True)
        if not heard:
            self.told.warn(still_frozen(self.machine))

    @property
    def to_thaw(self) -> bool:
        """Whether it runs, and its agent was asked to freeze."""
        return self._asked_at is not None and not self._held

    def settle(self) -> None:
        """The disk's checkpoint, begun or not, to its end. The machine runs on."""
        running = self.domain.isActive()
        self._disks.settle_live(self.machine, top(self.monitor)[1] if running else None)
        if not self._held and self._asked_at is None:
            (self.place / HELD).unlink(missing_ok=True)

    def note(self, runs_on: Mapping[str, str]) -> None:
        """All is there, but not sealed: from here on whoever recovers it can do that."""
        assert self.kept
        self._seal = Seal(
            farm=self.owner.farm.mark, vm=self.owner.vm, machine=self.machine, checkpoint=self._name,
            disk=self.kept.id, created=datetime.now(UTC), how="mapped", size=self.size,
            pause=round(self.pause, 4), frozen=round(self.frozen, 3), quiesced=self.quiesced,
            runs_on=dict(runs_on), files={},
        )  # fmt: skip
        (self.place / DEFINITION).write_text(self._xml, encoding="utf-8")
        self._images.note_unsealed(self.place, self._seal)

    def seal(self) -> None:
        """Step 6. Nobody may end it here: the disk's checkpoint is there already."""
        assert self._seal
        self.told.working(f"sealing the memory of {self.machine}")
        self._images.finish(self.place, self._seal)

    def _read(self, stream: BinaryIO, memory: int) -> None:
        with stream:
            try:  # and told before QEMU sees that nobody reads any more
                with (self.place / STATE).open("xb") as state:
                    StreamSplitter(
                        stream, MEMORY_ID, self.size, memory, state, room=self._has_room
                    ).run()
            except OSError as error:
                self._error = file_error(error, self.place / MEMORY, "write")
            except BaseException as error:  # noqa: BLE001 - told by whoever waits for it
                self._error = error
            finally:
                os.close(memory)

    def _has_room(self) -> None:
        need(self.place, 0, f"the memory of {self.machine}")

    def _alive(self) -> None:
        """Raises what the reading thread has met."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _joined(self) -> None:
        assert self._reader
        self._reader.join(_LAST)
        if self._reader.is_alive():
            raise DriverFailed(f"{self.machine}: QEMU's migration stream has no end")
        self._alive()

    def _able(self, *, pauses: bool) -> None:
        capability = {"capability": "pause-before-switchover", "state": pauses}
        self.monitor.run("migrate-set-capabilities", capabilities=[capability])

    def _move(self, path: Path) -> None:
        node, _ = top(self.monitor)
        self.monitor.run(
            "blockdev-snapshot-sync", node_name=node, snapshot_file=str(path),
            snapshot_node_name=f"fh-{secrets.token_hex(4)}", format="qcow2", mode="existing",
        )  # fmt: skip


def top(monitor: Monitor) -> tuple[str, Path]:
    """QEMU's name of the machine's disk, and the file or device that it writes to. The latter is told by
    the node right below: QEMU describes the image itself with all of its base images, and cuts that off
    at 4096 bytes."""
    found = [one["inserted"] for one in monitor.run("query-block") if "inserted" in one]
    disks = [one["node-name"] for one in found if not one["ro"]]
    if len(disks) != 1:
        raise DriverFailed(f"{monitor.domain.name()} has {len(disks)} disks that it can write to")
    with answer_of("QEMU"):
        stats = {one.get("node-name"): one for one in monitor.run("query-blockstats")}
        below = stats[disks[0]]["parent"]["node-name"]
        nodes = {one["node-name"]: one for one in monitor.run("query-named-block-nodes", flat=True)}
        return disks[0], Path(nodes[below]["file"])


def run_on(domain: libvirt.virDomain, monitor: Monitor) -> bool:
    """Let it run on, if it stands still for a migration, or would in a moment. Returns whether it
    did. For one of which ``HELD`` tells that the migration is ours."""
    import libvirt

    if not domain.isActive():
        return False
    runs = monitor.run("query-status")["running"]
    stood = not runs
    if monitor.migration().get("status") in _UNDER_WAY:
        monitor.run("migrate_cancel")
        with contextlib.suppress(FarmhandError):
            monitor.wait("cancelled", limit=_CANCELLED)
        runs = monitor.run("query-status")["running"]
    if not runs:
        stood = True
        try:
            domain.resume()
        except libvirt.libvirtError:  # it had not been told yet that it stands still
            monitor.run("cont")
    return stood


def copy_all(keepings: Sequence[Keeping], told: Callbacks) -> None:
    """Step 2: until all of all was read once. Each is looked at in each round: one that QEMU pauses
    meanwhile stands still until the last one is there."""
    limit = time.monotonic() + _LIMIT
    while waiting := [one.machine for one in keepings if not one.copied()]:
        told.working(f"copying the memory of {', '.join(waiting)}")
        if time.monotonic() > limit:
            raise DriverFailed(f"the memory of {', '.join(waiting)} could not be copied in {_LIMIT:g} s")
        time.sleep(_LOOK)


def hold_all(keepings: Sequence[Keeping]) -> None:
    """Step 4: until all are paused. One that writes faster than can be read is paused anyway, after a
    while; soon where another one stands still already."""
    began = time.monotonic()
    end, limit = began + _PATIENCE, began + _LIMIT
    waiting, forced = list(keepings), False
    while waiting := [one for one in waiting if not one.stands()]:
        now = time.monotonic()
        if len(waiting) < len(keepings):
            end = min(end, now + _OTHERS)
        if now > limit:
            raise DriverFailed(f"{', '.join(one.machine for one in waiting)} could not be paused")
        if now > end and not forced:
            forced = True
            for keeping in waiting:
                keeping.go_on(_AS_LONG_AS_IT_TAKES)
        time.sleep(_CLOSELY if now < began + 1 else _LOOK)


def release_all(keepings: Sequence[Keeping]) -> None:
    """Step 5, its end: each runs on, whatever becomes of the others; those that do are thawed then."""
    with contextlib.ExitStack() as each:
        each.callback(_thaw_all, keepings)
        for keeping in keepings:
            each.callback(keeping.release)


def _thaw_all(keepings: Sequence[Keeping]) -> None:
    asked = [one for one in keepings if one.to_thaw]
    deaf = [domain.name() for domain in guest_agent.thaw([one.domain for one in asked])]
    for keeping in asked:
        keeping.thawed(heard=keeping.machine not in deaf)


def still_frozen(machine: str) -> str:
    return (
        f"{machine}: its guest agent did not say within {guest_agent.THAWS:g} s that its file systems "
        "are thawed: programs that write in it may stand still (as root in it: fsfreeze --unfreeze /)"
    )


def check_free(machine: str, name: str, images: MemoryImages) -> None:
    """Conflict if there is an image of that name."""
    if images.place_of(machine, name).exists():
        raise Conflict(
            f"{machine} has a memory of the name {name} already",
            remedy=("give the new one another name; ", Call("gc"), " removes what belongs to nothing"),
        )
