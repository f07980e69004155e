"""network-apply: all services have the farm's records, or none has anything of it.

    1  render, and compare with the live files; is all there that the daemons need, and have they what
       the files say that are right already
    2  each daemon's own checker, on the new files in a staging area
    3  the old files are kept in the state directory
    4  each new file takes the old one's place
    5  each daemon that it concerns is told, and seen to have taken it
    6  what was written where is recorded; the old files go

For a few VMs that come, change or go (clone-farm, destroy), 1 looks at no more than they concern, where
a service keeps VMs apart, and 2 leaves out what the daemon itself checks as well before it takes it. The
whole is looked at again by network-apply, and whenever anything but VMs has changed in the farm file.

A refusal in 1 or 2 leaves everything as it is. A failure in 4 or 5 puts every file back, and tells every
daemon that was told. A kill is undone in the same way by the next command, from what 3 kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from host.files import remove
from inventory import plain
from inventory.collector import without_collector
from inventory.errors import Busy, Conflict, FarmhandError, Interrupted, WrongState, joined
from inventory.model import Farm
from provision.allocate import Allocation
from provision.engine.journal import Entry, current_step
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, job
from provision.engine.report import Action
from provision.engine.run import Run
from provision.member import told_without_record
from provision.network import readiness, records
from provision.network.changes import Changes, Examiner, difference
from provision.network.checkers import refusals
from provision.network.daemons import steps
from provision.network.document import Document
from provision.network.file_change import FileChange
from provision.network.render import part_of
from provision.network.rendered import chosen
from provision.network.rollback import APPLY, RECORD, ApplyFacts, keep, kept, put, undo
from provision.network.service import ApplyStep, RecordKeeper, Unserved
from provision.network.service import services as used_services
from provision.network.state import NetworkState, StateFile, noted
from provision.site import Site

LOCK = "network"
_PATIENCE = 120.0  # seconds that clone-farm and destroy wait for one another
FEW = 50
"""VMs that come, change or go at once; with more of them the whole is looked at."""


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """``diff``: how the files and records differ from what they were."""

    diff: str = ""


@dataclass(frozen=True, slots=True)
class NetworkApply(Operation[ApplyResult]):
    """Make the services' live files, and their daemons, as the farm file says, for all declared VMs. VMs
    not made yet are given their addresses now. ``force``: also overwrite what somebody edited of ours.

    Errors: UsageError (no services), NotOurs, WrongState (edited, without ``force``), TemplateFailed,
    CommandFailed (a checker or daemon refuses; then everything is as before), Busy."""

    name = "network-apply"
    services: tuple[str, ...] = ()
    force: bool = False

    def locks(self, _site: Site) -> tuple[str, ...]:
        return (LOCK,)

    @without_collector()
    def plan(self, run: Run) -> Plan[ApplyResult]:
        site, names = run.site, chosen(run.site, self.services)
        given = [member.vm for member in site.members() if member.info.virtual]
        give = site.allocator.peek_all if site.plan else site.allocator.allocate_all
        diffs: list[str] = []
        told = told_without_record(site)
        found = _examine(site, diffs, names, give(given, told=told), force=self.force, thorough=True)
        nothing = job("keep", "", f"all files of {', '.join(names)} are as they should be")
        return Plan([alone(found or nothing)], lambda: ApplyResult("".join(diffs)))


def in_step(
    run: Run, diffs: list[str], *, new: Sequence[str] = (), gone: Sequence[str] | None = ()
) -> Job:
    """The jobs for the plans of clone-farm and destroy. What there is to do is known only when the VMs
    have their addresses, and nobody else changes the services. ``diffs`` is given how their files
    differ, then."""
    if run.site.plan:
        return Job(keep_in_step(run, diffs, new=new, gone=gone))
    return Job((), partial(keep_in_step, run, diffs, new=new, gone=gone))


@without_collector()
def keep_in_step(
    run: Run, diffs: list[str], *, new: Sequence[str] = (), gone: Sequence[str] | None = ()
) -> tuple[Action, ...]:
    """Bring the services in step: they get the VMs that have allocations, with the ``new`` ones, and
    lose those that are ``gone`` (None: all). Waits for others that do the same. Returns what was
    done."""
    site = run.site
    used = site.farm.services.used
    if not used:
        return ()
    allocator = site.allocator
    given = [vm for vm in new if site.member(vm).info.virtual]
    with contextlib.ExitStack() as stack:
        if not site.plan:
            _patiently(site, stack, run.name)
            allocator.allocate_all(given)
        left = {} if gone is None else allocator.recorded(without=gone)
        if site.plan and gone is not None:
            left = {**left, **allocator.peek_all(given)}
        few = None if gone is None else [*given, *gone]
        leaving = not new and gone != ()
        found = _examine(site, diffs, used, left, leaving=leaving, nobody=gone is None, vms=few)
        if found is None:
            return ()
        if found.run and not site.plan:
            found.run()
        return found.actions


def _patiently(site: Site, stack: contextlib.ExitStack, doing: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            stack.enter_context(site.locks.hold(LOCK, doing=doing))
        except Busy:
            if time.monotonic() > deadline:
                raise
            site.reporter.working("wait for another command that changes the network services")
        else:
            return


def _examine(
    site: Site,
    diffs: list[str],
    services: Sequence[str],
    allocations: Mapping[str, Allocation],
    *,
    force: bool = False,
    leaving: bool = False,
    nobody: bool = False,
    thorough: bool = False,
    vms: Sequence[str] | None = None,
) -> Job | None:
    """What there is to do so that the services have these VMs and no others; None: nothing. The caller
    holds the lock. ``leaving``: VMs only go, and what their services lack doesn't keep them. With
    ``nobody`` they don't keep VMs without allocations either. ``vms``: nothing else came, changed or
    went since the last time."""
    store = StateFile.below(site.paths.root)
    state = store.read()
    _say_what_is_forgotten(site, store)
    farm = part_of(site.farm, {}) if nobody else site.farm
    basis = _basis(site.farm) if {*services} >= {*site.farm.services.used} else ""
    if vms is not None and not (basis == state.basis and _known_apart(farm, state, vms)):
        vms = None
    examiner = Examiner(farm, state, today=datetime.now(UTC).date())
    changes = examiner.examine(allocations, services, vms)
    found = _prospects(site, changes, services, vms, force=force, leaving=leaving)
    for note in found.notes:
        site.reporter.warn(joined((note.message, note.remedy), ". "))
    if found.trouble:
        raise readiness.together(found.trouble)
    told = steps(site.farm, changes.files)
    known = {step.text for step in told}
    told = (*readiness.mending([one for one in found.lost if one.step.text not in known]), *told)
    keeper = _record_keeper(farm)  # a zone that it doesn't serve yet can't be asked what is in it
    lost = {one.step.service for one in found.lost}
    thorough = thorough and not (keeper and keeper.NAME in lost)
    updates = _updates(store, farm, changes, state, services, vms, thorough=thorough, force=force)
    if not changes.files and not updates.ops and not told:
        if state.basis != basis and not site.plan:
            _record(store, state, changes, updates, few=vms is not None, basis=basis)
        return None
    diffs += [*map(difference, changes.files), records.difference(updates.ops)]

    @without_collector()
    def act() -> None:
        with site.journal.begin(APPLY, (), ApplyFacts()) as entry:
            new = [d for d in changes.documents if d.path not in state.files]
            store.begin(new, updates=bool(updates.ops))
            _carry_out(site, entry, changes.files, told, updates)
            current_step(RECORD)
            _record(store, state, changes, updates, few=vms is not None, basis=basis)
            remove(kept(site, entry.id))

    return Job(tuple(_actions(changes, told, updates)), act)


@dataclass(frozen=True, slots=True)
class Prospects:
    """What an apply is going to meet. ``trouble``: all that is in its way. ``lost``: what files say that
    are right, and daemons haven't. ``idle``: stopped daemons that start when their files change.
    ``notes``: what a boot would lose."""

    trouble: tuple[FarmhandError, ...]
    lost: tuple[Unserved, ...]
    idle: tuple[Unserved, ...]
    notes: tuple[FarmhandError, ...]


def prospects(site: Site) -> Prospects:
    """Of network-apply, for doctor. Nothing is changed."""
    used = site.farm.services.used
    given = [member.vm for member in site.members() if member.info.virtual]
    examiner = Examiner(
        site.farm, StateFile.below(site.paths.root).read(), today=datetime.now(UTC).date()
    )
    changes = examiner.examine(site.allocator.peek_all(given), used)
    return _prospects(site, changes, used, None)


def _prospects(
    site: Site,
    changes: Changes,
    services: Sequence[str],
    vms: Sequence[str] | None,
    *,
    force: bool = False,
    leaving: bool = False,
) -> Prospects:
    """For a few VMs only services whose files change are asked, and what only an edit by hand can have
    changed isn't looked at. ``leaving``: what services lack doesn't keep VMs that go."""
    trouble = [*changes.trouble, *_edited(changes, force=force)]
    lost: list[Unserved] = []
    idle: list[Unserved] = []
    notes: list[FarmhandError] = []
    changing = {change.service for change in changes.files}
    names = {*services} if vms is None else changing
    meant = [service for service in used_services(site.farm) if service.NAME in names]
    files = (*changes.files, *changes.kept)
    if not leaving:
        trouble += readiness.missing(site.runner, site.farm, meant, files)
    if not leaving and vms is None:
        for name, error, now in readiness.not_included(site.runner, meant, files):
            if now:
                trouble.append((name, error))
            else:
                notes.append(error)
        there = [service for service in meant if service.NAME not in dict(trouble)]
        for name, down in readiness.stopped(site.runner, site.farm, there):
            if isinstance(down, Unserved):
                (idle if name in changing else lost).append(down)
            else:
                trouble.append((name, down))
        for name, one in readiness.unserved(site.runner, site.farm, there, changes.kept):
            if isinstance(one, Unserved):
                lost.append(one)
            else:
                trouble.append((name, one))
    texts = {change.path: change.after for change in changes.files}
    foreign = {name for name, _ in changes.trouble}
    concerned = _concerned(site.farm, changes, vms, {one.step.service for one in lost})
    documents = [document for document in concerned if document.service not in foreign]
    errors = [error for _, error in trouble]
    errors += refusals(site.runner, site.farm, documents, texts)
    return Prospects(tuple(errors), tuple(lost), tuple(idle), tuple(notes))


def _edited(changes: Changes, *, force: bool) -> Iterator[tuple[str, FarmhandError]]:
    if changes.edited and not force:
        error = WrongState(
            f"{', '.join(changes.edited)}: edited by hand since farmhand wrote it",
            remedy="carry the edit over to the farm file or a template of your own, then --force: what "
            "is farmhand's there is written anew",
            detail="".join(difference(c) for c in changes.files if c.path in changes.edited),
        )
        yield "", error


def _basis(farm: Farm) -> str:
    """A digest of all in the farm file that isn't a VM."""
    return hashlib.sha256(plain.dumps(replace(farm, vms={}))).hexdigest()


def _known_apart(farm: Farm, state: NetworkState, vms: Sequence[str]) -> bool:
    """Whether what concerns these VMs can be told without looking at the others. Not so: an admin's own
    templates, which may show any VM anywhere; machines of ssh hosts, which may share an address;
    declared IPv6 addresses, which may be those made for others; a zone whose records are in doubt."""
    live = _record_keeper(farm)
    return (
        len(vms) <= FEW
        and farm.services.templates is None
        and all(host.INFO.virtual for host in farm.hosts.values())
        and not (farm.network.subnet6 and any(vm.address6 for vm in farm.vms.values()))
        and (live is None or state.known)
    )


@dataclass(frozen=True, slots=True)
class _Updates:
    """The changes of a server's records. ``known``: what it has afterwards, of all VMs or of those
    concerned; None: there is no such server."""

    ops: Sequence[records.RecordChange] = ()
    server: records.RecordServer | None = None
    service: str = ""
    known: records.Zones | None = None


def _updates(
    store: StateFile,
    farm: Farm,
    changes: Changes,
    state: NetworkState,
    services: Sequence[str],
    vms: Sequence[str] | None,
    *,
    thorough: bool,
    force: bool,
) -> _Updates:
    """The changes of records. ``thorough``: by what the server has. Else by what was applied last, if
    that is known: then each update's prerequisites tell if it no longer holds. Conflict: something made
    by hand is in the way."""
    keeper = _record_keeper(farm)
    if keeper is None or keeper.NAME not in services:
        return _Updates()
    name = keeper.NAME
    wanted = keeper.records(changes.view)
    server = keeper.record_server(farm)
    new = {change.zone for change in changes.files if change.before is None and change.zone}
    if vms is not None:
        places = [(at, owner) for at, names in wanted.items() for owner in names]
        known = store.records_of(vms, places)
        return _Updates(records.compare(known, wanted), server, name, wanted)
    before = store.records() if state.known else None
    if before is not None and not thorough:
        return _Updates(records.compare(before, wanted), server, name, wanted)
    there = {zone: names for zone, names in wanted.items() if zone not in new}
    ops, trouble = server.judge(before, there, force=force)
    ops = records.ordered(
        [*ops, *records.compare({}, {zone: wanted[zone] for zone in wanted if zone in new})]
    )
    if trouble and not force:
        raise Conflict(
            f"{farm.path.name or farm.farm}: {len(trouble)} records are there by hand: {trouble[0]}",
            remedy="remove them, or take theirs into the farm file; --force overwrites them",
            detail="\n".join(trouble),
        )
    return _Updates(ops, server, name, wanted)


def _record_keeper(farm: Farm) -> RecordKeeper | None:
    return next((keeper for service in used_services(farm) if (keeper := service.live_records)), None)


def _actions(changes: Changes, told: Sequence[ApplyStep], updates: _Updates) -> list[Action]:
    actions = []
    for change in changes.files:
        if change.after is None:
            text = f"remove {change.path}"
        else:
            text = f"{'write' if change.before is None else 'change'} {change.path}"
        edited = " (edited by hand)" if change.path in changes.edited else ""
        actions.append(Action("write", "", text + edited))
    actions += [Action("tell", "", step.text) for step in told]
    return [
        *actions,
        *(Action("tell", "", text) for text in records.summary(updates.ops, updates.service)),
    ]


def _concerned(
    farm: Farm, changes: Changes, vms: Sequence[str] | None, told: Collection[str]
) -> list[Document]:
    """The documents that the checkers look at, also of services that are ``told`` again. For a few VMs:
    without those that no checker reads, and without those that a daemon checks itself before it takes
    them."""
    by_itself = set()
    if vms is not None:
        by_itself = {s.NAME for s in used_services(farm) if s.refuses_by_itself(farm)}
    paths = {change.path for change in changes.files if change.after is not None}
    services = {change.service for change in changes.files} - by_itself | {*told}
    changed = [d for d in changes.documents if d.path in paths and d.service in services]
    # a service that only loses files is checked as well, by its whole configuration
    rest = [d for d in changes.documents if d.service in services and d not in changed and not d.zone]
    return [*changed, *rest]


def _carry_out(
    site: Site,
    entry: Entry[ApplyFacts],
    files: Sequence[FileChange],
    told: Sequence[ApplyStep],
    updates: _Updates,
) -> None:
    keep(site, entry, files)
    done: list[ApplyStep] = []
    written: list[FileChange] = []
    try:
        for change in files:
            entry.step(f"write {change.path}")
            written.append(change)
            put(change)
        for step in told:
            entry.step(step.text)
            done.append(step)
            step.run(site.runner)
        if updates.server is not None:
            entry.note(replace(entry.facts, updates=tuple(updates.ops)))
            updates.server.update(updates.ops, entry.step)
    except Interrupted:
        raise  # undone by the next command, as after a kill
    except Exception as error:
        trouble = undo(site, written, {step.service for step in done}, current_step)
        if trouble:
            trouble.append(f"the old files are in {kept(site, entry.id)}, by the journal's numbers")
        else:
            remove(kept(site, entry.id))
        if isinstance(error, FarmhandError):
            _tell_of_undoing(error, trouble)
        raise


def _tell_of_undoing(error: FarmhandError, trouble: Sequence[str]) -> None:
    state = "; ".join(trouble) if trouble else "every file and daemon is as it was before"
    error.remedy = joined(filter(None, (error.remedy, state)))


def _say_what_is_forgotten(site: Site, store: StateFile) -> None:
    """Warn that an earlier farmhand's state is not read. Live files and records have our mark in them;
    what left the farm file only the state knows."""
    old = site.paths.root / "network.json"
    if old.exists() and not store.path.exists():
        site.reporter.warn(
            f"{old} is an earlier farmhand's and is not read: a file named in it that the farm "
            "file no longer leads to must be removed by hand; then remove it too"
        )


def _record(
    store: StateFile,
    state: NetworkState,
    changes: Changes,
    updates: _Updates,
    *,
    few: bool,
    basis: str,
) -> None:
    dynamic = updates.known is not None
    owners = records.owners(changes.view, updates.known or {})
    if few:
        names = {(op.zone, op.name): op.new for op in updates.ops}
    else:
        names = {(z, n): r for z, found in (updates.known or {}).items() for n, r in found.items()}
    documents = map(noted, changes.documents)
    store.finish(
        files=[document for document in documents if state.files.get(document.path) != document],
        gone=changes.gone,
        serials=changes.serials,
        names={at: (owners.get(at, ""), records) for at, records in names.items()},
        anew=dynamic and not few,
        known=state.known or dynamic,
        basis=basis,
    )
