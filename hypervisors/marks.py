"""Our marks, read: the one place for it, of all drivers and stores.

A mark lies on somebody else's object (libvirt's metadata, a property, a tag, ``other_config``, a file
beside an image), and whoever may change that object may write into it what he likes. So it is foreign
text until it was read here, field by field, each with its grammar. An object whose mark isn't sound is
nobody's, whatever the rest of the mark says: it is named, once, and left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from datetime import datetime

from host.printable import one_line
from hypervisors.api import WarnFn, no_warning

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""All names of ours fit: of farms, VMs, machines, templates, checkpoints. None leads out of a
directory."""
_FARM = re.compile(rf"{_NAME.pattern}(:[0-9a-f]{{32}}:[ -9;-~]*:[ -9;-~]*)?")
"""An identity's mark (``hypervisors.ownership``), or a name alone: that is some other farm's."""
_LABEL = re.compile(rf"{_NAME.pattern}@[0-9]{{1,9}}")
_COUNT = re.compile(r"[0-9]{1,18}")
_WORD = re.compile(r"[A-Za-z0-9-]{1,128}")
_SUM = re.compile(r"[0-9a-f]{0,64}")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_YEARS = range(1970, 9000)  # any time zone can show them
_LONGEST = 2**14  # characters of what has no grammar


class DamagedMark(ValueError):
    """A mark of ours that is not as we write them. ``str(error)`` says which field."""


def is_name(text: object) -> bool:
    """Whether it can be a farm's, a VM's, a machine's, a template's or a checkpoint's."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def moment(text: str) -> datetime:
    """A time as marks have it (ISO 8601, with its zone). DamagedMark."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None or found.year not in _YEARS:
        raise DamagedMark(f"{_shown(text)} is no time")
    return found


def _is_moment(text: str) -> bool:
    try:
        moment(text)
    except DamagedMark:
        return False
    return True


def _like(pattern: re.Pattern[str], *, or_none: bool = False) -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None or (or_none and not text)


_GRAMMAR: Mapping[str, Callable[[str], bool]] = {
    "farm": _like(_FARM),
    **dict.fromkeys(("machine", "other_machine", "name", "checkpoint", "firstboot"), is_name),
    **dict.fromkeys(("vm", "other_vm", "base", "before", "prev"), _like(_NAME, or_none=True)),
    **dict.fromkeys(("template", "label"), _like(_LABEL, or_none=True)),
    **dict.fromkeys(("generation", "gen", "size", "seq", "merging", "grown", "wipe"), _like(_COUNT)),
    **dict.fromkeys(("created", "cloned"), _is_moment),
    **dict.fromkeys(("kind", "state", "spec"), _like(_WORD, or_none=True)),
    "sha256": _like(_SUM),
    "mac": _like(_MAC, or_none=True),
}
"""Of the fields that something hangs on. The others are only compared, or shown (``host.printable``)."""


def read_fields(found: Mapping[str, object], needed: Collection[str] = ()) -> dict[str, str]:
    """A mark's fields. ``needed``: what it can't be without. DamagedMark."""
    fields: dict[str, str] = {}
    for key, value in found.items():
        text = str(value) if type(value) in (str, int) else None
        if text is None or len(text) > _LONGEST or not _GRAMMAR.get(key, _any)(text):
            raise DamagedMark(f"its {_shown(key)} is {_shown(value)}")
        fields[key] = text
    for key in needed:
        if key not in fields:
            raise DamagedMark(f"it has no {key}")
    return fields


def _any(_text: str) -> bool:
    return True


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else type(value).__name__
    return f"'{one_line(text, 60)}'"


class DamagedMarks:
    """Tells of objects with damaged marks, of each once. Thread-safe."""

    def __init__(self, warn: WarnFn = no_warning) -> None:
        self._warn = warn
        self._told: set[tuple[str, str]] = set()

    def tell(self, what: str, why: str) -> None:
        """``what``: the object, as its own tools name it."""
        if (what, why) not in self._told:
            self._told.add((what, why))
            self._warn(
                f"{what} has a farmhand mark that is damaged: {why}; it counts as nobody's and is left "
                "alone: set it right, or remove the thing itself, by hand"
            )
