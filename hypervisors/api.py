"""What a driver is: the values it speaks in and the two protocols it answers to.

A driver does what it is told to one machine or one disk and reports what it sees. It holds no
policy: it never reads the farm file, prints, prompts, retries blindly, waits for a guest's ssh or
decides which checkpoint is meant. What it can't do it refuses with ``Unsupported``.

Names: a *VM* is called by its role (``prod``) in the farm file and by a machine name that is unique
on the host (``kata-prod``) here. Drivers know machine names only; the role is part of the mark.

Every changing method calls ``step(text)`` right before each thing it changes, so that the caller's
journal knows how far it came. Each method is safe to call again after a kill at any point.

Sizes are bytes, times are timezone-aware UTC, errors are ``inventory.errors``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol, runtime_checkable

from host.progress import Pulse
from inventory.errors import Text, Unsupported

CLEAN = "clean"
"""The checkpoint that every disk has from its cloning on."""

StepFn = Callable[[str], None]
"""Told, in a few words, what is about to be changed. Raising from it abandons the change."""


def no_step(_text: str) -> None:
    """For callers that keep no journal (tests, read-only use)."""


WarnFn = Callable[[Text], None]
"""Told what an admin should know, though the work goes on."""


def no_warning(_text: Text) -> None:
    """For callers with nobody to warn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What drivers tell while they work: before each change, of what an admin should know, and of how
    far a long one has come."""

    step: StepFn = no_step
    warn: WarnFn = no_warning
    working: Callable[[str], None] = no_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Directories:
    """``state``: all farms' lasting things; ``farm``: this farm's own, below it; ``cache``: what can be
    made again; ``runtime``: this farm's, gone after a boot."""

    state: Path
    farm: Path
    cache: Path
    runtime: Path


@dataclass(frozen=True, slots=True)
class Owner:
    """Our mark, carried by the object itself. Nothing without it is ever changed or removed."""

    farm: str
    vm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One sealed generation of a golden disk. Never changes once it exists."""

    name: str
    generation: int
    ref: str  # what the store needs to clone it: a path, a ZFS snapshot, a VG/LV
    size: int  # virtual size
    sha256: str  # of the sealed image file's bytes
    created: datetime
    origin: str  # the recipe and its hash, or the imported file
    firstboot: str  # who makes a clone unique at first boot: "farmhand" or "cloud-init"

    @property
    def label(self) -> str:
        return f"{self.name}@{self.generation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A state a disk can be put back to. ``clean`` exists from cloning on."""

    name: str
    created: datetime
    warm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A VM's disk as the store sees it now."""

    machine: str
    owner: Owner
    path: Path  # what the hypervisor opens; resolves to the old or the new disk at any time
    format: str  # "qcow2" or "raw"
    size: int  # virtual
    used: int  # bytes of the store that belong to it alone
    template: str  # label of the generation it was cloned from
    base: str  # the checkpoint the present disk grew from
    checkpoints: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Something of ours that nothing refers to: from a killed operation, or an orphan."""

    kind: str  # "disk", "domain", "file", "checkpoint", ...
    ref: str
    owner: Owner | None  # None where the object died before it could be marked as a VM's
    created: datetime
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of the store. ``free`` is what new data may still take."""

    total: int
    free: int


class Disks(Protocol):
    """A disk store. One instance serves one farm; ``list`` shows that farm's disks only."""

    def seal(self, image: Path, template: Template) -> Template:
        """Take over ``image`` (a qcow2 or raw file, consumed) as this generation; returns it with
        ``ref`` filled in. Conflict where the generation exists."""

    def templates(self) -> Sequence[Template]: ...

    def remove_template(self, label: str) -> None:
        """WrongState, naming them, while disks depend on it."""

    def find(self, machine: str) -> Disk | None: ...

    def list(self) -> Sequence[Disk]: ...

    def clone(self, template: Template, machine: str, owner: Owner, size: int) -> Disk:
        """A new disk, complete or not there at all, with checkpoint ``clean`` = the template.
        ``size`` >= template.size. Conflict where the machine has one; NoSpace before beginning."""

    def checkpoint(self, machine: str, name: str) -> Checkpoint:
        """Cold: the caller has stopped the VM. Conflict where the name is taken."""

    def restore(self, machine: str, name: str) -> Disk:
        """Swap in a fresh disk grown from that checkpoint; atomic; newer checkpoints stay.
        The caller has stopped the VM. NotFound for an unknown checkpoint."""

    def pristine(self, machine: str, name: str, *, quick: bool = False) -> bool | None:
        """True only if the present disk provably equals that checkpoint: nothing written since.
        ``quick``, for a look: None where that takes reading a disk whole, or waiting for others."""

    def destroy(self, machine: str) -> None:
        """The disk and its checkpoints, in the order their dependencies allow."""

    def leftovers(self) -> Sequence[Leftover]: ...

    def discard(self, leftover: Leftover) -> None: ...

    def capacity(self) -> Capacity: ...


@runtime_checkable
class FarmDisks(Protocol):
    """What a store offers besides ``Disks`` where it changes several disks as one. The caller has
    stopped the VMs.

    All that can be refused or run out is seen to before the first disk changes, and an error later on
    puts back what was changed: an error means that none is. A kill leaves all or none where the store
    has transactions; else perhaps some, and then the caller goes on (its journal knows): ``restore_all``
    may be called again, ``checkpoint_all`` for those that have no such checkpoint yet."""

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        """One moment for all of them. Conflict where one has such a checkpoint."""

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        """NotFound where one has no such checkpoint."""


@runtime_checkable
class DeviceDisks(Protocol):
    """What a store offers besides ``Disks`` where disks are block devices, whose nodes are made anew
    by every boot of the host, and whose path may change when a disk is restored."""

    def ready(self, machine: str) -> Disk:
        """To be called right before a start: the device is there, and the hypervisor may open it."""


@runtime_checkable
class WatchedDisks(Protocol):
    """What a store offers besides ``Disks`` where it may run full in ways that its capacity doesn't
    show."""

    def notes(self) -> Sequence[str]:
        """What an admin should look at, a line each; none: all is well. Quick, changes nothing."""


@runtime_checkable
class MergingDisks(Protocol):
    """What a store offers besides ``Disks`` where a disk can be written back into its checkpoint."""

    def merge(self, machine: str) -> None:
        """The disk's changes go into the checkpoint it grew from, which then is what the disk is now.
        The caller has stopped the VM. Cut off, it is gone on with by calling it again. Unsupported for
        ``clean``, the template's."""


@runtime_checkable
class LostDisks(Protocol):
    """What a store offers besides ``Disks`` where checkpoints may outlive a disk that somebody removed.
    They are no leftovers, and a ``clone`` is refused (Conflict) as long as they are there."""

    def left(self, machine: str) -> Sequence[Checkpoint]:
        """Of a machine whose disk is gone; ``clean`` among it where ``restore`` makes a disk from each.
        Empty: a disk is there, or nothing."""


@runtime_checkable
class NamelessDisks(Protocol):
    """What a store offers besides ``Disks`` whose server may lose a disk's name and marks, and keep the
    disk. What is provably ours of those is among the leftovers."""

    def doubtful(self) -> Sequence[str]:
        """The rest, after the storage was looked at anew: may be anybody's, and is never touched."""


@runtime_checkable
class WarmDisks(Protocol):
    """What a store offers besides ``Disks`` where a checkpoint may hold a running machine's memory
    (``Checkpoint.warm``). ``restore`` to such a one leaves the machine suspended: a start runs on from
    there. It is of one machine, and can't be undone: cut off, it is done again."""

    def half_back(self, machine: str) -> str:
        """The warm checkpoint that it has to be put back to once more before it can be started, for the
        way there, or the first start from there, was cut off. "": it is whole."""


class Power(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"
    SUSPENDED = "suspended"  # off; its memory is kept, and a start runs on from there
    PAUSED = "paused"
    UNKNOWN = "unknown"  # an ssh machine nobody has asked, a host out of reach


@dataclass(frozen=True, slots=True)
class Forward:
    """Host loopback port -> guest port, for user-mode networking."""

    host: int
    guest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """``mode``: "user" (QEMU's own, forwards used), "bridge" or "network" (``target`` names it)."""

    mac: str
    mode: str
    target: str = ""
    forwards: tuple[Forward, ...] = ()
    internet: bool = False  # user mode: may the guest reach beyond its forwards


_DEFINED: Mapping[str, bool] = {"defined": True}
"""Marks what is part of a machine's definition: with another value it must be defined anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """All a hypervisor needs to make a machine. Complete: nothing is looked up elsewhere."""

    name: str = field(metadata=_DEFINED)
    owner: Owner = field(metadata=_DEFINED)
    memory: int = field(metadata=_DEFINED)  # maximum, and what it boots with
    vcpus: int = field(metadata=_DEFINED)
    disk_size: int
    nic: Nic = field(metadata=_DEFINED)
    address: IPv4Address | None = None  # where ssh answers; loopback in user mode
    ssh_port: int = 22
    seed: Path | None = field(default=None, metadata=_DEFINED)  # first boot's ISO image; not its content
    console_log: Path | None = None
    kernel: Path | None = field(default=None, metadata=_DEFINED)  # else the disk's own boot loader
    initrd: Path | None = field(default=None, metadata=_DEFINED)
    cmdline: str = field(default="", metadata=_DEFINED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as the hypervisor sees it now. ``owner`` None: not ours, hands off."""

    name: str
    owner: Owner | None
    power: Power
    memory: int  # maximum
    current: int  # given to the guest now
    vcpus: int
    mac: str
    disk: Path | None
    spec_hash: str  # of the MachineSpec it was defined from, see ``spec_hash``; "" if foreign
    template: str
    started: datetime | None = None
    accelerated: bool | None = None  # defined for KVM, or for QEMU's emulation; None: there is no choice


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """A running machine's memory, as asked just now. Bytes."""

    actual: int  # given to the guest
    maximum: int  # it can't be ballooned above
    least: int | None  # nor below: what its guest needs now, and a reserve; None: nobody tells


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Data that ``status`` and ``doctor`` show."""

    driver: str  # "kvm", "qemu" (no working KVM), "xen", "ssh", "fake"
    accelerated: bool  # as a machine is defined now, see Machine
    power: bool  # can start and stop
    reset: bool
    linked_clones: bool
    live_balloon: bool
    warm_checkpoints: bool
    console: bool
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """How to reach a machine's console."""

    argv: tuple[str, ...]  # attach interactively; empty where there is none
    log: Path | None


class Hypervisor(Protocol):
    """Machines on one host. Handed its disk store; ``list`` shows this farm's machines only."""

    def capabilities(self) -> Capabilities: ...

    def find(self, name: str) -> Machine | None:
        """By machine name, ours or not."""

    def list(self) -> Sequence[Machine]: ...

    def define(self, spec: MachineSpec, template: Template) -> Machine:
        """Disk first, then the definition: the machine exists complete or not at all, stopped.
        NotOurs where the name is somebody else's; Conflict where it is ours already."""

    def redefine(self, spec: MachineSpec) -> Machine:
        """Change a stopped machine's definition (memory, NIC, ...), disk untouched."""

    def start(self, name: str) -> None:
        """Returns once the guest's CPUs run; of a suspended one, where it was. WrongState if it runs
        already, or if its memory can't be trusted to be that of its disk."""

    def stop(self, name: str, *, grace: float) -> None:
        """Ask the guest to shut down, wait, then cut power (0: at once). ``grace``: seconds without a
        sign that it goes on, see ``host.progress``; where nobody sees it, seconds.
        A stopped machine is left alone, a suspended one loses its memory."""

    def checkpoint(self, name: str, checkpoint: str, *, warm: bool = False) -> Checkpoint:
        """Cold: WrongState while running. ``warm``: of a running machine, which runs on, disk and
        memory; WrongState where it doesn't run, Unsupported where the driver, or its host, can't."""

    def reset(self, name: str, checkpoint: str) -> None:
        """Cut power, put the disk back; leaves it stopped on the old state or the new. Back to a warm
        checkpoint it is suspended; see ``WarmDisks``."""

    def balloon(self, name: str, target: int, *, timeout: float) -> int:
        """Set the guest's memory and wait until the guest says it is there; returns what it
        reached. ``timeout``: seconds without coming nearer. Errors: WrongState (stopped), Unsupported
        (no balloon driver), UsageError (above maximum or under the guest's need), TimedOut (with what it
        did reach)."""

    def memory(self, name: str) -> MemoryUse:
        """What it has, and within what ``balloon`` can change it; changes nothing. WrongState
        (stopped), Unsupported where nobody knows."""

    def console(self, name: str) -> Console: ...

    def pulse(self, name: str) -> Pulse | None:
        """What it has done since its start, for those that wait for it; a look, which costs a few
        milliseconds. None where nobody sees that, or it doesn't run."""

    def destroy(self, name: str) -> None:
        """Cut power, remove the definition, then the disk. NotOurs without our mark."""

    def leftovers(self) -> Sequence[Leftover]:
        """Definitions of ours without a disk, disks of ours without a definition, half-made."""

    def discard(self, leftover: Leftover) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class WatchedMachines(Protocol):
    """What a hypervisor offers besides ``Hypervisor`` where it sees into its guests."""

    def notes(self) -> Mapping[str, str]:
        """What an admin should know of running machines, a line each, by name; none: all is well. Asks
        the hypervisor for all of them at once, and changes nothing."""


def no_warm(machine: str) -> Unsupported:
    """What a driver with cold checkpoints only says to a warm one."""
    return Unsupported(
        f"{machine}: this driver's checkpoints are cold: a running machine's memory can't be kept",
        remedy="without --warm: a cold one, for which it is shut down",
    )


def spec_hash(spec: MachineSpec) -> str:
    """A short hash that changes when the machine must be defined anew: of the fields marked so."""
    import hashlib

    text = repr([(f.name, getattr(spec, f.name)) for f in fields(spec) if "defined" in f.metadata])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
