"""The sums that memory images are sealed by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hypervisors.libvirt.warm.images import _copy_sparse, _sum

MIB = 2**20
SIZE = 5 * MIB + 4096


def sparse(path: Path, parts: dict[int, bytes], size: int = SIZE) -> Path:
    with path.open("xb") as file:
        os.truncate(file.fileno(), size)
        for place, data in parts.items():
            os.pwrite(file.fileno(), data, place)
    return path


PARTS = {4096: b"a" * 4096, MIB - 4096: b"b" * 8192, 2 * MIB: bytes(MIB), 5 * MIB: b"c" * 4096}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return sparse(tmp_path / "image", PARTS)


def test_a_copy_has_the_same_sum_also_one_whose_holes_were_filled(image: Path, tmp_path: Path) -> None:
    filled, copy = tmp_path / "filled", tmp_path / "copy"
    filled.write_bytes(image.read_bytes())
    _copy_sparse(image, copy)
    assert filled.stat().st_blocks > image.stat().st_blocks
    assert _sum(image) == _sum(filled) == _sum(copy)
    assert copy.read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    "parts",
    [
        {},
        PARTS | {4096: b"a" * 4095 + b"x"},
        PARTS | {3 * MIB: b"\1"},
        {4096 + 1: b"a" * 4096} | {place: data for place, data in PARTS.items() if place != 4096},
        {place + (MIB if place == 5 * MIB else 0): data for place, data in PARTS.items()},
    ],
    ids=["empty", "a byte", "a hole", "moved", "further on"],
)
def test_any_other_content_has_another(parts: dict[int, bytes], image: Path, tmp_path: Path) -> None:
    size = max(SIZE, *(place + len(data) for place, data in parts.items()), 0)
    assert _sum(sparse(tmp_path / "other", parts, size)) != _sum(image)


def test_so_has_one_that_is_longer_or_shorter_by_a_hole(image: Path, tmp_path: Path) -> None:
    longer = sparse(tmp_path / "longer", PARTS, SIZE + MIB)
    assert _sum(longer) != _sum(image)
    assert _sum(sparse(tmp_path / "a", {}, MIB)) != _sum(sparse(tmp_path / "b", {}, 2 * MIB))


def test_holes_are_not_read(tmp_path: Path) -> None:
    """An hour of reading."""
    big = sparse(tmp_path / "big", {2**41: b"x"}, 2**42)
    assert len(_sum(big)) == 64
