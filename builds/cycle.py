"""A build: the jobs of its plan in their order, one build record, everything left consistent.

A second Ctrl-C, while the first is being dealt with, only skips ballooning the VMs down. The record is
written in any case."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from builds import page
from builds.debugging import Debugger, failed_place
from builds.interrupts import Interrupts
from builds.judged import carry_out
from builds.lineage import Lineage, reset_first
from builds.machines import Machines
from builds.meter import Meter
from builds.plan import BuildJob, BuildPlan, batches, wants_root
from builds.record import (
    BuildRecord,
    Direction,
    FileRecord,
    SourceRecord,
    Status,
    StepRecord,
    load_records,
    new_directory,
    now,
    point_last,
    prune,
)
from builds.repositories import BuildRepositories
from builds.resume import from_step
from builds.source import RESOLVE_IN_GUEST, Resolved, archive_sha256
from builds.step_kind import StepKind
from builds.step_run import StepFailed, StepLog, StepRun
from builds.watched_lock import watch
from host.printable import last_line
from host.program import as_typed
from inventory.errors import BuildFailed, Call, FarmhandError, Interrupted, Remedy
from inventory.sizes import format_duration
from provision.guest.ssh_connection import in_thread
from provision.site import Site

if TYPE_CHECKING:
    from builds.webdav_lock import RemoteLock

_SHA256_DIGITS = 64
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TAIL_LINES = 60  # of a step's log, in the record
_DETAIL_LINES = 20  # in the error


class Build:
    """One run of the cycle: it carries a plan out. Everything here happens in one event loop.

    ``asked``: the call that asks for the same again. ``keep_going``: later steps are tried after a
    failed one. ``stream``: told which VM, and what it printed, as it prints it. ``debugger``: told
    where a step failed, and waited for. ``lock``: that others share, held as long as the build runs."""

    def __init__(
        self,
        site: Site,
        plan: BuildPlan,
        meter: Meter,
        *,
        asked: Call,
        keep_going: bool = False,
        stream: Callable[[str, bytes], None] | None = None,
        debugger: Debugger | None = None,
        lock: RemoteLock | None = None,
    ) -> None:
        self._site = site
        self._plan = plan
        self._source = source = plan.source
        self._meter = meter
        self._keep_going = keep_going
        self._stream = stream
        self._debugger = debugger
        self._lock = lock
        self._interrupts = Interrupts(site)
        self._trouble: FarmhandError | None = None  # beside any step
        self._archive: tuple[FileRecord, ...] = ()
        known = _source_record(site, source, plan.before)
        directory = new_directory(site.paths, known.commit)
        self._steps = {
            step.name: _waiting(number, step, plan) for number, step in enumerate(plan.steps, 1)
        }
        self._record = BuildRecord(
            id=directory.name,
            farm=site.farm.farm,
            result="running",
            started=now(),
            requester=site.requester,
            pid=os.getpid(),
            command=as_typed(sys.argv),
            farm_file=str(site.farm.path),
            asked=asked,
            source=known,
            notes=(*(source.notes if source else ()), *plan.before.notes),
            directory=directory,
        )
        if plan.like is not None:
            note = f"done like build {plan.like.id}: on the generations of repositories that it had"
            self._record = replace(self._record, notes=(*self._record.notes, note))
        self.machines = Machines(site, source, directory, meter, self._note)
        self.repositories = BuildRepositories(site, directory.name, plan.like, plan.before.repositories)
        point_last(site.paths, directory.name)

    @property
    def id(self) -> str:
        return self._record.id

    # -- the whole ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry the plan out. The outcome is in the record."""
        self._save()
        if self._lock is not None:
            await watch(self._lock, self.id, self._lost)
        with self._interrupts.signals():
            beside = [
                asyncio.ensure_future(self._checksum()),
                asyncio.ensure_future(in_thread(self._list)),
            ]
            try:
                await self._interrupts.until_interrupted(self._all())
            finally:
                await self._interrupts.until_interrupted(self._put_right())
                await asyncio.wait(beside)
        try:
            await self._do(self._plan.close)
        finally:
            await in_thread(self.repositories.give_back)

    def close(self) -> None:
        """Write the record's end."""
        result = "partial" if self._record.partial else "passed"
        if self._trouble or any(step.status == "failed" for step in self._steps.values()):
            result = "failed"
        if self._interrupts.count or any(s.status == "interrupted" for s in self._steps.values()):
            result = "interrupted"
        for name, step in self._steps.items():
            if step.status == "waiting":
                self._steps[name] = replace(step, status="skipped")
        self._record = replace(self._record, result=result, ended=now())  # type: ignore[arg-type]
        self._save()
        prune(self._site.paths, self._plan.cycle.keep_records, current=self._record.id)
        self._list()

    def _list(self) -> None:
        """As one of all builds."""
        from builds.pages.write import cycle_began_or_ended  # who waits for the build needs none

        cycle_began_or_ended(self._site)

    def verdict(self) -> tuple[str, str, Mapping[str, object]]:
        """How the build ended, why, and what there is to say of it: for the journal and for
        subscribers."""
        record, step = self._record, self._record.failed_step
        told: dict[str, object] = {
            "result": record.result,
            "partial": record.partial,
            "seconds": record.seconds,
            "repository": record.source.repository,
            "commit": record.source.commit,
            "record": str(record.path),
            "failed": None,
        }
        if step is not None:
            told["failed"] = {
                "step": step.name, "vm": step.vm, "class": step.failure, "message": step.message,
            }  # fmt: skip
        if record.result in ("passed", "partial"):
            return "done", "", told
        why = f"step {step.name}: {step.message or step.status}" if step else ""
        return record.result, self._trouble.message if self._trouble else why, told

    def conclude(self) -> BuildRecord:
        """The record of a build that passed; else raises the error that tells how it ended."""
        record = self._record
        if self._trouble is not None:
            raise self._trouble
        bad = [step for step in record.steps if step.status in ("failed", "interrupted")]
        if record.result == "interrupted":
            at = next((s for s in bad if s.status == "interrupted"), None) or next(
                (s for s in record.steps if s.name in self._plan.chosen and s.status == "skipped"), None
            )
            where = f" at step {at.name}" if at else ""
            gone = Interrupted(
                f"interrupted{where}; what ran in the VMs was ended, the record is {record.path}",
                remedy=("go on from there: ", self._again(at.name)) if at else self._again(""),
            )
            gone.build = record.id
            raise gone
        if bad:
            first = bad[0]
            where = f" on {first.vm}" if first.vm else ""
            more = f" (and {len(bad) - 1} more after it)" if len(bad) > 1 else ""
            # of a machine that failed by itself nobody knows that it answers
            look: Remedy = ("look at it: ", Call("status"), ", ", Call("console", vm=first.vm))
            if not first.vm:
                look = ("look at it: ", Call("log", step=first.name))
            elif first.failure != "infrastructure":
                look = ("look inside: ", Call("ssh", vm=first.vm))
            look = first.remedy or look
            failed = BuildFailed(
                f"step {first.name} failed{where}, {first.failure}: {first.message}{more}; "
                f"log: {record.directory / first.log}",
                remedy=(look, "; then go on from there: ", self._again(first.name)),
                detail="\n".join(first.tail.splitlines()[-_DETAIL_LINES:]),
            )
            failed.build = record.id
            raise failed
        return record

    def _again(self, step: str) -> Call:
        return from_step(self._record.asked, step)

    async def _all(self) -> None:
        plan = self._plan
        chosen = [step for step in plan.steps if step.name in plan.chosen]
        try:
            for vm in plan.vms:
                root = wants_root(self._site, chosen, vm)
                self.machines.begin(vm, resets=reset_first(chosen, vm), root=root)
            await self.machines.ask_for_root()
            await in_thread(lambda: self.repositories.begin(chosen))
        except FarmhandError as error:
            self._note(error.message)
            self._trouble = error
            return
        for batch in batches(plan.jobs):
            going_on = await asyncio.gather(*map(self._do, batch))
            if not all(going_on) and not self._keep_going:
                return

    async def _put_right(self) -> None:
        await self.machines.drop_all()
        await asyncio.gather(*map(self._do, self._plan.give_back))

    async def _do(self, job: BuildJob) -> bool:
        return job.run is None or await job.run(self)

    # -- one step -----------------------------------------------------------------------------

    async def step(self, step: StepKind) -> bool:
        """Carry one step out. Returns whether it passed. Raises only CancelledError."""
        name, vm = step.name, step.first
        reporter = self._site.reporter
        number = self._plan.steps.index(step) + 1
        began = self._meter.elapsed
        limits = self._plan.cycle.limits.but(step.own_limits)
        where = self._record.directory / self._steps[name].log
        log = StepLog(where, vm, self._stream, limits.log_size, partial(reporter.say, vm=vm))
        run = StepRun(
            name=name,
            site=self._site,
            machines=self.machines,
            repositories=self.repositories,
            meter=self._meter,
            limits=limits,
            environment=self._environment,
            before_run=self._find_commit,
            before_publishing=self._check_lock,
            artifacts=self._record.directory / "artifacts",
            log=log,
            made=_flowing(self._steps.values(), "out"),
            failed=next((s.name for s in self._steps.values() if s.status == "failed"), ""),
            remembers=self._debugger is not None,
            details=dict(step.details()),
        )
        reporter.say(f"step {number}/{len(self._steps)} {name}: {step.does()}", vm=vm)
        self._change(name, status="running", started=now(), offset=round(began, 3))
        status: Status = "interrupted"
        failure: StepFailed | None = None
        ended: float | None = None  # before anybody looked into it
        try:
            await carry_out(step, run)
            status = "passed"
        except StepFailed as error:
            # A reset that Ctrl-C stopped in its thread says so itself.
            stopped = isinstance(error.__cause__, Interrupted)
            status, failure = ("interrupted" if stopped else "failed"), error
            ended = self._meter.elapsed
            if status == "failed":
                await self._debug(step, run, failure)
        finally:
            seconds = (self._meter.elapsed if ended is None else ended) - began
            after = f"after {format_duration(seconds)}"
            if failure is not None and status == "failed":
                log.note(f"{name} failed {after}, {failure.failure}: {failure}")
            else:
                log.note(f"{name} {status} {after}")
            if log.trouble:
                self._note(f"{name}: {log.trouble}")
            log.close()
            self._change(
                name,
                status=status,
                seconds=round(seconds, 3),
                exit=failure.exit if failure else run.exit,
                failure=failure.failure if failure and status == "failed" else "",
                message=str(failure) if failure else "",
                remedy=failure.remedy if failure else "",
                console=failure.console if failure else "",
                tail=log.last(_TAIL_LINES),
                ours=tuple(log.ours),
                files=tuple(run.files),
                details=run.details,
            )
        if failure is not None:
            reporter.warn(f"{name} {status} {after}, {failure.failure}: {failure}", vm=vm)
        else:
            reporter.say(f"{name} passed in {format_duration(seconds)}", vm=vm)
        return status == "passed"

    async def _debug(self, step: StepKind, run: StepRun, failure: StepFailed) -> None:
        """Have it looked into, if that was asked for."""
        if self._debugger is None:
            return
        place = await failed_place(step, run, failure)
        if place is not None:
            await self._debugger(place)

    def _environment(self, _vm: str) -> Mapping[str, str]:
        given = self._source.commit if self._source else ""  # also where the record can't vouch for it
        commit = self._record.source.commit or given
        return {
            # git-init(1): a repository can only fetch from one of the same kind
            **({"GIT_DEFAULT_HASH": "sha256"} if len(commit) == _SHA256_DIGITS else {}),
            "GIT_REVISION": commit or self._record.source.asked,
            "BUILD_ID": self._record.id,
            "FARM": self._record.farm,
            "LC_ALL": "C.UTF-8",  # failures are judged by messages, which may be translated
        }

    async def _find_commit(self, vm: str, log: StepLog) -> None:
        """What this machine could not resolve, the VM must; once."""
        source = self._record.source
        if self._source is None or source.commit or source.unverified:
            return
        connection = await self.machines.connection(vm)
        answer: list[bytes] = []

        def keep(data: bytes) -> None:
            answer.append(data)
            log.write(data)

        with self._meter.guest():
            result = await connection.run(
                RESOLVE_IN_GUEST,
                env={"SOURCE_URL": self._source.url, "ASKED": source.asked},
                timeout=600,
                log=keep,
            )
        said = last_line(b"".join(answer).decode(errors="replace"), 300)
        commit, _, subject = said.partition(" ")
        if result.status or not _COMMIT.fullmatch(commit):
            raise StepFailed(
                "source",
                f"no revision {source.asked!r} at {source.repository}: {said}",
                exit=result.status,
            )
        changed = None if not source.previous else source.previous != commit
        self._record = replace(
            self._record, source=replace(source, commit=commit, subject=subject, changed=changed)
        )

    # -- the lock that others share -----------------------------------------------------------

    def _lost(self, text: str) -> None:
        self._note(text)
        self._save()

    async def _check_lock(self) -> None:
        """LeaseLost."""
        if self._lock is not None:
            await asyncio.to_thread(self._lock.check)

    # -- record -------------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self._record = replace(self._record, notes=(*self._record.notes, text))
        self._site.reporter.warn(text)

    def _change(self, name: str, **values: object) -> None:
        self._steps[name] = replace(self._steps[name], **values)  # type: ignore[arg-type]
        self._save()

    def _save(self) -> None:
        steps = tuple(self._steps.values())
        self._record = replace(
            self._record,
            steps=steps,
            vms=tuple(self.machines.records.values()),
            inputs=(
                *self._archive,
                *self.machines.templates.values(),
                *self.machines.packages,
                *_flowing(steps, "in"),
            ),
            outputs=_flowing(steps, "out"),
            repositories=self.repositories.used,
            **self._meter.shares(),  # type: ignore[arg-type]
        )
        self._record.save(durable=self._record.result != "running")
        page.write(self._record)

    async def _checksum(self) -> None:
        source = self._source
        if source is None or source.repository is None or self._record.source.unverified:
            return
        try:
            sha256, size = await asyncio.to_thread(archive_sha256, self._site.runner, source)
        except FarmhandError as error:
            self._note(f"the source's checksum could not be made: {error.message}")
            return
        archive = FileRecord(
            name=f"{source.name}-{source.short}.tar", size=size, sha256=sha256,
            path=f"git archive --format=tar {source.commit}", flow="in",
        )  # fmt: skip
        self._archive = (archive,)


def _flowing(steps: Iterable[StepRecord], flow: Direction) -> tuple[FileRecord, ...]:
    return tuple(file for step in steps for file in step.files if file.flow == flow)


def _waiting(number: int, step: StepKind, plan: BuildPlan) -> StepRecord:
    chosen = step.name in plan.chosen
    return StepRecord(
        name=step.name,
        kind=step.KIND,
        vm=step.first,
        to=step.target,
        status="waiting" if chosen else "skipped",
        chosen=chosen,
        done_in=plan.before.done.get(step.name, ""),
        unverified=plan.before.unverified.get(step.name, ""),
        limit=step.timeout,
        details=step.details(),
        log=f"{number:02d}-{step.name}.log",
    )


def _source_record(site: Site, source: Resolved | None, before: Lineage) -> SourceRecord:
    """The record's source. A partial run has no commit there if nobody can vouch for the skipped
    steps."""
    if source is None:
        return SourceRecord()
    whole = (r.source.commit for r in load_records(site.paths) if r.source.commit and not r.partial)
    previous = next(whole, "")
    if before.why:
        return SourceRecord(
            repository=source.shown, asked=source.asked, previous=previous, unverified=before.why
        )
    return SourceRecord(
        repository=source.shown,
        asked=source.asked,
        commit=source.commit,
        tree=source.tree,
        subject=source.subject,
        branch=source.branch,
        version=source.version,
        previous=previous,
        changed=source.commit != previous if previous and source.commit else None,
    )
