"""status: one line a VM, by reading only. A host out of reach spoils only its own lines."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Thread

from hypervisors.api import Disk, Hypervisor, Machine, Power, WatchedDisks, WatchedMachines
from inventory.errors import FarmhandError, Text
from provision.engine.locks import Holder, lock_of
from provision.engine.record import Record
from provision.member import Member, is_on
from provision.missing_disk import missing_disk
from provision.site import Site

_AT_ONCE = 8
_NOTES_PATIENCE = 2.0
"""Seconds for a hypervisor to say what it sees in its guests: milliseconds, unless one hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmStatus:
    """``state``: "not made", "running", "stopped", "suspended", "paused", "unknown" (an ssh host, or a
    host out of reach), "not ours". ``condition``: "clean" (provably its checkpoint), "dirty" (written
    to, or running), "building" (a cycle holds it), or "" if nobody can tell, or only by reading the
    whole disk (LVM's full copies). Sizes are bytes; None: not known."""

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
    warm: tuple[str, ...] = ()  # those of them that hold a running machine's memory, too
    condition: str = ""
    disk_used: int | None = None
    ssh: str = ""  # the command
    address: str = ""
    port: int | None = None
    holder: Holder | None = None
    declared: bool = True
    note: str = ""  # what its hypervisor sees that is wrong in its guest
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
            "warm": list(self.warm),
            "condition": self.condition,
            "disk_used": self.disk_used,
            "ssh": self.ssh,
            "address": self.address,
            "port": self.port,
            "holder": self.holder.as_dict() if self.holder else None,
            "declared": self.declared,
            "note": self.note,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatus:
    """``driver``: as its capabilities call it ("qemu": KVM that doesn't work)."""

    host: str
    driver: str
    notes: tuple[str, ...] = ()
    free: int | None = None  # bytes of its disk store
    disk_notes: tuple[str, ...] = ()  # what to look at in the store, before it is full
    error: str = ""

    def as_dict(self) -> dict[str, object]:
        return {
            "host": self.host,
            "driver": self.driver,
            "notes": list(self.notes),
            "free": self.free,
            "disk_notes": list(self.disk_notes),
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
    warnings: tuple[str, ...] = ()

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


def status(site: Site) -> FarmStatus:
    """How the farm is now. Takes no lock, starts nothing, makes no file."""
    hosts: list[HostStatus] = []
    rows: dict[str, VmStatus] = {}
    warnings: list[str] = []
    for host in site.farm.hosts:
        seen, of_host = _host(site, host)
        hosts.append(seen)
        rows.update({row.vm: row for row in of_host if row.vm not in rows})
    ordered = [rows.pop(vm) for vm in site.farm.vms if vm in rows]
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
        holders=site.locks.held(),
        unfinished=unfinished,
        warnings=tuple(warnings),
    )


def _left(record: Record) -> Text:
    text = f"{record.verb} {' '.join(record.vms)}".strip()
    return (f"{text}; it could not so far: ", record.in_its_way) if record.in_its_way else text


def _host(site: Site, host: str) -> tuple[HostStatus, list[VmStatus]]:
    declared = site.farm.hosts[host]
    members = [member for member in site.members() if member.host == host]
    try:
        driver = site.hypervisor(host, look=True)
        can = driver.capabilities()
        machines = {machine.name: machine for machine in driver.list()}
        notes = _noted(driver) if any(map(is_on, machines.values())) else dict
        disks: dict[str, Disk] = {}
        free = None
        disk_notes: tuple[str, ...] = ()
        if site.has_disks(host):
            store = site.disks(host)
            disks = {disk.machine: disk for disk in store.list()}
            free = store.capacity().free
            if isinstance(store, WatchedDisks):
                disk_notes = tuple(store.notes())
    except FarmhandError as error:
        line = error.message.splitlines()[0]
        return (
            HostStatus(host=host, driver=declared.driver, error=line),
            [_unreached(member, line) for member in members],
        )
    ours = [machines.pop(member.machine, None) for member in members]
    of_ours = [disks.get(member.machine) for member in members]
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # each may ask its store whether the disk is clean
        rows = list(pool.map(_vm, members, ours, of_ours))
    for machine in machines.values():
        if machine.owner is not None and machine.owner.vm not in site.farm.vms:
            rows.append(_undeclared(host, machine, disks.get(machine.name)))
    found = notes()
    rows = [replace(row, note=found.get(row.machine, "")) for row in rows]
    return HostStatus(
        host=host, driver=can.driver, notes=can.notes, free=free, disk_notes=disk_notes
    ), rows


def _noted(driver: Hypervisor) -> Callable[[], Mapping[str, str]]:
    """Notes on running machines, asked for while the rest is looked at; None if they don't come in time:
    one guest whose hypervisor hangs must not hide all the rest."""
    if not isinstance(driver, WatchedMachines):
        return dict
    answer: Future[Mapping[str, str]] = Future()

    def ask() -> None:
        try:
            answer.set_result(driver.notes())
        except FarmhandError:
            answer.set_result({})

    def get() -> Mapping[str, str]:
        try:
            return answer.result(_NOTES_PATIENCE)
        except TimeoutError:
            return {}

    Thread(target=ask, daemon=True).start()
    return get


def _vm(member: Member, machine: Machine | None, disk: Disk | None) -> VmStatus:
    site, vm, name, host = member.site, member.vm, member.machine, member.host
    error: Text = ""
    ssh, address, port = "", "", None
    holder = site.locks.holder(lock_of(vm))
    try:
        if machine is None:
            found = site.hypervisor(host, look=True).find(name)
            if found is not None and found.owner is None:
                return VmStatus(
                    vm=vm, machine=name, host=host, state="not ours", holder=holder,
                    error="a machine without our mark has its name",
                )  # fmt: skip
        if machine is not None:
            member.was_seen(machine)
            endpoint = member.endpoint(runs=is_on(machine))
            address, port = endpoint.host, endpoint.port
            ssh = shlex.join(member.ssh_argv(endpoint))
    except FarmhandError as problem:
        error = problem.message.splitlines()[0]
    if machine is None:
        return VmStatus(
            vm=vm, machine=name, host=host, state="not made", holder=holder,
            memory_max=member.declared.memory, error=error,
        )  # fmt: skip
    if disk is None:
        try:
            gone = missing_disk(member, machine)
            error = (gone.text, ": ", gone.remedy) if gone else error
        except FarmhandError as problem:
            error = problem.message.splitlines()[0]
    condition = "dirty" if disk is not None else ""
    if holder is not None and holder.doing.partition(" ")[0] == "cycle":
        condition = "building"
    elif disk is not None and not is_on(machine):
        try:
            pristine = member.store.pristine(name, disk.base, quick=True)
            condition = {True: "clean", False: "dirty", None: ""}[pristine]
        except FarmhandError as problem:
            condition, error = "", problem.message.splitlines()[0]
    return VmStatus(
        vm=vm,
        machine=name,
        host=host,
        state=machine.power.value,
        memory=machine.current if machine.power is Power.RUNNING else 0,
        memory_max=machine.memory,
        vcpus=machine.vcpus,
        template=machine.template,
        checkpoint=disk.base if disk else "",
        checkpoints=tuple(kept.name for kept in disk.checkpoints) if disk else (),
        warm=tuple(kept.name for kept in disk.checkpoints if kept.warm) if disk else (),
        condition=condition,
        disk_used=disk.used if disk else None,
        ssh=ssh,
        address=address,
        port=port,
        holder=holder,
        error=error,
    )


def _undeclared(host: str, machine: Machine, disk: Disk | None) -> VmStatus:
    return VmStatus(
        vm=machine.owner.vm if machine.owner else machine.name,
        machine=machine.name,
        host=host,
        state=machine.power.value,
        memory=machine.current if machine.power is Power.RUNNING else 0,
        memory_max=machine.memory,
        vcpus=machine.vcpus,
        template=machine.template,
        checkpoint=disk.base if disk else "",
        disk_used=disk.used if disk else None,
        declared=False,
        error="no longer in the farm file: destroy removes it",
    )


def _unreached(member: Member, why: str) -> VmStatus:
    return VmStatus(
        vm=member.vm,
        machine=member.machine,
        host=member.host,
        state="unknown",
        holder=member.site.locks.holder(lock_of(member.vm)),
        error=why,
    )
