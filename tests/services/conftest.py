"""Directories short enough for unix sockets, and readable for daemons under users of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemons
from networks import own_network
from yard import Yard


@pytest.fixture
def yard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Yard]:
    directory = Path(tempfile.mkdtemp(prefix="fhn-"))
    directory.chmod(0o755)
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(directory / "state"))
    try:
        yield Yard(directory)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def daemons(yard: Yard) -> Iterator[Daemons]:
    with own_network():
        made = Daemons(yard)
        try:
            yield made
        finally:
            made.stop()
