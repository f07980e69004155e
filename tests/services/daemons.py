"""Real daemons for a yard, in a network namespace of the test's own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from networks import ip, place, wait_for, within
from yard import SECRET, Yard

# Its drivers are those that it finds: without QEMU's it wants nothing of the machine but a network.
# Ended by a signal it leaves its networks up: their dnsmasq is ended with it.
_LIBVIRTD = """
d=$1
drivers=$(dirname "$(find /usr/lib -name libvirt_driver_network.so)")
cp "$drivers/libvirt_driver_network.so" "$d/"
mount -t tmpfs farmhand "$drivers"
mv "$d/libvirt_driver_network.so" "$drivers/"
mount -t sysfs farmhand /sys
for place in etc/libvirt var/lib/libvirt run/libvirt var/log/libvirt var/cache/libvirt; do
    mkdir -p "$d/over/$place" "/$place"
    mount --bind "$d/over/$place" "/$place"
done
libvirtd -f "$d/conf" -p "$d/pid" &
trap 'kill $!; wait; cat /run/libvirt/network/*.pid | xargs -r kill' TERM
wait
"""


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

    def apart(self, stack: contextlib.ExitStack, *services: str) -> dict[str, str]:
        """Each of these in a place of its own, for there is one DHCP server's port, and one firewall, in
        each network: the places by the services' names. dhcpd and Kea begin with the first apply;
        shorewall and libvirt's daemon run."""
        return {service: getattr(self, f"_{service}_apart")(stack) for service in services}

    def _dhcpd_apart(self, stack: contextlib.ExitStack) -> str:
        where = stack.enter_context(place())
        service = self.yard.services["dhcpd"]
        service["reload"] = [*within(where), *service["reload"]]
        return where

    def _kea_apart(self, stack: contextlib.ExitStack) -> str:
        where = stack.enter_context(place())
        service = self.yard.services["kea"]
        for key in ("reload", "reload6"):
            service[key] = [*within(where), *service[key]]
        return where

    def _shorewall_apart(self, stack: contextlib.ExitStack) -> str:
        """A router with eth0 (192.0.2.7) to a client outside (192.0.2.1): the client's place."""
        router = stack.enter_context(place())
        outside = stack.enter_context(place(bridge=False))
        for line in (
            f"-n {router} link add eth0 type veth peer name eth0 netns {outside}",
            f"-n {router} addr add 192.0.2.7/24 dev eth0",
            f"-n {outside} addr add 192.0.2.1/24 dev eth0",
            f"-n {router} link set eth0 up",
            f"-n {outside} link set eth0 up",
        ):
            ip(line)
        forwarding = "echo 1 >/proc/sys/net/ipv4/ip_forward"
        subprocess.run([*within(router), "sh", "-c", forwarding], check=True)
        d = self.directory
        (d / "shorewall-var").mkdir()
        script = d / "shorewall-there"
        script.write_text(
            "#!/bin/sh\nexec unshare --mount --propagation private sh -euc '"
            f"mount --bind {d}/shorewall-var /var/lib/shorewall\n"
            'exec shorewall "$@"\' sh "$@"\n'
        )
        script.chmod(0o755)
        there = [*within(router), str(script)]
        self.yard.services["shorewall"] |= {
            "address": "192.0.2.7",
            "reload": [*there, "reload", f"{d}/shorewall"],
            "alive": [*there, "status"],
        }
        start = [*there, "start", f"{d}/shorewall"]
        done = subprocess.run(start, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        self.router = router
        return outside

    def _libvirt_apart(self, stack: contextlib.ExitStack) -> str:
        """libvirtd with nothing but its network driver, over private directories; it makes br0 itself,
        and a dnsmasq of its own."""
        where = stack.enter_context(place(bridge=False))
        d = self.directory / "libvirt"
        d.mkdir()
        (d / "conf").write_text(
            f'unix_sock_dir = "{d}"\nauth_unix_rw = "none"\nlog_outputs = "3:file:{d}/log"\n'
        )
        argv = [*within(where), "unshare", "--mount", "--propagation", "private"]
        self._run([*argv, "sh", "-eu", "-c", _LIBVIRTD, "sh", str(d)], "libvirtd")
        uri = f"network+unix:///system?socket={d}/libvirt-sock"
        self.yard.services["libvirt"] = {
            "config": f"{d}/network.xml", "bridge": "br0", "uri": uri,
        }  # fmt: skip
        asked = ["virsh", "--connect", uri, "uri"]
        wait_for(lambda: subprocess.run(asked, capture_output=True, check=False).returncode == 0)
        return where

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
        """All have ended when this returns: nobody writes in the yard any more."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        wait_for(self._all_ended)
        self._processes.clear()
        for pidfile in self._pidfiles:
            pidfile.unlink(missing_ok=True)  # of nobody, or by then somebody else's

    def _all_ended(self) -> bool:
        """Those that went into the background; they are told each time, for one that has only just
        written its pid may not have heard."""
        ended = True
        for pidfile in self._pidfiles:
            with contextlib.suppress(OSError, ValueError):
                pid = int(pidfile.read_text())
                if not _ended(pid):
                    os.kill(pid, signal.SIGTERM)
                    ended = False
        return ended


def _ended(pid: int) -> bool:
    """Or only waits for its parent to notice."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
