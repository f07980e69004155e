"""First-boot data: what makes a clone itself, as one small ISO image attached to it.

It speaks to two readers. cloud-init's NoCloud source (cloudinit.readthedocs.io, "NoCloud") reads
meta-data, user-data and network-config; they are JSON, which is YAML with one way to quote. Our own
first boot (templates/firstboot/firstboot) reads lines NAME=VALUE, from the image's first 32 KiB where
they fit, which nothing ever evaluates.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from host.files import remove_for_good
from host.run import Runner
from hypervisors.disks.images import write_iso
from inventory.errors import UsageError

_ROOM = 32 * 1024
_FILE = "farmhand.env"
_CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"  # unprintable, and what YAML takes for lines
_LOGIN = re.compile(r"[a-z_][a-z0-9_-]{0,31}")  # useradd(8), CAVEATS
_HOSTNAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")  # machine-id(5)
_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class StaticAddress:
    """``prefix``: length of the subnet's prefix, in bits."""

    address: IPv4Address
    prefix: int
    gateway: IPv4Address | None = None
    nameservers: tuple[IPv4Address, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedData:
    """``host_key`` is the private ed25519 key as OpenSSH text, ``host_key_pub`` its public line.
    ``users``: further logins, each with its public keys. ``sudo``: those of all logins that may do
    everything. ``static`` None: DHCP, with the MAC as client id. UsageError for a value that can't be
    one of its kind."""

    vm: str
    instance_id: str
    hostname: str
    machine_id: str
    host_key: str = field(repr=False)
    host_key_pub: str
    login: str
    authorized_keys: tuple[str, ...]
    users: Mapping[str, tuple[str, ...]]
    sudo: tuple[str, ...] = ()
    mac: str
    static: StaticAddress | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        self._check("instance id", self.instance_id, None)
        self._check("hostname", self.hostname, _HOSTNAME)
        self._check("machine id", self.machine_id, _MACHINE_ID)
        self._check("MAC", self.mac, _MAC)
        self._check("host key", self.host_key_pub, None)
        for line in self.host_key.splitlines():
            self._check("host key", line, None)
        if self.domain:
            self._check("domain", self.domain, _HOSTNAME)
        for login, keys in self.logins.items():
            self._check("login", login, _LOGIN)
            for key in keys:
                self._check(f"key of {login}", key, None)

    @property
    def logins(self) -> dict[str, tuple[str, ...]]:
        """All logins with their keys, the farm's own login first."""
        logins = {self.login: self.authorized_keys}
        for name, keys in self.users.items():
            logins[name] = tuple(dict.fromkeys((*logins.get(name, ()), *keys)))
        return logins

    @property
    def fqdn(self) -> str:
        if self.domain and not self.hostname.endswith(f".{self.domain}"):
            return f"{self.hostname}.{self.domain}"
        return self.hostname

    def _check(self, what: str, value: str, pattern: re.Pattern[str] | None) -> None:
        unfit = not value.isprintable() and re.search(_CONTROL, value)
        if not value or unfit or (pattern and not pattern.fullmatch(value)):
            shown = "" if what == "host key" else f" {value!r}"
            raise UsageError(f"VM {self.vm}: the {what}{shown} can't be used for its first boot")


def new_host_key(runner: Runner, directory: Path) -> tuple[str, str]:
    """A fresh ed25519 key of ssh-keygen(1): private half as OpenSSH text, public half as a line. To
    bring a library for it into this process takes longer than the command. ``directory``: ours alone;
    what a kill leaves there is swept as ``host.files.sweep`` says, and the command, which outlives us,
    finds no place for a key then. CommandFailed, OSError."""
    work = directory / f".key.{os.getpid()}.{threading.get_ident()}"
    remove_for_good(work)  # of one that had our numbers before
    work.mkdir(mode=0o700)
    try:
        key = work / "key"
        runner.change("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key)
        public = key.with_suffix(".pub").read_text(encoding="ascii")
        return key.read_text(encoding="ascii"), public.strip()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_seed(runner: Runner, data: SeedData, out: Path, *, reader_uid: int | None = None) -> None:
    """Write the seed image, atomically, 0600, owned by ``reader_uid`` if given (as who QEMU runs):
    it holds the VM's private host key. Needs genisoimage. CommandFailed."""
    own = own_lines(data)
    area = own if len(own) <= _ROOM else f"farmhand-seed 1\nsee={_FILE}\nend\n".encode()
    fresh = out.with_name(f".{out.name}.{os.getpid()}.iso")
    try:
        write_iso(runner, {**nocloud(data), _FILE: own}, fresh, "CIDATA", system_area=area)
        if reader_uid is not None and reader_uid != os.geteuid():
            os.chown(fresh, reader_uid, -1)
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)


def own_lines(data: SeedData) -> bytes:
    """The lines that farmhand's own first-boot script reads. Every value was checked to be one line."""
    lines = [
        f"instance={data.instance_id}",
        f"hostname={data.hostname.partition('.')[0]}",
        f"machine-id={data.machine_id}",
        f"mac={data.mac}",
        f"host-key-pub={data.host_key_pub}",
        *(f"host-key={line}" for line in data.host_key.splitlines()),
    ]
    domain = data.fqdn.partition(".")[2]
    if domain:
        lines.append(f"domain={domain}")
    if data.static:
        lines.append(f"address={data.static.address}/{data.static.prefix}")
        if data.static.gateway:
            lines.append(f"gateway={data.static.gateway}")
        lines += [f"nameserver={server}" for server in data.static.nameservers]
    for login, keys in data.logins.items():
        lines.append(f"login={login}")
        lines += [f"key={key}" for key in keys]
    lines += [f"sudo={login}" for login in data.logins if login in data.sudo]
    return ("\n".join(["farmhand-seed 1", *lines, "end"]) + "\n").encode()


def nocloud(data: SeedData) -> dict[str, bytes]:
    """The three files that cloud-init's NoCloud source reads, by name."""
    # "default": the image's own user. A login of its name is that one, with all that the image gives it.
    users: list[object] = ["default"]
    users += [
        {
            "name": login,
            "lock_passwd": True,
            "ssh_authorized_keys": list(keys),
            **({} if login == "root" else {"shell": "/bin/bash"}),
            **({"sudo": "ALL=(ALL) NOPASSWD:ALL"} if login in data.sudo else {}),
        }
        for login, keys in data.logins.items()
    ]
    own_id = data.machine_id
    put_id = f'[ "$(cat /etc/machine-id)" = {own_id} ] || echo {own_id} > /etc/machine-id'
    user_data = {
        "preserve_hostname": False,
        "hostname": data.hostname.partition(".")[0],
        "fqdn": data.fqdn,
        "manage_etc_hosts": "localhost",
        "bootcmd": [["sh", "-c", put_id]],
        "disable_root": False,
        "ssh_pwauth": False,
        "ssh_deletekeys": True,
        "ssh_genkeytypes": ["ed25519"],
        "ssh_keys": {"ed25519_private": data.host_key, "ed25519_public": data.host_key_pub},
        "users": users,
    }
    return {
        "meta-data": _json({"instance-id": data.instance_id, "local-hostname": data.fqdn}),
        "user-data": b"#cloud-config\n" + _json(user_data),
        "network-config": _json(_static(data) if data.static else _dhcp(data)),
    }


def _static(data: SeedData) -> dict[str, object]:
    """In version 1, whose default route each of cloud-init's renderers knows: of version 2 that of
    ifupdown makes calls of route(8), which is not in newer images; and its `gateway4` is going."""
    assert data.static
    subnet: dict[str, object] = {
        "type": "static",
        "address": f"{data.static.address}/{data.static.prefix}",
        "dns_nameservers": [str(server) for server in data.static.nameservers],
    }
    if data.static.gateway:
        subnet["gateway"] = str(data.static.gateway)
    if data.domain:
        subnet["dns_search"] = [data.domain]
    nic = {"type": "physical", "name": "eth0", "mac_address": data.mac, "subnets": [subnet]}
    return {"version": 1, "config": [nic]}


def _dhcp(data: SeedData) -> dict[str, object]:
    """In version 2, which alone knows the MAC as client id. The search domain stands there for netplan;
    of systemd's networkd it is asked of DHCP, as dhclient does by itself."""
    nic: dict[str, object] = {
        "match": {"macaddress": data.mac},
        "dhcp4": True,
        "dhcp-identifier": "mac",
    }
    if data.domain:
        nic["dhcp4-overrides"] = {"use-domains": True}
        nic["nameservers"] = {"addresses": [], "search": [data.domain]}
    return {"version": 2, "ethernets": {"farm": nic}}


def _json(value: object) -> bytes:
    # not ASCII only: YAML readers take JSON's surrogate pairs for two broken characters
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
