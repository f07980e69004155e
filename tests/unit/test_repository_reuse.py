"""Package repositories: what is taken from what was made before, and never where that is damaged."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from repositories.chunks import ChunkRef, Chunks
from repositories.package import Package
from repositories.render import RecentParts
from tests.repos import FORMATS, RepoFarm


@pytest.fixture(params=FORMATS)
def repo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RepoFarm]:
    with tempfile.TemporaryDirectory(prefix="fh", dir="/dev/shm") as place:
        monkeypatch.setenv("FARMHAND_STATE_DIR", f"{place}/s")
        monkeypatch.setenv("FARMHAND_RUNTIME_DIR", f"{place}/r")
        # Each change as by a command of its own, that has nothing in memory
        monkeypatch.setattr("repositories.render._recent", RecentParts(0))
        repo = RepoFarm(Path(place), request.param)
        repo.add(repo.package("hello"))
        repo.add(repo.package("other"))
        yield repo


def forget(repo: RepoFarm, *caches: str) -> None:
    for cache in caches:
        for file in caches_of(repo, cache):
            file.unlink()


def caches_of(repo: RepoFarm, cache: str) -> list[Path]:
    return [path for path in (repo.top / ".farmhand" / cache).rglob("*") if path.is_file()]


def change(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


THREE = ["hello 1.0-1", "other 1.0-1", "third 1.0-1"]


def test_of_a_list_that_changed_only_what_came_is_read(repo: RepoFarm) -> None:
    forget(repo, "readings")
    repo.add(repo.package("third"))
    assert len(caches_of(repo, "readings")) == 1
    assert repo.read() == THREE and repo.fsck() == []


def test_a_package_again_in_another_version(repo: RepoFarm) -> None:
    """Its name is where its older version is."""
    repo.add(repo.package("hello", "2.0-1"))
    repo.remove("other")
    assert repo.read() == ["hello 1.0-1", "hello 2.0-1"] and repo.fsck() == []


@pytest.mark.parametrize("pattern", ["*.gz", "*[!z]"])
@pytest.mark.parametrize("at", [0, 140, -1])
def test_a_damaged_part_is_not_taken_from(repo: RepoFarm, pattern: str, at: int) -> None:
    for file in (repo.top / ".farmhand/rendered").glob(f"*/{pattern}"):
        data = bytearray(file.read_bytes())
        data[min(at, len(data) - 1)] ^= 1
        file.write_bytes(data)
    repo.add(repo.package("third"))
    assert repo.read() == THREE and repo.fsck() == []


@pytest.mark.parametrize("size", [0, 60, 200])
def test_a_part_that_a_power_cut_tore(repo: RepoFarm, size: int) -> None:
    """They aren't written durably."""
    for file in caches_of(repo, "rendered"):
        file.write_bytes(file.read_bytes()[:size])
    repo.add(repo.package("third"))
    assert repo.read() == THREE and repo.fsck() == []


def test_a_snapshot_renders_nothing(repo: RepoFarm) -> None:
    forget(repo, "readings", "rendered")
    repo.promote()
    repo.rollback(to=1)
    assert not caches_of(repo, "readings") and not caches_of(repo, "rendered")
    assert repo.read("tested") == ["hello 1.0-1", "other 1.0-1"]
    assert repo.read() == ["hello 1.0-1"]
    assert repo.fsck() == []


def test_a_snapshot_of_a_damaged_index_is_made_anew(repo: RepoFarm) -> None:
    tree = repo.top / "generations/2"
    for file in [*tree.rglob("*.gz"), *tree.rglob("by-hash/SHA256/*")]:
        change(file, file.read_bytes()[:-1] + b"\1")
    repo.promote()
    assert repo.read("tested") == ["hello 1.0-1", "other 1.0-1"]
    assert repo.fsck(), "the old one is damaged"
    assert not [line for line in repo.fsck() if "generations/3" in line or "channels/tested" in line]


def test_sums_that_are_not_those_that_were_published_are_made_anew(repo: RepoFarm) -> None:
    path = repo.top / ".farmhand/generations/2.json"
    document = json.loads(path.read_text())
    for index in document["indexes"]:
        index["plain"]["size"] += 1
    path.write_text(json.dumps(document))
    repo.promote()
    assert not [line for line in repo.fsck() if "generations/3" in line]


def test_fsck_looks_at_what_generations_share_once(
    repo: RepoFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        repo.rollback(to=2)
    read: Counter[str] = Counter()
    packages = Chunks.packages

    def counted(chunks: Chunks, chunk: ChunkRef) -> tuple[Package, ...]:
        read[chunk.digest] += 1
        return packages(chunks, chunk)

    monkeypatch.setattr(Chunks, "packages", counted)
    assert repo.fsck() == []
    assert set(read.values()) == {2}, "once for what is there, once for what is left over"
