"""The files beside the qcow2 images: marks, templates' descriptions, locks; and writing them durably."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from host.documents import Malformed, json_object, read_file
from host.files import file_error, write_new
from hypervisors.api import Owner, Template
from hypervisors.marks import DamagedMark, moment, read_fields
from hypervisors.ownership import FarmIdentity

NEW = ".farmhand-new-"
_OF_DISKS = ("machine", "farm", "vm", "template", "size", "created")
_OF_TEMPLATES = ("farm", "name", "generation", "size", "sha256", "created", "origin", "firstboot")
ToldFn = Callable[[str, str], None]
"""As ``hypervisors.marks.DamagedMarks.tell``."""


@dataclass(frozen=True, slots=True)
class Mark:
    """``owner.json``: that this directory holds a disk of ours, and what a reset needs to know."""

    machine: str
    owner: Owner
    template: str
    size: int
    created: datetime
    other: tuple[str, str] | None = None
    """While it is renamed: the machine and the VM that it is by the directory's other name."""

    def document(self) -> bytes:
        machine, vm = self.other or ("", "")
        return _document(
            {
                "machine": self.machine,
                "farm": self.owner.farm.mark,
                "vm": self.owner.vm,
                "template": self.template,
                "size": self.size,
                "created": self.created.isoformat(),
                **({"other_machine": machine, "other_vm": vm} if self.other else {}),
            }
        )


def read_mark(home: Path, *, moved: bool = False, damaged: ToldFn | None = None) -> Mark | None:
    """The mark in that directory. None if it has none, a damaged one (``damaged`` is told), or one that
    speaks of another directory, as in a copy that somebody made. ``moved``: the directory has a
    temporary name."""
    seen = _read(home / "owner.json", _OF_DISKS, damaged)
    if seen is None:
        return None
    mark = Mark(
        machine=seen["machine"],
        owner=Owner(FarmIdentity.of(seen["farm"]), seen["vm"]),
        template=seen["template"],
        size=int(seen["size"]),
        created=moment(seen["created"]),
        other=(seen["other_machine"], seen.get("other_vm", "")) if "other_machine" in seen else None,
    )
    if moved or mark.machine == home.name:
        return mark
    if mark.other is None or mark.other[0] != home.name:
        return None
    machine, vm = mark.other
    now = (mark.machine, mark.owner.vm)
    return replace(mark, machine=machine, owner=Owner(mark.owner.farm, vm), other=now)


def write_template(image: Path, template: Template) -> None:
    """Write the description of a farm's template beside its image. It is without ``ref``, which is where
    the image is."""
    assert template.farm
    facts = asdict(template)
    del facts["ref"]
    facts |= {"farm": template.farm.mark, "created": template.created.isoformat()}
    write_durably(describe(image), _document(facts))


def describe(image: Path) -> Path:
    """Path of the description of a template's image."""
    return image.with_name(image.name.removesuffix(".qcow2") + ".json")


def read_template(image: Path, *, half: bool = False, damaged: ToldFn | None = None) -> Template | None:
    """The template of that image. None unless both the image and our description are there (with
    ``half`` the description is enough), and where the description is of another image, or damaged
    (``damaged`` is told)."""
    seen = _read(describe(image), _OF_TEMPLATES, damaged)
    if seen is None or not (half or image.exists()):
        return None
    template = Template(
        name=seen["name"],
        generation=int(seen["generation"]),
        ref=str(image),
        size=int(seen["size"]),
        sha256=seen["sha256"],
        created=moment(seen["created"]),
        origin=seen["origin"],
        firstboot=seen["firstboot"],
        farm=FarmIdentity.of(seen["farm"]),
    )
    return template if image.name == f"{template.label}.qcow2" else None


def _document(facts: dict[str, object]) -> bytes:
    return (json.dumps({"farmhand": 1, **facts}, indent=1) + "\n").encode()


def _read(path: Path, needed: Collection[str], damaged: ToldFn | None) -> dict[str, str] | None:
    """What one of our files says; None where it isn't there, isn't ours, or is damaged."""
    try:
        seen = json_object(read_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, Malformed):
        seen = {"farmhand": 1}  # by its name it is one of ours
    if "farmhand" not in seen:
        return None
    try:
        if seen["farmhand"] != 1:
            raise DamagedMark("it is in another farmhand's format")
        return read_fields(seen, needed)
    except DamagedMark as error:
        if damaged is not None:
            damaged(str(path), str(error))
        return None


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file that is complete under its name, or not there. That holds for a power cut too, once
    the directory is synced."""
    fresh = path.with_name(f"{NEW}{os.getpid()}-{path.name}")
    try:
        write_new(fresh, data, mode=mode)
        fresh.replace(path)
    except OSError as error:
        raise file_error(error, path, "write") from error
