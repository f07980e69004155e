"""A lab's image, made once from its kind's recipe and files, kept in the cache directory.

    CACHE/lab/zfs-KERNEL-VERSION/     the kernel and its modules, with ZFS among them (5 minutes)
    CACHE/lab/image-HASH/             root file system, kernel, initrd, keys (a minute and a half)
    CACHE/lab/*.log                   what the builders said

The hash is that of the recipe and of the files beside it. Kernel and ZFS version are whatever the
suite offers when an image is made: they name the modules' cache, so that a changed recipe doesn't
compile ZFS again. Each directory appears whole, by a rename; a killed build leaves a directory with a
dot in front, which the next build removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import lzma
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host.hints import NAMESPACES, ROOM, hint
from host.paths import cache_dir
from host.run import Runner, which
from inventory.errors import CommandFailed, NoSpace, Unsupported
from provision.guest.debian import MIRRORS, apt_settings, remove_build, write_sources
from tests.lab.kinds import HERE, KVM, Kind, bases

_ROOM = 8 * 2**30  # two chroots, their archives, the image: 6.1 GB with the recipe as it is
_OLD = 30 * 86400.0  # seconds: an image that nobody booted for so long is removed
_TOOLS = {
    "mmdebstrap": "mmdebstrap", "cpio": "cpio", "depmod": "kmod", "mke2fs": "e2fsprogs",
    "ssh-keygen": "openssh-client", "qemu-img": "qemu-utils", "setpriv": "util-linux",
}  # fmt: skip
_NOT_INSTALLED = ("man", "doc", "locale", "info")
# Of the whole module tree, what is large and never wanted in a machine without a screen.
_NOT_KEPT = ("drivers/gpu", "drivers/media", "drivers/net/wireless", "drivers/net/ethernet", "sound")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, as it stands there; one with a base has the base's lists before its own. ``without``:
    packages of the base that are left out. ``customize``: of the kind's files, the one that is run with
    the root directory when the packages are in."""

    suite: str
    components: str
    spare: str
    packages: tuple[str, ...]
    builder: tuple[str, ...]
    modules: tuple[str, ...]
    initrd: tuple[str, ...]
    load: tuple[str, ...]
    without: tuple[str, ...] = ()
    customize: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """A finished image. ``disk`` is raw and never written again."""

    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "lab.img"

    @property
    def key(self) -> Path:
        return self.directory / "key"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def digest(self) -> str:
        return self.directory.name.removeprefix("image-")


def load_recipe(kind: Kind = KVM) -> Recipe:
    recipe = HERE / kind.recipe
    data: dict[str, Any] = {}
    for path in (*bases(recipe), recipe):
        for key, value in _read(path).items():
            data[key] = (*data.get(key, ()), *value) if isinstance(value, list) else value
    data.pop("base", None)
    data["packages"] = tuple(p for p in data["packages"] if p not in data.get("without", ()))
    return Recipe(**data)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    with path.open(encoding="utf-8") as file:
        found: dict[str, Any] = yaml.load(file, yaml.CBaseLoader)
    return found


def place() -> Path:
    return cache_dir() / "lab"


def find(kind: Kind = KVM) -> Image | None:
    """The image of the recipe as it is now, if it was built."""
    image = Image(place() / f"image-{kind.digest()}")
    return image if image.directory.is_dir() else None


def ensure(runner: Runner, say: Say, kind: Kind = KVM) -> Image:
    """The image, built where there is none (about 6 minutes; 1.5 with the modules at hand). A second
    builder waits for the first.

    NoSpace, Unsupported (a tool is missing), CommandFailed naming the log."""
    if image := find(kind):
        image.directory.touch()  # used now: see _OLD
        return image
    for tool, package in _TOOLS.items():
        if which(tool) is None:
            raise Unsupported(f"{tool} is missing", remedy=f"apt-get install {package}")
    cache = place()
    cache.mkdir(parents=True, exist_ok=True)
    waiting = "another build of the lab's image is under way: waiting"
    with locked(cache / "build.lock", lambda: say(waiting)):
        if image := find(kind):
            return image
        _sweep(runner, cache)
        free = shutil.disk_usage(cache).free
        if free < _ROOM:
            raise NoSpace(
                f"building the lab takes {_ROOM >> 30} GiB in {cache}, {free / 2**30:.1f} are free",
                remedy=f"make room on the file system of {cache}, or set FARMHAND_CACHE_DIR",
            )
        return _build(runner, kind, cache, say)


def _build(runner: Runner, kind: Kind, cache: Path, say: Say) -> Image:
    recipe, digest = load_recipe(kind), kind.digest()
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=cache))
    work.chmod(0o755)
    try:
        boot = _Bootstrap(runner, recipe, work, _gather(kind, work))
        kernel, zfs = boot.versions(cache / "versions.log")
        modules = cache / f"zfs-{zfs}-{kernel}"
        say(f"building the {kind.title} lab's image: Debian {recipe.suite}, kernel {kernel}, ZFS {zfs}")
        jobs: dict[str, Callable[[], None]] = {
            "root file system": lambda: boot.root(work / "root.tar", cache / "root.log", kind)
        }
        if not modules.is_dir():
            say("the ZFS module is compiled for this kernel: about 5 minutes, once")
            jobs["ZFS module"] = lambda: boot.modules(kernel, modules, cache / "zfs.log")
        _side_by_side(jobs, say)
        say("putting the image together")
        _compose(runner, recipe, kind, work, modules, kernel)
        made = {"suite": recipe.suite, "kernel": kernel, "zfs": zfs, "recipe": digest}
        (work / "made.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        image = Image(cache / f"image-{digest}")
        runner.change("sync", "-f", work)
        work.rename(image.directory)
    except CommandFailed as error:
        raise CommandFailed(
            f"the lab's image could not be built: {error.message}",
            argv=error.argv, status=error.status, stderr=error.stderr,
            remedy=f"{error.remedy}{'; ' if error.remedy else ''}the same command begins again",
            detail=error.detail,
        ) from error  # fmt: skip
    finally:
        remove_build(runner, work)
    say(f"the lab's image is built, in {time.monotonic() - started:.0f} s: {image.directory}")
    return image


class _Bootstrap:
    """mmdebstrap for this recipe, with this machine's own package sources and settings for apt."""

    def __init__(self, runner: Runner, recipe: Recipe, work: Path, files: Path) -> None:
        self._runner, self._recipe, self._work, self._files = runner, recipe, work, files
        self._root = os.geteuid() == 0
        self._argv: list[str | Path] = [
            # ended with us, though we be killed: it runs in a session of its own
            "setpriv", "--pdeathsig", "TERM", "--", "nice", "-n", "5",
            "mmdebstrap", "--quiet", f"--mode={'root' if self._root else 'unshare'}",
            f"--components={','.join(recipe.components.split())}",
            "--aptopt=Acquire::Languages \"none\"", "--aptopt=APT::Install-Recommends \"false\"",
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in _NOT_INSTALLED),
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        ]  # fmt: skip
        if settings := apt_settings(runner):
            (work / "apt.conf").write_text(settings, encoding="utf-8")
            self._argv.append(f"--aptopt={work / 'apt.conf'}")
        self._sources = write_sources(recipe.suite, work, components=recipe.components)

    def versions(self, log: Path) -> tuple[str, str]:
        """The kernel release (6.1.0-42-amd64) and the version of ZFS that the suite offers now."""
        log.unlink(missing_ok=True)
        packages = "linux-image-amd64 zfs-dkms"
        ask = f"APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-cache show --no-all-versions {packages}"
        self._run(log, "custom", "--format=null", f"--customize-hook={ask}", target="/dev/null")
        text = log.read_text(encoding="utf-8", errors="replace")
        kernel = re.search(r"^Depends:.*?\blinux-image-([\w.+~-]+-amd64)\b", text, re.MULTILINE)
        zfs = re.search(r"^Package: zfs-dkms$.*?^Version: (\S+)$", text, re.MULTILINE | re.DOTALL)
        if not kernel or not zfs:
            raise CommandFailed(f"the package sources have no kernel or no zfs-dkms: see {log}")
        return kernel[1], zfs[1].replace(":", "-")

    def root(self, out: Path, log: Path, kind: Kind) -> None:
        log.unlink(missing_ok=True)
        hooks = []
        if script := self._recipe.customize:
            hooks.append(f'--customize-hook={self._files / script} "$1" {self._files / "host"}')
        if kind.hypervisor:
            hooks.append(f"--customize-hook=download /boot/xen {self._files}/xen")
            self._files.chmod(0o777)
        packages = f"--include={','.join(self._recipe.packages)}"
        self._run(log, "essential", "--format=tar", packages, *hooks, target=out)
        if kind.hypervisor:
            (self._files / "xen").rename(self._work / "xen")

    def modules(self, kernel: str, out: Path, log: Path) -> None:
        """Build ZFS against the kernel, in a chroot; keep the modules as a tar, and the kernel."""
        log.unlink(missing_ok=True)
        fresh = self._work / "zfs"
        fresh.mkdir()
        fresh.chmod(0o777)  # the hooks may run as another id of a user namespace
        wanted = (f"linux-image-{kernel}", f"linux-headers-{kernel}", *self._recipe.builder)
        without = " ".join(f"--exclude={kernel}/kernel/{part}" for part in _NOT_KEPT)
        pack = f"tar -C /lib/modules {without} --exclude={kernel}/build --exclude={kernel}/source"
        self._run(
            log, "apt", "--format=null", f"--include={','.join(wanted)}",
            # dkms itself doesn't fail where the module doesn't compile
            f'--customize-hook=ls "$1"/lib/modules/{kernel}/updates/dkms/zfs.ko',
            f'--customize-hook=chroot "$1" {pack} -cf /modules.tar {kernel}',
            f"--customize-hook=download /modules.tar {fresh}/modules.tar",
            f"--customize-hook=download /boot/vmlinuz-{kernel} {fresh}/vmlinuz",
            target="/dev/null",
        )  # fmt: skip
        self._runner.change("sync", "-f", fresh)
        fresh.chmod(0o755)
        fresh.rename(out)

    def _run(self, log: Path, variant: str, *options: str, target: str | Path) -> None:
        # an ordinary user's namespace must be able to pass through, which a home directory may forbid
        scratch = None
        if not self._root:
            scratch = Path(tempfile.mkdtemp(prefix=f"farmhand-{os.getuid()}-", dir="/var/tmp"))
        try:
            if scratch:
                scratch.chmod(0o711)
            self._runner.change(
                *self._argv, f"--variant={variant}", *options, self._recipe.suite, target,
                *self._sources, timeout=3600, log=log,
                env={"TMPDIR": str(scratch or self._work), "DEBIAN_FRONTEND": "noninteractive"},
            )  # fmt: skip
        except CommandFailed as error:
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            lines = text.splitlines()
            known = (ROOM, *NAMESPACES, *MIRRORS)
            place, suite = (scratch or self._work).parent, self._recipe.suite
            found = hint("\n".join(lines[-60:]), known, directory=place, suite=suite)
            raise CommandFailed(
                found.line or error.message,
                argv=error.argv,
                status=error.status,
                remedy=found.remedy,
                detail="\n".join(lines[-15:]),
            ) from error
        finally:
            if scratch:
                remove_build(self._runner, scratch)


def _gather(kind: Kind, work: Path) -> Path:
    """The kind's files in one directory, which the hooks of another user's namespace can read."""
    out = work / "files"
    out.mkdir()
    out.chmod(0o755)
    for path in kind.sources()[1:]:
        if path.suffix != ".yaml":
            shutil.copy(path, out / path.name)
    shutil.copytree(HERE / kind.files[0], out / "host")  # also those that the kind's own replace
    return out


def _compose(runner: Runner, recipe: Recipe, kind: Kind, work: Path, modules: Path, kernel: str) -> None:
    lists = {"load": recipe.load, "modules": recipe.modules, "initrd-modules": recipe.initrd}
    for name, values in lists.items():
        (work / name).write_text("".join(f"{value}\n" for value in values), encoding="utf-8")
    for key in ("key", "hostkey"):
        comment = f"lab-{key}"
        runner.change("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", work / key)
    public = (work / "hostkey.pub").read_text(encoding="utf-8")
    (work / "known_hosts").write_text(f"farmhand-lab {public}", encoding="utf-8")
    shutil.copy(modules / "modules.tar", work / "modules.tar")
    shutil.copy(modules / "vmlinuz", work / "vmlinuz")
    if kind.hypervisor:
        (work / "vmlinux").write_bytes(_unpacked((work / "vmlinuz").read_bytes()))
    mebibytes = (work / "root.tar").stat().st_size // 2**20 + int(recipe.spare)
    log = place() / "image.log"
    log.unlink(missing_ok=True)
    fakeroot = () if os.geteuid() == 0 else ("fakeroot", "--")
    runner.change(
        *fakeroot, "sh", "-eu", work / "files" / "make-image.sh", work / "files", work, kernel,
        str(mebibytes), log=log,
    )  # fmt: skip
    for name in ("load", "modules", "initrd-modules", "hostkey", "hostkey.pub", "apt.conf"):
        (work / name).unlink(missing_ok=True)
    shutil.rmtree(work / "files")
    for path in work.glob("host.*"):
        path.unlink()


def _unpacked(kernel: bytes) -> bytes:
    """The ELF file inside a bzImage that is compressed with xz, as Debian's are (the kernel's own
    scripts/extract-vmlinux looks for the same magic)."""
    at = kernel.index(b"\xfd7zXZ\0")
    return lzma.LZMADecompressor().decompress(kernel[at:])


def _side_by_side(jobs: dict[str, Callable[[], None]], say: Say) -> None:
    """Each in a thread; the first failure is raised when all have ended. The threads are daemons:
    after Ctrl-C this process ends at once, and their mmdebstraps with it (setpriv above)."""
    errors: list[BaseException] = []

    def work(name: str, job: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            job()
            say(f"{name}: done in {time.monotonic() - started:.0f} s")
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(1)
            if errors:
                break
    if errors:
        raise errors[0]


def _sweep(runner: Runner, cache: Path) -> None:
    """What a killed build left (we hold the lock), and images of recipes long gone."""
    for path in cache.glob(".build-*"):
        remove_build(runner, path)
    for path in [old for kind in ("image", "start", "zfs", "qemu") for old in cache.glob(f"{kind}-*")]:
        if path.is_dir() and time.time() - path.stat().st_mtime > _OLD:
            remove_build(runner, path)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """flock(2): a killed holder frees it. ``waiting`` is told when somebody else has it."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
