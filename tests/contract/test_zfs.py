"""What only the ZFS store has: transactions over several disks, what others put beside ours, full
pools, and disks somebody has open."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rigs import PROD, SIZE, template, with_two_disks
from zfs_rig import MIB, ZfsRig, zfs

from host.run import Runner
from hypervisors.api import DeviceDisks, FarmDisks, Owner
from hypervisors.disks.zfs import state as zfs_state
from hypervisors.disks.zfs import store as zfs_store
from hypervisors.disks.zfs.disks import ZfsDisks
from inventory.errors import (
    Busy,
    Conflict,
    NotFound,
    NotOurs,
    UsageError,
    WrongState,
)
from tests.identities import KATA

pytestmark = pytest.mark.lab


@pytest.fixture
def store(zfs_pool, tmp_path: Path) -> ZfsRig:
    return ZfsRig(tmp_path)


@pytest.fixture
def made(store) -> ZfsDisks:
    return with_two_disks(store)


class Counting(Runner):
    def __init__(self) -> None:
        super().__init__()
        self.commands = 0

    def _run(self, *argv, **options):
        self.commands += 1
        return super()._run(*argv, **options)


def as_if_killed(monkeypatch) -> None:
    """The makers' marks then name a process that is gone."""
    monkeypatch.setattr(zfs_state.Process, "alive", lambda _self: False)


def test_it_offers_what_it_says(made):
    assert isinstance(made, FarmDisks) and isinstance(made, DeviceDisks)


def test_the_device_is_given_to_qemus_user_and_to_nobody_else(store, made):
    made = store.disks(reader_uid=64055)
    made.clone(made.templates()[0], "kata-x", Owner(KATA, "x"), SIZE)
    node = made.find("kata-x").path.stat()
    assert (node.st_uid, node.st_mode & 0o777) == (64055, 0o660)
    os.chown(made.find("kata-x").path, 0, -1)  # as after a boot of the host
    assert made.ready("kata-x").path.stat().st_uid == 64055
    made.checkpoint("kata-x", "one")
    made.restore("kata-x", "clean")
    path = made.find("kata-x").path
    subprocess.run(["udevadm", "trigger", "--action=change", path.resolve()], check=True)
    subprocess.run(["udevadm", "settle"], check=True)
    assert path.stat().st_uid == 64055


def test_few_processes_each(store, made, monkeypatch):
    monkeypatch.setattr(zfs_store, "_FRESH", 3600)  # the lab may be slow
    runner = Counting()
    disks = store.disks(runner=runner)

    def cost(act) -> int:
        # udev looks at what was just made or written; the command would be given again for it
        subprocess.run(["udevadm", "settle"], check=True)
        before = runner.commands
        act()
        return runner.commands - before

    sealed = disks.templates()[0]
    assert cost(lambda: disks.clone(sealed, "kata-x", Owner(KATA, "x"), SIZE)) == 1
    assert cost(lambda: disks.restore("kata-x", "clean")) == 1  # untouched
    store.write("kata-x", "A")
    assert cost(lambda: disks.restore("kata-x", "clean")) == 1
    assert cost(lambda: disks.checkpoint("kata-x", "one")) == 1
    assert cost(lambda: disks.restore("kata-x", "one")) == 1
    assert cost(lambda: disks.restore("kata-x", "clean")) == 3  # looks, clones, switches
    assert cost(lambda: disks.restore_all(["kata-prod", "kata-dev2"], "clean")) == 2
    store.write("kata-prod", "A")
    assert cost(lambda: disks.restore_all(["kata-prod", "kata-dev2"], "clean")) == 2
    assert cost(lambda: disks.clone(sealed, "kata-y", Owner(KATA, "y"), 2 * SIZE)) == 2
    assert cost(lambda: disks.clone(sealed, "kata-z", Owner(KATA, "z"), SIZE)) == 1
    store.write("kata-z", "A")
    assert cost(lambda: disks.restore("kata-z", "clean")) == 3  # no snapshot yet to go back to
    assert cost(disks.list) == cost(disks.leftovers) == cost(disks.capacity) == 1
    assert cost(lambda: disks.destroy("kata-x")) == 2


def test_reset_to_the_newest_keeps_the_device(store, made):
    made.restore("kata-prod", "clean")  # untouched: what it is now is what it's rolled back to
    before = made.find("kata-prod").path
    store.write("kata-prod", "A")
    made.restore("kata-prod", "clean")
    assert made.find("kata-prod").path == before
    assert store.read("kata-prod") == "T"


def test_a_larger_disk_is_cloned_from_what_was_smaller(store, made):
    """A volume that is rolled back has the size of then. From there on it is rolled back again."""
    made.checkpoint("kata-prod", "one")
    store.write("kata-prod", "A")
    before = made.find("kata-prod").path
    made.enlarge("kata-prod", 2 * SIZE)
    assert made.find("kata-prod").path == before
    assert zfs("get", "-Hpo", "value", "volsize", volume(before)).strip() == str(2 * SIZE)
    for name in ("one", "two"):
        made.restore("kata-prod", "one")
        path = made.find("kata-prod").path
        assert path != before
        store.write("kata-prod", "B")
        made.restore("kata-prod", "one")
        assert made.find("kata-prod").path == path
        assert zfs("get", "-Hpo", "value", "volsize", volume(path)).strip() == str(2 * SIZE)
        assert zfs("get", "-Hpo", "value", "refreservation", volume(path)).strip() == "0"
        if name == "one":
            made.restore("kata-prod", "clean")
    assert list(made.leftovers()) == []


def test_what_a_killed_reset_left_keeps_no_checkpoint(store, made, monkeypatch):
    made.checkpoint("kata-prod", "one")
    made.restore("kata-prod", "clean")
    with monkeypatch.context() as patch:
        patch.setattr(ZfsDisks, "_drop", lambda *_: None)  # as of a process that is gone
        with pytest.raises(Conflict):
            store.disks(step=_conflict).restore("kata-prod", "one")
    as_if_killed(monkeypatch)
    assert [left.kind for left in made.leftovers()] == ["volume"]
    made.remove_checkpoint("kata-prod", "one")
    assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean"]
    assert list(made.leftovers()) == []


def _conflict(text: str) -> None:
    if text.startswith("swap in"):
        raise Conflict(text)


def volume(path: Path) -> str:
    return str(path.relative_to("/dev/zvol"))


def test_resets_leave_nothing_behind(store, made):
    store.write("kata-prod", "A")
    made.restore("kata-prod", "clean")
    before = store.names()
    for _ in range(3):
        store.write("kata-prod", "A")
        made.restore("kata-prod", "clean")
    assert store.names() == before
    made.checkpoint("kata-prod", "one")
    for name in ("clean", "one", "clean", "one", "clean"):
        store.write("kata-prod", "B")
        made.restore("kata-prod", name)
        assert len([n for n in store.names() if n.startswith("vms/kata-prod.") and "@" not in n]) == 2
        assert list(made.leftovers()) == []
    assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean", "one"]
    made.destroy("kata-prod")
    assert not any("kata-prod" in name for name in store.names())


def test_nothing_but_a_user_writes_to_a_clone(store, made):
    """Not even the kernel: `written` is exactly 0 until somebody writes, and then it isn't."""
    volume = str(made.ready("kata-prod").path.relative_to("/dev/zvol"))
    subprocess.run(["udevadm", "trigger", "--action=change", "--subsystem-match=block"], check=True)
    subprocess.run(["udevadm", "settle"], check=True)
    subprocess.run(["zpool", "sync", store.pool], check=True)
    assert zfs("get", "-Hpo", "value", "written", volume).strip() == "0"
    assert not [name for name in store.names() if name.startswith("vms/kata-prod.1@")]
    with Path("/dev/zvol", volume).open("r+b") as file:  # the least there is: the same zeros again
        file.seek(40 * MIB)
        file.write(bytes(512))
    assert not made.pristine("kata-prod", "clean")


def test_a_former_disk_gives_back_what_was_written_to_it(store, made):
    made.checkpoint("kata-prod", "one")
    with made.ready("kata-prod").path.open("r+b") as file:
        file.write(os.urandom(16 * MIB))
        os.fsync(file.fileno())
    made.restore("kata-prod", "clean")
    subprocess.run(["zpool", "sync", store.pool], check=True)
    subprocess.run(["zpool", "wait", "-t", "free", store.pool], check=True)
    assert made.find("kata-prod").used < MIB


def test_a_farm_is_checkpointed_in_one_transaction(store, made):
    store.write("kata-prod", "A")
    store.write("kata-dev2", "B")
    got = made.checkpoint_all(["kata-prod", "kata-dev2"], "both")
    assert set(got) == {"kata-prod", "kata-dev2"}
    numbers = {
        zfs("get", "-Hpo", "value", "createtxg", f"{store.root}/vms/{name}")
        for name in store.names() if name.endswith("@both") for name in [name.removeprefix("vms/")]
    }  # fmt: skip
    assert len(numbers) == 1


def test_a_farm_is_checkpointed_whole_or_not_at_all(store, made):
    made.checkpoint("kata-dev2", "both")
    before = store.names()
    with pytest.raises(Conflict, match="kata-dev2"):
        made.checkpoint_all(["kata-prod", "kata-dev2"], "both")
    assert store.names() == before


def test_a_farm_goes_back_whole_or_not_at_all(store, made):
    both = ["kata-prod", "kata-dev2"]
    made.checkpoint_all(both, "both")
    for name in both:
        store.write(name, "X")
    made.checkpoint("kata-prod", "later")  # so prod needs a fresh clone, dev2 a rollback
    handle = os.open(made.ready("kata-dev2").path, os.O_RDONLY)
    try:
        with pytest.raises(Busy, match=r"pytest|python"):
            made.restore_all(both, "both")
    finally:
        os.close(handle)
    assert [store.read(name) for name in both] == ["X", "X"]
    assert list(made.leftovers()) == []
    with pytest.raises(NotFound):
        made.restore_all(both, "later")
    disks = made.restore_all(both, "both")
    assert [disk.base for disk in disks] == ["both", "both"]
    assert [store.read(name) for name in both] == ["T", "T"]
    assert [made.pristine(name, "both") for name in both] == [True, True]
    assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean", "both", "later"]


def test_a_disk_that_somebody_has_open_is_named_with_him_and_left(store, made):
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "one")
    store.write("kata-prod", "B")
    path = made.ready("kata-prod").path
    child = subprocess.Popen(
        [sys.executable, "-c", f"f=open({str(path)!r},'rb'); print(1, flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout and child.stdin
    child.stdout.readline()
    try:
        for act in (
            lambda: made.restore("kata-prod", "one"),
            lambda: made.restore("kata-prod", "clean"),
            lambda: made.destroy("kata-prod"),
        ):
            with pytest.raises(Busy, match=rf"pid {child.pid}"):
                act()
            assert made.find("kata-prod").path == path
            assert list(made.leftovers()) == []
    finally:
        child.communicate(b"\n")
    assert store.read("kata-prod") == "B"
    made.restore("kata-prod", "one")
    assert store.read("kata-prod") == "A"


def test_what_a_power_cut_left_without_marks_is_found_by_being_empty(store, made, monkeypatch):
    sealed = made.templates()[0].ref
    zfs("clone", sealed, f"{store.root}/vms/kata-new.1")
    zfs("create", "-s", "-V", "64M", f"{store.root}/templates/base.9")
    zfs("clone", sealed, f"{store.root}/vms/kata-full.1")
    device = Path("/dev/zvol", store.root, "vms/kata-full.1")
    subprocess.run(["udevadm", "settle"], check=True)
    device.write_bytes(os.urandom(MIB))
    subprocess.run(["zpool", "sync", store.pool], check=True)
    assert list(made.leftovers()) == []  # they may be a living process's, in this very moment
    monkeypatch.setattr(zfs_state, "SETTLED", -1)
    found = made.leftovers()
    assert {left.ref.rpartition("/")[2] for left in found} == {"kata-new.1", "base.9"}
    for left in found:
        made.discard(left)
    assert "vms/kata-full.1" in store.names()
    for name in ("full", "new"):  # no name is blocked
        disk = made.clone(made.templates()[0], f"kata-{name}", Owner(KATA, name), SIZE)
        assert made.find(f"kata-{name}") == replace(disk, used=made.find(f"kata-{name}").used)
    assert device.read_bytes()[:MIB] != bytes(MIB)


def test_what_is_not_ours_is_never_touched(store, made, monkeypatch):
    """Look-alike names, our properties inherited or copied, in our own datasets."""
    as_if_killed(monkeypatch)
    vms = f"{store.root}/vms"
    for key, text in {"machine": "kata-evil", "farm": KATA.mark, "state": "disk", "vm": "evil"}.items():
        zfs("set", f"farmhand:{key}={text}", store.pool)
    try:
        zfs("create", "-s", "-V", "1M", f"{vms}/kata-evil.1")  # inherits them all
        zfs("create", "-s", "-V", "1M", f"{vms}/kata-prod.7")  # no mark
        zfs("create", "-s", "-V", "1M", "-o", "farmhand:machine=kata-dev2", "-o", "farmhand:farm=kata",
            "-o", "farmhand:state=disk", f"{vms}/other.1")  # fmt: skip
        zfs("create", f"{vms}/kata-prod")
        zfs("create", "-s", "-V", "1M", f"{store.root}/templates/base.8")
        zfs("snapshot", f"{store.root}/templates/base.8@sealed")
        zfs("clone", f"{store.root}/templates/base.1@sealed", f"{store.root}/mine")
        before = store.names()
        assert [d.machine for d in made.list()] == ["kata-dev2", "kata-prod"]
        assert made.find("kata-evil") is None and made.find("other") is None
        assert [t.label for t in made.templates()] == ["base@1"]
        assert list(made.leftovers()) == []
        made.destroy("kata-evil")
        made.destroy("other")
        for machine in ("kata-evil", "other"):  # no name is blocked by them
            disk = made.clone(made.templates()[0], machine, Owner(KATA, machine), SIZE)
            assert disk.path.name == f"{machine}.2"
            made.destroy(machine)
        made.restore("kata-prod", "clean")
        made.checkpoint("kata-prod", "one")
        made.restore("kata-prod", "clean")
        made.destroy("kata-prod")
        made.destroy("kata-dev2")
        with pytest.raises(WrongState, match="mine"):
            made.remove_template("base@1")
        gone = {n for n in before if n.startswith(("vms/kata-prod.1", "vms/kata-dev2.1"))}
        assert set(store.names()) == set(before) - gone
    finally:
        for key in ("machine", "farm", "state", "vm"):
            zfs("inherit", f"farmhand:{key}", store.pool)


def test_somebody_elses_snapshots_of_our_disks(store, made):
    """As tools for automatic snapshots make them."""
    store.write("kata-prod", "A")
    prod = made.find("kata-prod").path.relative_to("/dev/zvol")
    zfs("snapshot", f"{prod}@auto-1")
    assert not made.pristine("kata-prod", "clean")
    made.restore("kata-prod", "clean")
    assert store.read("kata-prod") == "T" and made.pristine("kata-prod", "clean")
    assert f"{str(prod).removeprefix(store.root + '/')}@auto-1" in store.names()
    with pytest.raises(WrongState, match="auto-1"):
        made.destroy("kata-prod")
    assert made.find("kata-prod") is not None
    zfs("destroy", f"{prod}@auto-1")
    made.destroy("kata-prod")


def test_a_template_survives_a_recursive_destroy(store, made):
    ref = made.templates()[0].ref
    done = subprocess.run(["zfs", "destroy", ref], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    for machine in ("kata-prod", "kata-dev2"):
        made.destroy(machine)
    done = subprocess.run(["zfs", "destroy", "-R", ref], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "busy" in done.stderr
    made.remove_template("base@1")


@contextlib.contextmanager
def stale_link(store: ZfsRig, link: Path, remove: Callable[[], object]) -> Iterator[Path]:
    """The link of a volume that ``remove`` takes away stays, and leads to somebody else's; udev goes on
    in 10 s. Yields that device."""
    subprocess.run(["udevadm", "settle"], check=True)
    device = link.resolve()
    subprocess.run(["udevadm", "control", "--stop-exec-queue"], check=True)
    go_on = ["udevadm", "control", "--start-exec-queue"]

    def resume() -> None:
        for _ in range(5):  # the lab's udev was seen to overhear it
            subprocess.run(go_on, check=True)
            time.sleep(1)

    again = threading.Timer(10, resume)
    again.start()
    try:
        remove()
        for n in range(8):  # one of them gets its device number
            zfs("create", "-s", "-V", "64M", f"{store.root}/foreign{n}")
            if link.exists():
                break
        assert link.resolve() == device
        yield device
    finally:
        again.join()


def test_a_clone_doesnt_take_the_link_of_one_that_is_gone(store, made):
    path, sealed = made.find("kata-prod").path, made.templates()[0]
    with stale_link(store, path, lambda: made.destroy("kata-prod")) as device:
        disk = made.clone(sealed, "kata-prod", PROD, SIZE)
    assert disk.path.resolve() != device
    assert store.read("kata-prod") == "T" and made.pristine("kata-prod", "clean")


def test_a_template_isnt_written_to_the_link_of_one_that_is_gone(store, made):
    volume = f"{store.root}/templates/base.2"
    zfs("create", "-s", "-V", "64M", volume)
    image = store.image()
    with stale_link(store, Path("/dev/zvol", volume), lambda: zfs("destroy", volume)) as device:
        sealed = made.seal(image, template(2))
    assert device.read_bytes().count(0) == SIZE  # somebody else's
    made.clone(sealed, "kata-two", Owner(KATA, "two"), SIZE)
    assert store.read("kata-two") == "T"


def test_clones_reserve_nothing(store, made):
    for machine in ("kata-prod", "kata-dev2"):
        volume = made.find(machine).path.relative_to("/dev/zvol")
        assert zfs("get", "-Hpo", "value", "refreservation", volume).strip() in {"0", "none"}
        assert made.find(machine).used < 200 * 1024


@pytest.mark.parametrize("name", ["../up", "a/b", "", "-r", "a@b", "a\nb"])
def test_names_that_are_no_plain_names_reach_nothing(store, made, name):
    with pytest.raises(UsageError):
        made.clone(made.templates()[0], name, PROD, SIZE)
    with pytest.raises(UsageError):
        made.seal(store.image(), replace(template(), name=name))
    with pytest.raises(UsageError):
        made.checkpoint("kata-prod", name)


def test_seals_what_it_was_given(store):
    disks = store.disks()
    qcow2 = store.place / "image.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", store.image(), qcow2], check=True)
    made = datetime(2026, 1, 2, tzinfo=UTC)
    odd = replace(template(), origin="recipe 'é\"\\' of ü@1, $(x)", created=made)
    sealed = disks.seal(qcow2, odd)
    assert (sealed.origin, sealed.created) == (odd.origin, made)
    assert disks.templates() == [sealed]
    subprocess.run(["udevadm", "settle"], check=True)
    assert not Path("/dev/zvol", sealed.ref.partition("@")[0]).exists()
    overlay = store.place / "overlay.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", store.image(), overlay],
        check=True,
    )
    with pytest.raises(UsageError, match="overlay"):
        disks.seal(overlay, template(2))
    assert overlay.exists()


def test_somebody_elses_dataset_is_not_moved_into(store):
    zfs("create", "-p", f"{store.root}/vms/theirs")
    with pytest.raises(NotOurs, match="vms"):
        store.disks().seal(store.image(), template())
