"""Artifacts copied to a directory; files and directories copied in and out of machines: real git, real
sshds, the command line as it is typed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from cycle_farm import STEPS, Lab, lab, run, run_cycle
from test_finding import said, typed

from builds import artifacts
from builds.artifacts import copy_artifacts, made_by
from builds.record import BuildRecord
from host import files
from inventory.errors import Conflict, DriverFailed, Interrupted, NoSpace, WrongState
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.guest.connection import Connection
from provision.guest.copying import copy_in, copy_out
from provision.operations.copy_in import COPY_IN, CopyInFacts
from provision.site import Site

__all__ = ["lab"]
MAKES = 'mkdir -p out; echo "$GIT_REVISION" >out/kata.deb; echo notes >out/notes.txt'


def tree(top: Path) -> dict[str, object]:
    """What is below: links by where they lead, files by bytes and whether they run."""
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_dir():
            found[name] = None
        else:
            found[name] = (path.read_bytes(), bool(path.stat().st_mode & 0o100))
    return found


def copied(lab: Lab, source: str, target: str, *, status: int = 0) -> str:
    return said(lab, "cp", source, target, status=status)


def parts(directory: Path) -> list[Path]:
    return [*directory.rglob(".*.part")]


# ---- Artifacts.


@pytest.fixture
def built(lab: Lab) -> BuildRecord:
    with lab.site([run("build", MAKES, artifacts="out/*")]) as site:
        return run_cycle(site)


def test_artifacts_are_listed_and_copied(lab, built):
    commit = built.source.commit
    listed = json.loads(said(lab, "artifacts", "--json"))
    assert [file["name"] for file in listed["files"]] == ["kata.deb", "notes.txt"]
    assert all(Path(file["place"]).is_file() for file in listed["files"])
    to = lab.root / "new" / "place"
    planned = said(lab, "artifacts", "--to", str(to), "--plan")
    assert f"would copy: {to}/kata.deb" in planned and not to.exists()
    said(lab, "artifacts", "--build", commit[:8], "--to", str(to))
    assert tree(to) == {"kata.deb": (f"{commit}\n".encode(), False), "notes.txt": (b"notes\n", False)}
    again = json.loads(said(lab, "artifacts", "--build", "last-good", "--to", str(to), "--json"))
    assert (again["copied"], again["same"]) == ([], ["kata.deb", "notes.txt"])


def left_by_a_kill(directory: Path, name: str) -> Path:
    """What a copy had unpacked when it was killed."""
    child = os.fork()
    if child == 0:
        with files.part_of(name, directory) as part:
            (part / "it").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (found,) = parts(directory)
    return found


@pytest.mark.parametrize("where", ["new", "there", "cp"])
def test_what_a_killed_copy_left_goes_at_the_next(lab, built, where):
    home = lab.root / "home"
    home.mkdir()
    strangers = [home / name for name in (".to.part", ".to.0123.part", ".too.0123456789abcdef.part")]
    for one in strangers:
        one.mkdir()
    mine = home / ".to.0123456789abcdef.part"
    mine.touch()  # a file is none of ours
    with files.part_of("to", home) as alive:
        if where == "there":
            (home / "to").mkdir()
            left = left_by_a_kill(home / "to", "to")
        else:
            left = home / ".to.fedcba9876543210.part"
            left.mkdir()
            (left / "it").touch()
        if where == "cp":
            (lab.prod.home / "file").touch()
            copied(lab, "prod:file", str(home / "to"))
        else:
            said(lab, "artifacts", "--to", str(home / "to"))
        assert not left.exists()
        assert sorted(parts(home)) == sorted([*strangers, mine, alive])


def test_nothing_is_overwritten(lab, built):
    to = lab.root / "to"
    to.mkdir()
    (to / "notes.txt").write_text("mine\n")
    error = said(lab, "artifacts", "--to", str(to), status=1)
    assert "has others by these names: notes.txt; nothing was copied" in error
    assert tree(to) == {"notes.txt": (b"mine\n", False)}
    (to / "notes.txt").unlink()
    (to / "notes.txt").symlink_to("nowhere")
    with pytest.raises(Conflict):
        copy_artifacts(made_by(_paths(lab), built.id, package=False), to)
    file = lab.root / "file"
    file.write_text("")
    assert "is no directory" in said(lab, "artifacts", "--to", str(file), status=1)


def test_all_of_them_or_none(lab, built, monkeypatch):
    made, to = made_by(_paths(lab), built.id, package=False), lab.root / "to"
    # one is damaged
    bad = built.directory / "artifacts" / "notes.txt"
    bad.write_text("NOTES\n")
    with pytest.raises(WrongState, match="has other bytes than its record says"):
        copy_artifacts(made, to)
    assert not to.exists() and not parts(lab.root)
    bad.write_text("notes\n")
    to.mkdir()
    # somebody is quicker with the second
    link = artifacts._link

    def quicker(file: Path, place: Path) -> None:
        if place.name == "notes.txt":
            place.write_text("quick\n")
        link(file, place)

    monkeypatch.setattr(artifacts, "_link", quicker)
    with pytest.raises(Conflict, match="somebody else"):
        copy_artifacts(made, to)
    assert tree(to) == {"notes.txt": (b"quick\n", False)}
    monkeypatch.undo()
    # no room
    monkeypatch.setattr(files, "SPARE", 2**60)
    with pytest.raises(NoSpace):
        copy_artifacts(made, lab.root / "full")
    assert not (lab.root / "full").exists() and not parts(lab.root)


def test_names_that_two_steps_made_are_kept_apart(lab):
    steps = [run(name, f"echo {name} >x; ls x", artifacts="x") for name in ("one", "two")]
    with lab.site(steps) as site:
        record = run_cycle(site)
        to = lab.root / "to"
        copy_artifacts(made_by(site.paths, record.id, package=False), to)
        assert tree(to) == {"x": (b"one\n", False), "two": None, "two/x": (b"two\n", False)}
        # a record that leads elsewhere is not followed
        wrong = replace(record.outputs[0], path="artifacts/../../../key")
        replace(record, outputs=(wrong,)).save()
        with pytest.raises(WrongState, match="where no artifact is"):
            copy_artifacts(made_by(site.paths, record.id, package=False), lab.root / "other")


def test_a_build_without_files(lab):
    with lab.site([run("build", "true")]) as site:
        run_cycle(site)
    assert "made no files" in said(lab, "artifacts")
    assert "made no files" in said(lab, "artifacts", "--to", str(lab.root / "to"), status=1)


def _paths(lab: Lab):
    with lab.site(STEPS) as site:
        return site.paths


# ---- In and out of machines.


@pytest.fixture
def machine(lab: Lab) -> Path:
    """The home of dev2, which has something to copy."""
    lab.farm_file(STEPS)
    home = lab.dev2.home
    top = home / "src dir"
    (top / "deep" / "er").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "deep" / "er" / "file").write_bytes(b"x" * 300_000 + bytes(2_000_000) + b"y")
    (top / "tool").write_text("#!/bin/sh\n")
    (top / "tool").chmod(0o755)
    os.link(top / "tool", top / "same-tool")
    (top / "link").symlink_to("deep/er/file")
    (top / "up").symlink_to("deep/../tool")
    (top / ("n" * 120)).write_text("a long name\n")
    return home


def test_out_of_a_machine(lab, machine):
    to = lab.root / "to"
    to.mkdir()
    assert f"{to}/src dir (" in copied(lab, "dev2:src dir", str(to))
    assert tree(to / "src dir") == tree(machine / "src dir")
    assert not parts(to)
    error = copied(lab, "dev2:src dir", str(to), status=1)
    assert f"{to}/src dir is there already" in error
    copied(lab, f"dev2:{machine}/src dir", str(lab.root / "renamed"))
    assert tree(lab.root / "renamed") == tree(machine / "src dir")
    # a file, over another; through a link there
    (to / "link").write_text("old\n")
    copied(lab, "dev2:~/src dir/link", str(to))
    assert (to / "link").read_bytes() == (machine / "src dir" / "link").read_bytes()
    assert not (to / "link").is_symlink()
    copied(lab, "dev2:src dir/tool", str(to / "mine"))
    assert (to / "mine").stat().st_mode & 0o777 == 0o755
    copied(lab, "dev2:", str(lab.root / "home"))
    assert (lab.root / "home" / "src dir" / "tool").is_file()


def test_into_a_machine(lab, machine):
    here = lab.root / "here"
    shutil.copytree(machine / "src dir", here, symlinks=True)
    copied(lab, str(here), "dev2:")
    assert tree(machine / "here") == tree(here)
    assert "here is there already" in copied(lab, str(here), "dev2:", status=1)
    copied(lab, str(here), f"dev2:{machine}/new")
    copied(lab, str(here), "dev2:further/down/")
    assert tree(machine / "new") == tree(machine / "further" / "down" / "here") == tree(here)
    assert not parts(machine)
    (here / "tool").write_text("new\n")
    for target in ("dev2:new/tool", "dev2:new", "dev2:fresh/", "dev2:fresh/named"):
        copied(lab, str(here / "tool"), target)
    for there in ("new/tool", "fresh/tool", "fresh/named"):
        assert ((machine / there).read_text(), (machine / there).stat().st_mode & 0o777) == (
            "new\n",
            0o755,
        )
    odd = lab.root / "-n a:m e"
    odd.write_text("odd\n")
    subprocess.run(["mkfifo", here / "pipe"], check=True)
    copied(lab, str(odd), "dev2:-there")
    assert (machine / "-there").read_text() == "odd\n"
    error = copied(lab, str(here), "dev2:piped", status=1)
    assert "not all of it was copied: pipe: neither file, directory nor link" in error
    assert tree(machine / "piped")["link"] == "deep/er/file"


def test_into_a_machine_is_an_operation(lab, machine):
    """Under the VM's lock, in the journal, told to subscribers; out of one, nothing there is changed."""
    here = lab.root / "here"
    here.write_text("mine\n")
    farm = lab.farm_file([run("build", "true")])
    declared = json.loads(farm.read_text())
    told = {"command": ["sh", "-c", f"cat >>{lab.root}/told; echo >>{lab.root}/told"]}
    farm.write_text(json.dumps({**declared, "events": {"mine": told}}))
    planned = said(lab, "cp", str(here), "dev2:", "--plan")
    assert planned == f"would: dev2  {here} to the home of its login\n"
    assert not (machine / "here").exists()
    with Site(load(farm), reporter=QuietReporter()) as site, site.locks.hold("vm-dev2", doing="reset"):
        error = copied(lab, str(here), "dev2:", status=75)
        assert "dev2 is held by pid" in error and "doing: reset" in error
        assert not (machine / "here").exists()
        copied(lab, "dev2:src dir/tool", str(lab.root / "tool"))
    as_data = json.loads(said(lab, "cp", str(here), "dev2:", "--json"))
    assert (as_data["vm"], as_data["path"], as_data["bytes"]) == ("dev2", "here", 5)
    (machine / "pipe").mkdir()
    copied(lab, str(here), "dev2:pipe/here")
    assert "is there already" in copied(lab, str(machine / "pipe"), "dev2:", status=1)
    with Site(load(farm), reporter=QuietReporter()) as site:
        last, second, first = site.journal.history(9)
    assert (first.verb, first.vms, first.outcome) == ("cp", ("dev2",), "done")
    assert first.requester.user
    assert first.facts == {"source": str(here), "target": ""}
    assert (second.outcome, last.outcome) == ("done", "failed")
    events = [json.loads(line) for line in (lab.root / "told").read_text().splitlines()]
    assert [event["type"].partition(".")[2] for event in events[:2]] == ["began", "passed"]
    assert {event["data"]["operation"]["verb"] for event in events} == {"cp"}


def test_a_copy_into_a_machine_that_was_killed_is_noted(lab, machine):
    with Site(load(lab.farm_file([run("build", "true")])), reporter=QuietReporter()) as site:
        site.prepare()
        facts = CopyInFacts("here", "src")
        with pytest.raises(Interrupted), site.journal.begin(COPY_IN, ["dev2"], facts):
            raise Interrupted("as if it was killed")
    (lab.root / "here").touch()
    warned = typed(lab, "cp", str(lab.root / "here"), "dev2:")
    assert "a cp of" in (err := warned.communicate(timeout=120)[1]) and "noted" in err
    with Site(load(lab.farm_file([run("build", "true")])), reporter=QuietReporter()) as site:
        assert site.journal.unfinished() == ()


def test_what_can_not_be_copied(lab, machine):
    os.mkfifo(machine / "pipe")
    for source, target, words in (
        ("a", "b", "neither a nor b is in a VM"),
        ("dev2:a", "prod:b", "one of both is in a VM"),
        ("devv2:a", ".", "did you mean dev2?"),
        ("dev2:nonesuch", ".", "dev2: there is no nonesuch"),
        ("dev2:src dir", "nonesuch/below", "there is no directory"),
        ("nonesuch", "dev2:", "cannot read nonesuch"),
        ("dev2:pipe", ".", "dev2: pipe is neither file nor directory"),
    ):
        mistyped = "in a VM" in words or "did you mean" in words
        assert words in copied(lab, source, target, status=2 if mistyped else 1)
    assert "what is to be copied, and where to?" in said(lab, "cp", "dev2:", status=2)
    # root reads all: a tar that may not
    lines = "tar: ./tool: Cannot open: Permission denied", "tar: Exiting with failure status due to x"
    _stand_in(lab, "".join(f"echo '{line}' >&2; " for line in lines) + "exit 2")
    error = copied(lab, "dev2:src dir", str(lab.root / "out"), status=69)
    assert "dev2: reading src dir: tar: ./tool: Cannot open: Permission denied" in error
    assert not parts(lab.root) and not (lab.root / "out").exists()


def _stand_in(lab: Lab, tar: str) -> None:
    tools = lab.root / "tools"
    tools.mkdir()
    (tools / "tar").write_text(f"#!/bin/sh\n{tar}\n")
    (tools / "tar").chmod(0o755)
    lab.dev2.stop()
    config = lab.dev2.root / "config"
    config.write_text(config.read_text().replace("SetEnv ", f"SetEnv PATH={tools}:/usr/bin:/bin "))
    lab.dev2.start()


def test_by_busybox(lab, machine):
    """Its tar has none of GNU's options; long names by headers of their own all the same."""
    if shutil.which("busybox") is None:
        pytest.fail("these tests need busybox")
    _stand_in(lab, 'exec busybox tar "$@"')
    to = lab.root / "to"
    copied(lab, "dev2:src dir", str(to))
    assert tree(to) == tree(machine / "src dir")
    copied(lab, str(to), "dev2:back")
    assert tree(machine / "back") == tree(to)


def test_a_copy_in_that_fails_leaves_nothing_there(lab, machine):
    here = lab.root / "here"
    here.mkdir()
    (here / "file").write_bytes(b"x" * 4_000_000)

    async def go() -> None:
        async with await Connection.open(lab.dev2.endpoint()) as connection:
            await copy_in(connection, here, "back", lambda _: None)

    _stand_in(lab, "head -c 100000 >/dev/null; echo 'tar: no room' >&2; exit 2")
    with pytest.raises(DriverFailed, match="writing back: tar: no room"):
        asyncio.run(go())
    assert not parts(machine) and not (machine / "back").exists()


def test_interrupted_nothing_is_left(lab, machine):
    """Half way: by the one who waits, at any size."""

    async def go(work, *arguments) -> None:
        async with await Connection.open(lab.dev2.endpoint()) as connection:
            begun = asyncio.Event()
            loop = asyncio.get_running_loop()
            task = asyncio.create_task(
                work(connection, *arguments, lambda _: loop.call_soon_threadsafe(begun.set))
            )
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with (machine / "large").open("wb") as large:
        large.truncate(400_000_000)
    (machine / "dir").mkdir()
    (machine / "large").rename(machine / "dir" / "large")
    asyncio.run(go(copy_out, "dir", lab.root / "out"))
    assert not (lab.root / "out").exists() and not parts(lab.root)
    asyncio.run(go(copy_in, machine / "dir", "in"))
    assert not (machine / "in").exists() and not parts(machine)
