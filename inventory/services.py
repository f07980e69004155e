"""The network services that a farm uses: where their files live, and how each daemon is told.

What is not in the farm file is not rendered and not touched. A service with all its defaults is its
name alone: ``hosts:``.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Literal

from inventory.base import Model, at_key

if TYPE_CHECKING:  # for the annotations, which inventory.annotations has evaluated
    from inventory.fields import (
        Address,
        Bool,
        ConfigPath,
        Hostname,
        Hostnames,
        Interface,
        Line,
        Lines,
        Name,
        Port,
        TimeToLive,
    )

Own = Literal["file", "block"]
_HERE = IPv4Address("127.0.0.1")


@dataclass(frozen=True, kw_only=True)
class Bind(Model):
    """BIND: the farm's zone, and its reverse zones."""

    config: ConfigPath = "/etc/bind/named.conf.farmhand"
    """The zone statements: a file of ours, to `include` from named.conf.local."""
    main: ConfigPath = "/etc/bind/named.conf"
    """The server's own configuration, which the check begins with."""
    directory: ConfigPath = "/var/lib/bind"
    """Where the zone files are: db.ZONE each."""
    own: Own = "file"
    """`file`: the zone files are ours. `block`: they are the admin's, who also has the zone statements;
    ours is a marked block in each, and the serial number in their SOA record, which has to move."""
    zone: Hostname | None = None
    """The zone; absent: the network's `domain`, which must be inside it."""
    nameserver: Hostname | None = None
    """The primary server's name; absent: ns in the zone."""
    secondaries: Hostnames = ()
    """Names of further name servers."""
    contact: Hostname | None = None
    """Who is responsible, as a name (RFC 1035 section 3.3.13); absent: hostmaster in the zone."""
    ttl: TimeToLive = 3600
    """How long answers may be kept."""
    reverse: Bool = True
    """Whether the reverse zones are ours too. Of a subnet longer than /24 it is the classless one of
    RFC 2317."""
    parent: ConfigPath | None = None
    """Classless reverse zones: the file of the parent zone, where it is on this server: a marked block
    in it delegates to ours."""
    dynamic: Bool = False
    """Whether records are changed by dynamic update (RFC 2136) instead of by rewriting the zone."""
    key: ConfigPath | None = None
    """dynamic: the file of the TSIG key, as tsig-keygen writes it. Absent: $FARMHAND_TSIG_KEY holds
    its text."""
    key_name: Hostname = "farmhand"
    """dynamic: the key's name, where it comes from the environment."""
    address: Address = _HERE
    """Where the server answers."""
    port: Port = 53
    """Where the server answers."""
    rndc: Lines = ("rndc",)
    """The command that tells the server, an argument list; `reload`, `reconfig` and so on are added."""

    def __post_init__(self) -> None:
        if self.dynamic and self.own == "block":
            raise at_key(
                "own", "a dynamic zone's file is the server's: 'own: block' can't be", "dynamic"
            )


@dataclass(frozen=True, kw_only=True)
class Dhcpd(Model):
    """ISC dhcpd (DHCPv4)."""

    config: ConfigPath = "/etc/dhcp/dhcpd.conf"
    """Its configuration."""
    own: Own = "file"
    """`file`: all of it is ours. `block`: a marked block of host statements in the admin's own."""
    reload: Lines = ("systemctl", "restart", "isc-dhcp-server")
    """The command that makes it read its file: it can only be restarted."""
    alive: Lines = ("systemctl", "is-active", "--quiet", "isc-dhcp-server")
    """The command that succeeds while it runs."""


@dataclass(frozen=True, kw_only=True)
class Kea(Model):
    """Kea: DHCPv4, and DHCPv6 where the network has `subnet6`."""

    config4: ConfigPath = "/etc/kea/kea-dhcp4.conf"
    """The configuration of kea-dhcp4."""
    config6: ConfigPath = "/etc/kea/kea-dhcp6.conf"
    """The configuration of kea-dhcp6."""
    hosts: ConfigPath = "/etc/kea/farmhand"
    """A directory of ours, which both include: the hosts."""
    interfaces: tuple[Interface, ...] = ()
    """Where they listen; absent: the network's `bridge`, else all."""
    socket4: ConfigPath = "/run/kea/kea4-ctrl-socket"
    """The control socket of kea-dhcp4."""
    socket6: ConfigPath = "/run/kea/kea6-ctrl-socket"
    """The control socket of kea-dhcp6."""
    leases: ConfigPath = "/var/lib/kea"
    """The directory of the lease files."""
    reload: Lines = ("systemctl", "restart", "kea-dhcp4-server")
    """The command that restarts kea-dhcp4, for when its socket doesn't answer."""
    reload6: Lines = ("systemctl", "restart", "kea-dhcp6-server")
    """The command that restarts kea-dhcp6."""
    lease_commands: ConfigPath | None = None
    """Kea's libdhcp_lease_cmds.so, in Debian /usr/lib/x86_64-linux-gnu/kea/hooks/libdhcp_lease_cmds.so:
    with it the lease of a removed VM is freed; absent: it runs out."""


@dataclass(frozen=True, kw_only=True)
class Dnsmasq(Model):
    """dnsmasq: DHCP (IPv4, and IPv6 where the network has `subnet6`) and DNS in one."""

    config: ConfigPath = "/etc/dnsmasq.d/farmhand.conf"
    """Its configuration."""
    main: ConfigPath = "/etc/dnsmasq.conf"
    """The server's own configuration, which the check begins with."""
    hosts: ConfigPath = "/var/lib/farmhand-dnsmasq"
    """A directory of ours, that it watches: dhcp/ and dns/ in it."""
    interface: Interface | None = None
    """Where it listens; absent: the network's `bridge`, else all."""
    dns: Bool = True
    """Whether it answers DNS too."""
    port: Port = 53
    """Where it answers DNS."""
    address: Address = _HERE
    """Where network-verify asks it."""
    restart: Lines = ("systemctl", "restart", "dnsmasq")
    """The command for a changed configuration."""
    reload: Lines = ("systemctl", "reload", "dnsmasq")
    """The command that sends it SIGHUP, so that removed hosts are forgotten."""
    alive: Lines = ("systemctl", "is-active", "--quiet", "dnsmasq")
    """The command that succeeds while it runs."""


@dataclass(frozen=True, kw_only=True)
class Hosts(Model):
    """The hosts file: a marked block."""

    config: ConfigPath = "/etc/hosts"
    """The file."""


@dataclass(frozen=True, kw_only=True)
class SshConfig(Model):
    """An ssh client's configuration with an entry for each VM."""

    config: ConfigPath = "/etc/ssh/ssh_config.d/farmhand.conf"
    """The file."""
    own: Own = "file"
    """All of it is ours, or a marked block."""


@dataclass(frozen=True, kw_only=True)
class Nginx(Model):
    """nginx: the VMs' `proxy` names as virtual hosts."""

    config: ConfigPath = "/etc/nginx/sites-enabled/farmhand"
    """The file, one that nginx.conf includes within http."""
    main: ConfigPath = "/etc/nginx/nginx.conf"
    """The server's own configuration, which the check begins with."""
    logs: ConfigPath = "/var/log/nginx"
    """The directory of the access logs, NAME.access.log each."""
    address: Address = _HERE
    """Where network-verify asks it."""
    port: Port = 80
    """The port of plain HTTP."""
    tls_port: Port = 443
    """The port of names with a certificate."""
    reload: Lines = ("systemctl", "reload", "nginx")
    """The command that makes it read its files."""
    alive: Lines = ("systemctl", "is-active", "--quiet", "nginx")
    """The command that succeeds while it runs."""


@dataclass(frozen=True, kw_only=True)
class Haproxy(Model):
    """haproxy: the VMs' `proxy` names as virtual hosts."""

    config: ConfigPath = "/etc/haproxy/haproxy.cfg"
    """Its configuration."""
    own: Own = "file"
    """`file`: all of it is ours. `block`: a marked block with a frontend and backends of ours."""
    map: ConfigPath = "/etc/haproxy/farmhand.map"
    """A file of ours: which name leads to which backend."""
    address: Address = _HERE
    """Where network-verify asks it."""
    port: Port = 80
    """The port of plain HTTP."""
    tls_port: Port = 443
    """The port of names with a certificate."""
    reload: Lines = ("systemctl", "reload", "haproxy")
    """The command that makes it read its files."""
    alive: Lines = ("systemctl", "is-active", "--quiet", "haproxy")
    """The command that succeeds while it runs."""


@dataclass(frozen=True, kw_only=True)
class Nftables(Model):
    """nftables: a table of ours that leads `nat_port` of this machine to the VMs."""

    config: ConfigPath = "/etc/nftables.d/farmhand.nft"
    """The file, to `include` from nftables.conf."""
    interface: Interface | None = None
    """Where connections come in; absent: anywhere."""
    address: Address | None = None
    """The address they are for; absent: any of this machine's."""
    nft: Lines = ("nft",)
    """The command, an argument list."""


@dataclass(frozen=True, kw_only=True)
class Shorewall(Model):
    """shorewall: marked blocks in rules and params, as the XiVO farm has them."""

    directory: ConfigPath = "/etc/shorewall"
    """Where rules and params are."""
    source: Name = "net"
    """The zone that connections come from."""
    zone: Name = "loc"
    """The zone that the VMs are in."""
    address: Address | None = None
    """The address they are for; absent: any."""
    reload: Lines = ("shorewall", "reload")
    """The command that makes it read its files."""


@dataclass(frozen=True, kw_only=True)
class LibvirtNetwork(Model):
    """A libvirt network that gives the VMs their addresses and names."""

    config: ConfigPath = "/var/lib/farmhand/farmhand-network.xml"
    """The file that it is defined from."""
    bridge: Interface | None = None
    """The bridge libvirt makes; absent: it chooses."""
    forward: Literal["nat", "route", "none"] = "nat"
    """How it is connected to the outside."""
    uri: Line = "qemu:///system"
    """The libvirt that it is in: its URI."""


@dataclass(frozen=True, kw_only=True)
class Ansible(Model):
    """An Ansible inventory."""

    config: ConfigPath = "/etc/ansible/farmhand.yaml"
    """The file."""
