"""busybox udhcpc as a new machine with a given MAC, in a network namespace on the bridge."""

from __future__ import annotations

import re
import subprocess
from ipaddress import IPv4Address


def lease(mac: str, *, tries: int = 4) -> IPv4Address | None:
    """The address it is given; None: nobody answers."""
    name = f"fhc{mac.replace(':', '')[-6:]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for line in (
            f"link add {name} type veth peer name eth0 address {mac} netns {name}",
            f"link set {name} master br0 up",
            f"-n {name} link set eth0 up",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        argv = ["ip", "netns", "exec", name, "udhcpc", "-i", "eth0", "-f", "-n", "-q", "-t", str(tries)]
        argv += ["-T", "1", "-s", "/bin/true"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        match = re.search(r"lease of ([0-9.]+) obtained", done.stdout + done.stderr)
        return IPv4Address(match[1]) if match else None
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
