"""The template that ships, built from Debian's packages (or from the cache), booted for real."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.api import Template
from inventory.errors import UsageError
from provision.engine.report import QuietReporter
from provision.guest.seed import SeedData, StaticAddress, new_host_key, write_seed
from provision.operations import templates as golden
from provision.site import Site, open_site
from tests import farm
from tests.unit.sshd_machine import free_port

pytestmark = pytest.mark.system

FARM = """
farm: tpl
templates:
  base: {build: debian-12, size: 4G}
  again: {import: again.qcow2}
vms:
  one: {template: base}
"""
HOSTILE = 'it\'s "quoted" $(touch /pwned) `id` \\n %s'
LIMIT = 300  # seconds; a heavy job beside it slows an emulated boot several times


class Guest:
    """One QEMU process over a throwaway overlay."""

    def __init__(
        self, work: Path, name: str, template: Template, *, key: Path, seed: Path | None, size: str
    ) -> None:
        self.name, self.key = name, key
        self.disk, self.console, self.monitor = (
            work / f"{name}.qcow2",
            work / f"{name}.log",
            work / f"{name}.mon",
        )
        subprocess.run(
            [
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                template.ref,
                str(self.disk),
                size,
            ],
            check=True,
        )
        self.port = free_port()
        drives = ["-drive", f"file={self.disk},if=virtio,cache=unsafe"]
        if seed:
            drives += ["-drive", f"file={seed},if=virtio,format=raw,readonly=on"]
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "pc", "-accel", "tcg", "-cpu", "max", "-m", "512",
             "-display", "none", "-no-user-config", "-nodefaults", *drives, "-device", "virtio-rng-pci",
             "-netdev", f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22",
             "-device", f"virtio-net-pci,netdev=n,romfile=,mac={mac_of(name)}",
             "-serial", f"file:{self.console}", "-monitor", f"unix:{self.monitor},server,nowait"],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def ssh(self, command: str, *, check: bool = True) -> str:
        done = subprocess.run(
            ["ssh", "-F", "none", "-i", str(self.key), "-p", str(self.port), "-o", "BatchMode=yes",
             "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
             "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5", "root@127.0.0.1", command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, done.stderr + self.tail()
        return done.stdout.strip() if done.returncode == 0 else ""

    def tail(self) -> str:
        return self.console.read_text(errors="replace")[-2000:]

    def wait(self) -> None:
        end = time.monotonic() + LIMIT
        while not self.ssh("echo up", check=False):
            assert self.process.poll() is None, (
                f"QEMU ended: {self.console.read_text(errors='replace')[-2000:]}"
            )
            assert time.monotonic() < end, self.console.read_text(errors="replace")[-2000:]
            time.sleep(0.3)

    def host_key(self) -> str:
        scanned = subprocess.run(
            ["ssh-keyscan", "-t", "ed25519,rsa,ecdsa", "-T", "60", "-p", str(self.port), "127.0.0.1"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (line,) = [line for line in scanned.stdout.splitlines() if not line.startswith("#")]
        return " ".join(line.split()[1:])

    def power_button(self) -> None:
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self.monitor))
            monitor.sendall(b"system_powerdown\n")
            self.process.wait(LIMIT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def mac_of(name: str) -> str:
    return f"52:54:00:00:00:0{len(name)}"


def seed_of(name: str, machine_id: str, public: str) -> SeedData:
    with tempfile.TemporaryDirectory() as place:
        host_key, host_key_pub = new_host_key(Runner(), Path(place))
    return SeedData(
        vm=name,
        instance_id=f"tpl-{name}-1",
        hostname=f"host-{name}",
        machine_id=machine_id,
        host_key=host_key,
        host_key_pub=host_key_pub,
        login="root",
        authorized_keys=(public, f"ssh-ed25519 AAAA {HOSTILE}"),
        users={"aleksi": (public,)},
        mac=mac_of(name),
        static=StaticAddress(
            IPv4Address("10.0.2.15"), 24, IPv4Address("10.0.2.2"), (IPv4Address("10.0.2.3"),)
        ),
        domain="example.org",
    )


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tpl-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def site(work: Path) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FARMHAND_STATE_DIR", str(work / "state"))
        patch.setenv("FARMHAND_RUNTIME_DIR", str(work / "run"))
        (work / "farm.yaml").write_text(FARM)
        with open_site(work / "farm.yaml", reporter=QuietReporter()) as opened:
            yield opened


@pytest.fixture(scope="module")
def key(work: Path) -> Path:
    path = work / "key"
    private, public = new_host_key(Runner(), work)
    path.write_text(private)
    path.chmod(0o600)
    (work / "key.pub").write_text(public)
    return path


def test_clones_of_the_built_template_are_themselves(site: Site, work: Path, key: Path) -> None:
    template = golden.ensure_template(site, "base")
    assert template.firstboot == "farmhand"
    (packages,) = [
        note.with_suffix(".packages").read_text()
        for note in golden._images().glob("*.json")
        if template.origin.split()[1] == note.stem
    ]
    assert {"systemd", "openssh-server", "rpm", "git"} <= {
        line.split()[0].partition(":")[0] for line in packages.splitlines()
    }
    seeds = {
        name: seed_of(name, digit * 32, (work / "key.pub").read_text())
        for name, digit in (("a", "a"), ("bb", "b"))
    }
    with contextlib.ExitStack() as stack:
        guests = {}
        for name, seed in seeds.items():
            write_seed(Runner(), seed, work / f"{name}.iso")
            size = "5G" if name == "bb" else "4G"
            guests[name] = Guest(work, name, template, key=key, seed=work / f"{name}.iso", size=size)
            stack.callback(guests[name].end)
        for name, guest in guests.items():
            seed = seeds[name]
            guest.wait()
            assert guest.host_key() == seed.host_key_pub
            facts = guest.ssh(
                "hostname; hostname -f; cat /etc/machine-id; cat /etc/hostname; whoami; "
                "ls /etc/ssh/ssh_host_*_key; ls -d /pwned 2>/dev/null; true"
            ).splitlines()
            assert facts == [
                f"host-{name}", f"host-{name}.example.org", seed.machine_id, f"host-{name}", "root",
                "/etc/ssh/ssh_host_ed25519_key",
            ]  # fmt: skip
            written = guest.ssh("cat /root/.ssh/authorized_keys").splitlines()
            assert written == [*seed.authorized_keys]
            assert guest.ssh(
                "cat /home/aleksi/.ssh/authorized_keys; stat -c %U:%a /home/aleksi/.ssh"
            ) == (f"{seed.users['aleksi'][0]}\naleksi:700")
            assert guest.ssh("systemctl is-system-running --wait") == "running"
            assert (
                guest.ssh("ip -4 -o address show dev eth0 scope global | awk '{print $4}'")
                == "10.0.2.15/24"
            )
            assert guest.ssh("grep -c '^[^:]*:[^*!:]' /etc/shadow; true") == "0"  # nobody has a password
            mib = int(guest.ssh("df --output=size -BM / | tail -n 1").rstrip("M"))
            assert mib > (4600 if name == "bb" else 3600)
        # made ready to be a template of its own, and shut down by the power button
        guests["bb"].ssh("rm /var/lib/farmhand/instance-id; sync")
        guests["bb"].power_button()


def test_an_imported_image_boots_as_itself_without_a_seed(site: Site, work: Path, key: Path) -> None:
    with pytest.raises(UsageError, match="stand alone"):
        farm.template_import(site, "again", work / "bb.qcow2")  # an overlay
    subprocess.run(
        ["qemu-img", "convert", "-O", "qcow2", str(work / "bb.qcow2"), str(work / "again.qcow2")],
        check=True,
    )
    farm.template_import(site, "again")
    template = golden.newest_template(site, "again")
    assert template is not None
    guest = Guest(work, "ccc", template, key=key, seed=None, size="5G")
    try:
        guest.wait()
        machine_id = guest.ssh("cat /etc/machine-id")
        assert len(machine_id) == 32
        assert machine_id != "b" * 32
        assert guest.ssh("cat /etc/ssh/ssh_host_ed25519_key.pub").split()[:2] == guest.host_key().split()
        assert guest.ssh("hostname") == "localhost"
        assert guest.ssh("systemctl is-active systemd-networkd") == "active"
    finally:
        guest.end()
