"""One build in a builder VM, as far as it is the same for all formats: the place where it is built, the
source brought there, what the VM tells of itself, the build run apart from it, and what it made.

Paths get into what is made. So they depend on the package and its version alone: ``/build/NAME-VERSION``
is the build's, and ``source`` in it has the source; dpkg-genbuildinfo(1) tells a path that begins so."""

from __future__ import annotations

import hashlib
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Final

from builds.packages.formats import isolation
from builds.packages.formats.isolation import Isolation
from builds.packages.inputs import InstalledPackage
from builds.packages.order import BuildOrder
from builds.packages.record import BuilderRecord
from builds.packages.source import SourceState
from builds.step_run import StepFailed, StepLog
from host.printable import last_line
from inventory.errors import NotFound
from inventory.sizes import format_duration, format_size
from provision.guest.connection import Connection, Moved
from provision.guest.ssh_connection import in_thread

_TOP = "/build"
_DOWNLOADS = f"{_TOP}/downloads"
_INCOMING = ".farmhand-package"  # in the login's home
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ANSWER_MAX = 2**23
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~:_^%-]{0,250}")

# Whatever is of the source is touched by the build user alone, without a way to be more.
AS_BUILDER: Final = r"""
as_builder() {
  setpriv --reuid "$BUILD_USER" --regid "$(id -g "$BUILD_USER")" --init-groups --no-new-privs \
    --inh-caps=-all --bounding-set=-all -- env -i PATH="$PATH" HOME=/nonexistent LC_ALL=C.UTF-8 "$@"
}
"""
_TOOLS = 'for tool in $TOOLS; do command -v "$tool" >/dev/null || echo "$tool"; done\n'
_PLACE = r"""
umask 022
if ! id -u "$BUILD_USER" >/dev/null 2>&1; then
  shell=/usr/sbin/nologin
  [ -x "$shell" ] || shell=/sbin/nologin
  useradd --system --user-group --create-home --home-dir "/var/lib/$BUILD_USER" --shell "$shell" \
    "$BUILD_USER"
fi
[ "$(id -u "$BUILD_USER")" != 0 ] || { echo "$BUILD_USER is root there"; exit 1; }
mkdir -p "$TOP"
chown root: "$TOP"
chmod 0755 "$TOP"
rm -rf "$PLACE" "$DOWNLOADS"
mkdir -m 0755 "$PLACE" "$DOWNLOADS"
for f in "$INCOMING"/downloads/*; do
  [ ! -f "$f" ] || { cp "$f" "$DOWNLOADS"; chmod 0644 "$DOWNLOADS/${f##*/}"; }
done
chown "$BUILD_USER:" "$PLACE"
as_builder mkdir "$PLACE/incoming"
as_builder tar -C "$PLACE/incoming" --no-same-owner --no-same-permissions -xf - <"$INCOMING/source.tar"
here=$PWD
cd "$PLACE"
as_builder sh -euc "$UNPACK"
cd "$here"
if [ -f "$INCOMING/changes.tar" ]; then
  as_builder tar -C "$PLACE/source" --no-same-owner --no-same-permissions --unlink-first -xf - \
    <"$INCOMING/changes.tar"
fi
rm -rf "$INCOMING"
"""
_UNPACK = r"""
for f in incoming/*; do
  [ -d "$f" ] && [ ! -e source ] || { echo "the archive of the source is not one directory"; exit 1; }
  mv "$f" source
done
rmdir incoming
"""
_FACTS = r"""
echo "cpus $(nproc 2>/dev/null || grep -c ^processor /proc/cpuinfo)"
echo "kernel $(uname -srvm)"
sed -n "s/^MemTotal: *\([0-9]*\) kB/memory \1/p" /proc/meminfo
sed -n "s/^\(flags\|Features\)[[:space:]]*: */features /p" /proc/cpuinfo | sed 1q
echo "boot $(cat /proc/sys/kernel/random/boot_id)"
echo "home $(getent passwd "$BUILD_USER" | cut -d: -f6)"
"""
_FOUND = r"""
cd "$PLACE/$WHERE"
find . -maxdepth 1 -type f -links 1 -printf '%P\n' | LC_ALL=C sort
"""
RECIPE: Final = "\n".join((AS_BUILDER, _PLACE, _UNPACK, _PATH, isolation.RECIPE))
"""The text of what is done for all formats."""


class GuestBuild:
    """A build under way. ``doing``: what, in words, for whoever ends it."""

    def __init__(self, connection: Connection, order: BuildOrder, log: StepLog) -> None:
        self._connection = connection
        self._facts: dict[str, str] = {}
        self.order = order
        self.log = log
        self.doing = "getting the source"
        self.user = order.settings.user
        self.place = f"{_TOP}/{_component(order.state.name)}-{_component(order.state.given)}"
        self.source = f"{self.place}/source"

    # -- scripts ------------------------------------------------------------------------------

    async def ask(self, script: str, env: Mapping[str, str] | None = None, *, ok: int = 0) -> str:
        """What a script of ours prints, which root runs. StepFailed (environment) if it fails."""
        status, said = await self.run(script, env, quiet=True)
        if status > ok:
            raise StepFailed("environment", last_line(said, 300) or f"exited with {status}", exit=status)
        return said

    async def run(
        self, script: str, env: Mapping[str, str] | None = None, *, quiet: bool = False
    ) -> tuple[int, str]:
        """Run a script as root. Returns its status, and what it printed, which is in the log, too,
        unless ``quiet``. StepFailed where it prints more than there is room for."""
        said: list[bytes] = []

        def keep(data: bytes) -> None:
            said.append(data)
            if not quiet:
                self.log.write(data)

        done = await self._connection.run(
            AS_BUILDER + script,
            env={"BUILD_USER": self.user, "PLACE": self.place, "LC_ALL": "C.UTF-8", **(env or {})},
            timeout=self.order.seconds,
            log=keep,
            most=_ANSWER_MAX if quiet else self.log.room,
            root=True,
        )
        if done.cut:
            raise self._too_much()
        return done.status, b"".join(said).decode(errors="replace")

    def _too_much(self) -> StepFailed:
        most = format_size(self.order.limits.log_size)
        self.log.say(f"cut here: a build's log may have {most}")
        return StepFailed("source", f"printed more than {most}; ended there")

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """StepFailed in place of the TimeoutError that ended what is within."""
        try:
            yield
        except TimeoutError:
            limit = format_duration(self.order.seconds)
            message = f"not done within its limit of {limit}: ended while {self.doing}"
            self.log.say(message)
            raise StepFailed("time-out", message) from None

    # -- the place ----------------------------------------------------------------------------

    async def prepare(self, tools: Mapping[str, str], unpack: str = "") -> None:
        """Make the place, with the source in it. ``tools``: what the format needs in the VM, each with
        the package that has it. ``unpack``: makes the directory ``source`` out of ``incoming``, if that
        is not one directory."""
        await self._may_be_root()
        await self._has({**tools, **isolation.TOOLS, "useradd": "passwd", "tar": "tar"})
        state, connection = self.order.state, self._connection
        await connection.output(f"rm -rf {_INCOMING}")
        digest = await in_thread(lambda: _sha256(self.order.source))
        await connection.put_file(self.order.source, f"{_INCOMING}/source.tar", sha256=digest)
        if self.order.downloads:
            await connection.put(self.order.downloads, f"{_INCOMING}/downloads")
        if state.files and state.changes:
            with tempfile.TemporaryDirectory() as directory:
                changes = Path(directory, "changes.tar")
                changes.write_bytes(_packed(state))
                await connection.put([changes], _INCOMING)
        incoming = (await connection.output(f"cd {_INCOMING}; pwd -P")).rstrip("\n")
        settings = {
            "TOP": _TOP, "DOWNLOADS": _DOWNLOADS, "INCOMING": incoming, "UNPACK": unpack or _UNPACK,
        }  # fmt: skip
        status, said = await self.run(_PLACE, settings)
        if status:
            raise StepFailed(
                "source" if unpack else "environment",
                f"the source can't be unpacked: {last_line(said, 300) or f'status {status}'}",
                exit=status,
            )
        facts = await self.ask(_FACTS)
        self._facts = dict(line.split(" ", 1) for line in facts.splitlines() if " " in line)
        self.log.say(f"the source is in {self.source}, {self.user} builds it")

    async def _may_be_root(self) -> None:
        if not await self._connection.may_be_root():
            login = self._connection.endpoint.user
            raise StepFailed(
                "environment",
                f"{login} can't be root there, so nothing can be installed for a build",
                remedy=f"write 'sudo: {login}' under 'ssh:' and make the VM anew; or log in as root",
            )

    async def _has(self, tools: Mapping[str, str]) -> None:
        """StepFailed unless the VM has all these tools."""
        lacks = (await self.ask(_TOOLS, {"TOOLS": " ".join(tools)})).split()
        if lacks:
            packages = dict.fromkeys(tools[tool] for tool in lacks if tool in tools)
            raise StepFailed(
                "environment",
                f"there is no {', '.join(lacks)} in the VM",
                remedy=f"give its template 'packages: [{', '.join(packages)}]', or its image what has "
                "it, and make the VM anew",
            )

    @property
    def cpus(self) -> int:
        return int(_digits(self._facts.get("cpus", "")) or "1")

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """All the variables that the build is given."""
        return {
            "PATH": _PATH, "HOME": self._facts.get("home") or "/nonexistent", "USER": self.user,
            "LOGNAME": self.user, "SHELL": "/bin/sh", "LANG": "C.UTF-8", "TZ": "UTC",
            "DOWNLOADS": _DOWNLOADS, "SOURCE_DATE_EPOCH": str(self.order.state.when),
            **self.order.environment, **more,
        }  # fmt: skip

    def builder(self, environment: Mapping[str, str]) -> BuilderRecord:
        """What the guest told of itself, and how it was built."""
        facts = self._facts
        return BuilderRecord(
            vm=self._connection.endpoint.vm,
            boot_id=facts.get("boot", ""),
            memory=int(_digits(facts.get("memory", "")) or "0") * 1024,
            cpus=self.cpus,
            kernel=facts.get("kernel", ""),
            features=facts.get("features", ""),
            user=self.user,
            directory=self.source,
            umask="0022",
            environment=environment,
        )

    # -- the build ----------------------------------------------------------------------------

    async def isolated(self, build: str, environment: Mapping[str, str]) -> None:
        """As ``attempt``. StepFailed if it fails."""
        _, failed = await self.attempt(build, environment)
        if failed is not None:
            raise failed

    async def attempt(
        self, build: str, environment: Mapping[str, str], *, contained: bool = False
    ) -> tuple[str, StepFailed | None]:
        """Run a script in the source's directory, as the build user, within its limits and, unless
        ``contained`` (``Isolation``), without network. When it returns, nothing of it runs any more.
        Returns what it printed, and why it failed."""
        declared = self.order.state.declared
        apart = Isolation(
            user=self.user, directory=self.source, environment=environment,
            memory=declared.memory, disk=declared.disk, contained=contained,
        )  # fmt: skip
        self.log.mark()
        status, said = await self.run(apart.script, apart.settings(build))
        if not status:
            return said, None
        over = (await self._connection.output(isolation.OVER)).strip()
        return said, apart.failure(self.log.text(), status, over)

    async def made(self, suffixes: Sequence[str], where: str = "") -> tuple[Moved, ...]:
        """The files that it made, in that directory of its place. StepFailed: none of them is a package,
        or one has no fit name."""
        found = await self.ask(_FOUND, {"WHERE": where})
        names = [name for name in found.splitlines() if name.endswith(tuple(suffixes))]
        if unfit := next((name for name in names if not _FILE.fullmatch(name)), ""):
            raise StepFailed("source", f"it made a file with an unfit name: {unfit[:300]!r}")
        if not any(name.endswith((".deb", ".udeb", ".rpm")) for name in names):
            raise StepFailed("source", "it made no package")
        top = "/".join(filter(None, (self.place, where)))
        try:
            return await self._connection.list([f"{top}/{name}" for name in names], self.order.limits)
        except NotFound as error:
            raise StepFailed("source", error.message) from None


def lines(text: str) -> tuple[InstalledPackage, ...]:
    """NAME, VERSION, ARCHITECTURE, a tab between them; sorted."""
    found = [line.split("\t") for line in text.splitlines()]
    made = {
        InstalledPackage(name=one[0], version=one[1], architecture=one[2])
        for one in found
        if len(one) == 3
    }
    return tuple(sorted(made, key=lambda one: (one.name, one.architecture, one.version)))


def lacking(wanted: tuple[str, ...], installed: tuple[InstalledPackage, ...]) -> list[str]:
    """Those of NAME=VERSION, or NAME:ARCHITECTURE=VERSION, that aren't installed."""
    there = {f"{one.name}={one.version}" for one in installed}
    there |= {f"{one.name}:{one.architecture}={one.version}" for one in installed}
    return [each for each in wanted if each not in there]


def _component(text: str) -> str:
    """A part of a path that programs and search paths take as it is."""
    return re.sub(r"[^A-Za-z0-9.+~_-]", "_", text)


def _digits(text: str) -> str:
    return text[:18] if text.isascii() and text.isdigit() else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _packed(state: SourceState) -> bytes:
    """The files of the source that are others in what is built, as a tar archive."""
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in sorted(state.changes.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), state.when, 0o644
            archive.addfile(info, BytesIO(data))
    return out.getvalue()
