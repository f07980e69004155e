"""A real repository, quickly made: deb, unsigned; and a reader that looks at every reference in one."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from repositories.change import changing
from repositories.package import place
from repositories.repository import Repository, Settings


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_deb(name: str, version: str = "1.0", size: int = 0) -> bytes:
    """A package with a file of that many bytes, always the same ones."""
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: nothing\n"
    )
    made = b"!<arch>\n"
    for member, data in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", gzip.compress(_tar("./control", control.encode()), mtime=0)),
        ("data.tar", _tar(f"./usr/share/{name}", random.Random(name + version).randbytes(size))),
    ):
        head = f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
        made += head.encode() + data + b"\n" * (len(data) % 2)
    return made


def _tar(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


@dataclass
class RepoTree:
    """``scratch``: a directory to make; the repository is in it."""

    scratch: Path
    url: str = "http://repo.example.org"
    grace: float = 3 * 86400

    def __post_init__(self) -> None:
        (self.scratch / "in").mkdir(parents=True)
        self.top = self.scratch / "top"
        self.repository = Repository(
            Settings(
                name="kata", format="deb", top=self.top, channels=("experimental", "tested"),
                components=("main",), architectures=("amd64",), url=self.url, grace=self.grace,
            )
        )  # fmt: skip
        self.layout = self.repository.layout

    def publish(self, channel: str, *debs: tuple[str, bytes]) -> int:
        """A generation with these packages more, by their names; its number."""
        repository = self.repository
        with repository.staging() as staging:
            added = []
            for name, data in debs:
                path = self.scratch / "in" / f"{name}_1.0_all.deb"
                path.write_bytes(data)
                added.append(staging.take(path, component="main"))
            with changing(repository) as change:
                base = repository.head(channel)
                made = change.commit(channel, "add", by="tests", base=base, add=added)
                change.publish(made, expected=base.sequence if base else 0, verb="add", by="tests")
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
            fields = dict(re.findall(r"^(\S+): (.*)$", stanza, re.MULTILINE))
            if fields:
                package = (tree / fields["Filename"]).read_bytes()
                assert (sha256(package), len(package)) == (fields["SHA256"], int(fields["Size"])), stanza
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
