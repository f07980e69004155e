"""A spec file as it is written. It is never expanded here: whoever parses one runs its ``%(...)``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(r"(?P<head>\s*(?P<tag>Name|Version|Release|Epoch)\s*:\s*)(?P<value>.*?)\s*", re.I)
_SECTION = re.compile(
    r"%(?:description|package|prep|generate_buildrequires|conf|build|install|check|clean|pre|post|preun"
    r"|postun|pretrans|posttrans|trigger\w*|file\w*|verifyscript|sepolicy|changelog)\b"
)
_OPENS = re.compile(r"\s*%if")
_CLOSES = re.compile(r"\s*%endif\b")
_DIST = re.compile(r"%(?:\{\??dist\}|dist\b)")
_VERSION = re.compile(r"[A-Za-z0-9._+~^]{1,200}")
_EPOCH = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class SpecText:
    """``stated``: [EPOCH:]VERSION-RELEASE without the distribution's tag that the release may end in;
    "": macros or conditions make it. ``release``: the line with it, by its number from 0; -1 then."""

    name: str
    stated: str
    release: int


def spec_of(text: str) -> SpecText:
    found: dict[str, list[tuple[int, str]]] = {}
    depth, whole = 0, True
    for number, line in enumerate(text.split("\n")):
        if _SECTION.match(line):
            break
        if _OPENS.match(line):
            depth += 1
        elif _CLOSES.match(line):
            depth -= 1
        elif match := _TAG.fullmatch(line):
            found.setdefault(match["tag"].lower(), []).append((number, match["value"]))
            whole = whole and not depth
    value = {tag: lines[0][1] for tag, lines in found.items()}
    name = value.get("name", "") if _VERSION.fullmatch(value.get("name", "").replace("-", "")) else ""
    once = whole and all(len(lines) == 1 for lines in found.values())
    version, epoch = value.get("version", ""), value.get("epoch", "")
    release = without_dist(value.get("release", ""))
    literal = _VERSION.fullmatch(version) and _VERSION.fullmatch(release)
    if not once or not literal or (epoch and not _EPOCH.fullmatch(epoch)):
        return SpecText(name, "", -1)
    before = f"{epoch}:" if epoch and int(epoch) else ""
    return SpecText(name, f"{before}{version}-{release}", found["release"][0][0])


def without_dist(release: str) -> str:
    """``1%{?dist}`` is 1."""
    match = _DIST.search(release)
    return release[: match.start()] if match and match.end() == len(release) else release


def with_release(data: bytes, release: str) -> bytes:
    """The spec with another Release, the distribution's tag kept as it stands; all else byte for byte.
    ValueError: it has no Release that is written out."""
    text = data.decode("latin-1")  # each byte is a character
    lines = text.split("\n")
    at = spec_of(text).release
    if at < 0:
        raise ValueError("its Release is made by macros or conditions")
    ending = "\r" if lines[at].endswith("\r") else ""
    match = _TAG.fullmatch(lines[at].removesuffix("\r"))
    assert match
    dist = match["value"].removeprefix(without_dist(match["value"]))
    lines[at] = f"{match['head']}{release}{dist}{ending}"
    return "\n".join(lines).encode("latin-1")
