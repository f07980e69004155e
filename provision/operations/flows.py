"""flow-begin, flow-pass, flow-fail, flow-bisect: experimental flows of a package repository, as
``repositories.flows.change`` has them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from inventory.errors import Call, UsageError, WrongState, some
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.report import Action
from provision.engine.run import Run
from provision.operations.repositories import package_files, take_in
from provision.package_repositories import (
    RepositoryActivity,
    RepositoryFacts,
    opened,
    signing,
    staging,
)
from repositories.change import changing
from repositories.flows.change import FlowChange, FlowTest, may_begin
from repositories.flows.flow import Flow, check_name, unit
from repositories.package import Package
from repositories.repository import Repository
from repositories.staging import Staged

T = TypeVar("T")


class _Begin(RepositoryActivity):
    name = "flow-begin"


class _Pass(RepositoryActivity):
    name = "flow-pass"


class _Fail(RepositoryActivity):
    name = "flow-fail"


class _Bisect(RepositoryActivity):
    name = "flow-bisect"


BEGIN, PASS, FAIL, BISECT = _Begin(), _Pass(), _Fail(), _Bisect()


@dataclass(frozen=True, slots=True)
class FlowResult:
    """``generation``: the one to be tested, or that its channel got; 0: none. ``base``: what it is made
    on. ``fails``: packages that were found out, alone or ``together``. ``named``: what it passes
    without, as long as it isn't known whether that fails alone. ``runs``: so many more, at most, until
    something is found out."""

    repository: str
    flow: str
    channel: str
    state: str
    base: int
    generation: int
    packages: tuple[str, ...] = ()
    url: str = ""
    fails: tuple[str, ...] = ()
    together: bool = False
    named: tuple[str, ...] = ()
    runs: int = 0


def flow_result(
    repository: Repository, flow: Flow, fails: tuple[Package, ...] = (), units: int = 0
) -> FlowResult:
    generation = flow.to_test if flow.state == "open" else flow.result
    url = repository.settings.url
    bisection = flow.bisection
    return FlowResult(
        repository.name, flow.name, flow.channel, flow.state, flow.base, generation,
        tuple(map(str, flow.packages)), f"{url}/generations/{generation}/" if url and generation else "",
        tuple(map(str, fails)), units > 1, bisection.named if bisection else (),
        bisection.most if bisection else 0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FlowBegin(Operation[FlowResult]):
    """Make a candidate for a channel: a generation of what that has and these packages, which nobody
    reads who isn't pointed to it. ``paths``: files, or directories, whose packages are taken. ``build``:
    the record of the build that they came from. ``more``: they come beside those of the flow, if it is
    open; then all of it is to be tested again. ``sums``: the sha256 that each of these files must have;
    without any, nobody knows. ``builds``: in place of ``build``, with ``sums``: of each of these files.

    Errors: NotFound, Unfit, Conflict (an open flow of that name; another file under an identity),
    UsageError, NoSpace."""

    name = "flow-begin"
    repo: str
    flow: str
    channel: str
    paths: tuple[Path, ...]
    component: str = ""
    build: str = ""
    note: str = ""
    more: bool = False
    sums: tuple[str, ...] = ()
    builds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not self.sums or len(self.sums) == len(self.paths)
        assert not self.builds or len(self.builds) == len(self.paths)
        check_name(self.flow)
        if not self.paths:
            raise UsageError(
                "no packages", remedy="name files or directories, such as hello_1_amd64.deb"
            )

    def plan(self, run: Run) -> Plan[FlowResult]:
        site, repository = run.site, opened(run.site.farm, self.repo)
        known = may_begin(repository, self.flow, self.channel, more=self.more)
        files = package_files(repository, self.paths, self.sums, self.component)
        stack = ExitStack()
        with ExitStack() as safe:  # what was staged goes, unless the job is to have it
            place = safe.enter_context(staging(site, repository))
            base = repository.head(self.channel)
            content = take_in(
                run, repository, place, base, f"flow {self.flow}", files, self.builds or self.build
            )  # fmt: skip
            if not site.plan:
                stack = safe.pop_all()
        done = [known] if known else []
        had = {package.sha256 for package in known.packages} if known else set()
        if known and not content.mend and all(i.package.sha256 in had for i in content.add):
            stack.close()
            text = f"{repository.name}: flow {self.flow} has all of them"
            return Plan([alone(job("keep", "", text))], lambda: flow_result(repository, known))

        def go() -> None:
            with stack:
                flow = _changed(
                    run, repository, BEGIN, self.flow,
                    lambda flows: flows.begin(
                        self.flow, self.channel, content.add, by=str(site.requester), note=self.note,
                        more=self.more,
                    ),
                    content.mend,
                )  # fmt: skip
            done.append(flow)
            site.reporter.say(
                f"{repository.name}: flow {flow.name} is to be tested on generation {flow.to_test}, "
                f"{_many(len(flow.packages))} beside generation {flow.base} of {flow.channel}"
            )

        text = f"{repository.name}: flow {self.flow} gets a candidate for {self.channel}"
        jobs = [foretold(*content.lines)] if content.lines else []
        nothing = FlowResult(repository.name, self.flow, self.channel, "", 0, 0)
        return Plan(
            [alone(*jobs, job("build", "", text, go))],
            lambda: flow_result(repository, done[-1]) if done else nothing,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict(Operation[FlowResult]):
    """What becomes of a flow, now that a generation of it was tested. ``generation``: that one; 0: the
    one that is to be tested. ``build``, ``vms``: the build that tested it."""

    repo: str
    flow: str
    generation: int = 0
    build: str = ""
    vms: tuple[str, ...] = ()
    note: str = ""

    def plan(self, run: Run) -> Plan[FlowResult]:
        repository = opened(run.site.farm, self.repo)
        flow = repository.flows.open(self.flow)
        done = [flow_result(repository, flow)]

        def go() -> Sequence[Action]:
            result, action = self.given(run, repository)
            done.append(result)
            return [action]

        return Plan([alone(Job((self.foretold(run, repository, flow),), go))], lambda: done[-1])

    @abstractmethod
    def foretold(self, run: Run, repository: Repository, flow: Flow) -> Action:
        """What it does, in a line."""

    @abstractmethod
    def given(self, run: Run, repository: Repository) -> tuple[FlowResult, Action]:
        """Do it; the line of what it did."""

    def tested(self, run: Run) -> FlowTest:
        return FlowTest(
            by=str(run.site.requester), generation=self.generation, build=self.build, vms=self.vms,
            note=self.note,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowPass(_Verdict):
    """Give a flow's channel what the flow has, by compare-and-swap: where the channel moved meanwhile,
    the candidate is made again on what it has now, and has to be tested again, unless the farm file says
    otherwise (``retest``).

    Errors: NotFound, WrongState (it is over; another generation was tested; to be tested again: then the
    flow has its new candidate), Conflict."""

    name = "flow-pass"

    def foretold(self, run: Run, repository: Repository, flow: Flow) -> Action:
        text = f"flow {flow.name}: {flow.channel} gets {_many(len(flow.packages))}"
        if repository.documents.head(flow.channel) != flow.base:
            text = f"flow {flow.name}: a new candidate, for {flow.channel} moved meanwhile" + (
                "; to be tested again, unless it comes to the same" if _retest(run, repository) else ""
            )
        return Action("promote", "", f"{repository.name}: {text}")

    def given(self, run: Run, repository: Repository) -> tuple[FlowResult, Action]:
        after = _changed(
            run, repository, PASS, self.flow,
            lambda flows: flows.passed(self.flow, self.tested(run), retest=_retest(run, repository)),
        )  # fmt: skip
        if after.state == "open":
            raise WrongState(
                f"{repository.name}: {after.channel} moved to generation {after.base} meanwhile: "
                f"flow {after.name} was put onto that, and is to be tested again on generation "
                f"{after.candidate}",
                remedy=(
                    "test it there, and then: ",
                    Call(
                        "flow-pass", flow=after.name, generation=str(after.candidate),
                        repo=repository.name,
                    ),
                ),
            )  # fmt: skip
        said = f"flow {after.name} passed: {after.channel} is generation {after.result} now"
        run.site.reporter.say(f"{repository.name}: {said}")
        return flow_result(repository, after), Action("promote", "", f"{repository.name}: {said}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowFail(_Verdict):
    """End a flow: its channel gets nothing of it. Errors: NotFound, WrongState."""

    name = "flow-fail"

    def foretold(self, run: Run, repository: Repository, flow: Flow) -> Action:  # noqa: ARG002
        return Action("end", "", f"{repository.name}: flow {flow.name}: it failed, and ends")

    def given(self, run: Run, repository: Repository) -> tuple[FlowResult, Action]:
        after = _changed(
            run, repository, FAIL, self.flow, lambda flows: flows.failed(self.flow, self.tested(run))
        )
        return flow_result(repository, after), self.foretold(run, repository, after)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowBisect(_Verdict):
    """Take a verdict of a flow that fails, and make the next generation to be tested, until it is known
    which packages fail: the flow then goes on without them, with another candidate to be tested.
    ``passed``: the verdict. Errors: NotFound, WrongState, Conflict."""

    name = "flow-bisect"
    passed: bool

    def foretold(self, run: Run, repository: Repository, flow: Flow) -> Action:  # noqa: ARG002
        said = "passed" if self.passed else "failed"
        text = f"flow {flow.name}: generation {flow.to_test} {said}; what is next"
        return Action("build", "", f"{repository.name}: {text}")

    def given(self, run: Run, repository: Repository) -> tuple[FlowResult, Action]:
        before = repository.flows.open(self.flow)
        after, guilty = _changed(
            run, repository, BISECT, self.flow,
            lambda flows: flows.halve(self.flow, self.tested(run), passed=self.passed),
        )  # fmt: skip
        units = len(set(map(unit, guilty)))
        run.site.reporter.say(f"{repository.name}: {_found(before, after, guilty, units)}")
        result = flow_result(repository, after, guilty, units)
        return result, self.foretold(run, repository, before)


def _retest(run: Run, repository: Repository) -> bool:
    """Whether a candidate that is made again is tested again."""
    return run.site.farm.repositories[repository.name].retest


def _found(before: Flow, after: Flow, guilty: tuple[Package, ...], units: int) -> str:
    """What is known now, and what is next."""
    words = [f"flow {after.name}:"]
    if guilty:
        how = "fail together, not alone" if units > 1 else "fails" if len(guilty) == 1 else "fail"
        words.append(f"{some([*map(str, guilty)])} {how};")
    if after.state != "open":
        return " ".join((*words, "nothing else is in it, so it failed"))
    if guilty:
        words.append(f"it goes on without, to be tested on generation {after.candidate}")
        return " ".join(words)
    assert after.bisection
    if named := after.bisection.named:
        if before.bisection is None or before.bisection.named != named:
            words.append(f"without {some(named[:1])} it passes, with it it fails;")
        words.append("whether alone, or together with others, is found next:")
    words.append(f"test generation {after.trial}, {_many(len(after.of_unit(*after.bisection.trial)))};")
    most = after.bisection.most
    words.append(f"at most {most} run{'s' * (most != 1)} more")
    return " ".join(words)


def _changed(
    run: Run,
    repository: Repository,
    activity: RepositoryActivity,
    flow: str,
    change: Callable[[FlowChange], T],
    mend: Sequence[Staged] = (),
) -> T:
    """Have the repository's flows changed, journaled, with its lock held; and damaged files in its pool
    mended."""
    with (
        signing(run.site, repository.name) as signer,
        run.site.journal.begin(activity, [], RepositoryFacts(repository.name)) as entry,
        changing(repository, signer) as changed,
    ):
        entry.step(f"{activity.name}: {repository.name}'s flow {flow}")
        changed.mend(mend)
        return change(FlowChange(repository, changed))


def _many(count: int) -> str:
    return f"{count} package{'s' * (count != 1)}"
