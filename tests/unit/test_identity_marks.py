"""A farm's identity as text on what it has made."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisors.api import MachineSpec, Nic, Owner, spec_hash
from hypervisors.disks.lvm.command import decode, encode
from hypervisors.disks.zfs.state import options
from hypervisors.libvirt.domain_xml import head, mark_of, read_domain
from hypervisors.ownership import FarmIdentity
from hypervisors.xenapi.temporary_names import is_dead, made_for, temporary_name
from tests.identities import KATA, identity

TEXT = st.text(max_size=600)
SPEC = MachineSpec(
    name="kata-prod", owner=Owner(KATA, "prod"), memory=2**30, vcpus=1, disk_size=2**32,
    nic=Nic(mac="52:54:00:00:00:01", mode="user"),
)  # fmt: skip


def test_only_the_number_counts() -> None:
    assert replace(KATA, file="/elsewhere", controller="bob@pc2") == KATA
    assert identity("kata", "/root/farm.yaml") != KATA
    assert KATA.is_namesake(identity("kata", "/root/farm.yaml"))
    assert not KATA.is_namesake(KATA)
    assert not KATA.is_namesake(identity("kata-2"))


def test_a_mark_without_a_number_is_anothers() -> None:
    old = FarmIdentity.of("kata")
    assert old.is_namesake(KATA)
    assert str(old) == "kata (without an identity)"
    assert FarmIdentity.of(old.mark) == old
    assert FarmIdentity.of("../../victim").name == ""


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT)
def test_it_comes_back_from_every_kind_of_mark(file: str, controller: str) -> None:
    made = FarmIdentity("kata", KATA.id, file, controller)
    assert re.fullmatch(r"[ -~]{38,740}", made.mark)
    read = FarmIdentity.of(made.mark)
    assert read == KATA
    assert file.endswith(read.file)
    assert controller.endswith(read.controller)
    assert len(file.encode(errors="surrogateescape")) > 150 or read.file == file
    assert options({"farm": made.mark}) == ["-o", f"farmhand:farm={made.mark}"]
    tags = encode({"farm": made.mark})
    assert all(len(tag) <= 1024 for tag in tags)
    assert FarmIdentity.of(decode(tags)["farm"]) == KATA
    xml = ET.tostring(head("kvm", replace(SPEC, owner=Owner(made, "prod")), "base@1", ""))
    assert read_domain(xml.decode()).owner == Owner(KATA, "prod")


@settings(max_examples=300, deadline=None)
@given(st.one_of(TEXT, st.builds("kata:{}:{}:{}".format, st.just(KATA.id), TEXT, TEXT)))
def test_whatever_a_mark_says_is_safe_to_print_and_no_path(mark: str) -> None:
    found = FarmIdentity.of(mark)
    assert str(found).isprintable()
    assert re.fullmatch(r"[A-Za-z0-9._-]{0,128}", found.name)
    assert found.id in ("", KATA.id) or re.fullmatch(r"[0-9a-f]{32}", found.id)


@pytest.mark.parametrize("vm", ["prod", ""])
def test_it_comes_back_from_a_temporary_name(vm: str) -> None:
    with temporary_name(Owner(KATA, vm)) as name:
        assert made_for(name) == Owner(KATA, vm)
        assert not is_dead(name)


def test_a_definition_is_the_same_whosever_it_is() -> None:
    theirs = replace(SPEC, owner=Owner(identity("kata", "/root/farm.yaml"), "prod"))
    assert spec_hash(SPEC) == spec_hash(theirs)
    assert spec_hash(SPEC) != spec_hash(replace(SPEC, owner=Owner(KATA, "dev2")))


def test_a_definitions_mark_is_written_anew_with_all_else_in_it() -> None:
    xml = ET.tostring(head("kvm", SPEC, "base@1", "")).decode()
    theirs = Owner(identity("kata", "/root/farm.yaml"), "prod")
    mark = ET.fromstring(mark_of(xml, theirs))
    assert mark.tag == "machine"
    assert FarmIdentity.of(mark.attrib["farm"]) == theirs.farm
    assert (mark.attrib["vm"], mark.attrib["template"]) == ("prod", "base@1")
    assert mark.attrib["spec"] == spec_hash(SPEC)
