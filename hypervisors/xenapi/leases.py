"""Leases on a XenAPI server: who changes which machines, as keys of the pool's ``other_config``.

A server knows no locks of ours, and only one call on a map is atomic: to add a key that isn't there. So
each holder has a key of its own: it adds that, then looks at all of them. Of two that want the same, the
later one to look sees the other, and takes its own back. Three calls for a command, however many
machines it has: the key, the look, and the key's removal.

While it is held it is renewed: a key with the next number is added, then the old one removed, so that
it is always seen. One that is over time and isn't renewed while it is watched is a dead holder's, and is
removed, by its number: a holder that lives after all has the next one by then. Clocks are believed only
where that does no harm: a holder that isn't over time by ours is waited for by nobody. One with far more
time than any lease has was noted by a clock ahead of ours, and is watched as well: dead, it would hold
everybody up until then.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from host.leases import busy
from host.processes import Process, boot_id
from hypervisors.api import no_step
from hypervisors.xenapi.errors import XenApiError, translated
from hypervisors.xenapi.records import PREFIX
from hypervisors.xenapi.session import Sessions
from inventory.errors import FarmhandError

RENEWED, LASTS, WATCHED = 15.0, 60.0, 35.0
"""Seconds: between two renewals; until it is over time; for which such a one is watched."""
_LOOK = 1.0  # seconds between looks at one that is watched
_KEY = f"{PREFIX}lease:"


@dataclass(frozen=True, slots=True)
class _Other:
    """Somebody's lease, as its key has it; ``until`` by the holder's clock."""

    key: str
    names: frozenset[str]
    note: str
    until: float
    process: str

    @property
    def stem(self) -> str:
        """The same over all its renewals."""
        return _stem(self.key)

    @property
    def dead(self) -> bool:
        """Surely: a process of this very machine, that has ended."""
        process = Process.parse(self.process)
        return process.boot == boot_id() and not process.alive()


@dataclass(frozen=True)
class PoolLeases:
    """Implements ``hypervisors.api.Leases``. ``url``: the server's. ``working``: told what is waited
    for."""

    url: str
    sessions: Sessions = field(compare=False)
    working: Callable[[str], None] = field(default=no_step, compare=False)

    @contextlib.contextmanager
    def hold(self, names: Sequence[str], note: str) -> Iterator[None]:
        """See ``hypervisors.api.Leases``."""
        mine = _OwnLease(self, frozenset(names), note)
        with translated("take the lease"):
            self._take(mine)
        ended = threading.Event()
        renewing = threading.Thread(target=mine.renew, args=(ended,), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()
            with contextlib.suppress(XenApiError, FarmhandError):  # it is over time soon
                self.remove(mine.key)

    def _take(self, mine: _OwnLease) -> None:
        self.add(mine.key, mine.value)
        try:
            for other in self._in_the_way(mine):
                if not other.dead:
                    self._watch(other, mine)
                self.remove(other.key)
        except BaseException:
            with contextlib.suppress(XenApiError, FarmhandError):
                self.remove(mine.key)
            raise

    def _watch(self, other: _Other, mine: _OwnLease) -> None:
        """Returns when it is a dead one's, or gone. Busy."""
        limit = time.monotonic() + WATCHED
        name = min(other.names & mine.names)
        if 0 < other.until - time.time() <= 2 * LASTS:
            raise busy(name, other.note)
        while time.monotonic() < limit:
            time.sleep(_LOOK)
            self.working(f"looking whether {other.note} still lives")
            there = self._in_the_way(mine)
            if any(one.stem == other.stem and one.key != other.key for one in there):
                raise busy(name, other.note)
            if not any(one.key == other.key for one in there):
                return

    def _in_the_way(self, mine: _OwnLease) -> list[_Other]:
        config = self.sessions.call("pool.get_other_config", self._pool)
        return [
            other for key, value in config.items()
            if key.startswith(_KEY) and _stem(key) != mine.stem
            if (other := _read(key, value)) and other.names & mine.names
        ]  # fmt: skip

    def add(self, key: str, value: str) -> None:
        self.sessions.call("pool.add_to_other_config", self._pool, key, value)

    def remove(self, key: str) -> None:
        """Nothing where it is gone."""
        self.sessions.call("pool.remove_from_other_config", self._pool, key)

    @cached_property
    def _pool(self) -> str:
        (ref,) = self.sessions.call("pool.get_all")
        return str(ref)


class _OwnLease:
    """One that this process holds."""

    def __init__(self, leases: PoolLeases, names: frozenset[str], note: str) -> None:
        self._leases = leases
        self.names = names
        self._note = note
        self._number = 0
        self.stem = f"{_KEY}{secrets.token_hex(8)}"

    @property
    def key(self) -> str:
        return f"{self.stem}:{self._number}"

    @property
    def value(self) -> str:
        facts = {
            "names": sorted(self.names), "note": self._note, "until": time.time() + LASTS,
            "process": Process.this().mark,
        }  # fmt: skip
        return json.dumps(facts)

    def renew(self, ended: threading.Event) -> None:
        """Until then. One that can't be renewed now is tried again."""
        while not ended.wait(RENEWED):
            with contextlib.suppress(XenApiError, FarmhandError):
                old = self.key
                self._leases.add(f"{self.stem}:{self._number + 1}", self.value)
                self._number += 1
                self._leases.remove(old)


def _stem(key: str) -> str:
    return key.rpartition(":")[0]


def _read(key: str, value: str) -> _Other | None:
    """None for what isn't a lease, whoever wrote it."""
    try:
        found: Mapping[str, Any] = json.loads(value)
        names = frozenset(str(name) for name in found["names"])
        return _Other(key, names, str(found["note"]), float(found["until"]), str(found["process"]))
    except (ValueError, KeyError, TypeError):
        return None
