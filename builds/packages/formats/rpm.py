"""rpm: rpmbuild in the VM. What a spec file says is what rpm makes of it: to parse one runs its
``%(...)``, so it is asked in the VM, kept apart as the build itself is. rpmbuild(8), rpmspec(8).

What a spec file wants is installed as the dependencies of a package of ours that has no files. So dnf
and rpm judge all kinds of them, also such as ``(a or b)``. Where rpm is, but neither dnf nor yum, as on
Debian, its database knows only what came as rpm, and the farm's repository is all there is."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from builds.classify import classify
from builds.packages.formats import guest
from builds.packages.formats.guest import GuestBuild, lacking
from builds.packages.inputs import InstalledPackage
from builds.packages.order import BuildOrder, Built
from builds.step_run import StepFailed, StepLog
from host.printable import one_line
from inventory.errors import some
from inventory.packages import PackageBuilds
from provision.guest.connection import Connection

_TOOLS: Final = {"rpm": "rpm", "rpmspec": "rpm", "rpmbuild": "rpm"}
_ROUNDS = 4
"""How often a spec file is asked for what it wants: what was installed may bring macros that want
more."""

_OF_SRPM = r"""
for f in incoming/*.src.rpm incoming/*/*.src.rpm; do
  [ ! -f "$f" ] || rpm --dbpath "$PWD/incoming/db" --define "_sourcedir $PWD/source" \
    --define "_specdir $PWD/source" --nosignature -i "$f"
done
rm -rf incoming
[ -d source ] || { echo "the archive of the source has no .src.rpm file"; exit 1; }
"""
# The build user's, kept apart, in the directory of the source; $spec is the file's path in it. A package
# may read files of its source when it is asked.
_MACROS = r"""
case $spec in */*) sources=$PWD/${spec%/*};; *) sources=$PWD;; esac
set -- --define "_topdir $place/rpmbuild" --define "_sourcedir $sources" "$@"
"""
_ASK = r"""
rpmspec "$@" -q --srpm --qf '[%{SOURCE}\n][%{PATCH}\n]' "$spec" >"$place/asked.source"
rpmspec "$@" -q --buildrequires "$spec" >"$place/asked.wants"
rpmspec "$@" -q --srpm --conflicts "$spec" >"$place/asked.conflicts"
rpmspec "$@" -q --builtrpms --qf '%{NAME}\n' "$spec" >"$place/asked.package"
rpmspec "$@" -q --builtrpms --provides "$spec" >"$place/asked.provides"
"""
_ASKED = r"""
as_builder sh -euc 'cd "$1"; for f in asked.*; do sed "s/^/${f#asked.} /" "$f"; done' sh "$PLACE"
"""
# A source that isn't there is made of the tree, where it is an archive: as `git archive` would make it.
_BUILD = r"""
while read -r name; do
  case $name in *.tar | *.tar.gz | *.tgz | *.tar.bz2 | *.tar.xz | *.tar.zst)
    [ -e "$sources/$name" ] || [ -e "$DOWNLOADS/$name" ] || {
      top=${name%.t[ag]*}
      mkdir -p "$place/packed"
      tar -C "$place" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
        --transform="flags=r;s,^source,$top," -caf "$place/packed/$name" source
    };;
  esac
done <"$place/asked.source"
while read -r name; do
  [ ! -e "$sources/$name" ] || continue
  for d in "$DOWNLOADS" "$place/packed"; do
    [ ! -e "$d/$name" ] || { ln -s "$d/$name" "$sources/$name"; continue 2; }
  done
  echo "error: $name is not beside the spec file, and not under 'downloads'"
  exit 1
done <"$place/asked.source"
# spec files are written for bash, and Debian's sh is another
[ ! -x /bin/bash ] || set -- --define "_buildshell /bin/bash" "$@"
mkdir "$place/made"
exec rpmbuild -bb --nodeps --define "_rpmdir $place/made" \
  --define "_rpmfilename %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" \
  --define "_buildhost localhost" --define "use_source_date_epoch_as_buildtime 1" \
  --define "clamp_mtime_to_source_date_epoch 1" \
  --define "build_mtime_policy clamp_to_source_date_epoch" "$@" "$spec"
"""
# Root's. $SPEC: the text of a spec file of ours.
_WANTED = r"""
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '%s' "$SPEC" >"$work/wanted.spec"
rpmbuild -bb --quiet --define "_topdir $work" --define "_rpmdir $work" \
  --define "_rpmfilename wanted.rpm" "$work/wanted.spec"
"""
_LACKING = (
    _WANTED
    + r"""
rpm -i --test "$work/wanted.rpm"
"""
)
_INSTALL = (
    _WANTED
    + r"""
list=/etc/yum.repos.d/$LIST.repo
if tool=$(command -v dnf || command -v yum); then
  set -- -y --setopt=install_weak_deps=False
  if [ -z "$OUTSIDE" ]; then
    set -- "$@" --disablerepo='*'
    for id in $(sed -n 's/^\[\(.*\)\]$/\1/p' "$list"); do set -- "$@" --enablerepo="$id"; done
  fi
  if [ -n "$PACKAGES" ]; then
    names=
    for each in $PACKAGES; do names="$names ${each%%=*}-${each#*=}"; done
    "$tool" "$@" install $names
    exit
  fi
  "$tool" "$@" install "$work/wanted.rpm"
  rpm -e farmhand-wanted
  exit
fi

get() {
  case $1 in
    file://*) cp "${1#file://}" "$2";;
    *) if command -v curl >/dev/null; then curl -fsSL --retry 3 -o "$2" "$1"
      elif command -v wget >/dev/null; then wget -q -O "$2" "$1"
      else /usr/lib/apt/apt-helper download-file "$1" "$2"
      fi;;
  esac || { echo "Failed to download $1"; exit 1; }
}
hrefs() { sed -n 's/.*<location[^>]*href="\([^"]*\)".*/\1/p'; }
cd "$work"
: >table
if url=$(sed -n 's/^baseurl=//p' "$list" 2>/dev/null | sed 1q) && [ -n "$url" ]; then
  get "$url/repodata/repomd.xml" repomd.xml
  primary=$(tr '\n' ' ' <repomd.xml | sed 's/<data /\n&/g' | grep '^<data type="primary"' | hrefs)
  get "$url/$primary" primary.gz
  n=0
  for href in $(gzip -dc primary.gz | sed 's/<location/\n&/g' | hrefs); do
    case $href in *.src.rpm) continue;; esac
    n=$((n + 1))
    get "$url/$href" "$n.rpm"
    case $(rpm -qp --nosignature --qf '%{ARCH}' "$n.rpm") in
      noarch | "$(rpm --eval %_target_cpu)") ;;
      *) continue;;
    esac
    # what it stands for, its version, the file
    rpm -qp --nosignature --qf "=%{NAME}=%{EVR}\t-\t$n.rpm\n" "$n.rpm" >>table
    rpm -qp --nosignature --qf "[%{PROVIDENAME}\t%{=EVR}\t$n.rpm\n][%{FILENAMES}\t%{=EVR}\t$n.rpm\n]" \
      "$n.rpm" >>table
  done
fi
# The newest one of a name; of a file that holds more of them.
newest() {
  best= found=
  while IFS='	' read -r name evr file; do
    [ "$name" = "$1" ] || continue
    [ -z "$best" ] || [ "$(rpm --eval "%{lua: print(rpm.vercmp('$evr', '$best'))}")" = 1 ] || continue
    best=$evr found=$file
  done <table
  [ -n "$found" ] && case " $chosen " in *" $found "*) false;; esac
}
chosen=
wanted=wanted.rpm
for each in $PACKAGES; do
  wanted=
  newest "=$each" || { echo "nothing provides $each"; exit 1; }
  chosen="$chosen $found"
done
# rpm says what is missing yet, one after the other
while ! said=$(rpm -U --test --nosignature --oldpackage $chosen $wanted 2>&1); do
  lacks=$(printf '%s\n' "$said" | sed -n 's/^[[:space:]]*\(.*\) is needed by .*/\1/p' | sed 1q)
  if [ -z "$lacks" ] || ! newest "${lacks%% *}"; then
    printf '%s\n' "$said"
    exit 1
  fi
  chosen="$chosen $found"
done
rpm -U --nosignature --oldpackage $chosen
"""
)
_INSTALLED = r"""
rpm -qa --qf '%{NAME}\t%|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE}\t%{ARCH}\n' |
  sed '/^gpg-pubkey\t/d'
! command -v dpkg-query >/dev/null ||
  dpkg-query -W -f='${db:Status-Status} ${Package}\t${Version}\t${Architecture}\n' |
  sed -n 's/^installed //p'
"""
_SPEC = """\
Name: farmhand-wanted
Version: 1
Release: 1
Summary: What a build wants
License: none
BuildArch: noarch
{relations}
%description
What a build wants.
%files
"""

# What dnf, yum and rpm say of what can't be had.
_NOWHERE = re.compile(
    r"nothing provides (.+?)(?: needed by .*)?$"
    r"|(?:Unable to find a match|No match for argument|No package matches?): (.+)$"
    r"|^\s+(.+?) is needed by .*$",
    re.MULTILINE,
)
_CONFLICT = re.compile(r"^\s+(?:- )?(.+? conflicts with .*)$", re.MULTILINE)
_FETCHING = re.compile(
    r"Failed to download|Cannot download|Curl error|Cannot prepare internal mirrorlist|All mirrors"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecFacts:
    """What a spec file says, its macros and conditions worked out by rpm. Each relation as rpm has it:
    ``kata-dev >= 1.0``. ``packages``: names of those that it makes."""

    build_requires: tuple[str, ...]
    build_conflicts: tuple[str, ...]
    packages: tuple[str, ...]
    provides: tuple[str, ...]
    sources: tuple[str, ...]


class RpmBuilds:
    """How rpm packages are built."""

    NAME: ClassVar = "rpm"

    def recipe(self, settings: PackageBuilds) -> str:
        parts = (guest.RECIPE, _OF_SRPM, _MACROS, _ASK, _BUILD, _INSTALL, settings.user)
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
                environment = await _prepared(work)
                work.doing = "installing what it needs"
                await _install(work, environment)
                installed = await _installed(work)
                await before(installed)
                work.doing = "building"
                await work.isolated(_script(work, _BUILD), environment)
                work.doing = "looking at what it made"
                files = await work.made((".rpm",), "made")
        return Built(installed=installed, files=files, builder=work.builder(environment))


async def spec_facts(connection: Connection, order: BuildOrder, log: StepLog) -> SpecFacts:
    """What the order's spec file says, by rpm in the VM, where nothing is installed for it. Of the order
    what is to be installed doesn't count. Raises as ``BuildFormat.build``."""
    work = GuestBuild(connection, order, log)
    with work.in_time():
        async with asyncio.timeout(order.seconds):
            return await _ask(work, await _prepared(work))


async def _prepared(work: GuestBuild) -> dict[str, str]:
    """Returns the build's environment."""
    await work.prepare(_TOOLS, _OF_SRPM if work.order.state.declared.srpm else "")
    return work.environment({})


def _script(work: GuestBuild, script: str) -> str:
    options = list(work.order.state.declared.options)
    if script is _ASK:  # rpmspec knows fewer of them
        options = [one for one in options if re.match(r"--(?:with|without|define|undefine)=", one)]
    spec, place = shlex.quote(work.order.state.spec), shlex.quote(work.place)
    if not work.order.state.spec:
        spec = "$(echo *.spec)"
    return f"spec={spec}\nplace={place}\nset -- {shlex.join(options)}\n{_MACROS}{script}"


async def _ask(work: GuestBuild, environment: dict[str, str]) -> SpecFacts:
    work.doing = "asking rpm what the spec file says"
    await work.isolated(_script(work, _ASK), environment)
    found: dict[str, list[str]] = {}
    for line in (await work.ask(_ASKED)).splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, []).append(one_line(value, 500))

    def said(key: str) -> tuple[str, ...]:
        return tuple(found.get(key, ()))

    return SpecFacts(
        build_requires=said("wants"),
        build_conflicts=said("conflicts"),
        packages=said("package"),
        provides=said("provides"),
        sources=said("source"),
    )


async def _installed(work: GuestBuild) -> tuple[InstalledPackage, ...]:
    return guest.lines(await work.ask(_INSTALLED))


async def _install(work: GuestBuild, environment: dict[str, str]) -> None:
    """Install what the spec file asks for, or what the order does, if anything of it is missing.
    StepFailed."""
    facts = await _ask(work, environment)
    if work.order.install is not None:
        if packages := lacking(work.order.install, await _installed(work)):
            work.log.say(f"to be installed: {some(packages)}")
            await _installing(work, "", packages)
        return
    for number in range(_ROUNDS):
        spec = _wanted(facts)
        status, said = await work.run(_LACKING, {"SPEC": spec}, quiet=True)
        if status == 0:
            if number == 0:
                work.log.say("all that it needs to build is installed")
            return
        if missing := _nowhere(said):
            work.log.say(f"to be installed: {some(missing)}")
        await _installing(work, spec, [])
        now = await _ask(work, environment)
        if now == facts:
            return
        facts = now
    raise StepFailed("source", "its spec file wants something else each time that it is asked")


def _wanted(facts: SpecFacts) -> str:
    """A spec file whose package needs that. StepFailed: something in it is no relation."""
    for one in (*facts.build_requires, *facts.build_conflicts):
        if "%" in one or not one.isprintable():
            raise StepFailed("source", f"BuildRequires {one!r} is none: rpm has no such macro")
    relations = [f"Requires: {one}\n" for one in facts.build_requires if not one.startswith("rpmlib(")]
    relations += [f"Conflicts: {one}\n" for one in facts.build_conflicts]
    return _SPEC.format(relations="".join(relations))


async def _installing(work: GuestBuild, spec: str, packages: list[str]) -> None:
    work.log.mark()
    status, said = await work.run(
        _INSTALL,
        {
            "SPEC": spec or _SPEC.format(relations=""), "PACKAGES": " ".join(packages),
            "LIST": work.order.repository, "OUTSIDE": "yes" if work.order.outside else "",
        },
    )  # fmt: skip
    if not status:
        return
    found = [f"nothing provides {one}" for one in _nowhere(said)]
    if found := found or [one_line(one, 200) for one in dict.fromkeys(_CONFLICT.findall(said))]:
        raise StepFailed(
            "dependencies", f"can't install what it needs: {some(found, 4, by='; ')}", exit=status
        )
    kind, evidence = classify(said, status=status)
    why = evidence or one_line(said.strip().rpartition("\n")[2], 300) or f"status {status}"
    if _FETCHING.search(said):
        raise StepFailed("infrastructure", f"what it needs can't be fetched: {why}", exit=status)
    raise StepFailed(
        kind if kind == "environment" else "dependencies",
        f"can't install what it needs: {why}",
        exit=status,
    )


def _nowhere(said: str) -> list[str]:
    found = (next(filter(None, match.groups())) for match in _NOWHERE.finditer(said))
    return list(dict.fromkeys(one_line(one.strip(), 200) for one in found))
