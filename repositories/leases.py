"""Leases: who uses a generation. One lasts until it is given back, also when its holder was killed: what
was built on a generation can then be looked at, or gone on with, on just that."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from urllib.parse import quote

from host.documents import Malformed, damaged, json_object, made, read_file
from host.files import write_atomic
from repositories.layout import Layout


@dataclass(frozen=True, slots=True)
class GenerationLease:
    """``holder``: such as "build 20261120-101500"; one holder has one lease of a generation."""

    generation: int
    holder: str
    since: datetime


def take(layout: Layout, generation: int, holder: str) -> None:
    """Durably. The lock is held: the generation is there, and stays."""
    lease = GenerationLease(generation, holder, datetime.now(UTC).replace(microsecond=0))
    data = json.dumps({**asdict(lease), "since": lease.since.isoformat()}).encode()
    write_atomic(layout.lease(_name(generation, holder)), data, mode=0o600)


def give_back(layout: Layout, holder: str, *, but: Collection[int] = ()) -> None:
    """All that the holder has, but for those of these generations."""
    for lease in leases(layout):
        if lease.holder == holder and lease.generation not in but:
            layout.lease(_name(lease.generation, holder)).unlink(missing_ok=True)


def leases(layout: Layout) -> Iterator[GenerationLease]:
    """WrongState where one is damaged: whose generation that is nobody knows."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(layout.leases.glob("*.json")):
            try:
                yield made(GenerationLease, json_object(read_file(path)))
            except FileNotFoundError:  # given back meanwhile
                continue
            except (OSError, Malformed) as error:
                remedy = "remove it, if what it says was in use no longer is"
                raise damaged(path, "a lease of a generation", error, remedy) from error


def _name(generation: int, holder: str) -> str:
    return f"{generation}-{quote(holder, safe=' ')}"[:200]
