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

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol, runtime_checkable

from host.progress import Pulse
from hypervisors.ownership import FarmIdentity
from inventory.errors import (
    Call,
    Conflict,
    NotFound,
    NotOurs,
    Remedy,
    Text,
    Unsupported,
    UsageError,
    WrongState,
    some,
)
from inventory.sizes import format_size

CLEAN = "clean"
"""The checkpoint that every disk has from its cloning on."""
WARM = "warm"
"""The checkpoint that a VM has from its first answer on, where the farm file wants it: with memory."""

StepFn = Callable[[str], None]
"""Told, in a few words, what is about to be changed. Raising from it abandons the change."""


def no_step(_text: str) -> None:
    """The StepFn of callers that keep no journal (tests, read-only use)."""


WarnFn = Callable[[Text], None]
"""Told what an admin should know, though the work goes on."""


def no_warning(_text: Text) -> None:
    """The WarnFn of callers with nobody to warn."""


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What drivers call while they work. ``step``: before each change. ``warn``: of what an admin should
    know. ``working``: how far a long change has come. ``interrupted``: whether nobody wants it any
    more."""

    step: StepFn = no_step
    warn: WarnFn = no_warning
    working: Callable[[str], None] = no_step
    interrupted: Callable[[], bool] = _never


@dataclass(frozen=True, slots=True, kw_only=True)
class Directories:
    """``state``: what lasts, of all farms. ``farm``: this farm's part of it. ``cache``: what can be made
    again. ``runtime``: this farm's, gone after a boot."""

    state: Path
    farm: Path
    cache: Path
    runtime: Path


@dataclass(frozen=True, slots=True)
class Owner:
    """Our mark, carried by the object itself. An object without it is never changed or removed."""

    farm: FarmIdentity
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
    firstboot: str  # who makes a clone unique at first boot: "farmhand", "cloud-init" or "none"
    farm: FarmIdentity | None = None  # whose it is, by its mark; None: not sealed yet

    @property
    def label(self) -> str:
        return f"{self.name}@{self.generation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A state a disk can be put back to. ``clean`` exists from cloning on."""

    name: str
    created: datetime
    warm: bool = False
    id: str = ""  # tells this very checkpoint from another one of its name; the store's own words


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
    """Something of ours that nothing refers to: left by a killed operation, or orphaned."""

    kind: str  # "disk", "domain", "file", "checkpoint", ...
    ref: str
    owner: Owner | None  # None where the object died before it could be marked as a VM's
    created: datetime
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """A store's size in bytes. ``free``: what new data may still take."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Foreign:
    """A machine, or a disk without one, of another farm of our farm's name."""

    machine: str
    owner: Owner


class Leases(Protocol):
    """Leases of names, beside what they guard: whoever changes it holds them, whatever controller he is.
    Equal ones guard the same."""

    def hold(self, names: Sequence[str], note: str) -> AbstractContextManager[None]:
        """Hold all of them, or none, within the context. ``note``: who does, in a line. Busy."""


class Adopting(Protocol):
    """What disk stores and hypervisors have in common: a farm's things can become another's."""

    def others(self) -> Sequence[Foreign]:
        """What is of other farms that have our farm's name; by a new look, a machine once."""

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        """Mark as ours what of that machine is that farm's, disk and checkpoints too; all else stays as
        it is, and so does what is neither. May be called while the machine runs."""


class Disks(Adopting, Protocol):
    """A disk store. One instance serves one farm; ``list`` shows that farm's disks only."""

    def seal(self, image: Path, template: Template) -> Template:
        """Take over ``image`` (a qcow2 or raw file; it is consumed) as this generation. Returns the
        template with ``ref`` filled in. Conflict if the generation exists."""

    def templates(self) -> Sequence[Template]:
        """Those of all farms that share the store: each is its farm's alone."""

    def remove_template(self, label: str) -> None:
        """WrongState while a disk or a checkpoint grows from it, whosever they are; it names them
        (``template_in_use``). NotOurs for another farm's."""

    def adopt_template(self, label: str, whose: FarmIdentity) -> None:
        """Mark as ours the template of that label which is that farm's; all else stays as it is."""

    def find(self, machine: str) -> Disk | None: ...

    def list(self) -> Sequence[Disk]: ...

    def clone(self, template: Template, machine: str, owner: Owner, size: int) -> Disk:
        """Make a new disk, complete or not at all, whose checkpoint ``clean`` is the template. ``size``:
        bytes, at least the template's. Errors: Conflict (the machine has a disk), NotOurs (the
        template is another farm's), NoSpace (before anything is made)."""

    def checkpoint(self, machine: str, name: str) -> Checkpoint:
        """Keep the disk as it is. The caller has stopped the VM. Conflict if the name is taken."""

    def restore(self, machine: str, name: str) -> Disk:
        """Swap in a fresh disk grown from that checkpoint, in one atomic step. Newer checkpoints stay.
        The caller has stopped the VM. NotFound for an unknown checkpoint."""

    def remove_checkpoint(self, machine: str, name: str) -> None:
        """Remove it; all else stays as it is. WrongState while something grows from it, see
        ``check_removable``; UsageError for ``clean``, which is the template's; NotFound."""

    def move(self, machine: str, template: Template) -> Disk:
        """Swap in a fresh disk grown from that template, in one atomic step; from then on ``clean`` is
        that template. All other checkpoints stay, and can be put back to. The caller has stopped the VM.
        Cut off, it is finished by calling it again. NotFound, NotOurs and NoSpace as with ``clone``;
        UsageError for a template that is larger than the disk."""

    def pristine(self, machine: str, name: str, *, quick: bool = False) -> bool | None:
        """True only if the present disk provably equals that checkpoint: nothing was written since.
        ``quick`` is for a look: then None where the proof takes reading a whole disk, or waiting for
        others."""

    def rename(self, machine: str, to: str, owner: Owner) -> Disk:
        """Make it the disk of machine ``to``, which is ``owner``'s, with all its checkpoints; what
        proves it pristine stays. The caller has stopped the VM. Cut off, it is finished by calling it
        again, and taken back by calling it with the names changed round. Conflict if both have a disk,
        NotFound if none has, NotOurs."""

    def destroy(self, machine: str) -> None:
        """Remove the disk and its checkpoints, in the order their dependencies allow."""

    def leftovers(self) -> Sequence[Leftover]: ...

    def discard(self, leftover: Leftover) -> None: ...

    def capacity(self) -> Capacity: ...


@runtime_checkable
class FarmDisks(Protocol):
    """What a store offers besides ``Disks`` if it can change several disks as one. The caller has
    stopped the VMs.

    Whatever can be refused or run out is checked before the first disk changes. A later error puts back
    what was changed. So an error means that no disk is changed.

    A kill leaves all disks changed or none, in a store with transactions. In others some may be changed.
    Then the caller, whose journal knows, goes on: it calls ``restore_all`` again, or ``checkpoint_all``
    for the machines that have no such checkpoint yet."""

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        """Keep all disks as they are at one moment. Conflict if one has a checkpoint of that name."""

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        """NotFound if one has no such checkpoint."""


@runtime_checkable
class LiveDisks(Protocol):
    """What a store offers besides ``Disks`` if a disk can be kept while a paused machine has it open. In
    three parts: what takes long is done before and after the pause. All three are the same caller's, one
    after another; nobody else changes the machine meanwhile."""

    def before_live(self, machine: str, name: str) -> None:
        """The machine runs: check that ``checkpoint_live`` may be called, and make ready for it.
        Conflict if the name is taken, NoSpace, Unsupported."""

    def checkpoint_live(self, machine: str, name: str, move: Callable[[Path], None]) -> Checkpoint:
        """The machine is paused, and its hypervisor has written out what it had in memory of the disk:
        keep that. No step is told, for the machine stands still. The checkpoint is complete, and
        ``Disks`` shows it, when ``settle_live`` has returned.

        ``move``: makes the machine write to this other file from now on, whose base is what it had open.
        It is called once at most. After an error too, ``settle_live`` is called."""

    def settle_live(self, machine: str, opened: Path | None) -> None:
        """The machine runs on, or somebody was killed: finish a checkpoint that the machine has moved on
        from, undo one that it hasn't; else nothing is done. So it may be called at any time, and is
        before each start. ``opened``: the file that a running machine writes to now, by any path that
        leads there (proc(5)'s fd/N too), or None if it doesn't run."""


@runtime_checkable
class DeviceDisks(Protocol):
    """What a store offers besides ``Disks`` if its disks are block devices. Each boot of the host makes
    their nodes anew, and a disk's path may change when it is restored."""

    def ready(self, machine: str) -> Disk:
        """Called right before a start. When it returns, the device is there and the hypervisor may open
        it."""


@runtime_checkable
class WatchedDisks(Protocol):
    """What a store offers besides ``Disks`` if it can run full in ways that its capacity doesn't
    show."""

    def notes(self) -> Sequence[str]:
        """What an admin should look at, a line each; empty: all is well. Quick; changes nothing."""


@runtime_checkable
class MergingDisks(Protocol):
    """What a store offers besides ``Disks`` if a disk can be written back into its checkpoint."""

    def merge(self, machine: str) -> None:
        """Write the disk's changes into the checkpoint it grew from; that then equals the disk. The
        caller has stopped the VM. Cut off, it is continued by calling it again. Unsupported for
        ``clean``, which is the template's."""


@runtime_checkable
class GrowableDisks(Protocol):
    """What a store offers besides ``Disks`` if a disk can be made larger in place."""

    def enlarge(self, machine: str, size: int) -> Disk:
        """Make it ``size`` bytes large, with its content and its checkpoints; when it is put back to one
        it is as large. The caller has stopped the VM. Cut off, it is finished by calling it again.
        UsageError if that would make it smaller; NoSpace, before anything is changed; Unsupported
        where its storage can't."""


@runtime_checkable
class ChainedDisks(Protocol):
    """What a store offers besides ``Disks`` if a checkpoint may grow from another one."""

    def grown_from(self, machine: str, name: str) -> Sequence[str]:
        """Names of the checkpoints that grow from that one; as long as there are any, it stays."""


@runtime_checkable
class LostDisks(Protocol):
    """What a store offers besides ``Disks`` if checkpoints can outlive a disk that somebody removed.
    Such checkpoints are no leftovers, and ``clone`` is refused (Conflict) as long as they are there."""

    def left(self, machine: str) -> Sequence[Checkpoint]:
        """The checkpoints of a machine whose disk is gone; empty if it has a disk, or nothing. ``clean``
        is among them where ``restore`` makes a disk from each."""


@runtime_checkable
class NamelessDisks(Protocol):
    """What a store offers besides ``Disks`` if its server may lose a disk's name and marks and keep the
    disk. Those of them that are provably ours are among the leftovers."""

    def doubtful(self) -> Sequence[str]:
        """Those that are not provably ours, by a new look at the storage. They may be anybody's, and are
        never touched."""


@runtime_checkable
class WarmDisks(Protocol):
    """What a store offers besides ``Disks`` if a checkpoint can hold a running machine's memory
    (``Checkpoint.warm``). ``restore`` to a warm one leaves the machine suspended; its next start runs on
    from there. It is for one machine at a time and can't be undone: if it is cut off, it is done
    again."""

    def half_back(self, machine: str) -> str:
        """Name of an interrupted warm restore that must be repeated before the machine can be started;
        "" if none. The restore counts as interrupted until the first start from it succeeded."""


class Power(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"
    SUSPENDED = "suspended"  # off; its memory is kept, and a start runs on from there
    PAUSED = "paused"
    PANICKED = "panicked"  # its guest's kernel gave up; it stands still as it was then, for a look
    UNKNOWN = "unknown"  # an ssh machine nobody has asked, a host out of reach


ON = (Power.RUNNING, Power.PAUSED, Power.PANICKED)
"""Its guest has its disk open."""


@dataclass(frozen=True, slots=True)
class Forward:
    """A forwarded TCP port of user-mode networking: from the host's loopback to the guest."""

    host: int
    guest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A network card. ``mode``: "user" (QEMU's own network, with ``forwards``), "bridge" or "network"
    (``target`` names it)."""

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
    # where ssh answers; None in user mode, or if DHCP gives it
    address: IPv4Address | None = field(default=None, metadata=_DEFINED)
    ssh_port: int = 22
    seed: Path | None = field(default=None, metadata=_DEFINED)  # first boot's ISO image; not its content
    console_log: Path | None = None
    kernel: Path | None = field(default=None, metadata=_DEFINED)  # else the disk's own boot loader
    initrd: Path | None = field(default=None, metadata=_DEFINED)
    cmdline: str = field(default="", metadata=_DEFINED)
    firmware: str = field(default="bios", metadata=_DEFINED)  # or "efi": what starts it from its disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as the hypervisor sees it now. ``owner`` None: it is not ours."""

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
    address: IPv4Address | None = None  # that it was defined with, by its mark
    started: datetime | None = None
    accelerated: bool | None = None  # defined for KVM, or for QEMU's emulation; None: there is no choice
    nic: Nic | None = None  # as it has it now; None: nobody tells
    agent: bool = False  # a program of its guest's listens for its hypervisor, such as qemu-ga(8)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """One of a running guest's, as the guest tells. Bytes; ``left``: for those who aren't root there."""

    place: str
    size: int
    left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """A running machine's memory in bytes, as asked just now."""

    actual: int  # given to the guest
    maximum: int  # it can't be ballooned above
    least: int | None  # nor below: what its guest needs now, and a reserve; None: nobody tells


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptMemory:
    """A running machine's memory and device state, kept beside its disk's checkpoint. Both together are
    a warm checkpoint."""

    checkpoint: str
    created: datetime
    how: str  # "mapped": given back in the same time whatever its size; "read": read back in
    size: int  # the machine's memory; like the next one 0 where that can't be told
    vcpus: int
    used: int  # bytes of the host's file system
    pause: float  # seconds that the machine stood still for it
    frozen: float = 0.0  # seconds that its guest's file systems were frozen, or may have been
    quiesced: bool  # its guest had written out and frozen its file systems
    seal: str  # sha256 of all that it consists of
    trouble: str = ""  # why it can't be used; "": it can


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShare:
    """What a running machine takes of its host's memory, in bytes. ``shared``: pages that it has in
    common with others or with the host's file cache, such as those of a kept memory that it has not
    written to. ``private``: its own."""

    shared: int
    private: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a driver can do, as ``status`` and ``doctor`` show it."""

    driver: str  # "kvm", "qemu" (no working KVM), "xen", "ssh", "fake"
    accelerated: bool  # as a machine is defined now, see Machine
    live_balloon: bool
    warm_checkpoints: bool
    notes: tuple[str, ...] = field(default=())
    why_accelerated: str = ""  # or why not; "": nobody asks
    why_not_warm: str = ""  # where there are no warm checkpoints, and there is more to say of it
    warm: str = ""  # how memory comes back, where that is known: as ``KeptMemory.how``
    warm_together: bool = True  # where there are warm checkpoints: of several machines at one moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """How to reach a machine's console."""

    argv: tuple[str, ...]  # attach interactively; empty where there is none
    log: Path | None


class Hypervisor(Adopting, Protocol):
    """The machines of one host. It is handed its disk store. ``list`` shows this farm's machines
    only."""

    def capabilities(self) -> Capabilities: ...

    def find(self, name: str) -> Machine | None:
        """The machine of that name, ours or not; None if there is none."""

    def list(self) -> Sequence[Machine]: ...

    def define(self, spec: MachineSpec, template: Template) -> Machine:
        """Make the disk, then the definition: the machine exists complete or not at all, and is stopped.
        Errors: NotOurs (the name is somebody else's), Conflict (it is ours already)."""

    def redefine(self, spec: MachineSpec) -> Machine:
        """Change a stopped machine's definition (memory, NIC, ...). The disk stays as it is."""

    def rename(self, name: str, spec: MachineSpec) -> Machine:
        """Make a stopped machine, with its disk, and the memory that is kept for it, into the one of
        ``spec``. Cut off or taken back: as ``Disks.rename``. Errors: WrongState (it runs), Conflict
        (both are there), NotFound (none is), NotOurs, Unsupported."""

    def start(self, name: str, *, cold: bool = False) -> None:
        """Start it; returns once the guest's CPUs run. A suspended machine runs on from where it was;
        with ``cold`` its kept memory is left alone, and it boots. WrongState if it runs already (or
        panicked), or if its memory may not belong to its disk, or can't be used any more."""

    def stop(self, name: str, *, grace: float) -> None:
        """Ask the guest to shut down, wait, then cut power. ``grace``: seconds without a sign of
        progress, see ``host.progress``; where nobody sees progress, seconds in all; 0: cut power at
        once. A stopped machine is left alone. A suspended one loses its memory. A panicked one isn't
        asked. WrongState for one that its hypervisor keeps saved and calls stopped, unless ``grace`` is
        0: then that memory is lost, and a warning says so."""

    def checkpoint(self, name: str, checkpoint: str, *, warm: bool = False) -> Checkpoint:
        """Keep a stopped machine's disk; WrongState while it runs. With ``warm`` keep a running
        machine's disk and memory, and it runs on. Then WrongState if it doesn't run, Unsupported if the
        driver or its host can't."""

    def reset(self, name: str, checkpoint: str) -> None:
        """Cut power and put the disk back. The machine is then stopped, with the old state or the new.
        After a warm checkpoint it is suspended, see ``WarmDisks``."""

    def balloon(self, name: str, target: int, *, timeout: float) -> int:
        """Set the guest's memory to ``target`` bytes, wait until the guest has reached it, and return
        what it reached. ``timeout``: seconds without coming nearer.

        Errors: WrongState (stopped), Unsupported (no balloon driver), UsageError (above the maximum, or
        below what the guest needs), TimedOut (with what it did reach)."""

    def memory(self, name: str) -> MemoryUse:
        """What memory it has, and the bounds for ``balloon``. Changes nothing. WrongState (stopped),
        Unsupported where nobody knows."""

    def console(self, name: str) -> Console: ...

    def pulse(self, name: str) -> Pulse | None:
        """What it has done since its start, for whoever waits for it. Takes a few milliseconds. None if
        it doesn't run, or nobody sees that."""

    def destroy(self, name: str) -> None:
        """Cut power, remove the definition, then the disk. NotOurs if it lacks our mark."""

    def leftovers(self) -> Sequence[Leftover]:
        """Definitions of ours without a disk, disks of ours without a definition, and half-made ones."""

    def discard(self, leftover: Leftover) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class WatchedMachines(Protocol):
    """What a hypervisor offers besides ``Hypervisor`` if it sees into its guests."""

    def notes(self) -> Mapping[str, str]:
        """What an admin should know of running machines, a line each, by name; empty: all is well. One
        question to the hypervisor for all of them. Changes nothing."""


@runtime_checkable
class ToldMachines(Protocol):
    """What a hypervisor offers besides ``Hypervisor`` if guests' agents tell it what nobody sees
    from outside."""

    def file_systems(self, machines: Sequence[str]) -> Mapping[str, Sequence[FileSystem]]:
        """Of running machines with an ``agent``, what may be written to, by machine: of those that tell
        at once. Changes nothing."""


@runtime_checkable
class WarmMachines(Protocol):
    """What a hypervisor offers besides ``Hypervisor`` if it keeps running machines' memory itself,
    beside their disks' checkpoints (other than ``WarmDisks``, where a server keeps both as one).

    A machine of such a hypervisor is suspended if it is stopped and its disk provably is a warm
    checkpoint, unchanged: nothing else says so. Then ``start`` gives it the memory of that moment back.
    A memory is never given to another disk, nor to this one once anything was written to it."""

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        """Keep running machines, disk and memory, all of one moment: all are paused before the first is
        kept, and none runs on before the last is. Then all run on, also after an error, which leaves no
        such checkpoint. WrongState if one doesn't run, Conflict, NoSpace, Unsupported."""

    def settle(self, machine: str) -> str:
        """After a kill: finish or undo a warm checkpoint that was being made, and let a machine that it
        left paused run on. One that was being given its memory back is off again, or runs on where it
        may have begun to; until then it is paused, and ``Machine.started`` is None. What somebody else
        has paused stays so. Returns what was done, in words; "": nothing."""

    def memories(self, machine: str) -> Mapping[str, KeptMemory]:
        """By checkpoint, also where it can't be used, or is gone. A quick look; nothing is read
        whole."""

    def why_unusable(self, machine: str, checkpoint: str) -> str:
        """Why the memory of a checkpoint could not be given back now; "": it could. Its files are read
        whole where they may be others than were kept, and there is to be room for all that it takes. Not
        looked at: whether the disk is that checkpoint. Nothing of the machine is changed."""

    def forget(self, machine: str, name: str) -> None:
        """Remove the memory of a checkpoint, which is a cold one from then on. WrongState while a
        running machine uses it."""


@runtime_checkable
class SharingMachines(Protocol):
    """What a hypervisor offers besides ``Hypervisor`` if it sees whose a machine's memory is."""

    def memory_share(self, name: str) -> MemoryShare | None:
        """A quick look. None if it doesn't run, or nobody can tell."""


def not_ours(what: str, owner: Owner | None, ours: FarmIdentity) -> NotOurs:
    """The error for what has a name that we want, or is meant to be changed by us, and isn't ours."""
    if owner is None:
        return NotOurs(
            f"{what} is not farmhand's: left alone", remedy="give the farm or the VM another name"
        )
    remedy: Remedy = "give one of the two farms another name"
    if owner.farm.name == ours.name:
        remedy = (f"{remedy}; or, if that farm is to end, take its VMs over: ", Call("adopt"))
    return NotOurs(
        f"{what} belongs to farm {owner.farm}; this farm is {ours}: left alone", remedy=remedy
    )


def check_template(label: str, whose: FarmIdentity | None, ours: FarmIdentity) -> None:
    """NotOurs for another farm's template: what is in it, such as its logins, is that farm's choice, and
    so is its end."""
    if whose == ours:
        return
    own = ("this farm's own are made by ", Call("clone-farm"))
    remedy: Remedy = own
    if whose is not None and whose.is_namesake(ours):
        remedy = (*own, "; or, if that farm is to end, take it over: ", Call("adopt"))
    raise NotOurs(
        f"template {label} belongs to farm {whose or 'nobody'}; this farm is {ours}: left alone",
        remedy=remedy,
    )


def label_taken(label: str, whose: FarmIdentity | None, ours: FarmIdentity) -> Conflict:
    """The error for a generation that is in the store already."""
    by = f": it is farm {whose}'s" if whose is not None and whose != ours else ""
    return Conflict(f"template {label} exists already{by}", remedy="seal it as the next generation")


def template_in_use(label: str, users: Iterable[str]) -> WrongState:
    """The error for a template that something grows from. ``users``: names of machines."""
    return WrongState(
        f"template {label} is in use by {', '.join(sorted(set(users)))}",
        remedy=(
            "destroy them; or move them to a newer generation, and remove their checkpoints that grow "
            "from this one, first: ", Call("renew"), ", ", Call("checkpoint-remove"),
        ),
    )  # fmt: skip


def no_warm(machine: str) -> Unsupported:
    """The error of a driver that only has cold checkpoints when it is asked for a warm one."""
    return Unsupported(
        f"{machine}: this driver's checkpoints are cold: a running machine's memory can't be kept",
        remedy="make a cold one, for which it is shut down",
    )


def too_small(machine: str, size: int, template: Template) -> UsageError:
    """The error for a disk that can't hold its template. ``size``: bytes."""
    return UsageError(
        f"{machine}: a disk of {format_size(size)} is smaller than template {template.label}, "
        f"{format_size(template.size)}",
        remedy="leave 'disk' out, or make it at least as large",
    )


def check_removable(disk: Disk, name: str, grown: Sequence[str] = ()) -> None:
    """The errors of ``Disks.remove_checkpoint``. ``grown``: other checkpoints that grow from it."""
    machine, vm = disk.machine, disk.owner.vm
    if name == CLEAN:
        raise UsageError(
            f"{machine}: clean is what its template is: it goes with the disk",
            remedy=("the VM with its disk: ", Call("destroy", vm=vm)),
        )
    known = [kept.name for kept in disk.checkpoints]
    if name not in known:
        raise NotFound(f"{machine} has no checkpoint {name!r}", remedy=f"it has: {', '.join(known)}")
    if disk.base in (name, ""):
        perhaps = "" if disk.base else ", for all that can be told of it,"
        raise WrongState(
            f"{machine}'s checkpoint {name} stays: its disk{perhaps} grows from it",
            remedy=("put it back to another one first, such as: ", Call("reset", vm=vm, to=CLEAN)),
        )
    if grown:
        raise WrongState(
            f"{machine}'s checkpoint {name} stays: {', '.join(grown)} grows from it",
            remedy=("remove that first: ", Call("checkpoint-remove", vm=vm, name=grown[0])),
        )


def check_one_of(machine: str, to: str, *, both: bool) -> None:
    """Conflict of a rename where both are there."""
    if both:
        raise Conflict(
            f"{machine} can't become {to}: that is there, too", remedy="destroy one of them first"
        )


def check_larger(disk: Disk, size: int) -> None:
    """UsageError for a disk that would become smaller. ``size``: bytes."""
    if size < disk.size:
        raise UsageError(
            f"{disk.machine}'s disk has {format_size(disk.size)}; it can't become smaller",
            remedy="leave 'disk' as it is, or destroy the VM and clone it again",
        )


def is_fresh(store: Disks, disk: Disk) -> bool:
    """Whether nothing is lost with that disk: it has no checkpoints, and provably equals its
    template."""
    return not own_checkpoints(disk) and bool(store.pristine(disk.machine, CLEAN))


def own_checkpoints(disk: Disk) -> Sequence[str]:
    """Names of its checkpoints but ``clean``."""
    return [kept.name for kept in disk.checkpoints if kept.name != CLEAN]


def without_machine(disk: Disk) -> str:
    """Why that disk is left over, see ``Leftover.why``."""
    kept = own_checkpoints(disk)
    return "no machine has it" + (f"; with it go its checkpoints {some(kept)}" if kept else "")


def disk_with_data(disk: Disk) -> Conflict:
    """The error for a disk that is in the way of a new machine, and isn't fresh."""
    kept = own_checkpoints(disk)
    beside = f" and checkpoints ({some(kept)})" if kept else ""
    return Conflict(
        f"{disk.machine} has a disk with data ({disk.path}){beside}, and no machine",
        remedy=("copy what you need from it, then remove it: ", Call("destroy", vm=disk.owner.vm)),
    )


def marked_address(text: str) -> IPv4Address | None:
    """The address that a mark tells. None for what is none: anybody may have written there."""
    try:
        return IPv4Address(text)
    except ValueError:
        return None


_FORM = 2
"""Raised where drivers make another machine of the same spec, such as with one more device."""


def spec_hash(spec: MachineSpec) -> str:
    """A short hash of the fields marked as part of the definition. When it changes, the machine must be
    defined anew."""
    import hashlib

    parts = {f.name: getattr(spec, f.name) for f in fields(spec) if "defined" in f.metadata}
    # Whose it is may change without a change of what it is.
    parts |= {"owner": (spec.owner.farm.name, spec.owner.vm), "form": _FORM}
    text = repr(list(parts.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
