"""A libvirt network, changed live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from provision.network.document import Document
from provision.network.service import Apart, ApplyStep, Checker, Service, Unserved
from provision.network.templating import Word

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.errors import FarmhandError, Problem
    from inventory.fields import ConfigPath, Interface, Line
    from inventory.model import Farm
    from inventory.places import Path as Place
    from inventory.places import Places
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.service import OtherNames


def _string(text: str) -> Word:
    from xml.sax.saxutils import escape

    return Word(escape(text, {'"': "&quot;", "'": "&apos;"}))


@dataclass(frozen=True, kw_only=True)
class LibvirtNetwork(Service):
    """A libvirt network that gives the VMs their addresses and names."""

    NAME: ClassVar = "libvirt"
    NEEDS_SUBNET: ClassVar = True
    PLAIN_NETWORK: ClassVar = True
    MAKES_NETWORK: ClassVar = True
    APART: ClassVar = ("config", "bridge")
    TOOLS: ClassVar = {"virt-xml-validate": "libvirt-clients", "xmllint": "libxml2-utils"}
    STRINGS: ClassVar = {"libvirt": _string}

    config: ConfigPath = "/var/lib/farmhand/farmhand-network.xml"
    """The file that it is defined from."""
    bridge: Interface | None = None
    """The bridge libvirt makes; absent: it chooses."""
    forward: Literal["nat", "route", "none"] = "nat"
    """How it is connected to the outside."""
    uri: Line = "qemu:///system"
    """The libvirt that it is in: its URI."""

    @property
    def whole(self) -> tuple[str, ...]:
        return ("config", "bridge") if self.bridge else ("config",)

    def apart(self, other: OtherNames) -> Apart:
        """The network itself, and its subnet, are in the section of that name."""
        keys = {"config": other.path(self.config)}
        return Apart({**keys, "bridge": other.link(self.bridge)} if self.bridge else keys)

    def problems(self, farm: Farm, places: Places) -> Iterator[Problem]:
        path: Place = ("services", self.NAME)
        if farm.network.mode == "bridge":
            yield places.problem(path, "it is for mode network; the mode is bridge", key=True)
        if farm.network.gateway is None:
            words = "'network' needs 'gateway': libvirt's own address"
            yield places.problem(path, words, key=True)

    def documents(self, r: Renderer) -> Iterator[Document]:
        text = r.render("libvirt", self, network=r.farm.network.network, **r.dhcp())
        yield Document(self.NAME, self.config, text, comment=("<!-- ", " -->"))

    def checkers(self, _farm: Farm, documents: Sequence[Document]) -> Iterator[Checker]:
        for document in documents:
            yield Checker(("virt-xml-validate", document.path, "network"))

    def missing(
        self, farm: Farm, _files: Sequence[FileChange], _runner: Runner
    ) -> Iterator[FarmhandError]:
        from hypervisors.libvirt.network import lacks

        lacks(self.uri, farm.network.network or "")  # an error where libvirt can't be asked
        yield from ()

    def unserved(self, farm: Farm, files: Sequence[FileChange], _runner: Runner) -> Iterator[Unserved]:
        from hypervisors.libvirt.network import lacks

        name = farm.network.network or ""
        for change in files:
            if (text := lacks(self.uri, name)) is not None:
                yield Unserved(text, self._define(name, change.after or ""))

    def _define(self, name: str, text: str) -> ApplyStep:
        words = f"libvirt: define the network {name}, and change it live"
        return ApplyStep(self.NAME, words, partial(_set, self.uri, text))

    def steps(self, farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        name = farm.network.network or ""
        for change in changes:
            if not change.after:
                text, run = f"libvirt: remove the network {name}", partial(_drop, self.uri, name)
                yield ApplyStep(self.NAME, text, run)
            else:
                yield self._define(name, change.after)

    def not_live(self) -> Iterator[str]:
        yield "hosts are changed live; what else changes, at the network's next start"


def _set(uri: str, text: str, _runner: Runner) -> None:
    from hypervisors.libvirt.network import set_network

    set_network(uri, text)


def _drop(uri: str, name: str, _runner: Runner) -> None:
    from hypervisors.libvirt.network import drop_network

    drop_network(uri, name)
