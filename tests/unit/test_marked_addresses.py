"""Machines tell where they are by their marks. The record beside the farm file may be lost, or another
controller's."""

from __future__ import annotations

import json
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from still_farm import StillFarm, place

from provision.member import Member
from provision.status import status
from tests import farm

__all__ = ["place"]
FIRST, SECOND = IPv4Address("10.9.0.1"), IPv4Address("10.9.0.2")
NETWORK = "network: {mode: bridge, bridge: br0, subnet: 10.9.0.0/29}\n"


class _Bridged(StillFarm):
    def declare(self, kind: str, vms: object) -> None:
        super().declare(kind, vms)  # type: ignore[arg-type]
        with self.file.open("a") as file:
            file.write(NETWORK)

    @property
    def record(self) -> Path:
        return self.file.with_name(f"{self.file.name}.lock")

    def recorded(self) -> dict[str, str]:
        return {vm: entry["address"] for vm, entry in json.loads(self.record.read_text())["vms"].items()}


@pytest.fixture
def made(place: Path) -> _Bridged:
    """Of three VMs two."""
    still = _Bridged(place, "fake", ["a", "b", "c"])
    with still.site() as site:
        farm.clone_farm(site, ["a", "b"])
    assert still.recorded() == {"a": str(FIRST), "b": str(SECOND)}
    return still


def test_a_vm_is_where_its_mark_says_whatever_is_recorded(made: _Bridged) -> None:
    swapped = made.record.read_text().replace(str(FIRST), "x").replace(str(SECOND), str(FIRST))
    made.record.write_text(swapped.replace('"x"', f'"{SECOND}"'))
    with made.site() as site:
        assert [Member(site, vm).address()[0] for vm in ("a", "b")] == [str(FIRST), str(SECOND)]
        assert [vm.address for vm in status(site).vms[:2]] == [str(FIRST), str(SECOND)]
    made.record.unlink()
    with made.site() as site:
        assert Member(site, "b").address()[0] == str(SECOND)


@pytest.mark.parametrize("how", ["swapped", "lost"])
def test_the_record_is_put_right(how: str, made: _Bridged) -> None:
    known = made.record.read_text()
    if how == "swapped":
        text = known.replace(str(FIRST), "x").replace(str(SECOND), str(FIRST))
        made.record.write_text(text.replace('"x"', f'"{SECOND}"'))
    else:
        made.record.unlink()
    with made.site(plan=True) as site:
        said = [action for action in farm.clone_farm(site, ["a", "b"]).actions if action.verb == "note"]
    text = f"by its machine's mark, which {made.record} doesn't say: recorded there"
    assert [action.text for action in said] == [f"has {FIRST} {text}", f"has {SECOND} {text}"]
    with made.site() as site:
        farm.clone_farm(site, ["a", "b"])
    assert json.loads(made.record.read_text())["vms"] == json.loads(known)["vms"]


def test_a_start_records_what_the_machine_has(made: _Bridged) -> None:
    with made.site() as site:
        farm.stop(site, ["b"], force=True)
    made.record.unlink()
    with made.site() as site:
        farm.start(site, ["b"])
    assert made.recorded() == {"b": str(SECOND)}


def test_without_a_record_no_vm_is_given_what_another_has(made: _Bridged) -> None:
    made.record.unlink()
    with made.site() as site:
        farm.clone_farm(site, ["c"])
    assert made.recorded()["c"] not in {str(FIRST), str(SECOND)}
    with made.site() as site:
        addresses = {Member(site, vm).address()[0] for vm in ("a", "b", "c")}
    assert len(addresses) == 3


def test_a_subnet_is_not_used_up_by_vms_that_come_and_go(made: _Bridged) -> None:
    """Of six addresses, after three rounds of three VMs."""
    for _ in range(3):
        with made.site() as site:
            farm.destroy(site, ["a", "b", "c"])
        with made.site() as site:
            farm.clone_farm(site, ["a", "b", "c"])
    assert set(made.recorded().values()) <= {f"10.9.0.{n}" for n in range(1, 7)}


def test_services_are_told_what_machines_have_though_the_record_is_lost(made: _Bridged) -> None:
    with made.file.open("a") as file:
        file.write(f"services: {{hosts: {{config: {made.file.with_name('hosts')}}}}}\n")
    with made.site() as site:
        farm.destroy(site, ["a"])  # so that b would be given another one
    made.record.unlink()
    with made.site() as site:
        farm.network_apply(site)
    assert made.recorded()["b"] == str(SECOND)
    assert f"{SECOND} b" in made.file.with_name("hosts").read_text().replace("\t", " ")
