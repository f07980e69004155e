"""A right file isn't enough: what daemons have is looked at, and put right; what is in the way is told
before anything is touched, all at once."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import SplitResult

import pytest
from daemons import Daemons
from dhcp_client import lease
from http_machine import answer_of
from networks import ip, own_network, wait_for
from test_apply import ask
from test_few import step
from test_live_dns import dynamic  # noqa: F401 - a fixture
from test_unbound import unbound  # noqa: F401 - a fixture
from test_verify import verify
from yard import Yard

from inventory.errors import Conflict, FarmhandError, WrongState, spelled
from provision import doctor
from provision.engine.report import QuietReporter
from provision.network import questions
from provision.network import verify as network_verify
from provision.network.readiness import NotReady
from provision.network.service import services
from provision.network.services import kea
from tests import farm

MAC = "52:54:86:b3:3f:10"


def end(pidfile: Path) -> None:
    """The daemon, as an admin stops it."""
    pid = int(pidfile.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not alive(pid))
    pidfile.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def put_right(yard: Yard, seen: str) -> None:
    """network-verify sees that a daemon hasn't what the files say, a plan says what an apply then does,
    no file is written for it, and then there is nothing left to do."""
    assert not_live(yard) == [seen]
    before = yard.snapshot()
    planned = yard.plan()
    done = yard.apply()
    assert planned.actions == done.actions
    assert [action.verb for action in done.actions] == ["tell"]
    assert seen in done.actions[0].text
    after = yard.snapshot()
    assert {path: after[path] for path in before if not volatile(path)} == {
        path: seen for path, seen in before.items() if not volatile(path)
    }
    assert not_live(yard) == []
    assert not yard.apply().changed


def not_live(yard: Yard) -> list[str]:
    """As network-verify has it, without its questions about VMs: those take seconds if none answers."""
    with yard.site() as site:
        return [answer.seen for answer in network_verify._not_live(site, services(site.farm))]


def volatile(path: str) -> bool:
    """Files that daemons write."""
    parts = (
        "pid",
        "lease",
        ".sock",
        "/kea/logger",
        ".csv",
        "managed-keys",
        "libvirt/over",
        "shorewall-",
    )
    return any(part in path for part in parts)


def test_a_lost_table(yard: Yard) -> None:
    yard.use("nftables")
    with own_network():
        yard.apply()
        table = ["ip", "farmhand_try_it"]
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        put_right(yard, "the kernel has no table ip farmhand_try_it")
        subprocess.run(["nft", "flush", "chain", *table, "prerouting"], check=True)
        put_right(yard, "table ip farmhand_try_it of the kernel lacks prerouting")
        gone = "{ 22007 : 10.77.0.7 . 22 }"
        subprocess.run(["nft", "delete", "element", *table, "ssh", gone], check=True)
        put_right(yard, "table ip farmhand_try_it of the kernel lacks 22007 : 10.77.0.7 . 22")


def test_a_stopped_dhcpd(yard: Yard, daemons: Daemons) -> None:
    yard.use("dhcpd")
    yard.apply()
    end(yard.directory / "dhcp" / "pid")
    put_right(yard, "dhcpd doesn't run")
    assert str(lease(MAC)) == "10.77.0.6"


def test_a_dhcpd_that_has_not_read_its_file(yard: Yard, daemons: Daemons) -> None:
    yard.use("dhcpd")
    yard.apply()
    config = Path(yard.services["dhcpd"]["config"])
    written_later(config)
    put_right(yard, f"dhcpd runs since before {config} was written")


def written_later(path: Path) -> None:
    """The same text, as by an admin's restored backup, when the daemon has run for a while."""
    time.sleep(0.7)  # what it is told from is no finer than half a second
    path.write_text(path.read_text())


def test_a_stopped_dnsmasq(yard: Yard, daemons: Daemons) -> None:
    yard.use("dnsmasq")
    yard.apply()
    pidfile = yard.directory / "dnsmasq" / "pid"
    end(pidfile)
    put_right(yard, "dnsmasq doesn't run")
    assert str(lease(MAC)) == "10.77.0.6"
    end(pidfile)
    yard.vms["more"] = {"address": "10.77.0.9"}
    step(yard, new=["more"])  # one that is stopped reads no new hosts by itself
    assert ask("more.try.example", "A", 5301, "10.77.0.1") == ["10.77.0.9"]


def test_kea_that_is_stopped_or_has_another_configuration(yard: Yard, daemons: Daemons) -> None:
    yard.use("kea")
    yard.apply()
    socket4, config = yard.services["kea"]["socket4"], yard.services["kea"]["config4"]
    end(yard.directory / "kea" / "kea4.kea-dhcp4.pid")
    put_right(yard, f"kea-dhcp4 doesn't run: nobody answers on {socket4}")
    assert str(lease(MAC)) == "10.77.0.6"
    told = kea.command(socket4, "config-get")
    assert isinstance(told, dict)
    told.pop("hash", None)
    told["Dhcp4"]["subnet4"][0]["reservations"] = []
    kea.command(socket4, "config-set", told)
    put_right(yard, f"kea-dhcp4 has other hosts than {config}")


def test_zones_that_are_not_loaded(yard: Yard, daemons: Daemons) -> None:
    yard.use("bind")
    daemons.start("bind")
    yard.apply()
    zone, config = yard.directory / "bind" / "db.try.example", yard.directory / "bind" / "farm.conf"
    old = zone.read_text()
    yard.vms["more"] = {"address": "10.77.0.9"}
    yard.apply()
    new, statements = zone.read_text(), config.read_text()

    zone.write_text(old)
    restart_bind(yard, daemons)
    zone.write_text(new)
    put_right(yard, f"BIND serves try.example with another serial number than {zone} has")
    assert ask("more.try.example", "A") == ["10.77.0.9"]

    config.write_text("")
    restart_bind(yard, daemons)
    config.write_text(statements)
    assert {*not_live(yard)} == {f"BIND does not serve {name}" for name in ("try.example", *REVERSE)}
    assert {action.verb for action in yard.apply().actions} == {"tell"}
    assert ask("more.try.example", "A") == ["10.77.0.9"]
    assert not_live(yard) == []
    assert not yard.apply().changed

    config.write_text("")
    restart_bind(yard, daemons)
    config.write_text(statements)
    yard.vms["more"]["address"] = "10.77.0.10"
    yard.apply()  # of one that isn't loaded the file changes
    assert ask("more.try.example", "A") == ["10.77.0.10"]


REVERSE = ("0.77.10.in-addr.arpa", "0.0.0.0.0.0.0.0.0.0.0.0.7.7.d.f.ip6.arpa")


def test_a_dynamic_zone_that_is_not_loaded(dynamic: Yard, daemons: Daemons) -> None:  # noqa: F811
    """Its file, and its serial number, are the server's own."""
    yard = dynamic
    yard.apply()
    yard.vms["more"] = {"address": "10.77.0.9"}
    yard.apply()
    config = yard.directory / "bind" / "farm.conf"
    statements = config.read_text()
    config.write_text("")
    restart_bind(yard, daemons)
    config.write_text(statements)
    assert "BIND does not serve try.example" in not_live(yard)
    yard.apply()
    assert ask("more.try.example", "A") == ["10.77.0.9"]
    assert not_live(yard) == []
    assert not yard.apply().changed


def restart_bind(yard: Yard, daemons: Daemons) -> None:
    end(yard.directory / "bind" / "pid")
    daemons.start("bind")


@pytest.mark.parametrize("service", ["nginx", "haproxy"])
def test_a_proxy_that_has_not_read_its_file(yard: Yard, daemons: Daemons, service: str) -> None:
    yard.use(service)
    daemons.start(service)
    yard.apply()
    config = Path(yard.services[service]["config"])
    written_later(config)
    put_right(yard, f"{service} hasn't read {config} since it was written")


def test_a_stopped_shorewall(yard: Yard, daemons: Daemons) -> None:
    with contextlib.ExitStack() as stack:
        daemons.apart(stack, "shorewall")
        yard.use("shorewall")
        yard.apply()
        subprocess.run(
            [*yard.services["shorewall"]["alive"][:-1], "clear"], check=True, stdout=subprocess.DEVNULL
        )
        put_right(yard, "shorewall's rules aren't loaded")


def test_unbound_that_lost_data(unbound: Yard) -> None:  # noqa: F811
    yard = unbound
    yard.apply()
    control = yard.services["unbound"]["control"]
    subprocess.run([*control, "local_data_remove", "prod.try.example"], check=True)
    put_right(yard, "unbound lacks data of prod.try.example.")


# ---- Told before


@contextlib.contextmanager
def listening(port: int) -> Iterator[None]:
    with socket.create_server(("0.0.0.0", port)):
        yield


def refused(yard: Yard, kind: type[FarmhandError]) -> FarmhandError:
    """The same by a plan, an apply and doctor; nothing is touched."""
    before = yard.snapshot()
    errors = []
    for do in (yard.plan, yard.apply):
        with pytest.raises(kind) as caught:
            do()
        errors.append(caught.value)
    assert errors[0].as_dict() == errors[1].as_dict()
    assert yard.snapshot() == before
    [error, _] = errors
    every = error.errors if isinstance(error, NotReady) else (error,)
    assert [check[0] for check in checks(yard)] == [one.message for one in every]
    return error


def checks(yard: Yard) -> list[tuple[str, str]]:
    """What is broken with the services, and what to do, as doctor has it."""
    with yard.site(plan=True) as site:
        found = list(doctor._served(site))
    assert {check.name for check in found} <= {"network services"}
    return [(check.text, spelled(check.remedy)) for check in found if check.level == "needed"]


def test_all_that_is_in_the_way_is_told_at_once(yard: Yard, daemons: Daemons) -> None:
    """An empty host: nothing included, daemons stopped, others' files and ports."""
    yard.use("bind", "dhcpd", "ssh_config", "nginx", "haproxy")
    d = yard.directory
    main = d / "bind" / "named.conf"
    main.write_text(main.read_text().split("include")[0])
    nginx = d / "nginx" / "nginx.conf"
    nginx.write_text(nginx.read_text().replace(f"include {d}/nginx/farm*;", ""))
    (d / "dhcp" / "dhcpd.conf").write_text("# Debian's example\n")
    (d / "ssh_config").write_text("Host mine\n")
    with listening(8001):
        error = refused(yard, NotReady)
        assert isinstance(error, NotReady)
        said = [one.message for one in error.errors]
        for part in (
            f"{d}/dhcp/dhcpd.conf is there, and is not farmhand's",
            f"{d}/ssh_config is there, and is not farmhand's",
            "bind doesn't answer to rndc",
            f"bind: {main} doesn't include {d}/bind/farm.conf",
            "nginx doesn't run (start-stop-daemon",
            f"nginx: {nginx} doesn't include {d}/nginx/farm",
            "nginx: TCP port 8001 is taken: pid ",
            "haproxy doesn't run (start-stop-daemon",
        ):
            assert [line for line in said if line.startswith(part)], (part, said)
        assert len(said) == 8
        assert "8 things are in the way" in error.message
        for one in error.errors:
            assert one.message in error.detail
            assert one.remedy
    # As it says:
    line = str(next(one.remedy for one in error.errors if "bind: " in one.message))
    subprocess.run(["sh", "-c", line.removeprefix("as root: ")], check=True)
    nginx.write_text(nginx.read_text().rstrip("}\n") + f"include {d}/nginx/farm;\n}}\n")
    (d / "dhcp" / "dhcpd.conf").unlink()
    (d / "ssh_config").unlink()
    daemons.start("bind", "nginx")
    yard.write("haproxy")
    daemons.start("haproxy")
    assert yard.apply().changed
    assert not yard.apply().changed


def test_a_port_of_another_is_told_to_a_running_proxy(yard: Yard, daemons: Daemons) -> None:
    """nginx takes the file, goes on with the old one, and says nothing."""
    yard.use("nginx")
    daemons.start("nginx")
    with listening(8001):
        error = refused(yard, Conflict)
        assert "nginx: TCP port 8001 is taken: pid " in error.message
    yard.apply()


def test_a_dhcp_server_of_another(yard: Yard, daemons: Daemons) -> None:
    yard.use("dhcpd")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 67))
        assert "dhcpd: UDP port 67 is taken: pid " in refused(yard, Conflict).message
    yard.apply()


def test_an_unbound_that_is_stopped_or_does_not_read_our_file(
    unbound: Yard,  # noqa: F811
) -> None:
    yard = unbound
    right = dict(yard.services["unbound"])
    yard.services["unbound"]["config"] = f"{yard.directory}/unbound/elsewhere.conf"
    assert "doesn't include" in refused(yard, WrongState).message
    yard.services["unbound"] = right | {"control": ["unbound-control", "-s", "127.0.0.1@1"]}
    assert "does not answer" in refused(yard, WrongState).message.replace("doesn't", "does not")


@pytest.mark.parametrize("service", ["dhcpd", "kea", "dnsmasq"])
def test_what_an_apply_starts_is_told_by_doctor(yard: Yard, daemons: Daemons, service: str) -> None:
    """Before the first one, and when it was stopped since."""
    yard.use(service)

    def stopped() -> set[tuple[str, str]]:
        with yard.site(plan=True) as site:
            found = list(doctor._served(site))
        assert all("doesn't run" in check.text for check in found)
        return {(check.level, spelled(check.remedy)) for check in found}

    assert stopped() == {("note", "network-apply starts it")}
    yard.apply()
    assert stopped() == set()
    pidfile = {"dhcpd": "dhcp/pid", "kea": "kea/kea4.kea-dhcp4.pid", "dnsmasq": "dnsmasq/pid"}[service]
    end(yard.directory / pidfile)
    assert stopped() == {("needed", "network-apply puts it right")}


class Heard(QuietReporter):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: object, *, vm: str = "") -> None:
        self.warnings.append(spelled(text))  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [True, False])
def test_a_table_that_a_boot_would_lose(yard: Yard, monkeypatch, pattern: bool) -> None:
    """It is asked for by doctor, a plan and an apply, and taken for no fault of now. As Debian's
    nftables.conf has it: flushed and loaded at each boot."""
    heard = Heard()
    monkeypatch.setattr("yard.QuietReporter", lambda: heard)
    yard.use("nftables")
    main = yard.directory / "nftables.conf"
    yard.services["nftables"] |= {"main": str(main), "at_boot": ["true"]}
    config = Path(yard.services["nftables"]["config"])

    def asked_for() -> list[str]:
        said = []
        for do in (yard.plan, yard.apply):
            heard.warnings.clear()
            do()
            said.append(list(heard.warnings))
        with yard.site(plan=True) as site:
            found = list(doctor._served(site))
        assert all(check.level == "note" for check in found)
        said.append([f"{check.text}. {spelled(check.remedy)}" for check in found])
        assert said[0] == said[1] == said[2]
        assert not_live(yard) == []
        return said[0]

    with own_network():
        assert [f"there is no {main}" in text for text in asked_for()] == [True]
        main.write_text("#!/usr/sbin/nft -f\nflush ruleset\ntable inet mine {\n}\n")
        [text] = asked_for()
        assert f"{main} doesn't include {config}: it isn't loaded at boot" in text
        if pattern:
            subprocess.run(["sh", "-c", text.partition("as root: ")[2]], check=True)
        else:
            with main.open("a") as file:
                file.write(f'include "{config}"\n')
        assert asked_for() == []
        subprocess.run(["nft", "-f", str(main)], check=True)  # a boot
        assert not yard.apply().changed
        if pattern:  # gone, it keeps nothing else from being loaded
            config.unlink()
            subprocess.run(["nft", "-f", str(main)], check=True)
        yard.services["nftables"]["at_boot"] = ["false"]
        [text] = asked_for()
        assert "isn't loaded at boot (false says so)" in text


def test_what_is_in_the_way_keeps_nobody_from_leaving(yard: Yard, daemons: Daemons) -> None:
    yard.use("hosts", "bind")
    daemons.start("bind")
    yard.apply()
    main = yard.directory / "bind" / "named.conf"
    main.write_text(main.read_text().split("include")[0])
    refused(yard, WrongState)
    with yard.site() as site:
        farm.destroy(site)
    assert "prod" not in (yard.directory / "hosts").read_text()
    assert ask("prod.try.example", "A") == []


# ---- Beside an admin's own settings

LONG = "a-rather-long-project-name-of-a-team.continuous-integration.engineering.department.example"


def test_directives_that_the_admin_has_too(yard: Yard, daemons: Daemons) -> None:
    from http_machine import machine

    yard.use("nginx")
    del yard.vms["prod"]
    yard.vms["dev2"]["proxy"] = [{"name": LONG, "port": "8080"}, {"name": "x.example", "port": "8080"}]
    nginx = yard.directory / "nginx" / "nginx.conf"
    plain = nginx.read_text()
    hash_too = "http { server_names_hash_bucket_size 128; server_names_hash_max_size 1024;"
    daemons.start("nginx")
    with machine("10.77.0.6", 8080):
        for text in (plain, plain.replace("http {", hash_too)):
            nginx.write_text(text)
            Path(yard.services["nginx"]["config"]).unlink(missing_ok=True)
            yard.apply()
            for name in (LONG, LONG.upper(), "x.example"):
                assert answer_of("127.0.0.1", 8001, name) == "10.77.0.6:8080"
            assert verify(yard).ok


def test_a_farm_with_a_long_name(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """nginx keeps names of variables in a hash, too."""
    text = yard.text().replace("farm: try-it", f"farm: {'a' * 55}")
    monkeypatch.setattr(yard, "text", lambda: text)
    yard.check("nginx")


def test_a_port_that_the_admins_dnsmasq_has_too(yard: Yard) -> None:
    config, main = yard.services["dnsmasq"]["config"], yard.directory / "dnsmasq" / "main.conf"
    del yard.services["dnsmasq"]["port"]
    main.write_text(f"port=53\nconf-file={config}\n")
    yard.services["dnsmasq"]["main"] = str(main)
    yard.check("dnsmasq")


class Backend(BaseHTTPRequestHandler):
    """Says what it was asked, and sends those who come to / on to /in, by the name and scheme that they
    came with. Who isn't told that it was https is sent there, as many do."""

    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        scheme, host = self.headers.get("X-Forwarded-Proto", "http"), self.headers["Host"]
        body = f"{scheme}://{host}{self.path}".encode()
        self.send_response(302 if self.path == "/" else 200)
        if self.path == "/":
            self.send_header("Location", f"{scheme}://{host}/in")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def backend(yard: Yard, daemons: Daemons) -> Iterator[type[Backend]]:
    """On dev2's address, port 8080, behind nginx and haproxy."""
    yard.use("nginx", "haproxy")
    yard.vms = {"dev2": yard.vms["dev2"] | {"proxy": [{"name": "dev2.example.org", "port": "8080"}]}}
    daemons.start("nginx", "haproxy")
    ip("addr add 10.77.0.6/32 dev lo")

    class Dev2(Backend):
        seen: ClassVar = []

    server = ThreadingHTTPServer(("10.77.0.6", 8080), Dev2)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Dev2
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_backend_is_told_what_the_client_asked_for(yard: Yard, backend: type[Backend]) -> None:
    yard.apply()
    told = {}
    for service, port in (("nginx", 8001), ("haproxy", 8003)):
        for given in ({}, {"X-Forwarded-For": "192.0.2.9", "X-Forwarded-Proto": "https"}):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            host = f"dev2.example.org:{port}"
            connection.request("GET", "/in", headers={"Host": host, **given})
            assert connection.getresponse().read() == f"http://{host}/in".encode()
            connection.close()
            seen = backend.seen[-1]
            came = {name: text for name, text in seen.items() if name.startswith(("host", "x-"))}
            assert came == {
                "host": host,
                "x-real-ip": "127.0.0.1",
                "x-forwarded-for": "192.0.2.9, 127.0.0.1" if given else "127.0.0.1",
                "x-forwarded-proto": "http",
                "x-forwarded-host": host,
                "x-forwarded-port": str(port),
            }
            told.setdefault(service, []).append({*came})
    assert told["nginx"] == told["haproxy"]


def test_verify_follows_a_redirect(yard: Yard, backend: type[Backend]) -> None:
    """To where a browser would go: with the proxy's port. A proxy that hands on another name is seen."""
    yard.apply()
    report = verify(yard)
    assert report.ok, report.wrong
    ends = {answer.service: answer.seen for answer in report.answers}
    assert ends["nginx"].endswith(" bytes at http://dev2.example.org:8001/in")
    assert ends["haproxy"].endswith(" bytes at http://dev2.example.org:8003/in")
    config = Path(yard.services["nginx"]["config"])
    config.write_text(config.read_text().replace("Host $http_host", "Host $host"))
    subprocess.run(yard.services["nginx"]["reload"], check=True)
    wait_for(lambda: verify(yard).wrong)
    [wrong] = verify(yard).wrong
    assert (wrong.service, wrong.vm) == ("nginx", "dev2")


def test_a_redirect_elsewhere_is_an_answer() -> None:
    pages = {
        "/": (301, "https://x.example/a"), "/a": (302, "b?c=d"), "/b": (302, "http://sso.example/"),
        "/loop": (307, "/loop"), "/plain": (200, "")}  # fmt: skip

    def get(url: SplitResult) -> tuple[int, str, int]:
        return (*pages[url.path], 7)

    assert questions._page("http://x.example/", get) == "302 to http://sso.example/"
    assert questions._page("http://x.example/plain", get) == "200, 7 bytes"
    assert "more than 5 redirects" in questions._page("http://x.example/loop", get)
