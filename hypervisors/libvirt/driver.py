"""Machines through libvirt: the private daemon's, the session's or the system's. Which hypervisor that
is, and what differs with it, is a ``hypervisors.libvirt.domain_types.DomainType``.

Every method opens with a look-up. If that finds the connection dead (the daemon was killed or started
anew) it connects again, once: a look-up changes nothing. A connection lost later in a method is an
error, and the method may be called again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from host.files import make_directory, sync
from host.progress import Progress, Pulse
from host.run import Runner
from hypervisors import console_log
from hypervisors.api import (
    Callbacks,
    Capabilities,
    Checkpoint,
    Console,
    DeviceDisks,
    Disk,
    Disks,
    FileSystem,
    Foreign,
    KeptMemory,
    Leftover,
    LiveDisks,
    Machine,
    MachineSpec,
    MemoryShare,
    MemoryUse,
    Owner,
    Power,
    StepFn,
    Template,
    WarnFn,
    check_one_of,
    disk_with_data,
    is_fresh,
    no_step,
    no_warm,
    no_warning,
    not_ours,
    without_machine,
)
from hypervisors.libvirt.connecting import connect
from hypervisors.libvirt.domain_state import (
    ACTIVE,
    INACTIVE,
    as_machine,
    has_panicked,
    note_start,
    opened_by,
    pulse_of,
)
from hypervisors.libvirt.domain_types import DomainType
from hypervisors.libvirt.domain_xml import (
    MARK_KEY,
    MARK_URI,
    DomainDefinition,
    mark_of,
    marked_as,
    read_domain,
    with_disk,
)
from hypervisors.libvirt.errors import connection_lost, need_binding, translate, unreachable
from hypervisors.libvirt.qemu_process import memory_of
from hypervisors.libvirt.warm.place import MemoryPlace
from hypervisors.marks import DamagedMarks
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, Conflict, NotFound, WrongState

if TYPE_CHECKING:
    import libvirt

    from hypervisors.libvirt.warm.machines import WarmDomains

_T = TypeVar("_T")
_CONNECT_PATIENCE = 10.0  # seconds
_POLL = 0.005  # seconds between looks at a machine that is about to end: a look takes 0.2 ms
_KILL_PATIENCE = 2.0  # libvirt notes a killed QEMU within milliseconds; else it is asked to destroy
_SECURE = 1  # libvirt.VIR_DOMAIN_XML_SECURE
_PRESS_AGAIN = 2.0  # a guest early in its boot misses the power button


class LibvirtHypervisor:
    """Implements ``hypervisors.api.Hypervisor``. One connection, used by any number of threads."""

    def __init__(
        self,
        uri: str | Callable[[], str],
        farm: FarmIdentity,
        disks: Disks,
        runner: Runner,
        *,
        step: StepFn = no_step,
        kind: DomainType,
        working: Callable[[str], None] = no_step,
        warn: WarnFn = no_warning,
        memory: MemoryPlace | None = None,
    ) -> None:
        """``uri``: or what gives it at each connecting (``PrivateLibvirt.uri``, which brings a dead
        daemon back). ``working``: told what is waited for. ``memory``: where running machines' memory
        is kept; None: nowhere. Connects on first use."""
        self._uri = uri
        self._farm = farm
        self._disks = disks
        self._runner = runner
        self._step = step
        self._kind = kind
        self._working = working
        self._warn = warn
        self._damaged = DamagedMarks(warn)
        self._memory = memory
        self._maps = kind.maps_memory and isinstance(disks, LiveDisks)
        need_binding()
        self._connection: libvirt.virConnect | None = None
        self._connecting = threading.Lock()
        # One look-up at a time: with several, libvirt's client was seen to crash where they met the end
        # of their connection at one moment.
        self._looking = threading.Lock()

    # -- looking ----------------------------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        """See ``Hypervisor.capabilities``. Known without asking, but for how memory comes back: that is
        told by one that is connected."""
        able = self._kind.capabilities()
        if self._memory is None:
            return able
        how = "read"
        if self._maps:
            how = "" if self._connection is None else "read" if self._guards_files else "mapped"
        return replace(able, warm_checkpoints=True, warm=how)

    @cached_property
    def _guards_files(self) -> bool:
        """Whether QEMU is kept from memory of ours; asked once."""
        from hypervisors.libvirt.warm.definition import file_guard

        with self._translated("look at what the host can do"):
            return bool(file_guard(self._reading(lambda c: c.getCapabilities())))

    def find(self, name: str) -> Machine | None:
        with self._translated(f"look up {name}"):
            domain = self._look_up(name)
            return self._as_machine(domain) if domain else None

    def list(self) -> Sequence[Machine]:
        with self._translated("list the machines"):
            domains = self._reading(lambda c: c.listAllDomains(0))
            machines = [self._as_machine(domain) for domain in domains]
        ours = (m for m in machines if m and m.owner and m.owner.farm == self._farm)
        return sorted(ours, key=lambda m: m.name)

    def _as_machine(self, domain: libvirt.virDomain) -> Machine | None:
        """None if it has gone since it was listed."""
        seen = as_machine(domain, self._damaged)
        if seen is None or seen.power is not Power.STOPPED:
            return seen
        if seen.owner is None or seen.owner.farm != self._farm:
            return seen
        warm = self._warm_of(seen.name)
        if warm is None or not warm.has_any(seen.name):
            return seen
        disk = self._disks.find(seen.name)
        if disk is None or warm.suspended(disk) is None:
            return seen
        return replace(seen, power=Power.SUSPENDED)

    @cached_property
    def _warm(self) -> WarmDomains | None:
        """Imported late: most commands never look at any memory."""
        if self._memory is None:
            return None
        from hypervisors.libvirt.warm.images import MemoryImages
        from hypervisors.libvirt.warm.machines import WarmDomains

        told = Callbacks(step=self._step, working=self._working, warn=self._warn)
        images = MemoryImages(self._memory)
        return WarmDomains(
            images, self._disks, self._runner, self._where, told,
            maps=self._maps, saves_paused=self._kind.saves_paused,
        )  # fmt: skip

    def _warm_of(self, machine: str) -> WarmDomains | None:
        """None also where nothing of that machine's memory is kept."""
        return self._warm if self._memory and self._memory.may_have(machine) else None

    def others(self) -> Sequence[Foreign]:
        with self._translated("list the machines"):
            domains = self._reading(lambda c: c.listAllDomains(0))
            machines = [as_machine(domain, self._damaged) for domain in domains]
        found = {other.machine: other for other in self._disks.others()}
        for machine in machines:
            if machine and machine.owner and machine.owner.farm.is_namesake(self._farm):
                found[machine.name] = Foreign(machine.name, machine.owner)
        return [found[name] for name in sorted(found)]

    def console(self, name: str) -> Console:
        with self._translated(f"look up {name}"):
            domain = self._ours(name)
            seen = read_domain(domain.XMLDesc(0))
        # --force: a viewer that lost its terminal would lock the next one out
        argv = ("virsh", "-c", self._where(), "console", "--force", name)
        return Console(argv=argv, log=self._kind.console_log(name, seen))

    def pulse(self, name: str) -> Pulse | None:
        with self._translated(f"look at {name}"):
            domain = self._ours(name)
            return pulse_of(domain, self._kind.console_log(name, read_domain(domain.XMLDesc(0))))

    def notes(self) -> Mapping[str, str]:
        """See ``WatchedMachines.notes``. Machines that aren't ours are among them."""
        with self._translated("look at the machines"):
            return self._reading(self._kind.notes)

    def file_systems(self, machines: Sequence[str]) -> Mapping[str, Sequence[FileSystem]]:
        """See ``ToldMachines.file_systems``."""
        from hypervisors.libvirt.guest_agent import file_systems

        with self._translated("ask the machines' agents"):
            domains = self._reading(lambda c: c.listAllDomains(ACTIVE))
            return file_systems([domain for domain in domains if domain.name() in machines])

    # -- making and unmaking ----------------------------------------------------------------------

    def define(self, spec: MachineSpec, template: Template) -> Machine:
        doing = f"define {spec.name}"
        with self._translated(doing):
            if existing := self._look_up(spec.name):
                owner = read_domain(existing.XMLDesc(0)).owner
                if owner is None or owner.farm != self._farm:
                    raise not_ours(spec.name, owner, self._farm)
                raise Conflict(f"{spec.name} exists already", remedy="destroy it first")
            disk = self._disk_for(spec, template)
            try:
                self._step(doing)
                self._define(spec, disk, template.label)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one that matters
                    if self._look_up(spec.name) is None:
                        self._disks.destroy(spec.name)
                raise
            machine = self.find(spec.name)
        assert machine
        return machine

    def redefine(self, spec: MachineSpec) -> Machine:
        doing = f"redefine {spec.name}"
        with self._translated(doing):
            domain = self._ours(spec.name)
            if domain.isActive():
                raise WrongState(f"{spec.name} is running", remedy=Call("stop", vm=spec.owner.vm))
            seen, disk = read_domain(domain.XMLDesc(0)), self._disks.find(spec.name)
            if disk is None:
                raise NotFound(f"{spec.name} has no disk", remedy=(Call("clone-farm"), " makes it"))
            self._step(doing)
            self._define(spec, disk, disk.template, uuid=seen.uuid)
            machine = self.find(spec.name)
        assert machine
        return machine

    def rename(self, name: str, spec: MachineSpec) -> Machine:
        """See ``Hypervisor.rename``. Its memory comes first, then its disk, then the definition: where
        libvirt can't rename that (libxl), it is made anew. Its uuid stays. Unsupported with memory that
        libvirt itself saved: it is given back under the same name alone."""
        doing = f"rename {name} to {spec.name}"
        with self._translated(doing):
            there = [domain for one in (name, spec.name) if (domain := self._look_up(one))]
            check_one_of(name, spec.name, both=len(there) > 1)
            for domain in there:
                self._check_renamed(domain, name, spec.name)
            if self._warm:
                self._warm.rename(name, spec.name, spec.owner)
            disk = self._disks.rename(name, spec.name, spec.owner)
            self._step(doing)
            uuid = there[0].UUIDString() if there else ""
            if there and there[0].name() != spec.name:
                self._rename(there[0], spec.name)
            self._define(spec, disk, disk.template, uuid=uuid)
            machine = self.find(spec.name)
        assert machine
        return machine

    def _check_renamed(self, domain: libvirt.virDomain, *names: str) -> None:
        """The mark may speak of its other name: it is written last."""
        name, mark = domain.name(), marked_as(domain.XMLDesc(0))
        if mark is None or mark[0] not in names or mark[1].farm != self._farm:
            raise not_ours(name, mark[1] if mark else None, self._farm)
        if domain.isActive():
            raise WrongState(f"{name} is running", remedy="stop it first")
        _refuse_saved(domain)

    def _rename(self, domain: libvirt.virDomain, name: str) -> None:
        import libvirt

        try:
            domain.rename(name)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise
            self._undefine(domain)

    def destroy(self, name: str) -> None:
        with self._translated(f"destroy {name}"):
            if domain := self._look_up(name):
                seen = self._check(domain, name)
                self._cut_power(domain, name, seen)
                self._step(f"remove the definition of {name}")
                self._undefine(domain)
        if disk := self._disks.find(name):
            self._check_disk(disk)
            self._disks.destroy(name)
        if warm := self._warm_of(name):
            warm.forget(name)

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        import libvirt

        self._disks.adopt(machine, whose)
        if warm := self._warm_of(machine):
            warm.adopt(machine, whose)
        with self._translated(f"adopt {machine}"):
            domain = self._look_up(machine)
            xml = domain.XMLDesc(0) if domain else ""
            owner = read_domain(xml).owner if xml else None
            if domain is None or owner is None or owner.farm != whose:
                return
            self._step(f"mark {machine} as ours")
            where = libvirt.VIR_DOMAIN_AFFECT_CONFIG
            if domain.isActive():
                where |= libvirt.VIR_DOMAIN_AFFECT_LIVE
            mark = mark_of(xml, Owner(self._farm, owner.vm))
            domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, mark, MARK_KEY, MARK_URI, where)

    # -- power ------------------------------------------------------------------------------------

    def start(self, name: str, *, cold: bool = False) -> None:
        import libvirt

        doing = f"start {name}"
        with self._translated(doing):
            domain = self._ours(name)
            if domain.isActive():
                if has_panicked(domain):
                    raise WrongState(f"the guest of {name} panicked", remedy="stop it first")
                raise WrongState(
                    f"{name} is running already", remedy="stop it first, or use it as it is"
                )
            seen = read_domain(domain.XMLDesc(0))
            if isinstance(self._disks, LiveDisks):
                self._disks.settle_live(name, None)
            ready = self._disks.ready if isinstance(self._disks, DeviceDisks) else self._disks.find
            disk = ready(name)
            if disk is None:
                raise NotFound(f"{name} has no disk", remedy=("destroy it, then ", Call("clone-farm")))
            warm = None if cold else self._warm_of(name)
            image = warm.suspended(disk, sure=True) if warm else None
            self._step(doing)
            if seen.disk != disk.path:  # the store put another in its place: it knows which
                domain = self._connect().defineXML(with_disk(domain.XMLDesc(INACTIVE), disk.path))
            if seen.console_log:
                console_log.begin(seen.console_log)
            try:
                if warm and image:
                    definition = domain.XMLDesc(INACTIVE | _SECURE)
                    domain = warm.run_on(image, definition, disk, self._connect())
                else:
                    self._create(domain, seen)
            except libvirt.libvirtError as error:
                if not _runs_by_now(domain, disk, error):
                    raise
            with contextlib.suppress(libvirt.libvirtError):  # a guest that ended at once
                note_start(domain)

    def stop(self, name: str, *, grace: float) -> None:
        """See ``Hypervisor.stop``; of what libvirt itself saved, ``_is_saved``."""
        with self._translated(f"stop {name}"):
            domain = self._ours(name)
            seen = read_domain(domain.XMLDesc(0))
            if grace > 0:
                _refuse_saved(domain)
            if grace > 0 and domain.isActive() and not has_panicked(domain):  # such a one hears nothing
                self._step(f"ask {name} to shut down")
                if self._shut_down(domain, name, grace):
                    _sync(seen.disk)  # its writes were not synced one by one, see domain_xml
                    return
            self._cut_power(domain, name, seen)
            self._forget_saved(domain, name)

    def checkpoint(self, name: str, checkpoint: str, *, warm: bool = False) -> Checkpoint:
        with self._translated(f"checkpoint {name}"):
            if warm:
                return self.checkpoint_all([name], checkpoint)[name]
            domain = self._ours(name)
            if domain.isActive():
                raise WrongState(f"{name} is running: its checkpoints are cold", remedy="stop it first")
            _refuse_saved(domain)
        return self._disks.checkpoint(name, checkpoint)

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        """See ``WarmMachines.checkpoint_all``."""
        if self._warm is None:
            raise no_warm(machines[0])
        with self._translated(f"checkpoint {', '.join(machines)}"):
            domains = [self._ours(machine) for machine in machines]
            for machine, domain in zip(machines, domains, strict=True):
                if (
                    seen := as_machine(domain, self._damaged)
                ) is None or seen.power is not Power.RUNNING:
                    state = seen.power if seen else "gone"
                    raise WrongState(
                        f"{machine} is {state}: a warm checkpoint is of a running machine",
                        remedy="start it first, or make a cold one",
                    )
            return self._warm.checkpoint_all(domains, name, self._connect())

    def settle(self, machine: str) -> str:
        """See ``WarmMachines.settle``."""
        if self._warm is None:
            return ""
        with self._translated(f"let {machine} run on"):
            domain = self._look_up(machine)
            if domain:
                self._check(domain, machine)
            return self._warm.settle(machine, domain)

    def memories(self, machine: str) -> Mapping[str, KeptMemory]:
        """See ``WarmMachines.memories``."""
        warm = self._warm_of(machine)
        if warm is None:
            return {}
        with self._translated(f"look at the memory of {machine}"):
            return warm.memories(machine, self._connect)

    def why_unusable(self, machine: str, checkpoint: str) -> str:
        """See ``WarmMachines.why_unusable``."""
        warm = self._warm_of(machine)
        if warm is None:
            return "it is gone"
        with self._translated(f"look at the memory of {machine}"):
            return warm.why_unusable(machine, checkpoint, self._connect())

    def memory_share(self, name: str) -> MemoryShare | None:
        """See ``SharingMachines.memory_share``. Of machines with kept memory only: others share none."""
        warm = self._warm_of(name)
        if warm is None or not warm.has_any(name):
            return None
        with self._translated(f"look at the memory of {name}"):
            domain = self._look_up(name)
            found = memory_of(name, domain.UUIDString()) if domain and domain.isActive() else None
        return MemoryShare(shared=found[0], private=found[1]) if found else None

    def forget(self, machine: str, name: str) -> None:
        """See ``WarmMachines.forget``."""
        if self._warm is None:
            return
        with self._translated(f"forget the memory of {machine}"):
            domain = self._look_up(machine)
            if domain and domain.isActive() and self._warm.in_use(machine, name, domain):
                raise WrongState(
                    f"{machine} runs on from the memory of its checkpoint {name}", remedy="stop it first"
                )
            self._step(f"remove the memory {name} of {machine}")
            self._warm.forget(machine, name)

    def reset(self, name: str, checkpoint: str) -> None:
        with self._translated(f"reset {name}"):
            domain = self._ours(name)
            disk = self._disks.find(name)
            if disk is None:
                raise NotFound(f"{name} has no disk", remedy=("destroy it, then ", Call("clone-farm")))
            self._check_disk(disk)
            known = [c.name for c in disk.checkpoints]
            if checkpoint not in known:  # before its power is cut
                raise NotFound(
                    f"{name} has no checkpoint {checkpoint}", remedy=f"it has: {', '.join(known)}"
                )
            self._cut_power(domain, name, read_domain(domain.XMLDesc(0)))
            self._forget_saved(domain, name)
        self._disks.restore(name, checkpoint)

    def balloon(self, name: str, target: int, *, timeout: float) -> int:
        with self._translated(f"balloon {name}"):
            return self._kind.set_memory(self._ours(name), name, target, timeout, self._step)

    def memory(self, name: str) -> MemoryUse:
        with self._translated(f"ask for the memory of {name}"):
            return self._kind.memory(self._ours(name), name)

    # -- leftovers --------------------------------------------------------------------------------

    def leftovers(self) -> Sequence[Leftover]:
        """See ``Hypervisor.leftovers``. The caller holds the farm's locks, for what another process is
        defining right now has a disk and no machine yet."""
        machines = {m.name: m for m in self.list()}
        disks = {d.machine: d for d in self._disks.list()}
        found = [*self._disks.leftovers()]
        if self._warm:
            found += self._warm.leftovers(self._defined())
        now = datetime.now(UTC)
        used = self._opened()
        for name in sorted(machines.keys() - disks.keys()):
            machine = machines[name]
            found.append(
                Leftover(
                    kind="domain", ref=name, owner=machine.owner, created=machine.started or now,
                    bytes=0, why="its disk is gone",
                )
            )  # fmt: skip
        for name in sorted(disks.keys() - machines.keys()):
            disk = disks[name]
            if disk.path.resolve() in used:  # by a machine that somebody renamed, or made by hand
                continue
            found.append(
                Leftover(
                    kind="disk", ref=name, owner=disk.owner, created=disk.checkpoints[0].created,
                    bytes=disk.used, why=without_machine(disk),
                )
            )  # fmt: skip
        return found

    def discard(self, leftover: Leftover) -> None:
        if self._warm and leftover.kind == "memory":
            self._step(f"remove the leftover {leftover.ref}")
            self._warm.discard(leftover, self._defined())
        elif leftover.kind not in {"domain", "disk"} or "/" in leftover.ref:
            self._disks.discard(leftover)
        else:  # looked up again first
            machine, disk = self.find(leftover.ref), self._disks.find(leftover.ref)
            if (machine is None) == (disk is None):
                return
            owner = machine.owner if machine else disk.owner if disk else None
            if owner is None or owner.farm != self._farm:
                return
            if disk is None or disk.path.resolve() not in self._opened():
                self.destroy(leftover.ref)

    def _defined(self) -> set[str]:
        """The names of all machines, whoever's they are."""
        with self._translated("list the machines"):
            return {domain.name() for domain in self._reading(lambda c: c.listAllDomains(0))}

    def _opened(self) -> set[Path]:
        """The disks of all machines, whoever's they are, links followed."""
        with self._translated("list the machines"):
            return {path for d in self._reading(lambda c: c.listAllDomains(0)) for path in opened_by(d)}

    def close(self) -> None:
        self._drop()

    # -- libvirt ----------------------------------------------------------------------------------

    def _where(self) -> str:
        return self._uri if isinstance(self._uri, str) else self._uri()

    def _connect(self) -> libvirt.virConnect:
        with self._connecting:
            if self._connection is None:
                import libvirt

                end = time.monotonic() + _CONNECT_PATIENCE
                while self._connection is None:
                    where = self._where()
                    try:
                        self._connection = connect(where)
                    except libvirt.libvirtError as error:
                        # A daemon that is just dying still takes connections, drops them, then refuses
                        # them. ``_where`` starts ours once it is gone; another's we wait for no longer.
                        dying = connection_lost(error) or (callable(self._uri) and unreachable(error))
                        if not dying or time.monotonic() > end:
                            raise translate(error, f"connect to {where}") from error
                        time.sleep(0.05)
            return self._connection

    def _drop(self, lost: libvirt.virConnect | None = None) -> None:
        """Let go of the connection, unless another thread has made a new one since this was ``lost``. It
        isn't closed, which would free it under others' calls: it ends with the last of its users."""
        with self._connecting:
            if lost is None or self._connection is lost:
                self._connection = None

    def _reading(self, read: Callable[[libvirt.virConnect], _T]) -> _T:
        """Run a look-up. On a dead connection it is run once more, on a new one."""
        import libvirt

        connection = self._connect()
        try:
            with self._looking:
                return read(connection)
        except libvirt.libvirtError as error:
            if not connection_lost(error):
                raise
        self._drop(connection)
        again = self._connect()
        with self._looking:
            return read(again)

    def _look_up(self, name: str) -> libvirt.virDomain | None:
        import libvirt

        try:
            return self._reading(lambda c: c.lookupByName(name))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        import libvirt

        try:
            yield
        except libvirt.libvirtError as error:
            if connection_lost(error):
                self._drop()
            raise translate(error, doing) from error

    def _ours(self, name: str) -> libvirt.virDomain:
        domain = self._look_up(name)
        if domain is None:
            raise NotFound(f"there is no machine {name}", remedy=(Call("clone-farm"), " makes it"))
        self._check(domain, name)
        return domain

    def _check(self, domain: libvirt.virDomain, name: str) -> DomainDefinition:
        seen = read_domain(domain.XMLDesc(0))
        if seen.owner is None or seen.owner.farm != self._farm:
            raise not_ours(name, seen.owner, self._farm)
        return seen

    def _check_disk(self, disk: Disk) -> None:
        if disk.owner.farm != self._farm:
            raise not_ours(f"the disk of {disk.machine}", disk.owner, self._farm)

    def _disk_for(self, spec: MachineSpec, template: Template) -> Disk:
        """The machine's disk: a new one, or the untouched one that a killed ``define`` left."""
        disk = self._disks.find(spec.name)
        if disk is not None:
            self._check_disk(disk)
            if not is_fresh(self._disks, disk):
                raise disk_with_data(disk)
            if (disk.template, disk.size, disk.owner) == (template.label, spec.disk_size, spec.owner):
                return disk
            self._disks.destroy(spec.name)
        return self._disks.clone(template, spec.name, spec.owner, spec.disk_size)

    def _define(self, spec: MachineSpec, disk: Disk, template: str, *, uuid: str = "") -> None:
        if spec.console_log:
            make_directory(spec.console_log.parent, mode=0o711)
        connection = self._connect()
        system = urlsplit(connection.getURI()).path == "/system"
        connection.defineXML(self._kind.xml(spec, disk, template, system=system, uuid=uuid))

    def _undefine(self, domain: libvirt.virDomain) -> None:
        domain.undefineFlags(self._kind.undefine)

    def _create(self, domain: libvirt.virDomain, seen: DomainDefinition) -> None:
        import libvirt

        try:
            domain.create()
        except libvirt.libvirtError as error:
            if known := self._kind.why_no_start(domain, seen):
                raise known from error
            raise

    def _shut_down(self, domain: libvirt.virDomain, name: str, grace: float) -> bool:
        import libvirt

        progress, again = Progress(lambda: self.pulse(name), grace), 0.0
        while progress.left() > 0:
            if not domain.isActive():
                return True
            if (now := time.monotonic()) >= again:
                again = now + _PRESS_AGAIN
                with contextlib.suppress(libvirt.libvirtError):  # it went down meanwhile
                    domain.shutdownFlags(self._kind.shutdown)
                self._working(f"waiting for {name} to shut down; {progress}")
            progress.look()
            time.sleep(0.05)
        return not domain.isActive()

    def _forget_saved(self, domain: libvirt.virDomain, name: str) -> None:
        if _is_saved(domain):
            self._step(f"forget the saved memory of {name}")
            self._warn(f"{name} was saved (virsh managedsave): that memory is given up with its disk")
            domain.managedSaveRemove(0)

    def _cut_power(self, domain: libvirt.virDomain, name: str, seen: DomainDefinition) -> None:
        """Cut the power, also of a machine that doesn't run yet: libvirtd goes on with the start that a
        killed command asked for, and while libxl makes a domain it isn't active. libvirt's destroy waits
        for that."""
        import libvirt

        if domain.isActive():
            self._step(f"cut the power of {name}")
            if self._kind.cut_power(name, seen.uuid):
                limit = time.monotonic() + _KILL_PATIENCE
                while time.monotonic() < limit:
                    if not domain.isActive():
                        return
                    time.sleep(_POLL)
        try:
            domain.destroy()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:  # it just ended
                raise


def _is_saved(domain: libvirt.virDomain) -> bool:
    """Whether libvirt itself keeps its memory, for an admin or as its machine went down
    (libvirt-guests). Its disk is as of a running machine, and its next start gives it that memory,
    whatever its disk is by then."""
    return not domain.isActive() and bool(domain.hasManagedSaveImage(0))


def _refuse_saved(domain: libvirt.virDomain) -> None:
    if _is_saved(domain):
        raise WrongState(f"{domain.name()} is saved, not stopped", remedy="start it, then stop it")


def _runs_by_now(domain: libvirt.virDomain, disk: Disk, error: libvirt.libvirtError) -> bool:
    """Whether libvirtd was starting it already, from this disk, for a command that was killed."""
    import libvirt

    if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or not domain.isActive():
        return False
    return read_domain(domain.XMLDesc(0)).disk == disk.path


def _sync(disk: Path | None) -> None:
    if disk is None:
        return
    with contextlib.suppress(OSError):  # another host's
        sync(disk)
