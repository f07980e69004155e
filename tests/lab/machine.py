"""One lab: a QEMU with the image's root file system under a throw-away overlay, and three spare disks.

    STATE/labs/NAME/        run.qcow2, d1-d3.raw, console.log, lab.json
    RUNTIME/lab/NAME.qmp    the monitor's socket
    CACHE/lab/start-HASH/   run.qcow2 and memory: a machine that has booted and got the Python packages

A warm start continues that saved memory in a new QEMU, over fresh overlays of its disk: any number of
labs can do that at once, for nothing in it is written again. (QEMU's other way, savevm and loadvm, keeps
the memory inside the disk's own file: each lab would need a copy of it.) Where a warm start doesn't
answer, the lab boots from cold.

The disks have cache=unsafe: QEMU never waits for this host's disk, but what it has written is in this
host's page cache and outlives it. Thus killing QEMU is a power cut for the lab. The spare disks are raw:
every write that was answered is kept, as by a disk with a protected cache. The root disk is qcow2, whose
tables QEMU writes out when the guest flushes (also with cache=unsafe, see bdrv_co_flush in its
block/io.c): what was not flushed may be lost, as by a disk with a volatile cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from host.paths import runtime_dir, state_dir
from host.processes import Process
from host.progress import Progress, Pulse
from host.run import CommandResult, Runner
from inventory.errors import Busy, CommandFailed, FarmhandError, NotFound, TimedOut, UsageError
from tests.lab import image as images
from tests.lab import parcel, qemu
from tests.lab.image import Image, Say
from tests.lab.kinds import KINDS, KVM, Kind

# Seconds without a sign that it goes on, see host.progress. On an idle machine with two cores and
# without KVM a boot takes 13 in all, from the saved state 2.
_COLD_PATIENCE = 300.0
_WARM_PATIENCE = 60.0
_SAVE_LIMIT = 120.0
_TOO_FAST = 1.2  # times
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


@dataclass(frozen=True, slots=True)
class Facts:
    """lab.json. ``owner``: the process a temporary lab belongs to; without it the lab is left over."""

    name: str
    process: Process
    port: int
    image: str
    warm: bool
    owner: Process | None
    engine: str
    size: qemu.Size = qemu.USUAL
    kind: str = KVM.name

    @classmethod
    def read(cls, path: Path) -> Facts | None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data["process"] = Process(**data["process"])
            data["owner"] = Process(**data["owner"]) if data["owner"] else None
            data["size"] = qemu.Size(**data.get("size", {}))
            return cls(**data)
        except (OSError, ValueError, TypeError, KeyError):
            return None


class Machine:
    """A lab by its name. ``start`` makes it; everything else needs it running."""

    def __init__(self, name: str, runner: Runner, say: Say) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} can't name a lab", remedy="lower-case letters, digits and hyphens, 31 at most"
            )
        self.name = name
        self.runner = runner
        self.say = say
        self.directory = labs_dir() / name
        self.monitor = runtime_dir() / "lab" / f"{name}.qmp"
        self._facts: Facts | None = None
        self._boots = 0

    # -- what it is ---------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """NotFound where there is no such lab."""
        if self._facts is None:
            self._facts = Facts.read(self.directory / "lab.json")
        if self._facts is None:
            raise NotFound(f"there is no lab {self.name}", remedy=f"./invoke lab-up --name {self.name}")
        return self._facts

    def running(self) -> bool:
        with contextlib.suppress(NotFound):
            return self.facts.process.alive()
        return False

    @property
    def kind(self) -> Kind:
        return KINDS[self.facts.kind]

    @property
    def image(self) -> Image:
        return Image(images.place() / f"image-{self.facts.image}")

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    # -- start and end ------------------------------------------------------------------------------

    def start(
        self, kind: Kind = KVM, *, warm: bool = True, temporary: bool = False,
        size: qemu.Size = qemu.USUAL, beside: bool = False,
    ) -> None:  # fmt: skip
        """Boot with clean disks, and wait until it answers: from the saved state (made now if there is
        none), else, and where it is to have another ``size``, from cold. ``beside``: another lab runs
        meanwhile. Busy where a lab of this name runs."""
        image = images.ensure(self.runner, self.say, kind)
        engine = qemu.engine(self.runner, self.say, kind, beside=beside)
        packages = parcel.packages()
        with self._lock():
            self._facts = None
            if self.running():
                raise Busy(
                    f"the lab {self.name} is running", remedy=f"./invoke lab-down --name {self.name}"
                )
            owner = Process.this() if temporary else None
            warm = warm and size == qemu.USUAL
            if warm and (saved := self._saved_state(image, kind, engine, packages)):
                try:
                    self._boot(image, kind, engine, saved=saved, owner=owner)
                    return
                except (TimedOut, CommandFailed) as error:
                    self.say(f"{self.name}: the saved state did not come up, booting from cold: {error}")
                    self._end()
            self._boot(image, kind, engine, saved=None, owner=owner, size=size)
            self.deliver(packages)

    def boot_again(self) -> None:
        """Boot the same disks, as after ``pull_the_plug``. Always from cold."""
        old = self.facts
        if self.running():
            raise Busy(f"the lab {self.name} is running", remedy="pull the plug first")
        with self._lock():
            engine = qemu.engine(self.runner, self.say, self.kind)
            self._run(self.image, self.kind, engine, None, old.owner, old.size)
            self._wait()

    def pull_the_plug(self) -> None:
        """A power cut: SIGKILL to QEMU. At ``boot_again`` the spare disks hold every write that was
        answered, the root disk all that was flushed; what was in the guest's memory is gone."""
        if not qemu.kill(self.facts.process):
            pid = self.facts.process.pid
            raise TimedOut(f"the QEMU of the lab {self.name} survives SIGKILL (pid {pid})")

    def remove(self) -> None:
        """End it, and remove its disks and notes. Nothing to do is fine too."""
        with self._lock():
            self._end()

    # -- inside -------------------------------------------------------------------------------------

    def ssh_argv(self, *command: str, tty: bool = False) -> list[str]:
        image = self.image
        options = {
            "IdentitiesOnly": "yes", "BatchMode": "yes", "LogLevel": "ERROR",
            "UserKnownHostsFile": f'"{image.known_hosts}"', "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": "farmhand-lab", "StrictHostKeyChecking": "yes",
            "ConnectTimeout": "20", "ServerAliveInterval": "20", "ServerAliveCountMax": "9",
        }  # fmt: skip
        argv = ["ssh", *(["-t"] if tty else []), "-F", "/dev/null", "-i", str(image.key), "-p"]
        argv.append(str(self.facts.port))
        for key, value in options.items():
            argv += ["-o", f"{key}={value}"]
        return [*argv, "root@127.0.0.1", *command]

    def run(
        self, script: str, *, timeout: float = 120, ok: Sequence[int] = (0,), input: bytes | None = None
    ) -> CommandResult:
        """A shell script in the lab, as root. CommandFailed unless its status is in ``ok`` (255: no
        connection), TimedOut."""
        return self.runner.change(*self.ssh_argv(script), timeout=timeout, ok=ok, input=input)

    def deliver(self, packages: parcel.Parcel) -> None:
        """The Python packages, unless they are there."""
        there = self.run("cat /etc/lab/parcel 2>/dev/null || :").stdout.strip()
        if there == packages.digest:
            return
        old = "/var/cache/farmhand/venv-* /var/cache/farmhand/*.ready /opt/venv"
        self.run(f"rm -rf {old}; tar -C / -xf -", input=packages.archive(), timeout=600)
        modules = "pytest, pydantic_core, cryptography, libvirt, libzfs_core"
        self.run(f"/opt/venv/bin/python -c 'import {modules}'")

    def deliver_tree(self) -> None:
        """The working tree as it is now, to /root/farmhand; what was there is gone."""
        self.run(f"rm -rf /{parcel.CHECKOUT}; tar -C / -xf -", input=parcel.working_tree(), timeout=300)

    def collect(self, source: str, out: Path, *, timeout: float = 300) -> None:
        """Unpack to ``out`` the tar that the shell command ``source`` writes on standard output."""
        out.mkdir(parents=True, exist_ok=True)
        fetched = out / ".fetched.tar"
        try:
            with fetched.open("wb") as file:
                subprocess.run(
                    self.ssh_argv(source), stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.DEVNULL, timeout=timeout, check=True,
                )  # fmt: skip
            self.runner.change("tar", "-C", out, "--no-same-owner", "-xf", fetched)
        except (subprocess.SubprocessError, CommandFailed) as error:
            raise CommandFailed(
                f"could not bring results back from the lab {self.name}: {error}"
            ) from error
        finally:
            fetched.unlink(missing_ok=True)

    # -- within -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        labs_dir().mkdir(parents=True, exist_ok=True)
        waiting = f"another command starts or ends the lab {self.name}: waiting"
        with images.locked(labs_dir() / f"{self.name}.lock", lambda: self.say(waiting)):
            yield

    def _boot(
        self, image: Image, kind: Kind, engine: qemu.Engine, *, saved: Path | None,
        owner: Process | None, size: qemu.Size = qemu.USUAL,
    ) -> None:  # fmt: skip
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, mode=0o700)
        run = self.directory / "run.qcow2"
        if saved:
            qemu.make_overlay(self.runner, saved / "run.qcow2", "qcow2", run)
        else:
            qemu.make_overlay(self.runner, image.disk, "raw", run)
        qemu.make_spare_disks(self.directory, size.disk)
        self._run(image, kind, engine, saved, owner, size)
        self._wait()
        if not saved:
            self._check_clock()

    def _check_clock(self) -> None:
        """CommandFailed where its clock doesn't keep time with ours: nobody's time limits would hold."""
        seen = []
        for pause in (0.0, 3.0):
            time.sleep(pause)
            before = time.monotonic()
            told = float(self.run("date +%s.%N").stdout)
            seen.append((told, before, time.monotonic()))
        (first, began, _), (last, _, ended) = seen
        if (times := (last - first) / (ended - began)) > _TOO_FAST:
            raise CommandFailed(
                f"the clock of the lab {self.name} runs {times:.1f} times too fast: its kernel measured "
                "its CPU's counter wrong",
                remedy="type the same again, where less else runs on this machine",
            )

    def _run(
        self,
        image: Image,
        kind: Kind,
        engine: qemu.Engine,
        saved: Path | None,
        owner: Process | None,
        size: qemu.Size,
    ) -> None:
        self._boots = self._boots_ended()
        process, port = qemu.start(
            self.runner, engine, image, self.directory, self.monitor, self.name,
            kind=kind, size=size, saved=saved / "memory" if saved else None,
        )  # fmt: skip
        warm = saved is not None
        self._facts = Facts(
            self.name, process, port, image.digest, warm, owner, engine.why, size, kind.name
        )
        note = self.directory / ".lab.json"
        note.write_text(json.dumps(asdict(self._facts), indent=2) + "\n", encoding="utf-8")
        note.replace(self.directory / "lab.json")

    def _wait(self) -> None:
        """Until it answers. The first command that gets through sets the clock and stirs the random
        numbers, see files/wake."""
        warm = self.facts.warm
        progress = Progress(self._pulse, _WARM_PATIENCE if warm else _COLD_PATIENCE)
        error = "it never got ready"
        while progress.left() > 0:
            progress.look()
            if not self.running():
                raise CommandFailed(
                    f"the QEMU of the lab {self.name} ended while it booted",
                    remedy=f"its console: {self.console}", detail=self._tail(),
                )  # fmt: skip
            # Before sshd listens QEMU's network takes the connection all the same, and lets it hang.
            if not warm and self._boots_ended() <= self._boots:
                time.sleep(0.1)
                continue
            try:
                self.run("lab-wake", input=os.urandom(64), timeout=min(20, max(3, progress.left())))
                return
            except (CommandFailed, TimedOut) as failed:
                error = failed.message
                time.sleep(0.2)
        raise TimedOut(
            f"the lab {self.name} did not answer {progress.verdict()}: {error}",
            remedy=f"its console: {self.console}", detail=self._tail(),
        )  # fmt: skip

    def _pulse(self) -> Pulse:
        """What its console and its disks show: what is written to these takes room in their files."""
        disks = ("run.qcow2", *(f"{disk}.raw" for disk in qemu.SPARE_DISKS))
        try:
            written = sum((self.directory / disk).stat().st_blocks * 512 for disk in disks)
            return Pulse(console=self.console.stat().st_size, said=self._tail(), read=0, written=written)
        except FileNotFoundError:  # it has said nothing yet
            return Pulse()

    def _boots_ended(self) -> int:
        """How many boots have come to their end, as its console says (files/init)."""
        try:
            return self.console.read_bytes().count(b"lab: ready after ")
        except FileNotFoundError:
            return 0

    def _tail(self) -> str:
        try:
            return "\n".join(self.console.read_text(errors="replace").splitlines()[-15:])
        except OSError:
            return ""

    def _end(self) -> None:
        self._facts = None
        if self.running():
            qemu.kill(self.facts.process)
        self._facts = None
        self.monitor.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _saved_state(
        self, image: Image, kind: Kind, engine: qemu.Engine, packages: parcel.Parcel
    ) -> Path | None:
        """The state to start from, made where there is none (a cold boot and a few seconds). None where
        it can't be made: a cold boot works all the same."""
        made = image.disk.stat().st_mtime_ns
        facts: tuple[object, ...] = (image.digest, made, engine.digest(), packages.digest)
        if kind.hypervisor:  # what its hypervisor is told is in no recipe
            facts = (*facts, repr(kind.boot(Path(), engine.kernel_words)))
        place = images.place()
        saved = place / f"start-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
        if saved.is_dir():
            saved.touch()
            return saved
        wait = "another lab is making the saved state that labs start from: waiting"
        with images.locked(place / "start.lock", lambda: self.say(wait)):
            if saved.is_dir():
                return saved
            for old in place.glob(".start-*"):
                shutil.rmtree(old, ignore_errors=True)
            self.say(f"booting a {kind.title} lab from cold once, to save its state ({engine.why})")
            work = Path(tempfile.mkdtemp(prefix=".start-", dir=place))
            maker = Machine(f"start-{os.getpid()}", self.runner, self.say)
            maker.directory = work
            try:
                maker._boot(image, kind, engine, saved=None, owner=Process.this())
                maker.deliver(packages)
                # Without the ZFS modules: spl's random numbers are its own from when it is loaded, and
                # all pools of all labs would have one guid. modprobe -r leaves out what another of them
                # still uses, so it is asked again. The rest: less memory to save.
                maker.run(
                    "modprobe -r zfs; for i in 1 2 3; do modprobe -qr zcommon znvpair spl; done; "
                    "! grep -q '^spl ' /proc/modules && sync && echo 3 > /proc/sys/vm/drop_caches"
                )
                qemu.save_memory(maker.monitor, work / "memory", _SAVE_LIMIT)
                qemu.quit_qemu(maker.monitor, maker.facts.process)
                for path in work.iterdir():
                    if path.name not in ("run.qcow2", "memory"):
                        path.unlink()
                self.runner.change("sync", "-f", work)
                work.rename(saved)
            except FarmhandError as error:
                self.say(f"no saved state could be made: {error.message}")
                return None
            finally:
                maker._end()
        return saved


def labs_dir() -> Path:
    return state_dir() / "labs"


def known(runner: Runner, say: Say) -> tuple[Machine, ...]:
    """All labs of this user that have notes we can read, running or not."""
    found = sorted(p.parent.name for p in labs_dir().glob("*/lab.json") if Facts.read(p))
    return tuple(Machine(name, runner, say) for name in found)


def sweep(runner: Runner, say: Say) -> None:
    """End temporary labs whose owner is gone: a test run that was killed."""
    for machine in known(runner, say):
        facts = Facts.read(machine.directory / "lab.json")
        owner = facts.owner if facts else None  # None: gone meanwhile, or another version's
        if owner is not None and not owner.alive():
            say(f"{machine.name}: left over by a process that is gone: ended")
            machine.remove()
