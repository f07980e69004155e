"""Hostile values: refused at load with their place, or rendered so that each daemon's own parser takes
the files and reads back exactly the value.

FARMHAND_FUZZ=N runs N farms instead of a few.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import dns.zone
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yard import Yard

from inventory.errors import InventoryError
from provision.network.services import kea as kea_service

FARMS = int(os.environ.get("FARMHAND_FUZZ", "12"))
CHECKED = ("bind", "dhcpd", "kea", "dnsmasq", "nginx", "haproxy", "nftables")

label = st.from_regex(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
nasty = st.sampled_from(
    ["", '"', "'", ";", "}", "{", "\\", "\\\\", "$HOME", "`id`", "$(id)", "-->", "<!--", "--", "#", "@",
     "{{ 1 }}", "{% raw %}", "*/", "//", "\n", "\r", "\x00", "\x85", "\u2028", "../..", "é",
     "\U0001f600", "%s",
     "END farmhand try-it", "\nzone x {};", " \\", "ends with \\", "\t"]
)  # fmt: skip
text = st.lists(st.one_of(nasty, st.text(max_size=6)), max_size=5).map("".join)
vm = st.fixed_dictionaries(
    {},
    optional={
        "description": text,
        "hostname": st.one_of(label, text),
        "aliases": st.lists(label, max_size=2),
        "nat_port": st.integers(1, 65535).map(str),
        "address": st.integers(2, 99).map(lambda n: f"10.77.0.{n}"),
        "proxy": st.lists(
            st.fixed_dictionaries(
                {"name": label.map(lambda name: f"{name}.example.org")},
                optional={
                    "port": st.integers(1, 65535).map(str),
                    "websocket": st.sampled_from(["yes", "no"]),
                    "body_size": st.sampled_from(["1", "100M", "3T"]),
                    "access_log": st.one_of(text, st.just("/var/log/nginx/a.log")),
                },
            ),
            max_size=2,
        ),
    },
)
farms = st.dictionaries(label, vm, min_size=1, max_size=4)


def read_back(yard: Yard) -> None:
    farm, files = yard.farm(), yard.write()
    kea: Any = kea_service.configuration(files["kea/kea4.conf"])
    [subnet] = kea["Dhcp4"]["subnet4"]
    hosts = {host["hostname"]: host for host in subnet["reservations"]}
    compiled = subprocess.run(
        ["named-compilezone", "-q", "-o", "-", "try.example", files["bind/db.try.example"]],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    zone = dns.zone.from_text(compiled, origin="try.example")
    for name, declared in farm.vms.items():
        host = hosts[farm.hostname_of(name)]
        assert host.get("user-context", {}).get("description") == declared.description
        found = zone.get_rdataset(farm.qualified(farm.hostname_of(name)) + ".", "A")
        assert found is not None
        assert found.to_text().split()[-1] == host["ip-address"]
    assert zone.get_rdataset("ns", "A") is not None
    records = [r for n in zone.nodes.values() for r in n.rdatasets if r.rdtype == dns.rdatatype.A]
    names = {farm.qualified(n) for v, d in farm.vms.items() for n in (farm.hostname_of(v), *d.aliases)}
    assert len(records) == len(names | {"ns.try.example"}), "no record that nobody declared"


@settings(
    max_examples=FARMS, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(farms)
def test_farms_are_refused_or_read_back(vms: dict[str, Any]) -> None:
    directory = Path(tempfile.mkdtemp(prefix="fhn-"))
    directory.chmod(0o755)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FARMHAND_STATE_DIR", str(directory / "state"))
            yard = Yard(directory)
            yard.vms = vms
            try:
                yard.farm()
            except InventoryError as error:
                lines = yard.text().count("\n") + 2
                assert all(1 <= problem.line <= lines for problem in error.problems)
                return
            yard.check(*CHECKED)
            read_back(yard)
    finally:
        shutil.rmtree(directory)


PRINTABLE = (
    "a \"b\" 'c' ; } { \\ \\\\ $HOME `id` $(id) --> <!-- -- # {{ 1 }} {% x %} */ // ../.. é 😀 %s @ \\"
)


def test_every_character_at_once(yard: Yard) -> None:
    yard.vms["dev2"]["description"] = PRINTABLE
    yard.check()
    read_back(yard)
    path = yard.write("ansible")["ansible.yaml"]
    done = subprocess.run(
        ["ansible-inventory", "-i", path, "--list", "--export"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = json.loads(done.stdout)["_meta"]["hostvars"]["dev2.try.example"]["description"]
    assert said in (PRINTABLE, {"__ansible_unsafe": PRINTABLE})


@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\x85", "\u2028"], ids=repr)
def test_what_ends_a_line_is_refused_at_its_place(yard: Yard, character: str) -> None:
    yard.vms["dev2"]["description"] = f"a{character}b"
    with pytest.raises(InventoryError) as caught:
        yard.farm()
    assert all("description" in str(p) or "character U+" in str(p) for p in caught.value.problems)


def test_names_as_long_as_can_be(yard: Yard) -> None:
    label, domain = "a" * 52, ".".join(["b" * 63, "c" * 63, "d" * 55])
    yard.network["domain"] = domain
    yard.vms = {label: {"proxy": [{"name": f"{'p' * 63}.{domain}"}]}}
    yard.check()
    yard.vms = {"a" * 64: {}}
    with pytest.raises(InventoryError, match="at most 63"):
        yard.farm()


def test_a_description_is_not_taken_for_our_mark(yard: Yard) -> None:
    yard.vms["dev2"]["description"] = "END farmhand try-it"
    yard.services["dhcpd"]["own"] = "block"
    path = yard.write("dhcpd")["dhcp/dhcpd.conf"]
    text = path.read_text()
    yard.write("dhcpd")
    assert path.read_text() == text
