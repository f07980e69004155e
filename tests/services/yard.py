"""A farm whose services' files are all below one directory, with a main configuration for each."""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from host.run import Runner
from hypervisors.ownership import FarmIdentity
from inventory.loader import loads
from inventory.model import Farm
from provision.allocate import Allocation, Allocator
from provision.engine.report import Outcome, QuietReporter
from provision.network import checkers
from provision.network.apply import ApplyResult
from provision.network.document import Document
from provision.network.render import render
from provision.network.rendered import full_text
from provision.site import Site, open_site
from tests import farm

SUBNET = "10.77.0.0/24"

VMS: Mapping[str, Any] = {
    "dev2": {
        "address": "10.77.0.6",
        "mac": "52:54:86:b3:3f:10",
        "nat_port": "22006",
        "aliases": ["git"],
        "description": 'say "hi"; {x} #1 \\ $HOME ü \\n',
        "proxy": [{"name": "dev2.example.org", "websocket": "yes", "body_size": "100M"}],
    },
    "prod": {"address": "10.77.0.7", "nat_port": "22007", "proxy": [{"name": "prod.example.org"}]},
}


class Yard:
    """``directory``: short, and readable for the daemons."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("bind", "dhcp", "kea", "dnsmasq", "nginx", "logs", "haproxy", "nft", "shorewall"):
            (directory / name).mkdir()
        d = str(directory)
        self.services: dict[str, Any] = {
            "bind": {"config": f"{d}/bind/farm.conf", "main": f"{d}/bind/named.conf",
                     "directory": f"{d}/bind", "port": "5300"},
            "dhcpd": {"config": f"{d}/dhcp/dhcpd.conf"},
            "kea": {"config4": f"{d}/kea/kea4.conf", "config6": f"{d}/kea/kea6.conf",
                    "interfaces": ["lo"], "leases": f"{d}/kea", "hosts": f"{d}/kea/hosts",
                    "socket4": f"{d}/kea/kea4.sock", "socket6": f"{d}/kea/kea6.sock"},
            "dnsmasq": {"config": f"{d}/dnsmasq/dnsmasq.conf", "main": f"{d}/dnsmasq/none",
                        "hosts": f"{d}/dnsmasq/hosts", "port": "5301", "interface": "lo"},
            "hosts": {"config": f"{d}/hosts"},
            "ssh_config": {"config": f"{d}/ssh_config"},
            "nginx": {"config": f"{d}/nginx/farm", "main": f"{d}/nginx/nginx.conf",
                      "logs": f"{d}/logs", "port": "8001", "tls_port": "8002"},
            "haproxy": {"config": f"{d}/haproxy/haproxy.cfg", "map": f"{d}/haproxy/farm.map",
                        "port": "8003", "tls_port": "8004"},
            "nftables": {"config": f"{d}/nft/farm.nft"},
            "shorewall": {"directory": f"{d}/shorewall"},
            "ansible": {"config": f"{d}/ansible.yaml"},
        }  # fmt: skip
        self.network: dict[str, Any] = {
            "mode": "bridge",
            "bridge": "br0",
            "subnet": SUBNET,
            "subnet6": "fd77::/64",
            "gateway": "10.77.0.1",
            "nameservers": ["10.77.0.1"],
            "domain": "try.example",
            "addressing": "dhcp",
            "pool": ["10.77.0.200-10.77.0.210"],
        }
        self.repositories: dict[str, Any] = {}
        self.vms: dict[str, Any] = {name: dict(vm) for name, vm in VMS.items()}
        self._mains()

    def text(self) -> str:
        content = {
            "farm": "try-it",
            "hosts": {"here": {"driver": "fake"}},
            "network": self.network,
            "templates": {"base": {"build": "debian-12"}},
            "vms": self.vms,
            "services": self.services,
            **({"repositories": self.repositories} if self.repositories else {}),
        }
        return yaml.dump(
            content, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True, width=10000
        )

    def farm(self) -> Farm:
        return loads(self.text().encode(), self.directory / "farm.yaml")

    def allocations(self) -> dict[str, Allocation]:
        farm = self.farm()
        allocator = Allocator(farm, self.directory / "farm.lock", self.directory / "claims.db")
        return allocator.peek_all(farm.vms)

    def documents(self, *services: str) -> dict[str, Document]:
        """By their paths below the directory."""
        found = render(self.farm(), self.allocations(), services=services or None)
        return {document.path.removeprefix(f"{self.directory}/"): document for document in found}

    def check(self, *services: str) -> None:
        """By the daemons' own checkers, in a staging area."""
        documents = list(self.documents(*services).values())
        texts: dict[str, str | None] = {d.path: self.full(d) for d in documents}
        for error in checkers.refusals(Runner(), self.farm(), documents, texts):
            raise error

    def full(self, document: Document) -> str:
        path = Path(document.path)
        if document.own == "block" and path.exists():
            from provision.network.document import embed

            return embed(document, self.identity, path.read_text())
        return full_text(document, self.identity)

    def write(self, *services: str) -> dict[str, Path]:
        """The documents at their places, by what they are called below the directory."""
        written = {}
        for name, document in self.documents(*services).items():
            path = Path(document.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.full(document))
            written[name] = path
        return written

    @contextmanager
    def site(self, *, plan: bool = False) -> Iterator[Site]:
        (self.directory / "farm.yaml").write_text(self.text())
        with open_site(self.directory / "farm.yaml", reporter=QuietReporter(), plan=plan) as site:
            yield site

    @property
    def identity(self) -> FarmIdentity:
        """The farm's, kept with its state."""
        with self.site() as site:
            site.prepare()
            return site.identity

    def apply(
        self, *services: str, force: bool = False, take_aside: bool = False
    ) -> Outcome[ApplyResult]:
        with self.site() as site:
            return farm.network_apply(site, services, force=force, take_aside=take_aside)

    def plan(self, *services: str, force: bool = False) -> Outcome[ApplyResult]:
        with self.site(plan=True) as site:
            return farm.network_apply(site, services, force=force)

    def use(self, *services: str) -> None:
        """No others."""
        self.services = {name: self.services[name] for name in services}

    def snapshot(self) -> dict[str, tuple[bytes, int, int]]:
        """Every file that a service has: content, mode, inode."""
        skip = ("state", "logs", "farm.yaml", "farm.yaml.lock")
        return {
            str(path): (path.read_bytes(), path.stat().st_mode, path.stat().st_ino)
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and path.relative_to(self.directory).parts[0] not in skip
        }

    def _mains(self) -> None:
        d = self.directory
        (d / "bind" / "named.conf").write_text(
            f'options {{ directory "{d}/bind"; pid-file "{d}/bind/pid"; session-keyfile none;\n'
            "  listen-on port 5300 { 127.0.0.1; }; listen-on-v6 { none; }; recursion no;\n"
            "  dnssec-validation no; };\n"
            f'key "rndc" {{ algorithm hmac-sha256; secret "{SECRET}"; }};\n'
            'controls { inet 127.0.0.1 port 9953 allow { 127.0.0.1; } keys { "rndc"; }; };\n'
            f'include "{d}/bind/farm.conf";\n'
        )
        (d / "nginx" / "nginx.conf").write_text(
            f"user {getpass.getuser()};\npid {d}/nginx/pid;\nerror_log {d}/logs/error.log;\n"
            f"events {{ }}\nhttp {{\n  access_log off;\n  client_body_temp_path {d}/nginx/b;\n"
            f"  proxy_temp_path {d}/nginx/p;\n  fastcgi_temp_path {d}/nginx/f;\n"
            f"  uwsgi_temp_path {d}/nginx/u;\n  scgi_temp_path {d}/nginx/s;\n"
            f"  include {d}/nginx/farm*;\n}}\n"
        )
        shorewall = d / "shorewall"
        (shorewall / "shorewall.conf").write_bytes(Path("/etc/shorewall/shorewall.conf").read_bytes())
        (shorewall / "zones").write_text("fw firewall\nnet ipv4\nloc ipv4\n")
        (shorewall / "interfaces").write_text("?FORMAT 2\nnet eth0\nloc br0\n")
        (shorewall / "policy").write_text("all all REJECT\n")
        (shorewall / "rules").write_text("?SECTION NEW\nSSH(ACCEPT) net fw\n")
        (shorewall / "params").write_text("MINE=1\n")


SECRET = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U="
