"""The side that works: drivers on the machine whose host they drive, told by frames on standard input.

``go`` is what the step of a change waits for: by then it is in the asker's journal. At the end of the
input, or when nothing is heard for ``SILENCE`` seconds, the process ends at once, as if killed: whatever
runs then, nobody waits for it any more, and each of the drivers' methods may be cut off anywhere. The
second is the kernel's doing (setitimer(2)), so that it also comes where no thread of ours gets to run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from host.files import UMASK, file_error, make_directory, open_lock, own_directory, sync
from host.memory import memory_available
from host.printable import last_line
from host.run import Runner, which
from hypervisors import console_log
from hypervisors.api import (
    Callbacks,
    Console,
    Directories,
    Disks,
    Leases,
    Leftover,
    Machine,
    MachineSpec,
    Owner,
    Template,
)
from hypervisors.disks.stores import open_disks
from hypervisors.far.frames import PING, Pipe
from hypervisors.far.wire import decode, encode
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.kvm_trust import KvmTrust
from hypervisors.libvirt.opening import Place, leases_of, open_machines, reader_of
from hypervisors.look import HostLook, look_at
from inventory.errors import Busy, DriverFailed, FarmhandError, Interrupted

SILENCE = 30.0  # seconds: longer than the asker, or ssh, takes to see that a connection is dead
GREETING = b"farmhand's agent speaks from here on\n"
"""The first line. What a login prints before it is not ours."""

_PATIENCE = 10.0  # seconds that an earlier agent may take for its end, after ``SILENCE``
_SEED = re.compile(r"([a-z0-9-]+)\.iso")
_TAIL = 65_536  # bytes of a console's log that are of interest elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """One farm's directories on this machine."""

    directories: Directories
    seeds: Path
    consoles: Path


@dataclass(slots=True)
class _RunningCall:
    number: int
    answers: queue.Queue[bool]


class Agent:
    """Answers one asker, each call in a thread of its own."""

    def __init__(self, pipe: Pipe, home: Callable[[str], Home]) -> None:
        self._pipe = pipe
        self._home = home
        self._calls: dict[int, _RunningCall] = {}
        self._current = threading.local()
        self._presence: Presence | None = None
        self._opened = threading.Event()
        self._files = IncomingFiles(Path())
        self._parts: dict[str, object] = {}

    def serve(self) -> None:
        """Returns when the input has ended; whatever still runs is then to be cut off. OSError or
        ValueError where it isn't understood."""
        _still_heard()
        threading.Thread(target=self._ping, daemon=True).start()
        received = self._pipe.receive()
        if received is not None:
            threading.Thread(target=self._begin, args=received[:1], daemon=True).start()
        while received is not None and (received := self._pipe.receive()) is not None:
            _still_heard()
            self._take(*received)
        if self._presence:
            self._presence.leave()

    def _ping(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._pipe.send({"ping": 1})
                time.sleep(PING)

    # -- being asked ------------------------------------------------------------------------------

    def _begin(self, order: dict[str, Any]) -> None:
        """Calls that came meanwhile wait for that."""
        try:
            place: Place = decode(order["open"])
            home, plan = self._home(place.farm.name), bool(order["plan"])
            if not plan:  # else it changes nothing: nobody need wait for it, nor it for others
                self._presence = Presence(home.directories.runtime, str(order["for"]))
                self._presence.wait_for_others(lambda text: self._pipe.send({"working": text}))
            self._open(place, home, plan=plan)
        except Exception as error:  # noqa: BLE001 - it is raised again over there
            with contextlib.suppress(OSError):
                self._pipe.send({"refused": told(error)})
            if self._presence:
                self._presence.leave()
            os._exit(1)
        self._opened.set()

    def _open(self, place: Place, home: Home, *, plan: bool) -> None:
        callbacks = Callbacks(
            step=self._step,
            warn=lambda text: self._pipe.send({"warn": encode(text)}),
            working=lambda text: self._pipe.send({"working": text}),
        )
        runner, reader = Runner(changes=not plan), reader_of(place.driver, place.uri)
        disks = open_disks(place.disks, home.directories, runner, callbacks, reader)
        self._files = IncomingFiles(home.directories.farm / "incoming")
        if not plan:
            self._files.sweep(home.directories.runtime)

        def machines_anew() -> None:
            machines = open_machines(
                place, place.uri, disks, home.directories, runner, callbacks, reader
            )
            self._parts["machines"] = machines
            self._parts["host"] = AgentHost(place, home, disks, machines, self._files, reader)

        self._parts["leases"] = _HeldLeases(leases_of(place, home.directories))
        self._parts |= {"disks": disks, "kvm": _Kvm(KvmTrust(home.directories.cache), machines_anew)}
        machines_anew()

    def _take(self, frame: dict[str, Any], data: bytes) -> None:
        if "ping" in frame:
            if self._presence:
                self._presence.heard()
        elif "call" in frame:
            call = _RunningCall(frame["call"], queue.Queue())
            self._calls[call.number] = call
            threading.Thread(target=self._carry_out, args=(call, frame), daemon=True).start()
        elif "file" in frame:
            self._files.add(frame["file"], data)
        elif "go" in frame or "stop" in frame:
            going = "go" in frame
            if waiting := self._calls.get(frame["go" if going else "stop"]):
                waiting.answers.put(going)

    def _carry_out(self, call: _RunningCall, frame: dict[str, Any]) -> None:
        self._current.call = call
        self._opened.wait()
        try:
            method = getattr(self._parts[frame["of"]], frame["method"])
            value = method(*decode(frame["args"]), **decode(frame["options"]))
            answer = {"done": call.number, "value": encode(value)}
        except Exception as error:  # noqa: BLE001 - it is raised again over there
            answer = {"failed": call.number, "error": told(error)}
        del self._calls[call.number]
        self._pipe.send(answer)

    def _step(self, text: str) -> None:
        call: _RunningCall = self._current.call
        self._pipe.send({"step": call.number, "text": text})
        if not call.answers.get():
            raise Interrupted(f"abandoned before: {text}")


def _still_heard() -> None:
    signal.setitimer(signal.ITIMER_REAL, SILENCE)


class _HeldLeases:
    """Those that the asker holds here, until it gives them back or this process ends."""

    def __init__(self, places: Sequence[Leases]) -> None:
        self._places = places
        self._held: dict[int, contextlib.ExitStack] = {}
        self._numbers = itertools.count()

    def take(self, names: Sequence[str], note: str) -> int:
        with contextlib.ExitStack() as stack:
            for place in self._places:
                stack.enter_context(place.hold(names, note))
            number = next(self._numbers)
            self._held[number] = stack.pop_all()
        return number

    def give_back(self, number: int) -> None:
        """One of an agent before this is gone already."""
        if held := self._held.pop(number, None):
            held.close()


class _Kvm:
    """``KvmTrust``; once it is distrusted, the driver of the machines is opened anew."""

    def __init__(self, trust: KvmTrust, machines_anew: Callable[[], None]) -> None:
        self._trust = trust
        self._machines_anew = machines_anew

    def proven(self) -> bool:
        return self._trust.proven()

    def prove(self) -> None:
        self._trust.prove()

    def distrust(self, why: str) -> None:
        self._trust.distrust(why)
        self._machines_anew()


def told(error: Exception) -> object:
    """What is the machine's own fault is a line. A defect of ours is told whole: over there it can be
    looked at."""
    if isinstance(error, FarmhandError):
        with contextlib.suppress(TypeError):
            return encode(error)
    if isinstance(error, OSError):
        if isinstance(error.filename, str):
            return encode(file_error(error, Path(error.filename), "use"))
        return encode(DriverFailed(error.strerror or str(error)))
    detail = "".join(traceback.format_exception(error))
    return encode(
        DriverFailed(f"a defect in farmhand itself: {type(error).__name__}: {error}", detail=detail)
    )


class AgentHost:
    """What the asker wants of the machine itself: its memory, its tools, and the files that it would
    else have beside its own."""

    def __init__(
        self,
        place: Place,
        home: Home,
        disks: Disks,
        machines: LibvirtHypervisor,
        files: IncomingFiles,
        reader_uid: int | None,
    ) -> None:
        self._place = place
        self._home = home
        self._disks = disks
        self._machines = machines
        self._files = files
        self._reader = reader_uid

    def places(self) -> tuple[Path, Path]:
        """The directories of seeds and of console logs."""
        return self._home.seeds, self._home.consoles

    def look(self, names: Sequence[str], proven: Sequence[str]) -> HostLook:
        return look_at(self._machines, self._disks, names, proven)

    def memory_available(self) -> int:
        return memory_available()

    def missing(self, tools: Sequence[str], paths: Sequence[Path]) -> tuple[str, ...]:
        return (
            *(tool for tool in tools if which(tool) is None),
            *(str(path) for path in paths if not path.exists()),
        )

    def tidy(self) -> None:
        """Remove the farm's directories and a store's lock file. A directory that holds anything else
        stays."""
        farm = self._home.directories.farm
        disks = farm / "disks"
        inner = (disks / "templates", disks / "vms")
        for directory in (*inner, disks, farm / "incoming", self._home.seeds, self._home.consoles, farm):
            with contextlib.suppress(OSError):
                directory.rmdir()
            if directory == inner[-1] and not any(part.exists() for part in inner):
                (disks / ".lock").unlink(missing_ok=True)

    # -- files that come over ---------------------------------------------------------------------

    def new_file(self, name: str) -> Path:
        return self._files.new(name)

    def end_file(self, file: Path) -> None:
        self._files.end(file)

    def seal(self, file: Path, template: Template) -> Template:
        """See ``Disks.seal``; the image is a file that came over."""
        try:
            return self._disks.seal(file, template)
        finally:
            file.unlink(missing_ok=True)

    def has_seed(self, machine: str, sha256: str) -> bool:
        try:
            return hashlib.sha256(self._seed(machine).read_bytes()).hexdigest() == sha256
        except FileNotFoundError:
            return False

    def take_seed(self, machine: str, file: Path) -> None:
        """Put a seed that came over in its place. It holds the machine's host key: its mode is 0600, for
        the user who opens it."""
        seed = self._seed(machine)
        for directory in (self._home.seeds, self._home.consoles):
            make_directory(directory, mode=0o711)
        if self._reader is not None:
            os.chown(file, self._reader, -1)
        file.replace(seed)
        sync(seed.parent)

    def _seed(self, machine: str) -> Path:
        return self._home.seeds / f"{machine}.iso"

    # -- machines, with those files ---------------------------------------------------------------

    def destroy(self, machine: str) -> None:
        self._machines.destroy(machine)
        self._forget(machine)

    def _forget(self, machine: str) -> None:
        log = self._home.consoles / f"{machine}.log"
        for path in (self._seed(machine), *console_log.files_of(log)):
            path.unlink(missing_ok=True)

    def rename(self, machine: str, spec: MachineSpec) -> Machine:
        """See ``Hypervisor.rename``; its console log comes along. Its new seed is there already."""
        made = self._machines.rename(machine, spec)
        logs = (self._home.consoles / f"{name}.log" for name in (machine, spec.name))
        console_log.move(*logs)
        self._forget(machine)
        return made

    def console(self, machine: str) -> tuple[Console, str]:
        """See ``Hypervisor.console``; the end of its log comes along."""
        console = self._machines.console(machine)
        text = ""
        if console.log:
            with contextlib.suppress(FileNotFoundError):
                text = console_log.end_of(console.log, _TAIL).decode(errors="replace")
        return console, text

    def leftovers(self) -> tuple[Leftover, ...]:
        """The hypervisor's leftovers, and seeds of machines that are not there."""
        return (*self._machines.leftovers(), *self._seeds_left())

    def discard(self, leftover: Leftover) -> None:
        if leftover.kind != "seed":
            self._machines.discard(leftover)
            return
        for left in self._seeds_left():
            if left.ref == leftover.ref:
                Path(left.ref).unlink(missing_ok=True)

    def _seeds_left(self) -> Iterator[Leftover]:
        """Seeds of machines that are not there. Only files named as we name this farm's seeds count."""
        farm = self._place.farm
        there = {m.name for m in self._machines.list()} | {d.machine for d in self._disks.list()}
        for path in sorted(self._home.seeds.glob("*.iso")):
            match = _SEED.fullmatch(path.name)
            if not match or match[1] in there or not match[1].startswith(f"{farm.name}-"):
                continue
            if self._machines.find(match[1]) or self._disks.find(match[1]):  # another farm's
                continue
            with contextlib.suppress(FileNotFoundError):
                seen = path.stat()
                vm = match[1].removeprefix(f"{farm.name}-")
                yield Leftover(
                    kind="seed", ref=str(path), owner=Owner(farm, vm),
                    created=datetime.fromtimestamp(seen.st_mtime, UTC), bytes=seen.st_size,
                    why="its VM doesn't exist",
                )  # fmt: skip


class IncomingFiles:
    """What comes over, chunk by chunk, into a directory that is made when it is needed. The name says
    for whom: what an agent that was cut off leaves, the next one removes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, BinaryIO] = {}
        self._failed: dict[str, OSError] = {}

    def new(self, name: str) -> Path:
        make_directory(self._directory, mode=0o711)
        path = self._directory / f"{os.getpid()}-{threading.get_ident()}-{Path(name).name}"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._open[str(path)] = os.fdopen(handle, "wb")
        return path

    def sweep(self, presences: Path) -> None:
        """``presences``: the directory of all agents' (see ``presence``)."""
        for old in self._directory.glob("[0-9]*-*"):
            if not (presences / f"far-{old.name.partition('-')[0]}").exists():
                old.unlink(missing_ok=True)

    def add(self, path: str, data: bytes) -> None:
        """An error is told at the end: nobody waits for an answer to a chunk."""
        if path not in self._failed and path in self._open:
            try:
                self._open[path].write(data)
            except OSError as error:
                self._failed[path] = error

    def end(self, path: Path) -> None:
        """All of it is on the disk; else it is gone, and NoSpace or WrongState."""
        file, error = self._open.pop(str(path)), self._failed.pop(str(path), None)
        try:
            with file:
                if error:
                    raise error
                file.flush()
                os.fsync(file.fileno())
        except OSError as failed:
            path.unlink(missing_ok=True)
            raise file_error(failed, path, "write") from failed


class Presence:
    """A file that is locked while this agent lives, and touched whenever its asker was heard from: its
    time is this boot's own clock, which nobody sets. The asker is named in it."""

    def __init__(self, directory: Path, asker: str) -> None:
        own_directory(directory.parent, mode=0o711)  # below /tmp others could have made it
        own_directory(directory, mode=0o711)
        self._directory = directory
        self._file = directory / f"far-{os.getpid()}"
        unseen = directory / f".{self._file.name}"
        self._handle = open_lock(unseen)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        os.ftruncate(self._handle, 0)  # a dead one's, with the same process id
        os.write(self._handle, asker.encode())
        self.heard()
        unseen.rename(self._file)  # it was never seen without a lock: without one, its agent is dead
        self._began = _heard(self._file)

    def heard(self) -> None:
        now = time.monotonic_ns()
        os.utime(self._handle, ns=(now, now))

    def leave(self) -> None:
        self._file.unlink(missing_ok=True)

    def wait_for_others(self, say: Callable[[str], None]) -> None:
        """Returns when every other agent of this farm that was there before has ended, or was heard from
        since: one whose asker was cut off ends soon, and until then it may still be changing what we are
        asked to recover. Busy, naming it, for one that should have ended, and has not."""
        for other in sorted(self._directory.glob("far-*")):
            if other != self._file:
                self._wait_for(other, say)

    def _wait_for(self, other: Path, say: Callable[[str], None]) -> None:
        with contextlib.suppress(FileNotFoundError):
            handle = open_lock(other, make=False)
            try:
                for looks in itertools.count(1):
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        if _heard(other) > self._began:
                            return
                        time.sleep(PING / 10)
                        if looks % 20 == 0:
                            _have_patience(other, handle, looks * PING / 10, say)
                    else:
                        other.unlink()  # it ended without a word
                        return
            finally:
                os.close(handle)


def _have_patience(other: Path, handle: int, waited: float, say: Callable[[str], None]) -> None:
    pid = other.name.removeprefix("far-")
    asker = last_line(os.pread(handle, 4096, 0).decode(errors="replace")) or "somebody"
    silent = round((time.monotonic_ns() - _heard(other)[0]) / 1e9)
    if waited > SILENCE + _PATIENCE:
        raise Busy(
            f"process {pid} there, the agent of {asker}, has heard nothing for {silent} s, "
            "and does not end: it may still be changing things",
            remedy=f"kill -9 {pid}; if it is still there then, see what it waits for: ps -lp {pid}",
        )
    say(f"waiting for process {pid} there, the agent of {asker}; it heard nothing for {silent} s")


def _heard(presence: Path) -> tuple[int, int]:
    """When its asker was heard from, on this boot's clock; with the process id, for two may begin in the
    same tick, and one of them must not wait for the other."""
    return presence.stat().st_mtime_ns, int(presence.name.removeprefix("far-"))


def main(home: Callable[[str], Home]) -> None:
    """Standard output is the frames' alone: what a library prints goes to standard error."""
    os.umask(UMASK)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    outgoing = os.dup(1)
    os.dup2(2, 1)
    pipe = Pipe(sys.stdin.buffer, outgoing, files=True, waiting=lambda _: None)
    status = 0
    try:
        pipe.write(b"\n" + GREETING)
        Agent(pipe, home).serve()
    except Exception as error:  # noqa: BLE001 - it is raised again over there
        with contextlib.suppress(OSError):
            pipe.send({"refused": told(error)})
        status = 1
    os._exit(status)
