"""Two controllers with one farm name on one host: what one made the other never takes for its own, and
says whose it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from controllers import VMS, Controller

from host.paths import cache_dir
from host.processes import end
from hypervisors.libvirt.private import PrivateLibvirt
from inventory.errors import Busy, NotFound, NotOurs, Several, UsageError, WrongState, spelled
from provision import farm_identity
from provision.doctor import examine
from provision.engine.journal import Entry
from provision.engine.locks import lock_of
from provision.engine.runner import perform
from provision.operations.adopt import Adopt
from provision.operations.templates import TemplateRemove
from provision.site import Site
from tests import farm
from tests.contract import xenapi_rig

KINDS = ("fake", "qcow2", "xenapi")


@pytest.fixture(scope="module")
def server() -> Iterator[xenapi_rig.TestServer]:
    made = xenapi_rig.TestServer()
    yield made
    made.close()


@pytest.fixture(params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Controller, Controller]]:
    """Each has a state directory and a farm file of its own; the first has made its VMs."""
    for name in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name))
    world: Path | None = tmp_path / "world"
    host, more = "driver: fake", ""
    if request.param == "qcow2":
        host = f"driver: kvm, uri: 'qemu:///system', disks: {{path: {tmp_path / 'disks'}}}"
    elif request.param == "xenapi":
        server, world = request.getfixturevalue("server"), None
        host = (
            f"driver: xenapi, uri: '{server.https}', credentials: {server.credentials}, ca: {server.ca}"
        )
        more = f"network: {{mode: network, network: '{server.network}', addressing: dhcp}}"
    first = Controller(tmp_path / "first", host, world, more)
    second = Controller(tmp_path / "second", host, world, more)
    first.seal()
    with first.site() as site:
        farm.clone_farm(site, start=False)
    second.seal()
    yield first, second
    if request.param == "xenapi":
        for one in (first, second):
            with one.site() as site:
                farm.destroy(site)


def seen(controller: Controller) -> list[tuple[str, str, tuple[str, ...]]]:
    """Its VMs, with their checkpoints."""
    with controller.site() as site:
        disks = sorted(site.disks("here").list(), key=lambda disk: disk.machine)
        machines = {machine.name: machine.owner.farm.short for machine in site.hypervisor("here").list()}
        return [(d.machine, machines[d.machine], tuple(c.name for c in d.checkpoints)) for d in disks]


def test_the_other_ones_vms_are_refused_with_both_named(pair) -> None:
    first, second = pair
    before = seen(first)
    assert [machine for machine, *_ in before] == ["kata-dev2", "kata-prod"]
    for change in (
        lambda site: farm.clone_farm(site, start=False),
        lambda site: farm.reset(site, ["prod"], start=False),
        lambda site: farm.start(site, ["prod"]),
        lambda site: farm.stop(site, ["prod"]),
        lambda site: farm.checkpoint(site, ["prod"], "x"),
        lambda site: farm.destroy(site, ["prod"]),
    ):
        with second.site() as site, pytest.raises(NotOurs) as caught:
            change(site)
        assert str(first.file) in caught.value.message
        assert str(second.file) in caught.value.message
        assert "adopt" in spelled(caught.value.remedy)
    assert seen(first) == before
    assert seen(second) == []


def test_status_and_gc_and_destroy_tell_of_the_other_and_take_nothing(pair) -> None:
    first, second = pair
    before = seen(first)
    with second.site() as site:
        status = farm.status(site)
        swept = farm.gc(site)
        gone = farm.destroy(site)
    assert {vm.state for vm in status.vms} == {"not ours"}
    (line,) = status.hosts[0].others
    assert str(first.file) in spelled(line)
    assert "kata-dev2 and kata-prod" in spelled(line) or "kata-dev2, kata-prod" in spelled(line)
    for outcome in (swept, gone):
        told = [spelled(action.text) for action in outcome.actions if action.verb == "note"]
        assert any(str(first.file) in text for text in told), told
    assert not [action for action in swept.actions if action.verb == "discard"]
    assert seen(first) == before
    with first.site() as site:
        assert farm.status(site).hosts[0].others == ()


def test_the_other_ones_template_is_neither_used_nor_removed(pair) -> None:
    first, second = pair
    with first.site() as site:
        farm.destroy(site, ["dev2", "prod"])  # nothing leans on it any more
        (mine,) = site.templates("here")
    with second.site() as site:
        listed = {t.label: t.farm for t in farm.template_list(site)}
        assert listed == {"base@1": mine.farm, "base@2": site.identity}
        with pytest.raises(NotOurs) as caught:
            perform(site, TemplateRemove("base@1"))
        assert str(first.file) in caught.value.message and str(second.file) in caught.value.message
        farm.clone_farm(site, start=False)
        assert {disk.template for disk in site.disks("here").list()} == {"base@2"}
        assert not [a for a in farm.gc(site).actions if a.verb == "discard"]
        done = [spelled(action.text) for action in farm.destroy(site).actions]
        assert "remove template base@2" in done and "remove template base@1" not in done
        assert any("template base@1" in text for text in done if str(first.file) in text), done
    with first.site() as site:
        assert list(site.disks("here").templates()) == [mine]


def test_a_lost_controllers_vms_are_adopted(pair) -> None:
    first, second = pair
    with first.site() as site:
        farm.checkpoint(site, ["prod"], "one")
    was = seen(first)
    shutil.rmtree(first.state)  # and so it knows its own no more
    with first.site() as site, pytest.raises(NotOurs):
        farm.reset(site, ["prod"], start=False)
    with second.site(plan=True, adopting=True) as site:
        planned = perform(site, Adopt())
    with second.site(adopting=True) as site:
        done = perform(site, Adopt())
        ours = site.identity
    assert done.actions == planned.actions
    assert (done.result.vms, done.result.templates) == (("dev2", "prod"), ("base@1",))
    assert str(first.file) in done.result.of
    assert seen(second) == [(machine, ours.short, kept) for machine, _, kept in was]
    with second.site() as site:
        farm.reset(site, ["prod"], to="one", start=False)
        assert farm.status(site).hosts[0].others == ()
        assert farm.gc(site).actions[0].verb != "discard"
        farm.destroy(site)
    assert seen(second) == []


def test_some_of_them_are_adopted_and_the_rest_stays(pair) -> None:
    first, second = pair
    with second.site(adopting=True) as site, pytest.raises(NotFound, match="dev3"):
        perform(site, Adopt(("dev3",)))
    with second.site(adopting=True) as site:
        assert perform(site, Adopt(("dev2",))).result.vms == ("dev2",)
    assert [machine for machine, *_ in seen(first)] == ["kata-prod"]
    assert [machine for machine, *_ in seen(second)] == ["kata-dev2"]
    with first.site() as site, pytest.raises(NotOurs):
        farm.reset(site, ["dev2"], start=False)
    with first.site() as site:
        farm.reset(site, ["prod"], start=False)
    with second.site(adopting=True) as site:
        perform(site, Adopt())
    with second.site(adopting=True) as site:
        assert [action.verb for action in perform(site, Adopt()).actions] == ["keep"]


def _adopt(site: Site) -> None:
    perform(site, Adopt())


def _killed(controller: Controller, does: Callable[[Site], object], steps: int) -> int:
    """In a process of its own, that is killed right after it has noted its last step. How it ended."""
    child = os.fork()
    if child == 0:
        left, step = iter(range(steps)), Entry.step

        def last(self: Entry[Any], text: str) -> None:
            step(self, text)
            if next(left, None) is None:
                os._exit(9)

        status = 1
        try:
            Entry.step = last  # type: ignore[method-assign]
            with controller.site(adopting=does is _adopt) as site:
                does(site)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_an_adoption_that_was_killed_is_finished(pair) -> None:
    first, second = pair
    steps = 0
    while ended := _killed(second, _adopt, steps):
        assert ended == 9
        steps += 1
        with second.site() as site:
            assert not site.journal.unfinished() or "recover" in {
                action.verb for action in farm.recover(site).actions
            }
    assert steps > 0
    assert [machine for machine, *_ in seen(second)] == ["kata-dev2", "kata-prod"]
    assert seen(first) == []
    with second.site() as site:
        assert farm.gc(site).actions[0].verb != "discard"


def test_what_one_is_changing_the_other_waits_for(pair) -> None:
    first, second = pair
    with first.site() as site, site.locks.hold(lock_of("prod"), doing="reset prod to clean"):
        with second.site(adopting=True) as other, pytest.raises(Busy) as caught:
            perform(other, Adopt())
        assert "kata-prod" in caught.value.message
        assert str(first.file) in caught.value.message
        assert "doing: reset prod to clean" in caught.value.message
        with second.site(adopting=True) as other:
            assert perform(other, Adopt(("dev2",))).result.vms == ("dev2",)
    with second.site(adopting=True) as other:
        assert perform(other, Adopt()).result.vms == ("prod",)
    assert not list(first.place.parent.rglob("*leases"))


def test_of_several_such_farms_one_is_named(pair, tmp_path) -> None:
    first, second = pair
    third = Controller(tmp_path / "third", first.host, first.world, first.more)
    with second.site(adopting=True) as site:
        perform(site, Adopt(("dev2",)))
        short = site.identity.short
    with third.site(adopting=True) as site, pytest.raises(UsageError, match="several") as caught:
        perform(site, Adopt())
    assert str(first.file) in caught.value.message
    assert str(second.file) in caught.value.message
    with third.site(adopting=True, plan=True) as site:
        assert perform(site, Adopt(of=short)).result.vms == ("dev2",)


# One state directory


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Controller:
    for name in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name))
    made = Controller(tmp_path / "alone", "driver: fake", tmp_path / "world")
    made.seal()
    with made.site() as site:
        farm.clone_farm(site, start=False)
    return made


def test_a_second_farm_file_of_the_name_is_refused_until_it_adopts(alone) -> None:
    before = seen(alone)
    other = alone.place / "other.yaml"
    alone.write(other, "  third: {memory: 64M}\n")
    for plan in (True, False):
        with pytest.raises(NotOurs) as caught:
            alone.site(other, plan=plan)
        assert f"{alone.file}" in caught.value.message
        assert f"{other}" in caught.value.message
    with alone.site(other, adopting=True, plan=True) as site:
        (action,) = perform(site, Adopt()).actions
    assert f"from now on it is {other}'s" in spelled(action.text)
    with alone.site(other, adopting=True) as site:
        assert perform(site, Adopt()).actions == (action,)
    with pytest.raises(NotOurs):
        alone.site()
    with alone.site(other) as site:
        assert [d.machine for d in site.disks("here").list()] == [machine for machine, *_ in before]


def test_a_copy_of_the_farm_file_is_the_same_until_it_says_something_else(alone) -> None:
    before, copy = seen(alone), alone.place / "copy.yaml"
    shutil.copy(alone.file, copy)
    with alone.site(copy) as site:
        farm.reset(site, ["prod"], start=False)
    alone.write(alone.file, VMS + "  new: {memory: 64M}\n")
    with pytest.raises(NotOurs, match=r"copy\.yaml"):
        alone.site()
    assert [machine for machine, *_ in before] == ["kata-dev2", "kata-prod"]


def test_a_farm_file_that_moved_is_the_same(alone) -> None:
    before = seen(alone)
    moved = alone.place / "moved.yaml"
    alone.file.rename(moved)
    alone.file.write_text("farm: another\n")  # what has its old name by now is none of it
    alone.file = moved
    with alone.site() as site:
        farm.checkpoint(site, ["prod"], "x")
    assert [machine for machine, *_ in seen(alone)] == [machine for machine, *_ in before]
    assert json.loads((alone.state / "farms/kata/identity.json").read_text())["file"] == str(moved)


def test_a_state_directory_that_moved_is_the_same_and_a_copy_is_not(alone) -> None:
    before, moved = seen(alone), alone.place / "moved"
    alone.state.rename(moved)
    alone.state = moved
    assert seen(alone) == before
    with alone.site() as site:
        farm.checkpoint(site, ["prod"], "x")
    copy = alone.place / "copy"
    shutil.copytree(moved, copy)
    alone.state = copy
    with pytest.raises(NotOurs, match=str(moved)):
        alone.site()
    with alone.site(adopting=True) as site:
        assert len(perform(site, Adopt()).actions) == 4  # the state, two VMs and a template
    assert [machine for machine, *_ in seen(alone)] == ["kata-dev2", "kata-prod"]
    alone.state = moved
    assert seen(alone) == []


def test_a_state_directory_from_another_machine_is_refused(alone, monkeypatch) -> None:
    monkeypatch.setattr(farm_identity, "_machine", lambda: "0" * 32)
    with pytest.raises(NotOurs, match=r"machine-id.* number is new"):
        alone.site()
    report = examine(alone.file)  # which says that, and all the rest
    (check,) = (check for check in report.checks if check.name == "state")
    assert not check.ok
    assert "adopt" in spelled(check.remedy)
    with alone.site(adopting=True) as site:
        perform(site, Adopt())
    assert len(seen(alone)) == 2
    monkeypatch.undo()


NUL = b'{"format":1,"id":"%s","file":"\\u0000","controller":"","machine":"","place":""}' % (b"0" * 32)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"id": 7}', b"\xff\xfe", b"[1]", NUL])
def test_a_damaged_identity_is_said(alone, damage) -> None:
    (alone.state / "farms/kata/identity.json").write_bytes(damage)
    with pytest.raises(WrongState, match=r"identity\.json.* is damaged"):
        alone.site()


def test_a_private_libvirtd_of_another_state_directory_is_let_be(tmp_path, monkeypatch) -> None:
    """Both have one runtime directory, as all of a user's have."""
    monkeypatch.setenv("FARMHAND_CACHE_DIR", str(cache_dir()))
    for name in ("STATE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name))
    place = Path(tempfile.mkdtemp(prefix="fh-"))  # short, for sockets, and QEMU's user passes through
    place.chmod(0o711)
    first, second = (Controller(place / name, "driver: kvm", None) for name in ("first", "second"))
    first.run = second.run = place / "run"
    try:
        first.seal()
        with first.site() as site:
            farm.clone_farm(site, start=False)
        second.seal()
        with second.site() as site, pytest.raises(Several) as caught:
            farm.clone_farm(site, start=False)
        assert {type(error) for error in caught.value.errors.values()} == {NotOurs}
        assert str(first.state) in caught.value.message
        assert "FARMHAND_RUNTIME_DIR" in spelled(caught.value.remedy)
        with second.site() as site:
            farm.destroy(site)
        with first.site() as site:
            daemon = site.daemon()
            assert daemon
            assert daemon.running()
            assert len(site.hypervisor("here").list()) == 2
            farm.destroy(site)
            assert not daemon.running()
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    """A farm with one VM, which runs, of its own libvirtd."""
    monkeypatch.setenv("FARMHAND_CACHE_DIR", str(cache_dir()))
    for name in ("STATE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name))
    place = Path(tempfile.mkdtemp(prefix="fh-"))  # short, for sockets, and QEMU's user passes through
    place.chmod(0o711)
    made = Controller(place / "one", "driver: kvm", None)
    made.write(made.file, "  prod: {memory: 64M}\n")
    try:
        made.seal()
        with made.site() as site:
            farm.clone_farm(site, start=False)
            farm.start(site, wait=False)
        yield made
    finally:
        with made.site() as site:
            site.daemon().stop(force=True)
        shutil.rmtree(place, ignore_errors=True)


def test_what_runs_is_seen_from_every_runtime_directory(one) -> None:
    """As of a user who came in by ssh, and from cron: his VMs' disks aren't changed under them."""
    own, one.run = one.run, one.place / "other"
    with one.site() as site:
        (vm,) = farm.status(site).vms
        assert vm.state == "running"
        assert site.daemon().machines_running() == (vm.machine,)
        farm.reset(site, ["prod"], start=False)
        assert site.daemon().machines_running() == ()
        farm.destroy(site)
    assert not (own / "kata/run").exists()
    one.seal()
    with one.site() as site:  # where nothing lives it is made where it is asked for
        farm.clone_farm(site, start=False)
        assert (one.run / "kata/run").exists()
        farm.destroy(site)


def test_a_state_directory_that_is_lost_while_vms_run_is_begun_anew(one) -> None:
    """Its libvirtd can keep nothing any more, and would be in the way for ever."""
    shutil.rmtree(one.state)
    one.seal()
    with one.site() as site, pytest.raises(WrongState, match="was removed, or put back") as caught:
        farm.clone_farm(site, start=False)
    _, _, pid = spelled(caught.value.remedy).rpartition(" kill ")
    with one.site() as site:
        assert caught.value.message in farm.status(site).vms[0].error
    assert end(os.pidfd_open(int(pid)), signal.SIGTERM, timeout=30)
    with one.site() as site:
        farm.clone_farm(site, start=False)
        assert [machine.name for machine in site.hypervisor("here").list()] == ["kata-prod"]
    shutil.rmtree(one.state)
    with one.site() as site:
        farm.destroy(site)
        assert not site.daemon().running()


def test_a_lost_identity_costs_neither_disks_nor_keys(alone) -> None:
    """As one that was removed because it was damaged."""
    alone.host, alone.state = "driver: kvm, uri: 'qemu:///system'", alone.place / "fresh"
    alone.world = alone.place / "fresh-world"
    alone.write(alone.file)
    alone.seal()
    with alone.site() as site:
        farm.clone_farm(site, start=False)
    root = alone.state / "farms/kata"
    kept = {path for path in root.rglob("*") if path.is_file() and {"vms", "keys"} & set(path.parts)}
    assert len(kept) > 4
    (root / "identity.json").unlink()
    with alone.site() as site:
        assert [action.verb for action in farm.gc(site).actions] == ["note", "keep"]
        assert all(path.exists() for path in kept)
    with alone.site() as site:
        farm.destroy(site)
    assert {path for path in kept if "vms" in path.parts} <= {p for p in root.rglob("*") if p.is_file()}
    with alone.site(adopting=True) as site:
        assert perform(site, Adopt()).result.vms == ("dev2", "prod")
    with alone.site() as site:
        farm.reset(site, ["prod"], start=False)
        farm.destroy(site)
    assert not root.exists()


def test_what_finishes_the_end_of_a_farm_marks_with_an_identity_that_is_kept(alone) -> None:
    before = [machine for machine, *_ in seen(alone)]
    assert _killed(alone, farm.destroy, 0) == 9
    (alone.state / "farms/kata/identity.json").unlink()
    with alone.site(adopting=True) as site:
        found = perform(site, Adopt())
    assert "recover" in {action.verb for action in found.actions}
    assert [machine for machine, *_ in seen(alone)] == before


def test_two_that_begin_at_once_have_one_identity(alone) -> None:
    (alone.state / "farms/kata/identity.json").unlink()
    with alone.site() as one, alone.site() as two:
        assert one.identity != two.identity
        one.prepare()
        two.prepare()
        assert one.identity == two.identity
        assert two.hypervisor("here")._farm == one.identity


def test_a_state_directory_by_another_name_is_no_copy(alone) -> None:
    """A link to it or, as here, a mount of it somewhere else."""
    before, real = seen(alone), alone.state
    alone.state = alone.place / "link"
    alone.state.symlink_to(real)
    assert seen(alone) == before
    if os.geteuid() == 0:
        alone.state = alone.place / "mounted"
        alone.state.mkdir()
        subprocess.run(["mount", "--bind", real, alone.state], check=True)
        try:
            assert seen(alone) == before
        finally:
            subprocess.run(["umount", alone.state], check=True)


def test_a_private_libvirtd_is_ours_by_another_name_of_its_directory(tmp_path) -> None:
    directory, runtime = tmp_path / "libvirt", Path(tempfile.mkdtemp(prefix="fh"))
    directory.mkdir()
    link = tmp_path / "link"
    link.symlink_to(directory)
    (runtime / "run").mkdir()
    (runtime / "run/of").write_text(f"{directory}\n")
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            ours = PrivateLibvirt(link, runtime, tmp_path, hide_kvm=False)
            listening.bind(str(ours._socket))
            listening.listen()
            assert ours.running()
            assert not ours.is_anothers()
            assert PrivateLibvirt(tmp_path, runtime, tmp_path, hide_kvm=False).is_anothers()
    finally:
        shutil.rmtree(runtime)


@pytest.mark.parametrize("instead", ["a file", "a directory"])
def test_where_the_farm_file_was_is_something_else_now(alone, instead) -> None:
    moved = alone.place / "moved.yaml"
    place = alone.place / "checkout"
    place.mkdir()
    file = place / "farm.yaml"
    alone.file.rename(file)
    with alone.site(file) as site:
        site.prepare()
    file.rename(moved)
    alone.write(moved, VMS + "  new: {memory: 64M}\n")
    if instead == "a file":
        place.rmdir()
        place.touch()
    else:
        file.mkdir()
    with alone.site(moved) as site:
        assert len(farm.status(site).vms) == 3
