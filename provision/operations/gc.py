"""What is ours and belongs to nothing any more: found, shown with owner, age and size, removed."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from host.files import remove
from hypervisors.api import Leftover, NamelessDisks, Owner
from inventory.errors import Busy, DriverFailed, FarmhandError, Interrupted, some
from inventory.sizes import format_duration, format_size
from provision.engine.report import Action, Outcome
from provision.engine.work import Run, begin, lock_of
from provision.lost import left_to_people
from provision.site import Site

_SEED = re.compile(r"\.?([a-z0-9-]+)\.(?:iso|sum)(?:\.\d+)*(?:\.iso)?")
_CONSOLE = re.compile(r"\.?([a-z0-9-]+)\.log(?:\.\d+)*")
_HOST_KEY = re.compile(r"\.?([a-z0-9-]+)(?:\.(?:pub|known))?(?:\.\d+)*")
_YOUNG = timedelta(minutes=10)
"""A temporary file beside a living VM's own may be somebody's at work: left alone for so long."""


@dataclass(frozen=True, slots=True)
class Found:
    what: Leftover
    discard: Callable[[], object]

    def text(self, now: datetime) -> str:
        age = format_duration(max((now - self.what.created).total_seconds(), 0))
        owner = self.what.owner
        whose = f"of {owner.farm}/{owner.vm}" if owner else "of no VM yet"
        return (
            f"remove {self.what.kind} {self.what.ref} ({whose}; {self.what.why}; {age} old, "
            f"{format_size(self.what.bytes)})"
        )


def gc(site: Site) -> Outcome:
    """Remove what killed operations or lost definitions left behind. VMs in use are passed over.
    DriverFailed, at its end, where something could not be removed."""
    with begin(site, "gc", (), doing="gc") as run:
        run.add(*_doubtful(site))
        found = list(leftovers(site))
        now = datetime.now(UTC)
        total = 0
        failed: dict[str, FarmhandError] = {}
        for item in found:
            owner = item.what.owner
            vm = owner.vm if owner else ""
            if site.plan and site.locks.holder(lock_of(vm)) is not None:
                run.add(Action("note", vm, f"left alone, in use: {item.what.ref}"))
            elif site.plan:
                run.add(Action("discard", vm, item.text(now)))
            elif _discard(site, item, vm, run, item.text(now), failed):
                total += item.what.bytes
        run.fact(
            leftovers=[
                {
                    "kind": item.what.kind,
                    "ref": item.what.ref,
                    "owner": item.what.owner.vm if item.what.owner else None,
                    "farm": item.what.owner.farm if item.what.owner else None,
                    "created": item.what.created.isoformat(timespec="seconds"),
                    "age": round((now - item.what.created).total_seconds(), 1),
                    "bytes": item.what.bytes,
                    "why": item.what.why,
                }
                for item in found
            ],
            freed=total,
        )
        if not found:
            run.add(Action("keep", "", "nothing is left over"))
        if failed:
            raise DriverFailed(
                f"{site.name}: {len(failed)} of {len(found)} leftovers could not be removed: "
                + some([f"{ref}: {error.message}" for ref, error in failed.items()], by="; "),
                remedy=some(list(dict.fromkeys(e.remedy for e in failed.values() if e.remedy)), by="; "),
            )
        return run.outcome()


def _doubtful(site: Site) -> Iterator[Action]:
    """Disks that lost their names, and that nobody can prove to be ours."""
    for host in site.farm.hosts:
        store = site.disks(host) if site.has_disks(host) else None
        if isinstance(store, NamelessDisks) and (found := store.doubtful()):
            text = f"left alone, may be anybody's: disks without name, marks and VM on host {host}"
            yield Action("note", "", f"{text}: {some(found)}")


def leftovers(site: Site) -> Iterator[Found]:
    """All of them, on all hosts. Drivers name nothing that is still being made."""
    seen: set[tuple[str, str]] = set()
    for host in site.farm.hosts:
        for item in _of_host(site, host):
            key = (item.what.kind, item.what.ref)
            if key not in seen:
                seen.add(key)
                yield item
    machines = _machines(site, going={ref for kind, ref in seen if kind == "disk"})
    yield from _files(site, machines)
    yield from _allocations(site, machines)


def discard_of(site: Site, vms: Sequence[str]) -> None:
    """Remove these VMs' leftovers in their drivers, and those that died before they could be marked as
    anybody's; the caller holds their locks."""
    owners = {None, *(Owner(site.farm.farm, vm) for vm in vms)}
    for host in dict.fromkeys(map(site.farm.host_of, vms)):
        if not site.farm.hosts[host].INFO.virtual:
            continue
        for item in _of_host(site, host):
            if item.what.owner in owners:
                item.discard()


def discard_unowned(site: Site) -> None:
    """Remove on all hosts what is left of making and removing templates, which are no VM's. A host that
    doesn't answer keeps nobody from going on: what is left there is for gc."""
    for host, declared in site.farm.hosts.items():
        if not declared.INFO.virtual:
            continue
        try:
            for item in _of_host(site, host):
                if item.what.owner is None:
                    item.discard()
        except Interrupted:
            raise
        except FarmhandError as error:
            site.reporter.warn(f"host {host}: what is left there is for gc: {error.message}")


def _of_host(site: Site, host: str) -> Iterator[Found]:
    driver = site.hypervisor(host, look=True)
    seen: set[tuple[str, str]] = set()
    for what in driver.leftovers():
        if what.kind == "domain" and left_to_people(site, host, what.ref):
            continue
        seen.add((what.kind, what.ref))
        yield Found(what, partial(driver.discard, what))
    if site.has_disks(host):
        store = site.disks(host)
        for what in store.leftovers():
            if (what.kind, what.ref) not in seen:
                yield Found(what, partial(store.discard, what))


def _machines(site: Site, *, going: set[str]) -> set[str]:
    """Those that are there, as machine or as a disk that isn't left over: it may be in use under another
    machine's name, and so may the seed."""
    found: set[str] = set()
    for host in site.farm.hosts:
        found |= {machine.name for machine in site.hypervisor(host, look=True).list()}
        if site.has_disks(host):
            found |= {disk.machine for disk in site.disks(host).list()} - going
    return found


def _files(site: Site, machines: set[str]) -> Iterator[Found]:
    """Seeds, console logs and host keys of machines that are not there, by the names that we give them:
    whatever else lies beside them is somebody's."""
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
    site: Site, kind: str, vm: str, path: Path, machines: set[str], now: datetime
) -> Iterator[Found]:
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(info.st_mode):
        temporary = path.name.startswith(".")
        made = datetime.fromtimestamp(info.st_mtime, UTC)
        if site.machine(vm) in machines and (now - made < _YOUNG or not temporary):
            return
        what = Leftover(
            kind=kind,
            ref=str(path),
            owner=Owner(site.farm.farm, vm),
            created=made,
            bytes=info.st_size,
            why="its VM doesn't exist",
        )
        yield Found(what, partial(remove, path))


def _allocations(site: Site, machines: set[str]) -> Iterator[Found]:
    """What undeclared VMs were given. Declared ones keep theirs for when they are made."""
    for vm in site.allocator.recorded():
        if vm in site.farm.vms or site.machine(vm) in machines:
            continue
        what = Leftover(
            kind="allocation",
            ref=f"{site.allocator.lock_file}:{vm}",
            owner=Owner(site.farm.farm, vm),
            created=datetime.now(UTC),
            bytes=0,
            why="it is neither declared nor made",
        )
        yield Found(what, partial(site.allocator.release, vm))


def _discard(
    site: Site, item: Found, vm: str, run: Run, text: str, failed: dict[str, FarmhandError]
) -> bool:
    """Whether it is gone. One that others use is left to them; what fails goes to ``failed``."""
    try:
        with (
            site.locks.hold(lock_of(vm) if vm else "gc", doing="gc"),
            site.journal.operation("gc", vm=vm, ref=item.what.ref) as operation,
        ):
            operation.step(text)
            item.discard()
    except Busy as error:
        run.add(Action("note", vm, f"left alone, in use: {item.what.ref}"))
        site.reporter.warn(error.message, vm=vm)
        return False
    except FarmhandError as error:
        failed[item.what.ref] = error
        return False
    run.add(Action("discard", vm, text))
    site.reporter.say(text, vm=vm)
    return True
