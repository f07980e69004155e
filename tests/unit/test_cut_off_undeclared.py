"""What was cut off of a VM that the farm file has no more: it may have another name there by now, and
what is left half done is not forgotten. On the fake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_farm import Desk, lines
from test_renew import content, write

from builds import clean
from builds.clean import Clean
from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from inventory.errors import DriverFailed, WrongState, spelled
from provision.engine.runner import perform
from provision.operations.merge import MERGE, MergeFacts
from tests import farm

DEV = "  dev2: {memory: 512M, idle_memory: 256M}\n"
BOTH = f"{DEV}  prod: {{memory: 512M}}\n"
RENAMED = f"{DEV}  build: {{memory: 512M}}\n"

AMISS = "is not in the farm file any more, and its "
PUT_BACK = (
    "put prod back in the farm file, recover, then rename it; or, if it is to go, destroy --vm prod"
)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Of dev2 and prod, which run; prod holds what its guest wrote."""
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setattr(clean, "equip", lambda *_: ["ccache 1.0 amd64"])
    monkeypatch.setattr(FakeDisks, "merge", lambda *_: None, raising=False)
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    write(desk, b"mine")
    return desk


def cut(desk: Desk, where: type, at: str, act: Callable[..., Any], *arguments: Any, **more: Any) -> None:
    """Killed when that was done."""
    real = getattr(where, at)

    def killed(*given: Any, **options: Any) -> Any:
        real(*given, **options)
        raise KeyboardInterrupt

    with (
        pytest.MonkeyPatch.context() as patch,
        desk.site() as site,
        pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(where, at, killed)
        act(site, *arguments, **more)


def cut_clean(desk: Desk) -> None:
    cut(desk, FakeDisks, "restore", perform, Clean(("prod",), packages=("ccache",)))


def cut_clean_that_answered(desk: Desk) -> None:
    cut(desk, FakeDisks, "remove_checkpoint", perform, Clean(("prod",), packages=("ccache",)))


def cut_renew(desk: Desk) -> None:
    with desk.site() as site:
        farm.template_build(site, "base")
    cut(desk, FakeDisks, "move", farm.renew, ["prod"])


def cut_warm(desk: Desk) -> None:
    cut(desk, FakeHypervisor, "_pause", farm.checkpoint, ["prod"], "hot", warm=True)


def cut_merge(desk: Desk) -> None:
    """As in a store that can."""
    with (
        desk.site() as site,
        pytest.raises(KeyboardInterrupt),
        site.journal.begin(MERGE, ["prod"], MergeFacts(into="kept", was_on=("prod",), decided=True)),
    ):
        raise KeyboardInterrupt


CUTS = pytest.mark.parametrize(
    "half", [cut_clean, cut_clean_that_answered, cut_renew, cut_warm, cut_merge]
)


@CUTS
def test_it_is_not_renamed_before_it_is_recovered(made: Desk, half: Callable[[Desk], None]) -> None:
    half(made)
    verb = half.__name__.split("_")[1].replace("warm", "checkpoint")
    made.write(RENAMED)
    for _ in range(2):
        with made.site() as site, pytest.raises(WrongState) as caught:
            farm.rename(site, "build", "prod")
        assert f"a {verb} of prod is half done" in caught.value.message
        assert f"; in its way: kata.yaml: prod {AMISS}{verb} is half done" in caught.value.message
        assert PUT_BACK in caught.value.message
    with made.site() as site, pytest.raises(WrongState) as caught:
        farm.recover(site)
    assert spelled(caught.value.remedy) == PUT_BACK
    warned = len(made.heard.warnings)
    made.run(farm.reset, ["dev2"])
    assert len(made.heard.warnings) == warned, "other VMs are not concerned"
    made.write(BOTH)
    with made.site() as site:
        farm.recover(site)
        assert not site.journal.unfinished()
    made.write(RENAMED)
    made.run(farm.rename, "build", "prod")
    assert content(made, "build") == (b"" if half is cut_clean_that_answered else b"mine")


@CUTS
def test_destroyed_it_is_settled(made: Desk, half: Callable[[Desk], None]) -> None:
    half(made)
    made.write(RENAMED)
    made.run(farm.destroy, ["prod"])
    with made.site() as site:
        noted = "it is there or not, and complete" if half is cut_warm else "it is no longer declared"
        assert lines(farm.recover(site))[0].endswith(f"{noted}; noted")
        assert not site.journal.unfinished()
    made.run(farm.clone_farm)


def test_of_a_group_all_or_none(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """dev2 isn't put back alone, unless prod is gone."""
    write(made, b"theirs", "dev2")
    cut(made, FakeDisks, "restore_all", farm.reset, ["prod", "dev2"])
    write(made, b"mine")
    write(made, b"theirs", "dev2")
    made.write(RENAMED)
    with made.site() as site, pytest.raises(WrongState, match=f"prod {AMISS}reset is half done"):
        farm.recover(site)
    with made.site() as site, pytest.raises(WrongState, match="a reset of dev2, prod is half done"):
        farm.start(site, ["dev2"])
    assert content(made, "dev2") == b"theirs"
    made.run(farm.destroy, ["prod"])
    with made.site() as site:
        assert "put back to clean" in lines(farm.recover(site))[0]
    assert content(made, "dev2") == b""


def test_one_whose_recovery_fails_is_not_renamed(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as its host can't tell whether it is there."""
    cut_warm(made)
    made.write(RENAMED)

    def gone(*_: object) -> None:
        raise DriverFailed("its host is gone")

    with monkeypatch.context() as patch, made.site() as site:
        patch.setattr(FakeHypervisor, "find", gone)
        with pytest.raises(WrongState, match="in its way: its host is gone"):
            farm.rename(site, "build", "prod")


def test_what_leaves_nothing_half_done_is_noted(made: Desk) -> None:
    cut(made, FakeHypervisor, "stop", farm.stop, ["prod"])
    made.write(RENAMED)
    made.run(farm.rename, "build", "prod")
    assert content(made, "build") == b"mine"
