"""What is ours and belongs to nothing any more: found, shown with owner, age and size, removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from hypervisors.api import Leftover, Owner
from inventory.errors import Busy, FarmhandError
from inventory.sizes import format_duration, format_size
from provision import identity
from provision.files import remove
from provision.report import Action, Outcome
from provision.site import Site
from provision.work import Run, begin, lock_of

_YOUNG = timedelta(minutes=10)
"""A temporary file beside a living VM's own may be somebody's at work: left alone for so long."""


@dataclass(frozen=True, slots=True)
class Found:
    what: Leftover
    discard: Callable[[], None]

    def text(self, now: datetime) -> str:
        age = format_duration(max((now - self.what.created).total_seconds(), 0))
        return (
            f"remove {self.what.kind} {self.what.ref} ({self.what.why}; {age} old, "
            f"{format_size(self.what.bytes)})"
        )


def gc(site: Site) -> Outcome:
    """Remove what killed operations or lost definitions left behind. VMs in use are passed over."""
    with begin(site, "gc", (), doing="gc") as run:
        found = list(leftovers(site))
        now = datetime.now(UTC)
        total = 0
        for item in found:
            owner = item.what.owner
            vm = owner.vm if owner else ""
            if site.plan and site.locks.holder(lock_of(vm)) is not None:
                run.add(Action("note", vm, f"left alone, in use: {item.what.ref}"))
            elif site.plan:
                run.add(Action("discard", vm, item.text(now)))
            elif _discard(site, item, vm, run, item.text(now)):
                total += item.what.bytes
        run.fact(
            leftovers=[
                {
                    "kind": item.what.kind,
                    "ref": item.what.ref,
                    "owner": item.what.owner.vm if item.what.owner else None,
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
        return run.outcome()


def leftovers(site: Site) -> Iterator[Found]:
    """All of them, on all hosts. Drivers name nothing that is still being made."""
    seen: set[tuple[str, str]] = set()
    for host in site.farm.hosts:
        for item in _of_host(site, host):
            key = (item.what.kind, item.what.ref)
            if key not in seen:
                seen.add(key)
                yield item
    yield from _files(site)
    yield from _allocations(site)


def discard_of(site: Site, vm: str) -> int:
    """Remove one VM's leftovers in its drivers, and those that died before they could be marked as
    anybody's; the caller holds its lock. How many there were."""
    count = 0
    if site.host(vm).driver == "ssh":
        return 0
    for item in _of_host(site, site.farm.host_of(vm)):
        if item.what.owner in (None, Owner(site.farm.farm, vm)):
            item.discard()
            count += 1
    return count


def _of_host(site: Site, host: str) -> Iterator[Found]:
    driver = site.hypervisor(host, look=True)
    seen: set[tuple[str, str]] = set()
    for what in driver.leftovers():
        seen.add((what.kind, what.ref))
        yield Found(what, partial(driver.discard, what))
    if site.has_disks(host):
        store = site.disks(host)
        for what in store.leftovers():
            if (what.kind, what.ref) not in seen:
                yield Found(what, partial(store.discard, what))


def _machines(site: Site) -> set[str]:
    return {
        machine.name for host in site.farm.hosts for machine in site.hypervisor(host, look=True).list()
    }


def _files(site: Site) -> Iterator[Found]:
    """Seeds, console logs and host keys of machines that are not there."""
    paths, farm = site.paths, site.farm
    machines = _machines(site)
    prefix = f"{farm.farm}-"
    candidates: list[tuple[str, str, Path]] = []
    for kind, directory, pattern in (("seed", paths.seeds, "*"), ("console log", paths.consoles, "*")):
        for path in sorted(directory.glob(pattern)):
            machine = path.name.lstrip(".").split(".")[0]
            candidates.append((kind, machine.removeprefix(prefix), path))
    kept = identity.known_hosts(paths)
    for path in sorted(kept.parent.glob("*")):
        if path != kept:
            candidates.append(("host key", path.name.lstrip(".").split(".")[0], path))
    now = datetime.now(UTC)
    for kind, vm, path in candidates:
        try:
            info = path.stat()
        except FileNotFoundError:
            continue
        temporary = path.name.startswith(".")
        young = now - datetime.fromtimestamp(info.st_mtime, UTC) < _YOUNG
        if f"{prefix}{vm}" in machines and (young or not temporary):
            continue
        what = Leftover(
            kind=kind,
            ref=str(path),
            owner=Owner(farm.farm, vm),
            created=datetime.fromtimestamp(info.st_mtime, UTC),
            bytes=info.st_size,
            why="its VM doesn't exist",
        )
        yield Found(what, partial(_remove_file, site, path))


def _allocations(site: Site) -> Iterator[Found]:
    """What undeclared VMs were given. Declared ones keep theirs for when they are made."""
    machines = _machines(site)
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


def _remove_file(site: Site, path: Path) -> None:
    remove(path)
    if path.parent == site.paths.keys / "hostkeys":
        identity.write_known_hosts(site.paths)


def _discard(site: Site, item: Found, vm: str, run: Run, text: str) -> bool:
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
        run.add(Action("note", vm, f"could not remove {item.what.ref}: {error.message}"))
        site.reporter.warn(error.message, vm=vm)
        return False
    run.add(Action("discard", vm, text))
    site.reporter.say(text, vm=vm)
    return True
