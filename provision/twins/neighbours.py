"""The other farms that this state directory knows, and what is taken on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from host.documents import json_object, read_file
from host.paths import FarmPaths, cache_dir, state_dir
from inventory.errors import FarmhandError
from inventory.model import Farm
from provision.allocate import Allocator, lock_file_of, port_free
from provision.claims import Claims
from provision.farm_cache import known_farm
from provision.twins.own_values import OwnKind, own_values


@dataclass(frozen=True, slots=True)
class Neighbours:
    """``unread``: farms of this state directory whose files can't be read, in words."""

    farms: tuple[Farm, ...]
    unread: tuple[str, ...] = ()


def neighbours() -> Neighbours:
    """All farms that have state here."""
    farms, unread = [], []
    for directory in sorted((state_dir() / "farms").glob("*")):
        try:
            noted = json_object(read_file(directory / "identity.json")).get("file")
            farm = known_farm(Path(str(noted)), cache_dir(), keep=False)
        except FileNotFoundError:  # it never made anything
            continue
        except (OSError, ValueError, FarmhandError) as error:
            text = error.message if isinstance(error, FarmhandError) else str(error)
            unread.append(f"{directory.name}: {text.splitlines()[0]}")
            continue
        if farm.farm == directory.name:
            farms.append(farm)
        else:
            unread.append(f"{directory.name}: {farm.path} is another farm's file by now")
    return Neighbours(tuple(farms), tuple(unread))


def addresses_of(farm: Farm) -> frozenset[int]:
    """What the farm's machines have, were given, or would be given now, as numbers."""
    found = {int(vm.address) for vm in farm.vms.values() if vm.address}
    if farm.network.subnet is None or farm.network.mode == "user":
        return frozenset(found)
    allocator = Allocator(farm, lock_file_of(farm, FarmPaths(farm.farm)))
    virtual = [vm for vm in farm.vms if farm.driver_of(vm).virtual]
    for given in (allocator.recorded(), allocator.peek_all(virtual)):
        found |= {int(one.address) for one in given.values() if one.address}
    return frozenset(found)


class TakenHere:
    """What somebody on this machine has: values of these farms, MACs and ports that were given out, and
    ports that are listened on. What is chosen is to be added."""

    def __init__(self, farms: Iterable[Farm]) -> None:
        self._values = {(own.kind, own.value): farm.farm for farm in farms for own in own_values(farm)}

    def holder(self, kind: OwnKind, value: str) -> str:
        """The farm that has it; "": none that is known."""
        return self._values.get((kind, value), "")

    def add(self, kind: OwnKind, value: str, farm: str) -> None:
        self._values[kind, value] = farm

    def mac(self, mac: str) -> bool:
        return bool(self.holder(OwnKind.MAC, mac)) or self._claimed(mac)

    def port(self, port: int) -> bool:
        known = self.holder(OwnKind.PORT, str(port))
        return bool(known) or self._claimed(str(port)) or not port_free(port)

    @staticmethod
    def _claimed(key: str) -> bool:
        with Claims(state_dir() / "claims.db").reading() as claims:
            return claims.owner(key) is not None
