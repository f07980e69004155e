"""A real repository, quickly made: unsigned; and a reader that looks at every reference in one."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from repositories.change import GenerationContent, changing
from repositories.generation import Reason
from repositories.package import place
from repositories.repository import Repository, Settings
from tests.debs import deb, fields


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_deb(name: str, version: str = "1.0", size: int = 0) -> bytes:
    """A package with a file of that many bytes, always the same ones."""
    data = random.Random(name + version).randbytes(size)
    return deb(fields(name, version, "all"), {f"usr/share/{name}": data})


@dataclass
class RepoTree:
    """``scratch``: a directory to make; the repository is in it."""

    scratch: Path
    format: str = "deb"
    url: str = "http://repo.example.org"
    grace: float = 3 * 86400

    def __post_init__(self) -> None:
        (self.scratch / "in").mkdir(parents=True)
        self.top = self.scratch / "top"
        self.repository = Repository(
            Settings(
                name="kata", format=self.format, top=self.top, channels=("experimental", "tested"),
                components=("main",) if self.format == "deb" else (),
                architectures=("amd64",) if self.format == "deb" else (),
                url=self.url, grace=self.grace,
            )
        )  # fmt: skip
        self.layout = self.repository.layout

    def publish(self, channel: str, *debs: tuple[str, bytes]) -> int:
        """A generation with these packages more, by their names; its number."""
        paths = [self.scratch / "in" / f"{name}_1.0_all.deb" for name, _ in debs]
        for path, (_, data) in zip(paths, debs, strict=True):
            path.write_bytes(data)
        return self.publish_files(channel, *paths)

    def publish_files(self, channel: str, *paths: Path) -> int:
        repository, component = self.repository, "main" if self.format == "deb" else ""
        with repository.staging() as staging:
            added = [staging.take(path, component=component) for path in paths]
            with changing(repository) as change:
                base = repository.head(channel)
                reason = Reason("add", "tests")
                made = change.commit(channel, GenerationContent(base, add=added), reason)
                change.publish(made, reason, expected=base.sequence if base else 0)
        return made.sequence

    def url_of(self, name: str, data: bytes) -> str:
        """A package's path, as a client asks for it."""
        return "/" + place(sha256(data), f"{name}_1.0_all.deb")


def check_tree(tree: Path, *, by_hash: bool = False) -> str:
    """The generation that a tree is, by its Release's sum, every reference looked at. ``by_hash``: as
    apt reads them, by the names of their content."""
    (dist,) = (tree / "dists").iterdir()
    release = (dist / "Release").read_text()
    named = re.findall(r"^ ([0-9a-f]{64}) +(\d+) (\S+\.gz)$", release, re.MULTILINE)
    assert named
    for digest, size, path in named:
        data = (dist / path).with_name("by-hash").joinpath("SHA256", digest).read_bytes()
        assert (sha256(data), len(data)) == (digest, int(size)), dist / path
        assert by_hash or (dist / path).read_bytes() == data
        for stanza in gzip.decompress(data).decode().split("\n\n"):
            said = dict(re.findall(r"^(\S+): (.*)$", stanza, re.MULTILINE))
            if said:
                package = (tree / said["Filename"]).read_bytes()
                assert (sha256(package), len(package)) == (said["SHA256"], int(said["Size"])), stanza
    return sha256(release.encode())


def check_repository(top: Path) -> dict[str, str]:
    """What readers of a repository's directory find: by channel, what is published. Whatever a link or
    list names is there and right, and so is each generation that can be begun to be read."""
    found = {}
    for mirrors in top.glob("channels/*.mirrors"):
        number = mirrors.read_text().rstrip("/\n").rpartition("/")[2]
        check_tree(top / "generations" / number)
    for tree in top.glob("generations/*"):
        if any(tree.glob("dists/*/*Release")):
            check_tree(tree)
    for link in top.glob("channels/*"):
        if link.is_symlink():
            found[link.name] = check_tree(link)
    for link in top.glob("dists/*"):
        assert (link / "Release").is_file(), link
    return found
