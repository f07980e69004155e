"""./invoke begins soon: what is imported, where bytecode goes, and invoke still as it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from invoke.collection import Collection
from invoke.tasks import task

from cli.program import FarmhandProgram
from tests import boot_sector
from tests.unit.cli_farm import CommandLine, command_line

ROOT = Path(__file__).resolve().parents[2]
cli = pytest.fixture(command_line)

# What short commands have no use for, each tens of milliseconds.
HEAVY = {
    "asyncio",
    "asyncssh",
    "cryptography",
    "email",
    "importlib.metadata",
    "invoke.vendor.yaml",
    "jinja2",
    "pydantic",
    "unittest",
    "yaml",
}
# What a clone that nothing is wrong with, and that isn't started, doesn't meet.
NOT_MET = {
    "builds.steps.fetch",
    "builds.steps.run",
    "concurrent.futures",
    "host.hints",
    "provision.leftovers",
    "provision.memory_budget",
    "provision.missing_disk",
}
KVM = """\
farm: try
templates: {small: {import: small.img}}
vms: {one: {memory: 64M}}
"""


def imported(cli: CommandLine, *words: str) -> set[str]:
    """The modules that the whole process of a command imported."""
    python, *rest = cli.argv(*words)
    done = subprocess.run(
        [python, "-X", "importtime", *rest],
        env=cli.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_list_imports_nothing_heavy(cli: CommandLine) -> None:
    found = imported(cli, "--list")
    assert "invoke.program" in found
    assert not found & (HEAVY | {"libvirt", "sqlite3", "inventory.model"})


def test_a_changed_farm_needs_no_pydantic_and_an_unchanged_one_nothing_heavy(cli: CommandLine) -> None:
    cli.farm.write_text(KVM)
    image = cli.directory / "small.img"
    image.write_bytes(boot_sector.IDLE)
    with tempfile.TemporaryDirectory(prefix="fh") as state:
        Path(state).chmod(0o711)  # QEMU's user passes through
        cli.environment["FARMHAND_STATE_DIR"] = state
        try:
            assert cli("clone-farm", "--no-start").status == 0  # the template, too
            cli.farm.write_text(KVM.replace("vms: {", "vms: {two: {memory: 64M}, "))
            cloning = imported(cli, "clone-farm", "--no-start")
            found = imported(cli, "status")
        finally:
            cli("destroy", "--all")
    assert "inventory.validation" in cloning
    assert not cloning & {"pydantic", "pydantic_core.core_schema"}
    assert cloning & NOT_MET == set()
    assert "libvirt" in found
    assert not found & HEAVY


def bare(directory: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-P", "-m", "invoke"], directory, *words, **environment)


def started(directory: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-P", str(ROOT / "cli" / "start.py")], directory, *words, **environment)


def run(
    program: Sequence[str], directory: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, "--search-root", str(directory), *words],
        cwd=directory, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With one task, and a configuration file of invoke's that changes what it does."""
    task = "import other\nfrom invoke import task\n\n\n@task(default=True)\ndef hello(c):\n"
    (tmp_path / "tasks.py").write_text(f"{task}    print('hello', c.config.greeted)\n")
    (tmp_path / "other.py").touch()
    (tmp_path / "invoke.yaml").write_text("greeted: [you, 'and', {me: 2}]\n")
    return tmp_path


@pytest.mark.parametrize("words", [["hello"], ["--list"], ["--list", "--list-format", "json"], []])
def test_invoke_is_as_it_is(checkout: Path, words: list[str]) -> None:
    expected, found = bare(checkout, *words), started(checkout, *words, PYTHONPYCACHEPREFIX="/nowhere")
    assert found.stdout == expected.stdout
    assert found.stderr == expected.stderr
    assert found.returncode == expected.returncode
    assert expected.stdout


def test_bytecode_is_kept_but_not_in_the_checkout(checkout: Path, tmp_path: Path) -> None:
    """Though Python was told to keep none: that is for the sake of what lies beside the sources."""
    kept = tmp_path / "kept"
    done = started(checkout, "hello", PYTHONPYCACHEPREFIX=str(kept), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert not list(checkout.glob("__pycache__"))
    assert [path.name.partition(".")[0] for path in kept.rglob("other.*.pyc")] == ["other"]


def test_bytecode_goes_to_the_virtual_environment(checkout: Path) -> None:
    probe = "import sys; from cli import start; sys.argv = ['x', '--version']; start.main()"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\ntry:\n    {probe}\nfinally:\n"
    code += "    print(sys.pycache_prefix == sys.prefix + '/bytecode', sys.prefix != sys.base_prefix)\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPYCACHEPREFIX"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    told = done.stdout.splitlines()[-1]
    assert told in ("True True", "False False"), done.stderr  # without one: as Python has it


def test_the_garbage_collector_waits_for_more_than_imports(checkout: Path) -> None:
    (checkout / "tasks.py").write_text(
        "import gc\nfrom invoke import task\n\n\n@task\ndef looks(c):\n"
        "    print(gc.get_stats()[2]['collections'], gc.get_threshold()[0], gc.isenabled())\n"
    )
    done = started(checkout, "looks")
    assert done.stdout == "0 50000 True\n", done.stderr


def test_the_parser_knows_the_tasks_that_are_typed() -> None:
    @task
    def other(_c: object) -> None:
        pass

    @task
    def two_words(_c: object) -> None:
        pass

    program = FarmhandProgram(Collection(other, two_words))
    for words in (["two-words"], ["--help=two-words"], ["--help", "two-words"]):
        program.create_config()
        program.parse_core(["farmhand", *words])
        program.parse_collection()
        program.parse_tasks()
        assert [*program.parser.contexts] == ["two-words"], words
    assert [*program.collection.task_names] == ["other", "two-words"]


def test_plain_invoke_runs_the_same_tasks(cli: CommandLine) -> None:
    """With flags, as it has no words for names without them."""
    words = ["clone-farm", "--vm", "prod", "--no-wait", "--wait", "5", "--plan", "status", "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "invoke", "--search-root", str(ROOT), *words],
        cwd=cli.directory, env=cli.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "would: prod  clone" in done.stdout and '"task": "status"' in done.stdout


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        (["status"], False), (["--search-root", "/", "clone-farm", "--json"], False),
        (["status", "repo-list"], True), (["flow-list"], True), (["--list"], True),
        (["status", "--help"], True), (["stauts"], True), ([], True),
    ],
)  # fmt: skip
def test_the_repositories_tasks_are_there_where_they_may_be_meant(
    words: list[str], loaded: bool
) -> None:
    """Any other command is not to pay for them."""
    code = "import sys, tasks; print('cli.repository_tasks' in sys.modules, hasattr(tasks, 'repo_list'))"
    script = f"import sys; sys.argv = ['start.py', *{words!r}]\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [str(loaded)] * 2, done.stderr
