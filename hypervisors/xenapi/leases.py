"""Leases on a XenAPI server: who changes which machines, as keys of the pool's ``other_config``.

A server knows no locks of ours, and only one call on a map is atomic: to add a key that isn't there. So
each holder has a key of its own: it adds that, then looks at all of them. Of two that want the same, the
later one to look sees the other, and takes its own back. Three calls for a command, however many
machines it has: the key, the look, and the key's removal.

While it is held it is renewed: a key with the next number is added, then the old one removed, so that
it is always seen. One that is over time and isn't renewed while it is watched is a dead holder's, and is
removed, by its number, and all of them are looked at once more: a holder that lives after all has the
next one by then. Clocks are believed only where that does no harm: a holder that isn't over time by ours
is waited for by nobody. One with far more time than any lease has was noted by a clock ahead of ours,
and is watched as well: dead, it would hold everybody up until then.

A holder that was stopped (Ctrl-Z, a laptop's lid) may have been taken for dead. So before each change it
looks how long ago it renewed its lease, by a clock that goes on in any sleep: within ``SURE`` seconds
nobody can have watched it for long enough, and no call is made. After that it renews first, and sees
whether its last key is still there; where it isn't, it changes nothing more.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from host.leases import busy
from host.printable import one_line
from host.processes import Process, boot_id
from hypervisors.api import no_step
from hypervisors.xenapi.errors import XenApiError, translated
from hypervisors.xenapi.records import PREFIX
from hypervisors.xenapi.session import Sessions
from inventory.errors import Call, FarmhandError, LeaseLost

RENEWED, LASTS, WATCHED, SURE = 15.0, 60.0, 35.0, 30.0
"""Seconds: between two renewals; until it is over time; for which such a one is watched; in which nobody
can have broken one after a renewal, with a reserve for the call that is made then."""
_LOOK = 1.0  # seconds between looks at one that is watched
_KEY = f"{PREFIX}lease:"
_HELD: set[str] = set()
"""Stems of the keys of leases that this process holds."""


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
        """Surely: of a process of this very machine that has ended, or of this very one, which holds it
        no more. A server that loses its power brings back what was given up shortly before."""
        if self.process == Process.this().mark:
            return self.stem not in _HELD
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
        _HELD.add(mine.stem)
        try:
            with translated("take the lease"):
                self._take(mine)
            with self._renewed(mine):
                yield
        finally:
            _HELD.discard(mine.stem)

    @contextlib.contextmanager
    def _renewed(self, mine: _OwnLease) -> Iterator[None]:
        """A lease that was taken is renewed within, and then given up."""
        ended = threading.Event()
        renewing = threading.Thread(target=mine.renew, args=(ended,), daemon=True)
        renewing.start()
        self.sessions.guards.append(mine.assure)
        try:
            yield
        finally:
            self.sessions.guards.remove(mine.assure)
            ended.set()
            renewing.join()
            with contextlib.suppress(XenApiError, FarmhandError):  # it is over time soon
                for key in mine.keys:
                    self.remove(key)

    def _take(self, mine: _OwnLease) -> None:
        self.add(mine.key, mine.value)
        try:
            there = self.in_the_way(mine)
            for other in there:
                if not other.dead:
                    self._watch(other, mine)
                self.remove(other.key)
            for other in self.in_the_way(mine) if there else ():  # it lives, and was just renewed
                raise busy(min(other.names & mine.names), other.note)
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
            there = self.in_the_way(mine)
            if any(one.stem == other.stem and one.key != other.key for one in there):
                raise busy(name, other.note)
            if not any(one.key == other.key for one in there):
                return

    def in_the_way(self, mine: _OwnLease) -> list[_Other]:
        return _others(self.look(), mine)

    def look(self) -> Mapping[str, str]:
        config: Mapping[str, str] = self.sessions.call("pool.get_other_config", self._pool)
        return config

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
        self._numbers = itertools.count(1)
        self._guard = threading.Lock()
        self._renewed = _now()
        self._lost = ""
        self.stem = f"{_KEY}{secrets.token_hex(8)}"
        self.key = f"{self.stem}:0"  # the newest that the server surely has
        self.keys = [self.key]  # all that it may have

    @property
    def value(self) -> str:
        facts = {
            "names": sorted(self.names), "note": self._note, "until": time.time() + LASTS,
            "process": Process.this().mark,
        }  # fmt: skip
        return json.dumps(facts)

    def renew(self, ended: threading.Event) -> None:
        """Until then, or until it is lost. One that can't be renewed now is tried again."""
        while not ended.wait(RENEWED) and not self._lost:
            with self._guard, contextlib.suppress(XenApiError, FarmhandError):
                self._renew()

    def assure(self) -> None:
        """LeaseLost where somebody else may have it by now. DriverFailed and the like where that can't
        be told."""
        with self._guard, translated("renew the lease"):
            if not self._lost and _now() - self._renewed > SURE:
                self._renew()
            if self._lost:
                raise LeaseLost(
                    f"{self._leases.url}: {self._lost}: nothing more is changed",
                    remedy=(Call("recover"), " finishes or undoes what was cut off"),
                )

    def _renew(self) -> None:
        fresh, began = f"{self.stem}:{next(self._numbers)}", _now()
        self.keys.append(fresh)  # whether the server says so or not
        self._leases.add(fresh, self.value)
        silent = _now() - self._renewed
        if silent > SURE:  # else nobody can have removed the last one before this one was there
            there = self._leases.look()
            if self.key not in there:
                self._lost = self._broken(there, silent)
                return
        self.key, self._renewed = fresh, began
        for old in self.keys[:-1]:
            self._leases.remove(old)
        self.keys = [fresh]

    def _broken(self, there: Mapping[str, str], silent: float) -> str:
        held = "nobody has it now"
        for other in _others(there, self):
            held = one_line(f"{min(other.names & self.names)} is held by {other.note}", 500)
        return f"stopped for {silent:.0f} s, this process lost its lease: {held}"


def _now() -> float:
    """Seconds, by a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _others(config: Mapping[str, str], mine: _OwnLease) -> list[_Other]:
    return [
        other for key, value in config.items()
        if key.startswith(_KEY) and _stem(key) != mine.stem
        if (other := _read(key, value)) and other.names & mine.names
    ]  # fmt: skip


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
