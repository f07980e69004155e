"""A newer QEMU for labs that are emulated. Debian 12's own, 7.2, now and then delivers an interrupt to
the lab's kernel in the midst of a switch from a nested guest (a panic), or loses one (a guest hangs).
Debian's backport of 10.0 was not seen to, and is faster with nested guests: figures in docs/lab.md.

    CACHE/lab/qemu-VERSION/     its packages, unpacked; nothing is installed
    CACHE/lab/qemu-none         why there is none, asked again after a day
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from host.run import Runner, which
from inventory.errors import CommandFailed, FarmhandError, NotFound
from provision.guest.debian import apt_settings, write_sources
from tests.lab.image import locked

Say = Callable[[str], None]
_SUITE, _BACKPORTS = "bookworm", "bookworm-backports"
_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
_PATIENCE = ("-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20",
             "-o", "Acquire::https::Timeout=20")  # fmt: skip
_DAY = 86400


def newer(runner: Runner, cache: Path, say: Say) -> Path | None:
    """The program, fetched where it is not there yet (12 MB); None, having said why, where it can't be
    had, or where it wouldn't run. ``cache`` is the labs' directory."""
    none = cache / "qemu-none"
    with locked(cache / "qemu.lock", lambda: say("another command fetches QEMU: waiting")):
        found = cache.glob("qemu-[0-9]*/usr/bin/qemu-system-x86_64")
        if there := max(found, key=_version, default=None):
            os.utime(there.parents[2])
            return there
        if none.exists() and time.time() - none.stat().st_mtime < _DAY:
            say(f"no newer QEMU: {none.read_text().strip()}")
            return None
        try:
            return _fetch(runner, cache)
        except (FarmhandError, OSError) as error:
            none.write_text(f"{str(error).splitlines()[0]}\n")
            say(f"no newer QEMU: {str(error).splitlines()[0]}")
            return None


def _version(program: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", program.parents[2].name))


def _fetch(runner: Runner, cache: Path) -> Path:
    """With this machine's own package sources, whose signatures apt checks."""
    for old in cache.glob(".qemu-*"):
        shutil.rmtree(old)
    work = Path(tempfile.mkdtemp(prefix=".qemu-", dir=cache))
    try:
        _sources(runner, work)
        env = {"APT_CONFIG": str(work / "apt.conf")}
        runner.change("apt-get", *_PATIENCE, "update", env=env, timeout=300)
        wanted = [f"{name}/{_BACKPORTS}" for name in _PACKAGES]
        runner.change(
            "env", "-C", work / "debs", "apt-get", *_PATIENCE, "download", *wanted, env=env, timeout=600
        )
        for deb in sorted((work / "debs").glob("*.deb")):
            runner.change("dpkg-deb", "-x", deb, work / "root")
        program = work / "root" / "usr/bin/qemu-system-x86_64"
        told = runner.read(program, "--version").stdout
        version = re.search(r"version (\d[\w.]*)", told)
        if not version:
            raise CommandFailed(f"{program.name} says no version: {told!r}")
        target = cache / f"qemu-{version[1]}"
        (work / "root").rename(target)
        return target / "usr/bin/qemu-system-x86_64"
    finally:
        shutil.rmtree(work)


def _sources(runner: Runner, work: Path) -> None:
    """apt's settings: those of this machine, but lists and packages of our own. NotFound where it isn't
    Debian 12 or its sources don't name it."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    if release != _SUITE or not which("apt-get"):
        raise NotFound(f"this is not Debian {_SUITE}, whose backports have it")
    (work / "sources").mkdir()
    for directory in ("lists/partial", "archives/partial", "debs"):
        (work / directory).mkdir(parents=True)
    found = [
        (path, text)
        for path in write_sources(_SUITE, work)
        if (text := _backports(path.read_text(encoding="utf-8"), stanzas=path.suffix == ".sources"))
    ]
    if not found:
        raise NotFound(f"this machine has no package source for {_SUITE}")
    for path, text in found:
        (work / "sources" / path.name).write_text(text, encoding="utf-8")
    (work / "apt.conf").write_text(
        apt_settings(runner)
        + f'Dir::State::lists "{work}/lists";\nDir::Cache "{work}";\nDir::Etc::sourcelist "/dev/null";\n'
        f'Dir::Etc::sourceparts "{work}/sources";\nAcquire::Languages "none";\n'
        'APT::Sandbox::User "root";\n',
        encoding="utf-8",
    )


def _backports(text: str, *, stanzas: bool) -> str:
    """The same sources for the backports. Those for updates alone are left out: another archive may have
    them."""
    if not stanzas:
        lines = [line for line in text.splitlines() if re.search(rf"\s{_SUITE}\s", line)]
        return "".join(re.sub(rf"\s{_SUITE}\s", f" {_BACKPORTS} ", line) + "\n" for line in lines)
    suites = re.compile(r"^Suites:.*$", re.MULTILINE | re.IGNORECASE)
    main = re.compile(rf"^Suites:.*\s{_SUITE}(\s|$)", re.MULTILINE | re.IGNORECASE)
    wanted = [part for part in re.split(r"\n\s*\n", text) if main.search(part)]
    return "\n\n".join(suites.sub(f"Suites: {_BACKPORTS}", part) for part in wanted)
