"""What the lab gets from this machine, for it has no network: the Python packages that run these tests,
the kernel and initrd of the small test guest, and the working tree.

The first two go into the saved state (they change rarely), the working tree into every lab.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from host.paths import cache_dir
from inventory.errors import Unsupported

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = "root/farmhand"  # in the lab
_CACHE = "var/cache/farmhand"
# Linters and installers: nothing that runs in the lab needs them.
_NOT_SENT = (
    "mypy", "ruff", "pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth",
    "ast_serialize", "librt",
)  # fmt: skip
_DEBIAN_S = ("libvirt.py", "libvirtaio.py", "libvirt_lxc.py", "libvirt_qemu.py", "libzfs_core")
_DEBIAN = "/usr/lib/python3/dist-packages"
_LISTS = (
    "requirements.lock", "tests/dev/requirements-dev.lock", "packages.txt", "tests/dev/packages-dev.txt",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parcel:
    """``digest`` names its content; ``archive`` makes the tar."""

    digest: str
    archive: Callable[[], bytes]


def packages() -> Parcel:
    """The environment of ./invoke, at the path where ./invoke looks for it in the lab: there the wrapper
    finds everything set up. Also the small test guest of tests/contract."""
    from tests.contract import small_guest

    guest = small_guest.build(cache_dir())
    site = Path(sysconfig.get_path("purelib"))
    sums = [hashlib.sha256((ROOT / name).read_bytes()).hexdigest()[:12] for name in _LISTS]
    seen = sorted(p.name for p in site.iterdir() if _sent(p.name))
    facts = (sums, sys.version, seen, guest.kernel.parent.name, Path(__file__).read_text())
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def archive() -> bytes:
        out = io.BytesIO()
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        venv = f"{_CACHE}/venv-{sums[0]}"
        libraries = f"{venv}/lib/{version}/site-packages"
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for path in sorted(site.iterdir()):
                if _sent(path.name) and not path.is_symlink():
                    tar.add(path, f"{libraries}/{path.name}", filter=_plain)
            if beside := _yaml_elsewhere(site):
                tar.add(beside, f"{libraries}/yaml", filter=_plain)
            for name in _DEBIAN_S:
                _link(tar, f"{libraries}/{name}", f"{_DEBIAN}/{name}")
            settings = f"home = /usr/bin\ninclude-system-site-packages = true\nversion = {version[6:]}\n"
            _text(tar, f"{venv}/pyvenv.cfg", settings)
            _link(tar, f"{venv}/bin/python", "/usr/bin/python3")
            # the stamps of ./invoke
            _text(tar, f"{venv}/ready", f"{version}\n")
            _text(tar, f"{venv}/ready-dev-{sums[1]}", "")
            _text(tar, f"{_CACHE}/packages-{sums[2]}.ready", "")
            _text(tar, f"{_CACHE}/packages-{sums[3]}-dev.ready", "")
            for path in (guest.kernel, guest.initrd):
                tar.add(path, f"{_CACHE}/test-guest/{path.name}", filter=_plain)
            _link(tar, "opt/venv", f"/{venv}")
            _text(tar, "etc/lab/parcel", digest)
        return out.getvalue()

    return Parcel(digest, archive)


def _yaml_elsewhere(site: Path) -> Path | None:
    """In an environment made with --system-site-packages Debian's PyYAML may be the one in use."""
    import yaml

    found = Path(yaml.__file__).parent
    return found if found.parent != site else None


def _sent(name: str) -> bool:
    return not name.startswith(_NOT_SENT) and "__mypyc" not in name and name != "__pycache__"


def working_tree() -> bytes:
    """A tar of what git knows of the checkout and of what it doesn't ignore, as it is on disk now;
    without .git, for the lab needs no history. Unsupported outside of a git checkout."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        raise Unsupported(
            f"{ROOT} is no git checkout: {listed.stderr.decode(errors='replace').strip()}",
            remedy="the lab gets the files that git lists: clone the repository",
        )
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in sorted({n for n in listed.stdout.decode().split("\0") if n}):
            path = ROOT / name
            if path.is_symlink() or path.is_file():  # deleted, and not yet committed: not there
                tar.add(path, f"{CHECKOUT}/{name}", recursive=False, filter=_plain)
    return out.getvalue()


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mode |= 0o444 | (0o111 if info.isdir() else 0)
    return info


def _text(tar: tarfile.TarFile, name: str, text: str) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(text), 0o644
    tar.addfile(info, io.BytesIO(text.encode()))


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    tar.addfile(info)
