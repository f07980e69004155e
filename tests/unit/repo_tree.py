"""A repository's directory as ``repositories.layout`` has it, made by hand and quickly: deb, unsigned; and
a reader that looks at every reference in one."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path

from repositories.layout import Layout
from repositories.package import place

_ENTRIES = ("InRelease", "Release")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_deb(directory: Path, name: str, version: str = "1.0", size: int = 0) -> bytes:
    """A real package, with a file of that size that can't be compressed."""
    root = directory / f"{name}-{version}"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: nothing\n"
    )
    (root / "data").write_bytes(os.urandom(size))
    made = directory / f"{name}_{version}_all.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--build", root, made], check=True, capture_output=True)
    return made.read_bytes()


@dataclass
class RepoTree:
    top: Path
    sequence: int = 0
    texts: dict[str, str] = field(default_factory=dict)  # by file, its stanza

    def __post_init__(self) -> None:
        self.layout = Layout(self.top)
        for name in ("pool", "generations", "channels", "published", "dists", ".farmhand"):
            (self.top / name).mkdir(parents=True)
        (self.top / ".farmhand" / "lock").write_text("ours")
        self.layout.keys[0].write_text("a key\n")
        self.layout.keys[1].write_bytes(b"a key")

    def add(self, file: str, data: bytes) -> Path:
        """A package's file into the pool."""
        path = self.top / place(sha256(data), file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o444)
        name, version, _ = file.split("_")
        self.texts[file] = (
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nDescription: nothing\n"
            f"Filename: {path.relative_to(self.top)}\nSize: {len(data)}\nSHA256: {sha256(data)}\n\n"
        )
        return path

    def publish(self, channel: str, *files: str) -> int:
        """A generation of these packages (none: of all), and the channel's pointer to it."""
        self.sequence += 1
        tree, published = (
            self.layout.tree(self.sequence), self.layout.published(channel, self.sequence)
        )  # fmt: skip
        packages = "".join(self.texts[file] for file in files or self.texts)
        packed = gzip.compress(packages.encode(), mtime=0)
        index = f"dists/{channel}/main/binary-amd64"
        sums = f" {sha256(packed)} {len(packed)} main/binary-amd64/Packages.gz\n" + (
            f" {sha256(packages.encode())} {len(packages.encode())} main/binary-amd64/Packages\n"
        )
        release = (
            f"Suite: {channel}\nCodename: {channel}\nDate: {formatdate(usegmt=True)}\n"
            f"Architectures: amd64\nComponents: main\nAcquire-By-Hash: yes\nSHA256:\n{sums}"
        ).encode()
        made = {
            f"{index}/by-hash/SHA256/{sha256(packed)}": packed,
            f"{index}/Packages.gz": packed,
            f"dists/{channel}/Release": release,
        }
        for path, data in made.items():
            for place_, source in ((tree, None), (published, tree)):
                (place_ / path).parent.mkdir(parents=True, exist_ok=True)
                if source is None:
                    (place_ / path).write_bytes(data)
                else:
                    os.link(source / path, place_ / path)
        (tree / "pool").symlink_to("../../pool")
        (published / "pool").symlink_to("../../../pool")
        self._point(self.layout.pointer(channel), f"../published/{channel}/{self.sequence}")
        self._point(self.top / "dists" / channel, f"../channels/{channel}/dists/{channel}")
        fresh = self.top / "channels" / f".{channel}.new"
        fresh.write_text(f"http://repo.example.org/generations/{self.sequence}/\n")
        fresh.replace(self.layout.mirrors(channel))
        return self.sequence

    def _point(self, link: Path, target: str) -> None:
        fresh = link.with_name(f".{link.name}.new")
        fresh.symlink_to(target)
        fresh.replace(link)


def check_tree(tree: Path) -> str:
    """The generation that a tree is, by its Packages' sum, every reference looked at."""
    (dist,) = (tree / "dists").iterdir()
    release = (dist / "Release").read_text()
    for digest, size, path in re.findall(r"^ ([0-9a-f]{64}) (\d+) (\S+\.gz)$", release, re.M):
        data = (dist / path).read_bytes()
        assert (sha256(data), len(data)) == (digest, int(size)), dist / path
        assert (dist / path).with_name("by-hash").joinpath("SHA256", digest).read_bytes() == data
        for stanza in gzip.decompress(data).decode().split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in stanza.splitlines())
            package = (tree / fields["Filename"]).read_bytes()
            assert (sha256(package), len(package)) == (fields["SHA256"], int(fields["Size"])), stanza
    return sha256(release.encode())


def check_repository(top: Path) -> dict[str, str]:
    """What readers of a repository's directory find: by channel, what is published. Whatever a link or
    list names is there and right, and so is each generation that has begun to be told of."""
    found = {}
    for mirrors in top.glob("channels/*.mirrors"):
        number = mirrors.read_text().rstrip("/\n").rpartition("/")[2]
        assert (top / "generations" / number / "pool").is_dir(), f"{mirrors}: {number} isn't there"
        check_tree(top / "generations" / number)
    for tree in top.glob("generations/*"):
        if any(tree.glob("dists/*/Release")):
            check_tree(tree)
    for link in top.glob("channels/*"):
        if link.is_symlink():
            found[link.name] = check_tree(link)
    for link in top.glob("dists/*"):
        assert (link / "Release").is_file(), link
    return found
