"""KVM or emulation, as a farm asks for it: under a real libvirtd, and as another machine's over ssh."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import small_guest
from far_rig import FarMachine
from rigs import FARM, NOT_RUN, SIZE, short_directory, template

from cli.views import farm_status
from host.paths import cache_dir
from host.run import Runner, which
from hypervisors.api import Machine, Power
from hypervisors.libvirt import kvm
from hypervisors.libvirt.kvm import KvmVerdict, distrust_kvm, kvm_usable, try_guest
from inventory.errors import Text, Unsupported, UsageError, spelled
from inventory.loader import load
from provision.doctor import examine
from provision.engine.report import Outcome, QuietReporter
from provision.site import Site, open_site
from tests import farm

FAST = KvmVerdict(True, "KVM runs a guest 14 times as fast as emulation")
ASKED = "emulation is what was asked for (accelerator: tcg)"


class Heard(QuietReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: Text, *, vm: str = "") -> None:
        self.said.append(f"{vm}: {spelled(text)}")


class Desk:
    """A farm of one VM, whose guest starts in a second or two."""

    def __init__(self, place: Path, guest: small_guest.Guest, patch: pytest.MonkeyPatch) -> None:
        self.file = place / "kata.yaml"
        self.guest = guest
        self.patch = patch
        self.heard = Heard()
        (place / "key").touch(0o600)  # of an image that nobody tells whom to let in
        self.write("auto")

    def write(self, accelerator: str) -> None:
        boot = f"{{kernel: {self.guest.kernel}, initrd: {self.guest.initrd}, cmdline: console=ttyS0}}"
        self.file.write_text(
            f"farm: {FARM}\nhosts: {{here: {{accelerator: {accelerator}}}}}\n"
            f"templates: {{base: {{build: debian-12, boot: {boot}}}}}\nssh: {{key: key}}\n"
            "vms: {prod: {memory: 192M}}\n"
        )

    def site(self, *, plan: bool = False) -> Site:
        return Site(load(self.file), reporter=self.heard, plan=plan)

    def run(self, operation: Callable[..., Outcome], *, plan: bool = False, **options) -> list[str]:
        with self.site(plan=plan) as site:
            return [str(action) for action in operation(site, **options).actions]

    def machine(self) -> Machine | None:
        with self.site() as site:
            return site.hypervisor("here").find(f"{FARM}-prod")

    def seal(self) -> None:
        with self.site() as site:
            site.prepare()
            image = site.paths.root / "image"
            Runner().change("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
            site.disks("here").seal(image, template())

    def verdict(self, verdict: KvmVerdict) -> None:
        """What was found out, whatever it is on this machine."""
        device = self.file.with_name("kvm")
        device.touch()
        self.patch.setattr(kvm, "_DEVICE", device)
        qemu = which("qemu-system-x86_64")
        assert qemu
        kvm._remember(cache_dir(), qemu, verdict)

    def as_if_kvm_had_worked(self) -> None:
        """As libvirt's own file has it, while nobody runs: a daemon loads such a definition, too, where
        it would not take a new one."""
        with self.site() as site:
            private = site.daemon()
            private.stop()
            [file] = private._definitions.glob("*.xml")
        text = file.read_text()
        for old, new in (("type='qemu'", "type='kvm'"), ("mode='maximum'", "mode='host-passthrough'")):
            assert text.count(old) == 1
            text = text.replace(old, new)
        file.write_text(text)


@pytest.fixture
def desk(guest: small_guest.Guest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    place, known = short_directory(), cache_dir() / "libvirt"
    known.mkdir(parents=True, exist_ok=True)
    for name in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(place / name[0].lower()))
    monkeypatch.delenv("FARMHAND_ACCELERATOR", raising=False)
    (place / "c").mkdir()
    (place / "c" / "libvirt").symlink_to(known)  # what libvirt found out about QEMU takes seconds
    made = Desk(place, guest, monkeypatch)
    yield made
    with made.site() as site:
        site.daemon().stop(force=True)
    shutil.rmtree(place)


def test_our_guest_runs_under_kvm(tmp_path: Path) -> None:
    verdict = kvm_usable(Runner(), tmp_path)
    assert verdict.why and "\n" not in verdict.why
    if not verdict.usable:
        NOT_RUN.append(f"the guest that KVM is judged by, under KVM ({verdict.why})")
        return
    qemu = which("qemu-system-x86_64")
    assert qemu
    trial = try_guest(Runner(), qemu, "kvm", 60)
    assert trial.why == ""
    assert 0 < trial.work < trial.whole


def test_a_vm_of_another_verdict_is_defined_anew_at_its_next_start(desk: Desk) -> None:
    desk.write("tcg")
    desk.seal()
    desk.run(farm.clone_farm, start=False)
    assert desk.machine().accelerated is False
    desk.as_if_kvm_had_worked()
    assert desk.machine().accelerated is True
    change = f"change its definition to run under QEMU's emulation: {ASKED}"
    assert desk.run(farm.clone_farm, plan=True, start=False) == [f"prod: {change}"]
    desk.run(farm.start, wait=False)
    assert f"prod: its definition was changed to run under QEMU's emulation: {ASKED}" in desk.heard.said
    machine = desk.machine()
    assert (machine.accelerated, machine.power) == (False, Power.RUNNING)
    desk.write("auto")
    desk.verdict(FAST)
    change = f"change its definition to run under KVM: {FAST.why}"
    later = f"prod: takes effect at its next stop or reset: {change}"
    assert desk.run(farm.clone_farm, plan=True, wait=False) == [later]
    desk.verdict(KvmVerdict(False, "it is slow"))
    assert desk.run(farm.clone_farm, wait=False) == ["prod: already as declared"]
    assert desk.machine().started == machine.started


def test_a_reset_defines_it_anew(desk: Desk) -> None:
    desk.seal()
    desk.verdict(KvmVerdict(False, "it is slow"))
    desk.run(farm.clone_farm, start=False)
    desk.as_if_kvm_had_worked()
    desk.run(farm.reset, wait=False)
    assert (
        "prod: its definition was changed to run under QEMU's emulation: it is slow" in desk.heard.said
    )
    machine = desk.machine()
    assert (machine.accelerated, machine.power) == (False, Power.RUNNING)


def test_kvm_that_works_by_now_is_taken(desk: Desk) -> None:
    """Its libvirtd had been told that there is none."""
    if not Path("/dev/kvm").exists():
        NOT_RUN.append("a VM is defined for KVM (there is no /dev/kvm here)")
        return
    desk.write("tcg")
    desk.seal()
    desk.run(farm.clone_farm, start=False)
    desk.write("auto")
    desk.verdict(FAST)
    assert desk.run(farm.clone_farm, start=False) == [
        f"prod: change its definition to run under KVM: {FAST.why}"
    ]
    assert desk.machine().accelerated is True
    assert desk.run(farm.clone_farm, start=False) == ["prod: already as declared"]


def test_where_kvm_is_asked_for_and_fails_nothing_is_begun(desk: Desk) -> None:
    desk.write("kvm")
    desk.verdict(KvmVerdict(False, "KVM failed: no MSR"))
    wanted = re.escape("kata.yaml: host here is to use KVM (accelerator: kvm): KVM failed: no MSR")
    for plan in (True, False):
        with pytest.raises(Unsupported, match=wanted) as caught:
            desk.run(farm.clone_farm, plan=plan)
        assert "accelerator: auto" in caught.value.remedy
        assert "\n" not in str(caught.value)
    with desk.site() as site:
        assert not site.disks("here").list()
        assert not list(site.journal.unfinished())
        assert site.hypervisor("here").list() == []
    [check] = [c for c in examine(desk.file, hosts=False).checks if c.name == "kvm"]
    assert (check.ok, check.level) == (False, "needed")
    assert check.text == "KVM is asked for (accelerator: kvm), but doesn't work (KVM failed: no MSR)"


def test_a_vm_that_may_not_start_can_be_looked_at_stopped_and_destroyed(desk: Desk) -> None:
    desk.write("tcg")
    desk.seal()
    desk.run(farm.clone_farm, wait=False)
    desk.write("kvm")
    desk.verdict(KvmVerdict(False, "KVM failed: no MSR"))
    with desk.site() as site:
        found = farm.status(site)
    assert [row.error for row in found.vms] == [""]
    assert re.search(r"host here: qemu, .* free; KVM failed: no MSR\n", farm_status(found).text)
    desk.run(farm.stop, force=True)
    for operation in (farm.start, farm.reset):
        with pytest.raises(Unsupported, match="is to use KVM"):
            desk.run(operation, wait=False)
    assert desk.machine().power is Power.STOPPED
    desk.run(farm.destroy, vms=["prod"])
    assert desk.machine() is None


def test_the_environment_is_told_too(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.verdict(FAST)
    desk.write("kvm")
    monkeypatch.setenv("FARMHAND_ACCELERATOR", "tcg")
    desk.seal()
    desk.run(farm.clone_farm, start=False)
    assert desk.machine().accelerated is False
    [check] = [c for c in examine(desk.file, hosts=False).checks if c.name == "kvm"]
    assert check.ok and "not asked for (accelerator: tcg)" in check.text
    monkeypatch.setenv("FARMHAND_ACCELERATOR", "no")
    told = examine(desk.file).checks
    [check] = [c for c in told if "FARMHAND_ACC" in c.text + spelled(c.remedy)]
    assert (check.name, check.ok, check.level) == ("kvm", False, "needed")
    with pytest.raises(UsageError, match="FARMHAND_ACCELERATOR is 'no', none of auto, kvm, tcg"):
        open_site(desk.file, reporter=desk.heard)
    monkeypatch.delenv("FARMHAND_ACCELERATOR")


def test_doctor_tells_the_way_back_to_kvm_that_failed_a_guest(desk: Desk) -> None:
    desk.verdict(FAST)
    [check] = [c for c in examine(desk.file, hosts=False).checks if c.name == "kvm"]
    assert (check.ok, check.text) == (True, f"KVM works: {FAST.why}")
    distrust_kvm(cache_dir(), "prod said nothing")
    [check] = [c for c in examine(desk.file, hosts=False).checks if c.name == "kvm"]
    assert not check.ok and "prod said nothing" in check.text
    [note] = re.findall(r"rm (\S+),", check.remedy)
    assert Path(note).exists()


def test_another_machine_is_asked_for_it_there(real, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("FARMHAND_ACCELERATOR", raising=False)
    [socket] = parse_qs(urlsplit(real.uri()).query)["socket"]
    with FarMachine(tmp_path, reader=real.reader) as there:
        distrust_kvm(tmp_path / "cache", "prod said nothing")
        file = tmp_path / "kata.yaml"
        file.write_text(
            f"farm: {FARM}\nhosts: {{far: {{accelerator: kvm, uri: '{there.uri(socket)}'}}}}\n"
            "network: {mode: bridge, bridge: br0, subnet: 10.0.0.0/24}\n"
            "templates: {base: {build: debian-12}}\nvms: {prod: {}}\n"
        )

        def host() -> tuple[bool, str]:
            [check] = [c for c in examine(file).checks if c.name == "host far"]
            return check.ok, check.text

        ok, text = host()
        assert not ok
        assert text.startswith("kata.yaml: host far is to use KVM (accelerator: kvm): ")
        monkeypatch.setenv("FARMHAND_ACCELERATOR", "tcg")
        ok, text = host()
        assert ok and ASKED in text
