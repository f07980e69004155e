"""The place of the XiVO farm's tests: Debian's own paths, real daemons, in a mount and a network namespace,
so that nothing of the machine is touched."""

# ruff: noqa: E501 - shell scripts as an admin would write them

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.services import old_image

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
dir=$1 root=$2 python=$3 more=
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
trap 'for file in /run/named/named.pid /run/nginx.pid /run/dhcpd.pid $more; do
    [ ! -s $file ] || kill "$(cat $file)"; done' EXIT
sleep 1
farmhand() { # name, words
    name=$1; shift
    set +e
    "$python" -P "$root/cli/start.py" --search-root "$root" "$@" --farm "$dir/gallifrey.yaml" \
        >"$dir/$name.out" 2>"$dir/$name.err"
    echo $? >"$dir/$name.status"
    set -e
}
run() { # name, words
    farmhand "$@" --json
    mv "$dir/$1.out" "$dir/$1.json"
}
log_in() { # name, VM, command
    farmhand "$1" ssh --vm "$2" --command "$3"
}
"""


def inside(directory: Path, script: str, *, timeout: float = 300) -> Path:
    """Run the script there, with the farm file in ``directory``; what its commands said is in files of
    that. ``$more`` of it: pid files of daemons to be ended, too."""
    for name in ("over", "bin", "state", "run"):
        (directory / name).mkdir()
    shim = directory / "bin" / "systemctl"
    shim.write_text(SYSTEMCTL)
    shim.chmod(0o755)
    argv = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", PLACE + script, "sh"]
    done = subprocess.run(
        [*argv, str(directory), str(ROOT), sys.executable],
        capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory


def with_image(changes: Mapping[str, str]) -> Path:
    """A directory with the farm file, but for these of its words, a key, and an image that lets it in and
    knows nothing of who clones it."""
    directory = Path(tempfile.mkdtemp(prefix="fhg-"))  # short for sockets, and QEMU's user passes
    directory.chmod(0o711)
    key = directory / "home" / ".ssh" / "id_rsa"
    key.parent.mkdir(mode=0o700, parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", key], check=True)
    old_image.build(directory, key.with_name("id_rsa.pub").read_text().strip())
    text = SHIPPED
    for shipped, here in changes.items():
        assert shipped in text
        text = text.replace(shipped, here)
    (directory / "gallifrey.yaml").write_text(text)
    return directory


def said(told: Path, name: str) -> dict[str, Any]:
    data = json.loads((told / f"{name}.json").read_text())
    assert isinstance(data, dict)
    return data
