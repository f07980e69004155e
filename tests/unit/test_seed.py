"""Seeds read back with the tools that others read them with."""

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from cloud_init import judged

from host.files import sweep
from host.paths import FarmPaths
from host.run import Runner, which
from inventory.errors import UsageError
from provision.guest.identity import sweep_seeds
from provision.guest.seed import SeedData, StaticAddress, new_host_key, nocloud, own_lines, write_seed

HOSTILE = 'ssh-ed25519 AAAAC3Nz o\'hara "$(reboot)" `id` \\n %s # : - {x} & *y ! 日本 😀'


def data(**changes: object) -> SeedData:
    with TemporaryDirectory() as place:
        private, public = new_host_key(Runner(), Path(place))
    base = SeedData(
        vm="prod",
        instance_id="kata-prod-1",
        hostname="ab-kata-prod",
        machine_id="0123456789abcdef" * 2,
        host_key=private,
        host_key_pub=public,
        login="root",
        authorized_keys=("ssh-ed25519 AAAA first", HOSTILE),
        users={"aleksi": ("ssh-ed25519 AAAA aleksi",)},
        mac="52:54:00:12:34:56",
        static=StaticAddress(
            IPv4Address("10.0.0.7"), 24, IPv4Address("10.0.0.1"), (IPv4Address("9.9.9.9"),)
        ),
        domain="example.org",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def read_back(iso: Path, name: str) -> bytes:
    return subprocess.run(
        ["isoinfo", "-x", f"/{name}", "-i", str(iso)], check=True, capture_output=True
    ).stdout


def test_cloud_init_reads_what_was_meant(tmp_path: Path) -> None:
    seed, iso = data(), tmp_path / "s.iso"
    write_seed(Runner(), seed, iso)
    label = subprocess.run(["isoinfo", "-d", "-i", str(iso)], check=True, capture_output=True, text=True)
    assert "Volume id: CIDATA" in label.stdout
    user = read_back(iso, "user-data")
    assert user.startswith(b"#cloud-config\n")
    config = yaml.safe_load(user)
    assert config["users"][0] == "default"
    assert config["users"][1]["ssh_authorized_keys"] == ["ssh-ed25519 AAAA first", HOSTILE]
    assert config["users"][2]["name"] == "aleksi"
    assert config["ssh_keys"]["ed25519_private"] == seed.host_key
    assert config["fqdn"] == "ab-kata-prod.example.org"
    assert config["ssh_pwauth"] is False
    meta = yaml.safe_load(read_back(iso, "meta-data"))
    assert meta == {"instance-id": "kata-prod-1", "local-hostname": "ab-kata-prod.example.org"}


def test_each_of_cloud_inits_renderers_has_the_route_and_the_search_domain() -> None:
    told = judged(nocloud(data()))
    assert "    gateway 10.0.0.1\n" in told["ifupdown"]
    assert "route add" not in told["ifupdown"]  # net-tools is not in newer images
    (nic,) = yaml.safe_load(told["netplan"])["network"]["ethernets"].values()
    assert nic["match"] == {"macaddress": "52:54:00:12:34:56"}
    assert (nic["addresses"], nic["gateway4"]) == (["10.0.0.7/24"], "10.0.0.1")
    assert nic["nameservers"] == {"addresses": ["9.9.9.9"], "search": ["example.org"]}
    assert {"Gateway=10.0.0.1", "Domains=example.org", "DNS=9.9.9.9"} <= set(told["networkd"].split())
    assert "dns-search example.org" in told["ifupdown"]


def test_the_search_domain_with_dhcp_too() -> None:
    told = judged(nocloud(data(static=None)))
    assert "inet dhcp" in told["ifupdown"]  # whose dhclient takes the domain that DHCP tells
    (nic,) = yaml.safe_load(told["netplan"])["network"]["ethernets"].values()
    assert nic["nameservers"]["search"] == ["example.org"]
    assert {"DHCP=ipv4", "UseDomains=True"} <= set(told["networkd"].split())
    assert "search" not in judged(nocloud(data(static=None, domain=None)))["netplan"]


def test_the_images_own_user_stays_and_sudo_is_for_whom_it_is_meant() -> None:
    every = "ALL=(ALL) NOPASSWD:ALL"
    users = judged(nocloud(data(sudo=("aleksi",))))["users"]
    assert users["debian"]["sudo"] == [every] and users["debian"]["lock_passwd"]
    assert users["aleksi"]["sudo"] == every
    assert "sudo" not in judged(nocloud(data()))["users"]["aleksi"]
    users = judged(nocloud(data(login="debian")))["users"]
    assert users["debian"]["sudo"] == [every], "a login of its name is that user"
    assert users["debian"]["ssh_authorized_keys"] == ["ssh-ed25519 AAAA first", HOSTILE]
    assert "sudo=aleksi\n" in own_lines(data(sudo=("aleksi",))).decode()


def test_dhcp_asks_as_its_mac(tmp_path: Path) -> None:
    iso = tmp_path / "s.iso"
    write_seed(Runner(), data(static=None), iso)
    (nic,) = json.loads(read_back(iso, "network-config"))["ethernets"].values()
    assert nic["dhcp4"] is True
    assert nic["dhcp-identifier"] == "mac"


def test_our_first_boot_finds_its_lines_at_the_very_beginning(tmp_path: Path) -> None:
    seed, iso = data(), tmp_path / "s.iso"
    write_seed(Runner(), seed, iso)
    lines = iso.read_bytes()[: 32 * 1024].rstrip(b"\0").decode().splitlines()
    assert lines[0] == "farmhand-seed 1"
    assert lines[-1] == "end"
    assert f"key={HOSTILE}" in lines
    assert "address=10.0.0.7/24" in lines
    assert read_back(iso, "farmhand.env") == own_lines(seed)


def test_many_keys_are_pointed_at(tmp_path: Path) -> None:
    seed, iso = (
        data(authorized_keys=tuple(f"ssh-rsa {'A' * 700} {n}" for n in range(100))),
        tmp_path / "s.iso",
    )
    write_seed(Runner(), seed, iso)
    assert iso.read_bytes().startswith(b"farmhand-seed 1\nsee=farmhand.env\nend\n")
    assert read_back(iso, "farmhand.env") == own_lines(seed)


def test_same_data_same_bytes_and_private(tmp_path: Path) -> None:
    seed = data()
    first, second = tmp_path / "a.iso", tmp_path / "b.iso"
    write_seed(Runner(), seed, first)
    write_seed(Runner(), seed, second)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.iso", "b.iso"]


@pytest.mark.parametrize(
    "changes",
    [
        {"hostname": "prod\nlogin=evil"},
        {"hostname": "-prod"},
        {"machine_id": "xyz"},
        {"mac": "52:54:00:12:34"},
        {"instance_id": ""},
        {"authorized_keys": ("ssh-ed25519 A\nkey=ssh-ed25519 B",)},
        {"authorized_keys": ("ssh-ed25519 A\u2028B",)},
        {"users": {"../root": ()}},
        {"users": {"-x": ()}},
        {"domain": "a b"},
        {"host_key": "one\ntwo\x00"},
    ],
)
def test_values_that_could_be_more_than_one_line_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="VM prod"):
        data(**changes)


def test_host_keys_are_openssh_s_own_kind(tmp_path: Path) -> None:
    private, public = new_host_key(Runner(), tmp_path)
    assert not list(tmp_path.iterdir())
    with subprocess.Popen(["true"]) as gone:
        pass
    left = tmp_path / f".key.{gone.pid}.7"  # of one that was killed meanwhile
    left.mkdir()
    (left / "key").touch()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())
    key = tmp_path / "key"
    key.write_text(private)
    key.chmod(0o600)
    told = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(key)], check=True, capture_output=True, text=True
    )
    assert told.stdout.split()[:2] == public.split()[:2]
    assert private not in repr(data(host_key=private))


HELD = """\
#!/bin/sh
echo $$ >"{here}/begun.new" && mv "{here}/begun.new" "{here}/begun"
while ! [ -e "{here}/go" ]; do sleep 0.01; done
exec {program} "$@"
"""


@pytest.mark.parametrize(
    ("program", "making"),
    [
        ("ssh-keygen", "new_host_key(Runner(), out)"),
        ("genisoimage", "write_iso(Runner(), {'meta-data': b'x'}, out / '.kata-prod.iso.9.iso')"),
    ],
)
def test_a_command_that_outlives_us_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, making: str
) -> None:
    """Killed, we are swept up after before the command has come to writing anything."""
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path))
    paths, tools = FarmPaths("kata"), tmp_path / "bin"
    out = paths.seeds
    out.mkdir(parents=True)
    tools.mkdir()
    (tools / program).write_text(HELD.format(here=tmp_path, program=which(program)))
    (tools / program).chmod(0o755)
    text = (
        "from pathlib import Path; from host.run import Runner\n"
        "from hypervisors.disks.images import write_iso; from provision.guest.seed import new_host_key\n"
        f"out = Path({str(out)!r}); {making}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", text], cwd=Path(__file__).parents[2],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
    ) as maker:  # fmt: skip
        while not (tmp_path / "begun").exists():
            assert maker.poll() is None
            time.sleep(0.01)
        maker.kill()
    command = os.pidfd_open(int((tmp_path / "begun").read_text()))
    sweep(out)
    sweep_seeds(paths, {"kata-prod"})
    assert not list(out.iterdir())
    (tmp_path / "go").touch()
    select.select([command], [], [])
    os.close(command)
    assert not list(out.iterdir())
