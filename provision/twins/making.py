"""A second farm's file, made from a first one's: the same templates and builds, with names, addresses,
ports and paths of its own.

What is to be its own is said by ``provision.twins.own_values``, and of each service by the service. The
first file's text is changed at these places only, so its comments, order and formatting stay. The result
is loaded, and compared with all farms that are known here, before it is written.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from host.files import file_error, sync, write_new
from host.paths import FarmPaths
from host.printable import one_line
from inventory.errors import Conflict, InventoryError, NotFound, UnknownName, UsageError, some
from inventory.farm_text import FarmText
from inventory.leaves import relative_paths
from inventory.model import Farm, Vm
from inventory.places import Path as Place
from inventory.reading import read
from inventory.sizes import format_size
from provision.network.service import services
from provision.twins.addresses import TwinAddresses, overlap, stretch
from provision.twins.asked import OTHERS, TwinAsked
from provision.twins.difference import (
    DifferenceGroup,
    FarmDifference,
    FarmFile,
    both_may_give,
    differences,
)
from provision.twins.names import TwinNames
from provision.twins.neighbours import TakenHere, neighbours
from provision.twins.own_values import MAY_BE_SHARED, OwnKind, own_values, with_names


@dataclass(frozen=True, slots=True)
class Twin:
    """``text``: of its file; ``mode``: as the first one's, who may keep it to himself. ``own``: where it
    differs from that. ``notes``: what the admin has to see to."""

    farm: str
    file: Path
    of: Path
    text: str
    mode: int
    own: tuple[FarmDifference, ...]
    notes: tuple[str, ...]

    def write(self) -> None:
        """Conflict: a file is there already."""
        _check_place(self.file)
        fresh = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:
            write_new(fresh, _encoded(self.text), mode=self.mode)
            self.file.hardlink_to(fresh)  # which replaces nothing
            sync(self.file.parent)
        except FileExistsError:
            raise _there(self.file) from None
        except OSError as error:
            raise file_error(error, self.file, "write") from error
        finally:
            fresh.unlink(missing_ok=True)


def twin_of(first: Path, asked: TwinAsked) -> Twin:
    """The twin's file; nothing is written. Errors: NotFound and InventoryError (of the first file),
    UsageError (what was asked can't be), Conflict (something of it is taken)."""
    data = read(first)
    maker = _TwinMaker(FarmFile.of(data, first), FarmText(data, first), asked)
    _check_place(asked.out)
    return maker.made()


def _check_place(path: Path) -> None:
    if os.path.lexists(path):
        raise _there(path)
    if not path.parent.is_dir():
        raise NotFound(f"there is no directory {path.parent}", remedy="make it, or give another")


def _there(path: Path) -> Conflict:
    return Conflict(f"{path} is there already: nothing is overwritten", remedy="--out ANOTHER")


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # of paths


class _TwinMaker:
    """Implements ``provision.network.service.OtherNames``."""

    def __init__(self, file: FarmFile, text: FarmText, asked: TwinAsked) -> None:
        self._file, self._text, self._asked = file, text, asked
        self._first = first = file.farm
        self._around = around = neighbours()
        self._others = tuple(one for one in around.farms if one.farm != first.farm)
        known = {first.farm, *(farm.farm for farm in around.farms)}
        if asked.name in known or FarmPaths(asked.name).root.exists():
            raise Conflict(f"there is a farm {asked.name} here already", remedy="--as ANOTHER")
        taken = TakenHere((first, *self._others))
        self._names = TwinNames(first, asked.name, taken)
        self._addresses = TwinAddresses(first, self._others, asked, taken)
        self._notes: list[str] = []

    def made(self) -> Twin:
        asked, first, text = self._asked, self._first, self._text
        self._check_vms()
        text.set(("farm",), asked.name)
        self._network()
        for name, vm in first.vms.items():
            if text.has(
                ("vms", name)
            ):  # those made for builds have nothing but what their farm gives them
                self._vm(name, vm)
        self._services()
        self._repositories()
        self._builds()
        if asked.out.parent.resolve() != first.path.parent.resolve():
            for place, path in relative_paths(first):
                text.set(place, path)
        self._resources()
        twin = self._loaded(text.text(self._head())).farm
        self._check_nothing_shared(twin)
        self._note_pools(twin)
        self._notes += self._addresses.notes
        self._notes += (f"not looked at: farm {one}" for one in self._around.unread)
        whole = text.text(self._head())
        found = differences(self._file, self._loaded(whole))
        own = tuple(one for one in found if one.group is DifferenceGroup.OWN)
        mode = stat.S_IMODE(first.path.stat().st_mode)
        return Twin(asked.name, asked.out, first.path, whole, mode, own, tuple(self._notes))

    # ---- What services ask

    @property
    def domain(self) -> str:
        return self._names.domain

    @property
    def same_subnet(self) -> bool:
        return self._addresses.subnet is None

    def path(self, path: str) -> str:
        return self._names.file(path)

    def link(self, name: str) -> str:
        return self._names.link(name)

    def port(self, port: int) -> str:
        return self._addresses.port(port)

    # ---- Sections

    def _check_vms(self) -> None:
        """Listed machines are there already: only the admin knows which are the twin's."""
        first, asked = self._first, self._asked
        for flag, known in (("--address", asked.endpoints), ("--hostname", asked.hostnames)):
            if unknown := [vm for vm in known if vm not in first.vms]:
                words = f"{flag}: there is no VM {unknown[0]!r}"
                raise UnknownName(words, remedy=f"it has {some(first.vms)}")
        listed = [vm for vm in first.vms if not first.driver_of(vm).virtual]
        if unsaid := [vm for vm in listed if vm not in asked.endpoints]:
            raise UsageError(
                f"which machines are the twins of {some(unsaid)}? farmhand doesn't make those",
                remedy=" ".join(f"--address {vm}=ADDRESS" for vm in unsaid),
            )

    def _network(self) -> None:
        net, text, names, addresses = self._first.network, self._text, self._names, self._addresses
        if names.domain != names.old_domain:
            text.set(("network", "domain"), names.domain)
        if reserved := addresses.reserved():
            text.add(("network", "reserved"), reserved)
        for place, value in addresses.network():
            text.set(place, value)
        if addresses.makes_network:
            link = names.take(OwnKind.LINK, names.word(net.network or ""))
            text.set(("network", "network"), link)
        elif addresses.subnet:
            told = dict(addresses.network())
            by = f" by {told['network', 'gateway']}" if net.gateway else ""
            self._notes.append(
                f"network: {net.bridge or net.network} must lead to {addresses.subnet}{by}"
            )

    def _vm(self, name: str, vm: Vm) -> None:
        text, names, addresses = self._text, self._names, self._addresses
        here: Place = ("vms", name)
        own_port = self._first.network.mode == "user" and self._first.driver_of(name).virtual
        old = self._first.hostname_of(name)
        hostname = self._asked.hostnames.get(name) or names.host(old)
        text.set((*here, "hostname"), hostname)
        for number, alias in enumerate(vm.aliases):
            text.set((*here, "aliases", number), names.host(alias))
        for number, proxy in enumerate(vm.proxy):
            served = names.served(proxy.name)
            text.set((*here, "proxy", number, "name"), served)
            if proxy.access_log:
                text.set((*here, "proxy", number, "access_log"), names.file(proxy.access_log))
            tls = f"; {proxy.certificate} must hold for it" if proxy.certificate else ""
            self._notes.append(f"{name}: {served} must lead to this machine{tls}")
        if vm.mac:
            text.set((*here, "mac"), addresses.mac(name, vm.mac))
        if address := addresses.address(name):
            text.set((*here, "address"), str(address))
        if vm.address6:
            text.set((*here, "address6"), str(addresses.address6(vm.address6)))
        endpoint = self._asked.endpoints.get(name)
        if endpoint and endpoint.port:
            text.set((*here, "ssh_port"), str(endpoint.port))
        elif vm.ssh_port and own_port:
            text.set((*here, "ssh_port"), addresses.port(vm.ssh_port))
        if vm.nat_port:
            text.set((*here, "nat_port"), addresses.port(vm.nat_port))
        if vm.reset:
            machines = self._first.machine_of(name), f"{self._asked.name}-{name}"
            self._reset(
                name, vm, {old: hostname, str(vm.address): str(address), machines[0]: machines[1]}
            )

    def _reset(self, name: str, vm: Vm, names: Mapping[str, str]) -> None:
        """Of a listed machine: by a command that names it. One that doesn't would reset the first farm's
        machine."""
        words = with_names(vm.reset, names)
        if words == vm.reset:
            place = self._file.side(("vms", name, "reset"), "")
            raise UsageError(
                f"{place}: it names neither address nor host name of {name}: the second farm "
                "would reset the first one's machine",
                remedy="have the command name the machine (an argument), then again",
            )
        for number, (old, word) in enumerate(zip(vm.reset, words, strict=True)):
            if word != old:
                self._text.set(("vms", name, "reset", number), word)

    def _services(self) -> None:
        for service in services(self._first):
            apart = service.apart(self)
            for key, value in apart.keys.items():
                self._text.set(("services", service.NAME, key), value)
            if apart.note:
                self._notes.append(f"{service.NAME}: {apart.note}")

    def _repositories(self) -> None:
        for name, section in self._first.repositories.items():
            here: Place = ("repositories", name)
            for key in ("path", "incoming"):
                if path := getattr(section, key):
                    self._text.set((*here, key), self._names.directory(path))
            if section.url:
                url = self._names.url(section.url, serve=section.serve)
                self._text.set((*here, "url"), url)
                tls = f"; {section.certificate} must hold for it" if section.certificate else ""
                self._notes.append(f"repository {name}: {url} must lead to it{tls}")

    def _builds(self) -> None:
        first, text = self._first, self._text
        if revision := self._asked.revision:
            if first.source is None and first.build is None:
                what = "it has neither 'source' nor 'build'"
                raise UsageError(f"--revision: the farm builds nothing: {what}")
            for section in ("source", "build"):
                if text.has((section,)):
                    text.set((section, "revision"), revision)
        if first.cycle and first.cycle.lock:
            # its cycles disturb nobody's of the first farm: they need not wait for each other
            head, _, last = first.cycle.lock.webdav.rpartition("/")
            text.set(("cycle", "lock", "webdav"), f"{head}/{self._names.word(last)}")

    # ---- The whole

    def _head(self) -> list[str]:
        """The file's first comments."""
        when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
        made = (
            f"Made by farm-twin from {self._first.path}, {when}: names, addresses and ports are its own."
        )
        return [one_line(line) for line in (made, "What differs later: farm-diff.", *self._notes)]

    def _resources(self) -> None:
        first = self._first
        for host in dict.fromkeys(map(first.host_of, first.vms)):
            if memory := first.hosts[host].memory:
                own, both = format_size(memory), format_size(2 * memory)
                self._notes.append(f"host {host}: each farm keeps to its own {own}, together {both}")

    def _check_nothing_shared(self, twin: Farm) -> None:
        taken = TakenHere((self._first, *self._others))
        for own in own_values(twin):
            if own.kind not in MAY_BE_SHARED and (holder := taken.holder(own.kind, own.value)):
                raise Conflict(f"{own.kind} {own.value} is farm {holder}'s already", remedy=OTHERS)

    def _note_pools(self, twin: Farm) -> None:
        for other in (self._first, *self._others):
            if twin.network.subnet is None or not overlap(other, twin.network.subnet):
                continue
            for low, high in both_may_give(other, twin):
                words = f"both farms may give out {stretch(low, high)}: add that to 'reserved' there"
                self._notes.append(f"{other.path}: {words}")

    def _loaded(self, text: str) -> FarmFile:
        """As it is loaded once it is written."""
        try:
            return FarmFile.of(_encoded(text), self._asked.out)
        except InventoryError as error:
            raise UsageError(
                f"the second farm's file would not load: {error.problems[0].message}",
                remedy="give the names, addresses or ports yourself; or change that in the first file",
                detail="\n".join(map(str, error.problems)),
            ) from error
