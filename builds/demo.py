"""The demo: an admin's first hour in one command, with nothing in it simulated.

It only calls what the tasks call: doctor's checks, a template, clone-farm, cycle, ssh. Its farm is the
default one unless another is named, whose source is ``examples/kata``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from host.program import ROOT
from inventory.errors import BuildFailed, Call, Remedy, Text, Unsupported, spelled
from inventory.sizes import format_duration, format_size
from provision.engine.report import Action, Outcome, Reporter
from provision.member import Member
from provision.site import Site

if TYPE_CHECKING:
    from provision.operations.clone import CloneResult
    from provision.operations.destroy import DestroyResult

PROGRAM = "kata"
COMMAND = f"{PROGRAM} --version; {PROGRAM} 2026"
"""What prod.rpm installs, and what is run in prod at the end."""

Opener = Callable[[], AbstractContextManager[Site]]


@dataclass(frozen=True, slots=True)
class DemoStage:
    """One part of the demo and how long it took."""

    name: str
    seconds: float
    ok: bool

    def as_dict(self) -> Mapping[str, object]:
        return {"name": self.name, "seconds": round(self.seconds, 2), "ok": self.ok}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What the demo ends with. ``program`` is what the installed program printed inside prod."""

    ok: bool
    stages: tuple[DemoStage, ...]
    vms: tuple[Mapping[str, object], ...]
    build: Mapping[str, object]
    page: Path
    program: str
    problem: str = ""
    remedy: Remedy = ""

    def as_dict(self) -> Mapping[str, object]:
        return {
            "result": "passed" if self.ok else "failed",
            "seconds": round(sum(stage.seconds for stage in self.stages), 2),
            "vms": list(self.vms),
            "steps": [stage.as_dict() for stage in self.stages],
            "build": self.build,
            "artifacts": self.build.get("outputs", []),
            "program": self.program,
            "record": str(self.page),
        }

    def text(self, word: Callable[[Text], str] = spelled) -> str:
        """``word``: how calls are worded."""
        width = max(len(stage.name) for stage in self.stages)
        lines = [f"{stage.name:<{width}}  {format_duration(stage.seconds):>6}" for stage in self.stages]
        total = format_duration(sum(stage.seconds for stage in self.stages))
        lines += [f"{'in all':<{width}}  {total:>6}", ""]
        if self.program:
            lines += [f"{PROGRAM}, run inside prod, says:"]
            lines += [*(f"  {line}" for line in self.program.splitlines()), ""]
        lines += [f"build record: {self.page}", "", "What to type next:"]
        calls = [
            (word(Call("status")), "the two VMs as they are"),
            (word(Call("ssh", vm="prod")), "log in to prod"),
            (word(Call("reset", vm="prod")), f"put prod back to clean: {PROGRAM} is gone"),
            (word(Call("cycle")), "build again"),
            (word(Call("log")), "what was built, from what"),
            (word(Call("demo", destroy=True)), "leave nothing behind"),
        ]
        width = max(len(typed) for typed, _ in calls)
        return "\n".join([*lines, *(f"  {typed:<{width}}  {what}" for typed, what in calls)])


@dataclass(slots=True)
class _Clock:
    reporter: Reporter
    stages: list[DemoStage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        self.reporter.say(text)
        started = time.monotonic()
        ok = False
        try:
            yield
            ok = True
        finally:
            self.stages.append(DemoStage(name, time.monotonic() - started, ok))


def farm_file(farm: str) -> Path:
    """The farm of the demo: the default one unless another is named. Not ./farm.yaml: that is the
    admin's own, and ``demo --destroy`` must never be about it by accident."""
    return Path(farm).expanduser().absolute() if farm else ROOT / "inventory" / "default.yaml"


def run(open_site: Opener, *, stream: Callable[[str, bytes], None]) -> DemoReport:
    """All of it. Errors of the parts as they are; a failed build is a report that isn't ok."""
    from builds.operation import RunCycle
    from builds.record import find_record
    from provision.engine.runner import perform
    from provision.operations import templates as golden
    from provision.operations.clone import CloneFarm
    from provision.status import status

    with open_site() as site:
        clock = _Clock(site.reporter)
        with clock.stage("doctor", "looking at this machine"):
            _examine(site)
        with clock.stage("template", "the template: built once, kept afterwards"):
            for name in dict.fromkeys(t for vm in site.farm.vms if (t := site.farm.template_of(vm))):
                template = golden.ensure_template(site, name)
                site.reporter.say(f"template {template.label}, {format_size(template.size)}")
        names = " and ".join(site.farm.vms)
        with clock.stage("clone-farm", f"cloning {names}, and waiting until they answer"):
            perform(site, CloneFarm())
        with clock.stage("cycle", "the build cycle: reset, build, transfer, install"):
            try:
                build, failure = perform(site, RunCycle(stream=stream)).result.build, None
            except BuildFailed as error:
                if not error.build:
                    raise
                build, failure = error.build, error
            record = find_record(site.paths, build)
        program = ""
        if record.result == "passed":
            with clock.stage("program", f"running {PROGRAM} inside prod"):
                program = _run_program(site)
        vms = tuple(vm.as_dict() for vm in status(site).vms)
        return DemoReport(
            ok=record.result == "passed" and bool(program),
            stages=tuple(clock.stages),
            vms=vms,
            build=record.as_dict(),
            page=record.page,
            program=program,
            problem=failure.message if failure else "",
            remedy=failure.remedy if failure else "",
        )


def plan(open_site: Opener) -> Outcome[CloneResult]:
    """What ``run`` would do."""
    from builds.operation import RunCycle
    from provision.engine.runner import perform
    from provision.operations.clone import CloneFarm

    with open_site() as site:
        cloned, built = perform(site, CloneFarm()), perform(site, RunCycle())
        return replace(cloned, verb="demo", actions=(*cloned.actions, *built.actions))


def destroy(open_site: Opener) -> Outcome[DestroyResult]:
    """The demo farm, its build records go; the image cache stays, and is named."""
    from provision.engine.runner import perform
    from provision.operations.destroy import Destroy

    with open_site() as site:
        outcome = perform(site, Destroy(purge=True))
    return replace(outcome, verb="demo", actions=(*outcome.actions, Action("note", "", kept())))


def kept() -> str:
    """What stays after ``destroy``, in words."""
    from host.paths import cache_dir

    return f"kept: the image cache {cache_dir()}, so that a next demo is quick; remove it if you like"


def _examine(site: Site) -> None:
    from builds.checkup import with_source
    from provision.doctor import short

    report = with_source(short(site.farm.path), site.farm.path, ask=False)
    for check in report.checks:
        if not check.ok and check.level == "note":
            site.reporter.say(f"note: {check.text}")
    if report.problems:
        first = report.problems[0]
        raise Unsupported(f"{first.name}: {first.text}", remedy=first.remedy)


def _run_program(site: Site) -> str:
    """What the installed program prints inside prod, over a connection of its own."""
    import asyncio

    from provision.guest.connection import Connection

    async def ask() -> str:
        async with await Connection.open(Member(site, "prod").endpoint()) as connection:
            return await connection.output(f"set -e; {COMMAND}", timeout=60)

    return asyncio.run(ask()).strip()
