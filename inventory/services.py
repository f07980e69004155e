"""What ``services`` is in a farm file: it has a key for each service that there is
(``provision.network.services`` lists them)."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from functools import cache

from inventory import kinds
from inventory.base import Model
from inventory.model import Services, ServiceSection


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


def serving() -> tuple[str, ...]:
    """The services that serve package repositories."""
    found = ((name, kinds.load(place, ServiceSection)) for name, place in kinds.services.items())
    return tuple(name for name, kind in found if kind.SERVES_REPOSITORIES)


def section_named(name: str) -> type[Model] | None:
    """A section of one of the kinds, that of all services, or one that few farms have, by its class's
    name. None: there is no such section."""
    return declared() if name == kinds.ALL_SERVICES else kinds.section(name) or _of_few_farms(name)


def _of_few_farms(name: str) -> type[Model] | None:
    from inventory import packages, repositories  # imported where a farm has them only

    found = getattr(packages, name, None) or getattr(repositories, name, None)
    return found if isinstance(found, type) and issubclass(found, Model) else None
