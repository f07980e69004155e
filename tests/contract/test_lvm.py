"""What only the LVM stores have: kills between LVM's commands, foreign volumes, overflow, copies.

The rigs are real volume groups on a spare disk."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from lvm_rig import MIB, SIZE, ClassicRig, FullRig, LvmRig, ThinRig, run
from rigs import template

from host.run import Runner
from hypervisors.api import Owner
from hypervisors.disks.lvm import copy as lvm_copy
from hypervisors.disks.lvm import thin as lvm_thin
from hypervisors.disks.lvm import volumes as lvm_volumes
from hypervisors.disks.lvm.command import Lvm
from hypervisors.disks.lvm.thin import LvmThinDisks
from inventory.errors import Busy, Conflict, DriverFailed, NoSpace, NotFound, Unsupported, WrongState
from tests.identities import KATA

pytestmark = pytest.mark.lab
PROD = Owner(KATA, "prod")
VM = "kata-prod"


@pytest.fixture
def thin() -> Iterator[ThinRig]:
    with ThinRig() as rig:
        yield rig


@pytest.fixture
def linked() -> Iterator[ClassicRig]:
    with ClassicRig() as rig:
        yield rig


@pytest.fixture
def full() -> Iterator[FullRig]:
    with FullRig() as rig:
        yield rig


def cloned(rig: LvmRig, **options):
    disks = rig.disks(**options)
    disks.clone(disks.seal(rig.image(), template()), VM, PROD, SIZE)
    return disks


def dies(act: Callable[[], object]) -> bool:
    """Whether a child that does it ends by SIGKILL; it must end by that or well."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException as error:  # noqa: BLE001
            os.write(2, f"{error!r}\n".encode())
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def kill_at(number: int) -> Callable[[str], None]:
    seen = iter(range(1, 100))

    def step(_text: str) -> None:
        if next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def clean_up(disks) -> None:
    for leftover in disks.leftovers():
        assert leftover.owner in (PROD, None)
        disks.discard(leftover)
    assert list(disks.leftovers()) == []


@pytest.mark.parametrize("kind", [ThinRig, ClassicRig, FullRig])
def test_killed_between_commands_nothing_is_lost_or_orphaned(kind, monkeypatch):
    with kind() as rig:
        disks = cloned(rig)
        rig.write(VM, "A")
        disks.checkpoint(VM, "one")
        before = len(rig.everything())
        for number in (1, 2):
            assert dies(lambda n=number: rig.disks(step=kill_at(n)).restore(VM, "clean"))
            assert rig.read(VM) == "A" and disks.find(VM).base == "one"
        clean_up(disks)
        assert len(rig.everything()) == before
        with monkeypatch.context() as patch:  # after the swap, before the old disk goes
            patch.setattr(kind_of(rig), "_remove_old", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            assert dies(lambda: rig.disks().restore(VM, "clean"))
        assert rig.read(VM) == "T" and disks.pristine(VM, "clean")
        disks.restore(VM, "one")
        assert rig.read(VM) == "A"
        for number in (1, 2):
            assert dies(lambda n=number: rig.disks(step=kill_at(n)).checkpoint(VM, "two"))
            assert [c.name for c in disks.find(VM).checkpoints] == ["clean", "one"]
        disks.checkpoint(VM, "two")
        assert list(disks.leftovers()) == [] and disks.pristine(VM, "two")
        disks.destroy(VM)
        disks.remove_template("base@1")
        assert [n for n in rig.everything() if "fh" in n.replace(rig.vg, "")] == []


@pytest.mark.parametrize("tidy", [True, False], ids=["gc first", "at once"])
def test_a_checkpoint_killed_right_before_its_disk_became_present(linked, monkeypatch, tidy):
    """The disk that grew from the half-made checkpoint depends on it."""
    disks = cloned(linked)
    linked.write(VM, "A")
    before = linked.everything()
    with monkeypatch.context() as patch:
        patch.setattr(kind_of(linked), "_point", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert dies(lambda: linked.disks().checkpoint(VM, "one"))
    assert [leftover.kind for leftover in disks.leftovers()] == ["disk", "checkpoint"]
    assert linked.read(VM) == "A" and [c.name for c in disks.find(VM).checkpoints] == ["clean"]
    if tidy:
        clean_up(disks)
        assert sorted(linked.everything()) == sorted(before)
    disks.checkpoint(VM, "one")
    assert list(disks.leftovers()) == [] and disks.pristine(VM, "one") and linked.read(VM) == "A"


def kind_of(rig: LvmRig) -> type:
    return type(rig.disks())


def test_foreign_volumes_are_neither_listed_nor_touched(linked):
    disks = cloned(linked)
    mine = run("lvs", "--noheadings", "-o", "lv_name", "-S", "tags=fh.kind=disk", linked.vg).strip()
    sealed = disks.templates()[0].ref.partition("/")[2]
    run("lvcreate", "-q", "-y", "-L", "8M", "-n", f"{mine[:-1]}x", linked.vg)
    run("lvcreate", "-q", "-y", "-L", "8M", "-n", VM, "--addtag", "fh.kind=disk", linked.vg)
    run("lvcreate", "-q", "-y", "-s", "-L", "8M", "-n", "backup", f"{linked.vg}/{sealed}")
    assert [d.machine for d in disks.list()] == [VM] and list(disks.leftovers()) == []
    disks.restore(VM, "clean")
    disks.destroy(VM)
    with pytest.raises(WrongState, match="backup"):
        disks.remove_template("base@1")
    run("lvremove", "-q", "-f", f"{linked.vg}/backup")
    disks.remove_template("base@1")
    left = run("lvs", "--noheadings", "-o", "lv_name", linked.vg).split()
    assert sorted(left) == sorted([f"{mine[:-1]}x", VM])


def test_a_disk_in_use_is_refused_saying_by_whom(thin):
    disks = cloned(thin)
    with subprocess.Popen(["sleep", "600"], stdin=thin.path(VM).open("rb")) as holder:
        for act in (lambda: disks.restore(VM, "clean"), lambda: disks.destroy(VM)):
            with pytest.raises(Busy, match=rf"sleep \(pid {holder.pid}\)"):
                act()
        holder.kill()
    disks.restore(VM, "clean")


def test_full_thin_data_and_metadata(monkeypatch):
    with ThinRig(data="64M", metadata="4M") as rig:
        disks = cloned(rig, headroom=8 * MIB)
        with pytest.raises(NoSpace, match=r"data free.*autoextend is off"):
            rig.disks(headroom=256 * MIB).clone(disks.templates()[0], "kata-x", PROD, SIZE)
        rig.write(VM, "A", 0, 60 * MIB)
        with pytest.raises(NoSpace):
            disks.clone(disks.templates()[0], "kata-x", PROD, SIZE)
        disks.restore(VM, "clean")  # the way out of a full pool
        assert rig.read(VM) == "T" and disks.capacity().free > 48 * MIB
        assert any("lvm.conf does not extend it" in note for note in disks.notes())
        monkeypatch.setattr(lvm_thin, "_METADATA_LIMIT", 1.0)
        with pytest.raises(NoSpace, match="metadata"):
            disks.checkpoint(VM, "one")


def test_what_is_missing_is_named(thin, tmp_path):
    runner = Runner()
    with pytest.raises(NotFound, match="no volume group nowhere"):
        LvmThinDisks("nowhere", "pool", KATA, runner, links=tmp_path).list()
    with pytest.raises(NotFound, match="no thin pool puddle"):
        LvmThinDisks(thin.vg, "puddle", KATA, runner, links=tmp_path).capacity()

    def unprivileged() -> None:
        os.setuid(65534)
        with pytest.raises(DriverFailed, match="not permitted"):
            thin.disks().list()

    assert not dies(unprivileged)


def test_pristine_without_the_tools_and_after_a_kill(thin, monkeypatch):
    disks = cloned(thin)
    device = f"{thin.vg}-pool-tpool"
    run("dmsetup", "message", device, "0", "reserve_metadata_snap")  # somebody's backup
    assert disks.pristine(VM, "clean")
    assert run("dmsetup", "status", device).split()[6] != "-"
    (thin.links / thin.vg / ".pool.metadata-snapshot").touch()  # or ours, killed
    assert disks.pristine(VM, "clean")
    assert run("dmsetup", "status", device).split()[6] == "-"
    thin.write(VM, "T")  # the same bytes, written again: dirty by the map, equal by content
    assert not disks.pristine(VM, "clean")
    monkeypatch.setattr(lvm_thin, "which", lambda _name: None)
    assert disks.pristine(VM, "clean")
    thin.write(VM, "A")
    assert not disks.pristine(VM, "clean")


def test_qemus_user_gets_its_disk_and_no_other(thin):
    disks = cloned(thin, reader_uid=64055)
    disk = disks.find(VM)
    assert disk.path.stat().st_uid == 64055
    thin.write(VM, "A")
    run("udevadm", "trigger", "--action=change", disk.path.resolve())
    run("udevadm", "settle")
    assert disk.path.stat().st_uid == 64055
    run("lvchange", "-an", f"{thin.vg}/{disk.path.readlink().name}")  # as after a reboot
    disk.path.unlink()
    assert disks.ready(VM).path == disk.path
    assert disk.path.stat().st_uid == 64055 and thin.read(VM) == "A"


def test_a_snapshot_that_fills_up(linked):
    warnings: list[str] = []
    disks = cloned(linked, warn=warnings.append)
    linked.write(VM, "A", 0, 25 * MIB)
    assert any("78 % full" in n or "79 % full" in n for n in disks.notes())
    disks.ready(VM)
    assert disks.notes() == ()
    disks.restore(VM, "clean")
    with pytest.raises(OSError):
        linked.write(VM, "A", 0, 60 * MIB)
        os.sync()
        linked.read(VM)
        fd = os.open(linked.path(VM), os.O_RDONLY | os.O_DIRECT)
        os.preadv(fd, [memoryview(bytearray(0))], 0)
    assert "lost" in disks.notes()[0]
    for act in (lambda: disks.ready(VM), lambda: disks.checkpoint(VM, "one")):
        with pytest.raises(DriverFailed, match="is lost"):
            act()
    assert not disks.pristine(VM, "clean")
    disks.restore(VM, "clean")
    assert linked.read(VM) == "T"


def test_a_merge_updates_the_checkpoint_it_grew_from(linked):
    disks = cloned(linked)
    with pytest.raises(Unsupported):
        disks.merge(VM)
    linked.write(VM, "A")
    was = disks.checkpoint(VM, "one")
    linked.write(VM, "B")
    disks.merge(VM)
    assert disks.pristine(VM, "one") and linked.read(VM) == "B"
    now = disks.find(VM).checkpoints[1]
    assert now == replace(was, id=now.id) and now.id != was.id, "it isn't what it was"
    assert list(disks.leftovers()) == []
    disks.restore(VM, "clean")
    disks.restore(VM, "one")
    assert linked.read(VM) == "B"


def test_a_linked_disk_becomes_a_volume_until_it_is_put_back(linked):
    disks = cloned(linked)
    linked.write(VM, "A")
    was = disks.checkpoint(VM, "one")
    linked.write(VM, "B")
    disks.enlarge(VM, 2 * SIZE)
    assert kind_of_disk(linked) == "-" and length(linked) == 2 * SIZE and linked.read(VM) == "B"
    assert beyond(linked, SIZE) == {0}
    disks.enlarge(VM, 3 * SIZE)
    assert length(linked) == 3 * SIZE and linked.read(VM) == "B" and beyond(linked, SIZE) == {0}
    volumes = len(linked.everything())
    for _ in range(2):
        disks.restore(VM, "one")
        assert kind_of_disk(linked) == "s" and length(linked) == 3 * SIZE
        assert disks.pristine(VM, "one") and linked.read(VM) == "A" and beyond(linked, SIZE) == {0}
        linked.write(VM, "C")
    assert disks.find(VM).checkpoints[1] == was, "it is the one that it was"
    assert list(disks.leftovers()) == []
    assert len(linked.everything()) <= volumes + 4, "the smaller one went: mappings come with a snapshot"
    disks.restore(VM, "clean")
    disks.remove_checkpoint(VM, "one")
    assert linked.read(VM) == "T" and disks.pristine(VM, "clean") and length(linked) == 3 * SIZE
    with pytest.raises(Unsupported, match="larger than its template"):
        disks.move(VM, disks.seal(linked.image(), template(2)))
    disks.destroy(VM)
    for label in ("base@1", "base@2"):
        disks.remove_template(label)
    assert [n for n in linked.everything() if "fh" in n.replace(linked.vg, "")] == []


@pytest.mark.parametrize("kind", [ClassicRig, FullRig])
def test_growth_killed_before_any_command_is_old_or_new(kind, monkeypatch):
    """Before each of LVM's, and before the end is wiped."""
    with kind() as rig:
        stain(rig)
        disks = cloned(rig)
        rig.write(VM, "A")
        disks.checkpoint(VM, "one")
        rig.write(VM, "B")
        for number in range(1, 40):
            if not dies(lambda n=number: mortal(rig, n).enlarge(VM, 2 * SIZE)):
                break
            assert rig.read(VM) == "B"
            disks.ready(VM)
            disk = disks.find(VM)
            assert disk.size in (SIZE, 2 * SIZE) and length(rig) >= disk.size
            assert length(rig) == SIZE or beyond(rig, SIZE) == {0}
            clean_up(disks)
        assert number > 3
        assert disks.find(VM).size == length(rig) == 2 * SIZE and rig.read(VM) == "B"
        for number in range(1, 40):
            if not dies(lambda n=number: mortal(rig, n).restore(VM, "one")):
                break
            assert rig.read(VM) in "AB" and disks.find(VM).size == length(rig) == 2 * SIZE
            assert [c.name for c in disks.find(VM).checkpoints] == ["clean", "one"]
            clean_up(disks)
        assert rig.read(VM) == "A" and disks.pristine(VM, "one") and length(rig) == 2 * SIZE
        clean_up(disks)
        disks.destroy(VM)
        disks.remove_template("base@1")
        assert [n for n in rig.everything() if "fh" in n.replace(rig.vg, "")] == []


def test_what_an_admin_extended_by_hand_is_never_wiped(full):
    disks = cloned(full)
    mine = full.path(VM).readlink().name
    run("lvextend", "-q", "-L", f"{2 * SIZE}b", f"{full.vg}/{mine}")
    full.write(VM, "G", SIZE)  # his guest has grown into it
    assert disks.enlarge(VM, 2 * SIZE).size == 2 * SIZE
    disks.ready(VM)
    disks.enlarge(VM, 3 * SIZE)
    with full.path(VM).open("rb") as file:
        file.seek(SIZE)
        assert file.read(65536) == b"G" * 65536
        file.seek(2 * SIZE)
        assert set(file.read()) == {0}
    run("lvcreate", "-q", "-y", "-s", "-L", "8M", "-n", "backup", f"{full.vg}/{mine}")
    with pytest.raises(WrongState, match=r"backup in .* snapshots of it"):
        disks.enlarge(VM, 4 * SIZE)
    run("lvremove", "-q", "-f", f"{full.vg}/backup")
    assert disks.enlarge(VM, 4 * SIZE).size == length(full) == 4 * SIZE


def test_what_a_killed_reset_left_keeps_no_checkpoint(linked, monkeypatch):
    disks = cloned(linked)
    disks.checkpoint(VM, "one")
    disks.restore(VM, "clean")
    with monkeypatch.context() as patch:
        patch.setattr(kind_of(linked), "_point", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert dies(lambda: linked.disks().restore(VM, "one"))
    disks.remove_checkpoint(VM, "one")
    assert [c.name for c in disks.find(VM).checkpoints] == ["clean"]
    assert list(disks.leftovers()) == [] and linked.read(VM) == "T"


@pytest.mark.parametrize("kind", [ClassicRig, FullRig])
def test_an_image_that_ends_within_an_extent(kind):
    """What the extent held before is no guest's to read; what a guest writes there is kept."""
    with kind() as rig:
        stain(rig)
        disks = rig.disks()
        image = rig.image()
        run("qemu-img", "resize", "-q", image, str(SIZE + 65536))
        disks.clone(disks.seal(image, template()), VM, PROD, SIZE + 65536)
        assert length(rig) > SIZE + 65536
        assert beyond(rig, SIZE) == {0} and disks.pristine(VM, "clean")
        rig.write(VM, "E", length(rig) - 65536)
        disks.checkpoint(VM, "one")
        disks.restore(VM, "clean")
        disks.restore(VM, "one")
        assert beyond(rig, length(rig) - 65536) == {ord("E")}


def stain(rig: LvmRig) -> None:
    """The group's free extents hold what somebody wrote there."""
    run("lvcreate", "-q", "-y", "-Wn", "-Zn", "-L", "384M", "-n", "stain", rig.vg)
    with Path("/dev", rig.vg, "stain").open("r+b") as file:
        for _ in range(384):
            file.write(b"?" * MIB)
        os.fsync(file.fileno())
    run("lvremove", "-q", "-f", f"{rig.vg}/stain")


def mortal(rig: LvmRig, number: int):
    """Killed before its change of that number: a command, a wiping."""
    left = iter(range(1, number))

    def mortal_(do: Callable[..., object]) -> Callable[..., object]:
        def act(*arguments: object, **options: object) -> object:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*arguments, **options)

        return act

    disks = rig.disks()
    disks._lvm.change = mortal_(disks._lvm.change)
    lvm_copy._wipe = mortal_(lvm_copy._wipe)  # in a child that ends
    return disks


def length(rig: LvmRig) -> int:
    with rig.path(VM).open("rb") as file:
        return file.seek(0, os.SEEK_END)


def beyond(rig: LvmRig, start: int) -> set[int]:
    """The bytes from there on."""
    os.sync()
    with rig.path(VM).open("rb") as file:
        file.seek(start)
        return set(file.read())


def kind_of_disk(rig: LvmRig) -> str:
    """What lvs says of the volume first: "-" a plain one, "s" a snapshot."""
    name = rig.path(VM).readlink().name
    return run("lvs", "--noheadings", "-o", "lv_attr", f"{rig.vg}/{name}").strip()[0]


def test_a_full_disk_is_copied_while_its_machine_runs_on(full):
    disks = cloned(full)
    full.write(VM, "A")
    disks.before_live(VM, "one")
    taken = disks.checkpoint_live(VM, "one", lambda _path: None)
    full.write(VM, "B")
    assert [c.name for c in disks.find(VM).checkpoints] == ["clean"]
    assert list(disks.leftovers()) == [], "it waits for that"
    disks.settle_live(VM, full.path(VM))
    assert disks.find(VM).checkpoints[1] == taken and disks.find(VM).base == "one"
    disks.before_live(VM, "two")
    disks.checkpoint_live(VM, "two", lambda _path: None)
    disks.restore(VM, "one")  # whose disk isn't the one that waits any more
    disks.settle_live(VM, None)
    assert full.read(VM) == "A" and list(disks.leftovers()) == []
    assert [c.name for c in disks.find(VM).checkpoints] == ["clean", "one"]


def test_a_linked_disks_machine_stands_still_and_an_admin_is_told(linked):
    warnings: list[str] = []
    disks = cloned(linked, warn=warnings.append)
    disks.before_live(VM, "one")
    assert warnings == [f"{VM} stands still while its disk is copied, 64M"]
    disks.checkpoint_live(VM, "one", lambda _path: None)
    disks.settle_live(VM, linked.path(VM))
    assert disks.find(VM).base == "clean"
    assert disks.restore(VM, "one").base == "one"


def test_a_full_copy_killed_in_the_middle_goes_on(full, monkeypatch):
    monkeypatch.setattr(lvm_copy, "_RECORD_EVERY", 8 * MIB)
    disks = full.disks()
    sealed = disks.seal(full.image(), template())

    def killed(_what: str, done: int, _total: int) -> None:
        if done >= 24 * MIB:
            os.kill(os.getpid(), signal.SIGKILL)

    assert dies(lambda: full.disks(progress=killed).clone(sealed, VM, PROD, SIZE))
    assert disks.find(VM) is None
    (part,) = [f for f in disks.leftovers() if f.kind == "volume"]
    assert part.owner == PROD and part.bytes == SIZE
    node = Path("/dev") / part.ref
    handle = os.open(node, os.O_WRONLY)  # what a power cut may do to what was thought written
    os.pwrite(handle, b"?" * 4096, 8 * MIB)
    os.pwrite(handle, b"?" * 4096, 40 * MIB)
    os.close(handle)
    disk = disks.clone(sealed, VM, PROD, SIZE)
    assert disk.path.resolve() == node.resolve()
    assert full.read(VM) == "T" and disks.pristine(VM, "clean")
    assert list(disks.leftovers()) == []
    assert [p.name for p in (full.links / full.vg).iterdir()] == [VM]


def test_a_look_is_gone_on_from_until_somebody_else_had_the_lock(thin, monkeypatch):
    monkeypatch.setattr(lvm_volumes, "_FRESH", 3600)  # the lab may be slow
    disks, other, reports = cloned(thin), thin.disks(), []
    report = Lvm.report
    monkeypatch.setattr(Lvm, "report", lambda self: reports.append(self) or report(self))
    sealed = disks.templates()[0]
    for name in ("kata-a", "kata-b"):
        disks.clone(sealed, name, PROD, SIZE)
    assert len(reports) == 1
    with pytest.raises(Conflict):
        disks.clone(sealed, "kata-a", PROD, SIZE)
    disks.templates()
    other.clone(sealed, "kata-c", PROD, SIZE)
    other.destroy("kata-b")
    with pytest.raises(Conflict):
        disks.clone(sealed, "kata-c", PROD, SIZE)
    disks.clone(sealed, "kata-b", PROD, SIZE)
    assert [d.machine for d in disks.list()] == ["kata-a", "kata-b", "kata-c", VM]
    assert list(disks.leftovers()) == []
