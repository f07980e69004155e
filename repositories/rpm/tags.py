"""What an rpm package's header says, by rpm's tags (rpmtag.h), in words."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from repositories.contents import MemberDifference, PackedFile, file_differences, value_differences
from repositories.package import Change
from repositories.rpm.file import RpmHeader

TOLD: Mapping[str, tuple[int, ...]] = {
    "name": (1000,),
    "version": (1001,),
    "release": (1002,),
    "summary": (1004,),
    "description": (1005,),
    "build host": (1007, 1094),
    "vendor": (1011,),
    "license": (1014,),
    "packager": (1015,),
    "group": (1016,),
    "url": (1020, 5012),
    "architecture": (1022,),
    "source package": (1044, 1146),
    "provides": (1047, 1112, 1113),
    "requires": (1048, 1049, 1050),
    "conflicts": (1053, 1054, 1055),
    "obsoletes": (1090, 1114, 1115),
    "recommends": (5046, 5047, 5048),
    "suggests": (5049, 5050, 5051),
    "supplements": (5052, 5053, 5054),
    "enhances": (5055, 5056, 5057),
    "changelog": (1080, 1081, 1082),
    "files": (1027, 1117, 1118),
}
"""What clients are told of in the metadata, with its tags."""
_UNTOLD: Mapping[str, tuple[int, ...]] = {
    "epoch": (1003,),
    "build time": (1006,),
    "distribution": (1010, 1155),
    "os": (1021,),
    "script before installation": (1023, 1085, 5020),
    "script after installation": (1024, 1086, 5021),
    "script before removal": (1025, 1087, 5022),
    "script after removal": (1026, 1088, 5023),
    "script before the transaction": (1151, 1153, 5024),
    "script after the transaction": (1152, 1154, 5025),
    "script that verifies": (1079, 1091, 5026),
    "triggers": (1065, 1066, 1067, 1068, 1069, 1092, 5027),
    "flags of the compiler": (1122,),
    "translations": (100,),
}
_NAMES = {tag: name for name, tags in (*TOLD.items(), *_UNTOLD.items()) for tag in tags}
_OF_FILES = (1030, 1033, 1034, 1035, 1036, 1037, 1039, 1040, 1045, 5008, 1028, 5010)
"""Modes, device numbers, times, digests, targets of links, flags, owners, groups, what is verified,
sizes, capabilities: a value for each file."""
_KINDS = {
    stat.S_IFDIR: "directory", stat.S_IFLNK: "symbolic link", stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device", stat.S_IFIFO: "fifo",
}  # fmt: skip
_PACKING = frozenset((
    *(61, 62, 63, 1009, 1046, 1064, 1124, 1125, 1126, 1132, 5009, 5092, 5093, 5097),  # how it is packed
    *(1027, 1029, 1095, 1096, 1097, 1098, 1116, 1117, 1118, 5011),  # what files are called, and inodes
    *range(1140, 1146),  # what files are, by their contents
    *(1048, 1049, 1050),  # ``_requires``
    *_OF_FILES,
))  # fmt: skip
_AUTHOR = re.compile(r"(?P<author>.*?>?)[ \t]*(?:-[ \t]*)?(?P<version>[A-Za-z0-9][\w.:~^+-]*)?", re.S)


def compared(one: RpmHeader, other: RpmHeader) -> tuple[MemberDifference, ...]:
    """See ``PackageFormat.compared``. A file's contents are compared by what the header says of them."""
    return (
        *value_differences(_fields(one), _fields(other)),
        *file_differences(_files(one), _files(other)),
    )


def changelog(header: RpmHeader) -> tuple[Change, ...]:
    """See ``PackageFormat.changelog``."""
    rows = zip(header.numbers(1080), header.texts(1081), header.texts(1082), strict=False)
    return tuple(_change(when, author, text) for when, author, text in rows)


def _fields(header: RpmHeader) -> Mapping[str, object]:
    found: dict[str, list[tuple[int, tuple[object, ...]]]] = {}
    for tag in sorted(header.entries.keys() - _PACKING):
        found.setdefault(_NAMES.get(tag, f"tag {tag}"), []).append((tag, header.value(tag)))
    told = {name: values[0][1][0] if _single(values) else values for name, values in found.items()}
    return {"requires": list(_requires(header)), **told}


def _single(values: list[tuple[int, tuple[object, ...]]]) -> bool:
    return len(values) == 1 and len(values[0][1]) == 1


def _requires(header: RpmHeader) -> Iterator[object]:
    """Without those on rpm itself, as for the way of compression."""
    rows = zip(header.texts(1049), header.texts(1050), header.numbers(1048), strict=False)
    return (row for row in rows if not row[0].startswith("rpmlib("))


def _files(header: RpmHeader) -> Mapping[str, PackedFile]:
    facts = {tag: header.value(tag) for tag in _OF_FILES if tag in header.entries}

    def fact(tag: int, at: int) -> str:
        values = facts.get(tag, ())
        return str(values[at] or "") if at < len(values) else ""

    found = {}
    for at, name in enumerate(_paths(header)):
        mode = int(fact(1030, at) or 0)
        found[name] = PackedFile(
            kind=_KINDS.get(stat.S_IFMT(mode), "file"),
            mode=f"{stat.S_IMODE(mode):04o}",
            owner=f"{fact(1039, at)}:{fact(1040, at)}",
            device=fact(1033, at),
            link=fact(1036, at),
            content=" ".join((fact(1035, at), fact(1028, at), fact(5008, at))),
            attributes=" ".join(fact(tag, at) for tag in (1037, 1045, 5010)),
            time=int(fact(1034, at) or 0),
        )
    return found


def _paths(header: RpmHeader) -> tuple[str, ...]:
    if whole := header.texts(1027):  # before rpm 4
        return whole
    directories = header.texts(1118)
    rows = zip(header.numbers(1116), header.texts(1117), strict=False)
    return tuple(f"{directories[at]}{base}" for at, base in rows if at < len(directories))


def _change(when: int, author: str, text: str) -> Change:
    match = _AUTHOR.fullmatch(author.strip())
    assert match  # it takes anything
    with_version = match["version"] and match["author"]
    return Change(
        version=match["version"] if with_version else "",
        author=(match["author"] if with_version else author).strip().rstrip("-").rstrip(),
        when=datetime.fromtimestamp(when, UTC),
        lines=tuple(text.splitlines()),
    )
