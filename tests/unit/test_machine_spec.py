"""Which changes of a machine's specification make it be defined anew."""

from __future__ import annotations

from dataclasses import fields, replace
from ipaddress import IPv4Address
from pathlib import Path

from hypervisors.api import MachineSpec, Nic, Owner, spec_hash
from tests.identities import KATA

SPEC = MachineSpec(
    name="kata-prod", owner=Owner(KATA, "prod"), memory=2**30, vcpus=1, disk_size=2**32,
    nic=Nic(mac="52:54:00:00:00:01", mode="user"),
)  # fmt: skip
OTHER = {
    "name": "kata-dev", "owner": Owner(KATA, "dev"), "memory": 2**31, "vcpus": 2, "disk_size": 2**33,
    "nic": Nic(mac="52:54:00:00:00:02", mode="user"), "address": IPv4Address("10.0.0.1"), "ssh_port": 23,
    "seed": Path("/s"), "console_log": Path("/c"), "kernel": Path("/k"), "initrd": Path("/i"),
    "cmdline": "ro", "firmware": "efi",
}  # fmt: skip


def test_all_but_its_port_and_its_files_is_part_of_its_definition() -> None:
    hashes = {f.name: spec_hash(replace(SPEC, **{f.name: OTHER[f.name]})) for f in fields(SPEC)}
    same = {name for name, found in hashes.items() if found == spec_hash(SPEC)}
    assert same == {"disk_size", "ssh_port", "console_log"}
    assert len({*hashes.values()}) == len(hashes) - len(same) + 1
