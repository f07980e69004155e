"""The files beside the qcow2 images: marks, templates' descriptions, locks; and writing them durably."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from host.files import write_new
from hypervisors.api import Owner, Template
from hypervisors.ownership import FarmIdentity

NEW = ".farmhand-new-"


@dataclass(frozen=True, slots=True)
class Mark:
    """``owner.json``: that this directory holds a disk of ours, and what a reset needs to know."""

    machine: str
    owner: Owner
    template: str
    size: int
    created: datetime

    def document(self) -> bytes:
        return _document(
            {
                "machine": self.machine,
                "farm": self.owner.farm.mark,
                "vm": self.owner.vm,
                "template": self.template,
                "size": self.size,
                "created": self.created.isoformat(),
            }
        )


def read_mark(home: Path, *, moved: bool = False) -> Mark | None:
    """The mark in that directory. None if it has none, or one that speaks of another directory, as in a
    copy that somebody made. ``moved``: the directory has a temporary name."""
    seen = _read(home / "owner.json")
    if seen is None:
        return None
    try:
        mark = Mark(
            machine=str(seen["machine"]),
            owner=Owner(FarmIdentity.of(str(seen["farm"])), str(seen["vm"])),
            template=str(seen["template"]),
            size=int(str(seen["size"])),
            created=datetime.fromisoformat(str(seen["created"])),
        )
    except (KeyError, ValueError):
        return None
    return mark if moved or mark.machine == home.name else None


def write_template(image: Path, template: Template) -> None:
    """Write the template's description beside its image. It is without ``ref``, which is where the image
    is."""
    facts = asdict(template)
    del facts["ref"]
    write_durably(describe(image), _document({**facts, "created": template.created.isoformat()}))


def describe(image: Path) -> Path:
    """Path of the description of a template's image."""
    return image.with_name(image.name.removesuffix(".qcow2") + ".json")


def read_template(image: Path, *, half: bool = False) -> Template | None:
    """The template of that image. None unless both the image and our description are there; with
    ``half`` the description is enough."""
    seen = _read(describe(image))
    if seen is None or not (half or image.exists()):
        return None
    try:
        return Template(
            name=str(seen["name"]),
            generation=int(str(seen["generation"])),
            ref=str(image),
            size=int(str(seen["size"])),
            sha256=str(seen["sha256"]),
            created=datetime.fromisoformat(str(seen["created"])),
            origin=str(seen["origin"]),
            firstboot=str(seen["firstboot"]),
        )
    except (KeyError, ValueError):
        return None


def _document(facts: dict[str, object]) -> bytes:
    return (json.dumps({"farmhand": 1, **facts}, indent=1) + "\n").encode()


def _read(path: Path) -> dict[str, object] | None:
    try:
        seen = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return seen if isinstance(seen, dict) and seen.get("farmhand") == 1 else None


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file that is complete under its name, or not there. That holds for a power cut too, once
    the directory is synced."""
    fresh = path.with_name(f"{NEW}{os.getpid()}-{path.name}")
    write_new(fresh, data, mode=mode)
    fresh.replace(path)
