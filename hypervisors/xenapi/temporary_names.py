"""Names for what is being made, that tell whether anybody still makes it.

A XenAPI server knows no locks of ours. So what isn't finished carries in its name for whom it is, and
which process makes it: what a living one makes is left to it, what a dead one left is swept up."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import threading
import time
from collections.abc import Iterator

from host.processes import started
from hypervisors.api import Owner
from hypervisors.ownership import FarmIdentity
from hypervisors.xenapi.records import NEW

_ELSEWHERE = 6 * 3600.0
"""Seconds after which what another machine began counts as dead: longer than any call or task lasts."""
_NAME = re.compile(
    re.escape(NEW) + r"(?P<farm>[A-Za-z0-9][\w.:-]*)/(?P<vm>([A-Za-z0-9][\w.-]*)?) (?P<host>[\w.-]+):"
    r"(?P<pid>\d{1,18}):(?P<start>\d{1,18}):(?P<time>\d{1,18}):(?P<number>\d{1,18})",
    re.ASCII,
)
_numbers = itertools.count(1)
_active: set[str] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def temporary_name(owner: Owner) -> Iterator[str]:
    """A new name for something under construction, which counts as alive within the ``with``."""
    pid = os.getpid()
    farm = FarmIdentity(owner.farm.name, owner.farm.id)  # not its file: names are short
    maker = f"{_here()}:{pid}:{started(pid)}:{int(time.time())}:{next(_numbers)}"
    name = f"{NEW}{farm.mark}/{owner.vm} {maker}"
    with _guard:
        _active.add(name)
    try:
        yield name
    finally:
        with _guard:
            _active.discard(name)


def made_for(name: str) -> Owner | None:
    """Whose it was to be, by its name; None if the name isn't one of ours."""
    match = _NAME.fullmatch(name)
    return Owner(FarmIdentity.of(match["farm"]), match["vm"]) if match else None


def is_dead(name: str) -> bool:
    """Whether nobody is making it any more, by its name. False if the name isn't one of ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    if match["host"] != _here():
        return time.time() - int(match["time"]) > _ELSEWHERE
    if int(match["pid"]) == os.getpid() and match["start"] == started(os.getpid()):
        with _guard:
            return name not in _active
    return match["start"] != started(int(match["pid"]))


def _here() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", platform.node()) or "nowhere"
