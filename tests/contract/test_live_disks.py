"""The contract of a store that keeps a disk while a paused machine has it open
(hypervisors.api.LiveDisks), on each. The machine is a qemu-storage-daemon: QEMU's block layer without a
guest."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from machine_rigs import emulated
from rigs import MUTE, SIZE, opened, params, sealed

from hypervisors.api import Disk, LiveDisks, Owner
from inventory.errors import Conflict, DriverFailed, NoSpace
from tests.identities import KATA

PROD = Owner(KATA, "prod")
LIVE = ("qcow2", "zfs", "zfs-files", "lvm-thin", "lvm-linked", "lvm-full")
OFFSET = {"first": "1M", "second": "2M"}
"""Places on a disk; the rigs read and write the first."""


STILL = 60
"""So many looks, a second apart, at a daemon that owes an answer find none of its threads running, nor
waiting for a processor or a disk, and no processor time used since: it hangs. A slow one is waited
for."""


class Hung(Exception):
    """``str(error)`` says where its threads stand."""


class Machine:
    """Has a disk open, and writes to it as it is told."""

    def __init__(self, place: Path, disk: Disk) -> None:
        self.place = place
        place.mkdir(exist_ok=True)
        self.nbd, self.qmp = place / "nbd", place / "qmp"
        try:
            self._start(disk)
        except Hung as hung:
            if not emulated():
                raise
            # As one nested guest in some hundreds does there; it has written nothing
            MUTE.append(f"qemu-storage-daemon: {hung}")
            self.end()
            self._start(disk)

    def _start(self, disk: Disk) -> None:
        for path in (self.nbd, self.qmp):
            path.unlink(missing_ok=True)
        driver = "file" if disk.path.resolve().is_file() else "host_device"
        # As libvirt has it: "auto-read-only" opens the file again, by its name
        file = {"driver": driver, "filename": str(disk.path), "auto-read-only": True}
        self.process = subprocess.Popen(
            ["qemu-storage-daemon",
             "--blockdev", json.dumps({"driver": disk.format, "file": file, "node-name": "disk"}),
             "--nbd-server", f"addr.type=unix,addr.path={self.nbd}",
             "--export", "nbd,id=e,node-name=disk,name=d,writable=on",
             "--chardev", f"socket,id=q,path={self.qmp},server=on,wait=off", "--monitor", "chardev=q"]
        )  # fmt: skip
        while self.process.poll() is None:
            try:
                self._top()
                return
            except (FileNotFoundError, ConnectionRefusedError):  # not there yet
                time.sleep(0.01)
        raise AssertionError("it has ended")

    def ask(self, command: str, **arguments: object) -> Any:
        with socket.socket(socket.AF_UNIX) as there:
            there.connect(str(self.qmp))
            lines = self._lines(there)
            assert "QMP" in next(lines)
            for execute, more in (("qmp_capabilities", {}), (command, arguments)):
                there.sendall(json.dumps({"execute": execute, "arguments": more}).encode())
                answer = next(lines)
                while "event" in answer:
                    answer = next(lines)
                assert "return" in answer, answer
            return answer["return"]

    def _lines(self, there: socket.socket) -> Iterator[Any]:
        data = b""
        while True:
            *whole, data = data.split(b"\n")
            yield from map(json.loads, whole)
            still, stood = 0, None
            while not select.select([there], [], [], 1)[0]:
                seen = tuple(self._threads())
                still = still + 1 if seen == stood else 0
                stood = seen
                if still >= STILL and all(state == "S" for state, *_ in seen):
                    raise Hung(str(seen))
            got = there.recv(2**16)
            if not got:
                raise ConnectionResetError(f"it hung up; it ended with {self.process.poll()}")
            data += got

    def _threads(self) -> Iterator[tuple[str, str, str, str]]:
        """Of each its state, processor time in user and kernel mode, and place in the kernel
        (proc(5))."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                words = (task / "stat").read_text().rpartition(")")[2].split()
                yield words[0], words[11], words[12], (task / "wchan").read_text()

    def write(self, letter: str, where: str = "first") -> None:
        self._io(f"write -P {ord(letter)} {OFFSET[where]} 64k", "flush")

    def read(self, where: str = "first") -> str:
        return _letter(self._io(f"read -v {OFFSET[where]} 512"))

    def move(self, path: Path) -> None:
        """As a hypervisor does it, while the machine is paused."""
        self.ask(
            "blockdev-snapshot-sync",
            **{"node-name": self._top(), "snapshot-file": str(path), "snapshot-node-name": path.stem,
               "format": "qcow2", "mode": "existing"},
        )  # fmt: skip

    def opened(self) -> Path:
        """The file it writes to, by the name that it knows."""
        nodes = {node["node-name"]: node for node in self.ask("query-named-block-nodes")}
        return Path(nodes[self._top()]["image"]["filename"])

    def read_only(self) -> list[bool]:
        """Of the images below the present one."""
        nodes = self.ask("query-named-block-nodes")
        return [n["ro"] for n in nodes if n["drv"] == "qcow2" and n["node-name"] != self._top()]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _top(self) -> str:
        (export,) = self.ask("query-block-exports")
        top: str = export["node-name"]
        return top

    def _io(self, *commands: str) -> str:
        argv = ["qemu-io", "-f", "raw", *(w for c in commands for w in ("-c", c))]
        done = subprocess.run(
            [*argv, f"nbd+unix:///d?socket={self.nbd}"], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _letter(dump: str) -> str:
    return chr(int(dump.split(":")[1].split(maxsplit=1)[0], 16))


@pytest.fixture(params=params(LIVE))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param.startswith("zfs"):
        request.getfixturevalue("zfs_pool")
    with opened(request.param, tmp_path) as rig:
        yield rig


@pytest.fixture
def made(store) -> LiveDisks:
    disks = store.disks()
    disks.clone(sealed(store, disks), "kata-prod", PROD, SIZE)
    return disks


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[LiveDisks], Machine]]:
    """Starts the machine of a store's disk."""
    machines: list[Machine] = []

    def start(disks: LiveDisks) -> Machine:
        disks.settle_live("kata-prod", None)
        ready = getattr(disks, "ready", disks.find)
        machines.append(Machine(tmp_path / "machine", ready("kata-prod")))
        return machines[-1]

    yield start
    for machine in machines:
        machine.end()


def keep(disks: LiveDisks, machine: Machine, name: str):
    """As a hypervisor does it."""
    disks.before_live("kata-prod", name)
    taken = disks.checkpoint_live("kata-prod", name, machine.move)
    machine.write("x", "second")
    disks.settle_live("kata-prod", machine.opened())
    return taken


def names(disks: LiveDisks) -> list[str]:
    return [c.name for c in disks.find("kata-prod").checkpoints]


def test_a_store_says_that_it_can(made):
    assert isinstance(made, LiveDisks)


def test_a_running_machines_disk_is_kept_again_and_again(store, made, run):
    machine = run(made)
    machine.write("1", "second")
    taken = []
    for letter in "ABC":
        machine.write(letter)
        taken.append(keep(made, machine, letter))
        assert (machine.read(), machine.read("second")) == (letter, "x")
        machine.write(letter.lower(), "second")
        assert not made.pristine("kata-prod", letter)
        assert list(made.leftovers()) == []
    assert all(machine.read_only())
    machine.write("Z")
    machine.end()
    disk = made.find("kata-prod")
    assert disk.checkpoints[1:] == tuple(taken)
    assert disk.base == ("clean" if store.kind == "lvm-linked" else "C")
    assert store.read("kata-prod") == "Z"
    assert list(made.leftovers()) == []
    for name in ("B", "A", "C", "clean"):
        made.restore("kata-prod", name)
        assert store.read("kata-prod") == ("T" if name == "clean" else name)
        assert made.pristine("kata-prod", name)
        assert made.find("kata-prod").checkpoints == disk.checkpoints
    machine = run(made)
    machine.write("D")
    keep(made, machine, "D")
    machine.end()
    made.checkpoint("kata-prod", "cold")
    assert names(made) == ["clean", "A", "B", "C", "D", "cold"]
    assert made.restore("kata-prod", "D").base == "D"
    assert store.read("kata-prod") == "D"
    made.destroy("kata-prod")
    assert list(made.leftovers()) == []


def test_what_is_on_the_disk_beside_stays_to_be_seen(made, run):
    """What was written before a checkpoint is read from below it."""
    machine = run(made)
    for name in ("one", "two", "three"):
        machine.write(name[0], "second")
        made.before_live("kata-prod", name)
        made.checkpoint_live("kata-prod", name, machine.move)
        made.settle_live("kata-prod", machine.opened())
        machine.write("A")
        assert machine.read("second") == name[0]


def test_a_checkpoint_has_a_name_of_its_own_for_good(store, made, run):
    (clean,) = made.find("kata-prod").checkpoints
    cold = made.checkpoint("kata-prod", "one")
    live = keep(made, machine := run(made), "two")
    machine.end()
    seen = (made.find("kata-prod").checkpoints, made.list()[0].checkpoints)
    assert seen == ((clean, cold, live),) * 2
    assert all(c.id for c in seen[0]) and len({c.id for c in seen[0]}) == 3
    made.restore("kata-prod", "one")
    assert made.find("kata-prod").checkpoints == seen[0]
    made.destroy("kata-prod")
    made.clone(made.templates()[0], "kata-prod", PROD, SIZE)
    again = made.checkpoint_all(["kata-prod"], "one")["kata-prod"]
    assert again.id not in {c.id for c in seen[0]}
    assert made.find("kata-prod").checkpoints[0].id == clean.id


def test_names_are_taken_once_and_room_is_looked_at_first(store, made, run):
    machine = run(made)
    keep(made, machine, "one")
    for name in ("one", "clean"):
        with pytest.raises(Conflict):
            made.before_live("kata-prod", name)
    with pytest.raises(NoSpace):
        store.disks(headroom=2**60).before_live("kata-prod", "two")
    made.settle_live("kata-prod", machine.opened())
    made.settle_live("kata-nobody", None)
    assert names(made) == ["clean", "one"]
    assert list(made.leftovers()) == []
    machine.write("A")
    assert machine.read() == "A"


def test_given_up_before_the_pause_it_is_as_if_nothing_had_been(store, made, run):
    machine = run(made)
    machine.write("A")
    for _ in range(2):
        made.before_live("kata-prod", "one")
        machine.write("B")
        assert list(made.leftovers()) == []
        assert names(made) == ["clean"]
        made.settle_live("kata-prod", machine.opened())
        assert list(made.leftovers()) == []
    assert machine.read() == "B"
    keep(made, machine, "one")
    machine.end()
    made.restore("kata-prod", "one")
    assert store.read("kata-prod") == "B"


@pytest.mark.parametrize("store", ["qcow2"], indirect=True)  # of the others none is moved
def test_a_machine_that_cannot_be_moved_stays_where_it_is(store, made, run):
    machine = run(made)
    machine.write("A")
    made.before_live("kata-prod", "one")

    def fail(_path: Path) -> None:
        raise DriverFailed("it doesn't answer")

    with pytest.raises(DriverFailed):
        made.checkpoint_live("kata-prod", "one", fail)
    made.settle_live("kata-prod", machine.opened())
    assert names(made) == ["clean"]
    machine.write("B")
    machine.end()
    assert store.read("kata-prod") == "B"


CHANGES = {
    "os.rename", "os.remove", "os.link", "os.symlink", "os.chmod", "os.utime", "os.mkdir", "os.rmdir",
    "subprocess.Popen", "socket.connect",
}  # fmt: skip
"""And "open", to write, but for locks. Audit events of Python: each is told before it is done."""


FATES = ("writes on", "writes and dies", "dies at once", "is reset", "is kept")
"""Of a machine whose disk was being kept by a process that was killed."""


def killed_before(number: int, act: Callable[[], object]) -> bool:
    """Do it in a process of its own, killed before its change of that number. Whether it was."""
    pid = os.fork()
    if pid == 0:
        left = number

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            opens = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or (opens and not str(args[0]).endswith(("lock", os.devnull))):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            act()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - it is told by the exit status
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in {0, -signal.SIGKILL}
    return code != 0


def collect(disks: LiveDisks) -> None:
    """As gc does, in the middle of whatever is left to be settled."""
    for leftover in disks.leftovers():
        disks.discard(leftover)
    assert list(disks.leftovers()) == []


@pytest.mark.parametrize(
    ("store", "fate"),
    [
        pytest.param(kind.values[0], fate, marks=kind.marks)
        for kind, fate in itertools.product(params(LIVE), FATES)
        if kind.values == ("qcow2",) or fate in {"writes on", "is reset"}
    ],
    indirect=["store"],
)
def test_killed_at_any_moment_nothing_is_lost(store, made, run, fate):
    """The machine goes on, whatever becomes of who keeps its disk; or it ends before that is settled."""
    machine = run(made)
    machine.write("1", "second")
    known = ["clean"]
    for number in itertools.count():
        name = f"k{number}"
        machine.write("A")

        def act(machine=machine, name=name) -> None:
            made.before_live("kata-prod", name)
            made.checkpoint_live("kata-prod", name, machine.move)
            made.settle_live("kata-prod", machine.opened())

        killed = killed_before(number, act)
        collect(made)
        if fate != "dies at once":
            machine.write("B")
            assert (machine.read(), machine.read("second")) == ("B", "1")
        if fate != "writes on":
            machine.end()
        assert set(names(made)) - {name} == set(known)
        last = "A" if fate == "dies at once" else "B"
        if fate == "is reset":
            made.restore("kata-prod", "clean")
            last = "T"
        elif fate == "is kept":
            made.checkpoint("kata-prod", f"cold{number}")
            known.append(f"cold{number}")
        made.settle_live("kata-prod", machine.opened() if fate == "writes on" else None)
        collect(made)
        if fate == "writes on":
            assert machine.read() == "B"
            machine.write("C")
            machine.end()
            last = "C"
        assert store.read("kata-prod") == last
        assert set(names(made)) - {name} == set(known)
        if done := name in names(made):
            made.restore("kata-prod", name)
            assert store.read("kata-prod") == "A"
            known.append(name)
        assert done or killed
        if not killed:
            break
        if fate in {"is reset", "is kept"}:  # its second place too
            made.restore("kata-prod", known[1] if len(known) > 1 else "clean")
        machine = run(made)
        machine.write("1", "second")
    assert number > 1
    made.destroy("kata-prod")
    assert list(made.leftovers()) == []


def test_killed_while_it_is_settled_it_is_settled_by_the_next(store, made, run):
    machine = run(made)
    for moved, number in itertools.product((True, False), range(12)):
        name = f"k{number}{moved}"
        machine.write("A")
        made.before_live("kata-prod", name)
        if moved:
            made.checkpoint_live("kata-prod", name, machine.move)
        machine.write("B")
        opened = machine.opened()
        killed_before(number, lambda opened=opened: made.settle_live("kata-prod", opened))
        collect(made)
        made.settle_live("kata-prod", machine.opened())
        collect(made)
        assert machine.read() == "B"
        assert (name in names(made)) == moved
    machine.end()
    assert store.read("kata-prod") == "B"
    made.destroy("kata-prod")
    assert list(made.leftovers()) == []
