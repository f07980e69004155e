"""What is asked of libvirt about a domain, on libvirt's own test driver."""

from __future__ import annotations

from collections.abc import Iterator

import libvirt
import pytest

from hypervisors.api import Power
from hypervisors.libvirt.domain_state import as_machine, resume
from hypervisors.marks import DamagedMarks

XML = "<domain type='test'><name>one</name><memory>65536</memory><os><type>hvm</type></os></domain>"


@pytest.fixture
def domain() -> Iterator[libvirt.virDomain]:
    connection = libvirt.open("test:///default")
    yield connection.defineXML(XML)
    connection.close()


def test_a_stopped_domain_is_asked_for_its_definition_and_its_state(
    domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def heard(name: str, *arguments: object) -> object:
        asked.append(name)
        return getattr(libvirt.virDomain, name)(domain, *arguments)

    for name in ("XMLDesc", "info", "isActive", "state"):
        monkeypatch.setattr(domain, name, lambda *given, name=name: heard(name, *given))
    machine = as_machine(domain, DamagedMarks())
    assert machine is not None and (machine.name, machine.power) == ("one", Power.STOPPED)
    assert asked == ["XMLDesc", "info"]  # each is a question to the daemon, of every VM of a farm


def test_one_that_somebody_else_let_run_on_meanwhile_runs(domain: libvirt.virDomain) -> None:
    domain.create()
    with pytest.raises(libvirt.libvirtError):
        domain.resume()  # libvirt's own refuses it
    resume(domain)
    domain.suspend()
    resume(domain)
    assert domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    domain.destroy()
    with pytest.raises(libvirt.libvirtError):
        resume(domain)
