"""Block devices that a store makes: waited for, given to QEMU's user, and who has one open."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from inventory.errors import DriverFailed

_NUDGE = 3.0  # seconds
_MOMENT = 0.01  # seconds
_UDEV = ("udev", "systemd-udevd", "(udev-worker)", "blkid", "zvol_id")


def await_node(path: Path, *, nudge: Callable[[], object] | None = None, timeout: float = 60) -> None:
    """Wait until udev has made the device's link and it leads somewhere. ``nudge`` makes udev look
    again, and is called every few seconds, for udev may have failed to look. DriverFailed if the link
    doesn't appear within ``timeout`` seconds."""
    started = time.monotonic()
    nudged = started
    pause = 0.002
    while not path.exists():
        now = time.monotonic()
        if nudge is not None and now - nudged > _NUDGE:
            nudge()
            nudged = time.monotonic()
        if now - started > timeout:
            raise DriverFailed(
                f"{path} didn't appear within {timeout:g} s of its making",
                remedy="is udev running? udevadm trigger --subsystem-match=block; udevadm settle",
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def await_no_link(path: Path, *, timeout: float = 60) -> None:
    """Wait until udev has removed the link of a device that is gone: by now it may lead to another's
    device. DriverFailed if it is still there after ``timeout`` seconds."""
    limit = time.monotonic() + timeout
    while path.is_symlink():
        if time.monotonic() > limit:
            raise DriverFailed(
                f"{path} is still there, {timeout:g} s after its volume went",
                remedy="is udev running? udevadm settle; if it stays: rm it",
            )
        time.sleep(0.02)


def give(path: Path, uid: int | None) -> None:
    """Make ``uid`` the device's owner; None: leave it. Its group stays ``disk``, so that user gets at
    this one device and at no other. It lasts until the node is made anew (a reboot, a pool's import):
    udev's later events set group and mode only."""
    if uid is not None and path.stat().st_uid != uid:
        os.chown(path, uid, -1)


def holders(path: Path) -> tuple[tuple[int, str], ...]:
    """Processes that have the block device open: pid and name. Of other users' processes only root
    sees it."""
    try:
        device = path.stat()
    except FileNotFoundError:
        return ()
    if not stat.S_ISBLK(device.st_mode):
        return ()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or isn't ours to look into
            if _has_open(process, device.st_rdev):
                found.append((int(process.name), (process / "comm").read_text().strip()))
    return tuple(found)


def await_closed(path: Path, who: tuple[tuple[int, str], ...], *, timeout: float) -> None:
    """Wait until none of these processes has the block device open any more, or ``timeout`` seconds are
    over. It waits a moment at least, for a process that can't be seen. It looks at these processes only,
    for all of /proc takes a while."""
    limit = time.monotonic() + timeout
    time.sleep(_MOMENT)
    try:
        device = path.stat()
    except FileNotFoundError:
        return
    for pid, _ in who:
        with contextlib.suppress(OSError):
            while _has_open(Path("/proc", str(pid)), device.st_rdev) and time.monotonic() < limit:
                time.sleep(_MOMENT)


def _has_open(process: Path, device: int) -> bool:
    """Whether the process has that device open. OSError if the process is gone, or not ours to look
    into."""
    for handle in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            seen = handle.stat()
            if stat.S_ISBLK(seen.st_mode) and seen.st_rdev == device:
                return True
    return False


def passing(found: tuple[tuple[int, str], ...]) -> bool:
    """Whether these are only udev's processes, which look at a new or changed device for a moment."""
    return all(name.startswith(_UDEV) for _, name in found)
