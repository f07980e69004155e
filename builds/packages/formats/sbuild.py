"""sbuild in the VM: each deb in a chroot of its own, made from an archive that the template has, with
nothing in it but what the build wants. sbuild(1), its mode "unshare": no right of root is needed.

sbuild installs build dependencies in the chroot by itself, from the lists that it has and the farm's
repository, and takes the network away before it builds. It builds source packages: one is made of the
tree first, in format 1.0, which takes any tree and any version as it is."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from builds.packages.formats import guest
from builds.packages.formats.guest import GuestBuild
from builds.packages.inputs import InstalledPackage
from builds.step_run import StepFailed
from host.printable import one_line
from inventory.errors import Call
from inventory.model import FailureClass

TOOLS: Final = {"sbuild": "sbuild", "newuidmap": "uidmap", "dpkg-source": "dpkg-dev"}
MADE: Final = "made"
"""The directory in the build's place that has what it made."""
_ARCHIVE = "/var/lib/farmhand/sbuild.tar"
_OURS = ("PATH", "HOME", "USER", "LOGNAME", "SHELL")
"""Variables that sbuild sets in the chroot by itself."""

# Root's: prints where the archive is, and what the VM's list of the repository says. subuid(5).
_READY = r"""
for f in "$ARCHIVE" "$ARCHIVE".*; do [ ! -f "$f" ] || { echo "$f"; break; }; done
grep -qs "^$BUILD_USER:" /etc/subuid ||
  usermod --add-subuids 500000000-500065535 --add-subgids 500000000-500065535 "$BUILD_USER"
"""
_LIST = r"""
eval "$(apt-config shell parts Dir::Etc::sourceparts/d)"
[ ! -f "$parts/$LIST.sources" ] || cat "$parts/$LIST.sources"
"""
_INSTALLED = "dpkg-query -W -f='farmhand-installed ${Package}\\t${Version}\\t${Architecture}\\n'"
# The build user's. $1 and so on: options.
_BUILD = r"""
cd "$place"
export SBUILD_CONFIG="$place/sbuildrc"
printf '%s\n' "$settings" >"$SBUILD_CONFIG"
dpkg-source --before-build source
dpkg-source --format=1.0 -b source
mkdir made
cd made
exec sbuild --chroot-mode=unshare --nolog --build-path="$place" --dsc-dir=source \
  --dist="$(dpkg-parsechangelog -l ../source/debian/changelog -S Distribution)" \
  --arch-any --arch-all --no-source --no-clean-source --apt-update --no-apt-upgrade \
  --no-apt-distupgrade --no-run-lintian --no-run-piuparts --no-run-autopkgtest \
  --build-dep-resolver=apt --bd-uninstallable-explainer=apt --log-external-command-output \
  --log-external-command-error "$@" ../*.dsc
"""
RECIPE: Final = _READY + _BUILD

_STAGE = re.compile(r"^Fail-Stage: (\S+)", re.MULTILINE)
_ERROR = re.compile(r"^E: (.+)$", re.MULTILINE)
_LISTED = re.compile(r"^farmhand-installed (\S+\t\S+\t\S+)$", re.MULTILINE)


async def build(
    work: GuestBuild,
    environment: Mapping[str, str],
    before: Callable[[tuple[InstalledPackage, ...]], Awaitable[None]],
    not_installed: Callable[[str, int], StepFailed],
) -> tuple[InstalledPackage, ...]:
    """Install what the package needs, and build it. Returns what was installed in the chroot, which
    ``before`` is told when it is over, as sbuild does both in one. ``not_installed``: the failure of an
    apt that printed that. StepFailed."""
    order = work.order
    archive = (await work.ask(_READY, {"ARCHIVE": _ARCHIVE})).strip()
    if not archive:
        raise _no_archive()
    listed = await work.ask(_LIST, {"LIST": order.repository})
    encoded = base64.b64encode(listed.encode()).decode()
    setup = f"echo {encoded} | base64 -d >/etc/apt/sources.list.d/{order.repository}.sources"
    if not order.outside:
        setup = f"rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*; {setup}"
    options = [
        f"--chroot={archive}", f"--chroot-setup-commands={setup}",
        f"--starting-build-commands={_INSTALLED}",
    ]  # fmt: skip
    if order.profiles:
        options.append(f"--profiles={','.join(sorted(order.profiles))}")
    if order.install:
        pairs = (one.split("=", 1) for one in order.install)
        options.append(f"--add-depends={', '.join(f'{name} (= {is_})' for name, is_ in pairs)}")
    script = (
        f"place={shlex.quote(work.place)}\nsettings={shlex.quote(_settings(environment))}\n"
        f"set -- {shlex.join(options)}\n{_BUILD}"
    )
    said, failed = await work.attempt(script, environment, contained=True)
    installed = guest.lines("\n".join(_LISTED.findall(said)))
    if installed:
        await before(installed)
    if failed is not None:
        raise _judged(failed, said, not_installed)
    return installed


def _settings(environment: Mapping[str, str]) -> str:
    """Of sbuild.conf(5), which is Perl: what the build gets of the environment, and of the VM."""

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    values = ", ".join(
        f"{quoted(name)} => {quoted(value)}"
        for name, value in sorted(environment.items())
        if name not in _OURS
    )
    downloads = quoted(environment["DOWNLOADS"])
    return (
        f"$build_environment = {{ {values} }};\n"
        f"$unshare_bind_mounts = [{{ directory => {downloads}, mountpoint => {downloads} }}];\n1;"
    )


def _no_archive() -> StepFailed:
    return StepFailed(
        "environment",
        f"there is no {_ARCHIVE} in the VM, which sbuild makes its chroots from",
        remedy=(
            f"make it there, by `mmdebstrap --variant=buildd --include=fakeroot bookworm {_ARCHIVE}`, "
            "keep that by ",
            Call("checkpoint", name="builder"),
            ", and give the builds 'to: builder'",
        ),
    )


def _judged(
    failed: StepFailed, said: str, not_installed: Callable[[str, int], StepFailed]
) -> StepFailed:
    stages = _STAGE.findall(said)
    stage, status = stages[-1] if stages else "", failed.exit or 1
    if failed.failure == "time-out" or stage in ("", "build", "dpkg-buildpackage"):
        return failed
    if stage in ("install-deps", "explain-bd-uninstallable"):
        return not_installed(said, status)
    errors = _ERROR.findall(said)
    why = one_line(errors[0], 300) if errors else "its log tells more"
    kind: FailureClass = "infrastructure" if stage.startswith("apt-get") else "environment"
    return StepFailed(kind, f"sbuild failed at {stage}: {why}", exit=status)
