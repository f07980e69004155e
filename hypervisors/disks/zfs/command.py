"""``zfs`` and the channel program, run; and their errors in our words.

Errors say "not found" only where ZFS does; a missing module, a suspended pool, a full one, a lack of
rights and a busy volume each get a line of their own, with what to do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from pkgutil import get_data
from typing import Any

from host.files import sync
from host.run import CommandResult, Runner, which
from hypervisors.answers import answer_of
from hypervisors.disks.devices import await_closed, holders, passing
from inventory.errors import (
    Busy,
    Call,
    CommandFailed,
    Conflict,
    DriverFailed,
    FarmhandError,
    NoSpace,
    NotFound,
    NotOurs,
    WrongState,
)

_LIMITS = ("-t", "100000000", "-m", "104857600")  # the most there may be: thousands of volumes
_PATIENCE = 10.0  # for udev's look at a device


@cache
def channel_program() -> bytes:
    """What ZFS itself runs as one transaction (zfs-program(8)). On a far host it is in no file: it came
    in a parcel, as this module did."""
    program = get_data(__name__, "store.lua")
    assert program
    return program


class Zfs:
    """The commands on the store's dataset of one pool."""

    def __init__(self, runner: Runner, pool: str, root: str, farm: str) -> None:
        """``farm``: the identity's number."""
        self._runner = runner
        self._pool = pool
        self._root = root
        self._farm = farm
        self._zfs = which("zfs") or "zfs"

    def look(self, machine: str = "", *, synced: bool = False) -> Mapping[str, Any]:
        """What the store holds, or what of it belongs to one machine. ``synced``: with all that was
        written until now."""
        flags = ("-j",) if synced else ("-jn",)
        return self._answer(self._runner.read, flags, "look", machine)

    def space(self) -> tuple[int, int]:
        """Bytes used and available."""
        answer = self._answer(self._runner.read, ("-jn",), "space")
        with answer_of("zfs program"):
            return int(answer["space"]["used"]), int(answer["space"]["available"])

    def program(self, operation: str, *arguments: str) -> Mapping[str, Any]:
        """Make a change. Busy, NotOurs, WrongState, Conflict or NotFound if it is refused. It is tried
        again only while nothing but udev's look at a new device stands against it."""
        limit = time.monotonic() + _PATIENCE
        while True:
            answer = self._answer(self._runner.change, ("-j",), operation, *arguments)
            refused, at = answer.get("refused"), str(answer.get("at", ""))
            busy = refused == "busy" or answer.get("errno") == errno.EBUSY
            if not busy and not refused and not answer.get("errno"):
                return answer
            path = Path("/dev/zvol") / at.partition("@")[0]
            who = holders(path) if busy else ()
            if busy and passing(who) and time.monotonic() < limit:
                await_closed(path, who, timeout=limit - time.monotonic())
                continue
            raise self._refusal(answer, at, who)

    def flush(self, path: Path) -> None:
        """Sync a file, fsync(2). A suspended pool would hang this process for good, so it is looked at
        before."""
        self._check_pool()
        sync(path)

    def change(self, *argv: str | Path, timeout: float = 600) -> CommandResult:
        """Run ``zfs ARGUMENT...``, for ``timeout`` seconds at most."""
        self._check_pool()
        try:
            return self._runner.change(self._zfs, *argv, timeout=timeout)
        except CommandFailed as error:
            raise self._translated(error) from error

    def nudge(self) -> None:
        """Have udev look again at volumes' devices that have no link. On a busy host zvol_open gives up
        after zvol_open_timeout_ms (zfs(4), 1 s) with ERESTARTSYS, which reaches udev as "Unknown error
        512": it then ignores the device. Only those: each look at one opens it, and makes it worse."""
        linked = {p.resolve().name for p in Path("/dev/zvol").rglob("*") if p.is_symlink()}
        devices = [p for p in sorted(Path("/sys/block").glob("zd*")) if p.name not in linked]
        if devices:
            self._runner.change("udevadm", "trigger", "--action=change", *devices, timeout=60)

    def _answer(
        self, run: Callable[..., CommandResult], flags: tuple[str, ...], operation: str, *arguments: str
    ) -> Mapping[str, Any]:
        self._check_pool()
        try:
            result = run(
                self._zfs, "program", *flags, *_LIMITS, self._pool, "-",  # its standard input
                operation, self._root, self._farm, *arguments,
                timeout=300, input=channel_program(),
            )  # fmt: skip
        except CommandFailed as error:
            raise self._translated(error) from error
        with answer_of("zfs program"):
            answer: Mapping[str, Any] = json.loads(result.stdout)["return"].copy()
        return answer

    def _refusal(
        self, answer: Mapping[str, Any], at: str, who: tuple[tuple[int, str], ...]
    ) -> FarmhandError:
        number = int(answer.get("errno") or 0)
        match answer.get("refused"):
            case "busy":
                return busy(at, who)
            case "in use":
                by = answer.get("by")
                return WrongState(
                    f"{at} can't be removed: {by} is in the way, and isn't farmhand's",
                    remedy=f"move it away or remove it (zfs promote, zfs destroy {by}), then again",
                )
            case "foreign":
                return NotOurs(f"{at} belongs to another farm")
            case "no disk":
                return NotFound(f"{at} has no disk here", remedy=(Call("clone-farm"), " makes it"))
            case "exists":
                return Conflict(f"{at} is that machine's disk already", remedy="destroy it first")
            case "taken":
                return Conflict(
                    f"{at} has a checkpoint of that name already",
                    remedy="give the new one another name",
                )
            case "changed":
                return WrongState(f"{at} was changed by somebody else meanwhile", remedy="try again")
        match number:
            case errno.EBUSY:
                return busy(at, who)
            case errno.ENOSPC | errno.EDQUOT:
                return self._full()
            case errno.EEXIST:
                return Conflict(f"{at} exists already, and isn't farmhand's", remedy="remove it")
            case errno.ENOENT:
                return NotFound(f"{at} is gone")
        return DriverFailed(f"{at}: ZFS answered {os.strerror(number)}")

    def _check_pool(self) -> None:
        """Some commands hang on a suspended pool instead of saying so. What the kernel says of it costs
        no process."""
        with contextlib.suppress(OSError):
            if Path("/proc/spl/kstat/zfs", self._pool, "state").read_text().strip() == "SUSPENDED":
                raise self._suspended()

    def _suspended(self) -> DriverFailed:
        return DriverFailed(
            f"pool {self._pool} is suspended: its devices don't answer",
            remedy=f"zpool status {self._pool}; when they are back: zpool clear {self._pool}",
        )

    def _full(self) -> NoSpace:
        return NoSpace(
            f"{self._root}: pool or quota is full; nothing was changed",
            remedy=(Call("gc"), f"; zfs list -o space -r {self._pool} shows what takes it"),
        )

    def _translated(self, error: CommandFailed) -> FarmhandError:
        text = error.stderr or error.message
        said = text.strip().splitlines()[0] if text.strip() else error.message

        def has(*words: str) -> bool:
            return any(word in text for word in words)

        if has("modules are not loaded", "ZFS modules", "/dev/zfs and /proc/self/mounts"):
            return DriverFailed(
                "ZFS isn't loaded in this kernel",
                remedy="modprobe zfs (package zfs-dkms or zfs-modules)",
            )
        if has("no such pool"):
            return NotFound(
                f"there is no ZFS pool {self._pool}",
                remedy=f"zpool import {self._pool}, or name another 'pool' in the farm file",
            )
        if has("suspended"):
            return self._suspended()
        if has("ermission denied", "not permitted", "insufficient privileges"):
            return DriverFailed(
                f"not allowed to change {self._root}: {said}",
                remedy="run it as root: channel programs and volumes need that",
            )
        if has("out of space", "No space left", "no space left", "uota exceeded"):
            return self._full()
        if has("already exists"):
            return Conflict(said, remedy="zfs list shows it")
        if has("busy"):
            return Busy(said, remedy="see who has it open: fuser -v /dev/zd*")
        if has("does not exist", "no such tag"):
            return NotFound(said, remedy=f"zfs list -t all -r {self._root}")
        return error


def busy(at: str, who: tuple[tuple[int, str], ...]) -> Busy:
    names = ", ".join(f"{name} (pid {pid})" for pid, name in who)
    return Busy(
        f"{at} is open in {names or 'a process that is not to be seen'}: left as it is",
        remedy="stop that, then again",
    )
