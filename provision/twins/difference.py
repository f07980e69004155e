"""What differs between two farms, by what their files mean: values with defaults, and VMs, steps and all
else that has a name by that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address
from pathlib import Path as FilePath

from inventory.leaves import Leaf, leaves, placed
from inventory.loader import loads
from inventory.model import Farm
from inventory.places import Path, Places
from inventory.reading import read
from inventory.yamltree import ScalarNode, parse
from provision.network.service import services
from provision.twins.own_values import MAY_BE_SHARED, common, own_values, pool_of, with_names
from repositories.places import directory


class DifferenceGroup(StrEnum):
    """``OWN``: each farm's own, as it must be, or may. ``CLASH``: the same in both, and must not be."""

    OWN = "own"
    DIFFERS = "differs"
    CLASH = "clash"


@dataclass(frozen=True, slots=True)
class DifferenceSide:
    """``value``: as the file says it, "" where it says nothing and there is no default."""

    value: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class FarmDifference:
    """``what``: its path, as messages have it."""

    group: DifferenceGroup
    what: str
    first: DifferenceSide
    second: DifferenceSide


@dataclass(frozen=True, slots=True)
class FarmFile:
    """A farm, and the places of what its file says."""

    farm: Farm
    places: Places

    @classmethod
    def read(cls, path: FilePath) -> FarmFile:
        """Errors: NotFound, InventoryError."""
        return cls.of(read(path), path)

    @classmethod
    def of(cls, data: bytes, path: FilePath) -> FarmFile:
        """As if that file held these bytes. InventoryError."""
        farm, (tree, _) = loads(data, path), parse(data, str(path))
        assert tree is not None
        return cls(farm, Places(tree, str(path)))

    def side(self, path: Path, value: str) -> DifferenceSide:
        return DifferenceSide(value, self.places.file, self.places.of_key(path)[0])

    def said(self, leaf: Leaf) -> DifferenceSide:
        """As the file has it, or else by default."""
        node = self.places.node(leaf.path)
        there = isinstance(node, ScalarNode) and node.text
        return self.side(leaf.path, leaf.shown(there) if there else str(leaf))


def differences(first: FarmFile, second: FarmFile) -> tuple[FarmDifference, ...]:
    """All, in the order of the model; what clashes comes last."""
    return (*_compared(first, second), *clashes(first, second))


# ---- What isn't the same


def _compared(first: FarmFile, second: FarmFile) -> Iterator[FarmDifference]:
    ours, theirs = _known(first.farm), _known(second.farm)
    grouped = _Groups(first.farm, second.farm)
    told: set[Path] = set()
    both = _prefixes(ours) & _prefixes(theirs)
    for key in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(key), theirs.get(key)
        if one and other:
            if placed(one, first.farm) != placed(other, second.farm):
                group = grouped.of(one, other)
                yield FarmDifference(group, _name(key), first.said(one), second.said(other))
            continue
        # the largest part of the file that the other one hasn't
        whole = next(key[:size] for size in range(1, len(key) + 1) if key[:size] not in both)
        if whole in told:
            continue
        told.add(whole)
        leaf = one or other
        assert leaf is not None
        path = leaf.path[: len(whole)]
        here, there = (first, second) if one else (second, first)
        has = here.said(leaf) if whole == key else here.side(path, "there")
        lacks = there.side(_as_far_as(there, path), "")
        sides = (has, lacks) if one else (lacks, has)
        yield FarmDifference(grouped.alone(whole), _name(whole), *sides)
    yield from _order(first, second)


def _known(farm: Farm) -> Mapping[Path, Leaf]:
    """All leaves by their keys, with what follows from others where the file says nothing."""
    found = {leaf.key: leaf for leaf in leaves(farm)}

    def follows(path: Path, value: object) -> None:
        if value is not None and path not in found:
            found[path] = Leaf(path, path, "", value)

    for name, vm in farm.vms.items():
        template = farm.template_of(name)
        follows(("vms", name, "host"), farm.host_of(name))
        follows(("vms", name, "template"), template)
        follows(("vms", name, "hostname"), farm.hostname_of(name))
        if template and farm.templates[template].build and vm.disk is None:
            size = farm.templates[template].size
            found["vms", name, "disk"] = Leaf(("vms", name, "disk"), ("vms", name, "disk"), "Size", size)
    for name, source in farm.templates.items():
        follows(("templates", name, "firstboot"), source.first_boot)
    for name in farm.repositories:
        follows(("repositories", name, "path"), str(directory(farm, name)))
    return found


def _prefixes(known: Mapping[Path, Leaf]) -> set[Path]:
    return {key[:size] for key in known for size in range(len(key) + 1)}


def _as_far_as(file: FarmFile, path: Path) -> Path:
    """The part of a path that this file has, too."""
    return next(path[:size] for size in range(len(path), -1, -1) if file.places.node(path[:size]))


def _order(first: FarmFile, second: FarmFile) -> Iterator[FarmDifference]:
    one, other = (
        [step.name for step in farm.cycle.steps] if farm.cycle else []
        for farm in (first.farm, second.farm)
    )
    both = [name for name in one if name in other]
    if both != [name for name in other if name in one]:
        path: Path = ("cycle", "steps")
        sides = first.side(path, ", ".join(one)), second.side(path, ", ".join(other))
        yield FarmDifference(DifferenceGroup.DIFFERS, "order of cycle.steps", *sides)


def _name(key: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)[1:]


# ---- What is a farm's own

_NETWORK = (
    "bridge", "network", "domain", "subnet", "gateway", "nameservers", "reserved", "subnet6", "gateway6",
    "pool",
)  # fmt: skip
_OWN: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "network": (2, _NETWORK),
    "vms": (3, ("hostname", "mac", "address", "address6", "ssh_port")),
    "source": (2, ("revision",)),
    "build": (2, ("revision",)),
}
"""By the section: how long the keys are, and what they end with."""
_OWN_IN_BOTH = {
    "vms": {"nat_port", "name", "access_log"},
    "repositories": {"path", "url", "incoming"},
}
"""That one of the farms hasn't it at all is another matter."""


class _Groups:
    def __init__(self, first: Farm, second: Farm) -> None:
        self._farms = first, second
        self._apart = {(s.NAME, key) for farm in self._farms for s in services(farm) for key in s.APART}

    def of(self, one: Leaf, other: Leaf) -> DifferenceGroup:
        key = one.key
        own = self.alone(key) is DifferenceGroup.OWN
        own = own or key[-1] in _OWN_IN_BOTH.get(str(key[0]), ())
        own = own or key in (("farm",), ("cycle", "lock", "webdav"))
        if key[0] == "vms" and key[-1] == "aliases":
            own = _count(one.value) == _count(other.value)
        if key[0] == "vms" and key[-1] == "reset":
            own = self._same_command(str(key[1]), one, other)
        return DifferenceGroup.OWN if own else DifferenceGroup.DIFFERS

    def alone(self, key: Path) -> DifferenceGroup:
        """Of what one of them only may have."""
        depth, keys = _OWN.get(str(key[0]), (0, ()))
        own = len(key) == depth and key[-1] in keys
        if key[0] == "services" and len(key) == 3:
            own = key[1:] in self._apart
        return DifferenceGroup.OWN if own else DifferenceGroup.DIFFERS

    def _same_command(self, vm: str, *leaves: Leaf) -> bool:
        """But for the machine that it resets."""
        commands = []
        for farm, leaf in zip(self._farms, leaves, strict=True):
            names = (farm.machine_of(vm), farm.hostname_of(vm), str(farm.vms[vm].address))
            words = leaf.value if isinstance(leaf.value, tuple) else ()
            commands.append(with_names(words, dict.fromkeys(names, "*")))
        return commands[0] == commands[1]


def _count(value: object) -> int:
    return len(value) if isinstance(value, tuple) else 1


# ---- What is the same, and must not be


def clashes(first: FarmFile, second: FarmFile) -> Iterator[FarmDifference]:
    """What both have, where only one may; and addresses that both may give to somebody."""
    known = {(own.kind, own.value): own for own in own_values(first.farm)}
    for own in own_values(second.farm):
        other = known.get((own.kind, own.value))
        if other is not None and own.kind not in MAY_BE_SHARED:
            sides = first.side(other.path, own.value), second.side(own.path, own.value)
            yield FarmDifference(DifferenceGroup.CLASH, f"{own.kind} ({_name(own.path)})", *sides)
    for low, high in both_may_give(first.farm, second.farm):
        text = f"{low}-{high}" if low != high else str(low)
        path: Path = ("network", "reserved")
        both = first.side(path, text), second.side(path, text)
        yield FarmDifference(DifferenceGroup.CLASH, "addresses that both may give out", *both)


def both_may_give(first: Farm, second: Farm) -> Iterator[tuple[IPv4Address, IPv4Address]]:
    """Stretches that one farm may give to a VM and the other has, or may give, too."""
    gives, has = [], []
    for farm in (first, second):
        virtual = [farm.vms[vm] for vm in farm.vms if farm.driver_of(vm).virtual]
        gives.append(pool_of(farm) if any(vm.address is None for vm in virtual) else ())
        has.append(tuple((int(vm.address), int(vm.address)) for vm in virtual if vm.address))
    found = {*common(gives[0], (*gives[1], *has[1])), *common(gives[1], has[0])}
    beyond = -1
    for low, high in sorted(found, key=lambda run: (run[0], -run[1])):
        if high > beyond:  # else it is in another one
            yield IPv4Address(low), IPv4Address(high)
            beyond = high
