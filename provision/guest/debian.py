"""Builds a bootable Debian disk from Debian's packages, with no loop device, mount or boot of it.

mmdebstrap makes the root file system (as root directly; as an ordinary user in a user namespace), mke2fs
fills an ext4 file system from it (inside fakeroot for an ordinary user), GRUB's core image goes into the
gap before the first partition. The recipe is data, see templates/recipes/.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from host.hints import NAMESPACES, ROOM, Hint, hint
from host.processes import account
from host.run import Runner, which
from hypervisors.disks.images import convert
from inventory.errors import CommandFailed, NoSpace, NotFound, Unsupported, UsageError, WrongState

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
PACKAGES = (
    "mmdebstrap", "fakeroot", "uidmap", "e2fsprogs", "fdisk", "grub-pc-bin", "grub-common", "qemu-utils",
)  # fmt: skip
"""Debian packages that hold the commands used here."""
_SCRATCH = Path("/var/tmp")  # noqa: S108 (mkdtemp makes what is used there)
_ROOM = 3 * 2**30  # root file system twice, raw disk, qcow2: 2.6 GB with the recipe that ships
_RECIPES = TEMPLATES / "recipes"
_FIRSTBOOT = TEMPLATES / "firstboot"
_INSTALLED = {  # of templates/firstboot/, where in the root, mode
    "firstboot": ("usr/lib/farmhand/firstboot", 0o755),
    "resolv": ("usr/lib/farmhand/resolv", 0o755),
    "initramfs-hook": ("etc/initramfs-tools/hooks/farmhand", 0o755),
    "initramfs-boot": ("etc/initramfs-tools/scripts/farmhand", 0o644),
    "customize.sh": ("usr/lib/farmhand/build/customize", 0o755),
}
# What of the machine's own apt settings says how its packages are reached.
_APT = re.compile(r"Acquire::(https?|ftp|Retries|ForceIPv[46]|Check-Valid-Until|Max-FutureTime)\b")
# Of a one-line source, all from "main" on; of a stanza, the field's value.
_COMPONENTS = re.compile(r"^(deb\s.*?\s(?=main\b)|Components:\s*)[^\n]*", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What goes into a Debian template. ``logins``: further logins and their public keys."""

    name: str
    suite: str
    variant: str
    kernel: str
    packages: tuple[str, ...]
    exclude: tuple[str, ...]
    cmdline: str
    enable: tuple[str, ...]
    generators: tuple[str, ...]
    mask: tuple[str, ...]
    logins: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def digest(self, size: int) -> str:
        """A digest of all that decides what a disk of ``size`` bytes becomes, except how new its
        packages are."""
        digest = hashlib.sha256(json.dumps([asdict(self), size], sort_keys=True).encode())
        for path in sorted(p for p in _FIRSTBOOT.rglob("*") if p.is_file() or p.is_symlink()):
            digest.update(str(path.relative_to(_FIRSTBOOT)).encode())
            digest.update(str(path.readlink()).encode() if path.is_symlink() else path.read_bytes())
        return digest.hexdigest()[:16]


def load_recipe(
    name: str,
    *,
    packages: Sequence[str] = (),
    logins: Mapping[str, Sequence[str]] | None = None,
    paravirtual: bool = False,
) -> Recipe:
    """A recipe of templates/recipes/, with a farm's own packages and logins. ``paravirtual``: for Xen's
    PV guests, whose GRUB unpacks the kernel itself. NotFound, naming those there are."""
    import yaml

    path = _RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _RECIPES.glob("*.yaml")))
        raise NotFound(f"no recipe {name!r}", remedy=f"known recipes: {known}")
    with path.open(encoding="utf-8") as file:
        data = yaml.load(file, yaml.CBaseLoader)  # noqa: S506 (the base loader makes text of everything)
    kernel = data.pop("paravirtual-kernel", data["kernel"])
    if paravirtual:
        data["kernel"] = kernel
    lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
    recipe = Recipe(name=name, **{**data, **lists})
    return replace(
        recipe,
        packages=tuple(dict.fromkeys((*recipe.packages, *packages))),
        logins=tuple(sorted((login, tuple(keys)) for login, keys in (logins or {}).items())),
    )


def build_image(
    runner: Runner,
    recipe: Recipe,
    *,
    size: int,
    out: Path,
    packages: Path,
    log: Path,
    place: Callable[[str], str] = lambda _package: "",
    working: Callable[[str], None] | None = None,
) -> None:
    """Make ``out``, a qcow2 disk of ``size`` bytes, and ``packages``, its packages with their versions.
    Takes a minute or two. What is made on the way is in ``out``'s directory, in temporary files and
    directories of its own, and goes whatever happens; all output goes to ``log``. ``place``: where a
    package that the recipe hasn't got by itself is named. ``working``: told what is being done.

    NoSpace, Unsupported (this user or machine can't), CommandFailed naming the log."""
    if size % 2**20 or size < 2**30:
        raise UsageError(f"a template's size is whole MiB, 1 GiB at least, not {size} bytes")
    tools = {name: _tool(name, package) for name, package in _TOOLS.items()}
    root = os.geteuid() == 0
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=out.parent))
    # an ordinary user's namespace must be able to pass through, which a home directory may forbid; and
    # apt can't be told of a path with a double quote
    elsewhere = not root or '"' in str(work)
    prefix = f"farmhand-{os.getuid()}-"
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=_SCRATCH)) if elsewhere else work
    try:
        _need_room(work)
        if elsewhere:
            _need_room(scratch)
        if not root:
            scratch.chmod(0o711)
            _check_unshare(runner)
        tree, mode = work / "root.tar", "root" if root else "unshare"
        _bootstrap(runner, recipe, work, scratch, tree, mode, packages, log, out.parent, working)
        core = work / "core.img"
        early = work / "grub.cfg"
        early.write_text(
            f"linux (hd0,msdos1)/vmlinuz {recipe.cmdline}\ninitrd (hd0,msdos1)/initrd.img\nboot\n",
            encoding="utf-8",
        )
        outside = work / "outside.cfg"  # for Xen's GRUB, which is a guest's kernel and reads this
        outside.write_text(
            f"linux /vmlinuz {recipe.cmdline} console=hvc0\ninitrd /initrd.img\nboot\n",
            encoding="utf-8",
        )
        runner.change(
            tools["grub-mkimage"], "-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-c", early,
            "-o", core, "biosdisk", "part_msdos", "ext2", "linux", log=log,
        )  # fmt: skip
        if working:
            working("the disk is made of them")
        disk = work / "disk.raw"
        fakeroot = () if root else (tools["fakeroot"], "--")
        runner.change(
            *fakeroot, "sh", "-eu", _FIRSTBOOT / "make-disk.sh", tree, disk, str(size // 2**20), core,
            _GRUB / "boot.img", outside, log=log,
        )  # fmt: skip
        convert(runner, disk, out, format="raw")
    except CommandFailed as error:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        lines = text.splitlines()
        end = "\n".join(lines[-60:])
        found = _hint(end, recipe, scratch.parent, place)
        raise CommandFailed(
            f"recipe {recipe.name} can't be built: {found.line or error.message}",
            argv=error.argv, status=error.status, stderr=error.stderr,
            remedy=f"{found.remedy}{'; ' if found.remedy else ''}the whole output is in {log}",
            detail="\n".join(lines[-15:]),
        ) from error  # fmt: skip
    finally:
        for directory in {work, scratch}:
            remove_build(runner, directory)


_SOURCES = "the mirrors in /etc/apt/sources.list and sources.list.d"
MIRRORS = (  # what apt says of one
    (
        r"gpgv\S* .*required for verification, but neither seems installed",
        "as root: apt-get install gpgv; where it is there, everybody must be able to write to /dev/null",
    ),
    (
        r"NO_PUBKEY (?P<key>\w+)",
        "as root: apt-get install debian-archive-keyring; another mirror's key goes by its Signed-By in "
        "/etc/apt/sources.list.d",
    ),
    (r"Release file .* is not valid yet", "set this machine's clock, which is behind that mirror's"),
    (r"Release file .* is expired", "set this machine's clock if it is ahead; else that mirror is old"),
    (r"repository .* is not signed", f"look at {_SOURCES}: this one has no signature"),
    (
        r"[Cc]ertificate verification failed|certificate issuer is unknown|certificate is NOT trusted",
        "as root: apt-get install ca-certificates; a certificate of your own goes by "
        "Acquire::https::CaInfo (apt.conf(5))",
    ),
    (
        r"(?:Could not resolve|Temporary failure resolving) '(?P<host>[^']+)'",
        f"look at /etc/resolv.conf, and whether {{host}} is right among {_SOURCES}",
    ),
    (
        r"(?:Could not|Cannot initiate the|Unable to) connect(?:ion)?(?: to)? (?P<host>\S+)",
        f"{{host}} is out of reach: look at the network, at {_SOURCES} and at apt's proxies "
        "(apt-config dump Acquire)",
    ),
    (
        r"does not have a Release file|did not find any indices for architecture",
        f"look at {_SOURCES}: this one has no {{suite}}",
    ),
    (r"Hash Sum mismatch|File has unexpected size", "the mirror is just being renewed: try again later"),
    (r"Failed to fetch (?P<url>\S+)", f"look at {_SOURCES}, or try again later"),
)


_UNKNOWN = (
    r"^E: (?:Unable to locate package|Couldn't find any package by \S+) '?(?P<missing>[^\s']+)"
    r"|^E: Package '?(?P<gone>[^\s']+)'? has no installation candidate"
)


def _hint(
    said: str, recipe: Recipe, directory: Path, place: Callable[[str], str] = lambda _package: ""
) -> Hint:
    """What to do about the end of a build's output. ``directory``: of its scratch directory. ``place``:
    see ``build_image``."""
    found = re.finditer(_UNKNOWN, said, re.MULTILINE)
    names = dict.fromkeys(match["missing"] or match["gone"] for match in found)
    unknown = ", ".join(f"{name} ({place(name) or _place(recipe, name)})" for name in names)
    return hint(said, _known(), directory=directory, suite=recipe.suite, unknown=unknown)


def _place(recipe: Recipe, package: str) -> str:
    """Where the recipe itself names it; else it is the farm's."""
    file = _RECIPES / f"{recipe.name}.yaml"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    named = re.compile(rf"\s*(?:-|\S*kernel:)\s+{re.escape(package)}\s*$")
    line = next((number for number, text in enumerate(lines, 1) if named.match(text)), None)
    return f"{file}:{line}" if line else "'packages' of the template in the farm file"


def _known() -> Iterator[tuple[str, str]]:
    """Patterns of what mmdebstrap 1.3, apt 2.6 and unshare 2.38 say, each with what to do about it."""
    yield ROOM
    yield from NAMESPACES
    yield from MIRRORS
    yield _UNKNOWN, "{suite} has no such package, correct the name: {unknown}"
    yield (
        r"unmet dependencies|held broken packages",
        "look at 'packages' of the template in the farm file: not all of them go together",
    )
    yield (
        r"^chroot: failed to run command .*: Permission denied",
        "nothing in {directory} can be executed (noexec?): remount it with exec",
    )


def remove_build(runner: Runner, directory: Path) -> None:
    """Remove a build's directory, also that of a killed one. An ordinary user's may have files that
    belong to ids of the user's namespace."""
    for mount in mounts_below(directory, Path("/proc/self/mountinfo").read_text(encoding="utf-8")):
        runner.change("umount", mount)
    if mounts_below(directory, Path("/proc/self/mountinfo").read_text(encoding="utf-8")):
        raise WrongState(
            f"something is mounted below {directory}: it is not removed, for that would empty the mount",
            remedy=f"findmnt shows it; unmount it, then: rm -r --one-file-system {directory}",
        )
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists() and os.geteuid() != 0:
        directory.chmod(0o777)  # the namespace's root is "others" here, and must unlink what it owns
        runner.change("mmdebstrap", "--unshare-helper", "rm", "-rf", directory, ok=range(256))
        shutil.rmtree(directory, ignore_errors=True)


def mounts_below(directory: Path, mountinfo: str) -> list[str]:
    """Mount points under ``directory``, the deepest first, out of proc_pid_mountinfo(5)'s lines. Root's
    build mounts /proc, /sys and parts of /dev in the new system; removal must never walk into those."""
    points = [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[4])
              for line in mountinfo.splitlines()]  # fmt: skip
    inside = [point for point in points if Path(point).is_relative_to(directory.resolve())]
    return sorted(inside, key=lambda point: -point.count("/"))


def stale_scratch() -> tuple[Path, ...]:
    """This user's scratch directories outside the cache, for whoever holds the build lock to remove."""
    found = _SCRATCH.glob(f"farmhand-{os.getuid()}-*")
    return tuple(p for p in found if p.lstat().st_uid == os.getuid() and not p.is_symlink())


_GRUB = Path("/usr/lib/grub/i386-pc")
_TOOLS = {
    "mmdebstrap": "mmdebstrap", "fakeroot": "fakeroot", "mke2fs": "e2fsprogs", "sfdisk": "fdisk",
    "grub-mkimage": "grub-common", "qemu-img": "qemu-utils",
}  # fmt: skip


def _tool(name: str, package: str) -> str:
    found = which(name)
    if not found:
        raise Unsupported(f"{name} is missing", remedy=f"apt-get install {package}")
    if not (_GRUB / "boot.img").exists():
        raise Unsupported("GRUB's BIOS images are missing", remedy="apt-get install grub-pc-bin")
    return found


def _need_room(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _ROOM:
        raise NoSpace(
            f"building a template takes {_ROOM >> 30} GiB in {directory.parent}, "
            f"{free / 2**30:.1f} are free",
            remedy=f"make room on the file system of {directory.parent}",
        )


def _check_unshare(runner: Runner) -> None:
    """Unsupported if an ordinary user can't build: it says whether a user namespace is missing, or a
    range of ids for it."""
    user = account(os.getuid())
    if not which("newuidmap"):
        raise Unsupported("an ordinary user's build needs newuidmap", remedy="apt-get install uidmap")
    for file in (Path("/etc/subuid"), Path("/etc/subgid")):
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        if not any(line.split(":")[0] in (user, str(os.getuid())) for line in lines):
            raise Unsupported(
                f"{file} gives {user} no ids of its own, which an ordinary user's build needs",
                remedy="as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "
                + user,
            )
    probe = runner.read("mmdebstrap", "--unshare-helper", "true", ok=range(256))
    if probe.status:
        lines = probe.stderr.strip().splitlines() or [""]
        raise Unsupported(
            f"user namespaces don't work for {user} here: {lines[-1]}",
            remedy="as root: sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000; "
            "or build as root",
        )


def _bootstrap(
    runner: Runner,
    recipe: Recipe,
    work: Path,
    scratch: Path,
    tree: Path,
    mode: str,
    packages: Path,
    log: Path,
    cache: Path,
    working: Callable[[str], None] | None,
) -> None:
    overlay = work / "overlay.tar"
    _write_overlay(recipe, overlay)
    wanted = ",".join((*recipe.packages, recipe.kernel))
    argv: list[str | Path] = [
        *_tethered(cache),
        "mmdebstrap", "--verbose", f"--mode={mode}", f"--variant={recipe.variant}", "--format=tar",
        f"--include={wanted}",
        "--aptopt=Acquire::Languages \"none\"", "--aptopt=APT::Install-Recommends \"false\"",
        "--dpkgopt=force-unsafe-io", *(f"--dpkgopt=path-exclude={path}" for path in recipe.exclude),
        # licences stay readable
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
    ]  # fmt: skip
    settings = apt_settings(runner)
    if settings:
        (work / "apt.conf").write_text(settings, encoding="utf-8")
        argv.append(f"--aptopt={work / 'apt.conf'}")
    argv += [
        f"--customize-hook=tar-in {shlex.quote(str(overlay))} /",
        '--customize-hook=chroot "$1" /usr/lib/farmhand/build/customize',
        f"--customize-hook=download /usr/lib/farmhand/packages {shlex.quote(str(packages))}",
        recipe.suite,
        tree,
        *write_sources(recipe.suite, work),
    ]
    settled = {"TMPDIR": str(scratch), "DEBIAN_FRONTEND": "noninteractive"}
    runner.change(*argv, timeout=1800, log=log, env=settled, working=working)


def still_running(cache: Path) -> Path:
    """Path of the file that a build's mmdebstrap keeps locked, by flock(2), as long as any process of it
    lives."""
    return cache / ".running"


def _tethered(cache: Path) -> list[str | Path]:
    """mmdebstrap runs in a session of its own; when we are killed, so is it, with all that it started: a
    process namespace ends with its first process. An ordinary user's has no such rope (the one that
    mmdebstrap makes is within): it is asked to end, and the lock tells when it has."""
    argv: list[str | Path] = ["setpriv", "--pdeathsig", "TERM", "--"]
    if os.geteuid() == 0:
        argv = ["setpriv", "--pdeathsig", "KILL", "--"]
        argv += ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
    # flock(1) hands its lock down to what it executes
    return [*argv, "flock", "--shared", "--no-fork", still_running(cache)]


def _write_overlay(recipe: Recipe, out: Path) -> None:
    """Write a tar file of all our files for the root, owned by root whoever builds."""
    settings = {
        "FARMHAND_MASK": " ".join(recipe.mask),
        "FARMHAND_ENABLE": " ".join(recipe.enable),
        "FARMHAND_GENERATORS": " ".join(recipe.generators),
    }
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
    build = "usr/lib/farmhand/build"
    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as tar:

        def add(name: str, data: bytes, mode: int) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))

        made: set[str] = set()

        def parents(name: str) -> None:
            for parent in reversed(Path(name).parents[:-1]):
                if str(parent) not in made:
                    made.add(str(parent))
                    info = tarfile.TarInfo(str(parent))
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(info)

        files = [
            (name, (_FIRSTBOOT / own).read_bytes(), mode) for own, (name, mode) in _INSTALLED.items()
        ]
        files.append((f"{build}/settings", text.encode(), 0o644))
        for login, keys in recipe.logins:
            files.append((f"{build}/keys/{login}", "".join(f"{key}\n" for key in keys).encode(), 0o600))
        for path in sorted((_FIRSTBOOT / "files").rglob("*")):
            name = str(path.relative_to(_FIRSTBOOT / "files"))
            if path.is_symlink():
                parents(name)
                info = tarfile.TarInfo(name)
                info.type, info.linkname = tarfile.SYMTYPE, str(path.readlink())
                tar.addfile(info)
            elif path.is_file():
                files.append((name, path.read_bytes(), 0o644))
        for name, data, mode in files:
            parents(name)
            add(name, data, mode)


def apt_settings(runner: Runner) -> str:
    """apt.conf lines for mmdebstrap with which this machine reaches its packages: proxies, certificates,
    patience. customize.sh removes them from the template."""
    if not which("apt-config"):
        return ""
    dump = runner.read("apt-config", "dump").stdout
    lines = [line for line in dump.splitlines() if _APT.match(line)]
    lines += [
        f'Dir::Etc::{name} "{path}";'
        for name, path in (("netrc", "/etc/apt/auth.conf"), ("netrcparts", "/etc/apt/auth.conf.d"))
        if os.access(path, os.R_OK)
    ]
    return "".join(f"{line}\n" for line in lines)


def write_sources(
    suite: str, work: Path, etc: Path = Path("/etc/apt"), *, components: str = "main"
) -> list[Path]:
    """Write files with this machine's own sources of ``suite``. Returns them; none: mmdebstrap uses
    Debian's own mirror. Only Debian's component main is taken: a third party's repository has no place
    in a template. ``components``: those wanted, separated by blanks, such as "main contrib"."""
    lines: list[str] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]:
        if path.is_file():
            lines += [
                line
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
                if re.match(rf"deb\s.*\s{re.escape(suite)}(-updates|-security|/updates)?\s+main\b", line)
            ]
    stanzas: list[str] = []
    for path in sorted((etc / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")):
            fields = {
                key.lower(): value.split()
                for key, value in re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", stanza, re.MULTILINE)
            }
            suites = fields.get("suites", ())
            if (
                suites
                and all(re.fullmatch(rf"{re.escape(suite)}(-updates|-security)?", s) for s in suites)
                and "deb" in fields.get("types", ())
                and "main" in fields.get("components", ())
                and fields.get("enabled", ["yes"])[0] != "no"
            ):
                stanzas.append(stanza.strip("\n"))
    found = []
    # updates alone would not do
    main = re.compile(rf"(^deb\s.*|^Suites:.*)\s{re.escape(suite)}(\s|$)", re.MULTILINE)
    if any(main.search(text) for text in (*lines, *stanzas)):
        for name, texts, joint in (("host.list", lines, "\n"), ("host.sources", stanzas, "\n\n")):
            if texts:
                text = joint.join(texts) + "\n"
                if components != "main":
                    text = _COMPONENTS.sub(rf"\g<1>{components}", text)
                (work / name).write_text(text, encoding="utf-8")
                found.append(work / name)
    return found
