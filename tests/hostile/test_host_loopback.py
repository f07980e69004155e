"""What a guest with `internet: yes` reaches of the machine that it runs on: nothing of its loopback."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from neighbour import NEEDS_ROOT, UID, squatted

import cli.composition  # noqa: F401 - a farm is loaded
from host.paths import cache_dir
from host.run import Runner
from hypervisors.api import Template
from hypervisors.libvirt import host_loopback
from hypervisors.libvirt.private import qemu_user
from inventory.errors import Conflict, FarmhandError, Text, Unsupported, spelled
from inventory.loader import load
from provision import doctor
from provision.engine.report import QuietReporter
from provision.guest import identity
from provision.member import Member
from provision.power import answers, wait_until_ready
from provision.site import Site
from provision.status import status
from tests import farm
from tests.contract import small_guest
from tests.services.networks import own_network

MIB = 2**20
OUTSIDE = "10.77.0.1"
REFUSED = ("Connection refused", "Operation not permitted")
PROBE = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
for m in MODULES; do insmod /lib/$m.ko 2>/dev/null; done
option() { sed -n "s/.*\\b$1=\\([^ ]*\\).*/\\1/p" /proc/cmdline; }
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
for side in all eth0; do
    echo 1 >/proc/sys/net/ipv4/conf/$side/route_localnet
    echo 0 >/proc/sys/net/ipv4/conf/$side/rp_filter
done
nc -l -p 22 -e echo SSH-GUEST &
for address in 10.0.2.2 127.0.0.1 OUTSIDE; do
    [ $address = 127.0.0.1 ] && ip route add 127.0.0.1 via 10.0.2.2
    echo "$address SAYS $(nc -w 5 $address $(option port) </dev/null 2>&1 | head -c 30)."
done
echo TRIED
sleep 3600
"""


@contextlib.contextmanager
def listening(address: str, port: int = 0, kind: int = socket.SOCK_STREAM) -> Iterator[int]:
    """A service there that says SECRET to whoever comes: its port."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as service:
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        service.bind((address, port))

        def stream() -> None:
            with contextlib.suppress(OSError):
                while True:
                    guest, _ = service.accept()
                    guest.sendall(b"SECRET")
                    guest.close()

        def datagrams() -> None:
            with contextlib.suppress(OSError):
                while asking := service.recvfrom(100)[1]:  # None: it was shut down
                    service.sendto(b"SECRET", asking)

        if kind == socket.SOCK_STREAM:
            service.listen()
        threading.Thread(target=stream if kind == socket.SOCK_STREAM else datagrams, daemon=True).start()
        yield service.getsockname()[1]
        with contextlib.suppress(OSError):
            service.shutdown(socket.SHUT_RDWR)


class _Warned(QuietReporter):
    def __init__(self) -> None:
        self.text = ""

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.text += spelled(text)


class OutFarm:
    """One VM under a private libvirtd, whose guest tries what it reaches, and answers on port 22."""

    def __init__(self, directory: Path, port: int) -> None:
        self.file = directory / "out.yaml"
        self.warned = _Warned()
        kept = small_guest.build(cache_dir())
        init = PROBE.replace("MODULES", " ".join(small_guest.MODULES)).replace("OUTSIDE", OUTSIDE)
        probe = small_guest.newc([("probe", 0o100755, init.encode())])
        kernel, initrd = directory / "vmlinuz", directory / "initrd"
        shutil.copy(kept.kernel, kernel)
        initrd.write_bytes(kept.initrd.read_bytes() + gzip.compress(probe))
        cmdline = f"console=ttyS0 quiet panic=-1 rdinit=/probe port={port}"
        self._boot = f"{{kernel: {kernel}, initrd: {initrd}, cmdline: '{cmdline}'}}"
        (self.file.parent / "key").touch(0o600)  # as for an image that nobody tells whom to let in
        self.declare("closed")
        image = directory / "base.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(MIB)], check=True)
        template = Template(
            name="base", generation=1, ref="", size=MIB, sha256="", created=datetime.now(UTC),
            origin="nothing", firstboot="none",
        )  # fmt: skip
        with self.site() as site:
            site.prepare()
            site.disks("here").seal(image, template)
            farm.clone_farm(site, start=False)

    def declare(self, loopback: str, uri: str = "private") -> None:
        self.file.write_text(
            f"farm: out\nhosts: {{here: {{driver: kvm, uri: '{uri}'}}}}\n"
            f"network: {{internet: yes, host_loopback: {loopback}}}\n"
            f"templates: {{base: {{build: debian-12, size: 1M, boot: {self._boot}}}}}\n"
            "ssh: {key: key}\nvms: {prod: {memory: 192M}}\n"
        )

    def site(self) -> Site:
        return Site(load(self.file), reporter=self.warned)

    def tried(self) -> dict[str, str]:
        """Start it: what was said to it, by the address that it asked."""
        with self.site() as site:
            farm.start(site, wait=False)
            log = identity.console_log(site.paths, "out-prod")
            limit = time.monotonic() + 300
            while "TRIED" not in (text := log.read_text(errors="replace")):
                assert time.monotonic() < limit, text
                time.sleep(0.1)
            with socket.create_connection(Member(site, "prod").address(), 30) as forwarded:
                assert forwarded.recv(20).startswith(b"SSH-GUEST"), "what comes in is answered"
            farm.stop(site, force=True)
        return dict(re.findall(r"(\S+) SAYS ([^\r\n]*)\.", text))


@NEEDS_ROOT
def test_a_guest_reaches_the_outside_and_nothing_of_the_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is a stranger on its port taken for it, or in its way."""
    place = Path(tempfile.mkdtemp(prefix="fh-"))  # short for sockets, and QEMU's user passes
    place.chmod(0o711)
    for kind in ("STATE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{kind}_DIR", str(place / kind[0].lower()))
    with own_network(), listening("127.0.0.1") as port, listening(OUTSIDE, port):
        out = OutFarm(place, port)
        try:
            out.declare("reachable")
            said = out.tried()
            assert said == dict.fromkeys(("10.0.2.2", "127.0.0.1", OUTSIDE), "SECRET")
            assert _doctored(out).ok, "it is what was asked for"
            out.declare("closed")
            said = out.tried()
            assert said.pop(OUTSIDE) == "SECRET"
            assert "SECRET" not in str(said), said
            assert sorted(said) == ["10.0.2.2", "127.0.0.1"]
            closed = "its guests are kept off this machine's loopback, by farmhand's nftables rules"
            assert _doctored(out).text == closed
            with out.site() as site:
                its = Member(site, "prod").address()[1]
                with squatted(its) as pid:
                    assert f"a stranger holds port {its}" in spelled(status(site).vms[0].error)
                    farm.start(site, wait=False)
                moved = Member(site, "prod").address()[1]
                assert moved != its
                assert f"port {its} is taken by pid {pid} of nobody (python3)" in out.warned.text
                lost = site.allocator.allocate("prod", move_port=True).ssh_port
                with squatted(lost):  # recorded for it, by whatever mistake
                    assert Member(site, "prod").address()[1] == moved, "it is where it runs"
                farm.stop(site, force=True)
                with squatted(lost):  # while it is off, nobody else is taken for it
                    assert not answers(Member(site, "prod"))
                    with pytest.raises(Conflict, match=f"a stranger holds port {lost} of this"):
                        wait_until_ready(Member(site, "prod"), since=float("-inf"))
                farm.start(site, wait=False)
                subprocess.run(["nft", "flush", "ruleset"], check=True)
                found = _doctored(out)
                assert not found.ok
                assert "prod may reach this machine's loopback" in found.text
        finally:
            with out.site() as site:
                farm.destroy(site)
    shutil.rmtree(place)


def _doctored(out: OutFarm) -> doctor.Check:
    (found,) = (one for one in doctor.examine(out.file).checks if one.name == "loopback, host here")
    return found


_ASKS = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
kind = getattr(socket, sys.argv[2])
address = sys.argv[4]
with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as asking:
    asking.settimeout(5)
    try:
        asking.connect((address, int(sys.argv[3])))
        if kind == socket.SOCK_DGRAM:
            asking.send(b"?")
        print(asking.recv(20).decode())
    except OSError as error:
        print(error.strerror)
"""


@NEEDS_ROOT
def test_only_qemu_is_kept_off_and_not_from_the_name_server() -> None:
    def ask(uid: int, kind: str, port: int, address: str) -> str:
        argv = [sys.executable, "-I", "-c", _ASKS, str(uid), kind, str(port), address]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    with own_network():
        host_loopback.close(Runner(), qemu_user())
        host_loopback.close(Runner(), qemu_user())  # as each start does
        assert host_loopback.is_closed(Runner())
        for kind, at in itertools.product((socket.SOCK_STREAM, socket.SOCK_DGRAM), ("127.0.0.1", "::1")):
            with listening(at, kind=kind) as port, listening(at, 53, kind):
                assert ask(qemu_user(), kind.name, port, at) in REFUSED
                assert ask(qemu_user(), kind.name, 53, at) == "SECRET"
                assert ask(UID, kind.name, port, at) == "SECRET"


@NEEDS_ROOT
def test_somebody_elses_table_of_our_name_is_left_alone() -> None:
    theirs = f"table inet {host_loopback.TABLE} {{\nchain theirs {{\n}}\n}}\n"
    with own_network():
        subprocess.run(["nft", "-f", "-"], input=theirs.encode(), check=True)
        before = subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True).stdout
        with pytest.raises(Conflict, match="is not farmhand's: it is left as it is"):
            host_loopback.close(Runner(), qemu_user())
        after = subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True).stdout
        assert before == after


def _as_stranger(call: Callable[[], object]) -> str:
    """What is refused to another user, with its remedy: in a process of theirs."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(UID)
            call()
        except FarmhandError as error:
            os.write(write, f"{error.message}; {spelled(error.remedy)}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    os.waitpid(pid, 0)
    return text


@NEEDS_ROOT
def test_where_nothing_keeps_them_off_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "state"))
    file = tmp_path / "out.yaml"

    def refused(uri: str, how: Callable[[Callable[[], object]], str]) -> str:
        file.write_text(
            f"farm: out\nhosts: {{here: {{driver: kvm, uri: '{uri}'}}}}\nnetwork: {{internet: yes}}\n"
            "templates: {base: {build: debian-12}}\nvms: {prod: {memory: 192M}}\n"
        )
        with Site(load(file), reporter=QuietReporter(), plan=True) as site:
            text = how(site.opened("here").check_loopback)
        assert "network: {host_loopback: reachable}" in text
        return text

    def here(call: Callable[[], object]) -> str:
        with pytest.raises(Unsupported) as caught:
            call()
        return f"{caught.value.message}; {spelled(caught.value.remedy)}"

    assert "only root can keep guests with 'internet' off" in refused("private", _as_stranger)
    assert "where QEMU is run by qemu:///system" in refused("qemu:///system", here)
