"""A run of `build`: the packages of its plan, built in their order, as many side by side as there are
builders. Each has a record; what passed goes into the run's flow, which the next ones install from.

Killed anywhere, nothing is lost: what passed is in its record, and the next run takes it from there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from builds.interrupts import Interrupts
from builds.machines import Machines
from builds.meter import Meter
from builds.packages.commits import since_passed
from builds.packages.downloads import fetched
from builds.packages.in_vm import build_in
from builds.packages.inputs import InstalledPackage
from builds.packages.lookup import EarlierBuild, sums_of
from builds.packages.order import BuildOrder
from builds.packages.packing import pack
from builds.packages.plan import PackagePlan, reasons
from builds.packages.record import (
    ARTIFACTS,
    LOG,
    BuilderRecord,
    PackageAttempt,
    PackageOrigin,
    PackageRecord,
)
from builds.packages.runs import BuildState, RunEntry, RunRecord, RunRecords, flow_of
from builds.packages.versions import again, changes
from builds.record import FileRecord, now
from builds.repository_client import list_name
from builds.step_run import StepFailed, StepLog
from builds.watched_lock import watch
from host.files import make_directory
from host.program import as_typed
from inventory.errors import (
    BuildFailed,
    Call,
    Conflict,
    ConnectionLost,
    FarmhandError,
    Interrupted,
    NoSpace,
    Unfit,
    some,
)
from inventory.sizes import format_duration
from provision.engine.runner import perform
from provision.guest.ssh_connection import in_thread
from provision.operations.flows import FlowBegin, FlowPass
from provision.site import Site

if TYPE_CHECKING:
    from builds.packages.source import SourceState
    from builds.webdav_lock import RemoteLock
    from inventory.model import FailureClass
    from repositories.generation import Generation

_TAIL_LINES = 60  # of a build's log, in its record
_DETAIL_LINES = 20  # in the error
_COUNTED: tuple[BuildState, ...] = ("passed", "taken", "failed", "skipped")
_AGAIN: tuple[FailureClass, ...] = ("infrastructure",)
"""What is tried again: the farm's faults, never the source's."""


@dataclass(slots=True)
class _Task:
    """A build under way, or waiting for another attempt. ``avoid``: builders that failed it."""

    name: str
    record: PackageRecord
    state: SourceState
    avoid: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Flowing:
    """A package's file, on its way into the flow. ``record``: of the build that made it."""

    path: Path
    sha256: str
    record: str


class PackageRun:
    """One run. Everything here happens in one event loop. ``stream``: told which VM, and what it
    printed. ``lock``: that others share, held as long as it runs. ``ended``: told of each record that is
    done."""

    def __init__(
        self,
        site: Site,
        plan: PackagePlan,
        meter: Meter,
        *,
        stream: Callable[[str, bytes], None] | None = None,
        lock: RemoteLock | None = None,
        ended: Callable[[PackageRecord], None] | None = None,
    ) -> None:
        self._site = site
        self._plan = plan
        self._meter = meter
        self._stream = stream
        self._lock = lock
        self._ended = ended
        self._interrupts = Interrupts(site)
        self._trouble: FarmhandError | None = None
        self._runs = RunRecords(site.paths)
        directory = self._runs.begin()
        self.directory = directory
        self._schedule = plan.graph.schedule(plan.wanted)
        self._entries = {
            name: RunEntry(name=name, package=plan.state(plan.graph.builds[name]).name)
            for name in plan.wanted
        }
        self._sums: ChainMap[str, str] = ChainMap({}, dict(plan.channel.sums))
        self._waiting: list[_Task] = []  # for another attempt
        self._flowing: list[_Flowing] = []  # taken from records, and to go into the flow
        self._flow_guard = asyncio.Lock()
        self._used: set[str] = set()  # builders that something was built in
        self._candidate: Generation | None = plan.channel.head
        self._record = RunRecord(
            id=directory.name,
            farm=site.farm.farm,
            result="running",
            started=now(),
            requester=site.requester,
            pid=os.getpid(),
            command=as_typed(sys.argv),
            farm_file=str(site.farm.path),
            revision=plan.revision,
            asked=plan.asked,
            builders=plan.builders,
            repository=plan.channel.repository.name,
            channel=plan.channel.name,
            base=plan.channel.head.sequence if plan.channel.head else 0,
            notes=plan.notes,
            directory=directory,
        )
        self._machines = Machines(site, None, directory, meter, self._note)

    @property
    def id(self) -> str:
        return self._record.id

    @property
    def flow(self) -> str:
        """Its name; there is one as soon as something was built."""
        return flow_of(self.id)

    # -- the whole ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry the plan out. The outcome is in the records."""
        self._save()
        if self._lock is not None:
            await watch(self._lock, self.id, self._tell)
        with self._interrupts.signals():
            try:
                await self._interrupts.until_interrupted(self._all())
            finally:
                await self._interrupts.until_interrupted(self._put_right())
        self._close()

    async def _all(self) -> None:
        try:
            await self._build_all()
            await self._flow_on()
            if self._plan.settings.publish and not self._failed:
                await self._publish()
        except FarmhandError as error:
            self._note(error.message)
            self._trouble = error

    @property
    def _failed(self) -> bool:
        return any(entry.state in ("failed", "skipped") for entry in self._entries.values())

    async def _build_all(self) -> None:
        """Until nothing runs and nothing can be begun."""
        running: dict[asyncio.Task[None], str] = {}
        free = list(self._plan.builders)
        try:
            while True:
                self._take_what_fits()
                for task in self._next(free, running):
                    vm = self._vm_for(task, free)
                    free.remove(vm)
                    running[asyncio.ensure_future(self._attempt(task, vm))] = vm
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    free.append(running.pop(one))
                    one.result()
        finally:
            for one in running:
                one.cancel()
            if running:
                await asyncio.wait(running)

    def _take_what_fits(self) -> None:
        """Take from the records all that can be taken now; what passed may have made more fit."""
        while True:
            taken = [(name, found) for name in self._schedule.ready() if (found := self._fitting(name))]
            if not taken:
                return
            for name, found in taken:
                record = f"{found.key.package}/{found.key.number}"
                self._sums.maps[0].update(sums_of(found.packages))
                self._flowing += self._flowing_of(found.packages, found.paths, record)
                self._schedule.done(name)
                self._change(name, state="taken", number=found.key.number)

    def _fitting(self, name: str) -> EarlierBuild | None:
        package = self._entries[name].package
        asked = self._plan.inputs[name].asked
        return self._plan.earlier.fitting(package, name, asked, self._sums)

    def _next(self, free: list[str], running: Mapping[asyncio.Task[None], str]) -> Iterator[_Task]:
        """What is begun now: as much as there are free builders."""
        room = len(free)
        again_, self._waiting = self._waiting[:room], self._waiting[room:]
        # One that failed here waits for another builder, if one is going to be free.
        held = [task for task in again_ if running and not set(free) - task.avoid]
        again_ = [task for task in again_ if task not in held]
        self._waiting = [*held, *self._waiting]
        yield from again_
        for name in self._schedule.ready()[: max(room - len(again_), 0)]:
            self._schedule.begin(name)
            yield self._new(name)

    def _vm_for(self, task: _Task, free: list[str]) -> str:
        return next((vm for vm in free if vm not in task.avoid), free[0])

    def _new(self, name: str) -> _Task:
        """Begin a build's record."""
        plan, build = self._plan, self._plan.graph.builds[name]
        state, inputs = plan.state(build), plan.inputs[name]
        number, directory = plan.records.begin(state.name)
        record = PackageRecord(
            package=state.name,
            name=name,
            number=number,
            farm=self._record.farm,
            run=self.id,
            result="running",
            started=now(),
            inputs=inputs,
            source=PackageOrigin(
                place=state.place, tree=state.tree, stated=state.stated, when=state.when,
                asked=state.asked, commit=state.commit, subject=state.subject, path=state.path,
            ),
            why=tuple(reasons(plan, name, self._sums)),
            repository=self._record.repository,
            notes=state.notes,
            directory=directory,
        )  # fmt: skip
        record.save()
        return _Task(name, record, state)

    # -- one build ----------------------------------------------------------------------------

    async def _attempt(self, task: _Task, vm: str) -> None:
        """Build it, once. Raises only CancelledError, and what is wrong with this machine (NoSpace)."""
        name, version = task.name, task.record.version
        await self._flow_on()  # what is wrong with it is nothing of this package's
        began = time.monotonic()
        done = self._record_count()
        self._site.reporter.say(f"{name} {version}: {done}", vm=vm)
        self._change(name, state="running", number=task.record.number, vm=vm)
        task.record = replace(task.record, builder=BuilderRecord(vm=vm))  # of one that fails, too
        log = StepLog(task.record.directory / LOG, vm, self._stream)
        failure: StepFailed | None = None
        ended = False
        try:
            task.record = await self._built(task, vm, log)
            ended = True
        except StepFailed as error:
            failure = error
        except FarmhandError as error:
            failure = await self._judged(error, vm)
        finally:
            seconds = round(time.monotonic() - began, 3)
            if not ended and failure is None:
                log.note(f"{name} interrupted after {format_duration(seconds)}")
            elif failure is not None:
                log.note(f"{name} failed, {failure.failure}: {failure}")
            log.close()
            task.record = replace(
                task.record, tail=log.last(_TAIL_LINES), seconds=task.record.seconds + seconds
            )
            if not ended and failure is None:
                self._end(task, "interrupted")
        if failure is None:
            failure = await self._taken_in(task)
        if failure is None:
            self._passed(task)
            return
        if self._may_try_again(task, failure):
            self._set_aside(task, vm, failure, seconds)
            return
        self._lost(task, failure, await in_thread(partial(self._since_passed, task)))

    async def _built(self, task: _Task, vm: str, log: StepLog) -> PackageRecord:
        """Build it in the VM, and fetch what it made. StepFailed, FarmhandError."""
        settings, repository = self._plan.settings, self._plan.channel.repository
        record, state, build = task.record, task.state, self._plan.graph.builds[task.name]
        generation = self._candidate
        runner, wanted = self._site.runner, state.declared.downloads
        downloads = await in_thread(lambda: tuple(fetched(runner, one) for one in wanted))
        source = self.directory / f".{record.package}-{record.number}.tar"
        await in_thread(lambda: pack(runner, state, source))
        try:
            order = BuildOrder(
                name=task.name,
                state=state,
                source=source,
                settings=settings,
                environment={
                    "GIT_REVISION": state.asked, "FARM": self._record.farm,
                    "SOURCE_DATE_EPOCH": str(state.when),
                },
                repository=list_name(repository),
                downloads=downloads,
                profiles=build.target.profiles,
                outside=settings.outside,
                seconds=state.declared.timeout or settings.timeout,
            )  # fmt: skip
            if vm not in self._used:
                self._used.add(vm)
                self._machines.begin(vm, resets=True, root="build")
                await self._machines.inflate(vm)
            task.record = replace(record, generation=generation.sequence if generation else 0)
            done = await build_in(
                self._machines, vm, order, repository, generation, log,
                build=self.id, directory=record.directory, begun=partial(self._begun, task),
            )  # fmt: skip
        finally:
            source.unlink(missing_ok=True)
        return replace(task.record, builder=done.builder, outputs=done.outputs)

    def _begun(self, task: _Task, installed: tuple[InstalledPackage, ...]) -> None:
        inputs = replace(task.record.inputs, installed=installed)
        task.record = replace(task.record, inputs=inputs)

    async def _judged(self, error: FarmhandError, vm: str) -> StepFailed:
        """An error of ours, with its class."""
        failure: FailureClass = "infrastructure"
        if isinstance(error, NoSpace):
            failure = "environment"
        elif isinstance(error, Unfit):
            failure = "source"
        failed = StepFailed(failure, error.message, remedy=error.remedy)
        if failure == "infrastructure":
            failed.console = error.detail or await in_thread(lambda: self._machines.console(vm))
        if isinstance(error, ConnectionLost):
            state = await in_thread(lambda: self._machines.state(vm))
            failed.args = (f"{error.message} ({state})",) if state else failed.args
        return failed

    # -- what becomes of it -------------------------------------------------------------------

    async def _taken_in(self, task: _Task) -> StepFailed | None:
        """Bring what was built into the flow. What keeps it out, if anything does: only then it is known
        to be whole, and to contradict nothing."""
        if other := await in_thread(partial(self._contradicted, task)):
            return self._next_version(task, other)
        try:
            await self._flow_on(self._new_to_channel(task.record))
        except (Unfit, Conflict) as error:
            return StepFailed("source", error.message, remedy=error.remedy)
        return None

    def _new_to_channel(self, record: PackageRecord) -> list[_Flowing]:
        paths = (record.directory / file.path for file in record.packages)
        return self._flowing_of(record.packages, paths, record.id)

    def _contradicted(self, task: _Task) -> PackageRecord | None:
        """An earlier build of this very version, with other bytes. One with the same bytes is noted."""
        record = task.record
        mine = {file.name: file.sha256 for file in record.packages}
        for other in self._plan.records.passed(record.package, record.name):
            if other.version != record.version or other.number == record.number:
                continue
            theirs = {file.name: file.sha256 for file in other.packages}
            if theirs == mine:
                task.record = replace(record, unchanged=other.number)
                return None
            return other
        return None

    def _next_version(self, task: _Task, other: PackageRecord) -> StepFailed:
        """It is to be built once more, under another version; or, by the farm's policy, it can't be."""
        from builds.packages.compare import compared

        used = {key.version for key in self._plan.records.passed_keys(task.record.package)}
        version = again(self._plan.settings.versions, task.state, task.record.version, used)
        differs = compared(other.packages, other.directory, task.record.packages, task.record.directory)
        what = some([str(one) for one in differs][:3], by="; ")
        text = f"version {task.record.version} is build {other.id}'s, of other bytes: {what}"
        if version is None:
            return StepFailed(
                "source", text,
                remedy="give it another version in its source, or let the farm: 'versions: commits'",
            )  # fmt: skip
        task.state = changes(task.state, version)
        inputs = replace(task.record.inputs, version=version, installed=())
        task.record = replace(
            task.record, inputs=inputs, outputs=(),
            notes=(*task.record.notes, f"{text}; built once more as {version}"),
        )  # fmt: skip
        return _OtherVersion(text)

    def _may_try_again(self, task: _Task, failure: StepFailed) -> bool:
        if isinstance(failure, _OtherVersion):
            return True
        tries = sum(one.failure in _AGAIN for one in task.record.attempts)
        return failure.failure in _AGAIN and tries < self._plan.settings.retries

    def _set_aside(self, task: _Task, vm: str, failure: StepFailed, seconds: float) -> None:
        """What this attempt left goes into a directory of its own; another one is to come."""
        number = len(task.record.attempts) + 1
        aside = task.record.directory / f"attempt-{number}"
        make_directory(aside, mode=0o755)
        for name in (LOG, ARTIFACTS):
            with contextlib.suppress(FileNotFoundError):
                (task.record.directory / name).rename(aside / name)
        attempt = PackageAttempt(
            vm=vm, failure=failure.failure, message=str(failure), seconds=seconds, directory=aside.name,
        )  # fmt: skip
        task.record = replace(
            task.record, attempts=(*task.record.attempts, attempt), tail="", console=failure.console
        )
        task.record.save()
        if not isinstance(failure, _OtherVersion):
            task.avoid.add(vm)
        self._site.reporter.warn(f"{task.name}: {failure}; tried again", vm=vm)
        self._change(task.name, state="waiting", vm="")
        self._waiting.append(task)

    def _passed(self, task: _Task) -> None:
        record = task.record
        self._end(task, "passed")
        if record.unchanged:
            text = f"{task.name} {record.version}: the same as build {record.package}/{record.unchanged}"
        else:
            text = f"{task.name} {record.version}: passed in {format_duration(record.seconds)}"
        self._site.reporter.say(text)
        self._sums.maps[0].update(sums_of(record.packages))
        self._schedule.done(task.name)

    def _since_passed(self, task: _Task) -> tuple[str, ...]:
        """What was committed since it last passed, a line each; none where it never did."""
        record = task.record
        passed = next(self._plan.records.passed(record.package, record.name), None)
        if passed is None:
            return ()
        return since_passed(self._site.runner, record, passed, task.state.repository)

    def _lost(self, task: _Task, failure: StepFailed, since: tuple[str, ...]) -> None:
        """``since``: what to look at first, for the record's notes."""
        task.record = replace(
            task.record, failure=failure.failure, message=str(failure), remedy=failure.remedy,
            exit=failure.exit, console=failure.console, notes=(*task.record.notes, *since),
        )  # fmt: skip
        self._end(task, "failed")
        self._site.reporter.warn(f"{task.name} failed, {failure.failure}: {failure}")
        for line in since:
            self._site.reporter.say(f"{task.name}: {line}")
        for name in self._schedule.failed(task.name):
            self._change(name, state="skipped", because=task.name)

    def _end(self, task: _Task, result: str) -> None:
        task.record = replace(task.record, result=result, ended=now())  # type: ignore[arg-type]
        task.record.save()
        self._change(
            task.name, state="passed" if result == "passed" else "failed", message=task.record.message,
            seconds=task.record.seconds, because="; ".join(task.record.why),
        )  # fmt: skip
        if self._ended is not None:
            self._ended(task.record)

    # -- the flow -----------------------------------------------------------------------------

    def _flowing_of(
        self, files: Sequence[FileRecord], paths: Iterable[Path], record: str
    ) -> list[_Flowing]:
        """Those that the channel hasn't got."""
        there = self._plan.channel.files
        return [
            _Flowing(path, file.sha256, record)
            for file, path in zip(files, paths, strict=True)
            if file.sha256 not in there
        ]

    async def _flow_on(self, new: Sequence[_Flowing] = ()) -> None:
        """Bring what was taken from records into the flow, if it isn't there yet, and ``new``. Unfit,
        Conflict: what is new can't be taken."""
        async with self._flow_guard:
            waiting = [*self._flowing, *new]
            if not waiting:
                return
            repository, channel = self._plan.channel.repository, self._plan.channel.name
            begin = FlowBegin(
                repository.name, self.flow, channel, tuple(one.path for one in waiting),
                note=f"build {self.id}", more=True, sums=tuple(one.sha256 for one in waiting),
                builds=tuple(one.record for one in waiting),
            )  # fmt: skip
            done = await in_thread(lambda: perform(self._site, begin))
            self._flowing.clear()
            self._candidate = await in_thread(lambda: repository.documents.read(done.result.generation))
            self._record = replace(self._record, flow=self.flow)
            self._save()

    async def _publish(self) -> None:
        """Give the channel what was built."""
        if not self._record.flow or self._candidate is None:
            return
        if self._lock is not None:
            await asyncio.to_thread(self._lock.check)
        sequence = self._candidate.sequence
        passed = FlowPass(
            repo=self._record.repository, flow=self.flow, generation=sequence, note=f"build {self.id}"
        )
        done = await in_thread(lambda: perform(self._site, passed))
        self._record = replace(self._record, generation=done.result.generation)

    # -- the end ------------------------------------------------------------------------------

    async def _put_right(self) -> None:
        await self._machines.drop_all()
        await asyncio.gather(*map(self._machines.deflate, self._used))

    def _close(self) -> None:
        result = "passed"
        if self._trouble or self._failed:
            result = "failed"
        if self._interrupts.count:
            result = "interrupted"
        for name, entry in self._entries.items():
            if entry.state in ("waiting", "running"):
                self._entries[name] = replace(entry, state="skipped", because=result)
        self._record = replace(self._record, result=result, ended=now())  # type: ignore[arg-type]
        self._save(durable=True)
        self._runs.prune()

    def verdict(self) -> tuple[str, str, Mapping[str, object]]:
        """How it ended, why, and what there is to say of it: for the journal and for subscribers."""
        record = self._record
        told: dict[str, object] = {
            "result": record.result, "seconds": record.seconds, "record": str(record.path),
            "repository": record.repository, "generation": record.generation,
            "packages": {state: record.count(state) for state in _COUNTED}, "failed": None,
        }  # fmt: skip
        if record.result == "passed":
            return "done", "", told
        bad = [entry for entry in record.packages if entry.state == "failed"]
        why = f"{some([one.name for one in bad])} failed" if bad else ""
        if bad:
            first = self._plan.records.read(bad[0].package, bad[0].number)
            told["failed"] = {
                "package": first.name, "vm": first.builder.vm, "class": first.failure,
                "message": first.message,
            }  # fmt: skip
        return record.result, self._trouble.message if self._trouble else why, told

    def conclude(self) -> RunRecord:
        """The record of a run that passed; else raises the error that tells how it ended."""
        record = self._record
        asked = Call("build", package=record.asked) if record.asked else Call("build")
        if record.result == "interrupted":
            raise Interrupted(
                f"interrupted; what was built is kept, the record is {record.path}",
                remedy=("go on from there: ", asked),
            )
        if self._trouble is not None:
            raise self._trouble
        bad = [entry for entry in record.packages if entry.state == "failed"]
        if not bad:
            return record
        first = self._plan.records.read(bad[0].package, bad[0].number)
        skipped = [entry.name for entry in record.packages if entry.state == "skipped"]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        waits = f"; not built for it: {some(skipped)}" if skipped else ""
        raise BuildFailed(
            f"{first.name} {first.version} failed, {first.failure}: {first.message}{more}{waits}; "
            f"log: {first.directory / LOG}",
            remedy=(first.remedy or "mend it", "; then go on from there: ", asked),
            detail="\n".join(first.tail.splitlines()[-_DETAIL_LINES:]),
        )

    # -- record -------------------------------------------------------------------------------

    def _record_count(self) -> str:
        ended = sum(entry.state in ("passed", "taken", "failed") for entry in self._entries.values())
        return f"building, {ended + 1} of {len(self._entries)}"

    def _note(self, text: str) -> None:
        self._record = replace(self._record, notes=(*self._record.notes, text))
        self._site.reporter.warn(text)

    def _tell(self, text: str) -> None:
        self._note(text)
        self._save()

    def _change(self, name: str, **values: object) -> None:
        self._entries[name] = replace(self._entries[name], **values)  # type: ignore[arg-type]
        if values.get("state") != "taken":  # there may be a thousand of these
            self._save()

    def _save(self, *, durable: bool = False) -> None:
        self._record = replace(
            self._record,
            packages=tuple(self._entries.values()),
            **self._meter.shares(),  # type: ignore[arg-type]
        )
        self._record.save(durable=durable)


class _OtherVersion(StepFailed):
    """It was built, and is to be built once more as another version."""

    def __init__(self, text: str) -> None:
        super().__init__("source", text)
