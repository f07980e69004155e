"""A VM that libvirt itself saved, for an admin (virsh managedsave) or as its machine went down
(libvirt-guests), counts as stopped, and its next start gives it that memory. So no disk is kept, moved
or put back under it: that is refused, or the memory goes, and somebody is told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import libvirt
import pytest
from bench import Bench

from builds.clean import Clean
from hypervisors.libvirt.warm.images import _NEW as NEW
from hypervisors.libvirt.warm.images import ONLY
from inventory.errors import Text, WrongState, spelled
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.member import Member
from provision.power import STOP, StopFacts
from provision.site import Site
from tests import farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]


class Heard(QuietReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.warnings.append(spelled(text))


@contextlib.contextmanager
def domain(site: Site) -> Iterator[libvirt.virDomain]:
    daemon = site.daemon()
    assert daemon
    connection = libvirt.open(daemon.uri())
    try:
        yield connection.lookupByName(Member(site, "prod").machine)
    finally:
        connection.close()


@pytest.mark.parametrize("bench", ["kvm"], indirect=True)
def test_no_other_disk_is_put_under_its_memory(bench: Bench) -> None:
    heard = Heard()
    with bench.site() as site:
        farm.clone_farm(site, ["prod"], wait=False)
        with domain(site) as one:
            one.managedSave(0)
        image, store = bench.file.with_name("base.qcow2"), site.disks("here")
        bench.place.make_image(image)
        store.seal(image, replace(store.templates()[0], generation=2, ref="", farm=None))
        before = bench.disk(site, "prod")
        refused: list[Callable[[], object]] = [
            lambda: farm.checkpoint(site, ["prod"], "kept", wait=False),
            lambda: farm.renew(site, ["prod"], wait=False),
            lambda: perform(site, Clean(("prod",), script="true", script_name="x.sh")),
        ]
        for wants in refused:
            with pytest.raises(WrongState, match="is saved, not stopped"):
                wants()
        assert bench.disk(site, "prod") == before
        with domain(site) as one:
            assert one.hasManagedSaveImage(0), "nothing is lost"
    bench.recovered("refused")
    with Site(load(bench.file), reporter=heard) as site:
        farm.reset(site, ["prod"], start=False)
        with domain(site) as one:
            assert not one.hasManagedSaveImage(0)
    assert heard.warnings == [
        "kill-prod was saved (virsh managedsave): that memory is given up with its disk"
    ]


@pytest.mark.parametrize("bench", ["kvm"], indirect=True)
def test_a_vms_only_memory_is_left_alone_by_what_is_recovered_beside_it(bench: Bench) -> None:
    """It may be all that is left of what it did; nobody but its own recovery knows that."""
    with bench.site() as site:
        farm.clone_farm(site, start=False)
        place = site.paths.root / "warm" / Member(site, "prod").machine / f"{NEW}0123abcd-hot"
        place.mkdir(parents=True)
        (place / ONLY).touch()
        with (
            pytest.raises(KeyboardInterrupt),
            site.journal.begin(STOP, ["dev2"], StopFacts(force=True)),
        ):
            raise KeyboardInterrupt
    with bench.site() as site:
        farm.recover(site)
        assert (place / ONLY).exists()
        farm.gc(site)  # who asks for it is told what goes
    assert not place.exists()
