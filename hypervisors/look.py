"""All that a look at a host asks of it, asked at once: of another machine it is one question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import TypeVar

from hypervisors.api import (
    CLEAN,
    ON,
    Capabilities,
    Disk,
    Disks,
    FileSystem,
    Hypervisor,
    KeptMemory,
    Machine,
    MemoryShare,
    Power,
    SharingMachines,
    Template,
    ToldMachines,
    WarmMachines,
    WatchedDisks,
    WatchedMachines,
)
from inventory.errors import FarmhandError

_T = TypeVar("_T")
_AT_ONCE = 8
_PATIENCE = 2.0
"""Seconds for a hypervisor to say what it sees in its guests: milliseconds, unless one hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLook:
    """``machines`` and ``disks``: this farm's. ``taken``: machines of others that have a name asked for.
    ``pristine``, by machine: see ``Disks.pristine``; of those asked for, where they are off.
    ``memories``, by machine and checkpoint: see ``WarmMachines``; ``shares``, by machine: of those of
    them that run. ``file_systems``, by machine: of running guests that tell without a login.
    ``troubles``, by machine: what went wrong with one of them alone."""

    capabilities: Capabilities
    machines: tuple[Machine, ...]
    taken: tuple[Machine, ...]
    notes: Mapping[str, str]
    disks: tuple[Disk, ...]
    templates: tuple[Template, ...]  # other farms', too
    free: int | None  # bytes of the store
    disk_notes: tuple[str, ...]
    pristine: Mapping[str, bool | None]
    memories: Mapping[str, Mapping[str, KeptMemory]]
    shares: Mapping[str, MemoryShare]
    file_systems: Mapping[str, tuple[FileSystem, ...]]
    troubles: Mapping[str, FarmhandError]


def look_at(
    driver: Hypervisor, disks: Disks | None, names: Sequence[str], proven: Sequence[str]
) -> HostLook:
    """Changes nothing. ``names``: of machines that may not be there. ``proven``: of those whose disks
    are to be compared with their checkpoints. The errors of driver and store."""
    machines = {machine.name: machine for machine in driver.list()}
    notes = _noted(driver) if any(machine.power in ON for machine in machines.values()) else dict
    talking = [name for name, one in machines.items() if one.agent and one.power is Power.RUNNING]
    told = _told(driver, talking)
    found = {disk.machine: disk for disk in disks.list()} if disks else {}
    troubles: dict[str, FarmhandError] = {}

    def other(name: str) -> Machine | None:
        try:
            return driver.find(name)
        except FarmhandError as error:
            troubles[name] = error
            return None

    def pristine(name: str) -> bool | None:
        assert disks
        try:
            return disks.pristine(name, found[name].base, quick=True)
        except FarmhandError as error:
            troubles[name] = error
            return None

    off = [
        name for name in proven if name in found and name in machines and machines[name].power not in ON
    ]
    memories: dict[str, Mapping[str, KeptMemory]] = {}
    shares: dict[str, MemoryShare] = {}
    if isinstance(driver, WarmMachines):
        for name, disk in found.items():
            if name not in machines or all(kept.name == CLEAN for kept in disk.checkpoints):
                continue
            try:
                memories[name] = driver.memories(name)
                on = memories[name] and machines[name].power in ON
                if on and isinstance(driver, SharingMachines) and (share := driver.memory_share(name)):
                    shares[name] = share
            except FarmhandError as error:
                troubles[name] = error
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # each may ask the store
        proofs = dict(zip(off, pool.map(pristine, off), strict=True))
    return HostLook(
        capabilities=driver.capabilities(),
        machines=tuple(machines.values()),
        taken=tuple(filter(None, (other(name) for name in names if name not in machines))),
        disks=tuple(found.values()),
        templates=tuple(disks.templates()) if disks else (),
        free=disks.capacity().free if disks else None,
        disk_notes=tuple(disks.notes()) if isinstance(disks, WatchedDisks) else (),
        pristine=proofs,
        memories=memories,
        shares=shares,
        troubles=troubles,
        notes=notes(),
        file_systems={name: tuple(found) for name, found in told().items()},
    )


def _noted(driver: Hypervisor) -> Callable[[], Mapping[str, str]]:
    return _meanwhile(driver.notes) if isinstance(driver, WatchedMachines) else dict


def _told(driver: Hypervisor, names: Sequence[str]) -> Callable[[], Mapping[str, Sequence[FileSystem]]]:
    if not names or not isinstance(driver, ToldMachines):
        return dict
    return _meanwhile(partial(driver.file_systems, names))


def _meanwhile(ask: Callable[[], Mapping[str, _T]]) -> Callable[[], Mapping[str, _T]]:
    """What is said of running machines, asked for while the rest is looked at; nothing if it doesn't
    come in time: one guest whose hypervisor hangs must not hide all the rest."""
    answer: Future[Mapping[str, _T]] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except FarmhandError:
            answer.set_result({})

    def get() -> Mapping[str, _T]:
        try:
            return answer.result(_PATIENCE)
        except TimeoutError:
            return {}

    Thread(target=run, daemon=True).start()
    return get
