"""A caching proxy for packages that a cycle's VMs reach, also without a network: apt-cacher-ng(8) on a
port of this machine's loopback, which they have through their ssh connections.

It fetches from the named repositories and from nowhere else, so that no guest gets out by it. What it
has fetched stays in the farm's state, and is there also when the repository isn't."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final
from urllib.parse import urlsplit

from builds.record import FileRecord
from host.files import own_directory
from host.run import Runner, end_talk, which
from inventory.errors import DriverFailed, NotFound, some
from inventory.model import HOST_SOURCES, Farm

PROGRAM: Final = "apt-cacher-ng"
_PACKAGE = re.compile(r"\.(?:deb|rpm)$")
_SENT = re.compile(r"[0-9]+\|O\|[0-9]+\|[^|]*\|(m[0-9]+/[^|\n]+)")  # a line of apt-cacher.log
_URL = re.compile(r"https?://[^\s;\]]+")
_PORTS = range(22000, 32768)
_PATIENCE = 30.0  # seconds for it to listen
_LOOK = 5.0  # seconds for a repository's host
# It ends when our end of its pipe closes, also by our death; and if it ends itself, all does.
_GUARDED = """
exec 3<&0
"$@" 3<&- &
p=$!
(read -r _ <&3; kill "$p") >/dev/null 2>&1 &
w=$!
wait "$p"
kill "$w" 2>/dev/null || :
"""


def sources_of(farm: Farm) -> tuple[str, ...]:
    """The repositories that guests reach. NotFound: they are to be this machine's, and it has none."""
    named = farm.cycle.package_cache if farm.cycle else ()
    found: list[str] = []
    for name in named:
        found += _of_this_machine(farm) if name == HOST_SOURCES else [name]
    return tuple(dict.fromkeys(url.rstrip("/") for url in found))


def _of_this_machine(farm: Farm) -> list[str]:
    from provision.guest.debian import load_recipe, write_sources

    found: list[str] = []
    for template in farm.templates.values():
        if template.build:
            with TemporaryDirectory(prefix="farmhand-") as work:
                files = write_sources(load_recipe(template.build).suite, Path(work))
                found += (url for file in files for url in _URL.findall(file.read_text()))
    if not found:
        raise NotFound(
            f"{farm.path}: package_cache: this machine has no apt sources for its templates",
            remedy="name the repositories by their URLs",
        )
    return found


def _free_port() -> int:
    """It takes none by itself, and none from 32768 on (3.7.4: "Error resolving address")."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _place_of(url: str) -> tuple[str, int]:
    """Host and port."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _LOOK).close()
    except OSError:
        return False
    return True


class PackageCache:
    """From ``with`` until the block's end. ``home``: its files. ``told`` gets the packages that it gave
    to guests, when it has ended: till then its log isn't whole. Where none of the repositories answers,
    which ``note`` is told, it gives what it has, the indices too. DriverFailed: it doesn't start."""

    def __init__(
        self,
        home: Path,
        sources: Iterable[str],
        told: Callable[[list[FileRecord]], object],
        note: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._home, self._sources = home, tuple(sources)
        self._log = home / "log" / "apt-cacher.log"
        self._told, self._note = told, note
        self.port = _free_port()

    def __enter__(self) -> PackageCache:
        for name in ("", "log", "settings", "cache"):
            own_directory(self._home / name, mode=0o700)
        self._log.unlink(missing_ok=True)
        places = dict.fromkeys(map(_place_of, self._sources))
        self._offline = not any(_answers(*place) for place in places)
        if self._offline:
            names = some([host for host, _ in places])
            self._note(f"nothing answers at {names}: packages come from the cache alone")
        (self._home / "settings" / "acng.conf").write_text("\n".join(self._settings()) + "\n")
        program = which(PROGRAM) or PROGRAM
        self._process = Runner(changes=False).talk(
            "sh", "-c", _GUARDED, "sh", program, "-c", self._home / "settings", "ForeGround=1"
        )  # fmt: skip
        until = time.monotonic() + _PATIENCE
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > until:
                said = self._end()
                raise DriverFailed(f"{PROGRAM} does not start: {said or 'it says nothing'}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._end()
        self._told(self._given())

    def _settings(self) -> Iterator[str]:
        yield f"CacheDir: {self._home / 'cache'}"
        yield f"LogDir: {self._home / 'log'}"
        yield f"Port: {self.port}"
        yield "BindAddress: 127.0.0.1"
        yield "VerboseLog: 1"
        yield "UnbufferLogs: 1"
        yield "AllowUserPorts: 0"  # those of the repositories; what else is asked for:
        yield "ForceManaged: 1"  # is refused
        if self._offline:  # else it has no index for anybody
            yield "Offlinemode: 1"
        for number, url in enumerate(self._sources):
            plain = re.sub(r"^https:", "http:", url)  # which is how a proxy is asked
            yield f"Remap-m{number}: {plain} ; {url}"

    def _listens(self) -> bool:
        return _answers("127.0.0.1", self.port)

    def _end(self) -> str:
        """The last that it said."""
        said = end_talk(self._process, _PATIENCE).decode(errors="replace").strip().splitlines()
        return said[-1] if said else ""

    def _given(self) -> list[FileRecord]:
        """Each once."""
        try:
            paths = dict.fromkeys(_SENT.findall(self._log.read_text(errors="replace")))
        except FileNotFoundError:
            return []
        return [made for path in paths if _PACKAGE.search(path) and (made := self._made(path))]

    def _made(self, path: str) -> FileRecord | None:
        mirror, _, rest = path.partition("/")
        file = self._home / "cache" / path
        try:
            with file.open("rb") as data:
                digest = hashlib.file_digest(data, "sha256").hexdigest()
            size = file.stat().st_size
        except OSError:  # a refusal, or a name that it keeps in another way
            return None
        url = f"{self._sources[int(mirror[1:])]}/{rest}"
        return FileRecord(name=file.name, size=size, sha256=digest, path=url, flow="in")
