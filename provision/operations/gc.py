"""gc: what is ours and belongs to nothing any more: shown with owner, age and size, and removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from host.paths import cache_dir
from hypervisors.api import NamelessDisks
from inventory.errors import (
    Busy,
    Call,
    DriverFailed,
    FarmhandError,
    Interrupted,
    some,
    some_remedies,
    spelled,
)
from inventory.sizes import rounded
from provision.caches import CachedItem, by_kind, cached, drop
from provision.engine.facts import Facts
from provision.engine.locks import lock_of
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, job
from provision.engine.recovery import half_done_vms
from provision.engine.report import Action
from provision.engine.run import Run
from provision.leftovers import Found, may_be_all, survey
from provision.namesakes import told
from provision.site import Site
from provision.vm_activity import OneVmActivity


@dataclass(frozen=True, slots=True)
class GcFacts(Facts):
    """``ref``: the thing removed, by its driver's name for it."""

    ref: str


class _GcActivity(OneVmActivity[GcFacts]):
    """The removal of one thing. Cut off, the thing is still left over."""

    name = "gc"
    facts = GcFacts


GC = _GcActivity()


@dataclass(frozen=True, slots=True)
class GcItem:
    """Something left over, as the result names it. ``ref``: its driver's name for it. ``owner``,
    ``farm``: whose it was; None: nothing says. ``age`` in seconds, ``bytes`` on its store."""

    kind: str
    ref: str
    owner: str | None
    farm: str | None
    created: datetime
    age: float
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class GcCache:
    """Something that can be made again. ``changed``: last. ``in_use``: by what, or ""."""

    kind: str
    path: str
    bytes: int
    changed: datetime
    in_use: str


@dataclass(frozen=True, slots=True)
class GcResult:
    """``leftovers``: all that was found. ``freed``: bytes of what was removed. ``caches``: what the
    cache directory has."""

    leftovers: tuple[GcItem, ...]
    freed: int
    caches: tuple[GcCache, ...] = ()


@dataclass(frozen=True, slots=True)
class Gc(Operation[GcResult]):
    """Remove what killed operations or lost definitions left behind. VMs in use are passed over, and so
    is what may be all that a VM has which the farm file has: its disk; without one, its checkpoints.
    ``caches``: and all in the cache directory that nothing uses now. DriverFailed, at the end, if
    something could not be removed."""

    name = "gc"
    at_any_time = True

    caches: bool = False

    def plan(self, run: Run) -> Plan[GcResult]:
        seen = survey(run.site)
        found = seen.left
        removing = _Removing(run.site, datetime.now(UTC))
        jobs = [job("note", "", text) for text in (*_doubtful(run.site), *seen.kept)]
        jobs += [job("note", "", text) for host in run.site.farm.hosts for text in told(run.site, host)]
        jobs += map(removing.job, found)
        leftovers = tuple(map(removing.leftover, found))
        if not found:
            jobs.append(job("keep", "", "nothing is left over"))
        kept = cached(cache_dir())
        jobs += map(removing.cache_job, kept) if self.caches else _told_of(kept)
        stages = [alone(*jobs, Job((), removing.end))]
        caches = tuple(map(_of_cache, kept))
        return Plan(stages, lambda: GcResult(leftovers, removing.freed, caches))


class _Removing:
    """Removes one thing after the other. Errors are told at the end."""

    def __init__(self, site: Site, now: datetime) -> None:
        self._site = site
        self._now = now
        self._tried = 0
        self.freed = 0
        self._failed: dict[str, FarmhandError] = {}
        self._half_done = half_done_vms(site)
        self._cut_off = bool(site.journal.unfinished())

    def job(self, item: Found) -> Job:
        vm = _vm(item)
        if verb := self._half_done.get(vm):  # it is in two parts, which look like two remains
            text = f"left alone until its {verb} is recovered: {item.what.ref}"
            return job("note", vm, (text, ": ", Call("recover")))
        if self._cut_off and may_be_all(item.what):
            text = f"left alone until what was cut off is recovered: {item.what.ref}"
            return job("note", "", (text, ": ", Call("recover")))
        if item.may_be_missed:
            text = (
                f"left alone, for the farm file has {vm}: {item.text(self._now).removeprefix('remove ')}"
            )
            return job("note", vm, (text, "; if nothing on it is needed: ", Call("destroy", vm=vm)))
        holder = self._site.locks.holder(lock_of(vm)) if vm else None
        if holder is not None:
            return job("note", vm, f"left alone, in use by {holder}: {item.what.ref}")
        action = Action("discard", vm, item.text(self._now))
        return Job((action,), partial(self._remove, item, action))

    def _remove(self, item: Found, action: Action) -> Sequence[Action] | None:
        """What it did in place of ``action``; None: just that."""
        site, vm, ref = self._site, action.vm, item.what.ref
        self._tried += 1
        try:
            with (
                site.locks.hold(lock_of(vm) if vm else "gc", doing="gc"),
                site.journal.begin(GC, [vm] if vm else [], GcFacts(ref)) as entry,
            ):
                entry.step(spelled(action.text))
                item.discard()
        except Busy as error:  # since the plan
            site.reporter.warn(error.message, vm=vm)
            return [Action("note", vm, f"left alone, in use: {ref}")]
        except Interrupted:
            raise
        except FarmhandError as error:
            self._failed[ref] = error
            return []
        self.freed += item.what.bytes
        site.reporter.say(action.text, vm=vm)
        return None

    def cache_job(self, item: CachedItem) -> Job:
        changed = f"{item.changed.astimezone():%Y-%m-%d}"
        text = f"{item.kind.name} {item.path} ({rounded(item.bytes)}, last changed {changed})"
        if item.in_use:
            return job("note", "", f"left alone, in use by {item.in_use}: {text}")
        action = Action("discard", "", f"remove {text}")
        return Job((action,), partial(self._drop, item, action))

    def _drop(self, item: CachedItem, action: Action) -> Sequence[Action] | None:
        self._tried += 1
        try:
            drop(item, cache_dir())
        except Busy as error:  # since the plan
            return [Action("note", "", f"left alone: {error.message}")]
        except FarmhandError as error:
            self._failed[str(item.path)] = error
            return []
        self.freed += item.bytes
        self._site.reporter.say(action.text)
        return None

    def end(self) -> None:
        if self._failed:
            raise DriverFailed(
                f"{self._site.name}: {len(self._failed)} of {self._tried} leftovers could not be "
                "removed: "
                + some([f"{ref}: {error.message}" for ref, error in self._failed.items()], by="; "),
                remedy=some_remedies(self._failed.values()),
            )

    def leftover(self, item: Found) -> GcItem:
        what = item.what
        return GcItem(
            kind=what.kind,
            ref=what.ref,
            owner=what.owner.vm if what.owner else None,
            farm=what.owner.farm.name if what.owner else None,
            created=what.created.replace(microsecond=0),
            age=round((self._now - what.created).total_seconds(), 1),
            bytes=what.bytes,
            why=what.why,
        )


def _told_of(kept: Sequence[CachedItem]) -> Iterator[Job]:
    """A line a kind."""
    for kind, items in by_kind(kept).items():
        free = [item for item in items if not item.in_use]
        used = f", {len(items) - len(free)} of them in use" if len(free) < len(items) else ""
        size, count = rounded(sum(item.bytes for item in items)), len(items)
        yield job("note", "", f"in the cache: {count} {kind}{'s' * (count != 1)}, {size}{used}")
    if any(not item.in_use for item in kept):
        again = "what nothing uses of the cache is made again when it is needed; remove it: "
        yield job("note", "", (again, Call("gc", caches=True)))


def _of_cache(item: CachedItem) -> GcCache:
    moment = item.changed.replace(microsecond=0)
    return GcCache(item.kind.name, str(item.path), item.bytes, moment, item.in_use)


def _vm(item: Found) -> str:
    return item.what.owner.vm if item.what.owner else ""


def _doubtful(site: Site) -> Iterator[str]:
    """Disks that lost their names, and that nobody can prove to be ours."""
    for host in site.farm.hosts:
        store = site.disks(host) if site.has_disks(host) else None
        if isinstance(store, NamelessDisks) and (found := store.doubtful()):
            text = f"left alone, may be anybody's: disks without name, marks and VM on host {host}"
            yield f"{text}: {some(found)}"
