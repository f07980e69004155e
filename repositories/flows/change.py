"""Experimental flows: packages on their way to a channel, many side by side.

A flow's *candidate* is a generation that no channel points to: that of the channel when it began (its
*base*) and the flow's packages. Its VMs get the URL of exactly that one. Leases keep what it needs,
until it is over. A flow that passed becomes the channel's next generation by compare-and-swap: where
the channel moved meanwhile, the candidate is made again on what it has now, and, unless nobody wants
that, the flow stays open, to be tested again. A batch that failed is halved
(``repositories.flows.bisection``): each trial is a generation of the base and a part of the packages.

Each change goes in three steps: the new generation, its lease, the flow's document that names it. What
is left of the first two, where it got no further, is taken away by ``RepositoryChange.tidy``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from inventory.errors import Call, Conflict, WrongState
from repositories.change import GenerationContent, RepositoryChange
from repositories.flows.bisection import Bisection
from repositories.flows.flow import Flow, FlowRun, check_name
from repositories.generation import Generation, Reason
from repositories.leases import give_back, take
from repositories.package import Package
from repositories.repository import Repository
from repositories.staging import Staged


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowTest:
    """By whom a flow's generation was tested: as in ``FlowRun``. ``generation``: which one; 0: the one
    that is to be tested."""

    by: str
    generation: int = 0
    build: str = ""
    vms: tuple[str, ...] = ()
    note: str = ""


class FlowChange:
    """The flows of a repository whose lock we hold."""

    def __init__(self, repository: Repository, change: RepositoryChange) -> None:
        self._repository = repository
        self._change = change
        self._flows = repository.flows
        self._documents = repository.documents

    def begin(
        self, name: str, channel: str, add: Sequence[Staged], *, by: str, note: str = "", more: bool
    ) -> Flow:
        """Begin a flow of these packages; with ``more``, add them to the one that is open, which then is
        to be tested as a whole, on what the channel has now. Conflict: there is an open one, or another
        file has a package's identity."""
        going_on = may_begin(self._repository, name, channel, more=more)
        base = self._documents.head(channel)
        had = going_on.packages if going_on else ()
        known = {package.sha256 for package in had}
        fresh = [item for item in add if item.package.sha256 not in known]
        if going_on and not fresh:
            return going_on
        made = self._commit(name, channel, base, had, by, fresh)
        packages = (*had, *(item.package for item in fresh))
        if going_on:
            return self._keep(
                replace(
                    going_on,
                    base=base,
                    candidate=made.sequence,
                    packages=packages,
                    bisection=None,
                    trial=0,
                )
            )
        if old := self._flows.find(name):
            self._flows.set_aside(old)
        return self._keep(
            Flow(
                name=name, channel=channel, base=base, candidate=made.sequence, packages=packages,
                by=by, began=_now(), note=note,
            )
        )  # fmt: skip

    def passed(self, name: str, tested: FlowTest, *, retest: bool) -> Flow:
        """Give its channel the flow's packages, if the channel has what they were tested on. Else the
        flow is put onto what it has now; with ``retest`` it stays open, to be tested again, unless that
        comes to what was tested. Conflict, with the flow as it was: it can't be put there."""
        flow = self._tested(name, tested)
        if flow.bisection:
            raise WrongState(
                f"{self._repository.name}: flow {name} failed, and is being bisected: a trial that "
                "passes passes no flow",
                remedy=self._call("flow-bisect", name, passed=True),
            )
        head = self._documents.head(flow.channel)
        ready = self._with_run(flow, tested, passed=True)
        if self._same(head, flow.base):
            return self._publish(ready, tested, head, origin=flow.candidate)
        if not retest:
            with self._onto(flow, head):
                return self._publish(ready, tested, head, take=flow.packages)
        with self._onto(flow, head):
            made = self._commit(flow.name, flow.channel, head, flow.packages, tested.by)
        ready = self._keep(replace(ready, base=head, candidate=made.sequence))
        if self._same(made.sequence, flow.candidate):
            return self._publish(ready, tested, head, origin=made.sequence)
        return ready

    def _publish(
        self, flow: Flow, tested: FlowTest, head: int, *, origin: int = 0, take: Sequence[Package] = ()
    ) -> Flow:
        self._flows.write(flow)  # who tested it is known, also where this gets no further
        note = tested.note or f"flow {flow.name}"
        content = GenerationContent(self._read(head), self._read(origin), take=take)
        reason = Reason("pass", tested.by, note, flow.name)
        made = self._change.commit(flow.channel, content, reason)
        self._change.publish(made, reason, expected=head)
        return self._keep(flow.passed_as(made))

    def failed(self, name: str, tested: FlowTest) -> Flow:
        """End it: its channel gets nothing of it."""
        flow = self._with_run(self._tested(name, tested), tested, passed=False)
        return self._keep(replace(flow, state="failed", ended=_now()))

    def halve(self, name: str, tested: FlowTest, *, passed: bool) -> tuple[Flow, tuple[Package, ...]]:
        """Take the verdict of the generation that was to be tested, and make the next one. Returns, once
        they are known, the packages that fail: the flow goes on without them, and ends as failed if it
        has no other. WrongState: nothing failed, or there is nothing to halve."""
        flow = self._tested(name, tested)
        if not flow.bisection and passed:
            raise WrongState(
                f"{self._repository.name}: flow {name} did not fail, so there is nothing to find",
                remedy=self._call("flow-pass", name),
            )
        if not flow.packages:
            raise WrongState(
                f"{self._repository.name}: flow {name} has no package that {flow.channel} has not: what "
                "fails is there already",
                remedy=Call("repo-log", channel=flow.channel, repo=self._repository.name),
            )
        known = flow.bisection.judged(passed=passed) if flow.bisection else Bisection.of(flow.units)
        flow = self._with_run(flow, tested, passed=passed)
        if not known.done:
            trial = self._made(flow, flow.of_unit(*known.trial), tested.by)
            return self._keep(replace(flow, bisection=known, trial=trial)), ()
        guilty = flow.of_unit(*known.named)
        rest = tuple(package for package in flow.packages if package not in guilty)
        flow = replace(flow, bisection=None, trial=0, out=(*flow.out, *guilty))
        if not rest:
            return self._keep(replace(flow, state="failed", ended=_now())), guilty
        candidate = self._made(flow, rest, tested.by)
        return self._keep(replace(flow, candidate=candidate, packages=rest)), guilty

    # -- steps ---------------------------------------------------------------------------------------

    def _tested(self, name: str, tested: FlowTest) -> Flow:
        """The flow. WrongState: another generation of it was tested than is to be."""
        flow = self._flows.open(name)
        if tested.generation not in (0, flow.to_test):
            raise WrongState(
                f"{self._repository.name}: flow {name} is to be tested on generation {flow.to_test}, "
                f"not on {tested.generation}",
                remedy=("see what changed: ", self._call("flow-show", name)),
            )
        return flow

    def _with_run(self, flow: Flow, tested: FlowTest, *, passed: bool) -> Flow:
        run = FlowRun(
            generation=flow.to_test, passed=passed, at=_now(), by=tested.by, build=tested.build,
            vms=tested.vms, note=tested.note,
        )  # fmt: skip
        # Said again, where a kill cut off what was to follow from it.
        known = flow.runs and replace(flow.runs[-1], at=run.at) == run
        return replace(flow, runs=(*flow.runs[:-1], run) if known else (*flow.runs, run))

    @contextlib.contextmanager
    def _onto(self, flow: Flow, head: int) -> Iterator[None]:
        """Conflict, if the flow can't be put onto what its channel has now."""
        try:
            yield
        except Conflict as error:
            raise Conflict(
                f"{self._repository.name}: {flow.channel} moved to generation {head}, and flow "
                f"{flow.name} can't be put onto that; it stays open: {error.message}",
                remedy=("end it: ", self._call("flow-fail", flow.name)),
            ) from error

    def _made(self, flow: Flow, packages: Sequence[Package], by: str) -> int:
        """The number of a generation of the flow's base and these packages."""
        return self._commit(flow.name, flow.channel, flow.base, packages, by).sequence

    def _commit(
        self,
        name: str,
        channel: str,
        base: int,
        packages: Sequence[Package],
        by: str,
        add: Sequence[Staged] = (),
    ) -> Generation:
        content = GenerationContent(self._read(base), add=add, take=packages)
        return self._change.commit(channel, content, Reason("flow", by, flow=name))

    def _keep(self, flow: Flow) -> Flow:
        """Write it down, with leases of what it needs and of nothing else."""
        for sequence in sorted(flow.needs):
            take(self._repository.layout, sequence, flow.holder)
        self._flows.write(flow)
        give_back(self._repository.layout, flow.holder, but=flow.needs)
        return flow

    def _same(self, one: int, other: int) -> bool:
        """Whether two generations have the same packages."""
        if one == other:
            return True
        first, second = self._read(one), self._read(other)
        return (first.chunks if first else ()) == (second.chunks if second else ())

    def _read(self, sequence: int) -> Generation | None:
        return self._documents.read(sequence) if sequence else None

    def _call(self, task: str, name: str, **flags: bool) -> Call:
        return Call(task, flow=name, repo=self._repository.name, **flags)


def may_begin(repository: Repository, name: str, channel: str, *, more: bool) -> Flow | None:
    """The open flow of that name, which gets ``more``; None: it begins. Conflict, NotFound, UsageError:
    it may not."""
    check_name(name)
    repository.check_channel(channel)
    found = repository.flows.find(name)
    if found is None or found.state != "open":
        return None
    if not more:
        raise Conflict(
            f"{repository.name}: flow {name} is open already",
            remedy=(
                "add to it: ",
                Call("flow-begin", flow=name, to=channel, repo=repository.name, more=True),
                "; or see what it is: ",
                Call("flow-show", flow=name, repo=repository.name),
            ),
        )
    if found.channel != channel:
        raise Conflict(
            f"{repository.name}: flow {name} is open, and aims at {found.channel}",
            remedy="give this one another name",
        )
    return found


def _now() -> datetime:
    return datetime.now(UTC)
