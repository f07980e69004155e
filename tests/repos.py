"""Package repositories of a farm, with small real packages; and a reader that knows nothing of how they
are made: it follows what clients follow, and looks at every reference."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import cli.composition  # noqa: F401 - what there is
from host.run import Runner
from inventory.errors import spelled
from inventory.loader import load
from provision.engine import registry
from provision.engine.report import Outcome, QuietReporter
from provision.engine.runner import perform
from provision.package_repositories import opened
from provision.site import Site
from repositories.check import check
from repositories.repository import Repository
from tests.debs import deb, fields
from tests.rpms import rpm

FORMATS = ("deb", "rpm")
FARM = """\
farm: try
hosts: {{here: {{driver: fake}}}}
vms: {{prod: {{memory: 1G}}}}
templates: {{base: {{build: debian-12}}}}
repositories:
  packages:
    format: {format}
    path: {top}
    channels: [experimental, tested]
    url: http://packages.example/r
{more}"""
Content = frozenset[tuple[str, str]]


def package(kind: str, directory: Path, name: str = "hello", version: str = "1.0-1", *,
            text: str = "", changes: str = "") -> Path:  # fmt: skip
    """A package's file in the directory. ``text``: of a file in it. ``changes``: the versions that its
    changelog tells of, newest first."""
    text = text or f"{name} {version}"
    versions = changes.split()
    if kind == "rpm":
        upstream, _, release = version.partition("-")
        entries = [
            f"* Fri Nov 20 2026 A <a@example.org> - {each}\n- Change of {each}\n" for each in versions
        ]
        made = rpm(
            name, upstream, release, files={f"/usr/share/{name}": text},
            sections=["%changelog", *entries] if entries else (),
        )  # fmt: skip
        path = directory / made.name
        path.write_bytes(made.read_bytes())
        return path
    path = directory / f"{name}_{version}_amd64.deb"
    log = "".join(
        f"{name} ({each}) unstable; urgency=low\n\n  * Change of {each}\n\n"
        " -- A <a@example.org>  Fri, 20 Nov 2026 10:00:00 +0000\n\n"
        for each in versions
    )
    files = {f"usr/share/{name}": text.encode()}
    if log:
        packed = gzip.compress(log.encode(), mtime=0)
        files[f"usr/share/doc/{name}/changelog.Debian.gz"] = packed
    path.write_bytes(deb(fields(name, version), files))
    return path


class RepoFarm:
    """A farm with a repository, ``packages``, in a scratch directory. ``more``: its section's lines."""

    def __init__(self, directory: Path, kind: str, *, more: str = "") -> None:
        self.kind = kind
        self.top = directory / "repository"
        self.file = directory / "try.yaml"
        self.incoming = directory / "incoming"
        self.incoming.mkdir(exist_ok=True)
        self.declare(more)

    def declare(self, more: str) -> None:
        lines = "".join(f"    {line}\n" for line in more.splitlines())
        self.file.write_text(FARM.format(format=self.kind, top=self.top, more=lines))

    def package(self, name: str = "hello", version: str = "1.0-1", **more: str) -> Path:
        return package(self.kind, self.incoming, name, version, **more)

    def perform(self, task: str, *, plan: bool = False, **request: Any) -> Outcome[Any]:
        with Site(load(self.file), reporter=QuietReporter(), plan=plan) as site:
            return perform(site, registry.operation(task)(repo="packages", **request))

    def add(self, *paths: Path, channel: str = "experimental", **more: Any) -> Outcome[Any]:
        return self.perform("repo-add", channel=channel, paths=paths, **more)

    def remove(self, *names: str, channel: str = "experimental") -> Outcome[Any]:
        return self.perform("repo-remove", channel=channel, packages=names)

    def promote(self, *names: str, from_: str = "experimental", to: str = "tested") -> Outcome[Any]:
        return self.perform("repo-promote", from_=from_, channel=to, packages=names)

    def rollback(self, channel: str = "experimental", to: int = 0) -> Outcome[Any]:
        return self.perform("repo-rollback", channel=channel, to=to)

    def gc(self, pinned: Mapping[int, str] | None = None, **more: Any) -> Outcome[Any]:
        return self.perform("repo-gc", pinned=pinned or {}, **more)

    def age(self, by: timedelta) -> None:
        """As if all had been done earlier."""
        private = self.top / ".farmhand"

        def earlier(match: re.Match[str]) -> str:
            return match[1] + str(datetime.fromisoformat(match[2]) - by)

        for path in (*private.glob("generations/*.json"), *private.glob("logs/*.jsonl")):
            path.write_text(re.sub(r'("(?:at|made)": ")([^"]+)', earlier, path.read_text()))

    @property
    def repository(self) -> Repository:
        return opened(load(self.file))

    def versions(self, channel: str = "experimental") -> list[str]:
        """What the channel's documents list."""
        repository = self.repository
        head = repository.head(channel)
        return [f"{p.name} {p.version}" for p in repository.packages(head)] if head else []

    def read(self, channel: str = "experimental") -> list[str]:
        """What a client of the channel finds."""
        return sorted(name for name, _ in read_tree(self.top / "channels" / channel))

    def fsck(self) -> list[str]:
        report = check(self.repository, Runner(changes=False), lambda _: None)
        return [f"{f.where}: {f.what}; {spelled(f.remedy)}" for f in report.findings]


def read_tree(tree: Path) -> Content:
    """What a tree that clients read has: "NAME VERSION" and the file's hash. Each reference is right."""
    if (tree / "repodata").is_dir():
        return _read_rpm(tree)
    (suite,) = (tree / "dists").iterdir()
    release = (suite / "Release").read_text()
    if (suite / "InRelease").exists():
        assert release in (suite / "InRelease").read_text().replace("\n- -", "\n-")
        assert (suite / "Release.gpg").exists()
    found = set()
    for digest, size, path in re.findall(r"^ ([0-9a-f]{64}) +(\d+) (\S+)$", release, re.MULTILINE):
        if not path.endswith(".gz"):
            continue
        data = _whole(suite / path, digest, int(size))
        assert (suite / path).with_name("by-hash").joinpath("SHA256", digest).read_bytes() == data
        for stanza in gzip.decompress(data).decode().split("\n\n"):
            if one := dict(re.findall(r"^(\S+): (.*)$", stanza, re.MULTILINE)):
                _whole(tree / one["Filename"], one["SHA256"], int(one["Size"]))
                found.add((f"{one['Package']} {one['Version']}", one["SHA256"]))
    return frozenset(found)


def _read_rpm(tree: Path) -> Content:
    found = set()
    indexes = {}
    for data in _parsed((tree / "repodata/repomd.xml").read_bytes()).iter("data"):
        (location,), (digest,), (size,) = (data.iter(tag) for tag in ("location", "checksum", "size"))
        packed = _whole(tree / location.attrib["href"], digest.text or "", int(size.text or 0))
        indexes[data.attrib["type"]] = _parsed(gzip.decompress(packed))
    assert set(indexes) == {"primary", "filelists", "other"}
    for one in indexes["primary"].iter("package"):
        digest, location, size = (next(one.iter(tag)) for tag in ("checksum", "location", "size"))
        version = next(one.iter("version")).attrib
        assert digest.text
        _whole(tree / location.attrib["href"], digest.text, int(size.attrib["package"]))
        name = next(one.iter("name")).text
        found.add((f"{name} {version['ver']}-{version['rel']}", digest.text))
    for kind in ("filelists", "other"):
        assert {p.attrib["pkgid"] for p in indexes[kind].iter("package")} == {s for _, s in found}
    return frozenset(found)


def _parsed(text: bytes) -> ET.Element:
    """Without namespaces."""
    found = ET.fromstring(text)
    for each in found.iter():
        each.tag = each.tag.rpartition("}")[2]
    return found


def _whole(path: Path, digest: str, size: int) -> bytes:
    data = path.read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, size), path
    return data


def read_all(top: Path) -> dict[str, Content]:
    """All that anybody can reach: channels, by name, and generations, by number. Mirror lists lead to
    generations that are there."""
    found = {}
    for link in sorted((top / "channels").glob("[!.]*")):
        if link.suffix == ".mirrors":
            number = link.read_text().rstrip("/\n").rpartition("/")[2]
            read_tree(top / "generations" / number)
        else:
            found[link.name] = read_tree(link)
    for tree in sorted((top / "generations").iterdir()):
        found[tree.name] = read_tree(tree)
    return found


def contents(top: Path) -> dict[str, str]:
    """All files, links and directories below, with what is in them."""
    found = {}
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            path = Path(directory, name)
            what = ""
            if path.is_symlink():
                what = f"-> {path.readlink()}"
            elif path.is_file():
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(top))] = f"{path.lstat().st_mode:o} {what}"
    return found


def others(repo: RepoFarm, *names: str) -> Path:
    """A repository that somebody else made, by the usual tools."""
    top = repo.incoming.with_name("others")
    (top / "pool").mkdir(parents=True)
    for name in names:
        file = repo.package(name)
        file.rename(top / "pool" / file.name)
    if repo.kind == "rpm":
        subprocess.run(["createrepo_c", "--quiet", top], check=True)
        return top
    binary = top / "dists/x/main/binary-amd64"
    binary.mkdir(parents=True)
    (binary / "Packages").write_bytes(_ftparchive(top, "packages", "pool"))
    settings = ("Architectures=amd64", "Components=main", "Suite=x", "Codename=x")
    words = [word for each in settings for word in ("-o", f"APT::FTPArchive::Release::{each}")]
    release = _ftparchive(top, *words, "release", "dists/x")
    (top / "dists/x/Release").write_bytes(release)
    return top


def _ftparchive(top: Path, *words: str) -> bytes:
    return subprocess.run(["apt-ftparchive", *words], cwd=top, check=True, capture_output=True).stdout
