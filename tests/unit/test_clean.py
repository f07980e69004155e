"""``clean`` remade with tools: on the fake, whose machines run nothing; what is installed is written to
their disks from here. A real guest is in tests/system/test_demo.py, kills are in
tests/faults/test_clean_kills.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_farm import Desk, lines
from test_renew import checkpoints, content, disk, write

from builds import clean
from builds.clean import Clean
from builds.packages.plan import template_of
from builds.tools import ToolsOrder
from cli import views
from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from inventory.errors import (
    DriverFailed,
    TimedOut,
    ToolsFailed,
    Unsupported,
    UsageError,
    WrongState,
    spelled,
)
from provision.clean_state import AddedTools, clean_of, clean_state
from provision.engine.report import Outcome
from provision.engine.runner import perform
from provision.member import Member
from provision.operations.checkpoint_remove import kept_states
from provision.site import Site
from tests import farm

NEW = "clean-1-of-base-1"


def equip(member: Member, order: ToolsOrder, sources: Sequence[str]) -> Sequence[str]:
    store: Any = member.store
    before = store.content(member.machine)
    store.write(member.machine, before + f"{','.join(order.packages)};{order.script}".encode())
    return [f"{package} 1.0 amd64" for package in order.packages]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """prod runs, and holds what its guest wrote."""
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setattr(clean, "equip", equip)
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    write(desk, b"work")
    yield desk


def remade(site: Site, vms: Sequence[str] = ("prod",), **request: Any) -> Outcome[Any]:
    return perform(site, Clean(tuple(vms), **request))


def state(desk: Desk, vm: str = "prod") -> str:
    with desk.site() as site:
        found = Member(site, vm).disk()
        assert found
        return clean_state(site.paths, vm, found).words


def test_clean_has_tools_from_then_on(made: Desk) -> None:
    done = made.run(remade, packages=("ccache", "git"), script="touch ca", script_name="/x/ca.sh")
    assert lines(done) == [
        "prod: shut down, go back to base@1, start, install ccache, git, run ca.sh as root, "
        f"shut down, keep that as clean ({NEW}), start, wait until its ssh answers; until it answers, "
        "its clean and its state stay"
    ]
    tools = done.result.vms["prod"]
    assert isinstance(tools, AddedTools)
    assert tools.packages == ("ccache 1.0 amd64", "git 1.0 amd64")
    assert (tools.script, tools.script_sha256[:8]) == ("/x/ca.sh", "252ab431")
    assert tools.by
    assert made.machine("prod").power == "running"
    assert (disk(made).base, content(made)) == (NEW, b"ccache,git;touch ca")
    assert checkpoints(made) == ["clean", NEW], "the state before is gone with what was written to it"
    write(made, b"dirty")
    made.run(farm.reset, ["prod"])
    assert content(made) == b"ccache,git;touch ca"
    made.run(farm.reset, ["prod"], to="clean")
    assert disk(made).base == NEW
    assert state(made) == "base@1 with ccache, git, and what ca.sh did"
    assert state(made, "dev2") == "base@1"
    with made.site() as site:
        status = farm.status(site)
        assert {vm.vm: vm.clean for vm in status.vms}["prod"] == state(made)
        assert f"prod: its clean is {state(made)}" in spelled(views.farm_status(status).text)
        listed = spelled(views.checkpoints(kept_states(site)).text).splitlines()
    assert [line.split()[:2] for line in listed if "its clean" in line] == [["prod", NEW]]


def test_it_is_remade_from_the_template(made: Desk) -> None:
    made.run(remade, packages=("ccache",))
    done = made.run(remade, packages=("git",))
    assert "until it answers, its clean (base@1 with ccache) and its state stay" in lines(done)[0]
    assert (checkpoints(made), content(made)) == (["clean", "clean-2-of-base-1"], b"git;")
    assert state(made) == "base@1 with git"
    made.run(farm.stop, ["prod"])
    made.run(remade)
    assert (made.machine("prod").power, content(made), state(made)) == ("stopped", b"", "base@1")
    made.run(farm.reset, ["prod"])
    assert content(made) == b""
    assert lines(made.run(remade)) == ["prod: its clean is base@1, with nothing added"]


@pytest.mark.parametrize("before", [b"", b"ccache;"])
def test_a_failure_leaves_all_as_it_was(
    made: Desk, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    if before:
        made.run(remade, packages=("ccache",))
        write(made, b"work")

    def fails(*_: object) -> Sequence[str]:
        raise ToolsFailed("could not install gti: E: Unable to locate package gti", vm="prod")

    with monkeypatch.context() as patch, made.site() as site, pytest.raises(ToolsFailed):
        patch.setattr(clean, "equip", fails)
        remade(site, packages=("gti",))
    assert "Unable to locate package gti; it goes back" in made.heard.warnings[-1]
    assert (content(made), made.machine("prod").power) == (b"work", "running")
    assert state(made) == ("base@1 with ccache" if before else "base@1")
    made.run(farm.reset, ["prod"])
    assert content(made) == before
    made.run(remade, packages=("git",))
    assert content(made) == b"git;"
    assert len(checkpoints(made)) == 2, "nor does the kept state of the failed one stay"


def test_one_that_does_not_answer_goes_back(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    real, starts = FakeHypervisor.start, []

    def start(self: FakeHypervisor, name: str, **more: bool) -> None:
        starts.append(name)
        if len(starts) == 2:  # the first one installs
            raise TimedOut("no answer")
        real(self, name, **more)

    monkeypatch.setattr(FakeHypervisor, "start", start)
    with made.site() as site, pytest.raises(TimedOut, match="no answer"):
        remade(site, packages=("git",))
    assert (content(made), made.machine("prod").power, state(made)) == (b"work", "running", "base@1")
    assert checkpoints(made) == ["clean", f"before-{NEW}"]


@pytest.mark.parametrize(
    ("at", "number"),
    [("checkpoint", 1), ("checkpoint", 2), ("restore", 1), ("start", 1), ("start", 2),
     ("remove_checkpoint", 1), ("remove_checkpoint", 2)],
)  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_anywhere_it_is_the_old_or_the_new(
    made: Desk, monkeypatch: pytest.MonkeyPatch, at: str, number: int, when: str
) -> None:
    made.run(remade, packages=("ccache",))
    write(made, b"work")
    where: Any = FakeHypervisor if at == "start" else FakeDisks
    real, calls = getattr(where, at), []

    def cut(*args: Any, **more: Any) -> Any:
        calls.append(args)
        if len(calls) < number or when == "after":
            done = real(*args, **more)
            if len(calls) < number:
                return done
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, made.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, at, cut)
        remade(site, packages=("git",))
    with made.site() as site:
        assert "was interrupted" in lines(farm.recover(site))[0]
        assert not site.journal.unfinished()
    assert made.machine("prod").power == "running"
    if at == "remove_checkpoint":
        assert (state(made), content(made)) == ("base@1 with git", b"git;")
        assert checkpoints(made) == ["clean", "clean-2-of-base-1"]
    else:
        assert (state(made), content(made)) == ("base@1 with ccache", b"work")


@pytest.mark.parametrize("was_on", [False, True])
@pytest.mark.parametrize("is_on", [False, True])
def test_recovered_after_its_answer_it_runs_as_before(made: Desk, was_on: bool, is_on: bool) -> None:
    """It was on for that; by then this machine may have lost its power."""
    if not was_on:
        made.run(farm.stop, ["prod"])
    _cut_off_after_its_answer(made)
    if not is_on:
        with made.site() as site:
            Member(site, "prod").driver.stop("kata-prod", grace=0)
    with made.site(plan=True) as site:
        planned = lines(farm.recover(site))
    with made.site() as site:
        told = lines(farm.recover(site))
    assert told == planned
    then = {(False, True): "; shut it down again", (True, False): "; start it again"}
    assert told[0].endswith(f"remove the one before{then.get((was_on, is_on), '')}")
    assert made.machine("prod").power == ("running" if was_on else "stopped")
    assert (state(made), content(made)) == ("base@1 with git", b"git;")


def test_recovered_after_its_answer_it_says_that_its_warm_one_is_gone(made: Desk) -> None:
    made.write("  dev2: {memory: 512M}\n  prod: {memory: 512M, reset_to: warm}\n")
    made.run(farm.reset, ["prod"], to="clean")
    made.run(farm.clone_farm)
    _cut_off_after_its_answer(made)
    with made.site() as site:
        farm.recover(site)
    assert checkpoints(made) == ["clean", NEW]
    gone = "prod: it has no checkpoint warm of this clean yet: clone-farm --vm prod"
    assert gone in made.heard.warnings
    made.run(farm.clone_farm, ["prod"])
    assert checkpoints(made) == ["clean", NEW, "warm"]
    made.run(farm.reset, ["prod"])
    assert content(made) == b"git;"


def _cut_off_after_its_answer(desk: Desk) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, desk.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeDisks, "remove_checkpoint", cut)
        remade(site, packages=("git",))


def test_another_generation_has_its_own(made: Desk) -> None:
    made.run(remade, packages=("ccache", "git"))
    made.run(farm.checkpoint, ["prod"], "mine")
    with made.site() as site:
        farm.template_build(site, "base")
    done = made.run(farm.renew, ["prod"])
    assert lines(done)[1] == (
        "prod: its clean (base@1 with ccache, git) stays behind; the same on base@2: "
        "clean --vm prod --packages ccache,git"
    )
    assert (state(made), content(made)) == ("base@2", b"")
    made.run(farm.reset, ["prod"])
    assert (disk(made).base, content(made)) == ("clean", b"")
    made.run(remade, packages=("git",))
    assert state(made) == "base@2 with git"
    assert checkpoints(made) == ["clean", NEW, "mine", "clean-1-of-base-2"]
    made.run(farm.reset, ["prod"], to=NEW)
    assert content(made) == b"ccache,git;", "what is not clean any more can be gone back to"


def test_a_warm_checkpoint_is_made_anew(made: Desk) -> None:
    made.write("  dev2: {memory: 512M}\n  prod: {memory: 512M, reset_to: warm}\n")
    made.run(farm.reset, ["prod"], to="clean")
    made.run(farm.clone_farm)
    assert checkpoints(made) == ["clean", "warm"]
    old = disk(made).checkpoints[1].id
    done = made.run(remade, packages=("git",))
    assert lines(done)[1:] == ["prod: once it answers, keep as warm, disk and memory"]
    assert checkpoints(made) == ["clean", NEW, "warm"]
    assert disk(made).checkpoints[2].id != old
    made.run(farm.reset, ["prod"])
    assert content(made) == b"git;"
    made.run(farm.reset, ["prod"], to="clean")
    assert disk(made).base == NEW
    made.run(farm.stop, ["prod"])
    made.run(remade, packages=("ccache",))
    assert (made.machine("prod").power, checkpoints(made)[-1]) == ("suspended", "warm")


def test_a_warm_checkpoint_that_was_not_made_yet_is_made_by_clone_farm(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.write("  dev2: {memory: 512M}\n  prod: {memory: 512M, reset_to: warm}\n")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, made.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(clean, "_keep_warm", killed)
        remade(site, packages=("git",))
    assert checkpoints(made) == ["clean", NEW]
    assert "prod: once it answers, keep as warm, disk and memory" in lines(made.run(farm.clone_farm))
    assert checkpoints(made) == ["clean", NEW, "warm"]


def test_what_packages_are_built_on_is_another_then(made: Desk) -> None:
    def built_on(to: str) -> str:
        with made.site() as site:
            return template_of(site, "prod", to)

    own = built_on("clean")
    made.run(remade, packages=("git",))
    first = built_on("clean")
    assert own != first == built_on(NEW)
    assert "prod: already as declared" in lines(made.run(farm.clone_farm))
    with made.site() as site:
        farm.destroy(site, ["prod"])
    made.run(farm.clone_farm)
    assert built_on("clean") == own
    made.run(remade, packages=("ccache",))
    assert built_on("clean") != first, "the number may come again, the checkpoint doesn't"


def test_a_warm_checkpoint_that_can_not_go_is_not_taken_for_new(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.write("  dev2: {memory: 512M}\n  prod: {memory: 512M, reset_to: warm}\n")
    made.run(farm.reset, ["prod"], to="clean")
    made.run(farm.clone_farm)
    real = FakeDisks.remove_checkpoint

    def remove(self: FakeDisks, machine: str, name: str) -> None:
        if name == "warm":
            raise WrongState(f"{machine}'s checkpoint warm stays: mine grows from it")
        real(self, machine, name)

    monkeypatch.setattr(FakeDisks, "remove_checkpoint", remove)
    with made.site() as site, pytest.raises(WrongState, match="warm is of the clean before"):
        remade(site, packages=("git",))
    assert (state(made), content(made)) == ("base@1 with git", b"git;")
    with made.site() as site:
        assert not site.journal.unfinished()


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("was_on", [False, True])
@pytest.mark.parametrize("at", ["_keep_warm", "_pause", "_run_on", "settle"])
def test_one_that_was_off_is_off_again_whatever_becomes_of_its_warm_one(
    made: Desk, monkeypatch: pytest.MonkeyPatch, at: str, was_on: bool, killed: bool
) -> None:
    made.write("  dev2: {memory: 512M}\n  prod: {memory: 512M, reset_to: warm}\n")
    if not was_on:
        made.run(farm.stop, ["prod"])

    def fails(*_: object) -> None:
        raise KeyboardInterrupt if killed else DriverFailed("no room")

    with (
        monkeypatch.context() as patch,
        made.site() as site,
        pytest.raises(KeyboardInterrupt if killed else DriverFailed),
    ):
        patch.setattr(clean if at == "_keep_warm" else FakeHypervisor, at, fails)
        remade(site, packages=("git",))
    if not killed and at != "settle":  # without that a VM that stands still is left to recovery
        assert (made.machine("prod").power == "running") is was_on
    with made.site() as site:
        farm.recover(site)
        assert not site.journal.unfinished()
    assert (made.machine("prod").power == "running") is was_on
    assert state(made) == "base@1 with git"


def test_what_it_is_does_not_hang_on_the_farms_state(made: Desk) -> None:
    made.run(remade, packages=("ccache",))
    with made.site() as site:
        (site.paths.root / "tools" / "prod.json").unlink()
    assert state(made) == "base@1 with tools that nobody knows any more"
    made.run(farm.reset, ["prod"])
    assert content(made) == b"ccache;"
    made.run(remade, packages=("ccache",))
    with made.site() as site:
        farm.destroy(site, ["prod"])
        assert not list((site.paths.root / "tools").iterdir())
    made.run(farm.clone_farm)
    assert state(made) == "base@1"


def test_what_is_refused(made: Desk) -> None:
    with pytest.raises(UsageError, match="'-o' is no package's name"):
        Clean(("prod",), packages=("-o",))
    with made.site() as site, pytest.raises(UsageError, match="only the task clean gives"):
        farm.checkpoint(site, ["prod"], NEW)
    made.run(remade, packages=("ccache",))
    with made.site() as site, pytest.raises(UsageError, match="is what its clean is") as refused:
        farm.checkpoint_remove(site, ["prod"], NEW)
    assert spelled(refused.value.remedy).endswith("clean --vm prod --from-template")
    made.write(
        "  dev2: {address: 192.0.2.1}\n  prod: {address: 192.0.2.2, reset: 'true'}\n", "driver: ssh"
    )
    with made.site() as site, pytest.raises(Unsupported, match="keeps no checkpoints"):
        remade(site, packages=("git",))


def test_a_guest_without_a_network_is_refused_before_anything(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made.site() as site:
        host = type(site.farm.hosts["here"])
    monkeypatch.setattr(host, "INFO", replace(host.INFO, forwards=True))
    with made.site() as site, pytest.raises(Unsupported, match="prod has no network") as refused:
        remade(site, packages=("git",))
    assert "package_cache" in spelled(refused.value.remedy)
    made.run(remade, script="true", script_name="x.sh")
    assert state(made) == "base@1 with what x.sh did"


def test_which_checkpoint_clean_is() -> None:
    names = ["clean", "clean-2-of-base-1", "clean-10-of-base-1", "clean-11-of-base-12", "clean-3-of-x"]
    made = list(map(_named, names))
    assert clean_of(made, "base@1") == "clean-10-of-base-1"
    assert clean_of(made, "base@2") == "clean"


def _named(name: str) -> Any:
    from datetime import UTC, datetime

    from hypervisors.api import Checkpoint

    return Checkpoint(name=name, created=datetime.now(UTC))


def test_a_login_that_can_not_be_root_is_refused_before_anything(made: Desk) -> None:
    made.file.write_text(f"{made.file.read_text()}ssh: {{user: admin, key: id}}\n")
    with made.site() as site, pytest.raises(Unsupported, match="what is added to clean needs root"):
        remade(site, packages=("git",))
    made.run(remade)


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff\xfe"])
def test_what_is_no_script(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "it").write_bytes(data)
    with pytest.raises(UsageError, match="is no script"):
        clean.read_script(tmp_path / "it")
    with pytest.raises(WrongState, match="none: No such file or directory"):
        clean.read_script(tmp_path / "none")


@pytest.mark.parametrize("when", ["", "yesterday", "2026-11-29T12:00:00"])
def test_a_damaged_note_is_none(made: Desk, when: str) -> None:
    made.run(remade, packages=("ccache",))
    with made.site() as site:
        (file,) = (site.paths.root / "tools").glob("*.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "made": when}))
    assert state(made) == "base@1 with tools that nobody knows any more"
