"""status: one line a VM, by reading only. A host out of reach spoils only its own lines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hypervisors.api import Disk, FileSystem, Machine, Power
from hypervisors.look import HostLook
from inventory.errors import Call, FarmhandError, Text, joined, some
from provision.clean_state import clean_state
from provision.engine.locks import Holder, lock_of
from provision.engine.record import Record
from provision.kept_values import kept_values
from provision.member import Member, for_declared, is_on, members_of, with_memories
from provision.perhaps_renamed import perhaps_renamed
from provision.site import Site
from provision.template_recipe import generation_notes

if TYPE_CHECKING:
    from provision.guest.remote import Endpoint

_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class VmStatus:
    """``state``: "not made", "running", "stopped", "suspended", "paused", "panicked", "unknown" (an ssh
    host, or a host out of reach), "not ours". ``condition``: "clean" (provably its checkpoint), "dirty"
    (written to, or running), "building" (a cycle holds it), or "" if nobody can tell, or only by
    reading the whole disk (LVM's full copies). Sizes are bytes; None: not known."""

    vm: str
    machine: str
    host: str
    state: str
    memory: int | None = None
    memory_max: int | None = None
    vcpus: int | None = None
    template: str = ""
    checkpoint: str = ""  # that its disk grew from
    checkpoints: tuple[str, ...] = ()
    clean: str = ""  # what its clean is, such as "base@1 with ccache, git"
    warm: tuple[str, ...] = ()  # those of them that hold a running machine's memory, too
    memory_shared: int | None = None  # of the host's memory that it takes: in common with others
    memory_private: int | None = None  # and for it alone; both where the hypervisor tells
    memory_troubles: tuple[str, ...] = ()  # kept memories that can't be used
    condition: str = ""
    disk_used: int | None = None
    ssh: str = ""  # the command
    address: str = ""
    port: int | None = None
    holder: Holder | None = None
    declared: bool = True
    note: str = ""  # what its hypervisor sees that is wrong in its guest
    answers: bool | None = None  # its ssh server greeted in time; None: it wasn't asked
    full: tuple[str, ...] | None = None  # its file systems that are full; None: it didn't tell in time
    kept: tuple[str, ...] = ()  # what it runs on with, though the farm file says otherwise by now
    error: Text = ""

    def as_dict(self) -> dict[str, object]:
        return {
            "vm": self.vm,
            "machine": self.machine,
            "host": self.host,
            "state": self.state,
            "memory": self.memory,
            "memory_max": self.memory_max,
            "vcpus": self.vcpus,
            "template": self.template,
            "checkpoint": self.checkpoint,
            "checkpoints": list(self.checkpoints),
            "clean": self.clean,
            "warm": list(self.warm),
            "memory_shared": self.memory_shared,
            "memory_private": self.memory_private,
            "memory_troubles": list(self.memory_troubles),
            "condition": self.condition,
            "disk_used": self.disk_used,
            "ssh": self.ssh,
            "address": self.address,
            "port": self.port,
            "holder": self.holder.as_dict() if self.holder else None,
            "declared": self.declared,
            "note": self.note,
            "answers": self.answers,
            "full": None if self.full is None else list(self.full),
            "kept": list(self.kept),
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatus:
    """``driver``: as its capabilities call it ("qemu": KVM that doesn't work)."""

    host: str
    driver: str
    notes: tuple[str, ...] = ()
    free: int | None = None  # bytes of its disk store
    warm: str = ""  # see ``hypervisors.api.Capabilities``
    disk_notes: tuple[str, ...] = ()  # what to look at in the store, before it is full
    others: tuple[Text, ...] = ()  # other farms of the same name that have VMs there
    error: str = ""

    def as_dict(self) -> dict[str, object]:
        return {
            "host": self.host,
            "driver": self.driver,
            "notes": list(self.notes),
            "free": self.free,
            "warm": self.warm,
            "disk_notes": list(self.disk_notes),
            "others": list(self.others),
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FarmStatus:
    farm: str
    file: str
    hosts: tuple[HostStatus, ...]
    vms: tuple[VmStatus, ...]
    holders: tuple[Holder, ...] = ()  # of all locks, the VMs' too
    unfinished: tuple[Text, ...] = ()  # what the next changing command will recover
    warnings: tuple[Text, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return {
            "farm": self.farm,
            "file": self.file,
            "hosts": [host.as_dict() for host in self.hosts],
            "vms": [vm.as_dict() for vm in self.vms],
            "holders": [holder.as_dict() for holder in self.holders],
            "unfinished": list(self.unfinished),
            "warnings": list(self.warnings),
        }


def status(site: Site, *, ask: bool = False) -> FarmStatus:
    """How the farm is now. Takes no lock, starts nothing, makes no file. ``ask``: running guests, too,
    whether they answer and what is full in them; see ``provision.guest.asking``."""
    hosts: list[HostStatus] = []
    rows: dict[str, VmStatus] = {}
    endpoints: dict[str, Endpoint] = {}  # of running guests
    told: dict[str, Sequence[FileSystem]] = {}
    warnings: list[Text] = []
    holders = site.locks.held()
    by_lock = {holder.lock: holder for holder in holders}
    for host in site.farm.hosts:
        seen, of_host, notes = _host(site, host, by_lock, endpoints, told)
        hosts.append(seen)
        warnings += (note for note in notes if note not in warnings)
        rows.update({row.vm: row for row in of_host if row.vm not in rows})
    if ask:
        warnings += _ask(rows, endpoints, told)
    undeclared = [vm for vm, row in rows.items() if not row.declared]
    hint = perhaps_renamed([vm for vm, row in rows.items() if row.state == "not made"], undeclared)
    if hint:
        (vm,) = undeclared
        rows[vm] = replace(rows[vm], error=joined((rows[vm].error, hint)))
    ordered = [rows.pop(vm) for vm in site.farm.vms if vm in rows]
    if any(vm.autostart for vm in site.farm.vms.values()):
        from provision.boot_unit import unstarted

        warnings += filter(None, [unstarted(site.farm)])
    unfinished: tuple[Text, ...] = ()
    try:
        unfinished = tuple(map(_left, site.journal.unfinished()))
        warnings += site.journal.troubles()
    except FarmhandError as error:
        warnings.append(error.message)
    return FarmStatus(
        farm=site.farm.farm,
        file=str(site.farm.path),
        hosts=tuple(hosts),
        vms=(*ordered, *rows.values()),
        holders=holders,
        unfinished=unfinished,
        warnings=tuple(warnings),
    )


def _ask(
    rows: dict[str, VmStatus],
    endpoints: Mapping[str, Endpoint],
    told: Mapping[str, Sequence[FileSystem]],
) -> list[Text]:
    """Put into the rows what running guests answer, all asked at once. ``told``: what their hypervisors
    have heard. Returns what is to be said of those that could not tell all in time."""
    if not endpoints:
        return []
    from provision.guest.asking import ask_guests

    answers = dict(zip(endpoints, ask_guests(tuple(endpoints.values()), told=told), strict=True))
    for vm, answer in answers.items():
        rows[vm] = replace(rows[vm], answers=answer.answers, full=answer.full)
    late = [vm for vm, answer in answers.items() if answer.answers and answer.full is None]
    if not late:
        return []
    by_hand = Call("ssh", vm=late[0], command="df -h")
    return [(f"not told in time how full their disks are: {some(late)}; ask one: ", by_hand)]


def _left(record: Record) -> Text:
    text = f"{' '.join((record.verb, *record.vms))} ({record.state})"
    return (f"{text}; it could not so far: ", record.in_its_way) if record.in_its_way else text


def _host(
    site: Site,
    host: str,
    held: Mapping[str, Holder],
    endpoints: dict[str, Endpoint],
    told: dict[str, Sequence[FileSystem]],
) -> tuple[HostStatus, list[VmStatus], Sequence[Text]]:
    """Also what is to be said of its templates. Put in: where running guests are asked, and what they
    told their hypervisor."""
    declared = site.farm.hosts[host]
    members = [member for member in members_of(site) if member.host == host]
    holders = {member.machine: held.get(lock_of(member.vm)) for member in members}
    names = list(holders)
    try:
        seen = site.opened(host).look(names, [name for name in names if not _builds(holders[name])])
        named = (machine.owner.farm for machine in seen.taken if machine.owner)
        others = _others(site, host) if any(map(site.identity.is_namesake, named)) else ()
    except FarmhandError as error:
        line = error.message.splitlines()[0]
        return (
            HostStatus(host=host, driver=declared.driver, error=line),
            [_unreached(member, holders[member.machine], line) for member in members],
            (),
        )
    machines = {machine.name: machine for machine in seen.machines}
    disks = {disk.machine: disk for disk in seen.disks}
    without = [one for one in members if one.machine in machines and one.machine not in disks]
    lost = _lost_disks([(one, machines[one.machine]) for one in without if one.has_store])
    rows: list[VmStatus] = []
    for member in members:
        name = member.machine
        if name in seen.file_systems:
            told[member.vm] = seen.file_systems[name]
        machine, disk, gone = machines.get(name), disks.get(name), lost.get(name, "")
        rows.append(_vm(member, machine, disk, gone, seen, holders[name], endpoints))
    for name, machine in machines.items():
        if name not in holders and machine.owner and machine.owner.vm not in site.farm.vms:
            rows.append(_undeclared(host, machine, disks.get(name)))
    rows = [replace(row, note=seen.notes.get(row.machine, "")) for row in rows]
    return HostStatus(
        host=host, driver=seen.capabilities.driver, notes=tuple(seen.capabilities.notes), free=seen.free,
        warm=seen.capabilities.warm,
        disk_notes=seen.disk_notes, others=others,
    ), rows, generation_notes(site, seen.templates, {vm.vm: vm.template for vm in rows})  # fmt: skip


def _others(site: Site, host: str) -> tuple[Text, ...]:
    from provision.namesakes import told

    return tuple(told(site, host))


def _builds(holder: Holder | None) -> bool:
    return holder is not None and holder.is_build


def _vm(
    member: Member,
    machine: Machine | None,
    disk: Disk | None,
    gone: Text,
    seen: HostLook,
    holder: Holder | None,
    endpoints: dict[str, Endpoint],
) -> VmStatus:
    """``gone``: what is wrong with its disk, if that is; else ""."""
    vm, name, host = member.vm, member.machine, member.host
    trouble = seen.troubles.get(name)
    error: Text = trouble.message.splitlines()[0] if trouble else ""
    kept: tuple[str, ...] = ()
    ssh, address, port = "", "", None
    try:
        if machine is None:
            found = next((other for other in seen.taken if other.name == name), None)
            if found is not None and found.owner != member.owner:
                whose = f"of farm {found.owner.farm}" if found.owner else "without our mark"
                return VmStatus(
                    vm=vm, machine=name, host=host, state="not ours", holder=holder,
                    error=f"a machine {whose} has its name",
                )  # fmt: skip
        if machine is not None:
            member.was_seen(machine)
            kept = kept_values(member, machine)
            endpoint = member.endpoint(runs=is_on(machine), seen=True)
            address, port = endpoint.host, endpoint.port
            ssh = shlex.join(member.ssh_argv(endpoint))
            if machine.power is Power.RUNNING and member.info.guests:
                endpoints[vm] = endpoint
    except FarmhandError as problem:
        error = problem.message.splitlines()[0]
    if machine is not None and machine.power is Power.PANICKED:
        error = (
            "its guest panicked; its last words: ", Call("console", vm=vm, log=True),
            "; put it back: ", Call("reset", vm=vm),
        )  # fmt: skip
    if machine is None:
        return VmStatus(
            vm=vm, machine=name, host=host, state="not made", holder=holder,
            memory_max=member.declared.memory, error=error,
        )  # fmt: skip
    error = gone or error
    condition = "dirty" if disk is not None else ""
    if _builds(holder):
        condition = "building"
    elif disk is not None and not is_on(machine):
        condition = {True: "clean", False: "dirty", None: ""}[seen.pristine.get(name)]
    memories = for_declared(seen.memories.get(name, {}), member.declared)
    share = seen.shares.get(name)
    disk = with_memories(disk, memories) if disk else None
    return VmStatus(
        vm=vm,
        machine=name,
        host=host,
        state=machine.power.value,
        memory=machine.current if is_on(machine) else 0,
        memory_max=machine.memory,
        memory_shared=share.shared if share else None,
        memory_private=share.private if share else None,
        memory_troubles=tuple(
            f"the memory of its checkpoint {kept.checkpoint} can't be used: {kept.trouble}"
            for kept in memories.values()
            if kept.trouble
        ),
        vcpus=machine.vcpus,
        template=disk.template if disk else machine.template,
        checkpoint=disk.base if disk else "",
        checkpoints=tuple(kept.name for kept in disk.checkpoints) if disk else (),
        clean=clean_state(member.site.paths, vm, disk).words if disk else "",
        warm=tuple(kept.name for kept in disk.checkpoints if kept.warm) if disk else (),
        condition=condition,
        disk_used=disk.used if disk else None,
        ssh=ssh,
        address=address,
        port=port,
        holder=holder,
        kept=kept,
        error=error,
    )


def _lost_disks(without: Sequence[tuple[Member, Machine]]) -> Mapping[str, Text]:
    """What there is to say of machines whose disks were not listed, by their names."""
    if not without:
        return {}
    from concurrent.futures import ThreadPoolExecutor

    from provision.missing_disk import missing_disk

    def text(one: tuple[Member, Machine]) -> Text:
        try:
            gone = missing_disk(*one)
        except FarmhandError as problem:
            return problem.message.splitlines()[0]
        return (gone.text, ": ", gone.remedy) if gone else ""

    with ThreadPoolExecutor(_AT_ONCE) as pool:  # each asks the store
        names = (machine.name for _, machine in without)
        return dict(zip(names, pool.map(text, without), strict=True))


def _undeclared(host: str, machine: Machine, disk: Disk | None) -> VmStatus:
    return VmStatus(
        vm=machine.owner.vm if machine.owner else machine.name,
        machine=machine.name,
        host=host,
        state=machine.power.value,
        memory=machine.current if is_on(machine) else 0,
        memory_max=machine.memory,
        vcpus=machine.vcpus,
        template=disk.template if disk else machine.template,
        checkpoint=disk.base if disk else "",
        disk_used=disk.used if disk else None,
        declared=False,
        error="no longer in the farm file: destroy removes it",
    )


def _unreached(member: Member, holder: Holder | None, why: str) -> VmStatus:
    return VmStatus(
        vm=member.vm,
        machine=member.machine,
        host=member.host,
        state="unknown",
        holder=holder,
        error=why,
    )
