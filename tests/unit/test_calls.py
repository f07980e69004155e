"""What an operation asks of the driver, the disk store and the allocator: each thing once."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from still_farm import StillFarm, place

from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from provision.allocate import Allocator
from provision.site import Site
from provision.status import status
from tests import farm

__all__ = ["place"]
ASKED = {"driver": FakeHypervisor, "store": FakeDisks, "allocator": Allocator}


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls from outside: what a driver asks of its own store isn't one."""
    calls: Counter[str] = Counter()
    guard, within = threading.Lock(), threading.local()

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            if getattr(within, "one", False):
                return method(*args, **options)
            with guard:
                calls[name] += 1
            within.one = True
            try:
                return method(*args, **options)
            finally:
                within.one = False

        return call

    with monkeypatch.context() as patch:
        for who, kind in ASKED.items():
            for name, method in vars(kind).items():
                if callable(method) and not name.startswith("_") and name != "close":
                    patch.setattr(kind, name, counting(f"{who}.{name}", method))
        yield calls


USES: dict[str, tuple[Callable[[Site], object], dict[str, str]]] = {
    "clone": (
        lambda site: farm.clone_farm(site, ["prod"]),
        {
            "driver": "find 2, define 1, start 1",
            "store": "find 2, templates 1, capacity 1",
            "allocator": "allocate_all 1, recorded 1",  # is it made under another name?
        },
    ),
    "clone, nothing to do": (
        lambda site: farm.clone_farm(site, ["prod"]),
        {"driver": "find 1", "store": "find 1, templates 1", "allocator": "peek_all 1"},
    ),
    "reset": (
        lambda site: farm.reset(site, ["prod"]),
        {
            "driver": "find 2, stop 1, start 1",
            "store": "find 3, restore 1, pristine 1",
            "allocator": "allocate 1",
        },
    ),
    "status": (
        status,
        {
            "driver": "capabilities 1, list 1",
            "store": "list 1, capacity 1, templates 1",
            "allocator": "recorded 2",
        },
    ),
    "stop": (lambda site: farm.stop(site, ["prod"]), {"driver": "find 1, stop 1"}),
    "start": (
        lambda site: farm.start(site, ["prod"]),
        {"driver": "find 2, start 1", "store": "find 1", "allocator": "allocate 1"},
    ),
    "destroy": (
        lambda site: farm.destroy(site, ["prod"]),
        {
            # whose it is, before anything goes; and again, under its lock
            "driver": "list 1, leftovers 2, find 2, destroy 1",
            "store": "list 1, leftovers 2, find 1",
            "allocator": "recorded 1, release 1",
        },
    ),
}
"""One after the other, with what each asks: of one VM, or (status) of two."""


def test_what_an_operation_asks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = StillFarm(place, "fake", ["dev2", "prod"])
    with here.site() as site:
        farm.clone_farm(site, ["dev2"])
    for name, (use, expected) in USES.items():
        with here.site() as site, counted(monkeypatch) as calls:
            use(site)
        asked = {
            f"{who}.{call.split()[0]}": int(call.split()[1])
            for who, of_one in expected.items()
            for call in of_one.split(", ")
        }
        assert calls == asked, name
