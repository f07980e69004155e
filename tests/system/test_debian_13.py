"""Another distribution's image, end to end: Debian 13 with cloud-init and netplan, two VMs on a bridge.

A quarter of an hour where the guests are emulated, so ./invoke test leaves it out:
./invoke test --only tests/system/test_debian_13.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from debian_13 import image

from host.paths import cache_dir
from tests.services.networks import place, within

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]

FARM = """\
farm: deb13
hosts: {here: {driver: kvm, accelerator: ACCELERATOR}}
network:
  mode: bridge
  bridge: br0
  subnet: 10.77.0.0/24
  gateway: 10.77.0.1
  nameservers: [10.77.0.1]
  domain: try.example
templates: {trixie: {import: IMAGE}}
ssh:
  user: debian
  users: {aleksi: KEY, guest: KEY}
  sudo: [aleksi]
  ready_timeout: 15m
vms:
  one: {memory: 768M, address: 10.77.0.11, disk: 5G}
  two: {memory: 768M, address: 10.77.0.12}
cycle:
  steps:
    - {name: reset, reset: one}
    - {name: who, vm: one, root: yes, run: 'id -u; echo "$HOME"; pwd'}
"""


class Machines:
    """The farm's two, in a network of their own."""

    def __init__(self, directory: Path, network: str) -> None:
        self.directory = directory
        self._network = network
        self._environment = {
            **{k: v for k, v in os.environ.items() if k != "FARMHAND_FARM"},
            "FARMHAND_STATE_DIR": str(directory / "s"),
            "FARMHAND_RUNTIME_DIR": str(directory / "r"),
        }

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*within(self._network), sys.executable, "-P", ROOT / "cli" / "start.py",
             "--search-root", str(ROOT), *words, "--farm", str(self.directory / "farm.yaml")],
            env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def json(self, *words: str) -> dict[str, Any]:
        done = self(*words, "--json")
        assert done.returncode == 0, done.stderr[-6000:]
        data = json.loads(done.stdout)
        assert isinstance(data, dict)
        return data

    def inside(self, vm: str, script: str) -> list[str]:
        """What a script prints in the VM, line by line."""
        done = self("ssh", "--vm", vm, "--command", script)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        return done.stdout.splitlines()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    directory = Path(tempfile.mkdtemp(prefix="fh13"))
    directory.chmod(0o711)  # QEMU runs as another user and passes through
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "key"], check=True)
    text = FARM.replace("IMAGE", str(image(cache_dir()))).replace("KEY", str(directory / "key.pub"))
    text = text.replace("ACCELERATOR", os.environ.get("FARMHAND_TEST_ACCELERATOR", "tcg"))
    (directory / "farm.yaml").write_text(text)
    with place() as network:
        made = Machines(directory, network)
        try:
            yield made
        finally:
            made("destroy", "--all", "--purge", "--yes")
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def cloned(machines: Machines) -> str:
    """What was said while they were made."""
    done = machines("clone-farm")
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


def test_both_are_ready_when_cloud_init_is_through_without_errors(
    machines: Machines, cloned: str
) -> None:
    assert "cloud-init failed" not in cloned, cloned
    for vm in ("one", "two"):
        state = "cloud-init status; echo $?; cat /run/cloud-init/result.json"
        said = machines.inside(vm, state)
        assert said[:2] == ["status: done", "0"], said


def test_each_has_its_name_its_address_and_a_way_out(machines: Machines, cloned: str) -> None:
    for vm, number in (("one", 11), ("two", 12)):
        assert machines.inside(vm, "hostname -f") == [f"{vm}.try.example"]
        (route,) = machines.inside(vm, "ip -4 route show default")
        assert route.startswith("default via 10.77.0.1 "), route
        assert f"inet 10.77.0.{number}/24 " in "\n".join(machines.inside(vm, "ip -4 address"))
        assert "search try.example" in machines.inside(vm, "cat /etc/resolv.conf")
    machines.inside("one", "sudo -n ping -c 1 -W 20 10.77.0.12")
    ids = {vm: machines.inside(vm, "cat /etc/machine-id") for vm in ("one", "two")}
    assert ids["one"] != ids["two"]


def test_the_images_own_user_keeps_its_sudo_and_others_have_what_the_file_says(
    machines: Machines, cloned: str
) -> None:
    assert machines.inside("one", "sudo -n id -u") == ["0"]
    as_other = "sudo -n -u {} sudo -n id -u"
    assert machines.inside("one", as_other.format("aleksi")) == ["0"]
    assert machines("ssh", "--vm", "one", "--command", as_other.format("guest")).returncode == 1


def test_the_disk_has_grown(machines: Machines, cloned: str) -> None:
    (size,) = machines.inside("one", "df --output=size -B1M / | tail -1")
    assert int(size) > 4600  # of 5G, where the template has 4G


def test_a_second_start_is_the_same_machine(machines: Machines, cloned: str) -> None:
    before = machines.inside("two", "cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id")
    machines.json("stop", "--vm", "two")
    machines.json("start", "--vm", "two")
    after = machines.inside("two", "cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id")
    assert after[0] == before[0] and after[1] != before[1]
    (route,) = machines.inside("two", "ip -4 route show default")
    assert route.startswith("default via 10.77.0.1 "), route


def test_a_cycle_resets_it_and_runs_as_root_by_sudo(machines: Machines, cloned: str) -> None:
    machines.inside("one", "touch /home/debian/left; sync")
    key = machines.inside("one", "cat /etc/ssh/ssh_host_ed25519_key.pub")
    done = machines.json("cycle")
    (log,) = Path(done["record"]).parent.glob("**/*who*.log")
    assert log.read_text().startswith("0\n/home/debian\n/home/debian\n")
    assert machines.inside("one", "test -e /home/debian/left || echo gone") == ["gone"]
    assert machines.inside("one", "cat /etc/ssh/ssh_host_ed25519_key.pub") == key
