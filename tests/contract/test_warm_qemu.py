"""Warm checkpoints of real QEMU machines: what their guests know and what their disks have is of one
moment, whatever happened since, and whoever was killed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import libvirt
import pytest
import small_guest
from machine_rigs import FARM, LibvirtRig, machines
from rigs import MIB, params

from host.files import blocks
from hypervisors.api import Callbacks, Disks, KeptMemory, Machine, Power
from hypervisors.libvirt import driver as libvirt_driver
from hypervisors.libvirt import guest_agent
from hypervisors.libvirt.kvm import KvmVerdict
from hypervisors.libvirt.private import PrivateLibvirt
from hypervisors.libvirt.warm import (
    definition,
    guard,
    images,
    keeping,
    migration_stream,
    saving,
)
from hypervisors.libvirt.warm import machines as warm_machines
from hypervisors.libvirt.warm.definition import file_guard
from hypervisors.libvirt.warm.images import FACE, MEMORY, ONLY, FileFacts, MemoryImages
from hypervisors.libvirt.warm.keeping import Keeping
from inventory.errors import Conflict, DriverFailed, FarmhandError, NoSpace, Unsupported, WrongState

_PULSE = re.compile(r"PULSE=(\d+) DISK=(\d+) RANDOM=([0-9a-f]+)")
_PATIENCE = 240  # seconds
of_any_store = pytest.mark.parametrize("room", ["qcow2"], indirect=True)
"""Of QEMU and its memory: the same whatever keeps the disk. In the other tests a store has a part."""


@dataclass(frozen=True)
class Pulse:
    """What the guest has counted in its memory and on its disk, and 8 random bytes of that moment."""

    memory: int
    disk: int
    random: str


class WarmVm:
    """A machine whose guest counts."""

    def __init__(self, rig: LibvirtRig, vm: str) -> None:
        self.rig, self.vm, self.name = rig, vm, f"{FARM}-{vm}"
        self.driver = rig.hypervisor()

    def boot(self, options: str = "") -> None:
        spec = self.rig.spec(self.vm, options=f"pulse=0.1 {options}")
        self.driver.define(spec, self.rig.template)
        self.rig.boot(self.vm)
        self.pulses(3)

    def pulses(self, count: int = 1, *, beyond: int = -1) -> list[Pulse]:
        """Since its start; at least so many, the last beyond that number."""
        limit = time.monotonic() + _PATIENCE
        while time.monotonic() < limit:
            log = self.driver.console(self.name).log
            text = log.read_text(errors="replace") if log and log.exists() else ""
            found = [Pulse(int(n), int(d), r) for n, d, r in _PULSE.findall(text)]
            if len(found) >= count and found[-1].memory > beyond:
                return found
            time.sleep(0.02)
        raise AssertionError(f"the guest did not go on:\n{text}")

    def machine(self) -> Machine:
        found = self.driver.find(self.name)
        assert found
        return found

    @property
    def power(self) -> Power:
        return self.machine().power

    def kept(self, name: str) -> KeptMemory:
        return self.driver.memories(self.name)[name]

    def back(self, name: str) -> None:
        """Its disk is that checkpoint; it is off."""
        self.driver.stop(self.name, grace=0)
        self.rig.disks().restore(self.name, name)

    def keep(self, name: str) -> range:
        """Make a warm checkpoint; returns what it had counted to by then."""
        before = self.pulses()[-1].memory
        self.driver.checkpoint(self.name, name, warm=True)
        return range(before, self.pulses()[-1].memory + 1)

    def goes_on(self, at: range) -> list[Pulse]:
        """That it runs on from the checkpoint that was made when it had counted to one of ``at``."""
        seen = self.pulses(4)
        assert at.start <= seen[0].memory <= at.stop, "it is not the memory of that moment"
        assert all(one.memory == one.disk for one in seen), "its disk and its memory are of two moments"
        return seen

    def home(self, name: str) -> Path:
        return self.rig.place / "warm" / self.name / name


@pytest.fixture(scope="module", params=params(["qcow2", "zfs", "lvm-thin", "lvm-linked", "lvm-full"]))
def room(
    request: pytest.FixtureRequest,
    private: PrivateLibvirt,
    guest: small_guest.Guest,
    kvm: KvmVerdict,
) -> Iterator[LibvirtRig]:
    if request.param == "zfs":
        request.getfixturevalue("zfs_pool")
    with machines(request.param, private, guest, kvm) as rig:
        yield rig


@pytest.fixture(scope="module")
def counting(room: LibvirtRig) -> tuple[WarmVm, range]:
    """A machine with a warm checkpoint ``ready``, and how far it had counted by then."""
    vm = WarmVm(room, "prod")
    vm.boot()
    at = vm.keep("ready")
    assert vm.power is Power.RUNNING and vm.driver.memory_share(vm.name).private > 32 * MIB
    seen = vm.pulses(beyond=at.stop + 8)
    assert all(one.memory == one.disk for one in seen), "it runs on, on its disk"
    return vm, at


def test_it_is_kept_while_it_runs_and_goes_on_from_there(counting: tuple[WarmVm, range]) -> None:
    vm, at = counting
    kept = vm.kept("ready")
    assert kept.how == "mapped" and kept.size == vm.machine().memory and not kept.trouble
    assert 0 < kept.pause < 30 and len(kept.seal) == 64 and kept.used > MIB
    ids = set()
    for _ in range(3):
        vm.back("ready")
        assert vm.power is Power.SUSPENDED
        vm.driver.start(vm.name)
        assert vm.power is Power.RUNNING and vm.machine().started
        share = vm.driver.memory_share(vm.name)
        # Under KVM what a guest only reads is in its page tables, and not in QEMU's.
        assert share.shared > MIB, "what it hasn't written to is the file's"
        vm.goes_on(at)
        ids |= set(re.findall("<genid>(.*)</genid>", vm.driver._look_up(vm.name).XMLDesc(0)))
    assert len(ids) == 3, "each life is told that it is another one: see test_resume.py for the rest"


@of_any_store
def test_libvirt_does_not_ask_for_every_feature_of_its_cpu(counting: tuple[WarmVm, range]) -> None:
    """Of none: booted, run on from its memory, or kept when it had run on so."""
    vm, _ = counting
    seen = vm.driver._ours(vm.name).XMLDesc(0)
    assert seen.count("<qemu:del capability='cpu-unavailable-features'/>") == 1
    vm.back("ready")
    vm.driver.start(vm.name)
    vm.driver.checkpoint(vm.name, "asked", warm=True)
    vm.back("asked")
    vm.driver.start(vm.name)
    xml = vm.driver._ours(vm.name).XMLDesc(0)
    assert xml.count("<qemu:del capability='cpu-unavailable-features'/>") == 1
    vm.driver.stop(vm.name, grace=0)
    vm.driver.forget(vm.name, "asked")


def test_cold_it_boots_from_the_same_disk(counting: tuple[WarmVm, range]) -> None:
    vm, _ = counting
    vm.back("ready")
    vm.driver.start(vm.name, cold=True)
    assert vm.pulses()[0].memory == 0
    vm.driver.stop(vm.name, grace=0)
    if vm.rig.disks().pristine(vm.name, "ready", quick=True) is not None:  # full copies are read whole
        assert vm.power is Power.STOPPED, "something was written: its disk is no checkpoint any more"
    vm.driver.start(vm.name)
    assert vm.pulses()[0].memory == 0, "no memory is given to a disk that isn't the checkpoint's"


def test_another_checkpoint_of_that_name_has_not_its_memory(counting: tuple[WarmVm, range]) -> None:
    vm, _ = counting
    vm.driver.stop(vm.name, grace=0)
    vm.rig.disks().checkpoint(vm.name, "cold")
    shutil.copytree(vm.home("ready"), vm.home("cold"))
    seal = vm.home("cold") / "seal.json"
    seal.write_text(json.dumps(json.loads(seal.read_text()) | {"checkpoint": "cold"}))
    assert vm.power is Power.STOPPED
    vm.driver.start(vm.name)
    assert vm.pulses()[0].memory == 0
    left = [one.ref for one in vm.driver.leftovers() if one.kind == "memory"]
    assert left == [str(vm.home("cold"))]
    for one in vm.driver.leftovers():
        vm.driver.discard(one)
    assert not vm.home("cold").exists() and vm.home("ready").exists()


@of_any_store
def test_what_a_guest_gives_back_is_not_taken_from_its_checkpoint(
    counting: tuple[WarmVm, range],
) -> None:
    """QEMU punches holes into the file that it maps when a balloon is inflated."""
    vm, at = counting
    vm.back("ready")
    vm.driver.start(vm.name)
    vm.goes_on(at)
    sealed, face = (FileFacts.of(vm.home("ready") / name) for name in (MEMORY, FACE))
    vm.driver.balloon(vm.name, vm.machine().memory - 64 * MIB, timeout=60)
    assert FileFacts.of(vm.home("ready") / FACE) != face, (
        "QEMU doesn't do that any more: no copy is needed"
    )
    assert FileFacts.of(vm.home("ready") / MEMORY) == sealed
    vm.back("ready")
    vm.driver.start(vm.name)
    vm.goes_on(at)


@of_any_store
@pytest.mark.parametrize("how", ["gone", "short", "other", "qemu", "machine", "seal"])
def test_memory_that_cannot_be_used_is_refused_and_its_disk_boots(
    counting: tuple[WarmVm, range], how: str
) -> None:
    vm, at = counting
    home, words = vm.home("ready"), {
        "gone": "No such file", "short": "bytes, not the", "other": "is not what was sealed",
        "qemu": "QEMU was 1.0.0 when it was kept", "machine": "its machine type was pc-1.0",
        "seal": "its seal can't be read",
    }[how]  # fmt: skip
    vm.back("ready")
    aside = home.with_name(".aside")
    shutil.copytree(home, aside)
    memory, seal = home / MEMORY, home / "seal.json"
    if how == "gone":
        memory.unlink()
    elif how == "short":
        os.truncate(memory, 4096)
    elif how == "other":
        with memory.open("r+b") as file:
            file.write(b"X" * 64)
    elif how == "seal":
        os.truncate(seal, 40)
    else:
        facts = json.loads(seal.read_text())
        facts["runs_on"] |= {"qemu": "1.0.0"} if how == "qemu" else {"machine": "pc-1.0"}
        seal.write_text(json.dumps(facts))
    try:
        assert how == "other" or words in vm.kept("ready").trouble
        assert words in vm.driver.why_unusable(vm.name, "ready")
        with pytest.raises(WrongState, match=words):
            vm.driver.start(vm.name)
        assert vm.power is Power.SUSPENDED, "nothing was changed"
        vm.driver.start(vm.name, cold=True)
        assert vm.pulses()[0].memory == 0
    finally:
        shutil.rmtree(home)
        aside.rename(home)
    vm.back("ready")
    assert vm.driver.why_unusable(vm.name, "ready") == ""  # others by now: they are read whole, once
    vm.driver.start(vm.name)
    vm.goes_on(at)


@of_any_store
def test_it_outlives_a_libvirtd_that_was_killed(counting: tuple[WarmVm, range]) -> None:
    vm, at = counting
    vm.back("ready")
    vm.driver.start(vm.name)
    os.kill(int(next(vm.rig.private.directory.parent.rglob("libvirtd.pid")).read_text()), 9)
    vm.goes_on(at)
    assert vm.power is Power.RUNNING
    last = vm.keep("after")
    vm.back("after")
    vm.driver.start(vm.name)
    vm.goes_on(last)


@of_any_store
def test_memory_in_use_is_not_forgotten(counting: tuple[WarmVm, range]) -> None:
    vm, at = counting
    vm.back("ready")
    vm.driver.start(vm.name)
    with pytest.raises(WrongState, match="runs on from the memory"):
        vm.driver.forget(vm.name, "ready")
    vm.goes_on(at)
    vm.driver.checkpoint(vm.name, "second", warm=True)
    vm.driver.forget(vm.name, "second")
    assert "second" not in vm.driver.memories(vm.name) and vm.kept("ready")
    with pytest.raises(Conflict):
        vm.driver.checkpoint(vm.name, "ready", warm=True)
    assert vm.power is Power.RUNNING


def test_a_machine_that_was_given_its_memory_back_can_be_kept(counting: tuple[WarmVm, range]) -> None:
    vm, at = counting
    vm.back("ready")
    vm.driver.start(vm.name)
    vm.goes_on(at)
    vm.pulses(beyond=at.stop + 12)
    later = vm.keep("later")
    vm.back("later")
    vm.driver.start(vm.name)
    vm.goes_on(later)
    vm.back("ready")
    vm.driver.start(vm.name)
    vm.goes_on(at)


@pytest.fixture(scope="module")
def agent(room: LibvirtRig) -> Iterator[WarmVm]:
    """A machine whose guest has an agent; kept as ``ready``."""
    vm = WarmVm(room, "agent")
    vm.boot("agent=qemu")
    vm.keep("ready")
    yield vm
    vm.driver.destroy(vm.name)


def _asked(vm: WarmVm) -> list[str]:
    """What of freezing its agent was asked for since its start, in that order."""
    log = vm.driver.console(vm.name).log
    assert log
    return re.findall("fsfreeze-(freeze|thaw)", log.read_text(errors="replace"))


def _is_thawed(vm: WarmVm, *, freezes: int) -> None:
    """Wait until it was asked to freeze so often, and to thaw after it."""
    limit = time.monotonic() + _PATIENCE
    while (said := _asked(vm)).count("freeze") < freezes or said[-1] != "thaw":
        assert time.monotonic() < limit, said
        time.sleep(0.05)
    vm.pulses(beyond=vm.pulses()[-1].memory + 2)
    assert vm.power is Power.RUNNING


@of_any_store
def test_a_guest_with_an_agent_is_kept_frozen_and_thawed_in_each_life(agent: WarmVm) -> None:
    kept = agent.kept("ready")
    assert kept.quiesced and kept.frozen > kept.pause > 0
    for _ in range(2):
        agent.back("ready")
        agent.driver.start(agent.name)
        assert "fsfreeze-freeze" not in agent.rig.wait_for(agent.vm, "fsfreeze-thaw")


def _unheard(real: Callable[..., int], error: BaseException) -> Callable[..., int]:
    """The agent does it, and whoever asked does not hear of it."""

    def asked(domain: libvirt.virDomain, *rest: object) -> int:
        real(domain, *rest)
        raise error

    return asked


@of_any_store
@pytest.mark.parametrize("how", ["disk", "slow", "ctrl-c"])
def test_whatever_fails_its_guest_runs_on_thawed(
    agent: WarmVm, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    busy = _agent_error(libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
    freezes, real_thaw, deaf = _asked(agent).count("freeze") + 1, libvirt.virDomain.fsThaw, [busy] * 3

    def thaw(domain: libvirt.virDomain, *rest: object) -> int:
        if deaf:
            raise deaf.pop()
        return int(real_thaw(domain, *rest))

    if how == "disk":
        monkeypatch.setattr(Keeping, "keep_disk", _fails)
    else:
        error = busy if how == "slow" else KeyboardInterrupt()
        asked = _unheard(libvirt.virDomain.fsFreeze, error)
        monkeypatch.setattr(libvirt.virDomain, "fsFreeze", asked)
        monkeypatch.setattr(libvirt.virDomain, "fsThaw", thaw)  # it is still busy with that
    if how == "slow":
        agent.keep("slow")
    else:
        with pytest.raises((DriverFailed, KeyboardInterrupt)):
            agent.driver.checkpoint(agent.name, how, warm=True)
    monkeypatch.undo()
    _is_thawed(agent, freezes=freezes)
    assert agent.driver.settle(agent.name) == ""
    if how == "slow":
        kept = agent.kept("slow")
        assert kept.frozen and not kept.quiesced
        agent.back("slow")
        agent.driver.start(agent.name)
        assert "fsfreeze-freeze" not in agent.rig.wait_for(agent.vm, "fsfreeze-thaw")


@of_any_store
def test_an_agent_that_freezes_nothing_is_not_waited_for(
    agent: WarmVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt.virDomain, "fsFreeze", _refuses)
    monkeypatch.setattr(libvirt.virDomain, "fsThaw", _refuses)
    agent.keep("refused")
    kept = agent.kept("refused")
    assert not kept.quiesced and kept.frozen == 0


@of_any_store
def test_killed_while_it_is_frozen_it_runs_on_thawed_by_itself(agent: WarmVm) -> None:
    for number in range(1, 20):
        freezes = _asked(agent).count("freeze") + 1
        steps = _killed(agent, f"k{number}", number)
        if steps.endswith("keep_disk()\n"):  # it is paused, too
            break
        agent.driver.settle(agent.name)
    assert steps.endswith("keep_disk()\n"), steps
    _is_thawed(agent, freezes=freezes)
    assert "is gone" in agent.driver.settle(agent.name)
    assert agent.driver.settle(agent.name) == ""


@of_any_store
def test_one_that_could_not_be_let_go_is_let_go_by_the_guard(
    agent: WarmVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    freezes = _asked(agent).count("freeze") + 1
    monkeypatch.setattr(Keeping, "release", _fails)
    with pytest.raises(DriverFailed, match="it can't be done"):
        agent.driver.checkpoint(agent.name, "held", warm=True)
    assert agent.power is Power.RUNNING
    monkeypatch.undo()
    _is_thawed(agent, freezes=freezes)
    agent.driver.settle(agent.name)
    assert agent.driver.settle(agent.name) == ""


@of_any_store
def test_what_nobody_let_go_or_thawed_is_left_to_recovery(
    agent: WarmVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor forgotten by it while the agent doesn't answer."""
    freezes = _asked(agent).count("freeze") + 1
    monkeypatch.setattr(guard, "_CODE", "print('ready', flush=True); input()")
    monkeypatch.setattr(warm_machines, "release_all", _fails)
    with pytest.raises(DriverFailed, match="it can't be done"):
        agent.driver.checkpoint(agent.name, "left", warm=True)
    assert agent.power is Power.PAUSED
    monkeypatch.undo()
    monkeypatch.setattr(guest_agent, "THAWS", 0.0)
    monkeypatch.setattr(libvirt.virDomain, "fsThaw", _deaf)
    for _ in range(2):
        with pytest.raises(DriverFailed, match="did not say"):
            agent.driver.settle(agent.name)
        assert agent.power is Power.RUNNING
    monkeypatch.undo()
    agent.driver.settle(agent.name)
    _is_thawed(agent, freezes=freezes)
    assert agent.driver.settle(agent.name) == ""
    agent.driver._ours(agent.name).suspend()  # an admin's
    assert agent.driver.settle(agent.name) == ""
    assert agent.power is Power.PAUSED
    agent.driver._ours(agent.name).resume()


@of_any_store
def test_cut_off_before_it_is_thawed_it_is_thawed_by_recovery(
    agent: WarmVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, and was given back a memory of when it was frozen: nobody ends it."""
    agent.back("ready")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(guest_agent, "thaw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        agent.driver.start(agent.name)
    monkeypatch.undo()
    assert agent.power is Power.RUNNING
    assert agent.machine().started is None
    agent.driver.settle(agent.name)
    assert agent.machine().started is not None
    assert "fsfreeze-freeze" not in agent.rig.wait_for(agent.vm, "fsfreeze-thaw")


@of_any_store
def test_a_libvirtd_that_is_started_anew_forgets_no_machine(
    agent: WarmVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    freezes = _asked(agent).count("freeze") + 1

    def killed(_: Keeping) -> None:
        os.kill(int(next(agent.rig.private.directory.parent.rglob("libvirtd.pid")).read_text()), 9)
        raise DriverFailed("it is gone")

    monkeypatch.setattr(Keeping, "keep_disk", killed)
    with pytest.raises(FarmhandError):
        agent.driver.checkpoint(agent.name, "anew", warm=True)
    monkeypatch.undo()
    agent.driver.settle(agent.name)
    _is_thawed(agent, freezes=freezes)
    assert agent.driver.settle(agent.name) == ""


def _fails(*_: object) -> None:
    raise DriverFailed("it can't be done")


def _agent_error(code: int) -> libvirt.libvirtError:
    error = libvirt.libvirtError("its agent didn't")
    error.err = (code, 0, "its agent didn't", 2, "", "", "", 0, 0)
    return error


def _deaf(*_: object) -> int:
    raise _agent_error(libvirt.VIR_ERR_AGENT_UNRESPONSIVE)


def _refuses(*_: object) -> int:
    raise _agent_error(libvirt.VIR_ERR_OPERATION_UNSUPPORTED)


def test_several_are_kept_at_one_moment(room: LibvirtRig, monkeypatch: pytest.MonkeyPatch) -> None:
    vms = [WarmVm(room, "one"), WarmVm(room, "two")]
    for vm in vms:
        vm.boot()
    names = [vm.name for vm in vms]
    driver, needed = room.hypervisor(), []
    order: dict[tuple[str, str], None] = {}  # by when each was first called
    for method in ("freeze", "begin", "copied", "go_on", "keep_disk", "end", "release"):
        real = getattr(Keeping, method)
        monkeypatch.setattr(
            Keeping, method,
            lambda keeping, m=method, r=real: (order.setdefault((m, keeping.machine)), r(keeping))[1],
        )  # fmt: skip
    real_need = MemoryImages.need
    monkeypatch.setattr(
        MemoryImages, "need", lambda images, sizes: (needed.append(sizes), real_need(images, sizes))
    )
    assert set(driver.checkpoint_all(names, "both")) == set(names)
    steps = ("freeze", "begin", "copied", "go_on", "keep_disk", "end", "release")
    assert [step for step, _ in order] == [step for step in steps for _ in names]
    assert [set(sizes) for sizes in needed] == [set(names)], "there must be room for all of them"
    for vm in vms:
        vm.pulses(beyond=vm.pulses()[-1].memory + 3)
    vms[0].driver.stop(vms[0].name, grace=0)
    with pytest.raises(WrongState, match="is stopped"):
        driver.checkpoint_all(names, "again")
    assert vms[1].power is Power.RUNNING and set(vms[1].driver.memories(names[1])) == {"both"}
    for vm in vms:
        driver.destroy(vm.name)
        assert not vm.home("both").parent.exists()


_KILLED = """\
import os, signal, sys
from machine_rigs import KATA
from hypervisors.libvirt.domain_types import Qemu
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.kvm import KvmVerdict
from hypervisors.libvirt.warm.place import MemoryPlace
from hypervisors.disks.qcow2.disks import Qcow2Disks
from host.run import Runner
from pathlib import Path
from dataclasses import replace
from hypervisors.libvirt.warm import machines
from hypervisors.libvirt.warm.keeping import Keeping
from hypervisors.libvirt.warm.images import MemoryImages as Images
from hypervisors.libvirt.warm.saving import Saving
uri, root, warm, reader, maps, name, what, number = sys.argv[1:]
reader = int(reader) if reader else None
seen = 0
def step(text):
    global seen
    seen += 1
    print(text, flush=True)
    if seen == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
def dies_before(kind, method):
    real = getattr(kind, method)
    def either(*arguments):
        step(f"{method}()")
        return real(*arguments)
    setattr(kind, method, either)
dies_before(machines, "copy_all")
for method in (
    "begin", "freeze", "go_on", "keep_disk", "_move", "end", "release", "note", "settle", "seal",
):
    dies_before(Keeping, method)
for method in ("hold", "save", "run_on", "seal"):
    dies_before(Saving, method)
dies_before(Qcow2Disks, "checkpoint_all")
dies_before(Qcow2Disks, "settle_live")
dies_before(Images, "finish")
disks = Qcow2Disks(Path(root), KATA, Runner(), step=step, reader_uid=reader)
kind = replace(Qemu(KvmVerdict(False, "")), maps_memory=maps == "yes")
driver = LibvirtHypervisor(uri, KATA, disks, Runner(), step=step, kind=kind,
                           memory=MemoryPlace(Path(warm), KATA, reader))
if what == "start":
    driver.start(name)
else:
    driver.checkpoint(name, what, warm=True)
"""


def _killed(vm: WarmVm, what: str, number: int) -> str:
    """Do it in a process that kills itself at a step; returns its steps."""
    rig = vm.rig
    maps = "yes" if rig.kind.maps_memory else ""
    arguments = [rig.uri(), str(rig.store.root), str(rig.place / "warm"), str(rig.reader or ""), maps]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments, vm.name, what, str(number)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode in (0, -9), done.stderr
    return "" if done.returncode == 0 else done.stdout


@of_any_store  # the stores' kills: test_live_disks.py
def test_killed_at_any_step_it_runs_on_and_nothing_is_torn(counting: tuple[WarmVm, range]) -> None:
    vm, at = counting
    vm.back("ready")
    vm.driver.start(vm.name)
    vm.goes_on(at)
    for number in range(1, 60, 1 if os.environ.get("FARMHAND_KILLS") == "many" else 3):
        name = f"k{number}"
        before = vm.pulses()[-1].memory
        steps = _killed(vm, name, number)
        if not steps:
            break
        vm.pulses(beyond=vm.pulses()[-1].memory + 3)  # by itself: whoever was killed is not needed
        assert vm.power is Power.RUNNING
        vm.driver.settle(vm.name)
        assert vm.driver.settle(vm.name) == ""
        assert not [one for one in vm.driver.leftovers() if one.ref.startswith(str(vm.home("")))], steps
        after = vm.pulses()[-1].memory
        seen = vm.pulses(beyond=after + 2)
        assert all(one.memory == one.disk for one in seen), steps
        there = {one.name for one in vm.rig.disks().find(vm.name).checkpoints}
        if name in vm.driver.memories(vm.name):
            assert name in there
            vm.back(name)
            vm.driver.start(vm.name)
            vm.goes_on(range(before, after + 1))
        elif name in there:
            vm.back(name)
            assert vm.power is Power.STOPPED, "a cold one"
            vm.back("ready")
            vm.driver.start(vm.name)
    assert number > 4, "it was killed in between"


@of_any_store
@pytest.mark.parametrize("at_resume", [False, True])
def test_killed_while_it_is_given_its_memory_back_it_is_not_left_paused(
    counting: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch, at_resume: bool
) -> None:
    """It never ran for sure: it is ended. It was about to: it runs on."""
    vm, at = counting
    vm.back("ready")
    real = libvirt.virDomain.resume
    where, what = (libvirt.virDomain, "resume") if at_resume else (warm_machines, "note_start")
    monkeypatch.setattr(where, what, _killed_here)
    monkeypatch.setattr(libvirt.virDomain, "destroy", lambda _domain: 0)  # a killed one does no more
    with pytest.raises(KeyboardInterrupt):
        vm.driver.start(vm.name)
    monkeypatch.undo()
    assert libvirt.virDomain.resume is real and vm.power is Power.PAUSED
    assert vm.machine().started is None
    assert ("and runs on" if at_resume else "it is off, its disk unchanged") in vm.driver.settle(vm.name)
    if at_resume:
        assert vm.power is Power.RUNNING and vm.machine().started
    else:
        assert vm.power is Power.SUSPENDED
        vm.driver.start(vm.name)
    vm.goes_on(at)


@of_any_store
@pytest.mark.parametrize("noted", [False, True])
def test_one_that_ran_is_never_ended_as_half_started(
    counting: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    """What it has in memory is nowhere else. Whoever started it was killed before he had noted that, and
    now it stands still; where he had, an admin has suspended it, and it stays so."""
    vm, at = counting
    vm.back("ready")
    if not noted:
        monkeypatch.setattr(libvirt_driver, "note_start", lambda _domain: None)
    vm.driver.start(vm.name)
    monkeypatch.undo()
    vm.pulses(beyond=at.stop + 2)
    vm.driver._ours(vm.name).suspend()
    before = vm.pulses()[-1].memory
    (vm.home("") / ".farmhand-new-00000000-other").mkdir()  # another's remains say nothing of its pause
    vm.driver.settle(vm.name)
    assert vm.power is (Power.PAUSED if noted else Power.RUNNING)
    if noted:
        vm.driver._ours(vm.name).resume()
    seen = vm.pulses(beyond=before + 3)
    assert all(one.memory == one.disk for one in seen)


def test_a_full_disk_leaves_it_running(
    counting: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, at = counting
    vm.back("ready")
    vm.driver.start(vm.name)
    vm.goes_on(at)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    def fuller(*_: object) -> None:
        raise NoSpace("others have filled it meanwhile")

    for where, what, does in (
        (os, "pwrite", full), (keeping, "need", fuller), (Path, "touch", full), (images, "sync", full),
    ):  # fmt: skip
        monkeypatch.setattr(where, what, does)
        with pytest.raises(NoSpace):
            vm.driver.checkpoint(vm.name, "full", warm=True)
        monkeypatch.undo()
        assert vm.power is Power.RUNNING and "full" not in vm.driver.memories(vm.name)
        vm.pulses(beyond=vm.pulses()[-1].memory + 3)
        if where is images:  # all was there
            assert vm.driver.settle(vm.name) == "its memory is kept as full"
        assert [p.name for p in vm.home("").iterdir() if p.name.startswith(".farmhand")] == []


@of_any_store
def test_what_it_has_not_touched_of_its_memory_needs_room_too(
    counting: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, _ = counting
    vm.back("ready")
    vm.driver.start(vm.name)
    monkeypatch.setattr(libvirt.virDomain, "memoryStats", lambda _: {"rss": 4})
    domain = vm.driver._ours(vm.name)
    made = Keeping(domain, vm.rig.disks(), MemoryImages(vm.driver._memory), "more", Callbacks())
    assert made.needs() == blocks(vm.home("ready") / FACE) > MIB


@of_any_store
def test_its_seal_tells_the_qemu_that_wrote_it(
    counting: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another one was installed since, that could not be given what is kept now: it is refused."""
    vm, _ = counting
    connection = vm.driver._connect()
    installed = warm_machines._installed_version(connection)
    assert vm.kept("ready").vcpus == vm.machine().vcpus
    sealed = json.loads((vm.home("ready") / "seal.json").read_text())
    assert sealed["runs_on"]["qemu"] == installed
    vm.back("ready")
    vm.driver.start(vm.name)
    monkeypatch.setattr(warm_machines, "_installed_version", lambda _: "99.1.0")
    with pytest.raises(WrongState, match=f"runs in QEMU {installed}, and 99.1.0 is installed"):
        vm.driver.checkpoint(vm.name, "newer", warm=True)
    assert vm.power is Power.RUNNING
    assert [kept.name for kept in vm.rig.disks().find(vm.name).checkpoints if kept.name == "newer"] == []


# Last in this file: its machines' rig ends all others of this daemon.


@pytest.fixture
def saved(
    private: PrivateLibvirt, guest: small_guest.Guest, kvm: KvmVerdict
) -> Iterator[tuple[WarmVm, range]]:
    """As ``counting``, on a host whose QEMU can't map memory."""
    with machines("qcow2", private, guest, kvm) as rig:
        rig.kind = replace(rig.kind, maps_memory=False)
        vm = WarmVm(rig, "saved")
        vm.boot()
        yield vm, vm.keep("ready")


def test_what_is_not_understood_is_saved_by_libvirt(
    saved: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another QEMU's migration stream; and files that AppArmor keeps QEMU from."""
    vm, _ = saved
    vm.rig.kind = replace(vm.rig.kind, maps_memory=True)
    vm.driver = vm.rig.hypervisor()
    real = migration_stream.StreamSplitter._begin
    monkeypatch.setattr(migration_stream.StreamSplitter, "_begin", _unknown)
    at = vm.keep("unknown")
    monkeypatch.setattr(migration_stream.StreamSplitter, "_begin", real)
    assert vm.kept("unknown").how == "read"
    assert vm.driver.capabilities().warm == "mapped"
    for room in (warm_machines, definition):
        monkeypatch.setattr(room, "file_guard", lambda _capabilities: "apparmor")
    vm.driver = vm.rig.hypervisor()
    assert vm.driver.capabilities().warm == "", "nobody has asked it"
    assert vm.power is Power.RUNNING
    assert vm.driver.capabilities().warm == "read"
    vm.keep("guarded")
    assert vm.kept("guarded").how == "read"
    vm.back("unknown")
    vm.driver.start(vm.name)
    vm.goes_on(at)


def _unknown(*_: object) -> None:
    raise Unsupported("QEMU's migration stream has sections of the unknown kind 9")


def test_libvirt_saves_and_restores_where_memory_cannot_be_mapped(
    saved: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, at = saved
    assert vm.kept("ready").how == "read"
    assert vm.driver.capabilities().warm == "read"
    for _ in range(2):
        vm.back("ready")
        assert vm.power is Power.SUSPENDED
        vm.driver.start(vm.name)
        vm.goes_on(at)
    monkeypatch.setattr(saving, "bring_back", lambda *_, **__: None)  # as if killed before it runs on
    monkeypatch.setattr(MemoryImages, "finish", _killed_here)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        vm.driver.checkpoint(vm.name, "cut", warm=True)
    monkeypatch.undo()
    assert vm.power is not Power.RUNNING
    assert "runs on" in vm.driver.settle(vm.name)
    seen = vm.pulses(3)
    assert all(one.memory == one.disk for one in seen) and seen[0].memory > at.start
    assert set(vm.driver.memories(vm.name)) == {"ready"} and vm.driver.settle(vm.name) == ""


def test_killed_while_libvirt_saves_it_it_runs_on(saved: tuple[WarmVm, range]) -> None:
    """At once where it was paused; else when it is recovered, with all that it knew."""
    vm, _ = saved
    for number in range(1, 30):
        before = vm.pulses()[-1].memory
        steps = _killed(vm, f"k{number}", number)
        if not steps:
            break
        last = steps.split("\n")[-2]
        vm.driver.settle(vm.name)
        assert vm.driver.settle(vm.name) == "", last
        assert vm.power is Power.RUNNING, last
        _never_started_anew(vm.pulses(beyond=before + 4))
        assert not [one for one in vm.driver.leftovers() if one.kind == "memory"], last
    assert {"save()", "run_on()", "seal()"} < set(steps.split("\n")) or not steps
    assert number > 6


def test_memory_that_can_t_be_given_back_is_kept(
    saved: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two machines the other one runs on all the same. It is tried once more, and then set apart: the
    disk may be another by then."""
    vm, _ = saved
    other = WarmVm(vm.rig, "other")
    other.boot()
    real = saving.restore

    def memory() -> list[str]:
        return [one.ref for one in vm.driver.leftovers() if one.kind == "memory"]

    def fails(domain: libvirt.virDomain, place: Path, disks: Disks, *, paused: bool) -> None:
        if domain.name() == vm.name:
            raise DriverFailed("no memory is left on this host")
        real(domain, place, disks, paused=paused)

    monkeypatch.setattr(saving, "restore", fails)
    before, others = vm.pulses()[-1].memory, other.pulses()[-1].memory
    for name in ("first", "both"):
        with pytest.raises(DriverFailed, match="no memory is left"):
            vm.driver.checkpoint_all([vm.name, other.name], name)
        assert vm.power is Power.STOPPED
        other.pulses(beyond=others + 3)
        if name == "first":  # and then there is some again
            monkeypatch.setattr(saving, "restore", real)
            assert "runs on" in vm.driver.settle(vm.name)
            _never_started_anew(vm.pulses(beyond=before + 3))
            assert not memory()
            monkeypatch.setattr(saving, "restore", fails)
    assert "what was saved stays in" in vm.driver.settle(vm.name)
    monkeypatch.undo()
    (apart,) = memory()
    assert vm.driver.settle(vm.name) == ""
    assert vm.power is Power.STOPPED
    vm.driver.start(vm.name)
    assert vm.pulses(3)[0].memory == 0
    assert (vm.driver.settle(vm.name), memory()) == ("", [apart])
    for one in vm.driver.leftovers():
        vm.driver.discard(one)
    assert not memory()


def test_saved_memory_is_not_given_to_a_disk_that_has_changed(
    saved: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host lost its power meanwhile; or somebody started it, by libvirt's own tools, before it was
    recovered."""
    vm, _ = saved
    _saved_and_killed(vm, "cut", monkeypatch)
    (place,) = vm.home("").glob(".farmhand-new-*-cut")
    (place / ONLY).write_text("another boot")
    assert "the host has booted since" in vm.driver.settle(vm.name)
    assert vm.power is Power.STOPPED and place.is_dir()
    vm.driver.start(vm.name)
    assert vm.pulses()[0].memory == 0
    _saved_and_killed(vm, "again", monkeypatch)
    domain = vm.driver._ours(vm.name)
    domain.create()
    vm.pulses(3)
    domain.destroy()
    assert "its disk has changed since" in vm.driver.settle(vm.name)
    assert vm.power is Power.STOPPED
    vm.driver.start(vm.name)
    assert vm.pulses()[0].memory == 0


def _saved_and_killed(vm: WarmVm, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is off, and its memory is nowhere else."""
    with monkeypatch.context() as patch:
        patch.setattr(saving, "restore", _killed_here)
        with pytest.raises(KeyboardInterrupt):
            vm.driver.checkpoint(vm.name, name, warm=True)


def _never_started_anew(seen: list[Pulse]) -> None:
    assert [one.memory for one in seen] == sorted({one.memory for one in seen})
    assert all(one.memory == one.disk for one in seen)


def test_without_a_guard_nothing_is_paused(
    saved: tuple[WarmVm, range], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, _ = saved
    monkeypatch.setattr(guard, "_CODE", "raise SystemExit('libvirt is not there')")
    monkeypatch.setattr(saving.Saving, "hold", lambda _: pytest.fail("it was paused"))
    with pytest.raises(DriverFailed, match=r"nobody would let .* run on .*: libvirt is not there"):
        vm.driver.checkpoint(vm.name, "more", warm=True)
    assert vm.power is Power.RUNNING


def test_a_host_that_guards_files_is_seen() -> None:
    text = "<capabilities><host>{}</host></capabilities>"
    model = "<secmodel><model>{}</model></secmodel>"
    assert file_guard(text.format(model.format("none") + model.format("apparmor"))) == "apparmor"
    assert file_guard(text.format(model.format("dac"))) == ""


def _killed_here(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
