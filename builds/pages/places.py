"""Where pages lie, and how one leads to another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from host.files import file_error, make_directory, write_note
from host.paths import FarmPaths


@dataclass(frozen=True, slots=True)
class PagePlaces:
    """``top``: the farm's state."""

    top: Path

    @classmethod
    def of(cls, paths: FarmPaths) -> PagePlaces:
        return cls(paths.root)

    @property
    def index(self) -> Path:
        return self.top / "pages" / "index.html"

    @property
    def farm(self) -> Path:
        return self.top / "pages" / "farm.html"

    @property
    def graph(self) -> Path:
        return self.top / "pages" / "graph.html"

    @property
    def drawing(self) -> Path:
        return self.top / "pages" / "graph.svg"

    @property
    def picture(self) -> Path:
        """What the graph's page is made from."""
        return self.top / "pages" / "graph.json"

    @property
    def builds(self) -> Path:
        """All that cycles made."""
        return self.top / "builds" / "index.html"

    def package(self, name: str) -> Path:
        return self.top / "packages" / name / "index.html"

    def build(self, package: str, number: int) -> Path:
        return self.top / "packages" / package / str(number) / "index.html"

    def cycle(self, build: str) -> Path:
        return self.top / "builds" / build / "index.html"


def link(page: Path, to: Path) -> str:
    """As ``page`` has it: relative."""
    return quote(os.fsencode(os.path.relpath(to, page.parent)))


def link_if_there(page: Path, to: Path) -> str:
    """As ``link``; "" where it isn't."""
    return link(page, to) if to.exists() else ""


def replace_page(page: Path, text: str) -> None:
    """Replace a page, or another file that anybody may read and that can be made again: whole, whoever
    else does. NoSpace, WrongState if the disk refuses."""
    make_directory(page.parent, mode=0o755)
    try:
        write_note(page, text)
    except OSError as error:
        raise file_error(error, page, "write") from error
