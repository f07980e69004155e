"""Other farms that have this one's name, where this one makes its VMs: told, and never touched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, Text, some
from inventory.values import LABEL
from provision.site import Site


@dataclass(frozen=True, slots=True)
class Namesake:
    """A VM of such a farm; or its disk alone."""

    host: str
    machine: str
    vm: str
    whose: FarmIdentity


@dataclass(frozen=True, slots=True)
class NamesakeTemplate:
    """A sealed generation of such a farm."""

    host: str
    label: str
    whose: FarmIdentity


def namesakes(site: Site, host: str) -> Sequence[Namesake]:
    """What they have on this host, by a look at it."""
    found = []
    for other in site.hypervisor(host, look=True).others():
        if match := re.fullmatch(rf"{site.farm.farm}-({LABEL})", other.machine):
            found.append(Namesake(host, other.machine, match[1], other.owner.farm))
    return found


def templates_of_namesakes(site: Site, host: str) -> Sequence[NamesakeTemplate]:
    """The generations that they have in the host's store, by a look at it."""
    if not site.has_disks(host):
        return []
    return [
        NamesakeTemplate(host, template.label, template.farm)
        for template in site.disks(host).templates()
        if template.farm is not None and template.farm.is_namesake(site.identity)
    ]


def told(site: Site, host: str) -> Iterator[Text]:
    """A line for each such farm."""
    found = namesakes(site, host)
    sealed = templates_of_namesakes(site, host)
    for whose in dict.fromkeys([*(one.whose for one in found), *(one.whose for one in sealed)]):
        things = [one.machine for one in found if one.whose == whose]
        things += [f"template {one.label}" for one in sealed if one.whose == whose]
        yield (
            f"host {host}: another farm called {whose} is here, left alone: {some(things)}; if "
            "that farm is to end: ",
            Call("adopt"),
        )
