"""What concerns several parts of a farm file: names that must be known, things that must differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from ipaddress import IPv4Address
from os.path import commonpath, normpath

from inventory import kinds
from inventory.base import parse_range, quote
from inventory.checks_services import check_services
from inventory.errors import Problem
from inventory.hosts import DriverInfo
from inventory.model import Farm, step_section
from inventory.places import Path, Places, shown
from inventory.sizes import format_size
from inventory.values import is_plain_name
from inventory.yamltree import MappingNode, ScalarNode, SequenceNode


def check(farm: Farm, places: Places) -> list[Problem]:
    """All problems of a farm that the model alone doesn't see. Nothing is said about what ``places``
    calls bad: that has been told already."""
    checks: tuple[Callable[[Farm, Places], Iterator[Problem]], ...] = (
        _references,
        _memory_and_disks,
        _listed_machines,
        _names,
        _identities,
        _network_name,
        _subnet,
        _room,
        _steps,
        _events,
        _repositories,
        _packages,
        check_services,
    )
    return [problem for one in checks for problem in one(farm, places)]


def _vms(farm: Farm, places: Places) -> Iterator[tuple[str, Path]]:
    """Names and paths of the farm's VMs; none, where the file has no sound ``vms`` and the loader put
    one in."""
    if ("vms",) not in places.bad:
        for name in farm.vms:
            yield name, ("vms", name)


def _keys(places: Places, section: str) -> Collection[str]:
    node = places.node((section,))
    return list(node.keys) if isinstance(node, MappingNode) else []


def _hosts(farm: Farm, places: Places) -> Collection[str]:
    return _keys(places, "hosts") or list(farm.hosts)


def _driver(farm: Farm, places: Places, vm: str) -> DriverInfo | None:
    """The driver of a VM's host; None where the file leaves that in doubt."""
    host = farm.vms[vm].host
    if not places.bad and (host or len(farm.hosts) == 1):  # the way of nearly all, ten thousand times
        found = farm.hosts.get(host or next(iter(farm.hosts)))
        return found.INFO if found else None
    known = _hosts(farm, places)
    if host is None:
        if len(known) != 1 or places.is_bad(("vms", vm, "host")):
            return None
        host = next(iter(known))
    if host not in farm.hosts or places.is_bad(("hosts", host, "driver")):
        return None
    return farm.hosts[host].INFO


def _virtual(farm: Farm, places: Places, vm: str) -> bool:
    """Whether the VM is certain to be one that is virtualized. False also where the file leaves that in
    doubt."""
    driver = _driver(farm, places, vm)
    return driver is not None and driver.virtual


def _listed_only(farm: Farm, places: Places, vm: str) -> bool:
    """Whether the machine is certain to be one that nobody virtualizes. False also where the file leaves
    that in doubt."""
    driver = _driver(farm, places, vm)
    return driver is not None and not driver.virtual


def _network_name(farm: Farm, places: Places) -> Iterator[Problem]:
    """The network's name is plain, except where a driver takes any text: elsewhere it gets into files
    and arguments."""
    name = farm.network.network
    if name is None or is_plain_name(name) or places.is_bad(("network", "network")):
        return
    drivers = [_driver(farm, places, vm) for vm, _ in _vms(farm, places)]
    free = [driver.any_network_name for driver in drivers if driver and driver.virtual]
    if any(s.PLAIN_NETWORK for s in farm.services.sections) or not free or not all(free):
        yield places.problem(
            ("network", "network"),
            f"{quote(name)} is not a libvirt network's name: letters, digits, '.', '_' and '-', at most "
            "64, beginning with a letter or digit (only on xenapi hosts it may be any text)",
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(shown, sorted(names)[:24]))


def _close(word: str, known: Collection[str]) -> str:
    import difflib  # only when something is wrong

    close = difflib.get_close_matches(word, known, 1, 0.6)
    if close:
        return f"; did you mean {quote(close[0])}?"
    return f"; known: {_listed(known)}" if known else "; there are none"


def _references(farm: Farm, places: Places) -> Iterator[Problem]:
    hosts, templates = _hosts(farm, places), _keys(places, "templates")
    for name, path in _vms(farm, places):
        vm = farm.vms[name]
        if vm.host is not None and vm.host not in hosts:
            yield places.problem((*path, "host"), f"no host {quote(vm.host)}{_close(vm.host, hosts)}")
        elif vm.host is None and len(hosts) > 1 and not places.is_bad((*path, "host")):
            yield places.problem(
                path,
                f"which host? It needs 'host', one of: {_listed(hosts)}",
                key=True,
            )
        driver = _driver(farm, places, name)
        if driver:
            yield from _fitting(farm, places, name, driver)
        if vm.template is not None and driver and not driver.virtual:
            words = f"a VM on {driver.called} is not made from a template"
            yield places.problem((*path, "template"), words)
        elif vm.template is not None and vm.template not in templates:
            yield places.problem(
                (*path, "template"), f"no template {quote(vm.template)}{_close(vm.template, templates)}"
            )
        elif vm.template is not None or driver is None or places.is_bad((*path, "template")):
            continue
        elif driver.virtual:
            if not templates and not places.is_bad(("templates",)):
                yield places.problem(
                    path, "it needs a template, and the file has no 'templates'", key=True
                )
            elif len(templates) > 1:
                words = f"which template? It needs 'template', one of: {_listed(templates)}"
                yield places.problem(path, words, key=True)


def _fitting(farm: Farm, places: Places, vm: str, driver: DriverInfo) -> Iterator[Problem]:
    """The VM's driver has the network's mode, and can boot what its template boots."""
    path: Path = ("vms", vm)
    if not driver.user_mode and farm.network.mode == "user" and not places.is_bad(("network",)):
        words = f"it is on {driver.called}: 'network' needs mode network or bridge"
        yield places.problem(path, words, key=True)
    template = farm.templates.get(farm.vms[vm].template or next(iter(farm.templates), ""))
    if template is None or places.is_bad((*path, "template")):
        return
    if template.boot and not driver.kernel_boot:
        words = f"it is on {driver.called}, which boots from the disk; its template has 'boot'"
        yield places.problem(path, words, key=True)
    if template.firmware == "efi" and "efi" not in driver.firmware:
        words = f"it is on {driver.called}, which can't start by EFI; its template has 'firmware: efi'"
        yield places.problem(path, words, key=True)


def _memory_and_disks(farm: Farm, places: Places) -> Iterator[Problem]:
    for name, path in _vms(farm, places):
        vm = farm.vms[name]
        hosts = [vm.host] if vm.host else list(farm.hosts)
        host = farm.hosts.get(hosts[0]) if len(hosts) == 1 else None
        if host and host.memory and vm.memory > host.memory and not places.is_bad((*path, "memory")):
            yield places.problem(
                (*path, "memory"),
                f"{format_size(vm.memory)} is more than the {format_size(host.memory)} "
                f"that host {hosts[0]} has for the farm",
            )
        templates = [vm.template] if vm.template else list(farm.templates)
        template = farm.templates.get(templates[0]) if len(templates) == 1 else None
        if not (template and template.build and vm.disk and vm.disk < template.size):
            continue
        if not places.is_bad(("templates", templates[0], "size")):
            yield places.problem(
                (*path, "disk"),
                f"{format_size(vm.disk)} is less than the {format_size(template.size)} "
                f"of template {templates[0]}",
            )


def _listed_machines(farm: Farm, places: Places) -> Iterator[Problem]:
    for name, path in _vms(farm, places):
        vm, driver = farm.vms[name], _driver(farm, places, name)
        if driver is None:
            continue
        if not driver.virtual and vm.address is None and not places.is_bad((*path, "address")):
            yield places.problem(path, f"a VM on {driver.called} needs 'address'", key=True)
        if driver.virtual and vm.reset:
            words = f"'reset' is for VMs on ssh hosts; driver {driver.name} resets this one itself"
            yield places.problem((*path, "reset"), words, key=True)
        for key in ("reset_to", "boot_instead"):
            if not driver.virtual and getattr(vm, key) and not places.is_bad((*path, key)):
                words = f"on {driver.called} there are no checkpoints; its 'reset' command resets it"
                yield places.problem((*path, key), words, key=True)


class _Taken:
    """Who has what. The second one to take something, in the order of the file, is told who has it."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._first: dict[object, Path] = {}

    def add(self, what: object, path: Path, shown: str, *, key: bool = False) -> Iterator[Problem]:
        if self._places.is_gone(path):
            return
        first = self._first.setdefault(what, path)
        if first == path:
            return
        whole = self._places.in_file(first)
        line, _ = self._places.of_value(whole)
        yield self._places.problem(
            path, f"{shown} is taken: {self._places.name(whole)} has it (line {line})", key=key
        )


def _names(farm: Farm, places: Places) -> Iterator[Problem]:
    domain = farm.network.domain
    taken = _Taken(places)

    def full(name: str) -> str:
        inside = domain is None or name == domain or name.endswith(f".{domain}")
        return name if inside or "." in name else f"{name}.{domain}"

    for name, path in _vms(farm, places):
        vm = farm.vms[name]
        machine = f"{farm.farm}-{name}"
        if len(machine) > 63 and not places.is_bad(("farm",)):
            yield places.problem(
                path, f"{quote(machine)}, farm and VM name together, is longer than 63", key=True
            )
        if vm.hostname is None and not places.is_bad((*path, "hostname")):
            if name.isdigit():
                yield places.problem(
                    path, "its name is a number: give it a 'hostname' that is not", key=True
                )
            yield from taken.add(full(name), path, f"host name {quote(name)}", key=True)
        elif vm.hostname is not None:
            yield from taken.add(
                full(vm.hostname), (*path, "hostname"), f"host name {quote(vm.hostname)}"
            )
    for name, path in _vms(farm, places):
        for number, alias in enumerate(farm.vms[name].aliases):
            yield from taken.add(full(alias), (*path, "aliases", number), f"name {quote(alias)}")
        for number, proxy in enumerate(farm.vms[name].proxy):
            place = (*path, "proxy", number, "name")
            yield from taken.add(full(proxy.name), place, f"name {quote(proxy.name)}")


def _identities(farm: Farm, places: Places) -> Iterator[Problem]:
    macs, addresses, ports, nat = (_Taken(places) for _ in range(4))
    for name, path in _vms(farm, places):
        vm, listed = farm.vms[name], _listed_only(farm, places, name)
        if vm.mac is not None:
            yield from macs.add(vm.mac, (*path, "mac"), vm.mac)
        if vm.address is not None:
            # such machines may stand behind one address, each with its port
            what = (vm.address, vm.ssh_port or 22) if listed else vm.address
            shown = f"{vm.address} port {vm.ssh_port or 22}" if listed else str(vm.address)
            yield from addresses.add(what, (*path, "address"), shown)
        on_loopback = farm.network.mode == "user" and _virtual(farm, places, name)
        if vm.ssh_port is not None and on_loopback:
            yield from ports.add(vm.ssh_port, (*path, "ssh_port"), f"port {vm.ssh_port}")
        if vm.nat_port is not None:
            yield from nat.add(vm.nat_port, (*path, "nat_port"), f"port {vm.nat_port}")


def _subnet(farm: Farm, places: Places) -> Iterator[Problem]:
    network = farm.network
    subnet = network.subnet
    if subnet is None:
        return
    for key in ("reserved", "pool"):
        for number, entry in enumerate(getattr(network, key)):
            if not all(address in subnet for address in parse_range(entry)):
                yield places.problem(("network", key, number), f"outside the subnet, {subnet}")
    ranges = network.reserved_ranges
    for name, path in _vms(farm, places):
        address = farm.vms[name].address
        if address is None or not _virtual(farm, places, name):
            continue
        problem = ""
        if address not in subnet:
            problem = f"outside the subnet, {subnet}"
        elif address == subnet.network_address:
            problem = "the network's own address"
        elif address == subnet.broadcast_address:
            problem = "the broadcast address"
        elif address == network.gateway:
            problem = "the gateway's address"
        else:
            for first, last in ranges:
                if first <= address <= last:
                    problem = f"reserved ({first}{f'-{last}' if last != first else ''})"
        if problem:
            yield places.problem((*path, "address"), f"{address} is {problem}")


def _room(farm: Farm, places: Places) -> Iterator[Problem]:
    """The subnet has enough addresses for the VMs that are given one from the pool."""
    network = farm.network
    subnet = network.subnet
    virtual = [name for name, _ in _vms(farm, places) if _virtual(farm, places, name)]
    if network.mode == "user" or not virtual or places.is_bad(("network",)):
        return
    wanting = [name for name in virtual if farm.vms[name].address is None]
    if subnet is None:
        if network.addressing == "static":
            yield places.problem(
                ("network",), "static addresses need 'subnet' (or set 'addressing: dhcp')", key=True
            )
        return
    low, high = int(subnet.network_address) + 1, int(subnet.broadcast_address) - 1
    taken = [(int(first), int(last)) for first, last in network.reserved_ranges]
    single = [network.gateway, *(farm.vms[name].address for name in virtual)]
    taken += [(int(address), int(address)) for address in single if isinstance(address, IPv4Address)]
    free, following = 0, low
    for first, last in sorted(taken):
        free += max(0, min(first, high + 1) - following)
        following = max(following, last + 1)
    free += max(0, high + 1 - following)
    if free < len(wanting):
        yield places.problem(
            ("network", "subnet"),
            f"{subnet} has {free} addresses left, and {len(wanting)} VMs want one",
        )


def _steps(farm: Farm, places: Places) -> Iterator[Problem]:
    """Names, VMs and fitness of the cycle's steps. It reads the file, not the model, so that steps that
    have something else wrong are looked at too."""
    steps = places.node(("cycle", "steps"))
    if not isinstance(steps, SequenceNode):
        return
    vms = _keys(places, "vms")
    named: dict[str, Path] = {}
    for number, step in enumerate(steps.items):
        if not isinstance(step, MappingNode):
            continue
        path: Path = ("cycle", "steps", number)
        name = step.values.get("name")
        if isinstance(name, ScalarNode) and (*path, "name") not in places.bad:
            first = named.setdefault(name.text, (*path, "name"))
            if first != (*path, "name"):
                yield _at(
                    places,
                    (*path, "name"),
                    f"a step of this name is in line {places.of_value(first)[0]}",
                )
        known = [kind for kind in kinds.steps if kind in step.keys]
        if len(known) != 1:
            continue
        section = step_section(known[0])
        for key in map(section.key_of, section.VMS):
            value = step.values.get(key)
            if not isinstance(value, ScalarNode) or (*path, key) in places.bad or not vms:
                continue
            if value.text not in vms:
                yield _at(places, (*path, key), f"no VM {quote(value.text)}{_close(value.text, vms)}")
    for number, accepted in enumerate(farm.cycle.steps if farm.cycle else ()):
        sound = all(
            vm in farm.vms and _driver(farm, places, vm) and not places.is_bad(("vms", vm))
            for vm in accepted.vms
        )
        if sound and (refused := accepted.refusal(farm)):
            key, text = refused
            yield places.problem(("cycle", "steps", number, key), text)


def _events(farm: Farm, places: Places) -> Iterator[Problem]:
    known = _keys(places, "vms")
    for name, subscriber in farm.events.items():
        for number, vm in enumerate(subscriber.vms):
            if vm not in known and ("vms",) not in places.bad:
                where = ("events", name, "vms", number)
                yield places.problem(where, f"no VM {quote(vm)}{_close(vm, known)}")


def _repositories(farm: Farm, places: Places) -> Iterator[Problem]:
    """Each in a directory that no other one has, or is in; and served by a service that there is."""
    known: dict[str, str] = {}
    for name, repository in farm.repositories.items():
        service, where = repository.serve, ("repositories", name, "serve")
        doubtful = places.is_bad(where) or places.is_bad(("services",))
        if service not in ("none", *farm.services.used) and not doubtful:
            text = f"'services' has no {service}, so nobody serves it: add '{service}: {{}}' there"
            yield places.problem(where, text)
        if repository.path is None or places.is_bad(("repositories", name, "path")):
            continue
        path = normpath(repository.path)
        for other, its in known.items():
            if commonpath((path, its)) in (path, its):
                how = "has the same directory" if path == its else f"is in {its}, or around it"
                where = ("repositories", name, "path")
                yield places.problem(where, f"repository {other} {how}: give each one its own")
        known[name] = path


def _packages(farm: Farm, places: Places) -> Iterator[Problem]:
    """What is built has a section that says how, and that names what there is."""
    build = farm.build
    if build is None:
        if farm.packages and ("build",) not in places.bad:
            text = "packages are built as 'build' says, and there is none"
            yield places.problem(("packages",), text, key=True)
        return
    if not farm.packages and build.sources is None and not places.bad:
        text = "nothing is built: 'packages', or its 'directory', say what"
        yield places.problem(("build",), text, key=True)
    vms = _keys(places, "vms")
    named: list[tuple[Path, str]] = [
        (("build", "builders", number), name) for number, name in enumerate(build.builders)
    ]
    if build.cloned is not None:
        named.append((("build", "cloned", "like"), build.cloned.like))
    for where, name in named:
        if name not in farm.vms and ("vms",) not in places.bad and not places.is_bad(where):
            yield places.problem(where, f"no VM {quote(name)}{_close(name, vms)}")
    repository = farm.repositories.get(build.repository)
    where = ("build", "repository")
    if repository is None:
        if not places.is_bad(where) and not places.is_bad(("repositories",)):
            known = list(farm.repositories)
            text = f"no repository {quote(build.repository)}{_close(build.repository, known)}"
            yield places.problem(where, text)
    elif build.channel not in repository.channels and not places.is_bad(("build", "channel")):
        text = f"repository {build.repository} has no channel {quote(build.channel)}"
        yield places.problem(("build", "channel"), text + _close(build.channel, repository.channels))


def _at(places: Places, path: Path, message: str) -> Problem:
    """Like ``places.problem``, of a path of the file."""
    return Problem(places.file, *places.of_value(path), f"{places.name(path)}: {message}")
