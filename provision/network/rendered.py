"""render: the files as they should be, shown or written to a directory; nothing live is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from host.files import make_directory, write_atomic
from hypervisors.ownership import FarmIdentity
from inventory.collector import without_collector
from inventory.errors import UnknownName, UsageError, did_you_mean
from provision.network.document import Document, embed, whole
from provision.network.render import render
from provision.site import Site


@dataclass(frozen=True, slots=True)
class Rendered:
    """``text``: all of a file; of a block the block alone, with its marks."""

    document: Document
    text: str


def chosen(site: Site, services: Sequence[str]) -> tuple[str, ...]:
    """The services named; all that the farm uses if none is. Errors: UnknownName, UsageError."""
    used = site.farm.services.used
    if not used:
        raise UsageError(
            f"{site.name}: the farm uses no network service",
            remedy="name them under 'services:' (docs/network.md)",
        )
    for name in services:
        if name not in used:
            raise UnknownName(
                f"{site.name}: the farm uses no service {name!r}",
                remedy=did_you_mean(name, used, f"it uses {', '.join(used)}"),
            )
    return tuple(name for name in used if not services or name in services)


@without_collector()
def rendered(site: Site, services: Sequence[str] = ()) -> tuple[Rendered, ...]:
    """The files for all declared VMs; VMs not made yet get what clone-farm would give them now. Zones
    have serial number 1 here: network-apply counts on from the live one."""
    names = chosen(site, services)
    documents = render(site.farm, site.allocator.peek_all(site.farm.vms), services=names)
    return tuple(Rendered(document, full_text(document, site.identity)) for document in documents)


def full_text(document: Document, farm: FarmIdentity) -> str:
    return whole(document, farm) if document.own == "file" else embed(document, farm, "")


def write_out(files: Sequence[Rendered], directory: Path) -> None:
    """Write each file at its path below the directory. UsageError if that is the root itself."""
    if directory.resolve() == Path("/"):
        raise UsageError("--out /: these are the live files", remedy="network-apply writes them")
    for file in files:
        path = directory / file.document.path.lstrip("/")
        make_directory(path.parent, mode=0o755)
        write_atomic(path, file.text.encode(errors="surrogateescape"), mode=file.document.mode)
