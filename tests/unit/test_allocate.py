"""What VMs are given: unique, stable, recorded; by many processes at once."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
import sqlite3
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

import cli.composition  # noqa: F401 - in processes of its own too
from host.paths import FarmPaths
from inventory.errors import Conflict, NotFound, WrongState
from inventory.model import Farm
from inventory.validation import validated
from provision.allocate import PORTS, Allocator, lock_file_of
from provision.lockfile import LockFile


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "state"))


def farm_of(name: str = "kata", vms: dict[str, Any] | None = None, **more: Any) -> Farm:
    (FarmPaths(name).root).mkdir(parents=True, exist_ok=True)
    return validated({"farm": name, "vms": vms or {"dev2": {}, "prod": {}}, **more})


def bridge(subnet: str = "10.10.60.0/24", **more: Any) -> dict[str, Any]:
    return {"mode": "bridge", "bridge": "br0", "subnet": subnet, **more}


def test_mac_is_derived_and_in_the_drivers_range(tmp_path: Path) -> None:
    lock = tmp_path / "farm.lock"
    first = Allocator(farm_of(), lock).allocate("prod")
    assert first.mac.startswith("52:54:00:")
    lock.unlink()
    assert Allocator(farm_of(), lock).allocate("prod").mac == first.mac
    xen = farm_of("xen", hosts={"dom0": {"driver": "xen", "uri": "xen:///system"}})
    assert Allocator(xen, tmp_path / "xen.lock").allocate("prod").mac.startswith("00:16:3e:")
    assert Allocator(farm_of("other"), tmp_path / "o.lock").peek("prod").mac != first.mac


def test_a_mac_that_would_collide_is_passed_over(tmp_path: Path) -> None:
    derived = Allocator(farm_of(), tmp_path / "a.lock").peek("prod").mac
    taken = farm_of(vms={"dev2": {"mac": derived}, "prod": {}})
    got = Allocator(taken, tmp_path / "b.lock").allocate("prod")
    assert got.mac != derived
    assert got.mac.startswith("52:54:00:")


def test_addresses_skip_what_is_not_free(tmp_path: Path) -> None:
    farm = farm_of(
        vms={"a": {}, "b": {"address": "10.0.0.4"}, "c": {}, "d": {}},
        network=bridge(
            "10.0.0.0/29", gateway="10.0.0.1", nameservers=["10.0.0.2"], reserved=["10.0.0.5-10.0.0.5"]
        ),
    )
    allocator = Allocator(farm, tmp_path / "lock")
    assert allocator.allocate("a").address == IPv4Address("10.0.0.3")
    assert allocator.allocate("b").address == IPv4Address("10.0.0.4")
    assert allocator.allocate("c").address == IPv4Address("10.0.0.6")
    with pytest.raises(NotFound, match="no address is left for d"):
        allocator.allocate("d")
    assert allocator.allocate("a").address == IPv4Address("10.0.0.3"), "stable"


def test_an_address_rests_until_its_lease_ends_before_another_vm_has_it(tmp_path: Path) -> None:
    network = bridge("10.0.0.0/30", addressing="dhcp", lease_time=600)
    farm = farm_of(vms={"a": {}, "b": {}, "c": {}}, network=network)
    lock = tmp_path / "lock"
    allocator = Allocator(farm, lock)
    first, second = IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2")
    assert (allocator.allocate("a").address, allocator.allocate("b").address) == (first, second)
    before = datetime.now(UTC)
    allocator.release("b", "a")
    with pytest.raises(NotFound, match="2 resting until leases of VMs that had them end"):
        allocator.allocate("c")
    resting = json.loads(lock.read_text())["resting"]
    assert {address: one["vm"] for address, one in resting.items()} == {
        str(first): "a",
        str(second): "b",
    }
    ends = datetime.fromisoformat(resting[str(first)]["until"])
    assert timedelta(seconds=598) < ends - before < timedelta(seconds=700)
    assert allocator.allocate("b").address == second, "its own"
    assert list(json.loads(lock.read_text())["resting"]) == [str(first)]
    data = json.loads(lock.read_text())
    data["resting"][str(first)]["until"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    lock.write_text(json.dumps(data))
    assert allocator.allocate("c").address == first


def test_a_vm_gets_its_own_address_back_for_ever(tmp_path: Path) -> None:
    farm = farm_of(vms={"a": {}, "b": {}}, network=bridge("10.0.0.0/30", addressing="dhcp"))
    allocator = Allocator(farm, tmp_path / "lock")
    first = allocator.allocate_all(["a", "b"])
    for _ in range(9):
        allocator.release("a", "b")
        assert allocator.allocate_all(["b", "a"]) == first


def test_an_address_that_nobody_leases_needs_no_rest(tmp_path: Path) -> None:
    vms: dict[str, Any] = {f"vm{n}": {} for n in range(9)}
    allocator = Allocator(farm_of(vms=vms, network=bridge("10.10.60.0/30")), tmp_path / "lock")
    for vm in vms:
        assert allocator.allocate(vm).address == IPv4Address("10.10.60.1")
        allocator.release(vm)


def test_what_a_machine_tells_counts_for_more_than_what_is_recorded(tmp_path: Path) -> None:
    farm = farm_of(vms={"a": {}, "b": {}, "c": {}}, network=bridge("10.0.0.0/29"))
    allocator = Allocator(farm, tmp_path / "lock")
    first, second = IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2")
    assert allocator.allocate_all(["a", "b"])["b"].address == second
    told = {"c": first}
    assert allocator.peek_all(["c"], told=told)["c"].address == first
    assert allocator.recorded()["a"].address == first, "a look records nothing"
    assert allocator.allocate("c", told=told).address == first
    assert allocator.recorded()["c"].address == first
    assert allocator.recorded()["a"].address not in (first, second), "recorded with c's, and isn't there"
    assert allocator.recorded()["b"].address == second
    outside = {"a": IPv4Address("192.0.2.1")}
    assert allocator.allocate("a", told=outside).address in farm.network.subnet


def test_a_declared_value_held_by_another_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    got = Allocator(farm_of(network=bridge()), lock).allocate("dev2")
    farm = farm_of(vms={"dev2": {}, "prod": {"address": str(got.address)}}, network=bridge())
    with pytest.raises(Conflict, match="which dev2 was given before"):
        Allocator(farm, lock).allocate("prod")
    assert Allocator(farm, lock).allocate("dev2").address != got.address
    assert list(json.loads(lock.read_text())["resting"]) == [str(got.address)], "it may run there still"
    assert Allocator(farm, lock).allocate("prod").address == got.address


def test_ports_are_free_stable_and_differ_between_farms(tmp_path: Path) -> None:
    one, two = Allocator(farm_of("one"), tmp_path / "1"), Allocator(farm_of("two"), tmp_path / "2")
    first = one.allocate("prod").ssh_port
    assert first in PORTS
    with socket.create_server(("127.0.0.1", first)):
        assert one.allocate("prod").ssh_port == first, "its own VM listens there"
        moved = one.allocate("prod", move_port=True).ssh_port
        assert moved not in (first, 0)
    ports = {moved, *(two.allocate(vm).ssh_port for vm in ("dev2", "prod"))}
    assert len(ports) == 3
    (tmp_path / "1").unlink()
    assert one.allocate("prod").ssh_port == moved, "the host's claims know it still"


def test_a_farm_copied_under_another_name_gets_its_own(tmp_path: Path) -> None:
    """With its lock file, as it is in version control."""
    first = Allocator(farm_of("one"), tmp_path / "1").allocate("prod")
    shutil.copy(tmp_path / "1", tmp_path / "2")
    two = Allocator(farm_of("two"), tmp_path / "2")
    got = two.allocate("prod")
    assert got.mac != first.mac
    assert got.ssh_port != first.ssh_port
    assert two.allocate("prod") == got
    assert Allocator(farm_of("one"), tmp_path / "1").allocate("prod") == first


def test_a_listening_port_is_passed_over(tmp_path: Path) -> None:
    wanted = Allocator(farm_of(), tmp_path / "1").peek("prod").ssh_port
    with socket.create_server(("127.0.0.1", wanted)):
        assert Allocator(farm_of(), tmp_path / "1").allocate("prod").ssh_port != wanted


def test_forgetting_a_farm_gives_all_back(tmp_path: Path) -> None:
    allocator = Allocator(farm_of(), tmp_path / "lock")
    allocator.allocate("prod")
    allocator.allocate("dev2")
    allocator.forget()
    assert not (tmp_path / "lock").exists()
    assert not (tmp_path / "state/claims.db").exists()


def test_claims_are_written_once_for_what_is_new(tmp_path: Path) -> None:
    allocator, counted = Allocator(farm_of(), tmp_path / "lock"), []
    for vm in ("prod", "dev2", "prod"):
        allocator.allocate(vm)
        header = (tmp_path / "state/claims.db").read_bytes()[:100]
        counted.append(int.from_bytes(header[24:28]))  # changes (sqlite.org/fileformat.html, 1.3.6)
    assert counted == [1, 2, 2]


def test_the_lock_file_is_the_same_however_it_came_about(tmp_path: Path) -> None:
    names = ["vm1", "vm10", "vm2", "a-b", "a1", "a", "zz"]
    farm = farm_of(vms={name: {} for name in names})
    Allocator(farm, tmp_path / "whole").allocate_all(names)
    whole = (tmp_path / "whole").read_text()
    assert list(json.loads(whole)["vms"]) == sorted(names)
    lock = tmp_path / "lock"
    for name in reversed(names):
        Allocator(farm, lock).allocate(name)
    assert lock.read_text() == whole
    for name in ("vm1", "zz", "a"):
        Allocator(farm, lock).release(name)
        Allocator(farm, lock).allocate(name)
        assert lock.read_text() == whole
    lock.write_text(json.dumps(json.loads(whole), indent=2))
    Allocator(farm, lock).release("a-b")
    Allocator(farm, lock).allocate("a-b")
    assert lock.read_text() == whole
    lines = whole.splitlines(keepends=True)
    lines[5], lines[6] = lines[6], lines[5]
    lock.write_text("".join(lines))
    Allocator(farm, lock).release("zz")
    Allocator(farm, lock).allocate("zz")
    assert lock.read_text() == whole
    for name in names:
        Allocator(farm, lock).release(name)
    assert json.loads(lock.read_text())["vms"] == {}


@pytest.mark.parametrize("version", [0, 2], ids=["before versions", "newer"])
def test_claims_in_another_format_are_refused(tmp_path: Path, version: int) -> None:
    allocator = Allocator(farm_of(), tmp_path / "1")
    allocator.allocate("prod")
    with sqlite3.connect(tmp_path / "state/claims.db") as db:
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    before = (tmp_path / "state/claims.db").read_bytes()
    for ask in (allocator.peek, allocator.allocate, allocator.release):
        with pytest.raises(WrongState) as refused:
            ask("prod")
        assert f"claims.db is in format {version}, and this farmhand reads" in refused.value.message
        assert "use the farmhand that wrote it, or move it aside" in refused.value.remedy
    assert (tmp_path / "state/claims.db").read_bytes() == before


@pytest.mark.parametrize("format", ["", '"format": 2, '], ids=["before formats", "newer"])
def test_a_lock_file_in_another_format_is_refused(tmp_path: Path, format: str) -> None:
    lock = tmp_path / "lock"
    lock.write_text(f'{{{format}"vms": {{}}}}')
    with pytest.raises(WrongState) as refused:
        Allocator(farm_of(), lock).allocate("prod")
    known = "in format 2" if format else "in an unknown format"
    assert refused.value.message == f"{lock} is {known}, and this farmhand reads and writes format 1"
    assert f"mv {lock} {lock}.aside" in refused.value.remedy


def test_damaged_claims_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(exist_ok=True)
    (tmp_path / "state/claims.db").write_text("no database, but long enough to be looked at as one " * 9)
    with pytest.raises(WrongState, match=r"claims\.db is damaged"):
        Allocator(farm_of(), tmp_path / "1").allocate("prod")


def test_a_broken_lock_file_is_an_error_not_an_empty_one(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text('<<<<<<< HEAD\n{"format": 1, "vms": {}}')
    with pytest.raises(WrongState, match="damaged"):
        Allocator(farm_of(), lock).allocate("prod")
    lock.write_text('{"format": 1, "vms": {"prod": {"mac": "x"}}}')
    with pytest.raises(WrongState, match="damaged"):
        Allocator(farm_of(), lock).recorded()


def test_peek_records_nothing(tmp_path: Path) -> None:
    allocator = Allocator(farm_of(), tmp_path / "lock")
    seen = allocator.peek("prod")
    assert not (tmp_path / "lock").exists()
    assert allocator.allocate("prod") == seen
    text = (tmp_path / "lock").read_text()
    assert "Written by farmhand" in text


def test_the_lock_file_is_beside_the_farm_file_but_never_in_the_checkout(tmp_path: Path) -> None:
    farm = farm_of().at(tmp_path / "my.yaml")
    assert lock_file_of(farm, FarmPaths("kata")) == tmp_path / "my.yaml.lock"
    import inventory

    farm = farm.at(Path(inventory.__file__).parent / "default.yaml")
    assert lock_file_of(farm, FarmPaths("kata")) == FarmPaths("kata").root / "default.yaml.lock"


def _allocate_many(lock: Path, names: list[str], every: list[str]) -> None:
    farm = validated(
        {"farm": "many", "vms": {name: {} for name in every}, "network": bridge("10.9.0.0/23")}
    )
    allocator = Allocator(farm, lock)
    for name in names:
        allocator.allocate(name)


def test_eight_processes_give_two_hundred_no_duplicate(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    names = [f"vm{n}" for n in range(200)]
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_allocate_many, args=(lock, names[n::8], names)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    entries = json.loads(lock.read_text())["vms"]
    assert sorted(entries) == sorted(names)
    addresses = [entry["address"] for entry in entries.values()]
    assert len(set(addresses)) == 200
    assert len({entry["mac"] for entry in entries.values()}) == 200
    pool = set(IPv4Network("10.9.0.0/23").hosts())
    assert {IPv4Address(address) for address in addresses} <= pool


def _allocate_ports(state: Path, lock: Path, name: str) -> None:
    farm = validated({"farm": name, "vms": {f"vm{n}": {} for n in range(10)}})
    (state / "farms" / name).mkdir(parents=True, exist_ok=True)
    allocator = Allocator(farm, lock)
    for vm in farm.vms:
        allocator.allocate(vm)


def test_processes_of_different_farms_share_no_port(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    names = [f"farm{n}" for n in range(4)]
    workers = [
        spawn.Process(target=_allocate_ports, args=(tmp_path / "state", tmp_path / name, name))
        for name in names
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    ports = [
        entry["ssh_port"]
        for name in names
        for entry in json.loads((tmp_path / name).read_text())["vms"].values()
    ]
    assert len(set(ports)) == 40


@pytest.mark.parametrize(
    ("vms", "why"),
    [
        ('"a": {"mac": "52:54:00:00:00:01", "address": "10.0.0.2", "ssh_port": 22},'
         '"b": {"mac": "52:54:00:00:00:01", "address": "10.0.0.3", "ssh_port": 22}',
         "a and b have the same MAC"),
        ('"a": {"mac": "52:54:00:00:00:01", "address": "10.0.0.2", "ssh_port": 22},'
         '"b": {"mac": "52:54:00:00:00:02", "address": "10.0.0.2", "ssh_port": 22}',
         "a and b have the same address"),
        ('"a": {"mac": "52:54:00:00:00:01", "address": null, "ssh_port": 22},'
         '"a": {"mac": "52:54:00:00:00:02", "address": null, "ssh_port": 22}', "'a' is there twice"),
        ('"a": {"mac": "52:54:00:00:00:0X", "address": null, "ssh_port": 22}', "is no MAC"),
        ('"a": {"mac": "52:54:00:00:00:01", "address": "10.0.0.2/24", "ssh_port": 22}', "is no address"),
        ('"a": {"mac": "52:54:00:00:00:01", "address": null, "ssh_port": 65536}', "is no port"),
        ('"a": {"mac": "52:54:00:00:00:01", "address": null, "ssh_port": true}', "is no port"),
        ('"a": [1, 2, 3]', "the entry of 'a'"),
    ],
)  # fmt: skip
def test_a_lock_file_that_daemons_would_refuse_is_refused_here(
    tmp_path: Path, vms: str, why: str
) -> None:
    """Before anything is rendered from it."""
    path = tmp_path / "lock"
    path.write_text(f'{{"format": 1, "vms": {{{vms}}}}}')
    with pytest.raises(WrongState, match="is damaged") as refused:
        LockFile("f", path).read()
    assert why in refused.value.message
