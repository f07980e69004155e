"""busybox udhcpc as a new machine with a given MAC, in a network namespace on the bridge."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path


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


def lease6(mac: str) -> IPv6Address | None:
    """As ``lease``, over IPv6, by ISC dhclient (busybox has no client for it everywhere)."""
    name = f"fhc{mac.replace(':', '')[-6:]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with tempfile.TemporaryDirectory() as directory:
            for line in (
                f"link add {name} type veth peer name eth0 address {mac} netns {name}",
                f"link set {name} master br0 up",
                f"-n {name} link set lo up",
                f"-n {name} link set eth0 up",
            ):
                subprocess.run(["ip", *line.split()], check=True)
            time.sleep(2.5)  # its link-local address is tentative for so long
            leases = Path(directory) / "leases"
            argv = ["ip", "netns", "exec", name, "dhclient", "-6", "-1", "-v", "-D", "LL"]
            argv += ["-sf", "/bin/true", "-lf", str(leases), "-pf", f"{directory}/pid", "eth0"]
            subprocess.run(argv, capture_output=True, timeout=60, check=False)
            # it goes into the background before it has written its pid
            found = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=True
            )
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            match = re.search(r"iaaddr (\S+)", leases.read_text() if leases.exists() else "")
            return IPv6Address(match[1]) if match else None
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
