"""Asks a bridge's DHCP servers as a new machine would, from a network namespace that is thrown away."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from host.processes import is_there
from host.run import Runner
from inventory.errors import CommandFailed

_PREFIX = "fhv"


def probe(
    runner: Runner,
    bridge: str,
    macs: Sequence[str],
    *,
    give_back: Collection[str] = (),
    seconds: float = 2.0,
) -> Mapping[str, str]:
    """What each MAC is given: an address, or why there is none. CommandFailed without the rights to make
    a namespace. Leases are the machines' own, as if they had asked; those of ``give_back``, of machines
    that aren't there, are ended at once."""
    sweep(runner)
    name = f"{_PREFIX}{os.getpid()}"
    with contextlib.ExitStack() as stack:
        runner.change("ip", "netns", "add", name)
        stack.callback(runner.change, "ip", "netns", "del", name, ok=(0, 1))
        runner.change("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        # It would go with the namespace, but when the kernel gets to it: the next probe wants the name.
        stack.callback(runner.change, "ip", "link", "del", name, ok=(0, 1))
        runner.change("ip", "link", "set", name, "master", bridge, "up")
        runner.change("ip", "-n", name, "link", "set", "eth0", "up")
        order = json.dumps({
            "interface": "eth0", "macs": list(macs), "seconds": seconds, "give_back": list(give_back),
        })  # fmt: skip
        helper = Path(__file__).with_name("_dhcp_probe.py")
        result = runner.change(
            "ip", "netns", "exec", name, sys.executable, "-I", "-S", helper, order,
            timeout=30 + len(macs) * 6 * seconds,
        )  # fmt: skip
        found: dict[str, str] = json.loads(result.stdout)
        return found


def sweep(runner: Runner) -> None:
    """Namespaces of probes that were killed."""
    with contextlib.suppress(CommandFailed):
        for line in runner.read("ip", "netns", "list").stdout.splitlines():
            name = (line.split() or [""])[0]
            pid = name.removeprefix(_PREFIX)
            if name.startswith(_PREFIX) and pid.isdigit() and not is_there(int(pid)):
                runner.change("ip", "netns", "del", name, ok=(0, 1))
