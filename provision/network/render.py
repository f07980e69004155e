"""Every file of a farm's network services, from the model alone: no clock, no disk, no daemon."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from zlib import crc32

from inventory.model import Farm
from provision.allocate import Allocation
from provision.network.document import Document
from provision.network.renderer import Renderer
from provision.network.service import Service
from provision.network.service import services as used
from provision.network.view import VmRow

SHARDS = 64
"""Files that a service's hosts are spread over."""


def documents_of(renderer: Renderer, services: Collection[str] | None = None) -> tuple[Document, ...]:
    """Of the services the farm uses, or of those among them, in the order they are applied.
    TemplateFailed, Conflict."""
    meant = [s for s in used(renderer.farm) if services is None or s.NAME in services]
    return tuple(document for service in meant for document in service.documents(renderer))


def render(
    farm: Farm,
    allocations: Mapping[str, Allocation],
    *,
    serials: Mapping[str, int] | None = None,
    services: Collection[str] | None = None,
) -> tuple[Document, ...]:
    """All documents. TemplateFailed, Conflict."""
    return documents_of(Renderer(farm, allocations, serials=serials), services)


def part_of(farm: Farm, vms: Mapping[str, Any]) -> Farm:
    """The farm with only these of its VMs."""
    return replace(farm, vms=dict(vms)).at(farm.path)


def host_files(
    farm: Farm,
    allocations: Mapping[str, Allocation],
    vms: Collection[str],
    services: Collection[Service],
    known: Collection[str],
) -> tuple[tuple[Document, ...], set[str]]:
    """Of services that spread their hosts over files: the files that have these VMs in them, or had, and
    the configurations that include them: documents, and all paths that the former may have. ``known``:
    paths of all files that are there."""
    shards = {_shard(vm) for vm in vms}
    names = [vm for vm in farm.vms if crc32(vm.encode()) % SHARDS in shards]  # _shard, of thousands
    some = {vm: farm.vms[vm] for vm in names if vm in allocations}
    places = [place for service in services for place in service.host_files(farm)]
    paths = {f"{begin}{shard:02}{end}" for begin, end in places for shard in shards}
    configs = {path for service in services for path in service.including}
    others = {path for path in known if path not in paths}
    renderer = Renderer(part_of(farm, some), allocations, others=others)
    documents = documents_of(renderer, [service.NAME for service in services])
    return tuple(d for d in documents if d.path in paths or d.path in configs), paths


def _shard(vm: str) -> int:
    return crc32(vm.encode()) % SHARDS


def sharded(rows: Iterable[VmRow]) -> Iterator[tuple[str, list[VmRow]]]:
    """The hosts of each file, and the number in its name: one VM more rewrites a small one."""
    shards: dict[int, list[VmRow]] = {}
    for row in rows:
        shards.setdefault(_shard(row.vm), []).append(row)
    for shard, some in sorted(shards.items()):
        yield f"{shard:02}", some
