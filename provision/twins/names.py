"""The second farm's names: of hosts, in DNS, of files and directories, in URLs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import count
from pathlib import Path

from inventory.errors import Conflict
from inventory.model import Farm
from provision.network.renderer import Renderer
from provision.network.service import services
from provision.twins.asked import OTHERS
from provision.twins.neighbours import TakenHere
from provision.twins.own_values import OwnKind

_IFNAMSIZ = 16  # netdevice(7): of a network interface's name, with the NUL at its end


class TwinNames:
    """Each method says what the second farm has in place of something of the first one's, and notes that
    it is taken. Conflict: somebody has it."""

    def __init__(self, first: Farm, name: str, taken: TakenHere) -> None:
        self._first, self._name, self._taken = first, name, taken
        self._old = re.compile(rf"(?<![a-z0-9]){re.escape(first.farm)}(?![a-z0-9])")
        self._served: dict[str, str] = {}  # servers of URLs
        self._zone = _whole_zone(first)
        self.old_domain = first.network.domain or ""
        self.domain = self._own_domain() if self._zone else self.old_domain

    def word(self, word: str) -> str:
        """With the new farm's name in place of the old one's, where the word has that between its
        dashes; else with the new one at its end."""
        found, times = self._old.subn(self._name, word, count=1)
        return found if times else f"{word}-{self._name}"

    def host(self, name: str) -> str:
        """A host name or alias."""
        head, dot, rest = name.partition(".")
        moved = self.domain != self.old_domain
        if dot and moved and (name == self._zone or name.endswith(f".{self._zone}")):
            rest = self.domain  # the old zone is the first farm's
        for found in self._labels(head):
            whole = f"{found}{dot}{rest}"
            full = whole if dot or not self.domain else f"{whole}.{self.domain}"
            if not self._taken.holder(OwnKind.NAME, full):
                self.take(OwnKind.NAME, full)
                return whole
        raise AssertionError

    def served(self, name: str) -> str:
        """A name that a web server knows."""
        head, dot, rest = name.partition(".")
        names = (f"{label}{dot}{rest}" for label in self._labels(head))
        return self.take(OwnKind.NAME, next(n for n in names if not self._taken.holder(OwnKind.NAME, n)))

    def file(self, path: str) -> str:
        whole = Path(path)
        return self.take(OwnKind.FILE, str(whole.with_stem(self.word(whole.stem))))

    def directory(self, path: str) -> str:
        """What is in a directory of the farm's name stays there, in the new one's."""
        parts = list(Path(path).parts)
        for number in range(len(parts) - 1, 1, -1):  # not one of the root's, such as /srv
            if parts[number] == self._first.farm:
                parts[number] = self._name
                return self.take(OwnKind.FILE, str(Path(*parts)))
        return self.file(path)

    def link(self, name: str) -> str:
        """A network interface."""
        long = self.word(name)
        short = f"{name[:10]}-{hashlib.sha256(long.encode()).hexdigest()[:4]}"
        return self.take(OwnKind.LINK, long if len(long) < _IFNAMSIZ else short)

    def url(self, url: str, *, serve: str) -> str:
        """Another path there; or, where a service of ours serves it, another name, for that has a
        virtual host for each farm."""
        scheme, _, rest = url.partition("://")
        server, slash, path = rest.partition("/")
        if serve != "none":
            if server not in self._served:
                name, colon, port = server.partition(":")
                if _is_address(name):
                    text = f"{url}: {serve} can't have one address for two farms"
                    raise Conflict(text, remedy="give it a name")
                self._served[server] = f"{self.served(name)}{colon}{port}"
            return f"{scheme}://{self._served[server]}{slash}{path}"
        head, _, last = path.rstrip("/").rpartition("/")
        last = self.word(last) if last else self._name
        return f"{scheme}://{server}/{f'{head}/' if head else ''}{last}"

    def take(self, kind: OwnKind, value: str) -> str:
        if holder := self._taken.holder(kind, value):
            raise Conflict(f"{kind} {value} is farm {holder}'s", remedy=OTHERS)
        self._taken.add(kind, value, self._name)
        return value

    def _labels(self, label: str) -> Iterator[str]:
        new = self.word(label)
        yield new
        yield from (f"{new}-{number}" for number in count(2))

    def _own_domain(self) -> str:
        head, _, rest = self.old_domain.partition(".")
        return f"{self._name}.{rest if head == self._first.farm and rest else self.old_domain}"


def _whole_zone(farm: Farm) -> str:
    """The zone that is all the farm's; "": it has none."""
    for service in services(farm):
        zones = () if service.own_block else service.zones(Renderer(farm, {}))
        if zones:
            return str(zones[0].name)
    return ""


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
