"""What there is from outside the set: the archive's packages, as far as they are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from builds.packages.relations import Relation


class Outside(Protocol):
    """Whoever knows what can be had without being built."""

    def has(self, relation: Relation) -> bool: ...


class Everything:
    """Nothing is known of the archive: what the set doesn't make is taken to be there."""

    def has(self, relation: Relation) -> bool:
        del relation
        return True


@dataclass(frozen=True, slots=True)
class KnownPackages:
    """``versions``: of packages, by name; "": there, in a version that isn't known. ``provided``: of
    virtual packages, by name; None: without one."""

    versions: Mapping[str, tuple[str, ...]]
    provided: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)

    @classmethod
    def named(cls, names: Iterable[str]) -> KnownPackages:
        return cls(dict.fromkeys(names, ("",)))

    def has(self, relation: Relation) -> bool:
        return any(map(relation.admits, self.versions.get(relation.name, ()))) or any(
            map(relation.admits, self.provided.get(relation.name, ()))
        )
