"""Run as a program: a checker sees new files at their live places, and nothing live changes.

In a mount namespace of our own, a directory of each file is overlaid with one that holds the new ones;
what the checker itself writes there (nginx -t opens its logs) goes with the namespace. Standard library
only; started by ``provision.network.staged``.

One JSON argument: ``over``, an empty directory to build in; ``files``: pairs of a new file, null for one
that is to be gone, and its live path; ``shadow``: directories whose changes are to be lost; ``argv``.

See mount_namespaces(7) and the kernel's filesystems/overlayfs.rst: its upper directory must not be on an
overlay itself, so it is on a tmpfs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hypervisors.libvirt._enclose import enter_as_root, enter_as_user, mount


def existing(path: Path) -> Path:
    """The nearest directory that is there."""
    while not path.is_dir():
        path = path.parent
    return path


def topmost(directories: set[Path]) -> list[Path]:
    """Without those that another one holds."""
    return sorted(d for d in directories if not any(other in d.parents for other in directories))


def place(new: str | None, live: Path, upper: Path) -> None:
    """The new file in the overlay's upper directory, owned as the live one."""
    upper.parent.mkdir(parents=True, exist_ok=True)
    if new is None:
        os.mknod(upper, stat.S_IFCHR, 0)  # how overlayfs says that a file is gone
        return
    shutil.copyfile(new, upper)
    upper.chmod(0o644)
    with contextlib.suppress(FileNotFoundError):
        own_as(live, upper)


def own_as(known: Path, new: Path) -> None:
    """Mode and owner; who may not give files away is the owner already."""
    found = known.stat()
    with contextlib.suppress(PermissionError):
        os.chown(new, found.st_uid, found.st_gid)
    new.chmod(stat.S_IMODE(found.st_mode))


def option(path: Path) -> str:
    """As overlayfs takes it apart (ovl_next_opt in the kernel)."""
    return str(path).replace("\\", "\\\\").replace(",", "\\,")


def main() -> None:
    order = json.loads(sys.argv[1])
    (enter_as_root if os.geteuid() == 0 else enter_as_user)()
    over = Path(order["over"])
    mount("farmhand", str(over), "tmpfs", 0, "mode=0755")
    files = [(new, Path(os.path.realpath(live))) for new, live in order["files"]]
    shadow = {Path(os.path.realpath(d)) for d in order["shadow"] if Path(d).is_dir()}
    for number, directory in enumerate(topmost({existing(live.parent) for _, live in files} | shadow)):
        upper, work = over / f"{number}", over / f"{number}-work"
        upper.mkdir()
        work.mkdir()
        own_as(directory, upper)
        for new, live in files:
            if directory in live.parents and (new is not None or live.exists()):
                copy_parents(directory, live, upper)
                place(new, live, upper / live.relative_to(directory))
        lower = option(directory).replace(":", "\\:")  # between several directories there is one
        options = f"lowerdir={lower},upperdir={option(upper)},workdir={option(work)}"
        mount("farmhand", str(directory), "overlay", 0, options)
    os.execvp(order["argv"][0], order["argv"])  # noqa: S606


def copy_parents(directory: Path, live: Path, upper: Path) -> None:
    """Directories on the way, with their modes: overlayfs shows the upper one's."""
    for parent in reversed(live.relative_to(directory).parents[:-1]):
        made = upper / parent
        if not made.is_dir():
            made.mkdir()
            made.chmod(0o755)
            if (directory / parent).is_dir():
                shutil.copystat(directory / parent, made)
                with contextlib.suppress(PermissionError):
                    os.chown(
                        made, (directory / parent).stat().st_uid, (directory / parent).stat().st_gid
                    )


if __name__ == "__main__":
    try:
        main()
    except OSError as problem:
        sys.exit(f"cannot check in a staging area: {problem}")
