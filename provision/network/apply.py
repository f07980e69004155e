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

For VMs that go, for a farm that does, and for services that the farm file has no more, a service that
fails is said and gone on without: it keeps nobody alive. It is remembered, and told by the next apply
(of a farm that went: by the next destroy). One that runs on with something of ours is an error, at the
end: the status tells that not all is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from host.files import remove
from inventory import plain
from inventory.collector import without_collector
from inventory.errors import (
    Busy,
    Call,
    Conflict,
    FarmhandError,
    Interrupted,
    NotOurs,
    Text,
    WrongState,
    joined,
    some,
)
from inventory.model import Farm
from provision.allocate import Allocation
from provision.engine.journal import Entry, current_step
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, job
from provision.engine.report import Action
from provision.engine.run import Run
from provision.member import Member, members_of, told_without_record
from provision.network import readiness, records
from provision.network.changes import ASIDE, Changes, Examiner, difference
from provision.network.checkers import accepts, refusals
from provision.network.daemons import runs, steps
from provision.network.document import Document
from provision.network.file_change import FileChange
from provision.network.rendered import chosen
from provision.network.rollback import APPLY, ApplyFacts, keep, kept, live_text, put, undo
from provision.network.service import ApplyStep, RecordKeeper, Service, Unserved
from provision.network.service import services as used_services
from provision.network.state import NetworkState, StateFile, noted
from provision.site import Site

T = TypeVar("T")
LOCK = "network"
RECORD = "record what was written"
"""An apply's last step."""
_NOTHING: Mapping[str, Allocation] = {}
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
    ``take_aside``: also keep an admin's files that are in the way, as FILE.before-farmhand; ``destroy``
    puts them back.

    Errors: UsageError (no services), NotOurs, WrongState (edited, without ``force``), TemplateFailed,
    CommandFailed (a checker or daemon refuses; then everything is as before), Busy."""

    name = "network-apply"
    services: tuple[str, ...] = ()
    force: bool = False
    take_aside: bool = False

    def locks(self, _site: Site) -> tuple[str, ...]:
        return (LOCK,)

    @without_collector()
    def plan(self, run: Run) -> Plan[ApplyResult]:
        site, names = run.site, chosen(run.site, self.services)
        given = [member.vm for member in members_of(site) if member.info.virtual]
        give = site.allocator.peek_all if site.plan else site.allocator.allocate_all
        diffs: list[str] = []
        told = told_without_record(site)
        laggards = _Laggards(site, site.farm)
        found = _examine(
            site, diffs, names, give(given, told=told), laggards,
            force=self.force, aside=self.take_aside, thorough=True,
        )  # fmt: skip
        nothing = job("keep", "", f"all files of {', '.join(names)} are as they should be")
        again = Call("network-apply")
        end = Job((), lambda: refuse_if_live(site, "applied", laggards.live(), again))
        return Plan([alone(found or nothing, end)], lambda: ApplyResult("".join(diffs)))


def refuse_if_live(site: Site, done: str, live: Collection[str], again: Call) -> None:
    """WrongState, when all else is done: something of ours that should be gone may still be in use in
    these services. ``again``: what tells them."""
    if live:
        raise WrongState(
            f"{site.name}: {done}, but {some(live)} may still have something live of what is gone",
            remedy=("put right what was said of it, then: ", again),
        )


def in_step(
    run: Run,
    diffs: list[str],
    live: list[str],
    *,
    new: Sequence[str] = (),
    gone: Sequence[str] | None = (),
) -> Job:
    """The jobs for the plans of clone-farm and destroy. What there is to do is known only when the VMs
    have their addresses, and nobody else changes the services. ``diffs`` is given how their files
    differ, then, and ``live`` the services that may still have something of what is gone."""
    if run.site.plan:
        return Job(keep_in_step(run, diffs, live, new=new, gone=gone))
    return Job((), partial(keep_in_step, run, diffs, live, new=new, gone=gone))


@without_collector()
def keep_in_step(
    run: Run,
    diffs: list[str],
    live: list[str],
    *,
    new: Sequence[str] = (),
    gone: Sequence[str] | None = (),
    renamed: Mapping[str, Allocation] = _NOTHING,
) -> tuple[Action, ...]:
    """Bring the services in step: they get the VMs that have allocations, with the ``new`` ones, and
    lose those that are ``gone``. None: the whole farm goes, and takes with it all that it has there.
    ``renamed``: VMs that have, or under a plan are to have, what one that is gone was given. Waits for
    others that do the same. Returns what was done."""
    site = run.site
    used = site.farm.services.used
    if not used and not has_services(site):
        return ()
    allocator = site.allocator
    given = [vm for vm in new if Member(site, vm).info.virtual]
    with contextlib.ExitStack() as stack:
        if not site.plan:
            _patiently(site, stack, run.name)
            allocator.allocate_all(given)
        if gone is None:
            then: Text = "gone on without it: see that it has nothing of the farm's any more"
            laggards = _Laggards(site, site.farm, then)
            found = _leave(site, diffs, laggards)
        else:
            left = allocator.recorded(without=gone)
            if site.plan:
                left = {**left, **allocator.peek_all(given), **renamed}
            then = ("gone on without it; told by the next: ", Call("network-apply"))
            laggards = _Laggards(site, site.farm, then if gone and not new else "")
            found = _examine(site, diffs, used, left, laggards, vms=[*given, *gone, *renamed])
        if found is not None and found.run and not site.plan:
            found.run()
        live += laggards.live()
        return found.actions if found else ()


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


class _Laggards:
    """Services of ``farm`` that can't be brought in step. ``then``: how it goes on all the same; "": it
    doesn't. ``former``: those that the farm file has no more."""

    def __init__(self, site: Site, farm: Farm, then: Text = "") -> None:
        self.services: dict[str, None] = {}
        self.lenient = bool(then)
        self.former: _Laggards | None = None
        self._site, self._farm, self._then = site, farm, then
        self._doubtful: dict[str, None] = {}

    def attempt(self, service: str, work: Callable[..., T], *arguments: Any, **named: Any) -> T | None:
        """The work's result. None: it failed, which is said; the service lags behind."""
        try:
            return work(*arguments, **named)
        except Interrupted:
            raise
        except FarmhandError as error:
            if not self.lenient:
                raise
            self.note(service, error)
            return None

    def note(self, service: str, error: FarmhandError) -> None:
        """Say once why a service lags behind."""
        if service not in self.services:
            self._site.reporter.warn((f"{service}: {error.bare}: ", self._then))
        self.services[service] = None
        if not isinstance(error, NotOurs):  # there nothing is ours any more
            self._doubtful[service] = None

    def settle(self, service: str) -> None:
        """It has nothing of ours any more, whatever failed before."""
        self._doubtful.pop(service, None)

    def live(self) -> tuple[str, ...]:
        """Those that may still have something of ours in use."""
        meant = [service for service in used_services(self._farm) if service.NAME in self._doubtful]
        found = tuple(service.NAME for service in meant if self._is_live(service))
        return (*found, *self.former.live()) if self.former else found

    def _is_live(self, service: Service) -> bool:
        try:
            return service.is_live(self._farm, self._site.runner)
        except FarmhandError:
            return True


def has_services(site: Site) -> bool:
    """Whether anything was ever written for a network service."""
    return StateFile.below(site.paths.root).path.exists()


def _leave(site: Site, diffs: list[str], laggards: _Laggards) -> Job | None:
    """What takes all that is ours out of all services; None: nothing is there. The caller holds the
    lock."""
    store = StateFile.below(site.paths.root)
    state = store.read()
    examiner = Examiner(site.farm, site.identity, state, today=datetime.now(UTC).date())
    changes = _bearable(site, site.farm, examiner.leave(site.allocator.recorded()))
    changes = _bearable(site, _given_up(site, state), changes)
    for text in changes.left:
        site.reporter.warn(f"stays: {text}")
    for name, error in changes.trouble:
        if has_services(site):
            laggards.note(name, error)
        else:
            site.reporter.warn(f"stays: {error.message}")
    for path in changes.edited:
        site.reporter.warn(f"{path}: edited by hand since farmhand wrote it; it goes all the same")
    updates = _Updates()
    if has_services(site) and (keeper := _record_keeper(site.farm)):
        found = laggards.attempt(keeper.NAME, _records_gone, store, state, site.farm, changes)
        updates = found or updates
    untold = _untold(state, changes)
    if not changes.files and not updates.ops and not untold:
        if not site.plan and (state.behind or laggards.live()):
            _record(site, store, state, changes, updates, laggards, leaves=True)
        return None
    diffs += [*map(difference, changes.files), records.difference(updates.ops)]
    told = steps(site.farm, [*changes.files, *untold])
    return _job(site, store, state, changes, updates, told, laggards, basis="", leaves=True)


def _untold(state: NetworkState, changes: Changes) -> list[FileChange]:
    """Files that went already, when their services couldn't be told."""
    going = {change.path for change in changes.files}
    return [
        FileChange(document.service, path, None, None, document.mode, zone=document.zone)
        for path, document in state.files.items()
        if document.service in state.behind and path in changes.gone and path not in going
    ]


def _records_gone(store: StateFile, state: NetworkState, farm: Farm, changes: Changes) -> _Updates:
    used = farm.services.used
    return _updates(store, farm, changes, state, used, None, thorough=False, force=True)


def _bearable(site: Site, farm: Farm | None, changes: Changes) -> Changes:
    """A file that goes is left there, empty, where a daemon's own configuration includes it by name, and
    can't be without it."""
    files = list(changes.files)
    for service in used_services(farm) if farm else ():
        inclusion = service.inclusion()
        texts = {c.path: c.after for c in files if c.service == service.NAME}
        if inclusion is None or texts.get(inclusion.path, "") is not None:
            continue
        emptied = {**texts, inclusion.path: ""}
        if not accepts(site.runner, inclusion, texts) and accepts(site.runner, inclusion, emptied):
            files = [replace(c, after="") if c.path == inclusion.path else c for c in files]
    return replace(changes, files=tuple(files))


def _examine(
    site: Site,
    diffs: list[str],
    services: Sequence[str],
    allocations: Mapping[str, Allocation],
    laggards: _Laggards,
    *,
    force: bool = False,
    aside: bool = False,
    thorough: bool = False,
    vms: Sequence[str] | None = None,
) -> Job | None:
    """What there is to do so that the services have these VMs and no others; None: nothing. The caller
    holds the lock. ``vms``: nothing else came, changed or went since the last time. Where laggards are
    lenient, VMs only go, and what fails, or what services lack, doesn't keep them: it is said, and left
    to the next apply."""
    store = StateFile.below(site.paths.root)
    state = store.read()
    farm = site.farm
    basis = _basis(farm) if {*services} >= {*farm.services.used} else ""
    if vms is not None and not (basis == state.basis and _known_apart(farm, state, vms)):
        vms = None

    def look(*names: str) -> Changes:
        today = datetime.now(UTC).date()
        examiner = Examiner(farm, site.identity, state, today=today, force=force, aside=aside)
        return examiner.examine(allocations, names, vms)

    try:
        changes = look(*services)
    except FarmhandError as error:
        if not laggards.lenient or isinstance(error, Interrupted):
            raise
        services = [name for name in services if laggards.attempt(name, look, name) is not None]
        changes = look(*services)
    changes = _bearable(site, _given_up(site, state), changes)
    lost: tuple[Unserved, ...] = ()
    if laggards.lenient:
        changes = _set_apart(site, laggards, changes, vms)
    else:
        found = _prospects(site, changes, services, vms, force=force)
        for note in found.notes:
            site.reporter.warn(joined((note.message, note.remedy), ". "))
        if found.trouble:
            raise readiness.together(found.trouble)
        lost = found.lost
    mended = {one.step.service for one in lost}
    updates = _Updates()
    if (keeper := _record_keeper(farm)) and keeper.NAME in services:
        arguments = store, farm, changes, state, services, vms
        thorough = thorough and keeper.NAME not in mended  # a zone that isn't served can't be asked yet
        better = laggards.attempt(keeper.NAME, _updates, *arguments, thorough=thorough, force=force)
        updates = better or updates
    again = {*state.behind} & {*services} - mended
    told = steps(farm, [*changes.files, *_once_more(changes, again)])
    known = {step.text for step in told}
    told = (*readiness.mending([one for one in lost if one.step.text not in known]), *told)
    few = vms is not None
    if not changes.files and not updates.ops and not told and not _untold(state, changes):
        if not site.plan and (state.basis != basis or laggards.services):
            _record(site, store, state, changes, updates, laggards, few=few, basis=basis)
        return None
    diffs += [*map(difference, changes.files), records.difference(updates.ops)]
    return _job(site, store, state, changes, updates, told, laggards, basis=basis, few=few)


def _set_apart(site: Site, laggards: _Laggards, changes: Changes, vms: Sequence[str] | None) -> Changes:
    """The changes that can be made; services with trouble lag behind."""
    for name, error in (*changes.trouble, *_edited(changes, force=False)):
        laggards.note(name, error)
    files = tuple(change for change in changes.files if change.path not in changes.edited)
    texts = {change.path: change.after for change in files}
    concerned = _concerned(site.farm, changes, vms, set())
    for name in dict.fromkeys(document.service for document in concerned):
        if name not in laggards.services:
            its = [document for document in concerned if document.service == name]
            laggards.attempt(name, _check, site, its, texts)
    gone = tuple(path for path in changes.gone if path not in changes.edited)
    return replace(changes, files=files, gone=gone)


def _check(site: Site, documents: Sequence[Document], texts: Mapping[str, str | None]) -> None:
    for error in refusals(site.runner, site.farm, documents, texts):
        raise error


def _job(
    site: Site,
    store: StateFile,
    state: NetworkState,
    changes: Changes,
    updates: _Updates,
    every: Sequence[ApplyStep],
    laggards: _Laggards,
    *,
    basis: str,
    few: bool = False,
    leaves: bool = False,
) -> Job:
    """``leaves``: all that is ours goes. Then records are updated before a file is written, as long as
    the server has their zones."""
    told = [step for step in every if leaves or step.service not in laggards.services]
    former = _given_up(site, state)
    last = steps(former, [*changes.files, *_untold(state, changes)]) if former else ()

    @without_collector()
    def act() -> None:
        with site.journal.begin(APPLY, (), ApplyFacts()) as entry:
            new = [d for d in changes.documents if d.path not in state.files]
            store.begin(new, updates=bool(updates.ops))
            _carry_out(site, entry, changes.files, told, updates, laggards, first=leaves)
            if former:
                laggards.former = _Laggards(site, former, "the farm file has it no more: gone on")
                for step in last:
                    entry.step(step.text)
                    laggards.former.attempt(step.service, step.run, site.runner)
            entry.note(replace(entry.facts, complete=True))
            entry.step(RECORD)
            _record(
                site, store, state, changes, updates, laggards, few=few, basis=basis, leaves=leaves
            )  # fmt: skip
            remove(kept(site, entry.id))

    return Job(tuple(_actions(changes, [*told, *last], updates)), act)


def _once_more(changes: Changes, behind: Collection[str]) -> list[FileChange]:
    """Files of services that couldn't be told of them, as if they were new to them."""
    writing = {change.path for change in changes.files}
    return [
        FileChange(d.service, d.path, None, text, d.mode, zone=d.zone)
        for d in changes.documents
        if d.service in behind
        and not d.initial
        and d.path not in writing
        and (text := live_text(d.path)) is not None
    ]


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
    given = [member.vm for member in members_of(site) if member.info.virtual]
    state = StateFile.below(site.paths.root).read()
    examiner = Examiner(site.farm, site.identity, state, today=datetime.now(UTC).date())
    changes = examiner.examine(site.allocator.peek_all(given), used)
    return _prospects(site, changes, used, None)


def _prospects(
    site: Site,
    changes: Changes,
    services: Sequence[str],
    vms: Sequence[str] | None,
    *,
    force: bool = False,
) -> Prospects:
    """For a few VMs only services whose files change are asked, and what only an edit by hand can have
    changed isn't looked at."""
    trouble = [*changes.trouble, *_edited(changes, force=force)]
    lost: list[Unserved] = []
    idle: list[Unserved] = []
    notes: list[FarmhandError] = []
    changing = {change.service for change in changes.files}
    names = {*services} if vms is None else changing
    meant = [service for service in used_services(site.farm) if service.NAME in names]
    files = (*changes.files, *changes.kept)
    trouble += readiness.missing(site.runner, site.farm, meant, files)
    if vms is None:
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
    if force:
        return
    edited = [change for change in changes.files if change.path in changes.edited]
    for name in dict.fromkeys(change.service for change in edited):
        its = [change for change in edited if change.service == name]
        error = WrongState(
            f"{', '.join(change.path for change in its)}: edited by hand since farmhand wrote it",
            remedy=(
                "carry the edit over to the farm file or a template of your own; then ",
                Call("network-apply", force=True),
                " writes anew what is farmhand's there",
            ),
            detail="".join(map(difference, its)),
        )
        yield name, error


def _basis(farm: Farm) -> str:
    """A digest of all in the farm file that isn't a VM."""
    return hashlib.sha256(_without_vms(farm)).hexdigest()


def _without_vms(farm: Farm, former: Farm | None = None, services: Collection[str] = ()) -> bytes:
    """``services``: those that it is to have as ``former`` had them."""
    sections = {name: getattr(former.services, name) for name in services} if former else {}
    return plain.dumps(replace(farm, vms={}, services=replace(farm.services, **sections)))


def _given_up(site: Site, state: NetworkState) -> Farm | None:
    """The farm with the services that it used, and uses no more. None: there are none, or what was known
    of them is another farmhand's."""
    used = site.farm.services.used
    if all(document.service in used for document in state.files.values()):
        return None
    try:
        former = plain.loads(state.applied.encode())
    except ValueError:
        return None
    services = replace(former.services, **dict.fromkeys(used))
    return replace(former, services=services).at(site.farm.path)


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
            remedy=(
                "remove them, or take theirs into the farm file; ",
                Call("network-apply", force=True),
                " overwrites them",
            ),
            detail="\n".join(trouble),
        )
    return _Updates(ops, server, name, wanted)


def _record_keeper(farm: Farm) -> RecordKeeper | None:
    return next((keeper for service in used_services(farm) if (keeper := service.live_records)), None)


def _actions(changes: Changes, told: Sequence[ApplyStep], updates: _Updates) -> list[Action]:
    actions = []
    for change in changes.files:
        if change.path.endswith(ASIDE):
            theirs = change.path.removesuffix(ASIDE)
            text = f"take {theirs} aside" if change.after else f"put the former {theirs} back"
        elif change.after is None:
            text = f"remove {change.path}"
        elif not change.after:
            text = f"leave {change.path} empty, for what includes it"
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
    laggards: _Laggards,
    *,
    first: bool,
) -> None:
    """Daemons that restart come last: with the least that may fail after they were told. ``first``:
    records go first, and then their zones."""
    keeper = _record_keeper(site.farm) if first else None
    keep(site, entry, files)
    done: list[ApplyStep] = []
    written: list[FileChange] = []
    updated: list[records.RecordChange] = []
    down: set[str] = set()

    def write() -> None:
        for change in files:
            entry.step(f"write {change.path}")
            written.append(change)
            laggards.attempt(change.service or change.path, put, change)

    def run(step: ApplyStep) -> bool:
        if step.alive and not runs(site.runner, step.alive):
            down.add(step.service)
        step.run(site.runner)
        return True

    def tell(*, restarts: bool) -> None:
        for step in told:
            if step.restarts == restarts:
                if step.service not in entry.facts.told:
                    entry.note(replace(entry.facts, told=(*entry.facts.told, step.service)))
                entry.step(step.text)
                done.append(step)
                if laggards.attempt(step.service, run, step) and keeper and step.service == keeper.NAME:
                    laggards.settle(step.service)  # its records went with their zones

    def update() -> None:
        if updates.server is not None and updates.ops:
            entry.note(replace(entry.facts, updates=tuple(updates.ops)))
            laggards.attempt(updates.service, updates.server.update, updates.ops, entry.step)
            updated.extend(updates.ops)

    try:
        if first:
            update()
        write()
        tell(restarts=False)
        if not first:
            update()
        tell(restarts=True)
    except Interrupted:
        raise  # undone by the next command, as after a kill
    except Exception as error:
        services = {step.service for step in done}
        trouble = undo(site, written, services, current_step, updates=updated, down=down)
        if trouble:
            trouble.append(f"the old files are in {kept(site, entry.id)}, by the journal's numbers")
        else:
            with contextlib.suppress(FarmhandError):  # the error that led here is the one to show
                entry.note(ApplyFacts())
                remove(kept(site, entry.id))  # not before: recovery would have nothing to put back
        if isinstance(error, FarmhandError):
            _tell_of_undoing(error, trouble)
        raise


def _tell_of_undoing(error: FarmhandError, trouble: Sequence[str]) -> None:
    state = "; ".join(trouble) if trouble else "every file and daemon is as it was before"
    error.remedy = joined(filter(None, (error.remedy, state)))


def _record(
    site: Site,
    store: StateFile,
    state: NetworkState,
    changes: Changes,
    updates: _Updates,
    behind: _Laggards,
    *,
    few: bool = False,
    basis: str = "",
    leaves: bool = False,
) -> None:
    """What is noted of services that run on with what went stays noted, so that they can be told. Of a
    farm that ``leaves``, nothing else does."""
    used, applied, gone = site.farm.services.used, state.applied, changes.gone
    left = behind if leaves else behind.former
    runs_on = left.live() if left else ()
    gone = tuple(at for at in gone if at not in state.files or state.files[at].service not in runs_on)
    basis = "" if behind.services else basis
    if basis:
        applied = _without_vms(site.farm, _given_up(site, state), runs_on).decode()
    keeper = _record_keeper(site.farm)
    in_doubt = keeper is not None and keeper.NAME in behind.services
    dynamic = updates.known is not None and not in_doubt
    owners = records.owners(changes.view, updates.known or {})
    if in_doubt:
        names = {}
    elif few:
        names = {(op.zone, op.name): op.new for op in updates.ops}
    else:
        names = {(z, n): r for z, found in (updates.known or {}).items() for n, r in found.items()}
    documents = map(noted, changes.documents)
    seen = {document.service for document in changes.documents} - {*behind.services}
    before = [name for name in state.behind if name in used and name not in seen]
    late = runs_on if leaves else (*behind.services, *runs_on, *before)
    store.finish(
        files=[document for document in documents if state.files.get(document.path) != document],
        gone=gone,
        serials=changes.serials,
        names={at: (owners.get(at, ""), records) for at, records in names.items()},
        anew=dynamic and not few,
        known=(state.known or dynamic) and not in_doubt,
        basis="" if runs_on else basis,
        applied=applied,
        behind=dict.fromkeys(late),
    )
