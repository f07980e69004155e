"""gc: what is ours and belongs to nothing any more, shown with owner, age and size, and removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from hypervisors.api import NamelessDisks
from inventory.errors import Busy, DriverFailed, FarmhandError, some, some_remedies
from provision.engine.facts import Facts
from provision.engine.locks import lock_of
from provision.engine.report import Action, Outcome
from provision.engine.runner import Run, begin
from provision.leftovers import Found, survey
from provision.site import Site
from provision.vm_activity import OneVmActivity


@dataclass(frozen=True, slots=True)
class GcFacts(Facts):
    ref: str


class _GcActivity(OneVmActivity[GcFacts]):
    name = "gc"
    facts = GcFacts


GC = _GcActivity()


def gc(site: Site) -> Outcome:
    """Remove what killed operations or lost definitions left behind. VMs in use are passed over.
    DriverFailed, at its end, where something could not be removed."""
    with begin(site, "gc", (), doing="gc", at_any_time=True) as run:
        run.add(*_doubtful(site))
        found = survey(site).left
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
                remedy=some_remedies(failed.values()),
            )
        return run.outcome()


def _doubtful(site: Site) -> Iterator[Action]:
    """Disks that lost their names, and that nobody can prove to be ours."""
    for host in site.farm.hosts:
        store = site.disks(host) if site.has_disks(host) else None
        if isinstance(store, NamelessDisks) and (found := store.doubtful()):
            text = f"left alone, may be anybody's: disks without name, marks and VM on host {host}"
            yield Action("note", "", f"{text}: {some(found)}")


def _discard(
    site: Site, item: Found, vm: str, run: Run, text: str, failed: dict[str, FarmhandError]
) -> bool:
    """Whether it is gone. One that others use is left to them; what fails goes to ``failed``."""
    try:
        with (
            site.locks.hold(lock_of(vm) if vm else "gc", doing="gc"),
            site.journal.begin(GC, [vm] if vm else [], GcFacts(item.what.ref)) as entry,
        ):
            entry.step(text)
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
