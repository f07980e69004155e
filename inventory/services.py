"""Which network services a farm uses. A service's own section stands with all else that is known of it
(``provision.network.services`` lists them); what every section says to the loader is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, TypeVar

from inventory import kinds
from inventory.base import Model

if TYPE_CHECKING:
    from inventory.errors import Problem
    from inventory.fields import ConfigPath
    from inventory.model import Farm
    from inventory.places import Places


@dataclass(frozen=True, kw_only=True)
class ServiceSection(Model):
    """A service's section of a farm file. What is not in the file is not rendered and not touched. A
    service with all its defaults is its name alone: ``hosts:``."""

    NAME: ClassVar[str]
    """Its key below ``services``."""
    NEEDS_ADDRESSES: ClassVar[bool] = True
    """VMs without addresses are no use to it."""
    NEEDS_SUBNET: ClassVar[bool] = False
    PLAIN_NETWORK: ClassVar[bool] = False
    """It uses the network's name as libvirt does."""
    FILES: ClassVar[tuple[str, ...]] = ("config",)
    """Keys of files that no other service may have."""

    @property
    def ports(self) -> tuple[str, ...]:
        """Keys of the ports of ``address`` that it listens on."""
        return ()

    def problems(self, _farm: Farm, _places: Places) -> Iterator[Problem]:
        """What it asks of the rest of the file, beyond the above."""
        yield from ()


S = TypeVar("S", bound=ServiceSection)


@dataclass(frozen=True, kw_only=True)
class Services(Model):
    """Which network services are kept in step with the farm. What isn't named is not touched."""

    templates: ConfigPath | None = None
    """A directory with templates of your own: a file of the same name is used instead of farmhand's."""

    @property
    def sections(self) -> tuple[ServiceSection, ...]:
        """Those named, in the order they are applied: names before who looks them up."""
        found = (getattr(self, name, None) for name in kinds.services)
        return tuple(section for section in found if section is not None)

    @property
    def used(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(section.NAME for section in self.sections)

    def get(self, kind: type[S]) -> S | None:
        return next((section for section in self.sections if isinstance(section, kind)), None)


def declared() -> type[Services]:
    """What ``services`` is in a file: with a key for each service that there is."""
    return _declared(tuple(kinds.services.items()))


@cache
def _declared(places: tuple[tuple[str, str], ...]) -> type[Services]:
    keys = [(name, f"{place.rpartition(':')[2]} | None", field(default=None)) for name, place in places]
    return make_dataclass(
        kinds.ALL_SERVICES,
        keys,
        bases=(Services,),
        namespace={"__module__": __name__, "__doc__": Services.__doc__},
        frozen=True,
        kw_only=True,
    )
