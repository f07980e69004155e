"""A builder without a VM: this machine's own root, seen by its own sshd alone and with all that is
written to it in memory; process ids of its own; an apt and a dnf that know one repository each, a
directory."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from builds.packages.formats import build_format
from builds.packages.order import BuildOrder
from builds.packages.source import SourceState
from builds.step_run import StepFailed, StepLog
from inventory.packages import PackageBuilds, PackageSource
from provision.guest.connection import Connection
from tests.unit.sshd_machine import Sshd, make_key

WHEN = 1793534400
"""When the sources are of."""
USER = "farmhand-test"
"""Who builds."""

# Arguments: the directory that stays this machine's, then the command. What apt has of this machine is
# none of the test's.
_ENTER = r"""
top=$1
shift
mkdir -p "$top/layers"
mount -t tmpfs tmpfs "$top/layers"
cd "$top/layers"
mkdir upper work root
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
mount --bind "$top/share" root"$top/share"
mount --rbind /dev root/dev
mount -t proc proc root/proc
mount -t tmpfs tmpfs root/run
mkdir root/run/sshd
rm -rf root/etc/apt/sources.list root/etc/apt/sources.list.d root/var/lib/apt/lists root/build
mkdir -p root/etc/apt/sources.list.d root/var/lib/apt/lists/partial
printf 'Types: deb\nURIs: file:%s/repo\nSuites: ./\nTrusted: yes\n' "$top/share" \
  >root/etc/apt/sources.list.d/farmhand-stable.sources
mkdir -p root/etc/yum.repos.d
printf '[stable-head]\nname=stable\nbaseurl=file://%s/rpms\nenabled=1\ngpgcheck=0\n' "$top/share" \
  >root/etc/yum.repos.d/farmhand-stable.repo
echo "APT::Sandbox::User root;" >root/etc/apt/apt.conf.d/99-test
# a process in a chroot gets no user namespaces: user_namespaces(7)
cd root
pivot_root . mnt
umount -l mnt
exec "$@"
"""


@dataclass
class BuildMachine(Sshd):
    """``share``: a directory that both see. Needs root."""

    environment: dict[str, str] = field(default_factory=lambda: {"LANG": "de_DE.UTF-8", "SECRET": "x"})

    @classmethod
    @contextlib.contextmanager
    def running(cls, top: Path) -> Iterator[BuildMachine]:
        make_key(top / "key")
        (top / "machine").mkdir()
        machine = cls("builder", top / "machine", top / "key").prepare()
        machine.start()
        try:
            yield machine
        finally:
            machine.stop()

    @property
    def share(self) -> Path:
        return self.root / "share"

    @property
    def repo(self) -> Path:
        return self.share / "repo"

    @property
    def rpms(self) -> Path:
        return self.share / "rpms"

    def prepare(self) -> BuildMachine:
        self.root.chmod(0o755)
        self.repo.mkdir(parents=True)
        self.rpms.mkdir()
        super().prepare()
        return self

    def prints(self, script: str, timeout: float = 60) -> str:
        """What a script prints there, as root."""

        async def ask() -> str:
            async with await Connection.open(self.endpoint()) as connection:
                return await connection.output(script, timeout=timeout)

        return asyncio.run(ask())

    def command(self) -> list[str]:
        enclosed = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", _ENTER, "sh"]
        return [*enclosed, str(self.root), *super().command()]


def deb_source(
    name: str = "hello",
    version: str = "1.0-1",
    *,
    rules: str = "",
    wants: str = "",
    files: Mapping[str, str] | None = None,
    architecture: str = "all",
) -> dict[str, str]:
    """The files of a source that needs no debhelper. ``rules``: commands that fill the directory
    ``out``, which is what its package has."""
    control = (
        f"Source: {name}\nMaintainer: A <a@example.org>\nBuild-Depends: {wants}\n"
        f"Standards-Version: 4.6.2\n\nPackage: {name}\nArchitecture: {architecture}\n"
        f"Description: {name}\n"
    )
    made = rules or 'date -d "@$$SOURCE_DATE_EPOCH" >out/when'
    made = "".join(f"\t{line}\n" for line in made.splitlines())
    return {
        "debian/control": control,
        "debian/changelog": f"{name} ({version}) unstable; urgency=low\n\n  * It.\n\n"
        " -- A <a@example.org>  Sun, 01 Nov 2026 12:00:00 +0000\n",
        "debian/source/format": "3.0 (native)\n" if "-" not in version else "3.0 (quilt)\n",
        "debian/rules": "#!/usr/bin/make -f\nclean:\n\nbuild-arch build-indep build: out\nout:\n"
        f"\tmkdir out\n{made}\nbinary-arch:\n\nbinary-indep binary: build\n"
        f"\tmkdir -p debian/{name}/DEBIAN debian/{name}/usr/share/{name}\n"
        f"\tcp -r out debian/{name}/usr/share/{name}/\n"
        f"\tdpkg-gencontrol -p{name} -Pdebian/{name}\n"
        f"\tdpkg-deb --root-owner-group --build debian/{name} ..\n",
        **(files or {}),
    }


def packed(path: Path, files: Mapping[str, str | bytes], top: str = "source", when: int = 0) -> Path:
    """A tar archive of them in one directory; what begins with ``#!`` can be run."""
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            data = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(f"{top}/{name}" if top else name)
            info.size, info.mtime = len(data), when
            info.mode = 0o755 if data.startswith(b"#!") else 0o644
            archive.addfile(info, BytesIO(data))
    return path


def index(repo: Path) -> None:
    """Have the directory's .deb files be an archive."""
    made = subprocess.run(["apt-ftparchive", "packages", "."], cwd=repo, check=True, capture_output=True)
    (repo / "Packages").write_bytes(made.stdout)


class Builds:
    """Builds packages there, one after the other."""

    def __init__(self, machine: BuildMachine, top: Path) -> None:
        self.machine = machine
        self.top = top
        self.count = 0

    def __call__(
        self, files=None, *, name="hello", version="1.0-1", source=None, state=None, tar=None, env=None,
        tool="dpkg-buildpackage", **more,
    ) -> BuiltThere:  # fmt: skip
        self.count += 1
        at = self.top / f"b{self.count}"
        at.mkdir()
        declared = source or PackageSource(git="x")
        is_rpm = declared.srpm or any(str(one).endswith(".spec") for one in files or ())
        found = SourceState(
            name=name, format="rpm" if is_rpm else "deb", declared=declared, place="x", tree="0" * 40,
            stated=version, given=version, when=WHEN, **(state or {}),
        )  # fmt: skip
        order = BuildOrder(
            name=name,
            state=found,
            source=tar or packed(at / "source.tar", files or deb_source(), when=WHEN),
            settings=PackageBuilds(builders=("builder",), repository="stable", user=USER, tool=tool),
            environment={"SOURCE_DATE_EPOCH": str(WHEN), "GIT_REVISION": "main", **(env or {})},
            repository="farmhand-stable",
            **more,
        )
        return BuiltThere(self.machine, order, at)


class BuiltThere:
    """What a build came to. ``files``: their bytes by name. ``installed``: each time that it was
    told."""

    def __init__(self, machine: BuildMachine, order: BuildOrder, at: Path) -> None:
        self.order, self.at = order, at
        self.installed = []
        self.failed = self.built = None
        self.files: dict[str, bytes] = {}
        log = StepLog(at / "log", "builder", None)
        asyncio.run(self._go(machine, log))
        log.close()
        self.log = (at / "log").read_text(errors="replace")

    async def _go(self, machine: BuildMachine, log: StepLog) -> None:
        async def before(installed):
            self.installed.append(installed)

        async with await Connection.open(machine.endpoint()) as connection:
            try:
                made = build_format(self.order.state.format)
                self.built = await made.build(connection, self.order, log, before)
            except StepFailed as error:
                self.failed = error
                return
            for file in self.built.files:
                await connection.get(file, self.at / "got")
                self.files[file.name] = (self.at / "got" / file.name).read_bytes()
