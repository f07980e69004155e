"""Another machine, as far as ssh can tell: a real sshd on loopback, with a farmhand state of its own."""

from __future__ import annotations

import contextlib
import itertools
import queue
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import quote

from host.paths import cache_dir
from hypervisors.api import Callbacks, Disks, StepFn, no_step
from hypervisors.disks.stores import StorePlace
from hypervisors.far.address import Far, far
from hypervisors.far.drivers import FarHypervisor, far_disks
from hypervisors.far.link import Link
from hypervisors.libvirt.opening import Place
from hypervisors.ownership import FarmIdentity
from tests.unit.sshd_machine import Sshd, make_key

MAIN = "hypervisors.far.main.main()"


class FarMachine:
    """``place`` is where its files are: below "there" what farmhand keeps on it. ``reader``: who QEMU
    runs as there, for this machine need not know that user. ``sshd``: what its sshd has besides, such as
    a login shell with its files. A context manager."""

    def __init__(self, place: Path, *, reader: int | None = None, **sshd: object) -> None:
        self.place = place
        self.state = place / "there"
        if reader is not None:
            self._python(f"import hypervisors.far.agent as a\na.reader_of = lambda *_: {reader}")
        key = place / "key"
        make_key(key)
        self.sshd = Sshd(
            "far", place / "sshd", key,
            environment={
                "PATH": f"{place}/bin:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
                "FARMHAND_STATE_DIR": str(self.state),
                "FARMHAND_RUNTIME_DIR": str(place / "run"),
                "FARMHAND_CACHE_DIR": str(place / "cache"),
            },
            **sshd,
        ).prepare()  # fmt: skip
        (place / "cache").mkdir()
        for note in cache_dir().glob("kvm-*.json"):  # what was found out about KVM, which is this one's
            shutil.copy(note, place / "cache")
        self.known = place / "known_hosts"
        self.known.write_text(f"[127.0.0.1]:{self.sshd.port} {self.sshd.host_key}\n")
        self.links: list[Link] = []
        self._shared: dict[str, Link] = {}

    def _python(self, spoil: str) -> None:
        """A python3 of that machine's that runs so much first."""
        program = self.place / "bin" / "python3"
        program.parent.mkdir()
        program.write_text(
            f"#!{sys.executable}\nimport os, sys\n*start, code = sys.argv[1:]\n"
            f"code = code.replace({MAIN!r}, {spoil + chr(10) + MAIN!r})\n"
            f"os.execv(sys.executable, [sys.executable, *start, code])\n"
        )
        program.chmod(0o755)

    def __enter__(self) -> FarMachine:
        self.sshd.start()
        return self

    def __exit__(self, *_: object) -> None:
        for link in self.links:
            link.close()
        self.sshd.stop()

    def uri(self, libvirtd: str = "", driver: str = "qemu", port: int = 0) -> str:
        """Its libvirtd's, by its socket, as a farm file has it. ``port``: another way there."""
        options = {"keyfile": self.sshd.client_key, "known_hosts": self.known, "socket": libvirtd}
        query = "&".join(f"{name}={quote(str(value))}" for name, value in options.items() if value)
        return f"{driver}+ssh://127.0.0.1:{port or self.sshd.port}/system?{query}"

    def link(
        self, farm: FarmIdentity, uri: str = "", *, spoil: str = "", plan: bool = False, **place: object
    ) -> Link:
        """A connection of its own. ``spoil``: Python that is run over there first."""
        there = far(uri or self.uri())
        argv = spoilt(there, spoil) if spoil else there.argv
        of_store = {f.name for f in fields(StorePlace)}
        disks = StorePlace(farm=farm, **{key: place.pop(key) for key in of_store & place.keys()})
        asked = replace(Place(disks=disks, driver="kvm", uri=there.uri), **place)
        link = Link(there.name, argv, asked, Callbacks(), plan=plan, login=there.login)
        self.links.append(link)
        return link

    def shared(self, *arguments: str, **options: object) -> Link:
        """One that was made for the same before."""
        key = repr((arguments, sorted(options.items())))
        if key not in self._shared:
            self._shared[key] = self.link(*arguments, **options)
        return self._shared[key]

    def disks(self, farm: FarmIdentity, step: StepFn = no_step, **options: object) -> Disks:
        return far_disks(self.shared(farm, **options), step)

    def hypervisor(self, farm: FarmIdentity, step: StepFn = no_step, **options: object) -> FarHypervisor:
        numbers = itertools.count()
        return FarHypervisor(
            self.shared(farm, **options), tuple,
            lambda name: self.place / f"{name}-{next(numbers)}.console", step,
        )  # fmt: skip


def spoilt(there: Far, spoil: str) -> Callable[[Sequence[str]], tuple[str, ...]]:
    def argv(command: Sequence[str]) -> tuple[str, ...]:
        *start, code = command
        return there.argv((*start, code.replace(MAIN, f"{spoil}\n{MAIN}")))

    return argv


def base_image(directory: Path) -> None:
    """What ``far_farm``'s template is imported from, beside the farm file: a boot sector's signature."""
    with (directory / "image.raw").open("wb") as file:
        file.write(bytes(510) + b"\x55\xaa")
        file.truncate(16 * 2**20)


def far_farm(uri: str, store: Path, vms: Sequence[str]) -> str:
    """A farm file whose host is that machine, with a template of ``image.raw`` beside it."""
    return (
        f"farm: kata\nhosts: {{far: {{driver: kvm, uri: '{uri}', disks: {{path: {store}}}}}}}\n"
        "network: {mode: bridge, bridge: fhnone, subnet: 10.10.61.0/24, gateway: 10.10.61.1}\n"
        "templates: {base: {import: image.raw}}\n"
        f"vms: {{{', '.join(f'{vm}: {{}}' for vm in vms)}}}\n"
    )


class SlowWay:
    """A way to a port of this machine on which each byte takes ``delay`` seconds, either way. ``port``
    is where it begins. A context manager."""

    def __init__(self, to: int, delay: float) -> None:
        self._to = to
        self._delay = delay
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]

    def __enter__(self) -> SlowWay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                for one, other in ((near, there), (there, near)):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    on_its_way: queue.Queue[tuple[float, bytes]] = queue.Queue()
                    for work, end in ((self._take, one), (self._bring, other)):
                        threading.Thread(target=work, args=(end, on_its_way), daemon=True).start()

    def _take(self, end: socket.socket, on_its_way: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = end.recv(2**16)
            except OSError:
                data = b""
            on_its_way.put((time.monotonic() + self._delay, data))

    def _bring(self, end: socket.socket, on_its_way: queue.Queue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = on_its_way.get()
                time.sleep(max(0, due - time.monotonic()))
                if not data:
                    end.shutdown(socket.SHUT_WR)
                    return
                end.sendall(data)
