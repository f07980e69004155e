"""Signatures that lie beside what they are of: two requests of a client, between which the channel may
move. The second one gets the signature of what the first one got.

Nothing in a client's requests says that they are one's: its address and what it calls itself have to do.
Of several clients behind one address the last one counts; then some get a signature that is too new, as
all would from another server, and ask again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repositories.serving.files import ServedFile
from repositories.serving.http import DETACHED

_SIGNED = frozenset(DETACHED.values())
_MOST = 4096
"""Files that clients got, the last ones."""
_AGENT = 100  # characters


@dataclass(frozen=True, slots=True)
class Asker:
    """``address``: where a request comes from. ``agent``: what its User-Agent begins with."""

    address: str
    agent: str

    @classmethod
    def of(cls, address: str, fields: Mapping[str, str]) -> Asker:
        return cls(address, fields.get("user-agent", "")[:_AGENT])


@dataclass(frozen=True, slots=True)
class Handed:
    """What a client got. ``place``: where it stays. ``modified``: since when the path led to it."""

    place: tuple[str, ...]
    modified: float


class Pairs:
    """What each client got last of what is signed, by the path that it asked by."""

    def __init__(self) -> None:
        self._given: OrderedDict[tuple[Asker, tuple[str, ...]], Handed] = OrderedDict()

    def note(self, asker: Asker, path: Sequence[str], found: ServedFile) -> None:
        """That it is given ``found`` by that path."""
        if not found.stays or path[-1] not in _SIGNED:
            return
        key = asker, tuple(path)
        self._given[key] = Handed(found.stays, found.modified)
        self._given.move_to_end(key)
        if len(self._given) > _MOST:
            self._given.popitem(last=False)

    def signature(self, asker: Asker, path: Sequence[str]) -> Handed | None:
        """What it is to be given by the path of a signature: that of what it got. None: what is there,
        for it got nothing yet, or this is no signature."""
        signed = DETACHED.get(path[-1])
        given = self._given.get((asker, (*path[:-1], signed))) if signed else None
        return Handed((*given.place[:-1], path[-1]), given.modified) if given else None
