"""Operations and activities: what there is, what each can, and whose its locks are."""

from __future__ import annotations

import ast
import inspect
import json
import threading
from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import TypeAdapter
from test_farm import MIB, Desk

from inventory.errors import Busy, Interrupted, Several, UsageError, WrongState
from provision.engine import registry
from provision.engine.facts import Facts, NoFacts, shown
from provision.engine.journal import Entry
from provision.engine.operation import Activity, Operation
from provision.engine.parallel import side_by_side
from provision.engine.runner import perform
from provision.member import Member
from provision.operations.balloon import Balloon, BalloonAll
from provision.operations.checkpoint import TakeCheckpoint
from provision.operations.clone import CloneFarm
from provision.operations.destroy import DESTROY, Destroy, DestroyFacts
from provision.operations.gc import Gc
from provision.operations.recover import Recover
from provision.operations.reset import Proof, Reset, VmReset
from provision.operations.templates import TemplateBuild, TemplateRemove
from provision.power import START, STOP, Start, Stop, StopFacts
from provision.site import Site
from tests import farm

import tasks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    yield desk


def test_what_builds_says_so() -> None:
    """Else the VMs that it builds on would give their memory to others."""
    found = {name for name in registry.operations() if registry.operation(name).is_build}
    assert found == {"cycle", "build", "rebuild"}


@pytest.mark.parametrize("name", registry.operations())
def test_an_operation_is_a_value_that_is_asked_for(name: str) -> None:
    found = registry.operation(name)
    assert is_dataclass(found)
    assert found.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert issubclass(found, Operation)
    (base,) = found.__orig_bases__  # type: ignore[attr-defined]
    (result,) = get_args(base)
    assert is_dataclass(result), "and hands back a value"
    assert result.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", registry.operations())
def test_a_request_can_be_told_as_json(name: str) -> None:
    """Each field, but what is no part of what is asked: so REST, queue and schema can be fed from the
    registry too."""
    kind = registry.operation(name)
    types = get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.compare:
            assert TypeAdapter(types[field.name]).json_schema(), field.name


TASKS = [
    node
    for path in (ROOT / "tasks.py", *sorted((ROOT / "cli").glob("*_tasks.py")))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
]
SEVERAL = ("demo", "repo_queue")
"""Tasks that do what others do, one after the other."""
LOOKS = (
    "template_list", "checkpoint_list", "status", "network_verify", "log", "history",
    "farms", "farm_diff", "why", "why_not", "packages", "flow_list", "flow_show",
    "repo_list", "repo_show", "repo_diff", "repo_log", "repo_fsck", "repo_client", "repo_why",
)  # fmt: skip
"""Tasks that change nothing."""
WITHOUT_AN_OPERATION = {
    "artifacts": "writes files of the user's",
    "console": "a terminal",
    "doctor": "--repair closes our own files to others; it must go where no farm can be opened",
    "farm_twin": "writes a file of the user's",
    "graph": "writes a file of the user's",
    "network_import": "writes a file of the user's",
    "new": "writes a file of the user's",
    "pages": "writes what can be made again of what is recorded",
    "render": "writes files of the user's",
    "repo_pages": "writes what can be made again of what is recorded",
    "repo_serve": "serves what is there",
    "ssh": "a terminal",
}
"""Tasks that may change something all the same, and why they need no lock, journal and recovery."""


def _operations_of(task: ast.FunctionDef) -> tuple[str, ...]:
    """Those that its decorator names."""
    words = {word.arg: word.value for call in _decorators(task) for word in call.keywords}
    return tuple(ast.literal_eval(words["does"])) if "does" in words else ()


def _decorators(task: ast.FunctionDef) -> list[ast.Call]:
    return [call for call in task.decorator_list if isinstance(call, ast.Call)]


def test_the_registry_feeds_the_command_line() -> None:
    """Each operation has one task (and those that are several). Each task has its operations, or
    changes nothing, or says why it needs none; with --plan, whatever changes a farm."""
    found = [node for node in TASKS if _decorators(node)]
    of = {task.name: _operations_of(task) for task in found}
    own = [operation for task, names in of.items() if task not in SEVERAL for operation in names]
    assert sorted(own) == sorted(registry.operations())
    assert all(set(of[task]) < set(own) for task in SEVERAL)
    acting = {task for task, names in of.items() if names}
    assert sorted(of) == sorted([*acting, *LOOKS, *WITHOUT_AN_OPERATION])
    planned = {
        name for name in of if any(flag.name == "plan" for flag in vars(tasks)[name].get_arguments())
    }
    assert acting <= planned


def test_what_a_task_asks_is_what_its_operation_takes() -> None:
    """By its own name, and with nothing left out that must be given."""
    asked = set()
    for function in TASKS:
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "run.perform"):
                continue
            if not isinstance(node.args[1], ast.Constant):
                assert function.name in SEVERAL
                continue
            name = ast.literal_eval(node.args[1])
            given = {word.arg: None for word in node.keywords if word.arg is not None}
            takes = inspect.signature(registry.operation(name))
            whole = len(given) == len(node.keywords)  # else a part of it comes from elsewhere
            (takes.bind if whole else takes.bind_partial)(**given)
            assert not _decorators(function) or name in _operations_of(function)
            asked.add(name)
    assert asked == {*registry.operations()}


def test_json_has_all_of_a_result_that_is_known(made: Desk) -> None:
    """And nothing that isn't; a proof's ``pristine`` is null where nobody looked."""
    planned, done = _asked(made, Reset(("prod",)))
    assert planned == {}
    (prod,) = done.pop("vms").values()
    assert (done, list(prod)) == ({}, ["proof", "reset_seconds", "seconds"])
    with made.site() as site:
        found = Member(site, "prod").disk()
    assert found is not None
    disk = str(found.path)
    assert prod["proof"] == {"checkpoint": "clean", "pristine": True, "template": "base@1", "disk": disk}
    by_word = VmReset(proof=Proof("clean", None, by="its word"), seconds=0.5)
    assert shown(by_word) == {
        "proof": {"checkpoint": "clean", "pristine": None, "by": "its word"}, "seconds": 0.5,
    }  # fmt: skip

    sizes = {"before": 256 * MIB, "asked": 384 * MIB}
    assert _asked(made, Balloon("dev2", 384 * MIB)) == (
        {"vms": {"dev2": sizes}}, {"vms": {"dev2": {**sizes, "reached": 384 * MIB}}},
    )  # fmt: skip
    assert _asked(made, TakeCheckpoint("one")) == ({"checkpoint": "one"}, {"checkpoint": "one"})
    assert _asked(made, Stop(("prod",))) == ({}, {})

    planned, done = _asked(made, TemplateBuild("base"))
    assert planned == {"template": "base@2", "hosts": ["here"]}
    assert list(done) == ["template", "hosts", "sha256", "ref"]
    assert _asked(made, TemplateRemove("base@2")) == ({"template": "base@2"}, {"template": "base@2"})

    with made.site() as site:
        (site.paths.seeds / "kata-gone.iso").write_bytes(b"x" * 2048)
    planned, done = _asked(made, Gc())
    assert (planned["freed"], done["freed"]) == (0, 2048)
    (left,) = done["leftovers"]
    assert list(left) == ["kind", "ref", "owner", "farm", "created", "age", "bytes", "why"]
    assert datetime.fromisoformat(left["created"]).microsecond == 0
    with made.site() as site:
        (site.paths.builds / "1").mkdir(parents=True)
        kept = str(site.paths.builds)
    assert _asked(made, Destroy()) == ({"kept": kept}, {"kept": kept})


def _asked(made: Desk, operation: Operation[Any]) -> tuple[Any, Any]:
    """What --json shows of its result: only planned, and carried out."""
    shown_of = []
    for plan in (True, False):
        with made.site(plan=plan) as site:
            facts = perform(site, operation).as_dict()["facts"]
        assert json.loads(json.dumps(facts)) == facts, "plain values"
        shown_of.append(facts)
    return shown_of[0], shown_of[1]


@pytest.mark.parametrize("name", registry.activities())
def test_an_activity_has_typed_facts_and_a_recovery(name: str) -> None:
    found = registry.activity(name)
    assert isinstance(found, Activity)
    assert found.name == name
    assert issubclass(found.facts, Facts)
    assert is_dataclass(found.facts)


def test_what_of_a_vm_an_activity_leaves() -> None:
    """Of a new one nobody says so by mistake: both are no, unless it says otherwise."""
    known = {name: registry.activity(name) for name in registry.activities()}
    left = {name for name, one in known.items() if one.leaves_as_it_was}
    assert left == {"start", "stop", "wait", "checkpoint", "balloon", "redefine"}
    made = {name for name, one in known.items() if type(one).made_anew is not Activity.made_anew}
    assert made == {"clone", "reset", "clean"}


def test_what_nobody_can_recover_can_not_be_begun(made: Desk) -> None:
    class Wild(Activity[NoFacts]):
        name = "wild"
        facts = NoFacts

    with pytest.raises(TypeError, match="recover"):
        Wild()  # type: ignore[abstract]


def test_all_that_the_journal_holds_is_known_to_recovery() -> None:
    """Whatever is handed to ``journal.begin`` stands in a registry."""
    known = {id(registry.activity(name)) for name in registry.activities()}
    begun = set()
    for path in (*(ROOT / "provision").rglob("*.py"), *(ROOT / "builds").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("journal.begin"):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                begun.add((module, ast.unparse(node.args[0])))
    assert len(begun) > 10
    for module, name in begun:
        room = __import__(module, fromlist=["x"])
        owner, _, last = name.rpartition(".")
        if owner == "self":  # of an operation, which says which
            found = [
                vars(kind)[last] for kind in vars(room).values() if last in getattr(kind, "__dict__", ())
            ]
        elif last.islower():  # handed in: one of the module's
            found = [value for value in vars(room).values() if isinstance(value, Activity)]
        else:
            found = [getattr(room, last)]
        assert found
        assert all(id(one) in known for one in found), (module, name)


def test_an_unfinished_activity_of_another_farmhand_is_refused_in_words(made: Desk) -> None:
    with made.site() as site, pytest.raises(Interrupted), site.journal.begin(_Strange(), (), NoFacts()):
        raise Interrupted("as if it was killed")
    with made.site() as site, pytest.raises(WrongState, match="an unfinished frobnicate") as refused:
        farm.recover(site)
    assert "the farmhand that began it" in str(refused.value.remedy)
    with made.site() as site:
        farm.stop(site, ["prod"])  # no VM of its own: in nobody's way


def _cut_off(
    made: Desk, activity: Activity[Any], vms: tuple[str, ...], facts: Facts, step: str = ""
) -> None:
    with (
        made.site() as site,
        pytest.raises(Interrupted),
        site.journal.begin(activity, vms, facts) as entry,
    ):
        if step:
            entry.step(step)
        raise Interrupted("as if it was killed")


def test_recover_plans_the_very_jobs_that_it_carries_out(made: Desk) -> None:
    """Nothing is recovered before its plan; what can't be is told in its place, and raised at the end of
    the run, once all else is recovered."""
    _cut_off(made, START, ("prod",), NoFacts())
    _cut_off(made, _Strange(), (), NoFacts())
    _cut_off(made, STOP, ("dev2",), StopFacts(force=True))
    with made.site(plan=True) as site:
        planned = perform(site, Recover())
    assert [(a.verb, a.vm) for a in planned.actions] == [
        ("recover", "prod"), ("note", ""), ("recover", "dev2"),
    ]  # fmt: skip
    assert "it can't be recovered as it is: the journal has an unfinished" in str(planned.actions[1])
    first, last = planned.as_dict()["facts"]["activities"]  # type: ignore[index]
    assert first == {"id": last["id"] - 2, "verb": "start", "vms": ["prod"], "how": "noted"}
    with made.site() as site, pytest.raises(WrongState, match="an unfinished frobnicate"):
        perform(site, Recover())
    with made.site() as site:
        (left,) = site.journal.unfinished()
        assert left.verb == "frobnicate"
        site.journal.settle(left.id, "recovered")
    _cut_off(made, STOP, ("dev2",), StopFacts(force=True))
    with made.site(plan=True) as site:
        planned = perform(site, Recover())
    with made.site() as site:
        done = perform(site, Recover())
        assert (done.actions, done.result) == (planned.actions, planned.result)
        (action,) = perform(site, Recover()).actions
    assert (action.verb, action.text) == ("keep", "nothing was left unfinished")


def test_recover_leaves_alone_what_another_operation_is_at(made: Desk) -> None:
    """It says so, also where that is the whole farm's end: its journal and locks are not taken away."""
    _cut_off(made, DESTROY, (), DestroyFacts(whole=True), step="remove seeds")
    with made.site() as site, site.locks.hold("vm-prod", doing="something"):
        busy = []
        thread = threading.Thread(target=lambda: busy.append(perform(site, Recover())))
        thread.start()
        thread.join()
        (action,) = busy[0].actions
        assert action.verb == "note"
        assert "not recovered now: prod is held by pid" in str(action)
        assert not busy[0].changed
        assert site.journal.unfinished()
    made.run(farm.recover)
    with made.site() as site:
        assert not site.paths.root.exists()
        (action,) = perform(site, Recover()).actions
        assert action.verb == "keep"
        assert not site.paths.root.exists(), "to recover alone makes no farm"


class _Strange(Activity[NoFacts]):
    name = "frobnicate"
    facts = NoFacts

    def recover(self, site: Site, record: Any, facts: NoFacts) -> Any:
        raise AssertionError("nobody knows it")


@pytest.mark.parametrize("path", sorted((ROOT / "provision/engine").glob("*.py")), ids=lambda p: p.name)
def test_the_engine_knows_no_operation(path: Path) -> None:
    """Not even late, in a function; what is for type checkers alone doesn't count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
            module = node.module or ""
            assert not module.startswith("provision") or module.startswith("provision.engine"), (
                f"{path}:{node.lineno} imports {module}"
            )


def test_vms_that_fail_alike_are_all_named(made: Desk) -> None:
    """Nobody's errors depend on whether their words are the same."""

    def fails() -> None:
        raise WrongState("host here is gone")

    with made.site() as site, pytest.raises(Several) as failed:
        side_by_side(site, {"dev2": fails, "prod": fails})
    assert list(failed.value.errors) == ["dev2", "prod"]
    assert [error.vm for error in failed.value.errors.values()] == ["dev2", "prod"]
    assert failed.value.message == "2 VMs failed: dev2, prod: host here is gone"


# Locks are an operation's


def test_another_operation_on_the_same_site_is_refused(made: Desk) -> None:
    """As another process is: told who holds it, doing what; and it has changed nothing."""
    with made.site() as site:
        refused: list[Busy] = []

        def other() -> None:
            with pytest.raises(Busy) as caught:
                farm.reset(site, ["prod"])
            refused.append(caught.value)

        before = made.machine("prod").started
        with site.locks.hold("vm-prod", doing="cycle"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert "prod is held by pid" in refused[0].message
        assert refused[0].message.endswith("doing: cycle")
        assert [record.verb for record in site.journal.history(1)] == ["start"]
        assert made.machine("prod").started == before
        farm.reset(site, ["prod"])
        assert site.locks.held() == ()


def test_two_resets_of_one_vm_on_the_same_site(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them goes on, the other is refused: whichever comes first."""
    inside, over = threading.Event(), threading.Event()
    step = Entry.step

    def waits(self: Entry[Any], text: str) -> None:
        step(self, text)
        if text == "refresh identities":
            inside.set()
            assert over.wait(120)

    monkeypatch.setattr(Entry, "step", waits)
    with made.site() as site:
        first = threading.Thread(target=farm.reset, args=(site, ["prod"]))
        first.start()
        try:
            assert inside.wait(120)
            with pytest.raises(Busy, match=r"doing: reset prod$"):
                farm.reset(site, ["prod", "dev2"])
        finally:
            over.set()
            first.join()
        outcomes = [(record.verb, record.outcome) for record in site.journal.history(2)]
        assert outcomes == [("reset", "done"), ("start", "done")]


def test_an_operation_begun_within_another_has_its_locks(made: Desk) -> None:
    """Also in its worker threads, which copy the context: as a cycle's resets do."""
    with made.site() as site, site.locks.hold("vm-prod", "vm-dev2", doing="cycle"):
        side_by_side(site, {vm: lambda vm=vm: farm.reset(site, [vm]) for vm in ("prod", "dev2")})  # type: ignore[misc, return-value]
        thread = threading.Thread(target=copy_context().run, args=(farm.stop, site, ["prod"]))
        thread.start()
        thread.join()
    assert made.machine("prod").power == "stopped"


def test_a_plan_is_what_the_run_then_does(made: Desk) -> None:
    for operation in (
        Reset(("prod",)),
        TakeCheckpoint("kept", ("dev2", "prod")),
        Stop(("prod",), force=True),
        Start(),
        CloneFarm(),
        BalloonAll(),
        Destroy(("prod",)),
        CloneFarm(),
        Gc(),
        Destroy(),
    ):
        with made.site(plan=True) as site:
            planned = perform(site, operation).actions
        with made.site() as site:
            assert perform(site, operation).actions == planned
        assert planned, operation


def test_what_was_asked_is_valid_by_itself() -> None:
    with pytest.raises(UsageError, match="not a checkpoint name"):
        TakeCheckpoint("-rf /", ("prod",))
    assert Reset(("prod",)) == Reset(("prod",), to="")


def test_two_operations_of_one_process_wait_for_each_others_memory(made: Desk) -> None:
    """As two processes do, though they see each other's reservations."""
    both = "  dev2: {memory: 64M}\n  prod: {memory: 64M}\n"
    made.run(farm.destroy)
    made.write(both, host="driver: fake, memory: 200M")
    made.run(farm.clone_farm, start=False)
    failed: list[BaseException] = []

    def work(site: Site, vm: str) -> None:
        try:
            for _ in range(3):
                farm.start(site, [vm])
                farm.stop(site, [vm], force=True)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failed.append(error)

    with made.site() as site:
        threads = [threading.Thread(target=work, args=(site, vm)) for vm in ("dev2", "prod")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert site.locks.held() == ()
