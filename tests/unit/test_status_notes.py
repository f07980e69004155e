"""What a hypervisor sees in its guests, as status has it: beside all else, and never in its way."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from inventory.errors import DriverFailed
from provision.engine.report import QuietReporter
from provision.site import open_site
from tests import farm

FARM = (
    "farm: kata\nhosts: {here: {driver: fake}}\ntemplates: {base: {build: debian-12}}\nvms: {prod: {}}\n"
)


class Watched(FakeHypervisor):
    """It sees something, or fails to, or hangs on it until it is let go."""

    how = ""
    let_go: threading.Event

    def notes(self) -> Mapping[str, str]:
        if self.how == "hangs":
            self.let_go.wait(60)
        if self.how == "fails":
            raise DriverFailed("lost")
        return {"kata-prod": "its guest sulks"}


@pytest.mark.parametrize(
    ("how", "note"), [("sees", "its guest sulks"), ("fails", ""), ("hangs", "")], ids=str
)
def test_notes(how: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setattr("hypervisors.look._PATIENCE", 5.0 if how == "sees" else 0.2)
    monkeypatch.setattr(Watched, "how", how)
    monkeypatch.setattr(Watched, "let_go", threading.Event(), raising=False)
    (tmp_path / "kata.yaml").write_text(FARM)
    with open_site(tmp_path / "kata.yaml", reporter=QuietReporter()) as site:
        farm.clone_farm(site)
        store = site.disks("here")
        assert isinstance(store, FakeDisks)
        opened = site.opened("here")
        opened._hypervisor = Watched(site.identity, store, opened.state())
        (row,) = farm.status(site).vms
        farm.stop(site)
        (stopped,) = farm.status(site).vms
    Watched.let_go.set()
    assert (row.state, row.note, row.as_dict()["note"]) == ("running", note, note)
    assert stopped.note == "", "nobody is asked"
