"""What destroy takes, and what it does not when it was cut off. On the fake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_farm import Desk, lines
from test_renew import content, write

from hypervisors.fake.driver import FakeHypervisor
from inventory.errors import DriverFailed, NotOurs, WrongState, spelled
from provision.engine.journal import Entry
from provision.guest.identity import host_key_file
from provision.operations import destroy
from provision.operations.merge import MERGE, MergeFacts
from provision.site import Site
from tests import farm

TWO = """\
farm: kata
hosts: {{a: {{driver: fake}}, b: {{driver: fake}}}}
templates: {{base: {{build: debian-12, size: 64M}}}}
vms: {{prod: {{host: {host}}}}}
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    write(desk, b"work")
    return desk


@pytest.mark.parametrize("again", ["start", "recover"])
@pytest.mark.parametrize("vms", [["prod"], []], ids=["one", "the farm"])
def test_interrupted_before_anything_is_gone_it_is_no_more_meant(
    made: Desk, vms: list[str], again: str
) -> None:
    before = made.files()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, made.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(destroy, "erase", interrupted)
        farm.destroy(site, vms)
    done = lines(made.run(farm.start, ["dev2"]) if again == "start" else made.run(farm.recover))
    assert any("it had not begun, nothing is gone" in line for line in done)
    assert not before.keys() - made.files().keys(), "keys, journal, files of disks"
    assert content(made) == b"work"
    with made.site() as site:
        assert not site.journal.unfinished()


@pytest.mark.parametrize("vms", [["prod"], []], ids=["one", "the farm"])
def test_each_change_has_a_step_before_it(made: Desk, vms: list[str]) -> None:
    """Cut off at its very first step, all is there still, whatever recovery takes the step for."""
    real: Callable[..., None] = Entry.step
    before = made.files()

    def cut(entry: Entry[Any], text: str) -> None:
        real(entry, text)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, made.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(Entry, "step", cut)
        farm.destroy(site, vms)
    gone = {path for path in before.keys() - made.files().keys() if "journal" not in path}
    assert not gone
    assert content(made) == b"work"
    with made.site() as site:
        assert "finish it" in lines(farm.recover(site))[0]
    assert made.machine("prod") is None


def test_one_that_was_made_on_another_host_goes_there(made: Desk) -> None:
    """The farm file named that one then."""
    made.run(farm.destroy)
    made.file.write_text(TWO.format(host="a"))
    made.run(farm.clone_farm)
    made.file.write_text(TWO.format(host="b"))
    with made.site() as site:
        assert site.hypervisor("a").find("kata-prod") is not None
        assert site.hypervisor("b").find("kata-prod") is None
    made.run(farm.destroy, ["prod"])
    with made.site() as site:
        assert site.hypervisor("a").find("kata-prod") is None
        assert site.disks("a").find("kata-prod") is None
        assert not site.allocator.recorded()


def test_what_is_nobodys_on_another_host_is_not_in_the_way(made: Desk) -> None:
    made.run(farm.destroy)
    made.file.write_text(TWO.format(host="b"))
    made.run(farm.clone_farm)
    with made.site() as site:
        site.hypervisor("a").add_foreign("kata-prod")  # type: ignore[attr-defined]
    made.run(farm.destroy, ["prod"])
    with made.site() as site:
        assert site.hypervisor("b").find("kata-prod") is None
        assert site.hypervisor("a").find("kata-prod") is not None
        site.hypervisor("b").add_foreign("kata-prod")  # type: ignore[attr-defined]
    with made.site() as site, pytest.raises(NotOurs):
        farm.clone_farm(site)


@pytest.mark.parametrize("whole", [False, True], ids=["two", "the farm"])
def test_half_done_nothing_is_made_that_would_go_with_the_rest(made: Desk, whole: bool) -> None:
    vms = [] if whole else ["dev2", "prod"]
    with (
        made.site() as site,
        pytest.raises(KeyboardInterrupt),
        site.journal.begin(destroy.DESTROY, vms, destroy.DestroyFacts(whole=whole)) as entry,
    ):
        entry.step("the first")
        raise KeyboardInterrupt
    real = FakeHypervisor.destroy

    def destroys(self: FakeHypervisor, name: str) -> None:
        if name == "kata-prod":
            raise DriverFailed("the host does not answer")
        real(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeHypervisor, "destroy", destroys)
        with made.site() as site, pytest.raises(WrongState, match="is half done: dev2 can't be used"):
            farm.clone_farm(site, ["dev2"])
        with made.site() as site:
            farm.gc(site)
    made.run(farm.recover)
    made.run(farm.clone_farm)
    with made.site() as site:
        assert not site.journal.unfinished()


def test_a_host_that_is_down_is_no_others_trouble(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made.run(farm.destroy)
    made.file.write_text(TWO.format(host="a"))
    made.run(farm.clone_farm)
    real = Site.hypervisor

    def hypervisor(self: Site, host: str, **options: Any) -> Any:
        if host == "b":
            raise DriverFailed("b does not answer")
        return real(self, host, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "hypervisor", hypervisor)
        made.run(farm.destroy, ["prod"])
        assert any("host b is passed over: b does not answer" in one for one in made.heard.warnings)
        with made.site() as site:
            assert site.hypervisor("a").find("kata-prod") is None
            with pytest.raises(DriverFailed, match="b does not answer"):
                farm.destroy(site)
    made.file.write_text(TWO.format(host="b"))
    with monkeypatch.context() as patch, made.site() as site:
        patch.setattr(Site, "hypervisor", hypervisor)
        with pytest.raises(DriverFailed, match="b does not answer"):
            farm.destroy(site, ["prod"])


def test_one_that_may_be_on_a_host_that_is_down_keeps_its_keys_and_addresses(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The farm file named that host when it was made."""
    made.run(farm.destroy)
    made.file.write_text(TWO.format(host="b"))
    made.run(farm.clone_farm)
    made.file.write_text(TWO.format(host="a"))
    real = Site.hypervisor

    def hypervisor(self: Site, host: str, **options: Any) -> Any:
        if host == "b":
            raise DriverFailed("b does not answer")
        return real(self, host, **options)

    with made.site() as site:
        key, given = host_key_file(site.paths, "prod").read_bytes(), site.allocator.recorded()
    with monkeypatch.context() as patch:
        patch.setattr(Site, "hypervisor", hypervisor)
        for _ in range(2):
            with made.site() as site:
                (action,) = farm.destroy(site, ["prod"]).actions
            assert spelled(action.text) == (
                "what it may have on b stays, and so do its keys and addresses: "
                "destroy --vm prod again when b answers"
            )
    with made.site() as site:
        assert host_key_file(site.paths, "prod").read_bytes() == key
        assert site.allocator.recorded() == given
        assert site.hypervisor("b").find("kata-prod") is not None
    made.run(farm.destroy, ["prod"])
    with made.site() as site:
        assert site.hypervisor("b").find("kata-prod") is None
        assert not host_key_file(site.paths, "prod").exists()
        assert not site.allocator.recorded()


@pytest.mark.parametrize("vms", [["prod"], ["prod", "dev2"]], ids=["one", "two"])
def test_what_nobody_can_read_goes_with_its_vms(made: Desk, vms: list[str]) -> None:
    """As another farmhand wrote it; not with one of two: who knows what it has done to the other."""
    with (
        made.site() as site,
        pytest.raises(KeyboardInterrupt),
        site.journal.begin(MERGE, vms, MergeFacts(into="kept", was_on=(), decided=True)) as entry,
    ):
        raise KeyboardInterrupt
    with made.site() as site:
        site.journal.write("UPDATE operations SET facts = '{}' WHERE id = ?", (entry.id,))
    for asked in (vms,) if len(vms) == 1 else (vms[:1], vms):
        with made.site() as site, pytest.raises(WrongState, match="is half done"):
            farm.clone_farm(site, vms)
        with made.site() as site:
            farm.destroy(site, asked)
            assert bool(site.journal.unfinished()) == (asked != vms)
    made.run(farm.clone_farm)
