"""Another user's program on the port of a VM, with a greeting like that of an ssh server."""

from __future__ import annotations

from pathlib import Path

import pytest
from neighbour import NEEDS_ROOT, UID, squatted

import cli.composition  # noqa: F401 - a farm is loaded
from host import ports
from host.ports import listener
from inventory.errors import Conflict, spelled
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.guest import identity
from provision.member import Member
from provision.site import Site
from tests.unit.cli_farm import CommandLine
from tests.unit.sshd_machine import free_port

FARM = """
farm: kata
hosts: {here: {driver: kvm}}
templates: {base: {build: debian-12, size: 64M}}
vms: {prod: {memory: 192M}}
"""


@NEEDS_ROOT
@pytest.mark.parametrize("way", ["sock_diag", "proc"])
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_who_listens_is_known(address: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "proc":  # a kernel without sock_diag
        monkeypatch.setattr(ports, "_SOCK_DIAG", 63)
    port = free_port()
    with squatted(port, address) as pid:
        found = listener(port)
        assert found
        assert found.uid == UID
        assert str(found) == f"pid {pid} of nobody (python3)"
    assert listener(port) is None


@NEEDS_ROOT
def test_a_stranger_on_a_vms_port_is_said_and_never_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r").mkdir()
    line = CommandLine(tmp_path, tmp_path / "r")
    line.farm.write_text(FARM)
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", line.environment[f"FARMHAND_{name}_DIR"])
    with Site(load(line.farm), reporter=QuietReporter()) as site:
        site.prepare()
        identity.make_controller_key(site.farm, site.paths)
        identity.make_host_key(site.paths, "prod", "kata-prod")
        port = site.allocator.allocate("prod").ssh_port
        Member(site, "prod").endpoint()
        with squatted(port) as pid:
            with pytest.raises(Conflict) as caught:
                Member(site, "prod").endpoint()
            text = (
                f"prod: a stranger holds port {port} of this machine's loopback: pid {pid} of nobody "
                "(python3); it is not taken for the VM"
            )
            assert caught.value.message == text
            assert "start --vm prod" in spelled(caught.value.remedy)
            done = line("ssh", "--vm", "prod", "--command", "id")
            assert (done.status, done.error) == (1, f"farmhand: {text}")
