"""What only the qcow2 store has: files, and what others may have put beside them."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from rigs import SIZE, Qcow2Rig, template

from hypervisors.api import Owner
from hypervisors.disks.qcow2.format import empty_overlay, read_header
from hypervisors.disks.qcow2.leftovers import strangers
from inventory.errors import Conflict, DriverFailed, NotOurs, UsageError, WrongState
from tests.identities import KATA, identity

PROD = Owner(KATA, "prod")
NAMESAKE = identity("kata", "/root/farm.yaml", "root@pc2")


@pytest.fixture
def store(tmp_path: Path) -> Qcow2Rig:
    return Qcow2Rig(tmp_path)


@pytest.fixture
def made(store):
    disks = store.disks()
    disks.clone(disks.seal(store.image(), template()), "kata-prod", PROD, SIZE)
    return disks


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a\nb"])
def test_names_that_are_no_plain_names_reach_nothing(store, made, name):
    with pytest.raises(UsageError):
        made.clone(made.templates()[0], name, PROD, SIZE)
    with pytest.raises(UsageError):
        made.seal(store.image(), replace(template(), name=name))
    with pytest.raises(UsageError):
        made.checkpoint("kata-prod", name)


@pytest.mark.parametrize("size", [2**20, 64 * 2**20 + 512, 2**30, 5 * 2**40])
def test_our_overlays_are_what_qemu_img_calls_sound(tmp_path, size):
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, str(size)], check=True)
    overlay.write_bytes(empty_overlay(size, base.name))
    subprocess.run(["qemu-img", "check", "-q", overlay], check=True)
    subprocess.run(["qemu-img", "compare", "-q", overlay, base], check=True)
    out = subprocess.run(["qemu-img", "info", "--output=json", overlay], check=True, capture_output=True)
    info = json.loads(out.stdout)
    assert info["virtual-size"] == size
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.qcow2", "qcow2")
    subprocess.run(
        ["qemu-io", "-c", f"write {size - 512} 512", overlay], check=True, capture_output=True
    )
    subprocess.run(["qemu-img", "check", "-q", overlay], check=True)
    assert not read_header(overlay).empty


def test_qemu_imgs_overlays_are_read_like_ours(tmp_path):
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "1G"], check=True)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", overlay],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    overlay2 = tmp_path / "ours.qcow2"
    overlay2.write_bytes(empty_overlay(2**30, "base.qcow2"))
    assert read_header(overlay) == read_header(overlay2)


@pytest.mark.parametrize("data", [b"", b"QFI\xfb", b"x" * 4096, b"QFI\xfb\0\0\0\x09" + b"\xff" * 200])
def test_files_that_are_no_qcow2_are_refused_in_words(tmp_path, data):
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(DriverFailed, match="bad"):
        read_header(path)


def test_a_damaged_disk_is_still_ours_to_reset(store, made):
    disk = made.find("kata-prod")
    disk.path.write_bytes(b"torn")
    assert made.find("kata-prod").base == ""
    made.restore("kata-prod", "clean")
    assert store.read("kata-prod") == "T"


def test_a_raw_image_is_converted(store):
    raw = store.place / "image.raw"
    raw.write_bytes(b"R" * 2**20 + bytes(SIZE - 2**20))
    disks = store.disks()
    sealed = disks.seal(raw, template())
    assert sealed.size == SIZE and not raw.exists()
    assert read_header(Path(sealed.ref)).size == SIZE


def test_an_overlay_is_no_template(store, made):
    overlay = store.place / "overlay.qcow2"
    overlay.write_bytes(empty_overlay(SIZE, "something.qcow2"))
    with pytest.raises(UsageError, match="something"):
        made.seal(overlay, template(2))
    assert overlay.exists() and list(made.leftovers()) == []


def test_the_whole_store_can_move(store, made):
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "one")
    moved = store.place / "elsewhere"
    store.root.rename(moved)
    store.root = moved
    disks = store.disks()
    assert store.read("kata-prod") == "A" and disks.pristine("kata-prod", "one")
    disks.restore("kata-prod", "clean")
    assert store.read("kata-prod") == "T"


def test_foreign_files_are_neither_listed_nor_touched(store, made):
    vms, templates = store.root / "vms", store.root / "templates"
    (vms / "kata-hand").mkdir()
    strange = [
        vms / "kata-hand" / "disk.qcow2", vms / "kata-prod" / "notes.txt", vms / "loose.qcow2",
        templates / "base@9.qcow2", templates / "readme.json",
    ]  # fmt: skip
    for path in strange:
        path.write_text("mine")
    copied = vms / "kata-copy"  # a whole directory, our mark with it, copied by hand
    shutil.copytree(vms / "kata-prod", copied)
    assert [d.machine for d in made.list()] == ["kata-prod"]
    assert [t.label for t in made.templates()] == ["base@1"]
    assert made.find("kata-hand") is None and made.find("kata-copy") is None
    assert list(made.leftovers()) == []
    with pytest.raises(NotOurs):
        made.clone(made.templates()[0], "kata-hand", PROD, SIZE)
    made.destroy("kata-hand")
    made.destroy("kata-copy")
    made.destroy("kata-prod")
    assert all(path.read_text() == "mine" for path in strange)
    assert (copied / "disk.qcow2").exists()


def _killed_at(store, number: int, act) -> None:
    """In a process of its own, ended (no `finally` runs) right before the step of that number."""
    pid = os.fork()
    if pid == 0:
        left = number

        def step(_text):
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1

        act(store.disks(step=step))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_files_that_can_not_be_written_are_told_in_words(made):
    """Here for a limit of the process; a full or failing disk says so in the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for change, name in ((made.checkpoint, "kept"), (made.restore, "clean")):
            with pytest.raises(WrongState, match=r"cannot write .*: File too large"):
                change("kata-prod", name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [kept.name for kept in made.find("kata-prod").checkpoints] == ["clean"]
    made.checkpoint("kata-prod", "kept")


def test_killed_in_the_middle_of_a_checkpoint(store, made):
    store.write("kata-prod", "A")
    _killed_at(store, 1, lambda d: d.checkpoint("kata-prod", "half"))
    assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean"]
    assert sorted(x.kind for x in made.leftovers()) == ["checkpoint", "file", "file"]
    store.write("kata-prod", "B")  # through both names of the one inode
    made.restore("kata-prod", "clean")
    assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean"]
    for leftover in made.leftovers():
        made.discard(leftover)
    assert list(made.leftovers()) == []
    assert sorted(p.name for p in (store.root / "vms/kata-prod").iterdir()) == [
        "disk.qcow2",
        "owner.json",
    ]


def test_killed_in_the_middle_of_a_restore(store, made):
    store.write("kata-prod", "A")
    _killed_at(store, 0, lambda d: d.restore("kata-prod", "clean"))
    assert store.read("kata-prod") == "A"
    assert [x.owner for x in made.leftovers() if x.bytes] == [None]
    made.restore("kata-prod", "clean")
    for leftover in made.leftovers():
        made.discard(leftover)
    assert list(made.leftovers()) == [] and store.read("kata-prod") == "T"


def test_half_removed_disks_block_no_name(store, made):
    (store.root / "vms/kata-prod/disk.qcow2").unlink()
    assert made.find("kata-prod") is None
    (leftover,) = made.leftovers()
    assert (leftover.kind, leftover.owner) == ("disk", PROD)
    made.clone(made.templates()[0], "kata-prod", PROD, SIZE)
    made.discard(leftover)  # it came to be in use since
    assert store.read("kata-prod") == "T"


def test_checkpoints_that_outlive_their_disk_are_no_leftover(store, made):
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "kept")
    assert made.left("kata-prod") == ()
    (store.root / "vms/kata-prod/disk.qcow2").unlink()
    assert [c.name for c in made.left("kata-prod")] == ["clean", "kept"]
    assert list(made.leftovers()) == []
    with pytest.raises(Conflict, match="but checkpoints of one: kept"):
        made.clone(made.templates()[0], "kata-prod", PROD, SIZE)
    assert made.restore("kata-prod", "kept").base == "kept"
    assert store.read("kata-prod") == "A" and made.left("kata-prod") == ()


@pytest.mark.parametrize("removed", ["disk.qcow2", "checkpoint-kept.qcow2"])
def test_killed_in_the_middle_of_a_destroy(store, made, monkeypatch, removed):
    """What is left then goes, checkpoints too; it can't be told from outside which file was the last."""
    made.checkpoint("kata-prod", "kept")
    unlink = Path.unlink

    def killed(path, missing_ok=False):
        if path.name != removed:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        made.destroy("kata-prod")
    monkeypatch.undo()
    assert made.find("kata-prod") is None and made.left("kata-prod") == ()
    (leftover,) = made.leftovers()
    made.discard(leftover)
    assert not (store.root / "vms/kata-prod").exists()


def test_what_is_under_construction_is_no_leftover(store, made):
    name = store.root / "vms" / ".farmhand-new-abc-kata-new"
    name.mkdir()
    twin = name.with_name(name.name + ".lock")
    with twin.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert list(made.leftovers()) == []
    found = list(made.leftovers())
    assert len(found) == 2
    for leftover in found:
        made.discard(leftover)
    assert not name.exists() and not twin.exists()


def test_qemus_user_gets_the_disk_and_must_reach_it(store):
    disks = store.disks(reader_uid=12345)
    sealed = disks.seal(store.image(), template())
    for place in (store.place, *store.place.parents):
        if not place.stat().st_mode & 0o001:
            with pytest.raises(DriverFailed, match="pass through"):
                disks.clone(sealed, "kata-prod", PROD, SIZE)
            break


def reads(path: Path, uid: int) -> bool:
    """Whether that user may."""
    argv = ["cat", path]
    done = subprocess.run(
        argv, user=uid, group=uid, extra_groups=[], capture_output=True, check=False, cwd="/"
    )
    return done.returncode == 0


def test_a_template_is_for_qemus_user_and_nobody_else(store, tmp_path):
    for place in (tmp_path, *tmp_path.parents[:2]):
        place.chmod(0o711)
    open_to_all = tmp_path / "open"
    open_to_all.write_bytes(b"x")
    assert reads(open_to_all, 12346), "the way there is open"
    raw = store.place / "image.raw"
    raw.write_bytes(b"R" * SIZE)
    disks = store.disks(reader_uid=12345)
    for number, image in enumerate((store.image(), raw), 1):
        sealed = disks.seal(image, template(number))
        disk = disks.clone(sealed, f"kata-prod{number}", PROD, SIZE)
        disks.checkpoint(f"kata-prod{number}", "x")
        files = [Path(sealed.ref), *disk.path.parent.glob("*.qcow2")]
        assert len(files) == 3
        assert all(reads(path, 12345) for path in files)
        assert not any(reads(path, 12346) for path in files)


def test_an_image_that_is_sealed_for_one_user_stays_his(store, tmp_path):
    """The cache has one file for all farms, whose QEMUs may run as different users."""
    first, second = store.image(), tmp_path / "again"
    second.hardlink_to(first)
    third = tmp_path / "third"
    third.hardlink_to(first)
    one = store.disks(reader_uid=12345).seal(first, template())
    assert Path(one.ref).samefile(second)
    other = store.disks(reader_uid=12346).seal(second, template(2))
    same = store.disks(reader_uid=12345).seal(third, template(3))
    owners = [(Path(t.ref).stat().st_uid, Path(t.ref).stat().st_nlink) for t in (one, other, same)]
    assert owners == [(12345, 2), (12346, 1), (12345, 2)]
    assert one.sha256 == other.sha256 == same.sha256


def test_a_look_at_all_disks_survives_another_s_destroy(tmp_path):
    """Two VMs destroyed side by side: each looks for leftovers while the other's directory goes."""
    rig = Qcow2Rig(tmp_path)
    one, two = rig.disks(), rig.disks()
    base = one.seal(rig.image(), template())
    gone = threading.Event()

    def come_and_go() -> None:
        try:
            for _ in range(300):
                one.clone(base, "kata-dev2", Owner(KATA, "dev2"), SIZE)
                one.destroy("kata-dev2")
        finally:
            gone.set()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(come_and_go)
        while not gone.is_set():
            two.leftovers()
            two.list()
        other.result()
    assert [*two.leftovers()] == []


def test_kept_while_it_runs_and_not_settled_it_is_in_between(store, made):
    """Whether the machine has moved on is told by what it has open, or has written."""
    disk, moved = made.find("kata-prod").path, []
    names = {"checkpoint-one.qcow2", "disk.qcow2", "next-one.qcow2", "owner.json"}
    for wrote, opened in [(False, None), (False, disk), (False, "next"), (True, None)]:
        made.before_live("kata-prod", "one")
        made.checkpoint_live("kata-prod", "one", moved.append)
        fresh = moved[-1]
        if wrote:
            store._io(fresh, "write -P 66 2M 64k")
        assert {path.name for path in disk.parent.iterdir()} == names
        assert disk.stat().st_mode & 0o777 == 0o400, "no QEMU can be started on what is frozen"
        assert made.pristine("kata-prod", "clean") is not wrote
        assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean"]
        assert list(made.leftovers()) == [] and strangers(store.root, KATA) == []
        made.settle_live("kata-prod", fresh if opened == "next" else opened)
        done = wrote or opened == "next"
        assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean", "one"][: 1 + done]
        assert made.find("kata-prod").base == ("one" if done else "clean")
        assert made.pristine("kata-prod", "one" if done else "clean") is not wrote
        assert disk.stat().st_mode & 0o777 == 0o600
        if done:
            made.destroy("kata-prod")
            made.clone(made.templates()[0], "kata-prod", PROD, SIZE)
    with pytest.raises(WrongState, match="cut off"):
        for name in ("one", "two"):
            made.before_live("kata-prod", name)
    with pytest.raises(WrongState, match="nothing is ready"):
        made.checkpoint_live("kata-prod", "two", moved.append)
    adopted = store.disks(NAMESAKE)
    with pytest.raises(NotOurs):
        adopted.settle_live("kata-prod", None)
    adopted.adopt("kata-prod", KATA)
    adopted.settle_live("kata-prod", None)
    assert {path.name for path in disk.parent.iterdir()} == {"disk.qcow2", "owner.json"}
