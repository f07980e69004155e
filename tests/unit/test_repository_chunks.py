"""Lists of packages in chunks: whatever way a set of packages came about, its chunks are the same."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import repositories.chunks
from host import documents
from repositories.chunks import ChunkRef, Chunks, _cuts, key_of
from repositories.generation import LogEntry
from repositories.layout import Layout
from repositories.package import Package
from repositories.repository import Repository
from tests.unit.repo_tree import RepoTree, make_deb

# With 256 on average a small set would be one chunk
NAMES = [f"p{number}" for number in range(60)]
VERSIONS = ["1", "2"]
STEPS = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VERSIONS)), min_size=1, max_size=12),
    ),
    max_size=12,
)


def made(name: str, version: str) -> Package:
    return Package(name, version, "all", f"{zlib.crc32(name.encode()):064x}", 7, f"{name}_{version}.deb")


@given(steps=STEPS)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_way_there_is_the_same(tmp_path: Path, monkeypatch, steps) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(repositories.chunks, "_MEAN", 5)
    chunks = Chunks(Layout(tmp_path))
    now: tuple[repositories.chunks.ChunkRef, ...] = ()
    have: dict[object, Package] = {}
    for adds, names in steps:
        packages = [made(*each) for each in names]
        if adds:
            now = chunks.changed(now, packages, [])
            have.update((key_of(package), package) for package in packages)
        else:
            now = chunks.changed(now, [], packages)
            for package in packages:
                have.pop(key_of(package), None)
        assert now == chunks.changed((), have.values(), [])
        assert list(chunks.all(now)) == sorted(have.values(), key=key_of)
    for name in NAMES:
        assert set(chunks.named(now, name)) == {p for p in have.values() if p.name == name}


def test_one_change_writes_three_chunks_at_most(tmp_path: Path) -> None:
    chunks = Chunks(Layout(tmp_path))
    dice = random.Random(1)
    packages = [made(f"package-{number}", "1") for number in range(6000)]
    now = chunks.changed((), packages, [])
    assert 10 < len(now) < 50
    for package in dice.sample(packages, 100):
        fresh = made(package.name, "2")
        for after in (
            chunks.changed(now, [fresh], [package]),
            chunks.changed(now, [], [package]),
            chunks.changed(now, [made(f"{package.name}-more", "1")], []),
        ):
            assert len(set(after) - set(now)) <= 3
            assert len(set(now) - set(after)) <= 3


def test_a_publish_costs_little_for_each_that_clients_may_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many chunks its generation has, and however long the log is."""
    tree = RepoTree(tmp_path / "repository")
    names = [name for name in (f"p{number}" for number in range(20_000)) if _cuts(name)][:40]
    tree.publish("tested", *((name, make_deb(name)) for name in names))
    for number in range(20):
        tree.publish("tested", (f"n{number}", make_deb(f"n{number}")))
    counts: Counter[object] = Counter()
    plain = documents._made

    def counted(kind: object, *args: object) -> object:
        counts[kind] += 1
        return plain(kind, *args)

    monkeypatch.setattr(documents, "_made", counted)
    tree.repository = Repository(tree.repository.settings)  # as in another process
    tree.publish("tested", ("last", make_deb("last")))
    chunks = len(tree.repository.generation("tested").chunks)
    assert chunks > 35
    assert counts[ChunkRef] <= 4 * chunks  # the present one's and the next one's
    assert counts[LogEntry] <= 4 * 21
