"""An ssh client's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from provision.network.document import Document
from provision.network.service import Checker, Service
from provision.network.templating import backslashed

if TYPE_CHECKING:
    from inventory.fields import ConfigPath, Own
    from inventory.model import Farm
    from provision.network.renderer import Renderer


@dataclass(frozen=True, kw_only=True)
class SshConfig(Service):
    """An ssh client's configuration with an entry for each VM."""

    NAME: ClassVar = "ssh_config"
    NEEDS_ADDRESSES: ClassVar = False
    TOOLS: ClassVar = {"ssh": "openssh-client"}
    STRINGS: ClassVar = {"ssh_config": backslashed}
    CAN_SHARE: ClassVar = ("config",)

    config: ConfigPath = "/etc/ssh/ssh_config.d/farmhand.conf"
    """The file."""
    own: Own = "file"
    """All of it is ours, or a marked block."""

    def documents(self, r: Renderer) -> Iterator[Document]:
        text = r.render("ssh_config", self, **r.login())
        yield Document(self.NAME, self.config, text, own=self.own)

    def checkers(self, _farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        yield Checker(("ssh", "-G", "-F", self.config, "farmhand"))
