"""A new machine with a given MAC, in a network namespace on the bridge: busybox udhcpc, ISC dhclient."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from networks import ip, place, unique, wait_for, within


@contextlib.contextmanager
def machine(mac: str) -> Iterator[str]:
    """Its namespace, with eth0 on the bridge of this one, which may take seconds to listen to a new port
    (STP, on libvirt's)."""
    link = unique("c")
    with place(bridge=False) as name:
        # Its link-local address is good at once.
        quick = "for f in all default; do echo 0 >/proc/sys/net/ipv6/conf/$f/accept_dad; done"
        subprocess.run([*within(name), "sh", "-eu", "-c", quick], check=True)
        ip(f"link add {link} type veth peer name eth0 address {mac} netns {name}")
        ip(f"link set {link} master br0 up")
        ip(f"-n {name} link set lo up")
        ip(f"-n {name} link set eth0 up")
        try:
            wait_for(lambda: "state forwarding" in _shown("bridge", "link", "show", "dev", link))
            yield name
        finally:
            ip(f"link del {link}")


def _shown(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def client(mac: str, *, tries: int = 4) -> Iterator[Callable[[], IPv4Address | None]]:
    """One machine; each call is a whole exchange. None: nobody answers, in tries of a second each."""
    with machine(mac) as name:
        argv = [*within(name), "udhcpc", "-i", "eth0", "-f", "-n", "-q", "-t", str(tries)]
        argv += ["-T", "1", "-s", "/bin/true"]

        def exchange() -> IPv4Address | None:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            match = re.search(r"lease of ([0-9.]+) obtained", done.stdout + done.stderr)
            return IPv4Address(match[1]) if match else None

        yield exchange


@contextlib.contextmanager
def client6(mac: str) -> Iterator[Callable[[], IPv6Address | None]]:
    """As ``client``, over IPv6, by ISC dhclient (busybox has no client for it everywhere)."""
    with machine(mac) as name, tempfile.TemporaryDirectory() as directory:
        leases = Path(directory) / "leases"
        argv = [*within(name), "dhclient", "-6", "-1", "-v", "-D", "LL", "-sf", "/bin/true"]
        argv += ["-lf", str(leases), "-pf", f"{directory}/pid", "eth0"]
        address = f"-n {name} -6 addr show dev eth0 scope link -tentative".split()
        wait_for(lambda: _shown("ip", *address))

        def exchange() -> IPv6Address | None:
            leases.unlink(missing_ok=True)
            subprocess.run(argv, capture_output=True, timeout=60, check=False)
            _end_all(name)
            match = re.search(r"iaaddr (\S+)", leases.read_text() if leases.exists() else "")
            return IPv6Address(match[1]) if match else None

        yield exchange


def _end_all(name: str) -> None:
    """dhclient goes into the background before it has written its pid."""
    for pid in _shown("ip", "netns", "pids", name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def lease(mac: str, *, tries: int = 4) -> IPv4Address | None:
    """The address that a machine is given; None: nobody answers."""
    with client(mac, tries=tries) as exchange:
        return exchange()


def lease6(mac: str) -> IPv6Address | None:
    """As ``lease``, over IPv6."""
    with client6(mac) as exchange:
        return exchange()


@contextlib.contextmanager
def asking(mac: str) -> Iterator[None]:
    """A machine that asks, again and again, until it is given an address."""
    with machine(mac) as name:
        argv = [*within(name), "udhcpc", "-i", "eth0", "-f", "-t", "1000", "-T", "1", "-A", "1"]
        asks = subprocess.Popen([*argv, "-s", "/bin/true"], stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            asks.kill()
            asks.wait()
