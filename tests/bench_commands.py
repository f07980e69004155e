"""Commands as an admin types them, as whole processes: wall and CPU time (of their children too), in
turns beside a bare invoke, and beside what others' tools take for the same on the same libvirtd.

kcli and virt-clone are measured where they are installed. No guest is started; the disks that are
cloned hold as much as a small Debian's. What libvirtd does for others, such as copying, is not in their
CPU time.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from host.paths import cache_dir
from host.run import Runner
from inventory.errors import DriverFailed
from tests.figures import Figure

ROOT = Path(__file__).resolve().parents[1]
VMS = 10
BARE = "invoke --list, one task"
LIST = "./invoke --list"
STATUS = f"./invoke status, {VMS} VMs"
CLONE = "./invoke clone-farm, one VM more"
CHANGED = f"{CLONE}, just declared"
"""With a farm file that no command has seen before: it is validated."""
_HELD = 512 * 2**20
KCLI = cache_dir() / "tests" / "kcli"
"""Where kcli is looked for, besides PATH: a virtual environment."""

_FARM = f"""\
farm: bench
templates: {{empty: {{import: empty.qcow2}}}}
vms:
{"".join(f"  vm{n}: {{memory: 128M}}{chr(10)}" for n in range(VMS))}"""
_TASK = '"""One task."""\nfrom invoke import task\n\n\n@task\ndef one(c):\n    """One."""\n'


@dataclass(frozen=True, slots=True)
class Command:
    """``undo`` makes a next run find what the first one found; it isn't measured."""

    argv: Sequence[str | Path]
    prepare: Callable[[], object] = lambda: None
    undo: Callable[[], object] = lambda: None


def measure(directory: Path, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    with ExitStack() as stack:
        work = _Work(directory)
        say(f"cloning {VMS} VMs for status")
        work.run(Command([ROOT / "invoke", "clone-farm", "--no-start"]))
        stack.callback(work.run, Command([ROOT / "invoke", "destroy", "--all"]))
        commands = {**work.ours(), **work.theirs(stack, say)}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for command in commands.values():
            work.run(command)  # each finds its files in memory, and its bytecode
        for turn in range(rounds):
            say(f"commands, round {turn + 1} of {rounds}")
            for name, command in commands.items():
                seconds[name].append(work.run(command))
    for name in commands:
        yield from _both(name, seconds[name], *_LIMITS.get(name, ()))
    for name, (limit, cpu_limit, beside) in _BESIDE.items():
        if beside in seconds:
            yield from _both(f"{name}, beside {beside}", seconds[name], limit, cpu_limit, beside)


_LIMITS = {LIST: (1.3, 1.3, BARE), STATUS: (1.6, 1.6, BARE)}
_BESIDE = {
    STATUS: (0.8, 0.8, "kcli list vm"),
    CLONE: (0.5, 1.0, "kcli clone"),
    CHANGED: (0.5, 1.0, "kcli clone"),
}


def _both(
    name: str, runs: Sequence[tuple[float, float]], limit: float | None = None,
    cpu_limit: float | None = None, beside: str = "",
) -> Iterator[Figure]:  # fmt: skip
    wall, cpu = zip(*runs, strict=True)
    yield Figure(name, wall, limit, beside)
    yield Figure(f"{name}, CPU", cpu, cpu_limit, f"{beside}, CPU" if beside else "")


class _Work:
    """The farm that is measured on, and the commands."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._farm = directory / "farm.yaml"
        self._farm.write_text(_FARM)
        self._runner = Runner()
        self._image("empty.qcow2")
        (directory / "one").mkdir()
        (directory / "one" / "tasks.py").write_text(_TASK)
        self._more = ""
        self.environment = {
            **os.environ,
            "FARMHAND_STATE_DIR": str(directory / "s"),
            "FARMHAND_RUNTIME_DIR": str(directory / "t"),
            "FARMHAND_FARM": str(self._farm),
            "HOME": str(directory),
        }
        # Bytecode is kept, as it is where nobody says otherwise.
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, command: Command) -> tuple[float, float]:
        """Seconds: wall, CPU."""
        command.prepare()
        argv = [str(word) for word in command.argv]
        log = self._directory / "command.log"
        with log.open("wb") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                argv, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise DriverFailed(f"{shlex.join(argv)} failed", detail=log.read_text(errors="replace"))
        command.undo()
        return seconds, used.ru_utime + used.ru_stime

    def ours(self) -> Mapping[str, Command]:
        one = self._directory / "one"
        wrapper = ROOT / "invoke"
        return {
            BARE: Command([sys.executable, "-P", "-m", "invoke", "--search-root", one, "--list"]),
            LIST: Command([wrapper, "--list"]),
            STATUS: Command([wrapper, "status"]),
            CLONE: Command([wrapper, "clone-farm", "--no-start"], self._seen, self._one_less),
            CHANGED: Command([wrapper, "clone-farm", "--no-start"], self._one_more, self._one_less),
        }

    def theirs(self, stack: ExitStack, say: Callable[[str], None]) -> Mapping[str, Command]:
        """On the farm's own libvirtd, with a VM and a disk of their own."""
        uri = self._uri()
        virsh = ("virsh", "-q", "-c", uri)
        found: dict[str, Command] = {"virsh list --all": Command([*virsh, "list", "--all"])}
        pool = self._directory / "pool"
        pool.mkdir()
        self._image("pool/base.qcow2")
        self._runner.change(*virsh, "pool-create-as", "bench", "dir", "--target", pool)
        stack.callback(self._runner.change, *virsh, "pool-destroy", "bench")
        text = self._runner.read(*virsh, "dumpxml", "--inactive", "bench-vm0").stdout
        base = self._directory / "base.xml"
        base.write_text(_as_base(text, pool / "base.qcow2"))
        self._runner.change(*virsh, "define", base)
        stack.callback(self._runner.change, *virsh, "undefine", "base")

        def without(name: str) -> None:
            self._runner.change(*virsh, "undefine", name)
            self._runner.change(*virsh, "vol-delete", pool / f"{name}.qcow2")

        if kcli := shutil.which("kcli", path=f"{KCLI / 'bin'}:{os.environ.get('PATH', '')}"):
            settings = self._directory / ".kcli" / "config.yml"
            settings.parent.mkdir()
            settings.write_text(
                f"default: {{client: here}}\nhere: {{type: kvm, url: '{uri}', pool: bench}}\n"
            )
            found["kcli list vm"] = Command([kcli, "list", "vm"])
            found["kcli clone"] = Command(
                [kcli, "clone", "-b", "base", "other"], undo=lambda: without("other")
            )
        else:
            say(f"kcli is not installed (python3 -m venv {KCLI}; its bin/pip install kcli): left out")
        if virt_clone := shutil.which("virt-clone"):
            argv = (virt_clone, "--connect", uri, "-o", "base", "-n", "other")
            found["virt-clone"] = Command(
                [*argv, "--file", pool / "other.qcow2"], undo=lambda: without("other")
            )
        else:
            say("virt-clone is not installed (apt-get install virtinst): left out")
        return found

    def _image(self, name: str) -> None:
        image = self._directory / name
        self._runner.change("qemu-img", "create", "-q", "-f", "qcow2", image, "1G")
        written = (f"7 0 {_HELD}", "0x55 510 1", "0xaa 511 1")  # with a boot sector's signature
        self._runner.change("qemu-io", *(f"-cwrite -q -P {what}" for what in written), image)

    def _uri(self) -> str:
        socket = self._directory / "t" / "bench" / "run" / "libvirt-sock"
        return f"qemu+unix:///{'system' if os.geteuid() == 0 else 'session'}?socket={socket}"

    def _one_more(self) -> None:
        """As an admin adds one: the farm file is another than ever before."""
        self._more = f"more-{uuid4().hex[:8]}"
        self._farm.write_text(f"{_FARM}  {self._more}: {{memory: 128M}}\n")

    def _seen(self) -> None:
        self._one_more()
        self.run(Command([ROOT / "invoke", "status"]))

    def _one_less(self) -> None:
        self.run(Command([ROOT / "invoke", "destroy", "--vm", self._more]))
        self._farm.write_text(_FARM)


def _as_base(xml: str, disk: Path) -> str:
    """A plain VM like a farm's, with one disk and no console log, that others' tools can clone."""
    text = re.sub(r"<name>.*?</name>", "<name>base</name>", xml)
    text = re.sub(r"<uuid>.*?</uuid>", f"<uuid>{uuid4()}</uuid>", text)
    text = re.sub(r"<(metadata|qemu:commandline)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<log file=[^>]*/>", "", text)
    text = re.sub(r"<disk [^>]*>(?:(?!</disk>).)*<readonly/>.*?</disk>", "", text, flags=re.DOTALL)
    source = f"<source file='{disk}'/>"
    return re.sub(r"<source file='[^']*'>.*?</source>", source, text, flags=re.DOTALL)
