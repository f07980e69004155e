"""All farms of this machine that can be seen: those of this state directory, of other users' usual ones,
and those whose VMs run. What may not be looked at is told, and never counts as absent."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from host.documents import json_object, read_file
from host.files import same_place
from host.paths import cache_dir, state_dir
from host.printable import one_line
from host.processes import account, command_line, pids
from host.space import taken
from inventory.errors import FarmhandError
from inventory.values import LABEL
from provision.engine.report import QuietReporter
from provision.farm_cache import known_farm
from provision.site import open_site
from provision.status import status

_AT_ONCE = 4
_RUNNING = re.compile(rf'(/[^"\0,=]*?)/farms/({LABEL})/(?:seeds/({LABEL})\.iso|disks/vms/({LABEL})/)')
"""In a hypervisor's command line: state directory, farm, machine."""

FileState = Literal["there", "gone", "of another farm", "wrong", "closed", ""]
"""Of a farm's file. Closed: we may not look. "": nobody knows which it is."""


@dataclass(frozen=True, slots=True)
class SeenVm:
    """``state``: as in ``VmStatus``, or "not running" where nothing more can be told."""

    vm: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenFarm:
    """``state``: its directory. ``user``: whose that is; ``ours``: whether it is in our own state
    directory. ``bytes``: of that; None: not to be seen. ``note``: what is wrong, or not to be seen."""

    farm: str
    state: Path
    user: str
    ours: bool
    file: str = ""
    file_state: FileState = ""
    vms: tuple[SeenVm, ...] = ()
    bytes: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class SeenFarms:
    """``closed``: what may not be looked at, and whose it is. ``free``: bytes, where our state is."""

    farms: tuple[SeenFarm, ...]
    closed: Mapping[Path, str] = field(default_factory=dict)
    free: int | None = None


def seen_farms() -> SeenFarms:
    """By reading only: starts nothing, changes nothing."""
    running = _running()
    closed: dict[Path, str] = {}
    found: list[SeenFarm] = []
    for top, user in _places().items():
        try:
            with os.scandir(top / "farms") as entries:
                names = sorted(one.name for one in entries if re.fullmatch(LABEL, one.name))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            closed[top] = user
            continue
        found += (_look(top, name, running) for name in names)
    for top, name in running:  # in a place that nobody told us of, or that we may not look into
        if not any(same_place(one.state, top / "farms" / name) for one in found):
            found.append(_look(top, name, running))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(_asked, found))
    free = shutil.disk_usage(state_dir()).free if state_dir().is_dir() else None
    return SeenFarms(tuple(found), closed, free)


def _places() -> Mapping[Path, str]:
    """State directories, and whose: ours, then each user's usual one."""
    found = {state_dir(): account(os.geteuid())}
    for entry in pwd.getpwall():
        home = Path("/var/lib") if entry.pw_uid == 0 else Path(entry.pw_dir, ".local/state")
        if home.is_absolute():
            found.setdefault(home / "farmhand", entry.pw_name)
    return found


def _running() -> Mapping[tuple[Path, str], frozenset[str]]:
    """By state directory and farm, the machines that a QEMU of this machine runs."""
    found: dict[tuple[Path, str], frozenset[str]] = {}
    for pid in pids():
        with contextlib.suppress(OSError):
            words = command_line(pid)
            if not words or not Path(words[0]).name.startswith("qemu-"):
                continue
            for top, farm, *names in _RUNNING.findall("\0".join(words)):
                key = Path(top), farm
                found[key] = found.get(key, frozenset()) | {*filter(None, names)}
    return found


def _look(top: Path, name: str, running: Mapping[tuple[Path, str], frozenset[str]]) -> SeenFarm:
    """As its files tell, and the processes."""
    state = top / "farms" / name
    on = frozenset[str]().union(
        *(names for (place, farm), names in running.items() if same_place(place / "farms" / farm, state))
    )
    seen = SeenFarm(farm=name, state=state, user=_owner(state), ours=same_place(top, state_dir()))
    made = set(on)
    with contextlib.suppress(OSError), os.scandir(state / "disks" / "vms") as entries:
        made |= {entry.name for entry in entries if not entry.name.startswith(".")}
    size: int | None = None
    with contextlib.suppress(OSError), os.scandir(state):  # or it can't be told
        size = taken(state)
    vms = tuple(
        SeenVm(one.removeprefix(f"{name}-"), "running" if one in on else "not running")
        for one in sorted(made)
    )
    return _with_file(replace(seen, vms=vms, bytes=size))


def _owner(state: Path) -> str:
    """Of the nearest directory that can be seen."""
    for place in (state, *state.parents):
        with contextlib.suppress(OSError):
            return account(place.stat().st_uid)
    return ""


def _with_file(seen: SeenFarm) -> SeenFarm:
    try:
        noted = json_object(read_file(seen.state / "identity.json")).get("file")
    except FileNotFoundError:
        return replace(seen, note="its farm file isn't known: it has no identity.json")
    except PermissionError:
        return replace(seen, file_state="closed", note=f"{seen.user}'s: what it has can't be looked at")
    except (OSError, ValueError) as error:
        return replace(seen, note=f"whose it is can't be read: {one_line(str(error), 200)}")
    file = str(noted)
    try:
        if not Path(file).is_file():
            return replace(seen, file=file, file_state="gone", note="its farm file is gone")
        farm = known_farm(Path(file), cache_dir(), keep=False)
    except PermissionError:
        return replace(seen, file=file, file_state="closed", note=f"{file} can't be looked at")
    except FarmhandError as error:
        first = error.message.splitlines()[0]
        state: FileState = "wrong" if os.access(file, os.R_OK, effective_ids=True) else "closed"
        return replace(seen, file=file, file_state=state, note=first)
    if farm.farm != seen.farm:
        note = f"{file} is of farm {farm.farm} by now"
        return replace(seen, file=file, file_state="of another farm", note=note)
    return replace(seen, file=file, file_state="there")


def _asked(seen: SeenFarm) -> SeenFarm:
    """Of one that is ours, and whose file is there, its hosts tell more."""
    if not seen.ours or seen.file_state != "there":
        return seen
    try:
        with open_site(Path(seen.file), reporter=QuietReporter(), plan=True) as site:
            now = status(site)
    except FarmhandError as error:
        return replace(seen, note=error.message.splitlines()[0])
    unseen = [f"host {host.host}: {host.error}" for host in now.hosts if host.error]
    return replace(
        seen, vms=tuple(SeenVm(vm.vm, vm.state) for vm in now.vms), note="; ".join(unseen)
    )  # fmt: skip
