"""A builder without a VM: this machine's own root, seen by its own sshd alone and with all that is
written to it in memory; process ids of its own; an apt that knows one repository, a directory."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from tests.unit.sshd_machine import Sshd

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
echo "APT::Sandbox::User root;" >root/etc/apt/apt.conf.d/99-test
exec chroot root "$@"
"""


@dataclass
class BuildMachine(Sshd):
    """``share``: a directory that both see. Needs root."""

    environment: dict[str, str] = field(default_factory=lambda: {"LANG": "de_DE.UTF-8", "SECRET": "x"})

    @property
    def share(self) -> Path:
        return self.root / "share"

    @property
    def repo(self) -> Path:
        return self.share / "repo"

    def prepare(self) -> BuildMachine:
        self.root.chmod(0o755)
        self.repo.mkdir(parents=True)
        super().prepare()
        return self

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
