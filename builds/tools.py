"""Packages and a script's work added to a running VM, as root: for its ``clean``."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from builds.classify import classify
from builds.machines import CLOCK_TOLERANCE, list_installed
from builds.package_cache import PackageCache
from builds.root import no_root
from builds.step_run import StepLog
from host.files import own_directory, remove
from host.printable import last_line
from inventory.errors import FarmhandError, ToolsFailed
from inventory.sizes import format_duration
from provision.clean_state import tools_log
from provision.guest.connection import Connection
from provision.member import Member

LIMIT: Final = 3600.0
"""Seconds for the packages, and for the script."""
_PACKAGES_MOST = 10_000  # no more than a guest may have us keep
_LISTED = re.compile(r"[!-~]{1,200} [!-~]{1,200} [!-~]{1,40}")
_INSTALL = """
if command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update
    apt-get -qy -o DPkg::Lock::Timeout=300 --no-install-recommends install NAMES
    apt-get clean
elif command -v dnf >/dev/null; then
    dnf -y install NAMES
    dnf clean packages
elif command -v yum >/dev/null; then
    yum -y install NAMES
    yum clean packages
else
    echo "nothing installs packages here: neither apt-get nor dnf nor yum"
    exit 1
fi
"""


@dataclass(frozen=True, slots=True)
class ToolsOrder:
    """What is added. ``script``: the text of the file ``script_name``, which runs after the packages
    came; "": none."""

    packages: tuple[str, ...] = ()
    script: str = ""
    script_name: str = ""

    def parts(self) -> Sequence[tuple[str, str]]:
        """What is done, in words, and how."""
        found = []
        if self.packages:
            text = _INSTALL.replace("NAMES", shlex.join(self.packages))
            found.append((f"install {', '.join(self.packages)}", text))
        if self.script:
            found.append((f"run {Path(self.script_name).name}", _as_program(self.script)))
        return found


def _as_program(script: str) -> str:
    """A script for sh that does what this one does, which may name another interpreter."""
    if not script.startswith("#!"):
        return script
    end = hashlib.sha256(script.encode()).hexdigest()
    return (
        'f=$(mktemp "$HOME/.farmhand-tools-XXXXXX")\ntrap \'rm -f "$f"\' EXIT\n'
        f'cat >"$f" <<\'{end}\'\n{script}\n{end}\nchmod 700 "$f"\n"$f"\n'
    )


def equip(member: Member, order: ToolsOrder, sources: Sequence[str]) -> Sequence[str]:
    """Add it to a running VM. ``sources``: what the cache for packages fetches from; none: there is no
    cache. Returns the packages that came, as ``AddedTools.packages`` has them; none of a machine without
    a guest. ToolsFailed; Unsupported if the login can't be root."""
    if not member.info.guests:
        return ()
    site, log = member.site, tools_log(member.site.paths, member.vm)
    own_directory(log.parent, mode=0o700)
    remove(log)
    with contextlib.ExitStack() as stack:
        home, port = site.paths.root / "package-cache", 0
        if sources:
            port = stack.enter_context(PackageCache(home, sources, lambda _: None)).port
        written = StepLog(log, member.vm, None)
        stack.callback(written.close)
        return asyncio.run(_equip(member, order, written, log, home, port))


async def _equip(
    member: Member, order: ToolsOrder, written: StepLog, log: Path, home: Path, port: int
) -> Sequence[str]:
    site = member.site
    async with await Connection.open(member.endpoint(), runner=site.runner) as connection:
        if not await connection.may_be_root():
            raise no_root(site, member.vm, "what is added to clean")
        if abs((await connection.facts()).skew) > CLOCK_TOLERANCE:
            with contextlib.suppress(FarmhandError):
                await connection.set_clock()
        environment = {"FARM": site.farm.farm, "LC_ALL": "C.UTF-8"}
        if port:
            there = await connection.offer_port(port, home)
            environment |= {"http_proxy": f"http://127.0.0.1:{there}", "no_proxy": "127.0.0.1,localhost"}
        site.reporter.working(" and ".join(doing for doing, _ in order.parts()), vm=member.vm)
        return await add_tools(connection, order, environment, written, log)


async def add_tools(
    connection: Connection,
    order: ToolsOrder,
    environment: Mapping[str, str],
    written: StepLog,
    log: Path,
) -> Sequence[str]:
    """As ``equip``. ``written``: gets what is printed there, into the file ``log``."""
    vm = connection.endpoint.vm
    before = set(await _installed(connection))
    for doing, text in order.parts():
        written.mark()
        ran = await connection.run(
            text, env=environment, timeout=LIMIT, log=written.write, most=written.room, root=True
        )
        if ran.timed_out:
            why = f"not done within {format_duration(LIMIT)}"
        elif ran.status:
            _, evidence = classify(written.text(), status=ran.status)
            why = evidence or last_line(written.text(), 300) or f"status {ran.status}, without a word"
        else:
            continue
        raise ToolsFailed(f"could not {doing}: {why}", vm=vm, remedy=f"all that it said: {log}")
    await connection.output("sync", timeout=LIMIT)
    return [one for one in await _installed(connection) if one not in before][:_PACKAGES_MOST]


async def _installed(connection: Connection) -> dict[str, None]:
    """What the guest says that is installed there; it may say anything."""
    said = (await list_installed(connection)).splitlines()
    return dict.fromkeys(line for line in said if _LISTED.fullmatch(line))
