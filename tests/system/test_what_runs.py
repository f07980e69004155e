"""What status and ssh say of a VM that runs, and is not as it should be: one whose guest never answers,
and whose farm file has changed since it was started."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

import cli.composition  # noqa: F401 - a farm is loaded
from inventory.errors import TimedOut, WrongState, spelled
from inventory.loader import load
from provision import power
from provision.engine.report import QuietReporter
from provision.power import require_answer
from provision.site import Site
from tests import boot_sector
from tests.unit.cli_farm import CommandLine
from tests.unit.sshd_machine import free_port

pytestmark = pytest.mark.system


def farm(port: int, memory: str, *, internet: bool = False) -> str:
    network = "internet: yes, host_loopback: reachable" if internet else "internet: no"
    return (
        "farm: try\ntemplates: {small: {import: small.img}}\n"
        f"network: {{{network}}}\n"
        f"vms: {{one: {{memory: {memory}, ssh_port: {port}}}}}\n"
    )


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[CommandLine]:
    directory = Path(tempfile.mkdtemp(prefix="fh"))
    directory.chmod(0o711)  # QEMU's user passes through
    (directory / "r").mkdir()
    line = CommandLine(directory, directory / "r")
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", line.environment[f"FARMHAND_{name}_DIR"])
    (directory / "small.img").write_bytes(boot_sector.IDLE)
    yield line
    assert line("destroy", "--all", "--yes").status == 0
    rmtree(directory)


def test_a_silent_vm_whose_farm_file_has_changed(
    place: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = free_port(), free_port()
    place.farm.write_text(farm(old, "64M"))
    assert place("clone-farm", "--no-wait").status == 0
    seen = place("status", "--json").json["vms"][0]
    assert (seen["state"], seen["answers"], seen["full"], seen["kept"]) == ("running", False, None, [])

    place.farm.write_text(farm(new, "96M", internet=True))
    seen = place("status", "--json").json["vms"][0]
    assert seen["kept"] == ["memory 64M, not 96M", "internet no, not yes", f"ssh port {old}, not {new}"]
    assert seen["port"] == old
    shown = place("status").out
    assert "running, silent" in shown
    assert "one: the farm file has changed; until its next start it goes on with memory 64M" in shown
    assert "reset --vm one" in shown

    argv = place("ssh", "--vm", "one", "--json").json["argv"]
    assert argv[argv.index("-p") + 1] == str(old) and "ConnectTimeout=30" in argv
    monkeypatch.setattr(power, "GREETING", 0.3)
    with Site(load(place.farm), reporter=QuietReporter()) as site:
        with pytest.raises(TimedOut) as caught:
            require_answer(site.member("one"))
        assert f"127.0.0.1:{old} gives no answer" in caught.value.message
        assert "reset --vm one" in spelled(caught.value.remedy)
        # Whom it was handed to before a start finds it where it is after that.
        member = site.member("one")
        assert member.endpoint().port == old
        assert place("stop", "--vm", "one", "--force").status == 0
        assert place("start", "--vm", "one", "--no-wait").status == 0
        assert member.endpoint().port == new
    with socket.create_connection(("127.0.0.1", new), 60):
        pass
    assert place("status", "--json").json["vms"][0]["kept"] == []

    assert place("stop", "--vm", "one", "--force").status == 0
    with Site(load(place.farm), reporter=QuietReporter()) as site, pytest.raises(WrongState) as caught:
        require_answer(site.member("one"))
    assert caught.value.message == "one: it is stopped"
    assert place("status", "--json").json["vms"][0]["answers"] is None, "nobody is asked"
