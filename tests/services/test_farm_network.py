"""Network records come with clone-farm and go with destroy."""

from __future__ import annotations

from daemons import Daemons
from test_apply import ask
from yard import Yard

from tests import farm


def seal(yard: Yard) -> None:
    """A template on the in-memory driver."""
    from datetime import UTC, datetime

    from hypervisors.api import Template

    image = yard.directory / "image.qcow2"
    image.write_bytes(b"an image")
    with yard.site() as site:
        site.prepare()
        site.disks("here").seal(
            image,
            Template(
                name="base", generation=1, ref="", size=2**30, sha256="0", created=datetime.now(UTC),
                origin="test", firstboot="none",
            ),
        )  # fmt: skip


def test_records_come_and_go_with_the_vms(yard: Yard, daemons: Daemons) -> None:
    yard.use("bind", "hosts")
    (yard.directory / "hosts").write_text("127.0.0.1 localhost\n")
    daemons.start("bind")
    seal(yard)
    with yard.site() as site:
        farm.clone_farm(site, ["dev2"], wait=False)
        assert ask("dev2.try.example", "A") == ["10.77.0.6"]
        assert ask("prod.try.example", "A") == []
        farm.clone_farm(site, wait=False)
        assert ask("prod.try.example", "A") == ["10.77.0.7"]
        assert not farm.clone_farm(site, wait=False).changed
        farm.destroy(site, ["prod"])
        assert ask("prod.try.example", "A") == []
        assert ask("7.0.77.10.in-addr.arpa", "PTR") == []
        assert ask("dev2.try.example", "A") == ["10.77.0.6"]
        farm.destroy(site)
    assert ask("dev2.try.example", "A") == []
    assert (yard.directory / "hosts").read_text() == "127.0.0.1 localhost\n"


def test_the_plan_says_so_too(yard: Yard) -> None:
    yard.use("hosts")
    seal(yard)
    with yard.site(plan=True) as site:
        planned = farm.clone_farm(site, wait=False).actions
    with yard.site() as site:
        done = farm.clone_farm(site, wait=False).actions
    assert planned == done
    assert any("hosts" in action.text for action in done)
