"""A device whose opening is to be tried again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from host.files import open_node

ERESTARTSYS = 512


def fail(monkeypatch: pytest.MonkeyPatch, times: int, code: int) -> list[int]:
    real, tried = os.open, []

    def opened(path: Path, flags: int) -> int:
        tried.append(flags)
        if len(tried) <= times:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags)

    monkeypatch.setattr(os, "open", opened)
    return tried


def test_a_busy_pools_volume_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "volume"
    path.write_bytes(b"x")
    tried = fail(monkeypatch, 2, ERESTARTSYS)
    with os.fdopen(open_node(path, os.O_RDONLY), "rb") as file:
        assert file.read() == b"x"
    assert len(tried) == 3


def test_not_for_ever_and_not_after_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fail(monkeypatch, 99, ERESTARTSYS)
    with pytest.raises(OSError, match="512"):
        open_node(tmp_path, os.O_RDONLY, timeout=0.12)
    assert 2 <= len(tried) <= 4
    monkeypatch.undo()
    tried = fail(monkeypatch, 99, 5)
    with pytest.raises(OSError, match="Input/output error"):
        open_node(tmp_path, os.O_RDONLY)
    assert len(tried) == 1
