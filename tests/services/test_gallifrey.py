"""The XiVO farm as it ships, at Debian's own paths, with real daemons: in a mount and a network
namespace, so that nothing of this machine is touched."""

# ruff: noqa: E501 - shell scripts as an admin would write them

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

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

INSIDE = r"""
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
run plan network-apply --plan
run first network-apply
run second network-apply
run verify network-verify
dig +short @127.0.0.1 gallifrey-dev.xivo.vm.farm >"$dir/dig"
dig +short @127.0.0.1 -x 10.10.60.6 >>"$dir/dig"
iptables -t nat -S >"$dir/nat" 2>&1 || iptables-save >>"$dir/nat" 2>&1 || :
cp /etc/hosts /etc/shorewall/rules /etc/shorewall/params "$dir/"
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands said, in files."""
    directory = tmp_path_factory.mktemp("g")
    for name in ("over", "bin", "state", "run"):
        (directory / name).mkdir()
    shim = directory / "bin" / "systemctl"
    shim.write_text(SYSTEMCTL)
    shim.chmod(0o755)
    (directory / "gallifrey.yaml").write_text((ROOT / "inventory" / "gallifrey.yaml").read_text())
    argv = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", INSIDE, "sh"]
    done = subprocess.run(
        [*argv, str(directory), str(ROOT), sys.executable],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory


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
