"""Farms of any size whose machines run nothing: on the fake store, or on qcow2 files."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hypervisors.api import Template
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.site import Site
from tests.faults.still import Still, StillSite

MIB = 2**20
KINDS = {"fake": "driver: fake", "qcow2": "driver: kvm, uri: 'qemu:///system'"}
"""Stores, and hosts that have them."""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory: nobody waits for the journal's fsync."""
    with tempfile.TemporaryDirectory(prefix="fh-", dir="/dev/shm") as name:
        monkeypatch.setenv("FARMHAND_STATE_DIR", str(Path(name, "state")))
        yield Path(name)


class _Site(StillSite):
    def _open(self, host: str) -> Still:
        """No QEMU is to read anything."""
        still = super()._open(host)
        still.real.reader_uid = lambda: None
        return still


class StillFarm:
    """Its template is sealed."""

    def __init__(self, directory: Path, kind: str, vms: Sequence[str]) -> None:
        self.file = directory / "still.yaml"
        (directory / "key").touch(0o600)  # as for an image that nobody tells whom to let in
        self.declare(kind, vms)
        image = directory / "base.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(MIB)], check=True)
        template = Template(
            name="base", generation=1, ref="", size=MIB, sha256="", created=datetime.now(UTC),
            origin="nothing", firstboot="none",
        )  # fmt: skip
        with self.site() as site:
            site.prepare()
            site.disks("here").seal(image, template)

    def declare(self, kind: str, vms: Sequence[str]) -> None:
        lines = "\n".join(f"  {vm}: {{memory: 64M}}" for vm in vms)
        self.file.write_text(
            f"farm: still\nhosts: {{here: {{{KINDS[kind]}}}}}\n"
            f"templates: {{base: {{build: debian-12, size: 1M}}}}\nssh: {{key: key}}\nvms:\n{lines}\n"
        )

    def site(self, *, plan: bool = False) -> Site:
        return _Site(load(self.file), reporter=QuietReporter(), plan=plan)
