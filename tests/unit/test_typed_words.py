"""Words as people type them: names without a flag, commands after ``--``, near misses, help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from invoke.collection import Collection

from cli.examples import EXAMPLES
from cli.typed_words import WordReader, context_of
from inventory.errors import UsageError
from tests.unit.cli_farm import CommandLine, command_line

import tasks

TASKS = Collection.from_module(tasks)
WITH_SERVICE = """\
network: {mode: network, network: br0, subnet: 10.0.0.0/24, gateway: 10.0.0.1, domain: try.example}
services: {bind: {}}
"""
cli = pytest.fixture(command_line)


@pytest.fixture
def core() -> Iterator[WordReader]:
    """A reader for a farm with VMs build, status and prod."""
    from cli.program import FarmhandProgram

    contexts = {name: context_of(TASKS, name) for name in TASKS.task_names}
    yield WordReader(
        TASKS.task_names,
        contexts,
        FarmhandProgram(TASKS).initial_context,
        lambda _task, flag, _farm: ("build", "status", "prod") if flag == "vm" else None,
    )


def read(reader: WordReader, line: str, rest: Sequence[str] = ()) -> str:
    return " ".join(reader.plain(line.split(), rest))


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        ("reset prod", "reset --vm prod"),
        ("reset prod,build --to clean x", "reset --vm prod,build --to clean --vm x"),
        ("reset --vm prod", "reset --vm prod"),
        ("reset --vm=prod --no-start", "reset --vm=prod --no-start"),
        ("ssh build", "ssh --vm build"),
        # Names before tasks, where the farm has them; else the next task, as ever.
        ("reset status prod", "reset --vm status --vm prod"),
        ("reset prod history", "reset --vm prod history"),
        ("reset --all status", "reset --all --vm status"),
        ("doctor status", "doctor status"),
        # What a flag takes is never a name.
        ("reset --to prod build", "reset --to prod --vm build"),
        ("reset --wait prod", "reset --wait --vm prod"),
        ("reset --wait 60 prod", "reset --wait 60 --vm prod"),
        ("console prod --lines -1", "console --vm prod --lines -1"),
        ("log status", "log --build status"),
        ("template-build base", "template-build --name base"),
        ("status --help", "status --help"),
        ("--list-format json status", "--list-format json status"),
        ("status -h", "status -h"),
    ],
)
def test_as_invoke_reads_them(core: WordReader, typed: str, plain: str) -> None:
    assert read(core, typed) == plain


@pytest.mark.parametrize(
    ("rest", "command"),
    [
        (["ls", "-l"], "ls -l"),
        (["ls | wc -l"], "ls | wc -l"),
        (["rm", "a file", "$x"], "rm 'a file' '$x'"),
        (["--all"], "--all"),
    ],
)
def test_a_command_after_two_dashes(core: WordReader, rest: list[str], command: str) -> None:
    assert core.plain(["ssh", "build"], rest) == ["ssh", "--vm", "build", f"--command={command}"]


@pytest.mark.parametrize(
    ("typed", "rest", "told", "remedy"),
    [
        ("statsu", [], "no task 'statsu'", "did you mean status?"),
        ("rest prod", [], "no task 'rest'", "did you mean reset?"),
        ("xyzzy", [], "no task 'xyzzy'", "--list shows the tasks"),
        ("reset --al", [], "reset has no flag --al", "did you mean --all?"),
        ("reset prod --no-strt", [], "reset has no flag --no-strt", "did you mean --no-start?"),
        ("reset prod --dry-run", [], "reset has no flag --dry-run", "did you mean --plan?"),
        ("reset prod --dry", [], "reset has no flag --dry", "did you mean --plan?"),
        ("reset prod -R", [], "reset has no flag -R", "--help reset"),
        ("--quiet status", [], "no flag --quiet before a task", "TASK --quiet"),
        ("--versoin", [], "no flag --versoin before a task", "did you mean --version?"),
        ("--json --list", [], "no flag --json before a task", "--list --list-format json"),
        ("-f nofile status", [], "no flag -f before a task", "flags of a task stand after it; "),
        ("--list-depth 1 --list", [], "no flag --list-depth before a task", "--help shows the others"),
        ("--list sta", [], "no task 'sta'", "did you mean start?"),
        ("--list=sta", [], "--list takes no value", "--help"),
        ("log --wait", [], "log has no flag --wait", "--help log"),  # --quiet is like it by its dashes
        ("cycle --fro x", [], "cycle has no flag --fro", "did you mean --from?"),
        ("reset --to", [], "--to needs a value", "--help reset"),
        ("reset --to --all", [], "--to needs a value", "--help reset"),
        ("reset --all=yes", [], "--all takes no value", "--help reset"),
        ("status prod", [], "status takes no word 'prod'", "--help status"),
        ("ssh build prod", [], "ssh takes one name: 'prod' is one too many", "ssh NAME -- COMMAND"),
        ("ssh --vm build ls", [], "ssh takes one name: 'ls' is one too many", "ssh NAME -- COMMAND"),
        ("ssh build --vm prod", [], "ssh takes --vm once", "--help ssh"),
        ("cycle --from a --from=b", [], "cycle takes --from once", "--help cycle"),
        ("balloon prod 2G", [], "balloon takes one name: '2G' is one too many", "--help balloon"),
        ("status", ["x"], "status takes nothing after --", "--help status"),
        ("ssh build --command ls", ["ls"], "--command and words after --", "give one of them"),
    ],
)
def test_what_is_refused(core: WordReader, typed: str, rest: list[str], told: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        core.plain(typed.split(), rest)
    assert told in caught.value.message
    assert remedy in str(caught.value.remedy)


def test_every_task_has_examples_and_each_is_understood(core: WordReader) -> None:
    import shlex

    from invoke.parser import Parser

    assert set(EXAMPLES) == set(TASKS.task_names)
    for task, examples in EXAMPLES.items():
        assert examples, task
        for line, _ in examples:
            words = shlex.split(line)
            at = words.index("--") if "--" in words else len(words)
            plain = core.plain(words[:at], words[at + 1 :])
            core.task = ""
            _, *contexts = Parser(initial=core.core, contexts=TASKS.to_contexts()).parse_argv(plain)
            assert [context.name for context in contexts] == [task], line


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("template-build", ["--fresh"]),
        ("cycle", ["--debug", "--explain", "--only"]),
        ("new", ["--kind", "--out"]),
    ],
)
def test_examples_show_these_flags(task: str, flags: list[str]) -> None:
    shown = " ".join(line for line, _ in EXAMPLES[task])
    assert all(flag in shown for flag in flags)


def test_names_in_a_farm(cli: CommandLine) -> None:
    assert cli("clone-farm", "dev2", "--no-wait").status == 0
    assert cli("reset", "dev2", "--no-wait", "--json").json["changed"]
    done = cli("reset", "prdo")
    assert (done.status, done.error) == (2, "farmhand: try.yaml: there is no VM 'prdo'")
    assert done.err.splitlines()[-1] == "  did you mean prod?"
    argv = cli("ssh", "dev2", "--json", "--", "ls", "-l", "a b").json["argv"]
    assert argv[-1] == "ls -l 'a b'"
    both = cli("reset", "dev2", "--no-wait", "status")
    assert both.status == 0 and "SSH" in both.out, "the next task, for no VM is called so"


def test_a_vm_may_be_called_as_a_task_is(cli: CommandLine) -> None:
    cli.farm.write_text(cli.farm.read_text().replace("  dev2:", "  build:"))
    assert cli("clone-farm", "build", "--no-wait").status == 0
    assert cli("ssh", "build", "--json").json["argv"]
    other = cli.directory / "other.yaml"
    other.write_text(
        cli.farm.read_text().replace("  build: {", "  status: {").replace("farm: try", "farm: other")
    )
    plan = cli("clone-farm", "status", "--plan", "--json", "--farm", str(other)).json
    assert {action["vm"] for action in plan["actions"]} >= {"status"}


def test_wrong_words_as_data(cli: CommandLine) -> None:
    for words in (["statsu", "--json"], ["status", "--json", "--colour", "red"], ["reset", "--json"]):
        done = cli(*words)
        assert done.status == 2
        told = done.json
        assert (told["ok"], told["error"], told["class"]) == (False, "UsageError", "usage")
        assert told["remedy"] and told["message"] in done.err
    assert cli("ssh", "dev2", "--", "echo", "--json").out == ""  # that one is the command's


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--list-format xyz --list", "--list-format: there is no format 'xyz'"),
        ("--list-format xyz status", "--list-format: there is no format 'xyz'"),
        ("-Fjsn -l", "--list-format: there is no format 'jsn'"),
        ("--list --list-format", "--list-format needs a value"),
        ("--list-depth abc --list", "no flag --list-depth before a task"),
        ("-Dabc --list", "no flag -D before a task"),
        ("-f nofile status", "no flag -f before a task"),
        ("--list sta", "no task 'sta'"),
        ("--json --list", "no flag --json before a task"),
        ("--collection nofile --list", "there is no file of tasks called nofile"),
    ],
)
def test_words_before_a_task(cli: CommandLine, words: str, told: str) -> None:
    done = cli(*words.split())
    assert (done.status, done.error) == (2, f"farmhand: {told}")
    assert ("--json" in words) is bool(done.out)
    done = cli("--json", *words.split())
    assert (done.status, done.json["class"]) == (2, "usage")


def test_the_tasks_in_each_format(cli: CommandLine) -> None:
    import json

    found = json.loads(cli("--list", "--list-format", "json").out)
    assert {task["name"] for task in found["tasks"]} == set(TASKS.task_names)
    assert "  reset  " in cli("-F", "nested", "-l").out


@pytest.mark.parametrize(
    "words",
    [
        "reset prdo", "cycle --from fecth", "cycle --only fecth --plan", "template-build bse",
        "template-remove bse@2", "destroy prdo", "ssh prdo", "rename prdo --was old",
        "history --vm prdo",
        "render --service bnid", "repo-show --repo debs", "status --farm nofile", "cp prdo:/etc .",
        "farm-diff --with nofile",
    ],
)  # fmt: skip
def test_names_that_the_farm_file_does_not_have(cli: CommandLine, words: str) -> None:
    cli.farm.write_text(cli.farm.read_text() + WITH_SERVICE)
    done = cli(*words.split(), "--json")
    assert (done.status, done.json["error"], done.json["class"]) == (2, "UnknownName", "usage"), done.err


@pytest.mark.parametrize(
    "words",
    ["reset prod", "reset prod --to tolos", "template-remove base@2", "log", "log 20260101-000000"],
)
def test_what_is_only_not_there(cli: CommandLine, words: str) -> None:
    """Its name is right, or nobody could know."""
    cli("clone-farm", "dev2", "--no-wait")
    done = cli(*words.split(), "--json")
    assert (done.status, done.json["error"], done.json["class"]) == (1, "NotFound", "failed")


def test_a_kind_that_there_is_not(cli: CommandLine) -> None:
    done = cli("new", "--source", ".", "--kind", "dbe", "--out", "new.yaml", "--json")
    assert (done.status, done.json["remedy"]) == (2, "did you mean deb?")


def test_help_as_a_manual_page(cli: CommandLine) -> None:
    shown = cli("--help", "reset")
    assert (shown.status, shown.err) == (0, "")
    assert shown.out == cli("reset", "--help").out
    for part in (
        "reset: Put VMs back to a checkpoint", "Usage: ./invoke reset [VM ...] [--flags]\n",
        "--to TO", "--[no-]start", "--wait [SECONDS]", "Examples:\n", "./invoke reset prod ",
    ):  # fmt: skip
        assert part in shown.out
    assert "Usage: ./invoke cp FROM TO [--flags]\n" in cli("--help", "cp").out
    narrow = cli("--help", "network-import", COLUMNS="40")
    assert "./invoke network-import --zone" in narrow.out
    assert cli("--help", "rest").err == "farmhand: no task 'rest'\n  did you mean reset?\n"


def test_the_version(cli: CommandLine) -> None:
    import tomllib

    project = tomllib.loads((Path(tasks.__file__).parent / "pyproject.toml").read_text())["project"]
    assert cli("--version").out == f"farmhand {project['version']}\n"
