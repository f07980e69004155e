"""Experimental flows of a repository: side by side, by compare-and-swap, killed anywhere."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from threading import Barrier, Thread

import pytest
from repo_tree import RepoTree, check_repository, make_deb

from inventory.errors import Conflict, FarmhandError, NotFound, UsageError, WrongState
from repositories.change import GenerationContent, changing, recover
from repositories.collect import Retention, collect, survey
from repositories.flows.change import FlowChange, FlowTest
from repositories.flows.flow import Flow
from repositories.generation import Reason, later_than
from repositories.leases import leases
from repositories.repository import Repository

HERE = FlowTest(by="tests")


def changed(repository: Repository, change: Callable[[FlowChange], object]) -> object:
    with changing(repository) as under_way:
        return change(FlowChange(repository, under_way))


def begin(tree: RepoTree, name: str, *debs: tuple[str, str], more: bool = False, salt: str = "") -> Flow:
    """A flow with these packages: names and versions. ``salt``: so that their content is another."""
    with tree.repository.staging() as staging:
        add = []
        for package, version in debs:
            path = tree.scratch / "in" / f"{package}_{version}_all.deb"
            path.write_bytes(make_deb(package, version, len(salt)))
            add.append(staging.take(path, component="main"))
        flow = changed(
            tree.repository,
            lambda flows: flows.begin(name, "tested", add, by="tests", more=more),
        )
    assert isinstance(flow, Flow)
    return flow


def passed(repository: Repository, name: str, *, retest: bool = True, generation: int = 0) -> Flow:
    tested = FlowTest(by="tests", generation=generation)
    flow = changed(repository, lambda flows: flows.passed(name, tested, retest=retest))
    assert isinstance(flow, Flow)
    return flow


def versions(repository: Repository, sequence: int) -> set[str]:
    found = repository.packages(repository.documents.read(sequence))
    return {f"{package.name} {package.version}" for package in found}


def leased(repository: Repository) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for lease in leases(repository.layout):
        found.setdefault(lease.holder, set()).add(lease.generation)
    return found


def whole(repository: Repository, *, also: Collection[int] = ()) -> None:
    """All that readers find is right; no generation or lease is there that nobody knows of. ``also``:
    known ones, such as candidates that others took the place of."""
    check_repository(repository.layout.top)
    logged = {e.sequence for channel in repository.settings.channels
              for e in repository.documents.log(channel)}  # fmt: skip
    flows = list(repository.flows.all())
    known = logged | {number for flow in flows for number in (flow.candidate, flow.trial, flow.base)}
    known |= {run.generation for flow in flows for run in flow.runs}
    assert set(repository.documents.sequences()) <= known | {*also}
    assert leased(repository) == {f.holder: set(f.needs) for f in flows if f.needs}


@pytest.fixture
def tree(tmp_path: Path) -> RepoTree:
    made = RepoTree(tmp_path / "repository")
    made.publish("tested", ("base", make_deb("base")))
    return made


def test_a_flow_is_seen_by_nobody_until_it_passes(tree: RepoTree) -> None:
    repository = tree.repository
    flow = begin(tree, "one", ("hello", "1.0"), ("world", "1.0"))
    assert (flow.base, flow.candidate, flow.state) == (1, 2, "open")
    assert repository.documents.head("tested") == 1
    assert versions(repository, 2) == {"base 1.0", "hello 1.0", "world 1.0"}
    assert leased(repository) == {"flow one": {1, 2}}
    done = passed(repository, "one")
    assert (done.state, done.result) == ("passed", 3)
    assert repository.documents.head("tested") == 3
    assert versions(repository, 3) == versions(repository, 2)
    assert [(run.generation, run.passed, run.by) for run in done.runs] == [(2, True, "tests")]
    last = repository.documents.log("tested")[-1]
    assert (last.verb, last.note) == ("pass", "flow one")
    before, after = (repository.documents.read(number).date for number in (1, 3))
    assert after > before, "apt takes no older one"
    with pytest.raises(WrongState, match="flow one is over: it passed as generation 3"):
        passed(repository, "one")
    whole(repository)


def test_where_the_channel_moved_it_is_tested_again_on_what_that_has(tree: RepoTree) -> None:
    repository = tree.repository
    for name in ("one", "two", "three"):
        begin(tree, name, (name, "1.0"))
    assert passed(repository, "one").result == 5
    again = passed(repository, "two")
    assert (again.state, again.base, again.candidate) == ("open", 5, 6)
    assert versions(repository, 6) == {"base 1.0", "one 1.0", "two 1.0"}
    assert leased(repository)["flow two"] == {5, 6}
    with pytest.raises(WrongState, match="is to be tested on generation 6, not on 3"):
        passed(repository, "two", generation=3)
    assert passed(repository, "two", generation=6).result == 7
    third = passed(repository, "three", retest=False)
    assert third.state == "passed", "nobody wants another test"
    assert versions(repository, third.result) == {"base 1.0", "one 1.0", "two 1.0", "three 1.0"}
    whole(repository)


def test_what_was_tested_already_is_not_tested_again(tree: RepoTree) -> None:
    """The channel moved, but the candidate on what it has now is what was tested."""
    repository = tree.repository
    begin(tree, "all", ("one", "1.0"), ("two", "1.0"))
    begin(tree, "part", ("one", "1.0"))
    assert passed(repository, "part").state == "passed"
    assert passed(repository, "all").state == "passed"
    assert begin(tree, "later", ("new", "1.0")).base == repository.documents.head("tested")
    with changing(repository) as change:  # rolled back, and forth
        head = repository.head("tested")
        assert head
        for origin in (repository.documents.read(1), head):
            now = repository.documents.head("tested")
            reason = Reason("roll back", "tests")
            made = change.commit("tested", GenerationContent(head, origin), reason)
            change.publish(made, reason, expected=now)
    assert passed(repository, "later").state == "passed"
    whole(repository)


def test_what_contradicts_what_came_meanwhile_stays_open(tree: RepoTree) -> None:
    repository = tree.repository
    begin(tree, "one", ("hello", "1.0"))
    begin(tree, "two", ("hello", "1.0"), salt="another")
    passed(repository, "one")
    before = repository.flows.read("two")
    with pytest.raises(Conflict) as caught:
        passed(repository, "two")
    assert "tested moved to generation 4, and flow two can't be put onto that" in caught.value.message
    assert "there is another hello 1.0 all in kata" in caught.value.message
    assert repository.flows.read("two") == before
    whole(repository)


def test_a_name_is_of_one_flow_at_a_time(tree: RepoTree) -> None:
    repository = tree.repository
    first = begin(tree, "one", ("hello", "1.0"))
    with pytest.raises(Conflict, match="flow one is open already"):
        begin(tree, "one", ("world", "1.0"))
    more = begin(tree, "one", ("world", "1.0"), more=True)
    assert [package.name for package in more.packages] == ["hello", "world"]
    assert versions(repository, more.candidate) == {"base 1.0", "hello 1.0", "world 1.0"}
    assert begin(tree, "one", ("world", "1.0"), more=True) == more, "it has that"
    changed(repository, lambda flows: flows.failed("one", HERE))
    assert leased(repository) == {}
    again = begin(tree, "one", ("hello", "1.0"), more=True)
    assert (again.state, len(again.packages)) == ("open", 1)
    assert [(flow.state, flow.began) for flow in repository.flows.all()] == [
        ("failed", first.began), ("open", again.began),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no name of a flow"):
        begin(tree, "../one", ("hello", "1.0"))
    with pytest.raises(NotFound, match="has no flow two: it has one"):
        passed(repository, "two")
    whole(repository, also=(first.candidate,))


def halve(repository: Repository, name: str, fails: set[str]) -> tuple[list[int], set[str]]:
    """Test and halve until something is found. Returns the generations tested, and what is found."""
    tested = []
    while True:
        flow = repository.flows.open(name)
        tested.append(flow.to_test)
        have = {package.partition(" ")[0] for package in versions(repository, flow.to_test)}
        said = FlowTest(by="tests", generation=flow.to_test)
        _, found = changed(  # type: ignore[misc]
            repository,
            lambda flows: flows.halve(name, said, passed=not fails <= have),  # noqa: B023
        )
        if found:
            return tested, {package.name for package in found}


def test_a_batch_that_fails_is_halved_and_goes_on_without(tree: RepoTree) -> None:
    repository = tree.repository
    names = [f"p{number:02}" for number in range(8)]
    begin(tree, "batch", *((name, "1.0") for name in names))
    tested, found = halve(repository, "batch", {"p05"})
    assert found == {"p05"}
    assert len(tested) <= 1 + 3 + 1, "it failed; ceil(log2 8) more; and alone"
    flow = repository.flows.open("batch")
    assert {package.name for package in flow.packages} == {*names} - {"p05"}
    assert flow.out[0].name == "p05"
    assert versions(repository, flow.candidate) == {
        "base 1.0",
        *(f"{n} 1.0" for n in names if n != "p05"),
    }
    whole(repository)
    _, found = halve(repository, "batch", {"p01", "p06"})
    assert found == {"p01", "p06"}, "together"
    assert passed(repository, "batch").state == "passed"
    assert versions(repository, repository.documents.head("tested")) == {
        "base 1.0", "p00 1.0", "p02 1.0", "p03 1.0", "p04 1.0", "p07 1.0",
    }  # fmt: skip
    whole(repository)


def test_what_is_halved_passes_by_no_trial_and_one_alone_is_found_at_once(tree: RepoTree) -> None:
    repository = tree.repository
    begin(tree, "batch", ("pa", "1.0"), ("pb", "1.0"))
    with pytest.raises(WrongState, match="did not fail"):
        changed(repository, lambda flows: flows.halve("batch", HERE, passed=True))
    changed(repository, lambda flows: flows.halve("batch", HERE, passed=False))
    with pytest.raises(WrongState, match="is being bisected: a trial that passes passes no flow"):
        passed(repository, "batch")
    begin(tree, "single", ("pc", "1.0"))
    tested, found = halve(repository, "single", {"pc"})
    assert (len(tested), found) == (1, {"pc"})
    assert repository.flows.read("single").state == "failed"
    whole(repository)


def test_packages_of_one_source_stay_together(tree: RepoTree) -> None:
    repository = tree.repository
    flow = begin(tree, "batch", ("pa", "1.0"), ("pb", "1.0"), ("pc", "1.0"))
    same = tuple(type(p)(**{f: getattr(p, f) for f in p.__slots__} | {"source": "src"})
                 for p in flow.packages[:2])  # fmt: skip
    both = type(flow)(**{f: getattr(flow, f) for f in flow.__slots__}
                      | {"packages": (*same, flow.packages[2])})  # fmt: skip
    assert both.units == ("src", "pc")
    with changing(repository):
        repository.flows.write(both)
    _, found = halve(repository, "batch", {"pb"})
    assert found == {"pa", "pb"}


def test_what_a_flow_needs_is_never_collected(tree: RepoTree) -> None:
    repository = tree.repository
    begin(tree, "kept", ("hello", "1.0"))
    for number in range(3):
        tree.publish("tested", (f"x{number}", make_deb(f"x{number}")))
    with changing(repository) as change:
        now = later_than(later_than(None))
        found = survey(repository, Retention(last=1, age=0), now, {})
        collect(change, found)
    assert {1, 2} <= set(repository.documents.sequences())
    assert "flow kept uses it" in found.kept[2]
    assert versions(repository, 2) == {"base 1.0", "hello 1.0"}


def test_what_a_flow_had_stays_until_it_is_collected(tree: RepoTree) -> None:
    """A build's record may name it: what comes next takes it away neither."""
    repository = tree.repository
    begin(tree, "one", ("hello", "1.0"))
    halve(repository, "one", {"hello"})
    begin(tree, "two", ("world", "1.0"))
    changed(repository, lambda flows: flows.failed("two", HERE))
    for _ in range(2):
        recover(repository)
    assert repository.documents.sequences() == (1, 2, 3)
    begin(tree, "two", ("more", "1.0"))
    assert repository.documents.sequences() == (1, 2, 3, 4)
    whole(repository)


def test_of_two_that_pass_at_once_one_is_put_onto_the_other(tree: RepoTree) -> None:
    repository = tree.repository
    for name in ("one", "two"):
        begin(tree, name, (name, "1.0"))
    start, ends = Barrier(2), {}

    def go(name: str) -> None:
        own = Repository(repository.settings)
        start.wait()
        ends[name] = passed(own, name)

    threads = [Thread(target=go, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(flow.state for flow in ends.values()) == ["open", "passed"]
    (first,) = (name for name, flow in ends.items() if flow.state == "passed")
    (second,) = {"one", "two"} - {first}
    assert versions(repository, ends[second].candidate) == {"base 1.0", "one 1.0", "two 1.0"}
    assert repository.documents.head("tested") == ends[first].result
    whole(Repository(repository.settings))


_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.symlink", "os.rmdir"}


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do it in a child that is killed before its change of that number to the file system. Returns
    whether it was killed."""
    child = os.fork()
    if not child:
        count = 0

        def look(event: str, _args: object) -> None:
            nonlocal count
            if event in _CHANGES:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        try:
            work()
        except BaseException:  # noqa: BLE001 - a child of a test ends here, whatever it is
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def _begun(tree: RepoTree) -> None:
    begin(tree, "new", ("new", "1.0"))


def _passed(tree: RepoTree) -> None:
    passed(tree.repository, "batch")


def _put_onto(tree: RepoTree) -> None:
    passed(tree.repository, "late")


def _failed(tree: RepoTree) -> None:
    changed(tree.repository, lambda flows: flows.failed("late", HERE))


def _halved(tree: RepoTree) -> None:
    changed(tree.repository, lambda flows: flows.halve("batch", HERE, passed=False))


@pytest.mark.parametrize("work", [_begun, _passed, _put_onto, _failed, _halved])
def test_killed_at_any_change_it_is_old_or_new(
    tmp_path: Path, tree: RepoTree, work: Callable[[RepoTree], None]
) -> None:
    begin(tree, "late", ("late", "1.0"))
    tree.publish("tested", ("more", make_deb("more")))
    begin(tree, "batch", ("pa", "1.0"), ("pb", "1.0"), ("pc", "1.0"))
    step = 1 if os.environ.get("FARMHAND_KILLS") == "many" else 9
    ends: set[tuple[object, ...]] = set()
    number = 1
    while True:
        place = tmp_path / "killed"
        shutil.copytree(tree.scratch, place, symlinks=True)
        shutil.rmtree(place / "in")  # made with it
        again = RepoTree(place)
        killed = killed_at(number, lambda: work(again))  # noqa: B023
        repository = Repository(again.repository.settings)
        recover(repository)
        whole(repository)
        ends.add(
            (
                repository.documents.head("tested"),
                *sorted(
                    (f.name, f.state, f.bisection is not None, f.base) for f in repository.flows.all()
                ),
            )
        )
        begin(again, "after", ("after", "1.0"))
        shutil.rmtree(place)
        if not killed:
            break
        number += step
    assert number > step, "it was killed"
    assert len(ends) == 2, ends


def test_a_damaged_document_is_told_and_stops_nobody_else(tree: RepoTree) -> None:
    repository = tree.repository
    begin(tree, "one", ("hello", "1.0"))
    repository.layout.flow("one").write_bytes(b'{"name": "one"')
    with pytest.raises(WrongState, match="the document of flow one, is damaged"):
        repository.flows.read("one")
    tree.publish("tested", ("more", make_deb("more")))
    recover(repository)
    assert leased(repository) == {"flow one": {1, 2}}, "what it needs is not known"
    repository.layout.flow("one").unlink()
    recover(repository)
    assert leased(repository) == {}
    with pytest.raises(FarmhandError):
        repository.flows.read("one")
