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
from host.paths import cache_dir
from inventory.errors import TimedOut, WrongState, spelled
from inventory.loader import load
from provision import power
from provision.engine.report import QuietReporter
from provision.member import Member
from provision.power import require_answer
from provision.site import Site
from tests import boot_sector
from tests.contract import small_guest
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
    line.environment["FARMHAND_CACHE_DIR"] = str(cache_dir())  # where the small guest is
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
            require_answer(Member(site, "one"))
        assert f"127.0.0.1:{old} gives no answer" in caught.value.message
        assert "reset --vm one" in spelled(caught.value.remedy)
        # Whom it was handed to before a start finds it where it is after that.
        member = Member(site, "one")
        assert member.endpoint().port == old
        assert place("stop", "--vm", "one", "--force").status == 0
        assert place("start", "--vm", "one", "--no-wait").status == 0
        assert member.endpoint().port == new
    with socket.create_connection(("127.0.0.1", new), 60):
        pass
    assert place("status", "--json").json["vms"][0]["kept"] == []

    assert place("stop", "--vm", "one", "--force").status == 0
    with Site(load(place.farm), reporter=QuietReporter()) as site, pytest.raises(WrongState) as caught:
        require_answer(Member(site, "one"))
    assert caught.value.message == "one: it is stopped"
    assert place("status", "--json").json["vms"][0]["answers"] is None, "nobody is asked"


def test_a_guest_that_panics_while_it_is_waited_for(place: CommandLine) -> None:
    """Told at once; and then by whatever has to do with it."""
    guest = small_guest.build(cache_dir())
    place.farm.write_text(
        "farm: try\ntemplates: {small: {import: small.img, boot: "
        f"{{kernel: {guest.kernel}, initrd: {guest.initrd}, "
        "cmdline: console=ttyS0 then=crash panic=-1}}}\n"
        "vms: {one: {memory: 96M}}\n"
    )
    done = place("clone-farm", "--json")
    assert (done.status, done.json["message"]) == (
        1, "one: its guest panicked; it stands still as it was then"
    )  # fmt: skip
    assert "Kernel panic" in done.json["detail"] and "reset --vm one" in done.json["remedy"]
    seen = place("status", "--json").json["vms"][0]
    assert (seen["state"], seen["answers"], seen["memory"]) == ("panicked", None, 96 * 2**20)
    for words in (["start", "--vm", "one"], ["ssh", "--vm", "one"]):
        done = place(*words)
        assert (done.status, done.error) == (
            1, "farmhand: one: its guest panicked; it stands still as it was then"
        )  # fmt: skip
    planned = place("stop", "--vm", "one", "--plan").out
    assert "cut its power" in planned and "shut down" not in planned
    assert place("stop", "--vm", "one").status == 0
    assert place("status", "--json").json["vms"][0]["state"] == "stopped"
