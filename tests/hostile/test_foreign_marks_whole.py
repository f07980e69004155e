"""Whole commands, where the marks of a machine in a real libvirt and of its disk name a path."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from tests import boot_sector
from tests.unit.cli_farm import CommandLine, command_line

FARM = """\
farm: try
templates: {small: {import: small.img}}
vms: {one: {memory: 64M}}
"""
VICTIM = "../../../victim"


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    for made in command_line(tmp_path):
        made.farm.write_text(FARM)
        image = tmp_path / "small.img"
        image.write_bytes(boot_sector.IDLE)
        with tempfile.TemporaryDirectory(prefix="fh") as state:
            Path(state).chmod(0o711)  # QEMU's user passes through
            made.environment["FARMHAND_STATE_DIR"] = state
            yield made


def test_gc_leaves_alone_what_a_machine_with_a_damaged_mark_needs(cli: CommandLine) -> None:
    assert cli("clone-farm", "--no-start").status == 0
    state = Path(cli.environment["FARMHAND_STATE_DIR"])
    uri = shlex.split(cli("console", "--vm", "one", "--plan").out)[2]
    sound = libvirt.open(uri).lookupByName("try-one").XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)

    def files() -> list[Path]:
        found = [path for name in ("seeds", "hostkeys") for path in state.rglob(f"{name}/*")]
        return sorted([*found, *state.rglob("disk.qcow2")])

    before = files()
    assert before
    (mark,) = state.rglob("owner.json")
    kept = mark.read_text()
    record = cli.farm.with_name("try.yaml.lock")
    given = record.read_text()
    try:
        libvirt.open(uri).defineXML(sound.replace('vm="one"', f'vm="{VICTIM}"'))
        assert cli("gc").out == "keep:  nothing is left over\n", "its disk tells whose it is"
        mark.write_text(json.dumps(json.loads(kept) | {"vm": VICTIM}))
        for _ in range(2):
            done = cli("gc")
            assert done.status == 0, done.err
            assert "a machine try-one without our mark is on host here" in done.out
            assert "nothing is left over" in done.out
        cli.farm.write_text(FARM.replace("one:", "two:"))  # which is no reason either
        assert cli("gc").status == 0
        assert files() == before
        assert record.read_text() == given
    finally:
        cli.farm.write_text(FARM)
        mark.write_text(kept)
        libvirt.open(uri).defineXML(sound)
        assert cli("destroy", "--all").status == 0


def test_names_that_are_paths_end_no_command_and_touch_nothing(cli: CommandLine) -> None:
    assert cli("clone-farm", "--no-start").status == 0
    state = Path(cli.environment["FARMHAND_STATE_DIR"])
    uri = shlex.split(cli("console", "--vm", "one", "--plan").out)[2]
    connection = libvirt.open(uri)
    domain = connection.lookupByName("try-one")
    sound = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    assert 'vm="one"' in sound
    (mark,) = state.rglob("owner.json")
    kept = mark.read_text()
    try:
        connection.defineXML(sound.replace('vm="one"', f'vm="{VICTIM}"'))
        mark.write_text(json.dumps(json.loads(kept) | {"vm": VICTIM}))
        before = sorted(path for path in state.rglob("*") if "victim" in path.name)
        for words in ("status", "destroy --vm one", "gc", "reset --vm one", "destroy --all --yes"):
            done = cli(*words.split())  # within two minutes
            assert "a defect in farmhand" not in done.err
            warned = [line for line in done.err.splitlines() if "mark that is damaged" in line]
            assert any("domain try-one" in line for line in warned), done.err
            assert all(line.isprintable() for line in done.err.splitlines())
        assert sorted(path for path in state.rglob("*") if "victim" in path.name) == before == []
        assert (mark.parent / "disk.qcow2").exists()
        assert libvirt.open(uri).lookupByName("try-one")
    finally:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(kept)
        libvirt.open(uri).defineXML(sound)
        assert cli("destroy", "--all").status == 0
