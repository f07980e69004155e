"""What an operation takes grows as the farm does, and one VM more is one VM's work. Work is counted,
not timed: calls of functions, and what is asked of the system. ``./invoke bench`` has the seconds."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from still_farm import KINDS, StillFarm, place

from hypervisors.fake.driver import FakeHypervisor
from provision.site import Site
from provision.status import status
from tests import farm

__all__ = ["place"]
SMALL, LARGE = 5, 50
FILES = {"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "fcntl.flock", "sqlite3.connect"}
_heard: Counter[str] | None = None
_opened: Counter[Path] | None = None


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if _heard is not None and event in FILES:
        _heard[event] += 1
    if _opened is not None and event == "open" and not isinstance(arguments[0], int):
        _opened[Path(str(arguments[0]))] += 1


sys.addaudithook(_hear)  # for good; it counts within ``counted`` only


@contextmanager
def counted(*, calls: bool = True) -> Iterator[Counter[str]]:
    """By kind, of all threads. ``calls``: also those of functions."""
    global _heard  # noqa: PLW0603 - the hook can't be taken away
    _heard = work = Counter()

    def call(_frame: object, event: str, _argument: object) -> None:
        if event in ("call", "c_call"):
            work["calls"] += 1

    if calls:
        threading.setprofile(call)
        sys.setprofile(call)
    try:
        yield work
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        _heard = None


Use = Callable[[Site], object]
OPERATIONS: dict[str, Use] = {
    "clone-farm": partial(farm.clone_farm, start=False),
    "clone-farm, nothing to do": partial(farm.clone_farm, start=False),
    "start": partial(farm.start, wait=False),
    "status": status,
    "stop": farm.stop,
    "checkpoint": lambda site: farm.checkpoint(site, [], "kept"),
    "reset": partial(farm.reset, start=False),
    "destroy": lambda site: farm.destroy(site, list(site.farm.vms)),
    "gc": farm.gc,
    "destroy the farm": farm.destroy,
}
MADE_AGAIN = ("gc", "destroy the farm")


def undefine_all(site: Site) -> None:
    """Their definitions are lost: all else is left over."""
    driver = site.hypervisor("here")
    assert isinstance(driver, FakeHypervisor)
    with driver._store.change() as world:
        for name in world.machines.all():
            del world.machines[name]


def names(count: int) -> list[str]:
    return [f"v{number}" for number in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_grows_as_the_farm_does(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work: dict[int, dict[str, int]] = {}
    for count in (SMALL, LARGE):
        directory = place / str(count)
        directory.mkdir()
        monkeypatch.setenv("FARMHAND_STATE_DIR", str(directory / "state"))
        here = StillFarm(directory, kind, names(count))
        work[count] = {}
        for name, use in OPERATIONS.items():
            if name in MADE_AGAIN:
                with here.site() as site:
                    farm.clone_farm(site, start=False)
            if name == "gc":
                with here.site() as site:
                    undefine_all(site)
            with here.site() as site, counted() as done:
                use(site)
            work[count][name] = done.total()
    grown = {name: work[LARGE][name] / work[SMALL][name] for name in OPERATIONS}
    assert max(grown.values()) <= LARGE / SMALL * 1.05, grown


@pytest.mark.parametrize("kind", KINDS)
def test_one_vm_more_is_one_vm_s_work(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are."""
    seen = {}
    for count in (SMALL, LARGE):
        directory = place / str(count)
        directory.mkdir()
        monkeypatch.setenv("FARMHAND_STATE_DIR", str(directory / "state"))
        here = StillFarm(directory, kind, names(count))
        with here.site() as site:
            farm.clone_farm(site, start=False)
        here.declare(kind, [*names(count), "more"])
        with here.site() as site, counted(calls=False) as clone:
            farm.clone_farm(site, ["more"], wait=False)
        with here.site() as site, counted(calls=False) as reset:
            farm.reset(site, ["more"], wait=False)
        seen[count] = (clone, reset)
    assert seen[SMALL] == seen[LARGE]


@pytest.mark.parametrize("kind", KINDS)
def test_a_vm_is_looked_at_once(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of all machines tells of each. By status its lock is opened once, and its disk's files
    twice, the second time to prove that it is clean."""
    global _opened  # noqa: PLW0603 - see _hear
    here = StillFarm(place, kind, names(SMALL))
    with here.site() as site:
        farm.clone_farm(site, start=False)
    asked: list[str] = []
    find = FakeHypervisor.find
    monkeypatch.setattr(
        FakeHypervisor, "find", lambda driver, name: (asked.append(name), find(driver, name))[1]
    )
    with here.site() as site:
        farm.clone_farm(site, start=False)
    assert asked == [], "where there is nothing to do"
    with here.site() as site:
        _opened = Counter()
        try:
            status(site, ask=True)
        finally:
            opened, _opened = _opened, None
    assert asked == []
    for vm in names(SMALL):
        its = Counter({
            path.name: times for path, times in opened.items()
            if f"still-{vm}" in path.parts or path.name == f"vm-{vm}.lock"
        })  # fmt: skip
        assert its.pop(f"vm-{vm}.lock") == 1
        assert max(its.values(), default=0) <= 2, its
