"""Real daemons for a yard, in a network namespace of the test's own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from yard import SECRET, Yard

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, in a network namespace of its own: br0 with the gateway and
    a port, for IPv6 waits for a carrier."""
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if _libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare: these tests need root")
        for scope in ("all", "default"):  # its addresses are good at once
            Path(f"/proc/sys/net/ipv6/conf/{scope}/accept_dad").write_text("0")
        for words in (
            "link set lo up",
            "link add br0 type bridge",
            "addr add 10.77.0.1/24 dev br0",
            "addr add fd77::1/64 dev br0 nodad",
            "link add port0 type veth peer name port1",
            "link set port1 up",
            "link set port0 master br0 up",
            "link set br0 up",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        yield
    finally:
        if _libc.setns(outside, CLONE_NEWNET):
            os._exit(70)  # else every later test would run in a lost network
        os.close(outside)


def wait_for(what: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it didn't happen"
        time.sleep(0.02)


class Daemons:
    """``start(NAME)`` each; ``stop()`` ends all. Also sets the yard's commands for them."""

    def __init__(self, yard: Yard) -> None:
        self.yard = yard
        self.directory = d = yard.directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pidfiles: list[Path] = []
        yard.network["bridge"] = "br0"
        (d / "bind" / "rndc.conf").write_text(
            f'key "rndc" {{ algorithm hmac-sha256; secret "{SECRET}"; }};\n'
            'options { default-key "rndc"; default-server 127.0.0.1; default-port 9953; };\n'
        )
        s = yard.services
        s["bind"]["rndc"] = ["rndc", "-c", f"{d}/bind/rndc.conf"]
        s["nginx"] |= {
            "reload": ["nginx", "-c", f"{d}/nginx/nginx.conf", "-s", "reload"],
            "alive": self._alive("nginx/pid"),
        }
        s["haproxy"] |= {
            "reload": self._signal("haproxy/pid", "USR2"),
            "alive": self._alive("haproxy/pid"),
        }
        s["dnsmasq"] |= {
            "main": f"{d}/dnsmasq/main.conf",
            "interface": "br0",
            "address": "10.77.0.1",
            "reload": self._signal("dnsmasq/pid", "HUP"),
            "alive": self._alive("dnsmasq/pid"),
            "restart": self._script("dnsmasq", f"dnsmasq -C {d}/dnsmasq/main.conf"),
        }
        s["dhcpd"] |= {
            "alive": self._alive("dhcp/pid"),
            "reload": self._script(
                "dhcp", f"dhcpd -4 -q -cf {d}/dhcp/dhcpd.conf -lf {d}/dhcp/leases -pf {d}/dhcp/pid br0"
            ),
        }
        s["kea"] |= {"interfaces": ["br0"]}
        for kind in ("4", "6"):
            s["kea"]["reload" if kind == "4" else "reload6"] = self._script(
                "kea",
                f"KEA_PIDFILE_DIR={d}/kea KEA_LOCKFILE_DIR=none "
                f"setsid kea-dhcp{kind} -c {d}/kea/kea{kind}.conf >>{d}/logs/kea 2>&1 </dev/null &",
                pidfile=f"kea/kea{kind}.kea-dhcp{kind}.pid",
            )
        (d / "dnsmasq" / "main.conf").write_text(
            f"conf-file={d}/dnsmasq/dnsmasq.conf\npid-file={d}/dnsmasq/pid\nuser=root\nno-resolv\n"
            f"dhcp-leasefile={d}/dnsmasq/leases\nno-hosts\nlog-facility={d}/logs/dnsmasq\n"
        )
        for name in ("bind/farm.conf", "nginx/farm", "dhcp/leases"):
            (d / name).touch()

    def _alive(self, pidfile: str) -> list[str]:
        self._pidfiles.append(self.directory / pidfile)
        return ["start-stop-daemon", "--status", "--pidfile", str(self.directory / pidfile)]

    def _signal(self, pidfile: str, name: str) -> list[str]:
        file = str(self.directory / pidfile)
        return ["start-stop-daemon", "--stop", "--signal", name, "--pidfile", file]

    def _script(self, name: str, command: str, pidfile: str = "") -> list[str]:
        """A restart, as systemctl would do it."""
        pid = self.directory / (pidfile or f"{name}/pid")
        self._pidfiles.append(pid)
        path = self.directory / f"restart-{pid.name}-{name}"
        path.write_text(
            "#!/bin/sh\n"
            f"[ -s {pid} ] && p=$(cat {pid}) && kill $p 2>/dev/null &&"
            ' while kill -0 $p 2>/dev/null && ! grep -q "^State:.Z" /proc/$p/status 2>/dev/null;'
            f" do sleep 0.02; done\nrm -f {pid}\n{command}\n"
        )
        path.chmod(0o755)
        return [str(path)]

    def start(self, *names: str) -> None:
        for name in names:
            getattr(self, f"_{name}")()

    def _bind(self) -> None:
        argv = ["named", "-f", "-n", "1", "-c", f"{self.directory}/bind/named.conf"]
        self._run(argv, "named")
        status = [*self.yard.services["bind"]["rndc"], "status"]
        wait_for(lambda: subprocess.run(status, capture_output=True, check=False).returncode == 0)

    def _nginx(self) -> None:
        subprocess.run(["nginx", "-c", f"{self.directory}/nginx/nginx.conf"], check=True)
        wait_for((self.directory / "nginx" / "pid").exists)

    def _haproxy(self) -> None:
        config = self.directory / "haproxy" / "haproxy.cfg"
        if not config.exists():
            self.yard.write("haproxy")
        argv = ["haproxy", "-W", "-p", f"{self.directory}/haproxy/pid", "-f", str(config)]
        self._run(argv, "haproxy")
        wait_for((self.directory / "haproxy" / "pid").exists)

    def _run(self, argv: list[str], name: str) -> None:
        log = (self.directory / "logs" / name).open("ab")
        self._processes.append(
            subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        )
        log.close()

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for pidfile in self._pidfiles:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(pidfile.read_text()), signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
