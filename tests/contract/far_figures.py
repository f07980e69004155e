"""What the way to another machine costs a look at a farm: ``status`` as typed, of the same libvirtd here
and over ssh, where each byte takes 50 ms either way. ssh's own handshake, and the local command, are
measured beside it in the same round."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from host.paths import cache_dir
from host.run import Runner
from hypervisors.far.address import far
from hypervisors.libvirt.kvm import asked_for, judge
from hypervisors.libvirt.private import PrivateLibvirt
from tests.contract.far_rig import FarMachine, SlowWay, base_image, far_farm
from tests.figures import Figure, timed

ROOT = Path(__file__).resolve().parents[2]
TURN = 0.1  # seconds there and back
TURNS = 3
_VMS = tuple(f"vm{number}" for number in range(20))


def measure(rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    place = Path(tempfile.mkdtemp(prefix="fhb-"))
    place.chmod(0o711)
    usable = judge(asked_for(), Runner(), cache_dir()).usable
    private = PrivateLibvirt(place / "s", place / "r", cache_dir() / "libvirt", hide_kvm=not usable)
    try:
        with (
            FarMachine(place, reader=private.qemu_uid()) as machine,
            SlowWay(machine.sshd.port, TURN / 2) as way,
        ):
            yield from _of(place, private, machine, way, rounds, say)
    finally:
        private.stop(force=True)
        shutil.rmtree(place)


def _of(
    place: Path,
    private: PrivateLibvirt,
    machine: FarMachine,
    way: SlowWay,
    rounds: int,
    say: Callable[[str], None],
) -> Iterator[Figure]:
    """The farm's libvirtd and store, asked where they are, over ssh, and over ssh from far away."""
    [socket] = parse_qs(urlsplit(private.uri()).query)["socket"]
    store = machine.state / "disks"
    base_image(place)
    with machine.known.open("a") as known:
        known.write(f"[127.0.0.1]:{way.port} {machine.sshd.host_key}\n")
    uris = {
        "here": f"qemu+unix:///system?socket={socket}",
        "over ssh": machine.uri(socket),
        "over ssh, 100 ms away": machine.uri(socket, port=way.port),
    }
    environment = {**os.environ, "FARMHAND_STATE_DIR": str(place / "state")}
    environment["FARMHAND_RUNTIME_DIR"] = str(place / "runtime")

    file = place / "farm.yaml"

    def command(where: str, *words: str) -> Callable[[], object]:
        text = far_farm(uris[where], store, _VMS)
        argv = [sys.executable, "-P", "cli/start.py", *words, "--farm", str(file)]

        def typed() -> None:
            file.write_text(text)  # one farm, its host called by another name
            subprocess.run(argv, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)

        return typed

    say(f"status of {len(_VMS)} VMs, here and over ssh")
    command("over ssh", "clone-farm", "--no-start")()
    works = {f"status {where}": command(where, "status") for where in uris}
    login = far(uris["over ssh, 100 ms away"]).argv(("true",))
    works["ssh true, 100 ms away"] = lambda: subprocess.run(login, check=True)
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(timed(work))
    for name, values in seconds.items():
        yield Figure(name, tuple(values))
    local, away, handshake = (
        seconds[name]
        for name in ("status here", "status over ssh, 100 ms away", "ssh true, 100 ms away")
    )
    beyond = tuple(a - b - c for a, b, c in zip(away, local, handshake, strict=True))
    yield Figure("status 100 ms away, beyond status here and ssh", beyond, TURNS * TURN)
