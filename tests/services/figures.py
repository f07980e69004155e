"""The network services' figures, on real daemons in a network namespace of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from daemons import Daemons
from networks import own_network
from yard import SECRET, Yard

MANY = 10_000
LIVE = 1_000


Found = tuple[str, tuple[float, ...], float | None, str]
"""Name, seconds of each round, limit, and the figure that it is shown as a multiple of, or ""."""


def measure(rounds: int, say: Callable[[str], None]) -> Iterator[Found]:
    """Needs root, and the daemons of packages-dev.txt."""
    directory = Path(tempfile.mkdtemp(prefix="fhn-"))
    directory.chmod(0o755)
    os.environ["FARMHAND_STATE_DIR"] = str(directory / "state")
    try:
        with own_network():
            yard = Yard(directory)
            daemons = Daemons(yard)
            try:
                yield from _measure(yard, daemons, rounds, say)
            finally:
                daemons.stop()
    finally:
        del os.environ["FARMHAND_STATE_DIR"]
        shutil.rmtree(directory)


def _measure(yard: Yard, daemons: Daemons, rounds: int, say: Callable[[str], None]) -> Iterator[Found]:
    yard.network |= {"subnet": "10.77.0.0/16", "pool": []}
    subprocess.run(["ip", "addr", "add", "10.77.0.1/16", "dev", "br0"], check=True)
    every = dict(yard.services)
    yard.vms = {f"vm{n}": _vm(n) for n in range(MANY)}
    say(f"network: {MANY} VMs rendered for every service")
    name = f"network: {MANY} VMs loaded, rendered for {len(every)} services, diffed"
    (yard.directory / "whole").mkdir()
    whole = Yard(yard.directory / "whole")  # nobody serves its files
    whole.network, whole.vms = yard.network, yard.vms
    yield name, tuple(_whole(whole) for _ in range(rounds)), 2.0, ""

    key = yard.directory / "bind" / "farmhand.key"
    key.write_text(f'key "farmhand" {{ algorithm hmac-sha256; secret "{SECRET}"; }};\n')
    key.chmod(0o640)
    yard.services = {"bind": every["bind"] | {"dynamic": "yes", "key": str(key)}}
    say(f"network: {MANY} VMs into a dynamic zone")
    daemons.start("bind")
    yard.apply()
    more = [_one_more_name(yard, n) for n in range(rounds)]
    yield f"network: one VM more among {MANY}, until DNS answers", tuple(more), 0.2, ""
    say(f"network: {LIVE} VMs more into a dynamic zone")
    yield f"network: {LIVE} VMs more, live, forward and reverse", tuple(_live(yard, rounds)), 1.0, ""

    for service in ("dnsmasq", "kea"):
        yard.services = {service: every[service]}
        say(f"network: {MANY} VMs into {service}")
        yard.vms = {f"vm{n}": _vm(n) for n in range(MANY)}
        yard.apply()
        times = tuple(_one_more_lease(yard, n) for n in range(rounds))
        name = f"network: one VM more among {MANY}, until {service} answers"
        yield name, times, 0.2, ""
        if service == "kea":
            alone = "network: Kea alone, to read its two files again"
            yield alone, tuple(_kea(yard, rounds)), None, ""
            yield f"{name}, beside Kea alone", times, None, alone
        daemons.stop()


def _kea(yard: Yard, rounds: int) -> Iterator[float]:
    """What the daemons take by themselves, side by side, told on their sockets; nothing has changed."""
    from provision.network.services.kea import Kea, command

    farm = yard.farm()
    (kea,) = (one for one in farm.services.sections if isinstance(one, Kea))
    sockets = kea.sockets(farm)
    for _ in range(rounds):
        started = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda path: command(path, "config-reload"), sockets))
        yield time.perf_counter() - started


def _vm(number: int) -> dict[str, Any]:
    place = number + 10
    return {
        "memory": "1G",
        "mac": f"52:54:01:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",
        "address": f"10.77.{place >> 8}.{place & 255}",
        "nat_port": str(20000 + number),
        "proxy": [{"name": f"vm{number}.pub.example"}],
    }


def _whole(yard: Yard) -> float:
    """As a command does it, beside live files of which one VM's line differs."""
    from inventory.loader import load
    from provision.allocate import Allocator
    from provision.network.changes import Examiner, difference
    from provision.network.rollback import put
    from provision.network.state import NetworkState
    from tests.identities import KATA

    file = yard.directory / "farm.yaml"
    file.write_text(yard.text())
    times = []
    for turn in range(2):
        started = time.perf_counter()
        farm = load(file)
        allocator = Allocator(farm, yard.directory / "farm.lock", yard.directory / "claims.db")
        examiner = Examiner(farm, KATA, NetworkState(), today=datetime.now(UTC).date())
        changes = examiner.examine(allocator.peek_all(farm.vms), farm.services.used)
        diff = "".join(map(difference, changes.files))
        times.append(time.perf_counter() - started)
        assert diff or turn == 0
        if turn == 0:
            for change in changes.files:
                put(change)
            text = file.read_text()
            file.write_text(text.replace("address: 10.77.0.11\n", "address: 10.77.200.200\n"))
    return times[1]


def _one_more_name(yard: Yard, number: int) -> float:
    """From the call, with the farm loaded, until forward and reverse answers are right."""
    from test_apply import ask

    yard.vms[f"more{number}"] = {"address": f"10.77.100.{number + 1}"}
    with yard.site() as site:
        keep = _kept(site, [f"more{number}"])
        started = time.perf_counter()
        keep()
        assert ask(f"more{number}.try.example", "A") == [f"10.77.100.{number + 1}"]
        assert ask(f"{number + 1}.100.77.10.in-addr.arpa", "PTR") == [f"more{number}.try.example."]
        return time.perf_counter() - started


def _kept(site: Any, new: list[str]) -> Callable[[], None]:
    from provision.engine.runner import begin
    from provision.network.apply import keep_in_step

    def keep() -> None:
        with begin(site, "clone-farm", new) as run:
            keep_in_step(run, [], [], new=new)

    return keep


def _live(yard: Yard, rounds: int) -> Iterator[float]:
    """Records alone, forward and reverse, beside what the zone has."""
    from provision.network.records import RecordChange
    from provision.network.services.bind import Bind

    farm = yard.farm()
    (bind,) = (one for one in farm.services.sections if isinstance(one, Bind))
    server = bind.record_server(farm)
    forward, back = "try.example", "77.10.in-addr.arpa"
    for turn in range(rounds):
        ops = []
        for n in range(LIVE):
            third, fourth = 110 + turn * 4 + n // 250, n % 250
            name = f"live{turn}-{n}.try.example"
            ops.append(RecordChange(forward, name, (), (("A", f"10.77.{third}.{fourth}"),)))
            pointer = f"{fourth}.{third}.{back}"
            ops.append(RecordChange(back, pointer, (), (("PTR", f"{name}."),)))
        ops.sort(key=lambda op: op.zone == back)
        started = time.perf_counter()
        server.update(ops, lambda _text: None)
        yield time.perf_counter() - started


def _one_more_lease(yard: Yard, number: int) -> float:
    """From the call, with the farm loaded, until a client in its namespace has the address. The
    client's own start is in it."""
    from provision.network.dhcp_probe import probe

    mac, address = f"52:54:00:00:01:{number:02x}", f"10.77.100.{number + 1}"
    yard.vms[f"more{number}"] = {"address": address, "mac": mac}
    with yard.site() as site:
        keep = _kept(site, [f"more{number}"])
        started = time.perf_counter()
        keep()
        told = time.perf_counter() - started
        asked = time.perf_counter()
        while (seen := probe(site.runner, "br0", [mac], seconds=0.2)[mac]) != address:
            assert time.perf_counter() - asked < 10, seen
        return told
