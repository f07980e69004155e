"""An Ansible inventory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from provision.network.document import Document
from provision.network.service import Service
from provision.network.templating import as_json

if TYPE_CHECKING:
    from inventory.fields import ConfigPath
    from provision.network.renderer import Renderer


@dataclass(frozen=True, kw_only=True)
class Ansible(Service):
    """An Ansible inventory."""

    NAME: ClassVar = "ansible"
    NEEDS_ADDRESSES: ClassVar = False
    STRINGS: ClassVar = {"ansible": as_json}

    config: ConfigPath = "/etc/ansible/farmhand.yaml"
    """The file."""

    def documents(self, r: Renderer) -> Iterator[Document]:
        yield Document(self.NAME, self.config, r.render("ansible", self, **r.login()))
