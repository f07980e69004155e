"""Warm resets: seconds until a guest's ssh answers, at several sizes of memory, beside a cold boot and
beside what others' tools do for the same, on one libvirtd and in one run.

The guest is Debian's, as templates are built of it. Its disk has had its first boot. "Until ssh answers"
is from the beginning of a reset until a new connection was sent the greeting of ssh (RFC 4253, 4.2). One
machine runs at a time. virsh is of libvirt; kcli is measured where it is installed (bench_commands.py).
Cold boots take tens of seconds under emulation, so there are fewer rounds of them.

What is asked is asked of a quiet machine: a tool is measured after the other, so where the load changes
they aren't alike. The figures of the load, in the order of the rounds, tell how quiet it was.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

from host.run import Runner
from hypervisors.libvirt.domain_xml import QEMU_URI
from hypervisors.libvirt.private import PrivateLibvirt
from inventory.errors import DriverFailed
from provision.engine.report import QuietReporter
from provision.member import Member
from provision.site import Site, open_site
from tests.bench_commands import KCLI, ROOT
from tests.figures import Figure, Figures
from tests.line_chart import ChartLine, line_chart

Say = Callable[[str], None]
SIZES = {"512 MiB": "512M", "2 GiB": "2G", "8 GiB": "8G"}
_LEAST, _PAUSED = "512 MiB", "2 GiB"
_READY = "ready"
_WARM, _COMMAND = "farmhand, in a process that runs", "farmhand, ./invoke reset"
_COLD = "a cold boot"
_REVERT, _RESTORE, _KCLI = "virsh snapshot-revert", "virsh restore", "kcli revert vm-snapshot"
_PEERS = (_REVERT, _RESTORE, _KCLI)
_SECONDS = 0.7
_PAUSE = 0.3
_FLAT = 1.15
_CYCLES = 2
_PATIENCE = 900.0  # seconds; a cold boot on a busy machine
_POLL = 0.003
_REST, _LOOK = 240.0, 3.0
_IDLE = 0.1  # of a CPU
_NET = ("user,id=", "virtio-net-pci,")
_BUSY = "yes busy | dd iflag=fullblock of=/dev/shm/busy bs=1M count=128 conv=notrunc status=none"


def measure(directory: Path, rounds: int, say: Say) -> Figures:
    """All of it: 20 minutes and more where guests are emulated. Needs QEMU and libvirtd."""
    figures: list[Figure] = []
    with _farm(directory) as farm:
        for size in SIZES:
            with _Vm(farm, size, rounds, say) as vm:
                figures += vm.figures()
    figures += _between_sizes(figures)
    figures += _cycles(directory / "cycles", say)
    return Figures(tuple(figures))


def chart(figures: Figures) -> str:
    """An SVG: seconds over the size of memory, a line a tool."""
    found = {figure.name: figure for figure in figures.figures}
    lines = []
    for tool in (_WARM, _COMMAND, *_PEERS, _COLD):
        values = [found[name].median for size in SIZES if (name := _until(tool, size)) in found]
        if len(values) == len(SIZES):
            lines.append(ChartLine(tool, tuple(values), ours=tool in (_WARM, _COMMAND)))
    rounds = len(found[_until(_WARM, _LEAST)].values)
    return line_chart(
        "A booted Debian, reset until its ssh answers",
        f"seconds over the guest's memory, medians of {rounds}; all on one libvirtd, in one run",
        list(SIZES), lines, "s",
    )  # fmt: skip


def _until(tool: str, size: str) -> str:
    return f"{size}: {tool}, until ssh answers"


def _between_sizes(figures: Sequence[Figure]) -> Iterator[Figure]:
    for tool in (_WARM, _COMMAND):
        names = {_until(tool, size): size for size in SIZES}
        found = sorted((one for one in figures if one.name in names), key=lambda one: one.median)
        least, most = found[0], found[-1]
        name = f"{tool}: {names[most.name]}, the slowest, beside {names[least.name]}, the quickest"
        yield Figure(name, most.values, _FLAT, least.name)


def _cycles(directory: Path, say: Say) -> list[Figure]:
    """The demo's cycle, its VMs put back to a booted state and to a cold one, in turn."""
    text = (ROOT / "inventory" / "default.yaml").read_text(encoding="utf-8")
    warm = re.sub(r"^(    hostname: .*\n)", r"\1    reset_to: warm\n", text, flags=re.MULTILINE)
    assert warm.count("reset_to: warm") == 2
    directory.mkdir(mode=0o711)
    found: dict[str, list[float]] = {"warm": [], "cold": []}
    with _opened(directory, warm) as farm:
        file = directory / "farm.yaml"
        farm.invoke("clone-farm")
        for number in range(_CYCLES):
            for kind, content in (("warm", warm), ("cold", text)):
                say(f"a cycle, {kind} ({number + 1} of {_CYCLES})")
                file.write_text(content, encoding="utf-8")
                found[kind].append(farm.invoke("cycle")[0])
        file.write_text(warm, encoding="utf-8")
    cold = Figure("the demo's cycle, from cold checkpoints", tuple(found["cold"]))
    return [cold, Figure("the demo's cycle, from warm ones", tuple(found["warm"]), beside=cold.name)]


# ---- The farm that is measured.


@dataclass(frozen=True, slots=True)
class _BenchFarm:
    """``site``: open in this process."""

    directory: Path
    site: Site
    environment: Mapping[str, str]

    def run(self, *argv: str | Path) -> tuple[float, float]:
        """A command as typed: its seconds, and those of CPU time. DriverFailed, with what it said."""
        words = [str(word) for word in argv]
        with (self.directory / "said").open("w+") as said:
            began = time.perf_counter()
            process = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                raise DriverFailed(f"{shlex.join(words)} failed", detail=said.read()[-2000:])
        return seconds, used.ru_utime + used.ru_stime

    @property
    def daemon(self) -> PrivateLibvirt:
        daemon = self.site.daemon()
        assert isinstance(daemon, PrivateLibvirt)
        return daemon

    @property
    def uri(self) -> str:
        return self.daemon.uri()

    def invoke(self, *words: str) -> tuple[float, float]:
        return self.run(ROOT / "invoke", *words)


@contextlib.contextmanager
def _farm(directory: Path) -> Iterator[_BenchFarm]:
    vms = "".join(f"  {_name(size)}: {{memory: {SIZES[size]}}}\n" for size in SIZES)
    with _opened(
        directory, f"farm: bench\ntemplates: {{base: {{build: debian-12}}}}\nvms:\n{vms}"
    ) as farm:
        yield farm


@contextlib.contextmanager
def _opened(directory: Path, text: str) -> Iterator[_BenchFarm]:
    """A farm of its own there, with that farm file."""
    file = directory / "farm.yaml"
    file.write_text(text, encoding="utf-8")
    settings = {
        "FARMHAND_STATE_DIR": str(directory / "s"),
        "FARMHAND_RUNTIME_DIR": str(directory / "t"),
        "FARMHAND_FARM": str(file),
        "HOME": str(directory),
    }
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        commands = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        with open_site(file, reporter=QuietReporter()) as site:
            farm = _BenchFarm(directory, site, commands)
            try:
                yield farm
            finally:
                farm.invoke("destroy", "--all", "--purge", "--yes")
    finally:
        os.environ.clear()
        os.environ.update(before)


def _name(size: str) -> str:
    return size.replace(" ", "").lower()


class _Vm:
    """One VM of it, from its making to its end."""

    def __init__(self, farm: _BenchFarm, size: str, rounds: int, say: Say) -> None:
        self._farm = farm
        self._size = size
        self._rounds = rounds
        self._few = max(1, rounds // 6)
        self._say = say
        self._vm = _name(size)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._load: list[float] = []

    def __enter__(self) -> _Vm:
        self._say(f"{self._size}: cloning and booting")
        self._farm.invoke("clone-farm", "--vm", self._vm)
        self._member: Member = Member(self._farm.site, self._vm)
        self._port = self._member.endpoint().port
        return self

    def __exit__(self, *_: object) -> None:
        self._farm.invoke("destroy", "--vm", self._vm)

    def figures(self) -> Iterator[Figure]:
        self._until_ready("./invoke checkpoint --warm")
        self._resets()
        self._checkpoints()
        for _ in self._turns("cold boots", self._few):
            self._timed(_until(_COLD, self._size), self._cold)
        self._farm.invoke("stop", "--vm", self._vm, "--force")
        with _Peer(self._farm, self._member, self._port, self._say) as peer:
            self._peers(peer)
        yield from self._yielded()

    def _yielded(self) -> Iterator[Figure]:
        size, found = self._size, {name: tuple(values) for name, values in self._seconds.items()}
        limits = {_until(_WARM, size): _SECONDS, self._named("pause of a checkpoint, idle"): _PAUSE,
                  self._named("pause of a checkpoint, memory written busily"): _PAUSE}  # fmt: skip
        for name, values in found.items():
            yield Figure(name, values, limits.get(name))
        for ours in (_WARM, _COMMAND):
            for peer in (*_PEERS, _COLD):
                if (beside := _until(peer, size)) in found:
                    name = f"{size}: {ours}, beside {peer}"
                    yield Figure(name, found[_until(ours, size)], 1.0, beside)
        yield Figure(self._named("load of this machine"), tuple(self._load), unit="processes")

    # -- ours -------------------------------------------------------------------------------------

    def _until_ready(self, name: str) -> None:
        self._say(f"{self._size}: keeping it")
        idle(self._farm.uri, self._member.machine)
        wall, cpu = self._farm.invoke("checkpoint", "--vm", self._vm, "--name", _READY, "--warm")
        self._note(name, wall)
        self._note(f"{name}, CPU", cpu)

    def _resets(self) -> None:
        from provision.engine.runner import perform
        from provision.operations.reset import Reset

        site, machine, driver = self._farm.site, self._member.machine, self._member.driver
        reset = Reset(vms=(self._vm,), to=_READY, wait=False)

        def drive() -> None:
            driver.reset(machine, _READY)
            driver.start(machine)

        words = ("reset", "--vm", self._vm, "--to", _READY)
        commands = {
            _COMMAND: (*words, "--no-wait"),
            f"{_COMMAND}, which waits for a login": words,
            "./invoke reset --plan": (*words, "--plan"),
        }
        for _ in self._turns("warm resets", self._rounds):
            self._timed(self._named("the driver alone, until ssh answers"), drive)
            began = time.perf_counter()
            with stopwatch() as parts:
                perform(site, reset)
            reset_by = time.perf_counter()
            greeting(self._port)
            answered = time.perf_counter()
            self._seconds[_until(_WARM, self._size)].append(answered - began)
            rest = reset_by - began - sum(parts.values())
            beyond = {"all else of ours": rest, "the guest's sshd": answered - reset_by}
            for part, seconds in (parts | beyond).items():
                self._note(f"of that, {part}", seconds)
            for name, argv in commands.items():
                began = time.perf_counter()
                wall, cpu = self._farm.invoke(*argv)
                self._note(f"{name}, the command", wall)
                self._note(f"{name}, the command, CPU", cpu)
                if name == _COMMAND:
                    greeting(self._port)
                    self._seconds[_until(name, self._size)].append(time.perf_counter() - began)

    def _checkpoints(self) -> None:
        kinds = {"idle": False}
        if self._size == _PAUSED:
            kinds["memory written busily"] = True
        for kind, busy in kinds.items():
            for turn in self._turns(f"checkpoints, {kind}", self._rounds):
                self._again()
                if busy:
                    command = f"nohup sh -c 'while {_BUSY}; do :; done' >/dev/null 2>&1 &"
                    self._farm.invoke("ssh", "--vm", self._vm, "--command", command)
                    time.sleep(2)  # until it writes
                self._keep(f"{kind[0]}{turn}", kind)

    def _again(self) -> None:
        self._member.driver.reset(self._member.machine, _READY)
        self._member.driver.start(self._member.machine)
        greeting(self._port)

    def _keep(self, name: str, kind: str) -> None:
        from hypervisors.api import WarmMachines

        driver, machine = self._member.driver, self._member.machine
        assert isinstance(driver, WarmMachines)
        began = time.perf_counter()
        driver.checkpoint(machine, name, warm=True)
        self._note(f"a checkpoint, {kind}", time.perf_counter() - began)
        kept = driver.memories(machine)[name]
        self._note(f"pause of a checkpoint, {kind}", kept.pause)
        self._note(f"its guest frozen, {kind}", kept.frozen)
        driver.forget(machine, name)

    def _cold(self) -> None:
        self._member.driver.reset(self._member.machine, _READY)
        self._member.driver.start(self._member.machine, cold=True)

    # -- others -----------------------------------------------------------------------------------

    def _peers(self, peer: _Peer) -> None:
        greeting(self._port)
        idle(self._farm.uri, "peer")
        ways = {_REVERT: peer.revert}
        if peer.kcli:
            ways[_KCLI] = peer.kcli_revert
        self._timed(self._named("virsh snapshot-create-as"), peer.snapshot)
        for _ in self._turns("others' snapshots", self._rounds):
            for name, way in ways.items():
                self._timed(_until(name, self._size), way)
        idle(self._farm.uri, "peer")
        self._note("virsh save", peer.save())
        for _ in self._turns("others' saved images", self._rounds):
            self._timed(_until(_RESTORE, self._size), peer.restore)

    # -- both -------------------------------------------------------------------------------------

    def _turns(self, what: str, count: int) -> Iterator[int]:
        for turn in range(count):
            self._say(f"{self._size}: {what}, round {turn + 1} of {count}")
            self._load.append(os.getloadavg()[0])
            yield turn

    def _timed(self, name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        greeting(self._port)
        self._seconds[name].append(time.perf_counter() - began)

    def _note(self, name: str, seconds: float) -> None:
        self._seconds[self._named(name)].append(seconds)

    def _named(self, what: str) -> str:
        return f"{self._size}: {what}"


def greeting(port: int) -> None:
    """Wait until a new connection to this port of ours is sent ssh's greeting. DriverFailed."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < _PATIENCE:
        # QEMU takes connections before its guest does: one that was made too early is never answered
        limit = min(5.0, max(1.0, waited / 10))
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), limit) as end:
            if end.recv(4) == b"SSH-":
                return
        time.sleep(_POLL)
    raise DriverFailed(f"port {port}: no ssh answered in {_PATIENCE:g} s")


def idle(uri: str, machine: str) -> None:
    """Wait until its guest has come to rest, at most a few minutes: what is kept of one that still boots
    goes on with that."""
    import libvirt

    connection = libvirt.open(uri)
    try:
        domain = connection.lookupByName(machine)
        limit = time.monotonic() + _REST
        while time.monotonic() < limit:
            before = domain.info()[4]  # its CPU time, in ns
            time.sleep(_LOOK)
            if domain.info()[4] - before < _IDLE * _LOOK * 1e9:
                return
    finally:
        connection.close()


class _Peer:
    """The same guest, on a disk that grew from the same checkpoint, as users of virsh and of kcli have
    it: memory of libvirt's usual kind, one disk, no marks. It boots."""

    def __init__(self, farm: _BenchFarm, member: Member, port: int, say: Say) -> None:
        self._farm = farm
        self._member = member
        self._port = port
        self._say = say
        self._virsh = ("virsh", "-q", "-c", farm.uri)
        self._reader = farm.daemon.qemu_uid()
        self._home = farm.directory / f"peer-{member.vm}"
        self._disk, self._saved = self._home / "disk.qcow2", self._home / "saved"
        self.kcli = shutil.which("kcli", path=f"{KCLI / 'bin'}:{os.environ.get('PATH', '')}")
        if not self.kcli:
            say(f"kcli is not installed (python3 -m venv {KCLI}; its bin/pip install kcli): left out")

    def __enter__(self) -> _Peer:
        self._say("booting it for others")
        self._home.mkdir(mode=0o711)
        member, runner = self._member, Runner()
        member.driver.reset(member.machine, _READY)
        disk = member.disk()
        assert disk
        facts = json.loads(runner.read("qemu-img", "info", "--output=json", disk.path).stdout)
        self._base = Path(facts["full-backing-filename"])
        self._fresh_disk(self._base)
        text = runner.read(*self._virsh, "dumpxml", "--inactive", member.machine).stdout
        definition = self._home / "peer.xml"
        definition.write_text(as_peer(text, self._disk))
        settings = self._farm.directory / ".kcli" / "config.yml"
        settings.parent.mkdir(exist_ok=True)
        settings.write_text(f"default: {{client: here}}\nhere: {{type: kvm, url: '{self._farm.uri}'}}\n")
        self._farm.run(*self._virsh, "define", definition)
        self._farm.run(*self._virsh, "start", "peer")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(DriverFailed):
            self._farm.run(*self._virsh, "destroy", "peer")
        self._farm.run(*self._virsh, "undefine", "peer", "--snapshots-metadata")
        shutil.rmtree(self._home)

    def snapshot(self) -> None:
        self._farm.run(*self._virsh, "snapshot-create-as", "peer", _READY)

    def revert(self) -> None:
        self._farm.run(*self._virsh, "snapshot-revert", "peer", _READY)

    def kcli_revert(self) -> None:
        assert self.kcli
        self._farm.run(self.kcli, "revert", "vm-snapshot", "-n", "peer", _READY)

    def save(self) -> float:
        """Seconds. The disk as it was saved is what others grow from."""
        seconds, _ = self._farm.run(*self._virsh, "save", "peer", self._saved)
        self._base = self._home / "base.qcow2"
        self._disk.rename(self._base)
        self._fresh_disk(self._base)
        self._farm.run(*self._virsh, "restore", self._saved)
        return seconds

    def restore(self) -> None:
        self._farm.run(*self._virsh, "destroy", "peer")
        self._fresh_disk(self._base)
        self._farm.run(*self._virsh, "restore", self._saved)

    def _fresh_disk(self, base: Path) -> None:
        create = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, self._disk)
        self._farm.run(*create)
        if self._reader is not None:
            os.chown(self._disk, self._reader, -1)


def as_peer(xml: str, disk: Path) -> str:
    """Our definition as one that knows nothing of us."""
    domain = ET.fromstring(xml)
    for path, text in (("name", "peer"), ("uuid", str(uuid4()))):
        found = domain.find(path)
        assert found is not None
        found.text = text
    for gone in domain.findall("metadata"):
        domain.remove(gone)
    devices = domain.find("devices")
    assert devices is not None
    first, *others = devices.findall("disk")
    for other in others:
        devices.remove(other)
    source = first.find("source")
    assert source is not None
    source.set("file", str(disk))
    for serial in devices.findall("serial"):
        for log in serial.findall("log"):
            serial.remove(log)
    line = domain.find(f"{{{QEMU_URI}}}commandline")
    assert line is not None
    values = [argument.get("value", "") for argument in line]
    for number, argument in enumerate(list(line)):
        value = values[number + 1] if values[number].startswith("-") else values[number]
        if not value.startswith(_NET):
            line.remove(argument)
    return ET.tostring(domain, encoding="unicode")


# ---- Where the time goes.


def _parts() -> Iterator[tuple[Any, str, str]]:
    import libvirt

    from hypervisors.disks.qcow2.disks import Qcow2Disks
    from hypervisors.libvirt import guest_agent
    from hypervisors.libvirt.driver import LibvirtHypervisor
    from hypervisors.libvirt.warm.images import MemoryImage
    from hypervisors.libvirt.warm.machines import WarmDomains
    from hypervisors.libvirt.warm.monitor import Monitor
    from provision.engine.journal import Journal

    yield LibvirtHypervisor, "_cut_power", "the end of what ran"
    yield Qcow2Disks, "restore", "the disk"
    yield Qcow2Disks, "pristine", "the disk's proof"
    yield MemoryImage, "trouble", "the memory's seal"
    yield MemoryImage, "face", "the memory's working copy"
    yield WarmDomains, "_host_trouble", "QEMU's and the CPU's check"
    yield libvirt.virConnect, "createXML", "libvirt's createXML"
    yield Monitor, "run", "loading the state"
    yield Monitor, "wait", "loading the state"
    yield libvirt.virDomain, "resume", "resuming"
    yield guest_agent, "thaw", "thawing"
    yield Journal, "_use", "the journal"


@contextlib.contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Seconds in each of its parts, and in no other part that it calls; filled meanwhile."""
    spent: dict[str, float] = {part: 0.0 for _, _, part in _parts()}
    inner = threading.local()

    def around(real: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            outer, inner.seconds = getattr(inner, "seconds", 0.0), 0.0
            began = time.perf_counter()
            try:
                return real(*arguments, **more)
            finally:
                whole = time.perf_counter() - began
                spent[part] += whole - inner.seconds
                inner.seconds = outer + whole

        return timed

    with contextlib.ExitStack() as stack:
        for owner, name, part in _parts():
            timed: Any = around(getattr(owner, name), part)
            if isinstance(inspect.getattr_static(owner, name), staticmethod):
                timed = staticmethod(timed)
            stack.enter_context(mock.patch.object(owner, name, timed))
        yield spent
