"""What is ours and belongs to nothing any more: whose it was, how old, how large, how to remove it."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from host.files import remove
from hypervisors.api import Leftover, Owner
from inventory.errors import FarmhandError, Interrupted
from inventory.sizes import format_duration, format_size
from provision.allocate import Allocation
from provision.member import Member
from provision.missing_disk import left_to_people
from provision.site import Site

_SEED = re.compile(r"\.?([a-z0-9-]+)\.(?:iso|sum)(?:\.\d+)*(?:\.iso)?")
_CONSOLE = re.compile(r"\.?([a-z0-9-]+)\.log(?:\.\d+)*")
_HOST_KEY = re.compile(r"\.?([a-z0-9-]+)(?:\.(?:pub|known|learnt))?(?:\.\d+)*")
_YOUNG = timedelta(minutes=10)
"""A temporary file beside a living VM's own may be somebody's at work: left alone for so long."""


@dataclass(frozen=True, slots=True)
class Found:
    what: Leftover
    discard: Callable[[], object]
    may_be_missed: bool = False
    """Whether a VM that the farm file has may have nothing but this: only its destroy takes it."""

    def text(self, now: datetime) -> str:
        age = format_duration(max((now - self.what.created).total_seconds(), 0))
        owner = self.what.owner
        whose = f"of {owner.farm.name}/{owner.vm}" if owner else "of no VM yet"
        return (
            f"remove {self.what.kind} {self.what.ref} ({whose}; {self.what.why}; {age} old, "
            f"{format_size(self.what.bytes)})"
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is of a farm on all its hosts and in its files, by one look at each."""

    vms: tuple[str, ...]
    """Declared or not, that have a machine or a disk where we make them."""
    given: Mapping[str, Allocation]
    left: tuple[Found, ...]
    kept: tuple[str, ...]
    """What looks left over and is not to be removed, with the reason: a line each."""


def survey(site: Site, hosts: Sequence[str] | None = None) -> Survey:
    """Look at all of it; on these ``hosts``, or on all. Drivers never list as left over what is still
    being made."""
    vms: dict[str, None] = {}
    machines: set[str] = set()
    disks: set[str] = set()
    hosts = list(site.farm.hosts) if hosts is None else hosts
    left = of_drivers(site, hosts)
    for host in hosts:
        for machine in site.hypervisor(host, look=True).list():
            machines.add(machine.name)
            if site.has_disks(host) and machine.owner is not None:
                vms[machine.owner.vm] = None
        for disk in site.disks(host).list() if site.has_disks(host) else ():
            disks.add(disk.machine)
            vms[disk.owner.vm] = None
    # A disk that isn't left over may be in use under another machine's name, and so may the seed; and
    # that of a VM that the farm file has may be missed, and so may what goes with it.
    gone = {item.what.ref for item in left if item.what.kind == "disk" and not item.may_be_missed}
    machines |= disks - gone
    given = site.allocator.recorded()
    files = (*of_files(site, machines), *_allocations(site, given, machines))
    if files:  # of another farm's machine they stay: it may be this one's, from before it lost its state
        from provision.namesakes import namesakes

        machines |= {one.machine for host in hosts for one in namesakes(site, host)}
        files = (*of_files(site, machines), *_allocations(site, given, machines))
    owners = {item.what.owner.vm for item in files if item.what.owner}
    others = _without_mark(site, owners, machines, hosts)
    left += tuple(item for item in files if not (item.what.owner and item.what.owner.vm in others))
    kept = [
        f"left alone: {item.what.kind} {item.what.ref}: {others[item.what.owner.vm]}"
        for item in files
        if item.what.owner and item.what.owner.vm in others
    ]
    return Survey(tuple(vms), given, left, tuple(kept))


def _without_mark(
    site: Site, vms: Collection[str], machines: Collection[str], hosts: Sequence[str]
) -> Mapping[str, str]:
    """Those of the VMs that aren't among ``machines``, though a machine has their name; each with that
    in words. Its mark may be damaged, and it may be ours all the same."""
    found: dict[str, str] = {}
    for vm in sorted(vms):
        name = site.farm.machine_of(vm)
        if name in machines:
            continue
        for host in hosts:
            if site.hypervisor(host, look=True).find(name) is not None:
                found[vm] = f"a machine {name} without our mark is on host {host}, and may need it"
    return found


def answering(site: Site, needed: Collection[str]) -> list[str]:
    """The hosts, but for those that don't answer, of each of which a warning tells. Those that are
    ``needed`` aren't asked: what they can't answer is an error."""
    found = []
    for host in site.farm.hosts:
        try:
            if host not in needed:
                site.hypervisor(host, look=True).list()
        except Interrupted:
            raise
        except FarmhandError as error:
            site.reporter.warn(f"host {host} is passed over: {error.message}")
        else:
            found.append(host)
    return found


def of_drivers(site: Site, hosts: Sequence[str] | None = None) -> tuple[Found, ...]:
    """What is left over on these of the farm's hosts, or on all."""
    found: dict[tuple[str, str], Found] = {}
    for host in site.farm.hosts if hosts is None else hosts:
        for item in _of_host(site, host):
            found.setdefault((item.what.kind, item.what.ref), item)
    return tuple(found.values())


def discard_of(members: Sequence[Member]) -> None:
    """Remove these VMs' leftovers in their drivers, and those that died before they were marked as
    anybody's; but nothing that may be missed. The caller holds their locks."""
    owners = {member.owner for member in members}
    hosts = {member.host: member.site for member in members if member.can_power}
    for host, site in hosts.items():
        for item in _of_host(site, host):
            if (item.what.owner in owners and not item.may_be_missed) or _is_nobodys(item.what):
                item.discard()


def discard_unowned(site: Site) -> None:
    """Remove on all hosts what the making and removing of templates left, which is no VM's. A host that
    doesn't answer is skipped: gc removes what is left there."""
    for host, declared in site.farm.hosts.items():
        if not declared.INFO.virtual:
            continue
        try:
            for item in _of_host(site, host):
                if _is_nobodys(item.what):
                    item.discard()
        except Interrupted:
            raise
        except FarmhandError as error:
            site.reporter.warn(f"host {host}: what is left there is for gc: {error.message}")


def _is_nobodys(what: Leftover) -> bool:
    """Whether it died before it was marked."""
    return what.owner is None and not may_be_all(what)


def may_be_all(what: Leftover) -> bool:
    """Whether a VM may have its memory there and nowhere else, which the recovery of its own activity
    knows."""
    return what.owner is None and what.kind == "memory"


def _of_host(site: Site, host: str) -> Iterator[Found]:
    driver = site.hypervisor(host, look=True)
    seen: set[tuple[str, str]] = set()
    for what in driver.leftovers():
        if what.kind == "domain" and left_to_people(site, host, what.ref):
            continue
        seen.add((what.kind, what.ref))
        yield Found(what, partial(driver.discard, what), _may_be_missed(site, host, what))
    if site.has_disks(host):
        store = site.disks(host)
        for what in store.leftovers():
            if (what.kind, what.ref) not in seen:
                yield Found(what, partial(store.discard, what), _may_be_missed(site, host, what))


def _may_be_missed(site: Site, host: str, what: Leftover) -> bool:
    """Its whole disk, if only the machine is gone; a checkpoint or a memory, if its disk isn't there:
    the disk may have been removed by mistake, or come back. Parts of what was cut off don't count."""
    owner = what.owner
    if owner is None or owner.farm != site.identity or owner.vm not in site.farm.vms:
        return False
    machine = site.farm.machine_of(owner.vm)
    if what.kind == "disk":
        return what.ref == machine
    if what.kind not in ("checkpoint", "memory") or not site.has_disks(host):
        return False
    return site.disks(host).find(machine) is None


def of_files(site: Site, machines: Collection[str]) -> Iterator[Found]:
    """Seeds, console logs and host keys of machines that are gone. They are known by the names that we
    give them; whatever else lies beside them is somebody's."""
    paths, farm = site.paths, site.farm
    prefix = f"{farm.farm}-"
    now = datetime.now(UTC)
    for kind, directory, name in (
        ("seed", paths.seeds, _SEED), ("console log", paths.consoles, _CONSOLE),
        ("host key", paths.keys / "hostkeys", _HOST_KEY),
    ):  # fmt: skip
        for path in sorted(directory.glob("*")):
            match = name.fullmatch(path.name)
            if not match:
                continue
            vm = match[1]
            if kind != "host key":
                if not vm.startswith(prefix):
                    continue
                vm = vm.removeprefix(prefix)
            yield from _file(site, kind, vm, path, machines, now)


def _file(
    site: Site, kind: str, vm: str, path: Path, machines: Collection[str], now: datetime
) -> Iterator[Found]:
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(info.st_mode):
        temporary = path.name.startswith(".")
        made = datetime.fromtimestamp(info.st_mtime, UTC)
        if site.farm.machine_of(vm) in machines and (now - made < _YOUNG or not temporary):
            return
        what = Leftover(
            kind=kind,
            ref=str(path),
            owner=Owner(site.identity, vm),
            created=made,
            bytes=info.st_size,
            why="its VM doesn't exist",
        )
        yield Found(what, partial(remove, path))


def _allocations(
    site: Site, given: Mapping[str, Allocation], machines: Collection[str]
) -> Iterator[Found]:
    """What undeclared VMs were given. Declared ones keep theirs for when they are made."""
    for vm in given:
        if vm in site.farm.vms or site.farm.machine_of(vm) in machines:
            continue
        what = Leftover(
            kind="allocation",
            ref=f"{site.allocator.lock_file}:{vm}",
            owner=Owner(site.identity, vm),
            created=datetime.now(UTC),
            bytes=0,
            why="it is neither declared nor made",
        )
        yield Found(what, partial(site.allocator.release, vm))
