"""The lab as a machine: two from one saved state differ where they must, a power cut takes what was not
flushed at most, and when its kernel dies the tests go on in another."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator

import pytest

from host.run import Runner
from inventory.errors import CommandFailed, FarmhandError, TimedOut
from tests.lab import qemu, told
from tests.lab.machine import Machine
from tests.lab.run import Choice, run_tests

pytestmark = [pytest.mark.system, pytest.mark.timeout(3000)]  # the image may have to be built


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def make(name: str) -> Machine:
        machine = Machine(f"system-{name}", Runner(), print)
        made.append(machine)
        machine.remove()  # of a run that was killed
        machine.start(temporary=True)
        return machine

    yield make
    for machine in made:
        machine.remove()


def test_labs_from_one_saved_state_have_their_own_time_and_random_numbers(
    lab: Callable[..., Machine],
) -> None:
    one, two = lab("one"), lab("two")
    assert one.facts.port != two.facts.port
    drawn = set()
    for machine in (one, two):
        before = time.time()
        clock, *ids = machine.run(
            "date +%s.%N; cat /proc/sys/kernel/random/uuid /etc/machine-id; "
            "zpool create tank /dev/vdb; zpool get -H -o value guid tank; "
            "vgcreate -qq group /dev/vdc; vgs --noheadings -o vg_uuid group"
        ).stdout.split()
        assert before - 2 < float(clock) < time.time() + 2
        assert len(ids) == 4
        drawn |= set(ids)
    assert len(drawn) == 8


def test_after_a_power_cut_all_that_was_flushed_is_there(lab: Callable[..., Machine]) -> None:
    machine = lab("plug")
    machine.run(
        "zpool create -f tank /dev/vdb && zfs create tank/kept && echo kept >/tank/kept/file && "
        "zpool sync tank && pvcreate -q /dev/vdc && vgcreate -q group /dev/vdc && "
        "lvcreate -qq -y -L 64M -n kept group && echo kept >/root/kept && sync"
    )
    machine.pull_the_plug()
    assert not machine.running()
    # 3: clusters that nothing refers to, as any crash leaves them; the tables are whole
    root = machine.directory / "run.qcow2"
    Runner().read("qemu-img", "check", "-q", root, ok=(0, 3), timeout=300)
    machine.boot_again()
    found = machine.run(
        "cat /root/kept /tank/kept/file; zpool list -H -o health tank; lvs --noheadings -o lv_name group"
    ).stdout.split()
    assert found == ["kept", "kept", "ONLINE", "kept"]


def test_when_a_labs_kernel_dies_the_tests_go_on_in_another() -> None:
    """An emulated one's: on real hardware it would be the fault of what is tested."""
    machine = Machine(f"test-kvm-{os.getpid()}", Runner(), print)
    said: list[str] = []
    shown: list[bytes] = []
    killed = False

    def show(data: bytes) -> None:
        nonlocal killed
        shown.append(data)
        if not killed and told.read(machine.console).passed:
            killed = True
            with contextlib.suppress(CommandFailed, TimedOut):
                machine.run("echo c >/proc/sysrq-trigger", timeout=60)

    choice = Choice(only=("tests/lab/test_smoke.py",))
    if not qemu.engine(Runner(), said.append).why.startswith(qemu.EMULATED):
        with pytest.raises(FarmhandError, match=r"QEMU of the lab .* ended under the tests"):
            run_tests(Runner(), said.append, choice=choice, show=show)
        return
    report = run_tests(Runner(), said.append, choice=choice, show=show)
    assert report.ok
    before = re.search(r"Kernel panic - not syncing\); (\d+) tests had passed", "\n".join(said))
    assert before
    assert int(before[1]) >= 1
    output = b"".join(shown).decode()
    assert f"not run again: {before[1]} tests that had passed" in output
    all_of_them = re.search(r"collected (\d+) items", output)
    passed = re.search(r"(\d+) passed", report.closing)
    assert all_of_them
    assert passed
    assert int(before[1]) + int(passed[1]) == int(all_of_them[1])
