"""A libvirt network made as its XML says. One that runs takes hosts (DHCP and DNS) at once, by
virNetworkUpdate (https://libvirt.org/html/libvirt-libvirt-network.html); what else differs it takes at
its next start."""

from __future__ import annotations

import contextlib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hypervisors.libvirt.connecting import connect
from hypervisors.libvirt.errors import translate

if TYPE_CHECKING:
    import libvirt


def set_network(uri: str, xml: str) -> None:
    """Define a network, or change it. One that is down is started, and again at each boot of the host.
    FarmhandError if libvirt refuses."""
    import libvirt

    wanted = ET.fromstring(xml)  # noqa: S314 - ours, checked
    name = wanted.findtext("name") or ""
    with _connected(uri, f"change libvirt's network {name}") as connection:
        known = _look_up(connection, name)
        if known is None:
            made = connection.networkDefineXML(xml)
            made.setAutostart(1)
            made.create()
            return
        known.setAutostart(1)
        old = ET.fromstring(known.XMLDesc(libvirt.VIR_NETWORK_XML_INACTIVE))  # noqa: S314 - libvirt's
        _same_identity(old, wanted)
        connection.networkDefineXML(ET.tostring(wanted, encoding="unicode"))
        if known.isActive():
            _update(known, wanted)
        else:
            known.create()


def lacks(uri: str, name: str) -> str | None:
    """What a network that should serve lacks: it isn't defined, is down, or isn't started at a boot.
    FarmhandError if libvirt can't be asked."""
    with _connected(uri, f"look at libvirt's network {name}") as connection:
        known = _look_up(connection, name)
        if known is None:
            return f"libvirt has no network {name}"
        if not known.isActive():
            return f"libvirt's network {name} is down"
        return None if known.autostart() else f"libvirt's network {name} isn't started at a boot"


def drop_network(uri: str, name: str) -> None:
    """Stop a network and remove its definition. If there is none, nothing is done."""
    with _connected(uri, f"remove libvirt's network {name}") as connection:
        known = _look_up(connection, name)
        if known is None:
            return
        if known.isActive():
            known.destroy()
        known.undefine()


def _same_identity(old: ET.Element, new: ET.Element) -> None:
    """Give the new definition the old one's uuid, MAC and bridge, where it has none: without them
    libvirt takes it for another network of the same name."""
    for tag in ("uuid", "mac", "bridge"):  # where ours has no bridge, the one that libvirt chose
        found = old.find(tag)
        if found is not None and new.find(tag) is None:
            new.append(found)


def _update(network: libvirt.virNetwork, wanted: ET.Element) -> None:
    """Bring the running network's hosts in step. Those that go are removed first, for an address may
    move to another."""
    import libvirt

    live = ET.fromstring(network.XMLDesc(0))  # noqa: S314 - libvirt's
    delete, add = libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST

    def update(command: int, section: int, elements: Iterable[str]) -> None:
        for element in elements:
            network.update(command, section, -1, element, libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE)

    old, new = _canonical(live, "ip/dhcp/host"), _canonical(wanted, "ip/dhcp/host")
    update(delete, libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST, sorted(old - new))
    update(add, libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST, sorted(new - old))

    # An update takes a name once only: an IPv6 address beside the IPv4 one waits for the next start.
    there, asked = _canonical(live, "dns/host"), _canonical(wanted, "dns/host")
    names = {name for element in there ^ asked for name in _names(element)}
    concerned = [element for element in sorted(there) if not names.isdisjoint(_names(element))]
    update(delete, libvirt.VIR_NETWORK_SECTION_DNS_HOST, map(_address_alone, concerned))
    concerned = [element for element in sorted(asked) if not names.isdisjoint(_names(element))]
    update(add, libvirt.VIR_NETWORK_SECTION_DNS_HOST, filter(_of_ipv4, concerned))


def _canonical(network: ET.Element, path: str) -> set[str]:
    return {
        ET.canonicalize(ET.tostring(element, encoding="unicode"), strip_text=True)
        for element in network.findall(path)
    }


def _names(host: str) -> set[str]:
    return {name.text or "" for name in ET.fromstring(host)}  # noqa: S314 - made here


def _address_alone(host: str) -> str:
    """A host element that matches this address and no other one of the same name."""
    address = ET.fromstring(host).get("ip", "")  # noqa: S314 - made here
    return ET.tostring(ET.Element("host", ip=address), encoding="unicode")


def _of_ipv4(host: str) -> bool:
    return ":" not in ET.fromstring(host).get("ip", "")  # noqa: S314 - made here


def _look_up(connection: libvirt.virConnect, name: str) -> libvirt.virNetwork | None:
    import libvirt

    try:
        return connection.networkLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
            return None
        raise


@contextlib.contextmanager
def _connected(uri: str, doing: str) -> Iterator[libvirt.virConnect]:
    import libvirt

    try:
        connection = connect(uri)
        try:
            yield connection
        finally:
            connection.close()
    except libvirt.libvirtError as error:
        raise translate(error, doing) from error
