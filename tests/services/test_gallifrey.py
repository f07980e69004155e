"""The XiVO farm as it ships, at Debian's own paths, with real daemons and real guests: in a mount and a
network namespace, so that nothing of this machine is touched."""

# ruff: noqa: E501 - shell scripts as an admin would write them

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import old_image
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (ROOT / "inventory" / "gallifrey.yaml").read_text()

# systemd is not there: the three commands that the farm file's defaults ask of it.
SYSTEMCTL = """#!/bin/sh
verb=$1
for unit; do :; done
case $unit in
    isc-dhcp-server) pid=/run/dhcpd.pid start="dhcpd -4 -q -cf /etc/dhcp/dhcpd.conf -pf /run/dhcpd.pid br0" ;;
    nginx) pid=/run/nginx.pid start=nginx ;;
esac
case $verb in
    is-active) [ -s $pid ] && kill -0 "$(cat $pid)" ;;
    reload) kill -HUP "$(cat $pid)" ;;
    restart)
        if [ -s $pid ]; then kill "$(cat $pid)" && while kill -0 "$(cat $pid)" 2>/dev/null; do sleep 0.05; done; fi
        rm -f $pid; $start ;;
esac
"""

PLACE = r"""
set -eu
dir=$1 root=$2 python=$3
mount -t tmpfs farmhand "$dir/over"
for place in etc var run; do
    mkdir "$dir/over/$place" "$dir/over/$place-work"
    mount -t overlay farmhand -o "lowerdir=/$place,upperdir=$dir/over/$place,workdir=$dir/over/$place-work" "/$place"
done
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
ip link set lo up
ip link add br0 type bridge
ip link add port0 type veth peer name port1
ip link set port0 master br0 up
ip link set port1 up
ip addr add 10.10.60.1/24 dev br0
ip link set br0 up
ip link add eth0 type veth peer name outside
ip addr add 192.0.2.7/24 dev eth0
ip link set eth0 up
ip link set outside up
export PATH="$dir/bin:$PATH" FARMHAND_STATE_DIR="$dir/state" FARMHAND_RUNTIME_DIR="$dir/run"
# What an admin has before: BIND with our file included, nginx, shorewall's own files.
mkdir -p /run/named /var/lib/shorewall /var/log/nginx /var/lib/dhcp /var/lib/bind /var/cache/bind
: >/var/lib/dhcp/dhcpd.leases
mv /etc/dhcp/dhcpd.conf /etc/dhcp/dhcpd.conf.debian
: >/etc/bind/named.conf.farmhand
echo 'include "/etc/bind/named.conf.farmhand";' >>/etc/bind/named.conf.local
[ -e /etc/bind/rndc.key ] || rndc-confgen -a >/dev/null 2>&1
rm -f /etc/nginx/sites-enabled/default
printf 'fw firewall\nnet ipv4\nloc ipv4\n' >/etc/shorewall/zones
printf '?FORMAT 2\nnet eth0\nloc br0\n' >/etc/shorewall/interfaces
printf 'all all ACCEPT\n' >/etc/shorewall/policy
printf '?SECTION NEW\nSSH(ACCEPT) net fw\n' >/etc/shorewall/rules
printf 'IP_FAILOVER=192.0.2.7\n' >/etc/shorewall/params
shorewall start >"$dir/shorewall.log" 2>&1 || echo "shorewall doesn't start: $?" >"$dir/shorewall.failed"
chown bind /run/named /var/cache/bind
named -4 -u bind -c /etc/bind/named.conf
nginx
trap 'for file in /run/named/named.pid /run/nginx.pid /run/dhcpd.pid; do
    [ ! -s $file ] || kill "$(cat $file)"; done' EXIT
sleep 1
run() { # name, words
    name=$1; shift
    set +e
    "$python" -P "$root/cli/start.py" --search-root "$root" "$@" --farm "$dir/gallifrey.yaml" --json \
        >"$dir/$name.json" 2>"$dir/$name.err"
    echo $? >"$dir/$name.status"
    set -e
}
"""

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
run inside ssh --vm gallifrey-dev --command 'hostname; ip -4 -o addr show dev eth0'
cp -r "$dir"/state/farms/xivo/keys/hostkeys "$dir/" || :
run again clone-farm
run reset reset --vm gallifrey-dev
run after ssh --vm gallifrey-dev --command 'cat /proc/sys/kernel/random/boot_id'
ssh-keyscan -t ed25519 10.10.60.5 10.10.60.6 >"$dir/scanned" 2>"$dir/scanned.err" || :
run gone destroy --all --purge --yes
"""


def inside(directory: Path, script: str) -> Path:
    """Run the script there, with the farm file in ``directory``; what its commands said is in files of
    that."""
    for name in ("over", "bin", "state", "run"):
        (directory / name).mkdir()
    shim = directory / "bin" / "systemctl"
    shim.write_text(SYSTEMCTL)
    shim.chmod(0o755)
    argv = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", PLACE + script, "sh"]
    done = subprocess.run(
        [*argv, str(directory), str(ROOT), sys.executable],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("g")
    (directory / "gallifrey.yaml").write_text(SHIPPED)
    return inside(directory, SERVICES)


@pytest.fixture(scope="module")
def guests() -> Iterator[Path]:
    """Both VMs were made and started from an image that knows nothing of who clones it. What this
    machine has not is said otherwise than in the file that ships: its libvirtd, LVM, 8 GiB of memory."""
    directory = Path(tempfile.mkdtemp(prefix="fhg-"))  # short for sockets, and QEMU's user passes
    directory.chmod(0o711)
    key = directory / "home" / ".ssh" / "id_rsa"
    key.parent.mkdir(mode=0o700, parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", key], check=True)
    old_image.build(directory, key.with_name("id_rsa.pub").read_text().strip())
    text = SHIPPED
    for shipped, here in {
        "qemu:///system": "private", "store: lvm": "store: qcow2", "pool: all ": "# ",
        "copy: full": "# ", "memory: 4G": "memory: 256M", "memory: 1G": "memory: 128M",
    }.items():  # fmt: skip
        assert shipped in text
        text = text.replace(shipped, here)
    (directory / "gallifrey.yaml").write_text(text)
    yield inside(directory, GUESTS)
    shutil.rmtree(directory)


def said(told: Path, name: str) -> dict[str, Any]:
    data = json.loads((told / f"{name}.json").read_text())
    assert isinstance(data, dict)
    return data


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
    assert "DNAT\tnet\tloc:$VM_GALLIFREY_DEV:22\ttcp\t22006\t-\t192.0.2.7\n" in rules
    assert rules.startswith("?SECTION NEW\nSSH(ACCEPT) net fw\n# BEGIN farmhand xivo:")
    assert "VM_GALLIFREY_DEV=10.10.60.6\n" in (told / "params").read_text()


def test_shorewalls_rule_is_in_the_kernel(told: Path) -> None:
    assert not (told / "shorewall.failed").exists(), (told / "shorewall.log").read_text()[-500:]
    assert "--dport 22006" in (told / "nat").read_text()


@pytest.mark.system
def test_its_vms_come_up_with_their_addresses_by_dhcp(guests: Path) -> None:
    assert (guests / "clone.status").read_text() == "0\n", (guests / "clone.err").read_text()[-3000:]
    told = (guests / "inside.json").read_text() + (guests / "inside.err").read_text()
    assert (guests / "inside.status").read_text() == "0\n", told
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
