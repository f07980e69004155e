"""What the specs of rpm packages want and make, as their graph needs it. To read a spec is to run
what it says: rpm does so in a builder VM alone. What it said is kept, by what it was said of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from builds.machines import Machines
from builds.packages.control import BinaryControl, SourceControl
from builds.packages.formats.rpm import SpecFacts, spec_facts
from builds.packages.order import BuildOrder
from builds.packages.read_cache import ReadCache
from builds.packages.relations import Clause, Relation
from builds.packages.source import SourceState
from builds.packages.sources import PackageSources, pack
from builds.step_run import StepLog
from inventory.packages import PackageBuilds
from provision.guest.ssh_connection import in_thread
from provision.site import Site


@dataclass(frozen=True, slots=True)
class ReadSpecs:
    """The sources with what is known of their specs. ``unread``: names of those of which nothing is."""

    sources: PackageSources
    unread: tuple[str, ...]


class SpecReader:
    """``template``: what the builders' disks are: other macros, other answers."""

    def __init__(self, site: Site, template: str) -> None:
        self._template = template
        self._runner = site.runner
        self._cache = ReadCache(_place(site))

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

    async def read(
        self, machines: Machines, vm: str, states: Iterable[SourceState], settings: PackageBuilds,
        log: StepLog, place: Path,
    ) -> None:  # fmt: skip
        """Ask rpm in that VM, which is reset first, and keep what it says. StepFailed, FarmhandError."""
        await machines.reset(vm, settings.to, log.say)
        for state in states:
            source = place / f".{state.name}-spec.tar"
            try:
                await in_thread(partial(pack, self._runner, state, source))
                order = BuildOrder(
                    name=state.name, state=state, source=source, settings=settings,
                    environment={"SOURCE_DATE_EPOCH": str(state.when)}, repository="",
                    seconds=state.declared.timeout or settings.timeout,
                )  # fmt: skip
                with machines.meter.guest():
                    facts = await spec_facts(await machines.connection(vm), order, log)
            finally:
                source.unlink(missing_ok=True)
            self._cache.put(self._key(state), facts)
            self._cache.save()

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


def _place(site: Site) -> Path:
    return site.paths.root / "sources" / "specs.json"


def known_specs(site: Site, sources: PackageSources, template: str) -> ReadSpecs:
    return SpecReader(site, template).known(sources)
