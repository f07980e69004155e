"""The Xen lab is what it is said to be: dom0 of a Xen host, with libvirt's libxl driver."""

from __future__ import annotations

import subprocess
from pathlib import Path

import libvirt
import pytest

pytestmark = pytest.mark.xen


def test_this_is_dom0_of_xen() -> None:
    assert "control_d" in Path("/proc/xen/capabilities").read_text()
    told = subprocess.run(["xl", "info"], capture_output=True, text=True, check=True).stdout
    facts = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
    version = next(value for key, value in facts.items() if key.strip() == "xen_version")
    assert version.strip().startswith("4.17")
    kinds = next(value for key, value in facts.items() if key.strip() == "virt_caps")
    assert {"pv", "hvm"} <= set(kinds.split())


def test_libvirt_drives_it() -> None:
    connection = libvirt.open("xen:///system")
    assert connection.getType() == "Xen"
    assert [domain.name() for domain in connection.listAllDomains()] == ["Domain-0"]
    assert "<machine>xenpvh</machine>" in connection.getCapabilities()
