"""What a VM holds of earlier builds, so that a cycle that skips steps can say what it goes on from.

The VM itself tells, by its mark (``builds.mark``). A reset, by whomever, takes the mark away with all
the rest. A restart doesn't. A checkpoint keeps it with the state that it belongs to. What the build did
there is in its record."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from builds import mark
from builds.record import BuildRecord, SourceRecord, UsedGeneration, load_records
from builds.step_kind import StepKind
from inventory.errors import FarmhandError
from provision.guest.connection import Connection
from provision.member import Member

if TYPE_CHECKING:
    from provision.site import Site

_PATIENCE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What the skipped steps left behind, as far as that is known. ``done``: by step, the build in which
    it passed. ``unverified``: by step, why that is not known. ``source``: what the builds that did them
    were given; None if nothing of it is in the VMs. ``repositories``: what they were pointed to."""

    done: Mapping[str, str] = field(default_factory=dict)
    unverified: Mapping[str, str] = field(default_factory=dict)
    source: SourceRecord | None = None
    repositories: tuple[UsedGeneration, ...] = ()

    @property
    def why(self) -> str:
        """Why nobody knows which commit is in the VMs; "" if it is known."""
        return "; ".join(f"{steps}: {why}" for why, steps in _grouped(self.unverified))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the plan and the record."""
        return (
            *(f"{steps}: not run, passed in build {build}" for build, steps in _grouped(self.done)),
            *(f"not verified: {steps}: {why}" for why, steps in _grouped(self.unverified)),
            *(
                f"{one.vm} no longer reaches {one.repository}, which was served through the connection "
                f"of an earlier build: begin with step {one.step} where it is needed"
                for one in self.repositories
                if not one.url
            ),
        )


def _grouped(by_step: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each text once, with the steps that it is about."""
    return [
        (text, ", ".join(step for step, other in by_step.items() if other == text))
        for text in dict.fromkeys(by_step.values())
    ]


def reset_first(steps: Iterable[StepKind], vm: str) -> bool:
    """Whether the first of these steps that uses the VM resets it."""
    first = next((step for step in steps if vm in step.vms), None)
    return first is not None and first.RENEWS


def look_back(site: Site, every: Sequence[StepKind], chosen: frozenset[str]) -> Lineage:
    """What the chosen steps of a cycle go on from. VMs are asked only if steps are skipped."""
    steps = [step for step in every if step.name in chosen]
    first, last = every.index(steps[0]), every.index(steps[-1])
    relevant = [step for step in every[:first] if _counts(step, steps)]
    between = [s for s in every[first:last] if s.name not in chosen and _counts(s, steps)]
    late = {step.name: f"skipped, though {steps[0].name} is run" for step in between}
    if not relevant:
        return Lineage(unverified=late)
    marks = _read_marks(site, sorted({step.changes for step in relevant}))
    before = judge(relevant, marks, load_records(site.paths))
    return replace(before, unverified={**before.unverified, **late})


def judge(
    steps: Sequence[StepKind], marks: Mapping[str, tuple[str, str]], records: Sequence[BuildRecord]
) -> Lineage:
    """``marks``: by VM, the build whose work it holds ("" if that isn't known), and why it isn't
    known."""
    known = {record.id: record for record in records}
    done: dict[str, str] = {}
    unverified: dict[str, str] = {}
    held: dict[str, BuildRecord] = {}  # by VM
    used: list[UsedGeneration] = []
    for step in steps:
        vm = step.changes
        build, why = marks[vm]
        record = known.get(build)
        if record is None:
            unverified[step.name] = why or f"{vm} holds build {build}, whose record is gone"
            continue
        held[vm] = record
        found = next((s for s in record.steps if s.name == step.name), None)
        if found is not None and (found.status == "passed" or found.done_in):
            done[step.name] = found.done_in or record.id
            used += (one for one in record.repositories if one.step == step.name)
        else:
            unverified[step.name] = f"{found.status if found else 'not there'} in build {record.id}"
    sources = {record.source.commit: record.source for record in held.values()}
    if len(sources) > 1:
        holds = " and ".join(
            f"{vm} holds {r.source.commit[:10] or 'nobody knows what'}" for vm, r in held.items()
        )
        return Lineage(unverified={**dict.fromkeys(done, holds), **unverified})
    for record in held.values():
        if record.source.unverified:
            lost = f"build {record.id} itself went on from what nobody knows"
            unverified = {**dict.fromkeys(done, lost), **unverified}
            done = {}
    source = next(iter(sources.values()), None)
    return Lineage(done=done, unverified=unverified, source=source, repositories=tuple(used))


def _counts(step: StepKind, chosen: Sequence[StepKind]) -> bool:
    """Whether the chosen steps depend on this one: it left something in a VM that isn't reset first
    now."""
    return bool(step.changes) and not step.RENEWS and not reset_first(chosen, step.changes)


def _read_marks(site: Site, vms: Sequence[str]) -> dict[str, tuple[str, str]]:
    async def one(vm: str) -> tuple[str, str]:
        try:
            endpoint = Member(site, vm).endpoint()
            async with await Connection.open(endpoint, runner=site.runner) as connection:
                text = await connection.output(mark.READ, timeout=_PATIENCE)
        except FarmhandError as error:  # its own step will fail, and say so better
            return "", f"{vm} could not be asked: {error.message}"
        found = mark.parse(text)
        if found is None:
            return "", f"{vm} holds no build's work: it was reset, or nothing was built in it"
        farm, build = found
        if farm != site.farm.farm:
            return "", f"{vm} holds a build of farm {farm}"
        return build, ""

    async def every() -> list[tuple[str, str]]:
        return await asyncio.gather(*(one(vm) for vm in vms))

    return dict(zip(vms, asyncio.run(every()), strict=True))
