"""Modes are set, not asked for: here with nothing but the umask in the way. What others are told of our
paths is written by their rules, or refused."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from shutil import rmtree

import pytest
from sshd_machine import Sshd, make_key

from host import paths
from host.files import make_directory, open_new, open_to_append
from host.run import Runner
from host.ssh_options import path_option
from hypervisors.api import Owner, Template
from hypervisors.disks.qcow2.disks import Qcow2Disks
from hypervisors.libvirt import private
from hypervisors.libvirt.private import PrivateLibvirt, check_runtime
from inventory.errors import DriverFailed, UsageError
from provision.engine.report import QuietReporter
from provision.network.staged import stage
from provision.site import open_site
from tests import farm
from tests.identities import KATA

MIB = 2**20
UMASKS = pytest.mark.parametrize("umask", [0o000, 0o027, 0o077], ids=oct)
AWKWARD = '-Jo o\'b "x" a:b %d%% %h k,=v ü {} $H \\t #;'


@pytest.fixture
def umasked(umask: int) -> Iterator[None]:
    before = os.umask(umask)
    yield
    os.umask(before)


@pytest.fixture
def short() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fh"))
    path.chmod(0o711)
    yield path
    rmtree(path)


def modes(top: Path) -> dict[str, int]:
    found = {}
    for path in sorted(top.rglob("*")):
        if stat.S_ISDIR(path.lstat().st_mode) or stat.S_ISREG(path.lstat().st_mode):
            found[str(path.relative_to(top))] = stat.S_IMODE(path.lstat().st_mode)
    return found


def kept(found: dict[str, int], names: Callable[[str], bool]) -> set[int]:
    return {mode for name, mode in found.items() if names(name)}


@UMASKS
@pytest.mark.usefixtures("umasked")
def test_a_life_on_the_fake_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / "all" / name))
    file = tmp_path / "kata.yaml"
    file.write_text(
        "farm: kata\nhosts: {here: {driver: fake}}\nvms: {prod: {memory: 512M}}\n"
        "templates: {base: {build: debian-12, size: 64M}}\n"
    )
    with open_site(file, reporter=QuietReporter()) as site:
        farm.template_build(site, "base")
        farm.clone_farm(site)
        farm.checkpoint(site, ("prod",), "x")
        farm.reset(site, ("prod",))
        found = modes(tmp_path / "all")
        root = "STATE/farms/kata"
        assert not {name: f"{mode:o}" for name, mode in found.items() if mode & 0o022}
        assert kept(found, lambda n: n in ("STATE", root, f"{root}/seeds", "CACHE")) == {0o711}
        assert kept(found, lambda n: n in (f"{root}/keys", f"{root}/locks", "CACHE/images")) == {0o700}
        private_ = ("journal.db", ".lock", ".state", ".iso", "id_ed25519", "hostkeys/prod", "claims.db")
        assert kept(found, lambda n: n.endswith(private_)) == {0o600}
        assert len(found) > 20
        farm.destroy(site, ("prod",))


@UMASKS
@pytest.mark.usefixtures("umasked")
def test_a_disk_s_life(tmp_path: Path, umask: int) -> None:
    disks = Qcow2Disks(tmp_path / "all" / "store", KATA, Runner())
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", image, "4M"], check=True)
    template = Template(
        name="base", generation=1, ref="", size=4 * MIB, sha256="",
        created=datetime.now(UTC), origin="test", firstboot="none",
    )  # fmt: skip
    sealed = disks.seal(image, template)
    disks.clone(sealed, "kata-prod", Owner(KATA, "prod"), 4 * MIB)
    disks.checkpoint("kata-prod", "x")
    assert modes(tmp_path / "all") == {
        "store": 0o711,
        "store/.lock": 0o600,
        "store/templates": 0o711,
        "store/templates/base@1.json": 0o644,
        "store/templates/base@1.qcow2": 0o400,
        "store/vms": 0o711,
        "store/vms/kata-prod": 0o711,
        "store/vms/kata-prod/disk.qcow2": 0o600,
        "store/vms/kata-prod/owner.json": 0o644,
        "store/vms/kata-prod/checkpoint-x.qcow2": 0o400,
    }


@UMASKS
@pytest.mark.usefixtures("umasked")
def test_the_private_libvirtd_s_configuration(short: Path, umask: int) -> None:
    daemon = PrivateLibvirt(short / "s a:b", short / "r", short / "c", True)
    daemon.uri()
    found = modes(short)
    daemon.stop(force=True)
    assert kept(found, lambda n: n.endswith(".conf") and n.startswith("s a:b/etc")) == {0o600}
    ours = ("s a:b", "s a:b/etc", "r/run", "r/k")
    assert kept(found, lambda n: n in ours) == {0o711}
    mine = {name: f"{mode:o}" for name, mode in found.items() if mode & 0o002}
    assert not mine, "not even libvirt's own"


@UMASKS
@pytest.mark.usefixtures("umasked")
def test_what_an_admin_made_is_left_as_it_is(tmp_path: Path, umask: int) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    theirs.chmod(0o750)
    known = theirs / "known_hosts"
    known.write_bytes(b"one\n")
    known.chmod(0o640)
    make_directory(theirs, mode=0o700)
    make_directory(theirs / "a" / "b", mode=0o700)
    with open_to_append(known) as file:
        file.write(b"two\n")
    with open_to_append(theirs / "a" / "log", mode=0o644) as file:
        file.write(b"x")
    with open_new(theirs / "a" / "new") as file:
        file.write(b"x")
    assert known.read_text() == "one\ntwo\n"
    assert modes(tmp_path) == {
        "theirs": 0o750, "theirs/known_hosts": 0o640, "theirs/a": 0o711, "theirs/a/b": 0o700,
        "theirs/a/log": 0o644, "theirs/a/new": 0o600,
    }  # fmt: skip


# -- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["STATE", "CACHE", "RUNTIME"])
def test_a_directory_is_from_the_root_on_and_can_be_told_of(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"STATE": paths.state_dir, "CACHE": paths.cache_dir, "RUNTIME": paths.runtime_dir}[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(f"FARMHAND_{name}_DIR", AWKWARD)
    assert where() == tmp_path / AWKWARD
    for odd in ("a\nb", "a\x7fb", os.fsdecode(b"caf\xe9")):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", odd)
        with pytest.raises(UsageError, match=f"FARMHAND_{name}_DIR") as caught:
            where()
        assert caught.value.remedy and "\n" not in caught.value.message


def test_ssh_takes_an_awkward_path_for_what_it_is(tmp_path: Path) -> None:
    place = tmp_path / AWKWARD
    place.mkdir()
    make_key(tmp_path / "key")
    machine = Sshd("prod", tmp_path / "machine", tmp_path / "key").prepare().start()
    key, known = place / "key", place / "known_hosts"
    key.write_bytes((tmp_path / "key").read_bytes())
    key.chmod(0o600)
    known.write_text(f"it {machine.host_key}\n")
    try:
        done = subprocess.run(
            ["ssh", "-F", "/dev/null", "-p", str(machine.port), "-o", "BatchMode=yes",
             "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "HostKeyAlias=it",
             "-o", "StrictHostKeyChecking=yes", "-o", "GlobalKnownHostsFile=/dev/null",
             *path_option("IdentityFile", key), *path_option("UserKnownHostsFile", known),
             f"{machine.endpoint().user}@127.0.0.1", "echo in"],
            capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        machine.stop()
    assert (done.stdout, done.stderr) == ("in\n", "")
    with pytest.raises(UsageError, match="OpenSSH"):
        path_option("IdentityFile", "/a/${HOME}/key")


def test_what_an_ordinary_user_s_libvirt_can_not_name_is_refused(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private.os, "geteuid", lambda: 1000)
    check_runtime(short / "a b:%\"'")
    for name in ("a,b", "a=b"):
        with pytest.raises(DriverFailed, match="socket there") as caught:
            check_runtime(short / name)
        assert "FARMHAND_RUNTIME_DIR" in caught.value.remedy


def test_a_checker_sees_new_files_in_an_awkward_directory(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = short / AWKWARD
    live.mkdir()
    (live / "old").write_text("old\n")
    monkeypatch.setattr(tempfile, "tempdir", str(live))
    with stage(Runner(), {str(live / "old"): "new\n", str(live / "sub/other"): "other\n"}) as staged:
        seen = staged.check(["cat", str(live / "old"), str(live / "sub/other")])
    assert seen.stdout == "new\nother\n"
    assert (live / "old").read_text() == "old\n" and not (live / "sub").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's QEMU is root's way to run it")
def test_a_directory_that_qemu_s_user_can_not_pass_is_said_beforehand(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut = short / "shut up"
    shut.mkdir(mode=0o700)
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(shut / "state"))
    monkeypatch.setenv("FARMHAND_RUNTIME_DIR", str(short / "r"))
    file = short / "kata.yaml"
    file.write_text("farm: kata\nvms: {prod: {memory: 512M}}\ntemplates: {base: {import: none.img}}\n")
    for plan in (True, False):
        with open_site(file, reporter=QuietReporter(), plan=plan) as site:
            with pytest.raises(DriverFailed, match="QEMU's user") as caught:
                farm.clone_farm(site)
            assert caught.value.remedy.startswith(f"chmod o+x '{shut}'")
    from provision.doctor import examine

    seen = [c for c in examine(file).checks if c.name == "disks of here"]
    assert [c.ok for c in seen] == [False] and "QEMU's user" in seen[0].text
    assert stat.S_IMODE(shut.stat().st_mode) == 0o700
