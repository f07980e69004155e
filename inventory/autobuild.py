"""The Autobuild cycle: what a farm's ``cycle`` is when its file doesn't say.

1. reset dev2 and prod; 2. in dev2 get the newest source from git, build dev.rpm, install it, build
prod.rpm; 3. carry prod.rpm to prod; 4. install it there.

The guests may be emulated, where starting a process costs tens of milliseconds: few are started.
The scripts run under ``sh -eu`` with GIT_REVISION, SOURCE_URL, BUILD_ID and FARM in the environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inventory.model import Cycle

# rpmspec tells, macros expanded, how the spec calls its tarball (Source0) and by name and version the
# directory that %setup expects in it; more sources and patches lie beside the spec. (`rpmspec -q` would
# list the sources without their numbers, the last one first.) The packages go to a directory of their
# own, emptied first, and `packages` there names them: what is installed later is what this build made,
# whatever else lies about.
_BUILD = """\
cd "$HOME/src"
top=$HOME/rpmbuild
out=$top/RPMS/{which}
spec=rpms/{which}.spec
rm -rf "$out"
mkdir -p "$out" "$top/SOURCES"
rpmspec -P "$spec" > "$out/spec"
name= version= source= others=
while read -r tag value; do
    case $tag in
        Name:) name=${{name:-$value}} ;;
        Version:) version=${{version:-$value}} ;;
        Source: | Source0:) source=${{source:-${{value##*/}}}} ;;
        Source[1-9]*: | Patch*:) others="$others rpms/${{value##*/}}" ;;
        %description) break ;;
    esac
done < "$out/spec"
rm "$out/spec"
if [ -n "$source" ]; then
    git archive --prefix="$name-$version/" -o "$top/SOURCES/$source" HEAD
fi
if [ -n "$others" ]; then
    cp $others "$top/SOURCES"
fi
rpmbuild -bb --define "_topdir $top" --define "_rpmdir $out" "$spec"
cd "$out"
for package in */*.rpm; do
    echo "${{package##*/}}"
done > packages
"""

# Debian's rpm asks for --force-debian, since packages there are dpkg's; others don't know the option.
_INSTALL = """\
set -- -Uvh --replacepkgs --oldpackage
if [ -e /etc/debian_version ]; then
    set -- --force-debian "$@"
fi
"""

INSTALL_DEV = f"""{_INSTALL}\
rpm "$@" "$HOME"/rpmbuild/RPMS/dev/*/*.rpm
"""

INSTALL_PROD = f"""{_INSTALL}\
cd "$HOME/incoming"
while read -r package; do
    set -- "$@" "$package"
done < packages
rpm "$@"
"""


def default_steps(dev: str, prod: str) -> dict[str, Any]:
    """The steps of the default ``cycle``, as a farm file would hold them."""
    return {
        "steps": [
            {"name": f"reset-{dev}", "reset": dev, "timeout": "10m"},
            {"name": f"reset-{prod}", "reset": prod, "timeout": "10m"},
            {"name": "fetch", "checkout": dev, "timeout": "10m"},
            {
                "name": "build-dev",
                "vm": dev,
                "run": _BUILD.format(which="dev"),
                "artifacts": "rpmbuild/RPMS/dev/*/*.rpm",
                "timeout": "1h",
            },
            {
                "name": "install-dev",
                "vm": dev,
                "run": INSTALL_DEV,
                "root": "yes",
                "timeout": "10m",
            },
            {
                "name": "build-prod",
                "vm": dev,
                "run": _BUILD.format(which="prod"),
                "artifacts": "rpmbuild/RPMS/prod/*/*.rpm",
                "timeout": "1h",
            },
            {
                "name": "transfer",
                "transfer": ["rpmbuild/RPMS/prod/*/*.rpm", "rpmbuild/RPMS/prod/packages"],
                "from": dev,
                "to": prod,
                "into": "incoming",
                "timeout": "10m",
            },
            {
                "name": "install-prod",
                "vm": prod,
                "run": INSTALL_PROD,
                "root": "yes",
                "timeout": "10m",
            },
        ]
    }


def default_cycle(dev: str = "dev2", prod: str = "prod") -> Cycle:
    """The Autobuild cycle over two VMs."""
    from inventory.validation import validated

    farm = validated({"farm": "any", "vms": {dev: {}, prod: {}}, "cycle": default_steps(dev, prod)})
    assert farm.cycle is not None
    return farm.cycle
