"""deb: dpkg-buildpackage in the VM, its build dependencies installed by apt; or sbuild, which does both.
deb-src-control(5), dpkg-buildpackage(1), apt-get(8)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Final, TypeAlias
from urllib.parse import unquote

from builds.classify import classify
from builds.packages.formats import guest, sbuild
from builds.packages.formats.guest import GuestBuild, lacking
from builds.packages.inputs import InstalledPackage
from builds.packages.order import BuildOrder, Built
from builds.step_run import StepFailed, StepLog
from host.printable import one_line
from inventory.errors import some
from inventory.packages import PackageBuilds
from provision.guest.connection import Connection

_TOOLS: Final = {
    "dpkg-buildpackage": "dpkg-dev", "dpkg-checkbuilddeps": "dpkg-dev", "make": "build-essential",
    "fakeroot": "fakeroot",
}  # fmt: skip
_OUTPUTS = (".deb", ".udeb", ".buildinfo", ".changes")
_OF_DSC = r"""
for f in incoming/*.dsc incoming/*/*.dsc; do
  [ ! -f "$f" ] || dpkg-source --no-copy -x "$f" source
done
rm -rf incoming
[ -d source ] || { echo "the archive of the source has no .dsc file"; exit 1; }
"""
# 1: something is not there, or must not be there; what else fails is the control file's fault.
_WANTED = r"""
cd "$PLACE/source"
as_builder DEB_BUILD_PROFILES="$PROFILES" dpkg-checkbuilddeps
"""
_INSTALLED = r"""
dpkg-query -W -f='${db:Status-Status} ${Package}\t${Version}\t${Architecture}\n' |
  sed -n 's/^installed //p'
"""
# What is installed is to stay as it comes: no daemon is started for a build (invoke-rc.d(8)).
_INSTALL = r"""
command -v apt-get >/dev/null || { echo "there is no apt-get here"; exit 127; }
export DEBIAN_FRONTEND=noninteractive
[ -e /usr/sbin/policy-rc.d ] || {
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
  chmod 0755 /usr/sbin/policy-rc.d
}
eval "$(apt-config shell parts Dir::Etc::sourceparts/d)"
apt() {
  apt-get -q -y --no-install-recommends -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold \
    -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}
wanted() {
  if [ -n "$PACKAGES" ]; then apt "$@" --allow-downgrades install $PACKAGES
  else apt "$@" ${PROFILES:+-P "$PROFILES"} build-dep ./source
  fi
}
# What is going to be installed, with its sums as the lists have them.
install() {
  wanted "$@" -o Acquire::ForceHash=SHA256 --print-uris 2>/dev/null |
    sed -n "s/^'.*' \([^ ]*\.deb\) [0-9]* SHA256:\([0-9a-f]*\)$/farmhand: \1 \2/p" || :
  wanted "$@"
}
cd "$PLACE"
if [ -z "$OUTSIDE" ]; then
  install -o Dir::Etc::sourcelist="$parts/$LIST.sources" -o Dir::Etc::sourceparts=/dev/null
else
  # a template's lists may be missing, or too old
  install || {
    echo "AGAIN"
    apt-get update -q -o DPkg::Lock::Timeout=300 || true
    install
  }
fi
"""
_AGAIN = "farmhand: once more, with package lists read anew"
_BUILD = "exec dpkg-buildpackage -us -uc -b\n"

_CHECKED = re.compile(r"^dpkg-checkbuilddeps: error: (?:Unmet build dependencies: )?")
_Identity: TypeAlias = tuple[str, str, str]
"""A package's name, version and architecture."""
# apt-get(8), --print-uris: a file's name, with the colon of its version's epoch quoted, and its sum.
_LISTED = re.compile(r"^farmhand: ([^_\s]+)_([^_\s]+)_([^_\s]+)\.deb ([0-9a-f]{64})$", re.MULTILINE)
# What apt-get says of packages that can't be had.
_UNMET = re.compile(r"^(?: \S+ :)? +(?:Pre-)?Depends: (.+)$", re.MULTILINE)
_UNKNOWN = re.compile(
    r"^E: ((?:Unable to locate package|Version '\S+' for|Package '\S+' has no|Build-Depends|"
    r"Unable to satisfy|Unable to find a source|Couldn't find any package).*)$",
    re.MULTILINE,
)
_FETCHING = re.compile(
    r"^E: (?:Failed to fetch|Unable to fetch|Could not get lock|The repository|Unable to acquire)"
    r"|Temporary failure resolving|Could not connect to|Could not resolve",
    re.MULTILINE,
)
_ANY_ERROR = re.compile(r"^E: (.+)$", re.MULTILINE)


class DebBuilds:
    """How deb packages are built."""

    NAME: ClassVar = "deb"

    def recipe(self, settings: PackageBuilds) -> str:
        tool = (sbuild.RECIPE,) if settings.tool == "sbuild" else (_INSTALL, _BUILD)
        parts = (guest.RECIPE, _OF_DSC, *tool, settings.user)
        return "\n".join(parts)

    async def build(
        self,
        connection: Connection,
        order: BuildOrder,
        log: StepLog,
        before: Callable[[tuple[InstalledPackage, ...]], Awaitable[None]],
    ) -> Built:
        work = GuestBuild(connection, order, log)
        with work.in_time():
            async with asyncio.timeout(order.seconds):
                unpack = _OF_DSC if order.state.declared.dsc else ""
                by_sbuild = order.settings.tool == "sbuild"
                await work.prepare(sbuild.TOOLS if by_sbuild else _TOOLS, unpack)
                environment = work.environment(_environment(order, work.cpus))
                if by_sbuild:
                    work.doing = "sbuild installs what it needs, or builds"
                    installed = await sbuild.build(work, environment, before, _not_installed)
                    environment = sbuild.given(environment)
                else:
                    work.doing = "installing what it needs"
                    listed = await _install(work)
                    installed = tuple(
                        replace(one, listed=listed.get((one.name, one.version, one.architecture), ""))
                        for one in await _installed(work)
                    )
                    await before(installed)
                    work.doing = "building"
                    await work.isolated(_BUILD, environment)
                work.doing = "looking at what it made"
                files = await work.made(_OUTPUTS, sbuild.MADE if by_sbuild else "")
        return Built(installed=installed, files=files, builder=work.builder(environment))


def _environment(order: BuildOrder, cpus: int) -> dict[str, str]:
    """Of dpkg-buildpackage. These profiles want the option of their name, too: their definition, at
    wiki.debian.org/BuildProfileSpec."""
    options = [
        *(word for option in order.state.declared.options for word in option.split()),
        *(name for name in ("nocheck", "nodoc") if name in order.profiles),
    ]
    if not any(word.startswith("parallel=") for word in options):
        options.append(f"parallel={cpus}")
    values = {"DEB_BUILD_OPTIONS": " ".join(dict.fromkeys(options))}
    if order.profiles:
        values["DEB_BUILD_PROFILES"] = " ".join(sorted(order.profiles))
    return values


async def _installed(work: GuestBuild) -> tuple[InstalledPackage, ...]:
    return guest.lines(await work.ask(_INSTALLED))


async def _install(work: GuestBuild) -> Mapping[_Identity, str]:
    """Install what the source asks for, or what the order does, if anything of it is missing. Returns
    the sums that apt knew of what it installed. StepFailed."""
    order, profiles = work.order, sorted(work.order.profiles)
    if order.install is not None:
        packages = lacking(order.install, await _installed(work))
        if not packages:
            return {}
        work.log.say(f"to be installed: {some(packages)}")
    else:
        packages = []
        wanted, said = await work.run(_WANTED, {"PROFILES": " ".join(profiles)}, quiet=True)
        if wanted == 0:
            work.log.say("all that it needs to build is installed")
            return {}
        why = one_line(said.strip().rpartition("\n")[2], 500)
        if wanted != 1:
            raise StepFailed("source", why or "debian/control can't be read", exit=wanted)
        work.log.say(f"to be installed: {_CHECKED.sub('', why)}")
    work.log.mark()
    status, said = await work.run(
        _INSTALL.replace("AGAIN", _AGAIN),
        {
            "PACKAGES": " ".join(packages), "PROFILES": ",".join(profiles), "LIST": order.repository,
            "OUTSIDE": "yes" if order.outside else "",
        },
    )  # fmt: skip
    if status:
        raise _not_installed(said, status)
    return {
        (name, unquote(version), architecture): sum_
        for name, version, architecture, sum_ in _LISTED.findall(said)
    }


def _not_installed(said: str, status: int) -> StepFailed:
    """By what apt-get said, the last try's."""
    said = said.rpartition(_AGAIN)[2]
    unmet = [one_line(" ".join(line.split()), 200) for line in _UNMET.findall(said)]
    unknown = [one_line(line, 200) for line in _UNKNOWN.findall(said)]
    if found := list(dict.fromkeys(unmet or unknown)):
        message = f"can't install what it needs: {some(found, 4, by='; ')}"
        return StepFailed("dependencies", message, exit=status)
    errors = _ANY_ERROR.findall(said)
    if _FETCHING.search(said):
        why = one_line(errors[0], 300) if errors else f"apt-get exited with {status}"
        return StepFailed("infrastructure", f"what it needs can't be fetched: {why}", exit=status)
    kind, evidence = classify(said, status=status)
    why = evidence or (one_line(errors[-1], 300) if errors else f"apt-get exited with {status}")
    return StepFailed(
        kind if kind == "environment" else "dependencies",
        f"can't install what it needs: {why}",
        exit=status,
    )
