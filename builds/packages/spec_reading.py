"""What the specs of rpm packages want and make, as their graph needs it. To read a spec is to run
what it says: rpm does so in a builder VM alone. What it said is kept, by what it was said of."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from builds.interrupts import Interrupts
from builds.machines import Machines
from builds.meter import Meter
from builds.packages.control import BinaryControl, SourceControl
from builds.packages.formats.rpm import SpecFacts, spec_facts
from builds.packages.order import BuildOrder
from builds.packages.packing import pack
from builds.packages.read_cache import ReadCache
from builds.packages.relations import Clause, Relation
from builds.packages.source import SourceState
from builds.packages.sources import PackageSources
from builds.step_run import StepFailed, StepLog
from host.files import make_directory
from inventory.errors import BuildFailed, Call, FarmhandError, Interrupted, some
from inventory.packages import PackageBuilds
from provision.guest.ssh_connection import in_thread
from provision.site import Site

_DETAIL_LINES = 20


@dataclass(frozen=True, slots=True)
class ReadSpecs:
    """The sources with what is known of their specs. ``unread``: names of those of which nothing is."""

    sources: PackageSources
    unread: tuple[str, ...]


class SpecReader:
    """``template``: what the builders' disks are: other macros, other answers."""

    def __init__(self, site: Site, template: str) -> None:
        self._site = site
        self._template = template
        self._path = site.paths.root / "sources" / "specs.json"
        self._cache = ReadCache(self._path)

    def known(self, sources: PackageSources) -> ReadSpecs:
        """With what was read before."""
        states, unread = dict(sources.states), []
        for name, state in sources.states.items():
            if state.format != "rpm":
                continue
            facts = self._cache.get(self._key(state), SpecFacts)
            if facts is None:
                unread.append(name)
            else:
                states[name] = replace(state, control=control_of_spec(name, facts))
        return ReadSpecs(replace(sources, states=states), tuple(unread))

    def read(
        self,
        states: Sequence[SourceState],
        settings: PackageBuilds,
        stream: Callable[[str, bytes], None] | None,
    ) -> None:
        """Have rpm read them in a builder, which is reset first, and keep what it says. BuildFailed: one
        can't be read; Interrupted; what the VM's reset raises."""
        vm, place = settings.all_builders[0], self._path.parent
        self._site.reporter.say(f"reading the specs of {some([one.name for one in states])}", vm=vm)
        make_directory(place, mode=0o700)
        log = StepLog(place / "specs.log", vm, stream)
        machines = Machines(self._site, None, place, Meter(), self._site.reporter.warn)
        interrupts, failed = Interrupts(self._site), list[FarmhandError]()

        async def work() -> None:
            with interrupts.signals():
                try:
                    reading = self._read(machines, vm, states, settings, log, failed)
                    await interrupts.until_interrupted(reading)
                finally:
                    await interrupts.until_interrupted(machines.drop_all())

        try:
            with asyncio.Runner() as runner:
                runner.run(work())
        finally:
            log.close()
            self._cache.save()
        if interrupts.count:
            raise Interrupted("interrupted; nothing was built yet", remedy=Call("build"))
        if failed:
            raise failed[0]

    async def _read(
        self, machines: Machines, vm: str, states: Sequence[SourceState], settings: PackageBuilds,
        log: StepLog, failed: list[FarmhandError],
    ) -> None:  # fmt: skip
        try:
            machines.begin(vm, resets=True, root="build")
            await machines.reset(vm, settings.to, log.say)
            for state in states:
                self._cache.put(self._key(state), await self._facts(machines, vm, state, settings, log))
        except FarmhandError as error:
            failed.append(error)

    async def _facts(
        self, machines: Machines, vm: str, state: SourceState, settings: PackageBuilds, log: StepLog
    ) -> SpecFacts:
        source = self._path.with_name(f".{state.name}-spec.tar")
        try:
            await in_thread(partial(pack, self._site.runner, state, source))
            order = BuildOrder(
                name=state.name, state=state, source=source, settings=settings,
                environment={"SOURCE_DATE_EPOCH": str(state.when)}, repository="",
                seconds=state.declared.timeout or settings.timeout,
            )  # fmt: skip
            with machines.meter.guest():
                return await spec_facts(await machines.connection(vm), order, log)
        except StepFailed as error:
            raise BuildFailed(
                f"{state.name}: its spec can't be read, {error.failure}: {error}",
                remedy=error.remedy or f"see {self._path.with_name('specs.log')}",
                detail=log.last(_DETAIL_LINES),
            ) from error
        finally:
            source.unlink(missing_ok=True)

    def _key(self, state: SourceState) -> str:
        what = (state.tree, state.spec, state.path, self._template, state.declared.options)
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def control_of_spec(name: str, facts: SpecFacts) -> SourceControl:
    """The same as a debian/control would say. Versions don't count: rpm orders them in its own way, and
    refuses in the builder what doesn't fit. Files that are wanted by their paths are the template's."""
    wants = tuple(_clause(text) for text in facts.build_requires)
    provides = tuple(dict.fromkeys(_clause(text) for text in facts.provides))
    binaries = tuple(
        BinaryControl(
            name=package, architectures=("all",), multi_arch="", formula=(), depends={},
            provides=provides if number == 0 else (),
        )
        for number, package in enumerate(facts.packages)
    )  # fmt: skip
    return SourceControl(name, {"BuildRequires": wants}, {}, binaries)


def _clause(text: str) -> Clause:
    """``kata-dev >= 1.0``, ``(one or other)``: the last is a name that nobody makes."""
    words = text.split()
    plain = len(words) in (1, 3) and not text.startswith("(")
    return (Relation(words[0] if plain else text),)
