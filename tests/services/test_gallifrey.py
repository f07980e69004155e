"""The XiVO farm as it ships, at Debian's own paths, with real daemons and real guests: in a mount and a
network namespace, so that nothing of this machine is touched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from gallifrey import SHIPPED, inside, said, with_image

SERVICES = r"""
run plan network-apply --plan
run first network-apply
run second network-apply
run verify network-verify
dig +short @127.0.0.1 gallifrey-dev.xivo.vm.farm >"$dir/dig"
dig +short @127.0.0.1 -x 10.10.60.6 >>"$dir/dig"
iptables -t nat -S >"$dir/nat" 2>&1 || iptables-save >>"$dir/nat" 2>&1 || :
cp /etc/hosts /etc/shorewall/rules /etc/shorewall/params "$dir/"
"""

GUESTS = r"""
mount -t tmpfs farmhand /srv
mkdir /srv/images
mv "$dir/gallifrey.img" /srv/images/
export HOME="$dir/home" FARMHAND_ACCELERATOR=tcg
run clone clone-farm
log_in inside gallifrey-dev 'hostname; ip -4 -o addr show dev eth0'
cp -r "$dir"/state/farms/xivo/keys/hostkeys "$dir/" || :
run again clone-farm
run reset reset --vm gallifrey-dev
log_in after gallifrey-dev 'cat /proc/sys/kernel/random/boot_id'
ssh-keyscan -t ed25519 10.10.60.5 10.10.60.6 >"$dir/scanned" 2>"$dir/scanned.err" || :
run gone destroy --all --purge --yes
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("g")
    (directory / "gallifrey.yaml").write_text(SHIPPED)
    return inside(directory, SERVICES)


@pytest.fixture(scope="module")
def guests() -> Iterator[Path]:
    """Both VMs were made and started from an image that knows nothing of who clones it. What this
    machine has not is said otherwise than in the file that ships: its libvirtd, LVM, 8 GiB of memory."""
    directory = with_image({
        "qemu:///system": "private", "store: lvm": "store: qcow2", "pool: all ": "# ",
        "copy: full": "# ", "memory: 4G": "memory: 256M", "memory: 1G": "memory: 128M",
    })  # fmt: skip
    yield inside(directory, GUESTS, timeout=1500)
    shutil.rmtree(directory)


def test_the_plan_and_the_first_run_agree(told: Path) -> None:
    assert (told / "first.status").read_text() == "0\n", (told / "first.err").read_text()
    assert said(told, "plan")["actions"] == said(told, "first")["actions"]
    services = {a["text"].split(":")[0] for a in said(told, "first")["actions"] if a["verb"] == "tell"}
    assert services == {"bind", "dhcpd", "nginx", "shorewall"}


def test_the_second_run_does_nothing(told: Path) -> None:
    assert said(told, "second")["changed"] is False


def test_every_answer_is_right_or_of_a_vm_that_is_off(told: Path) -> None:
    verified = said(told, "verify")
    assert verified["ok"], [a for a in verified["answers"] if a["ok"] is False]
    right = {(a["service"], a["vm"]) for a in verified["answers"] if a["ok"]}
    assert {("bind", "gallifrey-dev"), ("dhcpd", "gallifrey-dev"), ("hosts", "gallifrey-dev")} <= right
    assert {a["service"] for a in verified["answers"] if a["ok"] is None} <= {"nginx", "shorewall"}


def test_what_the_article_did_by_hand(told: Path) -> None:
    assert (told / "dig").read_text().split() == ["10.10.60.6", "gallifrey-dev.xivo.vm.farm."]
    assert "10.10.60.6 gallifrey-dev.xivo.vm.farm gallifrey-dev\n" in (told / "hosts").read_text()
    rules = (told / "rules").read_text()
    assert "DNAT\tnet\tloc:$VM_GALLIFREY_DEV_XIVO:22\ttcp\t22006\t-\t192.0.2.7\n" in rules
    assert rules.startswith("?SECTION NEW\nSSH(ACCEPT) net fw\n# BEGIN farmhand xivo:")
    assert "VM_GALLIFREY_DEV_XIVO=10.10.60.6\n" in (told / "params").read_text()


def test_shorewalls_rule_is_in_the_kernel(told: Path) -> None:
    assert not (told / "shorewall.failed").exists(), (told / "shorewall.log").read_text()[-500:]
    assert "--dport 22006" in (told / "nat").read_text()


@pytest.mark.system
@pytest.mark.timeout(1800)  # two guests, emulated, on a host that may be busy
def test_its_vms_come_up_with_their_addresses_by_dhcp(guests: Path) -> None:
    assert (guests / "clone.status").read_text() == "0\n", (guests / "clone.err").read_text()[-3000:]
    host, address = (guests / "inside.out").read_text().splitlines()
    assert host == "gallifrey" and "inet 10.10.60.6/24 " in address
    assert said(guests, "again")["changed"] is False


@pytest.mark.system
def test_their_host_key_is_the_images_learnt_and_pinned(guests: Path) -> None:
    """Nobody gave them one, nor a seed; a reset VM is known by the same."""
    scanned = {
        line.split()[2] for line in (guests / "scanned").read_text().splitlines() if line[0] != "#"
    }
    (image,) = scanned
    for vm in ("gallifrey", "gallifrey-dev"):
        learnt = (guests / "hostkeys" / f"{vm}.learnt").read_text()
        assert learnt == f"xivo-{vm} ssh-ed25519 {image}\n"
        assert not (guests / "hostkeys" / vm).exists()
        assert f"{vm}: xivo-{vm} was not known: its host key" in (guests / "clone.err").read_text()
    assert (guests / "reset.status").read_text() == "0\n", (guests / "reset.err").read_text()
    assert (guests / "after.status").read_text() == "0\n", (guests / "after.err").read_text()
    assert "was not known" not in (guests / "reset.err").read_text()
    assert (guests / "gone.status").read_text() == "0\n", (guests / "gone.err").read_text()
