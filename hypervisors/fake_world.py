"""What the fake hypervisor and its disk store know: values in memory, or in a file that processes share.

Each change reads the file, works on it and writes it back (atomically) under a flock.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from pydantic import TypeAdapter, ValidationError

from hypervisors.api import Machine, MachineSpec, Owner, Power, Template
from hypervisors.files import make_directory, open_new
from inventory.errors import DriverFailed

_BYTES = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}  # disks' contents, as JSON


@dataclass(slots=True)
class StoredDisk:
    """A disk: its content stands for all of its bytes."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = _BYTES
    owner: Owner
    size: int
    template: str
    base: str
    content: bytes
    checkpoints: dict[str, tuple[datetime, bytes]]  # oldest first; clean is the template


@dataclass(slots=True)
class StoredMachine:
    """``spec`` None: somebody else's machine."""

    machine: Machine
    spec: MachineSpec | None


@dataclass(slots=True)
class World:
    """All of it."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = _BYTES
    templates: dict[str, tuple[Template, bytes]] = field(default_factory=dict)
    disks: dict[str, StoredDisk] = field(default_factory=dict)
    machines: dict[str, StoredMachine] = field(default_factory=dict)
    peak: int = 0  # bytes: the most that machines which ran at once ever had


class Store:
    """A world in memory, or in a file shared by processes. ``change`` writes back only on success."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._depth = 0
        self._world = World()
        self._read = b""

    @contextlib.contextmanager
    def change(self) -> Iterator[World]:
        """The world, to look at or to work on, for this process alone."""
        with self._lock, self._shared() as outermost:
            yield self._world
            self._world.peak = max(self._world.peak, _given(self._world))
            if outermost and self.path:
                text = _as_json(self._world)
                if text != self._read:  # a look writes nothing
                    # by a name that recovery sweeps up, see provision.files
                    fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}.0")
                    with open_new(fresh) as file:
                        file.write(text)
                    fresh.replace(self.path)

    @contextlib.contextmanager
    def _shared(self) -> Iterator[bool]:
        """True for the outermost use by this thread, which reads the file and will write it."""
        if self._depth or self.path is None:
            yield False
            return
        make_directory(self.path.parent, mode=0o711)
        handle = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._depth += 1
            try:
                self._read = self.path.read_bytes()
            except FileNotFoundError:
                self._read, self._world = b"", World()
            else:
                self._world = _from_json(self._read, self.path)
            yield True
        finally:
            self._depth -= 1
            os.close(handle)


@functools.cache
def adapter() -> TypeAdapter[World]:
    """Once a process: to make it takes far longer than to use it."""
    return TypeAdapter(World)


def _as_json(world: World) -> bytes:
    return adapter().dump_json(world)


def _from_json(text: bytes, path: Path) -> World:
    try:
        return adapter().validate_json(text)
    except ValidationError as error:
        raise DriverFailed(
            f"{path}: not the fake driver's state: {error.errors()[0]['msg']}",
            remedy="remove it: the fake machines in it are gone then",
        ) from None


def _given(world: World) -> int:
    """Bytes that all machines which run have together."""
    machines = (fake.machine for fake in world.machines.values())
    return sum(m.current for m in machines if m.power is not Power.STOPPED)
