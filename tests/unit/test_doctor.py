"""What doctor asks for: what the farm at hand needs, and whether its hosts really answer."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from builds.checkup import with_source
from host.check import Check
from hypervisors.far.drivers import FarHypervisor
from hypervisors.libvirt.kvm_host import KvmHost
from hypervisors.libvirt.xen_host import XenHost
from inventory.errors import DriverFailed
from inventory.hosts import NeededFile
from provision import doctor
from provision.checkup import CheckReport
from provision.doctor import examine

_FARM = """
farm: asked
hosts:
  here: {{driver: {driver}{keys}}}
network: {{mode: bridge, bridge: br0, subnet: 10.0.0.0/24}}
templates: {{base: {{build: debian-12{more}}}}}
vms: {{prod: {{}}}}
"""
_KEYS = ", uri: '{uri}', disks: {{store: {store}, pool: nowhere, dataset: farm}}"
_DEAF = "{driver}+unix:///system?socket=/nowhere/at/all"


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "state"))


def test_the_source_is_looked_at(tmp_path: Path) -> None:
    """Said with file and line; a URL is the VM's matter, and isn't waited for long."""
    file = tmp_path / "farm.yaml"
    own = tmp_path / "own"
    git = ("git", "-C", own, "-c", "user.name=t", "-c", "user.email=t@example.org")
    own.mkdir()
    (own / "x").touch()
    base = "farm: a\nvms: {b: {}}\ntemplates: {t: {build: debian-12}}\n"

    def look(source: str, *, ask: bool = True) -> Check:
        file.write_text(f"{base}source:\n  {source}\n  revision: main\n")
        report = with_source(CheckReport(()), file, ask=ask)
        [check] = report.checks
        assert check.name == "source"
        return check

    missing = look("repository: ../nowhere")
    assert (missing.ok, missing.level) == (False, "needed")
    assert missing.text == f"{file}:5:15: the source {tmp_path.parent}/nowhere is not a directory"
    assert look("repository: own").text == f"{own}: no git repository: built as it is now"
    assert look("example: kata").ok
    subprocess.run([*git, "init", "-q", "-b", "trunk"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "One"], check=True)
    other = look("repository: own")
    assert (other.ok, other.text) == (False, f"{file}:5:15: {own} has no revision 'main'")
    assert "trunk" in other.remedy
    subprocess.run([*git, "branch", "main"], check=True)
    assert look("repository: own").text.startswith(f"{own}: main is ")
    url = "git://127.0.0.1:1/x.git"
    assert look(f"repository: {url}", ask=False).text == f"{url}: not asked"
    away = look(f"repository: {url}")
    assert (away.ok, away.level) == (False, "note")
    assert away.text.startswith(f"{file}:5:15: {url} can't be reached from here: ")
    assert CheckReport((away,)).ok
    with_source(CheckReport(()), tmp_path / "none.yaml", ask=True)


def checks(tmp_path: Path, driver: str, store: str, more: str = "") -> list[Check]:
    """``more``: of its template."""
    file = tmp_path / "farm.yaml"
    uri = _DEAF.format(driver="qemu" if driver == "kvm" else driver)
    keys = "" if driver == "fake" else _KEYS.format(uri=uri, store=store)
    file.write_text(_FARM.format(driver=driver, keys=keys, more=f", {more}" if more else ""))
    return list(examine(file).checks)


def named(found: list[Check], name: str) -> list[Check]:
    return [check for check in found if check.name == name]


@pytest.mark.parametrize("driver", ["kvm", "xen"])
def test_a_host_that_nobody_answers_for_is_broken(tmp_path: Path, driver: str) -> None:
    [host] = named(checks(tmp_path, driver, "lvm-thin"), "host here")
    assert not host.ok
    assert host.level == "needed"
    assert "no libvirtd there" in host.text


def test_nothing_of_qemu_is_asked_for_where_xen_runs_the_vms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "which", lambda name: None if name.startswith("qemu-sys") else name)
    xen, kvm = checks(tmp_path, "xen", "lvm-thin"), checks(tmp_path, "kvm", "lvm-thin")
    assert [check.ok for check in named(xen, "tools")] == [True]
    assert not named(xen, "kvm")
    [missing] = named(kvm, "tools")
    assert missing.text == "not found: qemu-system-x86_64 (runs the VMs)"


def _texts(farm: str, tmp_path: Path) -> tuple[bool, str]:
    file = tmp_path / "farm.yaml"
    file.write_text(f"farm: asked\n{farm}")
    [python] = named(list(examine(file, hosts=False).checks), "python")
    return python.ok, python.text


def test_a_drivers_modules_are_asked_for_where_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed copy may be without libvirt's binding, if no host needs it here."""
    virtual = "templates: {base: {build: debian-12}}\nvms: {prod: {}}\n"
    bridge = f"network: {{mode: bridge, bridge: br0, subnet: 10.0.0.0/24}}\n{virtual}"
    ssh = "hosts: {there: {driver: ssh}}\nvms: {prod: {address: 192.0.2.1}}\n"
    pool = "hosts: {pool: {driver: xenapi, uri: 'https://x', credentials: c}}\n" + bridge
    far = "hosts: {away: {driver: xen, uri: 'xen+ssh://root@dom0/system'}}\n" + bridge

    def without(*names: str) -> None:
        monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in names else name)

    without("libvirt")
    for farm in (ssh, pool, far):
        assert _texts(farm, tmp_path)[0]
    assert not _texts(virtual, tmp_path)[0]
    without("XenAPI")
    assert _texts(virtual, tmp_path)[0]
    ok, text = _texts(pool, tmp_path)
    assert (ok, text.split(" lacks ")[1]) == (False, "XenAPI")
    without("libvirt", "XenAPI")
    assert _texts("hosts: broken\n", tmp_path)[1].endswith("lacks libvirt, XenAPI")


@pytest.mark.parametrize(
    ("store", "tool", "package"),
    [("zfs", "zfs", "zfsutils-linux"), ("lvm-thin", "lvm", "thin-provisioning-tools")],
)
def test_a_disk_stores_command_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, tool: str, package: str
) -> None:
    monkeypatch.setattr(doctor, "which", lambda name: None if name == tool else name)
    [_, missing] = named(checks(tmp_path, "xen", store), "tools")
    assert (missing.ok, missing.level) == (False, "needed")
    assert f"not found: {tool} " in missing.text
    assert package in missing.remedy


def test_room_in_the_state_directory_is_for_what_is_kept_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_FREE_DISKS", 2**60)
    assert named(checks(tmp_path, "xen", "lvm-thin"), "state space")[0].ok
    [space] = named(checks(tmp_path, "kvm", "qcow2"), "state space")
    assert not space.ok
    assert space.remedy.startswith("two VMs and a template take")


def test_what_xen_needs_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.touch()
    files = (
        NeededFile(path=str(there), package="grub-xen-host", purpose="starts the VMs", disk_boot=True),
        NeededFile(path=str(tmp_path / "lost"), package="other", purpose="runs"),
    )
    monkeypatch.setattr(XenHost, "INFO", replace(XenHost.INFO, files=files))
    [missing] = named(checks(tmp_path, "xen", "lvm-thin"), "xen")
    assert missing.text == f"not found: {tmp_path}/lost (runs)"
    assert missing.remedy.endswith(" other")
    assert not named(checks(tmp_path, "kvm", "lvm-thin"), "xen")


def test_grub_is_not_asked_for_where_the_host_gives_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grub = str(tmp_path / "grub")
    file = NeededFile(path=grub, package="grub-xen-host", purpose="starts the VMs", disk_boot=True)
    monkeypatch.setattr(XenHost, "INFO", replace(XenHost.INFO, files=(file,)))
    assert named(checks(tmp_path, "xen", "lvm-thin"), "xen")
    boot = "boot: {kernel: /boot/vmlinuz, cmdline: ro}"
    assert not named(checks(tmp_path, "xen", "lvm-thin", boot), "xen")


def test_efis_firmware_is_asked_for_where_a_vm_starts_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ours,) = KvmHost.INFO.files
    assert (ours.package, ours.efi) == ("ovmf", True)
    lost = ours._replace(path=str(tmp_path / "lost"))
    monkeypatch.setattr(KvmHost, "INFO", replace(KvmHost.INFO, files=(lost,)))
    assert not [c for c in checks(tmp_path, "kvm", "lvm-thin") if str(tmp_path / "lost") in c.text]
    file = tmp_path / "farm.yaml"
    file.write_text(file.read_text().replace("build: debian-12", "import: x, firmware: efi"))
    [missing] = [c for c in examine(file).checks if str(tmp_path / "lost") in c.text]
    assert missing.text == f"not found: {tmp_path}/lost (starts VMs by EFI)"
    assert missing.remedy.endswith(" ovmf")


def test_a_kernel_that_is_not_there(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd.img"
    kernel.touch()
    boot = f"boot: {{kernel: {kernel}, initrd: {initrd}, cmdline: ro}}"
    [missing] = named(checks(tmp_path, "fake", "lvm-thin", boot), "kernel of here")
    assert (missing.ok, missing.text) == (False, f"not found: {initrd}")
    assert "'boot' of its template" in missing.remedy
    initrd.touch()
    [there] = named(checks(tmp_path, "fake", "lvm-thin", boot), "kernel of here")
    assert there.ok
    assert not named(checks(tmp_path, "fake", "lvm-thin"), "kernel of here")


def test_a_link_lost_amid_the_questions_is_told() -> None:
    class Lost:
        def missing(self, *_: object) -> list[str]:
            raise DriverFailed("the link to build2 is lost", remedy="is it up?")

    far = cast(FarHypervisor, Lost())
    [tools] = doctor._far_tools("far", KvmHost(), far, ())
    assert (tools.name, tools.ok, tools.level) == ("tools of far", False, "needed")
    assert (tools.text, tools.remedy) == ("the link to build2 is lost", "is it up?")


def test_what_package_repositories_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpg only where something is signed."""
    file = tmp_path / "farm.yaml"
    base = "farm: a\nvms: {b: {}}\ntemplates: {t: {build: debian-12}}\n"
    signing = f"signing: [{{fingerprint: {'A' * 40}, home: gnupg}}]"

    def look(more: str) -> Check:
        file.write_text(f"{base}repositories: {{kata: {{format: deb, channels: [tested], {more}}}}}\n")
        report = examine(file, hosts=False)
        [check] = [check for check in report.checks if check.name == "package repositories"]
        return check

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "which", shutil.which)  # not in the sbin directories of this machine
    assert look("components: [main]").ok
    check = look(signing)
    assert (check.ok, check.level) == (False, "needed")
    assert check.text == "not found: gpg, gpg-agent, gpgconf, gpgv"
    assert "apt-get install" in check.remedy and check.remedy.endswith("gpg gpg-agent gpgconf gpgv")
    monkeypatch.undo()
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "state"))
    assert look(signing).text == "kata"
