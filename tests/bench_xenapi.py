"""How many calls XenAPI's driver makes a VM, and what two clones at once take beside one after the
other, on the test server: no lab is needed."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from tests.figures import Figure

MANY = 50
ROUNDS = 5


def measure() -> Iterator[Figure]:
    """Of one VM, under the limits that docs/xenapi.md gives; then of each of many, beside that."""
    sys.path.insert(0, str(Path(__file__).parent / "contract"))
    rigs = import_module("xenapi_rig")
    with (
        tempfile.TemporaryDirectory(prefix="fhb") as place,
        rigs.xenapi_server() as server,
        rigs.opened(rigs.XenApiMachines, Path(place), server) as rig,
    ):
        one, each = rig.calls_a_vm(1), rig.calls_a_vm(MANY)
        warm = rig.calls_warm()
        ways = ((False, True), (True, True), (True, False))
        rounds = [
            [rig.two_clones(at_once=at_once, turns=turns) for at_once, turns in ways]
            for _ in range(ROUNDS)
        ]
    apart, at_once, bare = zip(*rounds, strict=True)
    for what, most in rigs.MOST_CALLS.items():
        first = f"XenAPI calls, simulated server: {what}"
        yield Figure(first, (one[what],), most, unit="calls")
        yield Figure(f"{first}, each of {MANY}", (each[what],), 1.0, first, "calls")
    first = "XenAPI, simulated server: two clones, one after the other"
    yield Figure(first, apart)
    yield Figure("XenAPI, simulated server: two clones at once", at_once, 1.0, first)
    yield Figure("XenAPI, simulated server: two clones at once, without our turns", bare, None, first)
    for what, most in rigs.MOST_CALLS_WARM.items():
        first = f"XenAPI calls, simulated server: {what}"
        yield Figure(first, (warm[what],), most, unit="calls")
