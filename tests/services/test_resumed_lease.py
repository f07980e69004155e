"""A guest that runs on from its memory asks anew for the address that it was leased: real clients, a
real server, and what farmhand runs in the guest."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from daemons import Daemons
from dhcp_client import machine
from networks import wait_for, within
from yard import Yard

from provision.guest.resume import program

MAC = "52:54:86:b3:3f:10"
SCRIPT = """#!/bin/sh
case ${1:-} in bound) address=$ip ;; esac
case ${reason:-} in BOUND | REBOOT) address=$new_ip_address ;; esac
[ -z "${address:-}" ] || PATH=/sbin:/usr/sbin:/bin:/usr/bin ip addr replace "$address/24" dev eth0
exit 0
"""
CLIENTS = {
    "udhcpc": "udhcpc -i eth0 -b -S -p /run/udhcpc.eth0.pid -s {here}/script",
    "dhclient": "dhclient -4 -pf /run/dhclient.eth0.pid -lf {here}/leases -sf {here}/script eth0",
}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_lease_is_renewed(yard: Yard, daemons: Daemons, tmp_path: Path, client: str) -> None:
    yard.use("dnsmasq")
    yard.apply()
    (tmp_path / "script").write_text(SCRIPT)
    (tmp_path / "script").chmod(0o755)

    def expires() -> int:
        """Seconds since 1970; 0 while there is none."""
        for line in (yard.directory / "dnsmasq" / "leases").read_text().splitlines():
            if f" {MAC} 10.77.0.6 " in line:
                return int(line.split()[0])
        return 0

    with machine(MAC) as name:
        inside = 'mount -t tmpfs none /run && echo ready && while read -r l; do eval "$l"; done'
        shell = subprocess.Popen(
            [*within(name), "unshare", "--mount", "sh", "-c", inside],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert shell.stdin and shell.stdout
        try:
            assert shell.stdout.readline() == "ready\n"
            (tmp_path / "program").write_text(program(lived=0, leased=True))
            start = CLIENTS[client].format(here=tmp_path)
            shell.stdin.write(f"{start} >/dev/null 2>&1; echo started\n")
            shell.stdin.flush()
            assert shell.stdout.readline() == "started\n"
            wait_for(expires)
            first = expires()
            shell.stdin.write(f"sleep 1.1; sh {tmp_path}/program </dev/null\n")
            shell.stdin.flush()
            assert shell.stdout.readline().split()[3] == client
            wait_for(lambda: expires() > first)
        finally:
            shell.stdin.close()
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], check=True, capture_output=True, text=True
            ).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            shell.wait()
            shell.stdout.close()
