"""A rebuild under way, and what came out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from builds.interrupts import Interrupts
from builds.machines import Machines
from builds.meter import Meter
from builds.packages.compare import compared, explained
from builds.packages.downloads import fetched
from builds.packages.in_vm import BuiltInVm, build_in
from builds.packages.inputs import BuildInputs, InstalledPackage
from builds.packages.order import BuildOrder
from builds.packages.packing import pack
from builds.packages.rebuild_plan import RebuildPlan
from builds.packages.record import LOG, BuilderRecord
from builds.packages.verified import REBUILDS, RebuildResult, Verified
from builds.pages.write import record_changed
from builds.record import now
from builds.repository_client import list_name
from builds.step_run import StepFailed, StepLog
from host.files import file_error, make_directory
from inventory.errors import BuildFailed, Call, FarmhandError, Interrupted
from provision.guest.ssh_connection import in_thread
from provision.site import Site

if TYPE_CHECKING:
    from builds.packages.record import PackageRecord

_DETAIL_LINES = 20
_FEW = 3
_TOLD = ("kernel", "features", "cpus", "memory", "host", "user", "directory", "umask")
"""Of the builder: what may make what is built differ."""


class Rebuilding:
    """One. ``stream``: told which VM, and what it printed."""

    def __init__(
        self, site: Site, plan: RebuildPlan, *, stream: Callable[[str, bytes], None] | None = None
    ) -> None:
        self._site = site
        self._plan = plan
        self._stream = stream
        self._interrupts = Interrupts(site)
        self._notes = list(plan.notes)
        self._failure: StepFailed | None = None
        self._trouble: FarmhandError | None = None
        self._built: BuiltInVm | None = None
        self._began = time.monotonic()
        self._tail = ""
        self.number, self.directory = _begin(plan.record.directory / REBUILDS)
        self._machines = Machines(site, None, self.directory, Meter(), self._note)

    async def run(self) -> None:
        """Carry it out; how it ended tell ``verdict`` and ``conclude``."""
        with self._interrupts.signals():
            try:
                await self._interrupts.until_interrupted(self._build())
            finally:
                await self._interrupts.until_interrupted(self._put_right())

    async def _build(self) -> None:
        plan, machines, vm = self._plan, self._machines, self._plan.vm
        record, declared = plan.record, plan.state.declared
        log = StepLog(self.directory / LOG, vm, self._stream)
        source = self.directory / ".source.tar"
        try:
            await in_thread(partial(pack, self._site.runner, plan.state, source))
            downloads = await in_thread(self._downloads)
            machines.begin(vm, resets=True, root="rebuild")
            await machines.inflate(vm)
            order = BuildOrder(
                name=record.name, state=plan.state, source=source, settings=plan.settings,
                environment=record.builder.environment, repository=list_name(plan.repository),
                profiles=frozenset(record.inputs.profiles), outside=plan.settings.outside,
                downloads=downloads, install=tuple(wanted(record.inputs)),
                seconds=declared.timeout or plan.settings.timeout,
            )  # fmt: skip
            self._built = await build_in(
                machines, vm, order, plan.repository, plan.generation, log, build=self.directory.name,
                directory=self.directory, begun=partial(_check_installed, record),
            )  # fmt: skip
        except StepFailed as error:
            self._failure = error
            log.note(f"failed, {error.failure}: {error}")
        except FarmhandError as error:
            self._trouble = error
            log.note(f"failed: {error.message}")
        finally:
            source.unlink(missing_ok=True)
            self._tail = log.last(_DETAIL_LINES)
            log.close()

    def _downloads(self) -> tuple[Path, ...]:
        declared = self._plan.state.declared.downloads
        return tuple(fetched(self._site.runner, download) for download in declared)

    async def _put_right(self) -> None:
        await self._machines.drop_all()
        await self._machines.deflate(self._plan.vm)

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._site.reporter.warn(text)

    # -- how it ended -------------------------------------------------------------------------

    def verdict(self) -> tuple[str, str, Mapping[str, object]]:
        """How it ended, why, and what there is to say of it: for the journal and for subscribers."""
        failure, trouble = self._failure, self._trouble
        failed: dict[str, object] | None = None
        outcome, why = "done", ""
        if self._interrupts.count:
            outcome = "interrupted"
        elif failure is not None:
            outcome, why = "failed", str(failure)
            failed = {
                "package": self._plan.record.name, "vm": self._plan.vm, "class": failure.failure,
                "message": why,
            }  # fmt: skip
        elif trouble is not None:
            outcome, why = "failed", trouble.message
        result = "passed" if outcome == "done" else outcome
        told = {
            "result": result, "rebuild_of": self._plan.record.id,
            "seconds": round(time.monotonic() - self._began, 3), "directory": str(self.directory),
            "failed": failed,
        }  # fmt: skip
        return outcome, why, told

    def conclude(self, *, verify: bool) -> RebuildResult:
        """What came of it; else raises what tells how it ended."""
        record = self._plan.record
        if self._interrupts.count:
            again = Call("rebuild", build=record.id, verify=verify)
            raise Interrupted("interrupted; nothing is known of it", remedy=("begin again: ", again))
        if self._trouble is not None:
            raise self._trouble
        if self._failure is not None:
            raise BuildFailed(
                f"{record.id} can't be built again: {self._failure.failure}: {self._failure}; log: "
                f"{self.directory / LOG}",
                remedy=self._failure.remedy,
                detail=self._tail,
            )
        assert self._built is not None
        lines: tuple[str, ...] = ()
        if verify:
            lines = tuple(self._compare(record, self._built))
            notes = tuple(self._notes)
            Verified(
                rebuild=self.number, at=now(), identical=not lines, differences=lines, notes=notes
            ).save(record.directory)
            record_changed(self._site, record)
        return RebuildResult(
            build=record.id, rebuild=self.number, directory=str(self.directory), compared=verify,
            differences=lines, notes=tuple(self._notes), files=len(self._built.outputs),
            seconds=round(time.monotonic() - self._began, 3),
        )  # fmt: skip

    def _compare(self, record: PackageRecord, built: BuiltInVm) -> Iterator[str]:
        found = compared(record.outputs, record.directory, built.outputs, self.directory)
        if not found:
            return
        self._notes += builder_differences(record.builder, built.builder)
        found, why = explained(self._site.runner, found, self.directory)
        for each in found:
            yield from each.lines(record.id, "its rebuild")
        self._notes += [f"more in {each.explained}" for each in found if each.explained]
        if why:
            self._notes.append(f"no more is known of it: {why}")


def wanted(inputs: BuildInputs) -> Iterator[str]:
    """What is to be installed, all of it: ``NAME=VERSION``, or ``NAME:ARCHITECTURE=VERSION`` of what is
    of another architecture than is built for."""
    for one in inputs.installed:
        foreign = inputs.format == "deb" and one.architecture not in (inputs.architecture, "all")
        yield f"{one.name}{f':{one.architecture}' if foreign else ''}={one.version}"


def _check_installed(record: PackageRecord, installed: tuple[InstalledPackage, ...]) -> None:
    """StepFailed unless just what was installed then is."""
    differ = list(installed_differences(record.inputs.installed, installed))
    if differ:
        more = f"; and {len(differ) - _FEW} more" if len(differ) > _FEW else ""
        raise StepFailed(
            "dependencies", f"what is installed is not what was: {'; '.join(differ[:_FEW])}{more}"
        )


def installed_differences(
    then: tuple[InstalledPackage, ...], now_: tuple[InstalledPackage, ...]
) -> Iterator[str]:
    """A line each."""
    before, after = _by_name(then), _by_name(now_)
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if one is None or other is None:
            yield f"{name} {(one or other or [''])[0]}: only {'then' if one else 'now'}"
        elif one[0] != other[0]:
            yield f"{name}: {one[0]} then, {other[0]} now"
        elif one[1] and one[1] != other[1]:
            yield f"{name} {one[0]}: of other bytes than then"


def _by_name(installed: tuple[InstalledPackage, ...]) -> Mapping[str, tuple[str, str]]:
    return {f"{one.name}:{one.architecture}": (one.version, one.sha256) for one in installed}


def builder_differences(then: BuilderRecord, now_: BuilderRecord) -> Iterator[str]:
    """What of the builder was otherwise, where the outputs are: there the cause may be."""
    for name in _TOLD:
        one, other = getattr(then, name), getattr(now_, name)
        if name == "features":
            lost, new = set(one.split()) - set(other.split()), set(other.split()) - set(one.split())
            parts = [f"without {' '.join(sorted(lost))}"] if lost else []
            parts += [f"with {' '.join(sorted(new))}"] if new else []
            if parts:
                yield f"the CPU's features: now {', '.join(parts)}"
        elif one != other and one:
            yield f"the builder's {name}: {one} then, {other} now"
    for key in sorted(then.environment.keys() | now_.environment.keys()):
        a, b = then.environment.get(key, "unset"), now_.environment.get(key, "unset")
        if a != b:
            yield f"{key}: {a} then, {b} now"


def _begin(top: Path) -> tuple[int, Path]:
    """Make the next rebuild's directory."""
    make_directory(top, mode=0o755)
    number = 1 + max((int(path.name) for path in top.iterdir() if path.name.isdecimal()), default=0)
    directory = top / str(number)
    try:
        directory.mkdir(mode=0o755)
        directory.chmod(0o755)
    except OSError as error:
        raise file_error(error, directory, "make the directory") from error
    return number, directory
