"""The hosts file, in which this machine's resolver looks first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from provision.network.document import Document
from provision.network.service import Question, Service, Silent

if TYPE_CHECKING:
    from inventory.fields import ConfigPath
    from inventory.model import Farm
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow


@dataclass(frozen=True, kw_only=True)
class Hosts(Service):
    """The hosts file: a marked block."""

    NAME: ClassVar = "hosts"
    APART: ClassVar = ()
    CAN_SHARE: ClassVar = ("config",)

    config: ConfigPath = "/etc/hosts"
    """The file."""

    @property
    def own_block(self) -> bool:
        return True

    def documents(self, r: Renderer) -> Iterator[Document]:
        yield Document(self.NAME, self.config, r.render("hosts", self), own="block")

    def questions(self, _farm: Farm, _view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        """The file that is the resolver's own is asked through it."""
        if self.config != "/etc/hosts":
            return
        for row in rows.values():
            text = f"{row.fqdn} by the resolver, expect {row.address}"
            expected = partial(str, row.address)
            yield Question(self.NAME, row.vm, text, expected, partial(_resolve, row.fqdn))


def _resolve(name: str) -> str:
    import socket

    try:
        found = {str(item[4][0]) for item in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError as error:
        raise Silent(error.strerror) from None
    return " ".join(sorted(found))
