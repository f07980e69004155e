"""The command line as a user meets it: the real program, in processes of its own, on the fake driver."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli_farm import ROOT, CommandLine, command_line

TASKS = [
    "doctor", "demo", "new", "template-build", "template-import", "template-list",
    "template-remove",
    "adopt", "clone-farm", "reset", "balloon", "start", "stop", "boot-unit", "rename", "renew", "clean",
    "checkpoint", "checkpoint-list", "checkpoint-remove",
    "destroy", "gc", "recover", "unlock", "status", "console", "ssh",
    "render", "network-apply", "network-verify", "network-import",
    "repo-add", "repo-client", "repo-diff", "repo-fsck", "repo-gc", "repo-import", "repo-list",
    "repo-log", "repo-pages", "repo-promote", "repo-queue", "repo-remove", "repo-rollback", "repo-serve",
    "repo-show", "repo-sync", "repo-why",
    "artifacts", "cp", "farm-diff", "farm-twin", "farms",
    "flow-begin", "flow-bisect", "flow-fail", "flow-list", "flow-pass", "flow-show",
    "cycle", "log", "history", "pages",
    "build", "graph", "packages", "rebuild", "why", "why-not",
    "test", "lint", "bench", "lab-up", "lab-ssh", "lab-test", "lab-down",
]  # fmt: skip


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    yield from command_line(tmp_path)


def test_every_task_is_listed_on_one_line_of_an_ordinary_terminal(cli: CommandLine) -> None:
    lines = [line for line in cli("--list").out.splitlines()[2:] if line.strip()]
    assert sorted(line.split()[0] for line in lines) == sorted(TASKS)
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize("task", TASKS)
def test_every_task_explains_itself(cli: CommandLine, task: str) -> None:
    done = cli(task, "--help")
    assert done.status == 0
    assert "--json" in done.out and "--farm" in done.out


def test_a_farm_that_is_not_there(cli: CommandLine) -> None:
    done = cli("status", "--farm", "/nowhere/farm.yaml")
    assert done.status == 2
    assert done.error == "farmhand: --farm: no farm file /nowhere/farm.yaml"
    assert done.out == ""


def test_the_farm_file_is_found_in_the_current_directory(cli: CommandLine) -> None:
    here = cli.directory / "here"
    here.mkdir()
    (here / "farm.yaml").write_text(cli.farm.read_text().replace("farm: try", "farm: local"))
    assert cli("status", "--json", cwd=here, FARMHAND_FARM="").json["farm"] == "local"


def test_a_wrong_farm_file_shows_every_mistake_with_its_place(cli: CommandLine) -> None:
    cli.farm.write_text(cli.farm.read_text().replace("1G", "1X") + "colour: red\n")
    done = cli("status", "--json")
    assert done.status == 2
    assert len(done.json["problems"]) == 3
    assert done.json["ok"] is False
    assert f"{cli.farm}:6:" in done.err.replace("try.yaml", str(cli.farm)) or "try.yaml:6:" in done.err
    assert "3 problems in the farm file; nothing was done" in done.err


def test_an_unknown_vm_names_the_nearest(cli: CommandLine) -> None:
    done = cli("reset", "--vm", "prodd", "--json")
    assert done.status == 2
    assert "prodd" in done.json["message"]
    assert "prod" in done.json["remedy"]


@pytest.mark.parametrize("words", [("status",), ("balloon", "--plan-host")])
def test_a_look_that_misses_a_host_is_no_good_end(cli: CommandLine, words: tuple[str, ...]) -> None:
    away = "  away: {driver: kvm, uri: 'qemu+unix:///session?socket=/nowhere/sock'}\n"
    text = cli.farm.read_text()
    placed = text.replace("prod: {", "prod: {host: away, ").replace("dev2: {", "dev2: {host: here, ")
    cli.farm.write_text(placed.replace("vms:\n", f"{away}vms:\n"))
    done = cli(*words)
    assert done.status == 69
    assert "host here: " in done.out and "host away: " in done.out, "what could be seen is shown"
    assert done.error == "farmhand: 1 of 2 hosts could not be looked at: away"
    told = cli(*words, "--json")
    assert (told.status, told.json["ok"], told.json["class"]) == (69, False, "environment")
    assert [host["host"] for host in told.json["hosts"] if host.get("error")] == ["away"]
    cli.farm.write_text(text)
    assert cli(*words).status == 0


@pytest.mark.parametrize("task", ["reset", "start", "stop", "destroy"])
def test_no_vm_is_never_all_vms(cli: CommandLine, task: str) -> None:
    done = cli(task)
    assert done.status == 2
    assert done.error == "farmhand: which VMs?"
    assert "--all" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("reset", "--vm", "prod", "--all"), "--vm and --all together"),
        (("reset", "--vm", ","), "--vm: an empty name"),
        (("cycle", "--only", ""), "--only: an empty name"),
        (("cycle", "--from", ""), "the cycle has no step ''"),
        (("balloon", "--vm", "prod"), "--to is missing"),
        (("balloon", "--vm", "prod", "--to", "lots"), "--to: 'lots' is not a size"),
        (("balloon", "--to", "512M"), "which VM?"),
        (("balloon", "--all", "--to", "512M"), "--all is for the whole farm"),
        (("balloon", "--plan-host", "--vm", "prod"), "--plan-host is for the whole farm"),
        (("checkpoint", "--vm", "prod"), "--name is missing"),
        (("template-remove",), "--template is missing"),
        (("template-build", "--name", "bass"), "there is no template 'bass'"),
        (("history", "--limit", "abc"), "--limit: 'abc' is not a whole number"),
        (("statsu",), "no task 'statsu'"),
        (("status", "--frm", "x"), "status has no flag --frm"),
        (("cycle", "--revision"), "--revision needs a value"),
        (("console", "--vm", "prod", "--lines", "-1"), "--lines: '-1' is not a whole number"),
    ],
)
def test_wrong_words(cli: CommandLine, words: tuple[str, ...], said: str) -> None:
    done = cli(*words)
    assert done.status in (1, 2)
    assert said in done.error
    assert done.out == ""


def test_clone_reset_destroy(cli: CommandLine) -> None:
    plan = cli("clone-farm", "--no-wait", "--plan", "--json").json
    assert plan["planned"] and plan["changed"]
    made = cli("clone-farm", "--no-wait", "--json")
    assert made.status == 0, made.err
    assert made.json["changed"]
    assert [a for a in made.json["actions"] if a["vm"]] == [a for a in plan["actions"] if a["vm"]]
    assert not cli("clone-farm", "--no-wait", "--json").json["changed"]

    status = cli("status")
    assert status.status == 0
    assert "dev2" in status.out and "prod" in status.out and "running" in status.out

    assert cli("reset", "--all", "--no-wait", "--json").json["changed"]
    history = cli("history", "--json").json
    assert "reset" in {entry["verb"] for entry in history["operations"]}
    assert cli("history").out.splitlines()[1:]

    assert cli("stop", "--vm", "dev2,prod").status == 0
    assert cli("checkpoint", "--vm", "prod", "--name", "tools").status == 0
    assert cli("destroy", "--all").status == 0
    state = cli.directory / "state" / "farms" / "try"
    assert not state.exists(), sorted(state.rglob("*"))


def test_a_plan_tells_of_a_source_that_is_gone(cli: CommandLine) -> None:
    """Which the cycle would find only when all VMs are made."""
    lines = cli.farm.read_text().count("\n")
    cli.farm.write_text(f"{cli.farm.read_text()}source:\n  repository: ../examples/gone\n")
    gone = f"{cli.directory.parent}/examples/gone"
    where = f"{cli.farm}:{lines + 2}:15: the source {gone} is not a directory"
    assert f"source: {where}" in cli("clone-farm", "--plan").out
    assert where in cli("doctor").out


def test_the_memory_of_a_host(cli: CommandLine) -> None:
    farm = cli.farm.read_text().replace("driver: fake", "driver: fake\n    memory: 2G")
    cli.farm.write_text(farm.replace("dev2: {memory: 1G}", "dev2: {memory: 1G, idle_memory: 512M}"))
    empty = cli("balloon", "--plan-host", "--json").json["hosts"][0]
    assert (empty["limit"], empty["in_use"], empty["left"]) == (2**31, 0, 2**31)
    assert not (cli.directory / "state" / "farms").exists(), "a look makes nothing"
    assert cli("clone-farm", "--no-wait").status == 0
    shown = cli("balloon", "--plan-host")
    assert shown.status == 0
    head, _, titles, *rows = shown.out.splitlines()
    assert head == "host here: 2G for this farm's VMs, 2G in use, 0 left"
    assert titles.split() == ["VM", "HAS", "NEEDS", "IDLE", "MAXIMUM", "MAY", "HAVE", "COULD", "GIVE"]
    assert [row.split() for row in rows] == [
        ["dev2", "1G", "256M", "512M", "1G", "1G", "512M"],
        ["prod", "1G", "256M", "1G", "1G"],
    ]
    plan = cli("balloon", "--all", "--plan")
    assert "would: dev2  memory 1G -> 512M" in plan.out
    done = cli("balloon", "--all", "--json").json
    assert done["facts"]["vms"]["dev2"]["reached"] == 2**29
    cli.farm.write_text(cli.farm.read_text().replace("memory: 2G", "memory: 1600M"))
    full = cli("balloon", "--vm", "dev2", "--to", "1G")
    assert full.status == 69
    assert full.error.endswith(
        "ballooning dev2 to 1G takes 1G, with 1G in use by others on host here, which may use 1600M: "
        "prod has 1G"
    )
    assert "--plan-host" in full.err


def test_ssh_is_shown_and_knows_the_host_key(cli: CommandLine) -> None:
    assert cli("clone-farm", "--no-wait").status == 0
    argv = cli("ssh", "--vm", "prod", "--command", "rpm -qa", "--json").json["argv"]
    assert argv[0].endswith("ssh")
    assert argv[-1] == "rpm -qa"
    assert "StrictHostKeyChecking=yes" in argv
    known = next(a for a in argv if a.startswith("UserKnownHostsFile=")).partition("=")[2].strip('"')
    alias = next(a for a in argv if a.startswith("HostKeyAlias=")).partition("=")[2]
    (line,) = [line for line in Path(known).read_text().splitlines() if line.startswith(f"{alias} ")]
    assert line.split()[1] == "ssh-ed25519"


def test_a_defect_is_one_line_and_a_file(cli: CommandLine) -> None:
    probe = cli.directory / "tasks.py"
    probe.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from cli.command import command\n"
        "@command()\n"
        "def fail(run):\n"
        "    'Fails.'\n"
        "    {}['absent']\n"
    )
    done = subprocess.run(
        [*cli.argv()[:3], "--search-root", str(cli.directory), "fail", "--json"],
        env=cli.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 70
    assert "Traceback" not in done.stderr
    assert "a defect in farmhand itself: KeyError" in done.stderr
    (crash,) = (cli.directory / "state" / "logs").glob("crash-*.txt")
    assert str(crash) in done.stderr
    assert "KeyError: 'absent'" in crash.read_text()
    assert '"ok": false' in done.stdout


@pytest.mark.parametrize("changes", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(
    cli: CommandLine, number: signal.Signals, changes: bool
) -> None:
    """Only of what has changed anything."""
    probe = cli.directory / "tasks.py"
    probe.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from cli.command import command\n"
        f"@command(does={('gc',) if changes else ()})\n"
        "def wait(run):\n"
        "    'Waits.'\n"
        "    run.screen.say('waiting')\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [*cli.argv()[:3], "--search-root", str(cli.directory), "wait"],
        env=cli.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "waiting" in process.stderr.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert ("recover" in err) is changes


def test_a_reader_that_leaves_is_no_error(cli: CommandLine) -> None:
    process = subprocess.Popen(
        cli.argv("status", "--json"),
        env=cli.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=120)
    assert err == b""


def test_on_a_terminal_the_live_line_is_gone_at_the_end(cli: CommandLine) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        cli.argv("clone-farm", "--no-wait"),
        env={**cli.environment, "TERM": "xterm", "COLUMNS": "40"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # EIO: the last writer has closed it
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert process.wait(timeout=60) == 0
    assert shown.rsplit(b"\n", 1)[-1] in (b"", b"\r\x1b[2K")


def test_looking_starts_nothing_and_writes_nothing(cli: CommandLine) -> None:
    default = str(ROOT / "inventory" / "default.yaml")
    assert cli("--list").status == 0
    assert "not made" in cli("status", "--farm", default).out
    assert cli("history", "--farm", default).out == "nothing was done to this farm yet\n"
    open_to_all = Path(cli.environment["FARMHAND_RUNTIME_DIR"])
    open_to_all.chmod(0o711)  # else QEMU's user couldn't pass, which a plan says as well
    cli.environment["FARMHAND_STATE_DIR"] = str(open_to_all / "state")
    assert cli("clone-farm", "--plan", "--farm", default).status == 0
    assert not (open_to_all / "state").exists()


def test_a_terminal_that_hangs_up_ends_it_as_a_signal_would(cli: CommandLine) -> None:
    probe = cli.directory / "tasks.py"
    probe.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from cli.command import command\n"
        "@command()\n"
        "def wait(run):\n"
        "    'Waits.'\n"
        "    run.screen.working('waiting')\n"
        "    time.sleep(60)\n"
    )
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*cli.argv()[:3], "--search-root", str(cli.directory), "wait"],
        env={**cli.environment, "TERM": "xterm"},
        stdin=subprocess.DEVNULL, stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    said = b""
    while b"waiting" not in said:  # what is drawn may come in parts
        said += os.read(leader, 4096)
    os.close(leader)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert not (cli.directory / "state").exists()  # no crash report


def test_the_usual_labs_are_meant_without_a_name(cli: CommandLine) -> None:
    assert "./invoke lab-up --xen" in cli("lab-ssh", "--xen").err
    assert cli("lab-ssh").error == "farmhand: the lab lab is not running"
    assert cli("lab-down", "--xen").out == "no such lab: nothing to do\n"
    assert cli("lab-down", "--xen", "--all").status == 2
