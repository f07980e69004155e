"""Keeping a warm checkpoint of running machines: disk and memory of one moment, while they run but for
some tens of milliseconds.

1. Refuse what can't be: nothing is changed yet.
2. The guests' file systems are frozen, where they have an agent. QEMU writes its migration stream to us
   while the guest runs on; pages that it writes to come again.
3. QEMU pauses the guest before the stream's end (capability pause-before-switchover). The disk store
   keeps the disk: what QEMU had in memory of it is written out by then, and QEMU still has it open, so
   it can be made to go on in another file. Of several machines all are paused before the first disk is
   kept.
4. The stream's end: the last pages, the devices. The guest runs on.
5. It is noted that all is there. The files are synced, summed and sealed, and get their name: it is a
   warm checkpoint from here on.

Whatever fails, the guest runs on; so it does if we are killed (guard.py). Then the disk's checkpoint may
be there without memory, as a cold one. A directory under construction that nobody works on any more
tells that this was cut off; ``settle`` brings it to its end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hypervisors.answers import answer_of
from hypervisors.api import Callbacks, Checkpoint, LiveDisks, Owner
from hypervisors.libvirt.domain_xml import MEMORY_ID, read_domain
from hypervisors.libvirt.warm.definition import has_memory_object
from hypervisors.libvirt.warm.images import DEFINITION, MEMORY, STATE, MemoryImages, Seal
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
_LIMIT = 3600.0  # seconds: a dead QEMU is noticed long before
_LAST = 120.0  # seconds for the stream's end
_CANCELLED = 5.0


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
        self.place = Path()  # where the image is made
        self.pause = 0.0  # seconds
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

    def resident(self) -> int:
        """Bytes that its memory may take as a file."""
        has: int = self.domain.memoryStats().get("rss", self.size // 1024)
        return min(self.size, has * 1024)

    def begin(self) -> None:
        """Step 2, its beginning."""
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

    def copy(self) -> None:
        """Step 2: until all was read once. The guest runs."""
        began = time.monotonic()
        while True:
            seen = self.monitor.migration()
            status, passes = seen.get("status"), seen.get("ram", {}).get("dirty-sync-count", 0)
            if status == "pre-switchover" or passes > 1:
                return
            self._alive()
            if status not in ("setup", "active", "device", None):
                raise DriverFailed(f"{self.machine}: QEMU {status} its migration")
            self.told.working(f"copying the memory of {self.machine}")
            if time.monotonic() - began > _LIMIT:
                raise DriverFailed(f"{self.machine}: its memory could not be copied in {_LIMIT:g} s")
            time.sleep(0.005)

    def hold(self) -> None:
        """Step 3: until it is paused."""
        self.monitor.run("migrate-set-parameters", downtime_limit=_DOWNTIME)
        if not self.monitor.wait("pre-switchover", limit=_PATIENCE, alive=self._alive):
            self.monitor.run("migrate-set-parameters", downtime_limit=_AS_LONG_AS_IT_TAKES)
            if not self.monitor.wait("pre-switchover", limit=_LIMIT, alive=self._alive):
                raise DriverFailed(f"{self.machine} could not be paused")
        self._paused_at = time.monotonic()

    def keep_disk(self) -> None:
        """Nobody is told here, and the journal isn't written: the machine stands still."""
        self.kept = self._disks.checkpoint_live(self.machine, self._name, self._move)

    def end(self) -> None:
        """Step 4, before it runs on."""
        self.monitor.run("migrate-continue", state="pre-switchover")
        if not self.monitor.wait("completed", limit=_LAST, alive=self._alive):
            raise DriverFailed(f"{self.machine}: QEMU did not come to the end of its migration")
        self._joined()

    def release(self) -> None:
        """Let it run on, however far this came. Safe to call again."""
        run_on(self.domain, self.monitor)
        if self._paused_at is not None:
            self.pause, self._paused_at = time.monotonic() - self._paused_at, None
        with contextlib.suppress(FarmhandError):
            self._able(pauses=False)

    def settle(self) -> None:
        """The disk's checkpoint, begun or not, to its end. The machine runs on."""
        running = self.domain.isActive()
        self._disks.settle_live(self.machine, top(self.monitor)[1] if running else None)

    def note(self, runs_on: Mapping[str, str]) -> None:
        """All is there, but not sealed: from here on whoever recovers it can do that."""
        assert self.kept
        self._seal = Seal(
            farm=self.owner.farm.mark, vm=self.owner.vm, machine=self.machine, checkpoint=self._name,
            disk=self.kept.id, created=datetime.now(UTC), how="mapped", size=self.size,
            pause=round(self.pause, 4), quiesced=self.quiesced, runs_on=dict(runs_on), files={},
        )  # fmt: skip
        (self.place / DEFINITION).write_text(self._xml, encoding="utf-8")
        self._images.note_unsealed(self.place, self._seal)

    def seal(self) -> None:
        """Step 5. Nobody may end it here: the disk's checkpoint is there already."""
        assert self._seal
        self.told.working(f"sealing the memory of {self.machine}")
        self._images.finish(self.place, self._seal)

    def _read(self, stream: BinaryIO, memory: int) -> None:
        try:
            with stream, (self.place / STATE).open("xb") as state:
                StreamSplitter(stream, MEMORY_ID, self.size, memory, state).run()
        except BaseException as error:  # noqa: BLE001 - told by whoever waits for it
            self._error = error
        finally:
            os.close(memory)

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
    """Let it run on, if it stands still for a migration. Returns whether it did."""
    import libvirt

    if not domain.isActive() or monitor.run("query-status")["running"]:
        return False
    if monitor.migration().get("status") not in ("completed", "failed", "cancelled"):
        monitor.run("migrate_cancel")
        with contextlib.suppress(FarmhandError):
            monitor.wait("cancelled", limit=_CANCELLED)
    try:
        domain.resume()
    except libvirt.libvirtError:  # it had not been told yet that it stands still
        monitor.run("cont")
    return True


@contextlib.contextmanager
def frozen(keepings: Sequence[Keeping]) -> Iterator[None]:
    """Within it the guests' file systems are frozen, where an agent does that."""
    from hypervisors.libvirt import guest_agent

    try:
        for keeping in keepings:
            keeping.quiesced = guest_agent.freeze(keeping.domain)
        yield
    finally:
        for keeping in keepings:
            if keeping.quiesced:
                guest_agent.thaw(keeping.domain)


def check_free(machine: str, name: str, images: MemoryImages) -> None:
    """Conflict if there is an image of that name."""
    if images.place_of(machine, name).exists():
        raise Conflict(
            f"{machine} has a memory of the name {name} already",
            remedy=("give the new one another name; ", Call("gc"), " removes what belongs to nothing"),
        )
