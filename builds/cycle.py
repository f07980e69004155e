"""The build cycle: its steps in their order, one build record, everything left consistent.

The lock ``cycle`` and those of the cycle's VMs are held all through. A second Ctrl-C while the first
is being dealt with gives up on ballooning the VMs down; the record is written in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from builds import page
from builds.again import command, cycle_command, cycle_options
from builds.lineage import Before, look_back, reset_first, vms_of
from builds.machines import Machines
from builds.meter import Meter
from builds.operation import CYCLE, CycleFacts
from builds.plan import (
    batches,
    check,
    check_source,
    choose,
    cycle_of,
    describe,
    plan_cycle,
    source_for,
)
from builds.record import (
    CYCLE_LOCK,
    BuildRecord,
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
from builds.source import RESOLVE_IN_GUEST, Resolved, archive_sha256
from builds.steps import StepFailed, StepLog, StepRun
from inventory.errors import BuildFailed, Busy, FarmhandError, Interrupted, Remedy
from inventory.model import Cycle, ResetStep, Step, TransferStep
from inventory.sizes import format_duration
from provision.engine.locks import lock_of
from provision.site import Site

__all__ = ["plan_cycle", "run_cycle"]

Stream = Callable[[str, bytes], None]
"""Told which VM, and what it printed, as it prints it."""

_SHA256_DIGITS = 64
_TAIL_LINES = 60  # of a step's log, in the record
_DETAIL_LINES = 20  # in the error


def run_cycle(
    site: Site,
    *,
    start_from: str | None = None,
    only: Sequence[str] = (),
    revision: str | None = None,
    keep_going: bool = False,
    stream: Stream | None = None,
) -> BuildRecord:
    """Carry out the farm's build cycle; returns its record if all went well.

    A VM is built on only once it was reset and its disk is proven to be the checkpoint; a cycle that
    uses one before it resets it is refused, where its disk is ours.
    ``start_from`` skips the steps before it: VMs are then taken as they are, which makes sense after a
    failed or interrupted cycle; the record says of which. Such a partial run builds what the skipped
    steps were given, where the VMs tell (``builds.lineage``), and its record says what is not known;
    it is refused where they hold another commit than ``revision``. ``keep_going``: later steps are tried
    after a failed one, but not on a VM whose reset failed.
    ``revision`` is any gitrevisions(7) of the source, in place of the farm file's.

    Raises, before anything is touched: Busy (another cycle, or somebody at work on one of the VMs),
    NotFound, WrongState, Unsupported, UsageError. Afterwards, with the record written: BuildFailed,
    Interrupted.
    """
    cycle = cycle_of(site)
    chosen = choose(cycle, start_from, only)
    steps = [step for step in cycle.steps if step.name in chosen]
    vms = site.vms(sorted({vm for step in steps for vm in vms_of(step)}))
    doing = "cycle" + (f" --revision {revision}" if revision else "")
    site.prepare()
    with _cycle_lock(site, doing), site.locks.hold(*map(lock_of, vms), doing=doing):
        meter = Meter()
        with meter.hypervisor():
            check(site, steps, whole=start_from is None and not only)
        before = look_back(site, cycle, chosen)
        source = source_for(site, before, revision, cycle=cycle, snapshot=True)
        check_source(site.farm, cycle, source)
        options = cycle_options(only=only, revision=revision, keep_going=keep_going)
        build = _Build(
            site, cycle, chosen, before, source, meter,
            options=options, keep_going=keep_going, stream=stream,
        )  # fmt: skip
        # Journaled, so that after a kill the next command brings the VMs' memory down again.
        with site.journal.begin(CYCLE, vms, CycleFacts(build.id)) as entry:
            with asyncio.Runner() as runner:
                runner.run(build.run(vms))
            entry.verdict, entry.why, entry.told = build.verdict()
        return build.conclude()


@contextlib.contextmanager
def _cycle_lock(site: Site, doing: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(site.locks.hold(CYCLE_LOCK, doing=doing))
        except Busy as error:
            holder = site.locks.holder(CYCLE_LOCK)
            raise Busy(
                f"{site.name}: a cycle is running already: {holder}" if holder else error.message,
                remedy=f"watch it: tail -f {site.paths.builds}/last/*.log; or wait until it ends"
                + (f", or end it: kill {holder.pid}" if holder and holder.pid else ""),
            ) from None
        yield


class _Build:
    """One run of the cycle. Everything here happens in one event loop."""

    def __init__(
        self,
        site: Site,
        cycle: Cycle,
        chosen: frozenset[str],
        before: Before,
        source: Resolved | None,
        meter: Meter,
        *,
        options: Sequence[str],
        keep_going: bool,
        stream: Stream | None,
    ) -> None:
        self._site = site
        self._cycle = cycle
        self._chosen = chosen
        self._source = source
        self._meter = meter
        self._keep_going = keep_going
        self._stream = stream
        self._interrupts = 0
        self._trouble: FarmhandError | None = None  # beside any step
        self._under_way: asyncio.Future[None] | None = None
        known = _source_record(site, source, before)
        directory = new_directory(site.paths, known.commit)
        self._steps = {
            step.name: _waiting(number, step, chosen, before)
            for number, step in enumerate(cycle.steps, 1)
        }
        self._record = BuildRecord(
            id=directory.name,
            farm=site.farm.farm,
            result="running",
            started=now(),
            requester=site.requester,
            pid=os.getpid(),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            farm_file=str(site.farm.path),
            options=tuple(options),
            source=known,
            notes=(*(source.notes if source else ()), *before.notes),
            directory=directory,
        )
        self._machines = Machines(site, source, directory, meter, self._note)
        point_last(site.paths, directory.name)

    @property
    def id(self) -> str:
        return self._record.id

    # -- the whole ----------------------------------------------------------------------------

    async def run(self, vms: Sequence[str]) -> None:
        """All steps, then everything put right; the outcome is in the record."""
        self._save()
        with self._signals():
            sums = asyncio.ensure_future(self._checksum())
            try:
                await self._interruptible(self._all(vms))
            finally:
                await self._interruptible(self._put_right(vms))
                await asyncio.wait([sums])
        result = "partial" if self._record.partial else "passed"
        if self._trouble or any(step.status == "failed" for step in self._steps.values()):
            result = "failed"
        if self._interrupts or any(s.status == "interrupted" for s in self._steps.values()):
            result = "interrupted"
        for name, step in self._steps.items():
            if step.status == "waiting":
                self._steps[name] = replace(step, status="skipped")
        self._record = replace(self._record, result=result, ended=now())  # type: ignore[arg-type]
        self._save()
        prune(self._site.paths, self._cycle.keep_records, current=self._record.id)

    def verdict(self) -> tuple[str, str, Mapping[str, object]]:
        """For the journal and those who are told of builds: how it ended, why, and what there is to say
        of the build."""
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
        """The record, or the error that tells how it ended."""
        record = self._record
        if self._trouble is not None:
            raise self._trouble
        bad = [step for step in record.steps if step.status in ("failed", "interrupted")]
        if record.result == "interrupted":
            at = next((s for s in bad if s.status == "interrupted"), None) or next(
                (s for s in record.steps if s.name in self._chosen and s.status == "skipped"), None
            )
            where = f" at step {at.name}" if at else ""
            gone = Interrupted(
                f"interrupted{where}; what ran in the VMs was ended, the record is {record.path}",
                remedy=f"go on from there: {self._again(at.name)}" if at else self._again(""),
            )
            gone.build = record.id
            raise gone
        if bad:
            first = bad[0]
            more = f" (and {len(bad) - 1} more after it)" if len(bad) > 1 else ""
            # of a machine that failed by itself nobody knows that it answers
            look: Remedy = f"look at it: ./invoke status, {command('console', '--vm', first.vm)}"
            if first.failure != "infrastructure":
                look = f"look inside: {command('ssh', '--vm', first.vm)}"
            look = first.remedy or look
            failed = BuildFailed(
                f"step {first.name} failed on {first.vm}, {first.failure}: {first.message}{more}; "
                f"log: {record.directory / first.log}",
                remedy=f"{look}; then go on from there: {self._again(first.name)}",
                detail="\n".join(first.tail.splitlines()[-_DETAIL_LINES:]),
            )
            failed.build = record.id
            raise failed
        return record

    def _again(self, step: str) -> str:
        return cycle_command(step, self._record.options)

    async def _all(self, vms: Sequence[str]) -> None:
        try:
            chosen = [step for step in self._cycle.steps if step.name in self._chosen]
            for vm in vms:
                self._machines.begin(vm, resets=reset_first(chosen, vm))
        except FarmhandError as error:
            self._note(error.message)
            self._trouble = error
            return
        for batch in batches(step for step in self._cycle.steps if step.name in self._chosen):
            going_on = await asyncio.gather(*(self._step(step) for step in batch))
            if not all(going_on) and not self._keep_going:
                return

    async def _put_right(self, vms: Sequence[str]) -> None:
        await self._machines.drop_all()
        await asyncio.gather(*(self._machines.deflate(vm) for vm in vms))

    # -- one step -----------------------------------------------------------------------------

    async def _step(self, step: Step) -> bool:
        """Whether it passed. Only CancelledError leaves it."""
        name, vm = step.name, vms_of(step)[0]
        reporter = self._site.reporter
        number = [s.name for s in self._cycle.steps].index(name) + 1
        began = self._meter.elapsed
        log = StepLog(self._record.directory / self._steps[name].log, vm, self._stream)
        run = StepRun(
            machines=self._machines,
            meter=self._meter,
            environment=self._environment,
            before_run=self._find_commit,
            artifacts=self._record.directory / "artifacts",
            log=log,
        )
        reporter.say(f"step {number}/{len(self._steps)} {name}: {describe(step)}", vm=vm)
        self._change(name, status="running", started=now(), offset=round(began, 3))
        status: Status = "interrupted"
        failure: StepFailed | None = None
        try:
            await run.carry_out(step)
            status = "passed"
        except StepFailed as error:
            # A reset that Ctrl-C stopped in its thread says so itself.
            stopped = isinstance(error.__cause__, Interrupted)
            status, failure = ("interrupted" if stopped else "failed"), error
        finally:
            seconds = self._meter.elapsed - began
            after = f"after {format_duration(seconds)}"
            if failure is not None and status == "failed":
                log.say(f"{name} failed {after}, {failure.failure}: {failure}")
            else:
                log.say(f"{name} {status} {after}")
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
                files=tuple(run.files),
            )
        if failure is not None:
            reporter.warn(f"{name} {status} {after}, {failure.failure}: {failure}", vm=vm)
        else:
            reporter.say(f"{name} passed in {format_duration(seconds)}", vm=vm)
        return status == "passed"

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
        connection = await self._machines.connection(vm)
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
        lines = b"".join(answer).decode(errors="replace").strip().splitlines() or [""]
        commit, _, subject = lines[-1].partition(" ")
        if result.status:
            raise StepFailed(
                "source",
                f"no revision {source.asked!r} at {source.repository}: {lines[-1]}",
                exit=result.status,
            )
        changed = None if not source.previous else source.previous != commit
        self._record = replace(
            self._record, source=replace(source, commit=commit, subject=subject, changed=changed)
        )

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
            vms=tuple(self._machines.records.values()),
            inputs=(
                *(f for f in self._record.inputs if not f.name.startswith("template ")),
                *self._machines.templates.values(),
            ),
            outputs=tuple(f for step in steps for f in step.files if f.path.startswith("artifacts/")),
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
            path=f"git archive --format=tar {source.commit}",
        )  # fmt: skip
        self._record = replace(self._record, inputs=(archive, *self._record.inputs))

    # -- interruption -------------------------------------------------------------------------

    async def _interruptible(self, work: Coroutine[None, None, None]) -> None:
        """Run it to its end, or until a signal cancels it."""
        self._under_way = asyncio.ensure_future(work)
        try:
            await self._under_way
        except asyncio.CancelledError:
            if not self._interrupts:
                raise
        finally:
            self._under_way = None
            self._site.journal.interrupted.clear()

    def _interrupt(self) -> None:
        self._interrupts += 1
        self._site.reporter.warn("interrupted: ending what runs in the VMs")
        self._site.journal.interrupted.set()
        if self._under_way is not None:
            self._under_way.cancel()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the cycle in good order; one that is ignored (``&`` in a script) stays
        so. Only a main thread is told of signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: how for number, how in known.items() if how is not signal.SIG_IGN}
        for number in before:
            loop.add_signal_handler(number, self._interrupt)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)


def _waiting(number: int, step: Step, chosen: frozenset[str], before: Before) -> StepRecord:
    vms = vms_of(step)
    kind = "reset" if isinstance(step, ResetStep) else "transfer" if len(vms) == 2 else "run"
    to = step.to if isinstance(step, (ResetStep, TransferStep)) else ""
    return StepRecord(
        name=step.name,
        kind=kind,
        vm=vms[0],
        to=to,
        status="waiting" if step.name in chosen else "skipped",
        chosen=step.name in chosen,
        done_in=before.done.get(step.name, ""),
        unverified=before.unverified.get(step.name, ""),
        limit=step.timeout,
        log=f"{number:02d}-{step.name}.log",
    )


def _source_record(site: Site, source: Resolved | None, before: Before) -> SourceRecord:
    """Of a partial run whose skipped steps nobody can vouch for: without a commit."""
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
        previous=previous,
        changed=source.commit != previous if previous and source.commit else None,
    )
