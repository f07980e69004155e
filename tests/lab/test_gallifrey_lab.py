"""The XiVO farm as it ships, end to end on a host that can be all of it: its VMs' disks on LVM in the volume
group ``all``, full copies, under the system's libvirtd; bridge, BIND, dhcpd, nginx and shorewall; and
somebody outside who comes in through the NAT port and the proxy. It takes a spare disk, and gives it back
empty."""

# ruff: noqa: E501 - shell scripts as an admin would write them

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.gallifrey import inside, said, with_image

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]

_SPARE = "/dev/vdc"

# What the lab is too small for: 4 GiB of memory for each, disks of 30 GiB (a full copy is read to its end).
# And too slow: this image says nothing while it boots, and QEMU emulated within QEMU may need ten minutes.
_SMALLER = {
    "\nssh:\n": "\nssh:\n  ready_timeout: 15m\n",
    "memory: 4G": "memory: 256M", "memory: 1G": "memory: 128M", "disk: 30G": "disk: 128M",
    "gallifrey.img\n": "gallifrey.img\n    size: 64M\n",
}  # fmt: skip

END_TO_END = r"""
mount -t tmpfs farmhand /srv
mkdir /srv/images
mv "$dir/gallifrey.img" /srv/images/
export HOME="$dir/home"
# What Debian's libvirt-daemon-system would do: QEMU's user, a libvirtd that lets root in.
getent group kvm >/dev/null || groupadd -r kvm
getent passwd libvirt-qemu >/dev/null || {
    groupadd -g 64055 libvirt-qemu
    useradd -u 64055 -g kvm -G libvirt-qemu -M -d /var/lib/libvirt -s /usr/sbin/nologin libvirt-qemu
}
mkdir -p /etc/libvirt /var/log/libvirt
printf 'auth_unix_rw = "none"\nlog_outputs = "3:file:%s/libvirtd.log"\n' "$dir" >/etc/libvirt/libvirtd.conf
more="/run/virtlogd.pid /run/libvirtd.pid /run/libvirt/qemu/xivo-gallifrey.pid /run/libvirt/qemu/xivo-gallifrey-dev.pid"
virtlogd -d -p /run/virtlogd.pid
libvirtd -d -p /run/libvirtd.pid
echo 1 >/proc/sys/net/ipv4/ip_forward
ip netns add client
ip link set outside netns client
ip -n client addr add 192.0.2.1/24 dev outside
ip -n client link set outside up
from_outside() { # name, command
    name=$1; shift
    ip netns exec client "$@" >"$dir/$name" 2>"$dir/$name.err" || echo "exit $?" >>"$dir/$name"
}
through_nat() {
    from_outside "$1" ssh -F none -i "$HOME/.ssh/id_rsa" -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        -o LogLevel=ERROR -p 22006 root@192.0.2.7 'ip -4 -o addr show dev eth0'
}
through_proxy() { # name, site
    from_outside "$1" "$python" -c 'import sys, urllib.request as u
print(u.urlopen(u.Request("http://192.0.2.7/", headers={"Host": sys.argv[1]}), timeout=60).read().decode())' "$2"
}
verify() { # name. On a busy host an emulated guest may take longer to answer than a question is waited for.
    for try in 1 2 3 4 5; do
        run "$1" network-verify
        [ "$(cat "$dir/$1.status")" != 0 ] || break
    done
}
there() {
    virsh -q -c qemu:///system list --all --name >"$dir/$1.machines"
    lvs --noheadings -o lv_name all >"$dir/$1.volumes"
    iptables -t nat -S >"$dir/$1.nat"
    grep -rl 'farmhand xivo\|gallifrey' /etc/bind /etc/dhcp /etc/nginx /etc/shorewall /etc/hosts /var/lib/bind >"$dir/$1.files" || :
}
on_disk='dd if=/dev/vda bs=1M skip=100 count=1 2>/dev/null | head -c 4 | tr "\0" .'
there before
run plan clone-farm --plan
run clone clone-farm
run again clone-farm
run apply network-apply --no-verify
verify verify
there made
through_nat nat
through_proxy proxy gallifrey.dachary.org
through_proxy proxy-dev gallifrey-dev.dachary.org
log_in mark gallifrey-dev 'printf MARK | dd of=/dev/vda bs=1M seek=100 conv=fsync 2>/dev/null'
log_in marked gallifrey-dev "$on_disk"
run reset reset --vm gallifrey-dev
log_in clean gallifrey-dev "$on_disk"
verify verified
through_nat nat-again
run gone destroy --all --purge --yes
there gone
ls -A "$dir/state/farms" >"$dir/farms" 2>/dev/null || :
"""


@pytest.fixture(scope="module")
def told() -> Iterator[Path]:
    directory = with_image(_SMALLER)
    subprocess.run(["vgcreate", "-qq", "-y", "all", _SPARE], check=True)
    try:
        yield inside(directory, END_TO_END, timeout=3300)
    finally:
        subprocess.run(["vgremove", "-qq", "-y", "-ff", "all"], check=True)
        subprocess.run(["pvremove", "-qq", "-y", _SPARE], check=True)
        shutil.rmtree(directory)


def well(told: Path, *names: str) -> None:
    """These commands succeeded."""
    for name in names:
        assert (told / f"{name}.status").read_text() == "0\n", (told / f"{name}.err").read_text()[-3000:]


def test_one_command_makes_the_farm_and_the_plan_was_right(told: Path) -> None:
    well(told, "plan", "clone", "again")
    assert said(told, "plan")["actions"] == said(told, "clone")["actions"]
    assert said(told, "again")["changed"] is False
    assert set((told / "made.machines").read_text().split()) == {"xivo-gallifrey", "xivo-gallifrey-dev"}
    assert len((told / "made.volumes").read_text().split()) >= 2


def test_every_service_answers_for_vms_that_run(told: Path) -> None:
    well(told, "apply", "verify")
    assert said(told, "apply")["changed"] is False, "clone-farm has done it"
    answers = said(told, "verify")["answers"]
    assert all(answer["ok"] for answer in answers), [a for a in answers if not a["ok"]]
    asked = {(answer["service"], answer["vm"]) for answer in answers}
    for service in ("bind", "dhcpd", "hosts", "nginx"):
        assert {(service, "gallifrey"), (service, "gallifrey-dev")} <= asked
    assert ("shorewall", "gallifrey-dev") in asked


def test_somebody_outside_comes_in_through_the_nat_port_and_the_proxy(told: Path) -> None:
    for name in ("nat", "nat-again"):
        assert "inet 10.10.60.6/24" in (told / name).read_text(), (told / f"{name}.err").read_text()
    assert "52:54:86:b3:3f:10" in (told / "proxy-dev").read_text(), (told / "proxy-dev.err").read_text()
    other = (told / "proxy").read_text()
    assert "the web server of 52:54:00:" in other, (told / "proxy.err").read_text()


def test_a_reset_is_the_clean_disk_and_the_services_know_it(told: Path) -> None:
    well(told, "mark", "marked", "reset", "clean", "verified")
    assert (told / "marked.out").read_text() == "MARK"
    assert (told / "clean.out").read_text() == "...."


def test_destroyed_nothing_of_it_is_anywhere(told: Path) -> None:
    well(told, "gone")
    said_then = (told / "gone.err").read_text()
    for what in ("machines", "volumes", "nat", "files"):
        assert (told / f"gone.{what}").read_text() == (told / f"before.{what}").read_text(), said_then
    assert (
        (told / "gone.machines").read_text().split() == (told / "gone.volumes").read_text().split() == []
    )
    assert (told / "made.files").read_text(), "there was something"
    assert (told / "farms").read_text() == ""
