"""The network services, a file each, in the order they are applied: names before who looks them up."""

from __future__ import annotations

from collections.abc import Mapping

SERVICES: Mapping[str, str] = {
    "bind": "provision.network.services.bind:Bind",
    "dhcpd": "provision.network.services.dhcpd:Dhcpd",
    "kea": "provision.network.services.kea:Kea",
    "dnsmasq": "provision.network.services.dnsmasq:Dnsmasq",
    "unbound": "provision.network.services.unbound:Unbound",
    "hosts": "provision.network.services.hosts:Hosts",
    "ssh_config": "provision.network.services.ssh_config:SshConfig",
    "nginx": "provision.network.services.nginx:Nginx",
    "haproxy": "provision.network.services.haproxy:Haproxy",
    "nftables": "provision.network.services.nftables:Nftables",
    "shorewall": "provision.network.services.shorewall:Shorewall",
    "libvirt": "provision.network.services.libvirt:LibvirtNetwork",
    "ansible": "provision.network.services.ansible:Ansible",
}
"""Where each is, module:class (``inventory.kinds``)."""
