"""The use cases over the fake driver, with real files, journal and locks."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from hypervisors.host import OpenHost
from inventory.errors import (
    Busy,
    Conflict,
    DriverFailed,
    FarmhandError,
    NoSpace,
    NotFound,
    NotOurs,
    Several,
    Text,
    Unsupported,
    UsageError,
    WrongState,
    spelled,
)
from inventory.loader import load
from provision.engine.journal import current_step
from provision.engine.locks import Locks, lock_of
from provision.engine.report import Outcome, QuietReporter, R
from provision.member import Member, members_of
from provision.operations.balloon import Ballooned
from provision.site import Site, open_site
from tests import farm

MIB = 2**20


class Heard(QuietReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.warnings.append(f"{vm}: {spelled(text)}")


class Desk:
    """A farm file and what is done with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "kata.yaml"
        self.heard = Heard()
        self.write()

    def write(self, vms: str = "", host: str = "driver: fake") -> None:
        vms = vms or "  dev2: {memory: 512M, idle_memory: 256M}\n  prod: {memory: 512M}\n"
        self.file.write_text(
            f"farm: kata\nhosts: {{here: {{{host}}}}}\n"
            "templates: {base: {build: debian-12, size: 64M}}\n"
            f"vms:\n{vms}",
            encoding="utf-8",
        )

    def site(self, *, plan: bool = False) -> Site:
        return Site(load(self.file), reporter=self.heard, plan=plan)

    def run(self, use_case: Callable[..., Outcome[R]], *arguments: Any, **options: Any) -> Outcome[R]:
        """Planned first, then carried out: the very same actions."""
        before = self.files()
        with self.site(plan=True) as site:
            planned = use_case(site, *arguments, **options)
        assert self.files() == before, "a plan makes no file and changes none"
        with self.site() as site:
            done = use_case(site, *arguments, **options)
        assert done.actions == planned.actions
        assert planned.planned
        assert not done.planned
        return done

    def files(self) -> dict[str, bytes]:
        return {
            # the fake writes its world anew at each look
            str(path): b"" if path.suffix == ".state" else path.read_bytes()
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and not path.name.endswith(".lock")
        }

    def machine(self, vm: str) -> Any:
        with self.site() as site:
            return Member(site, vm).driver.find(Member(site, vm).machine)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    return Desk(tmp_path)


@pytest.fixture
def made(desk: Desk) -> Desk:
    desk.run(farm.clone_farm)
    return desk


def test_a_kernel_of_the_host(desk: Desk) -> None:
    with desk.site() as site:
        spec = Member(site, "prod").spec(site.allocator.peek("prod"))
    assert (spec.kernel, spec.initrd, spec.cmdline) == (None, None, "")
    text = desk.file.read_text()
    boot = "boot: {kernel: /boot/vmlinuz, initrd: /boot/initrd.img, cmdline: 'root=/dev/xvda1 ro'}"
    desk.file.write_text(text.replace("debian-12,", f"debian-12, {boot},"))
    with desk.site() as site:
        spec = Member(site, "prod").spec(site.allocator.peek("prod"))
    assert (spec.kernel, spec.initrd) == (Path("/boot/vmlinuz"), Path("/boot/initrd.img"))
    assert spec.cmdline == "root=/dev/xvda1 ro"


def lines(outcome: Outcome[Any]) -> list[str]:
    return [str(action) for action in outcome.actions]


def test_clone_farm_from_nothing_then_nothing_to_do(desk: Desk) -> None:
    done = desk.run(farm.clone_farm)
    assert done.changed
    assert lines(done) == [
        "make template base: there is none yet",
        "dev2: clone from base: disk 64M, memory 512M, 1 vCPU",
        "dev2: start, wait until its ssh answers, balloon down to 256M",
        "prod: clone from base: disk 64M, memory 512M, 1 vCPU",
        "prod: start, wait until its ssh answers",
    ]
    again = desk.run(farm.clone_farm)
    assert not again.changed
    assert lines(again) == ["dev2: already as declared", "prod: already as declared"]
    assert desk.machine("dev2").current == 256 * MIB, "idle"
    assert desk.machine("prod").current == 512 * MIB
    with desk.site() as site:
        key, pub = (site.paths.keys / "hostkeys" / name for name in ("prod", "prod.pub"))
        assert key.stat().st_mode & 0o777 == 0o600
        assert site.paths.keys.stat().st_mode & 0o777 == 0o700
        dev2, prod = (member.endpoint() for member in members_of(site))
        assert pub.read_text().split()[1] in prod.host_key
        assert prod.host_key != dev2.host_key
        assert "HostKeyAlias=kata-prod" in Member(site, "prod").ssh_argv(prod)
        assert "ServerAliveInterval=5" in Member(site, "prod").ssh_argv(prod)
    assert (desk.directory / "kata.yaml.lock").exists()


def test_no_start_and_a_vm_that_is_not_to_be_started(desk: Desk) -> None:
    desk.write("  dev2: {start: no}\n  prod: {}\n")
    assert len(desk.run(farm.clone_farm).actions) == 4
    assert desk.machine("dev2").power == "stopped"
    assert desk.machine("prod").power == "running"


def test_a_changed_declaration_waits_for_a_running_vm_and_changes_a_stopped_one(made: Desk) -> None:
    made.run(farm.stop, ["prod"])
    made.write("  dev2: {memory: 512M, idle_memory: 256M, vcpus: 2}\n  prod: {memory: 1G}\n")
    done = made.run(farm.clone_farm)
    assert lines(done) == [
        "dev2: takes effect at its next stop or reset: change its definition as the farm file has been",
        "prod: change its definition as the farm file has been",
        "prod: start, wait until its ssh answers",
    ]
    assert made.machine("prod").memory == 1024 * MIB
    assert made.machine("dev2").vcpus == 1
    made.run(farm.reset, ["dev2"])
    assert made.machine("dev2").vcpus == 2


def test_a_newer_template_moves_nobody(made: Desk) -> None:
    with made.site() as site:
        farm.template_build(site, "base")
    done = made.run(farm.clone_farm)
    assert lines(done)[0] == "dev2: stays on base@1; base@2 is newer: renew --vm dev2"
    assert not done.changed
    made.run(farm.destroy, ["dev2"])
    assert lines(made.run(farm.clone_farm))[0].startswith("dev2: clone from base@2")


def test_one_vms_failure_does_not_stop_the_other(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FakeHypervisor.define

    def define(self: FakeHypervisor, spec: Any, template: Any) -> Any:
        if spec.owner.vm in bad:
            raise WrongState(f"{spec.name} can't be")
        return real(self, spec, template)

    monkeypatch.setattr(FakeHypervisor, "define", define)
    bad = {"dev2"}
    with desk.site() as site, pytest.raises(WrongState, match="kata-dev2 can't be"):
        farm.clone_farm(site)
    assert desk.machine("prod").power == "running"
    assert desk.machine("dev2") is None
    assert not desk.run(farm.gc).changed, "undone at once"
    bad = {"dev2", "prod"}
    desk.run(farm.destroy, ["prod"])
    with desk.site() as site, pytest.raises(Several) as failed:
        farm.clone_farm(site)
    assert list(failed.value.errors) == ["dev2", "prod"]
    assert "dev2: kata-dev2 can't be; prod: kata-prod can't be" in failed.value.message
    assert set(failed.value.as_dict()["errors"]) == {"dev2", "prod"}  # type: ignore[call-overload]
    bad = set()
    desk.run(farm.clone_farm)


def test_somebody_elses_machine_is_never_touched(desk: Desk) -> None:
    desk.run(farm.clone_farm, ["dev2"])
    with desk.site() as site:
        driver = site.hypervisor("here")
        assert isinstance(driver, FakeHypervisor)
        driver.add_foreign("kata-prod")
    calls: list[tuple[Callable[..., Outcome[Any]], tuple[Any, ...]]] = [
        (farm.clone_farm, ()),
        (farm.reset, (["prod"],)),
        (farm.start, (["prod"],)),
        (farm.stop, (["prod"],)),
    ]
    for use_case, arguments in calls:
        with desk.site() as site, pytest.raises(NotOurs, match="is not farmhand"):
            use_case(site, *arguments)
    with desk.site() as site:
        row = farm.status(site).vms[1]
        assert (row.state, row.error) == ("not ours", "a machine without our mark has its name")
    assert desk.machine("kata-prod"[5:]).owner is None


def test_reset_is_proven_and_goes_to_any_checkpoint(made: Desk) -> None:
    def store(site: Site) -> FakeDisks:
        disks = site.disks("here")
        assert isinstance(disks, FakeDisks)
        return disks

    made.run(farm.stop, ["prod"])
    with made.site() as site:
        store(site).write("kata-prod", b"one")
    made.run(farm.checkpoint, ["prod"], "one")
    with made.site() as site:
        store(site).write("kata-prod", b"two")
    made.run(farm.checkpoint, ["prod"], "two")
    for name, content in (("one", b"one"), ("two", b"two"), ("one", b"one")):
        done = made.run(farm.reset, ["prod"], to=name, start=False)
        assert done.result.vms["prod"].proof.pristine is True
        with made.site() as site:
            assert store(site).content("kata-prod") == content
    assert made.machine("prod").power == "stopped"
    with made.site() as site:
        (row,) = [row for row in farm.status(site).vms if row.vm == "prod"]
        assert (row.checkpoint, row.condition) == ("one", "clean")
        assert row.checkpoints == ("clean", "one", "two")
        record = site.journal.history(1)[0]
        assert record.verb == "reset"
        assert record.facts["changed"] is True
    made.run(farm.reset)
    assert made.machine("prod").power == "running"
    assert made.machine("dev2").current == 256 * MIB


def test_a_disk_that_is_not_its_checkpoint_is_never_started(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDisks, "restore", lambda self, machine, name: self.find(machine))
    made.run(farm.stop, ["prod"])
    with made.site() as site:
        disks = site.disks("here")
        assert isinstance(disks, FakeDisks)
        disks.write("kata-prod", b"old")
        with pytest.raises(FarmhandError, match="isn't provably checkpoint clean: not started"):
            farm.reset(site, ["prod"])
    assert made.machine("prod").power == "stopped"


def test_refusals_say_what_and_the_remedy(made: Desk) -> None:
    made.run(farm.stop, ["prod"])
    cases: list[tuple[type[FarmhandError], str, Callable[[Site], object]]] = [
        (NotFound, "there is no VM 'prd'", lambda s: farm.reset(s, ["prd"])),
        (NotFound, "no checkpoint 'cleen'", lambda s: farm.reset(s, ["prod"], to="cleen")),
        (UsageError, "not a checkpoint name", lambda s: farm.checkpoint(s, ["prod"], "../x")),
        (WrongState, "is of a running VM", lambda s: farm.checkpoint(s, ["prod"], "one", warm=True)),
        (Conflict, "has a checkpoint 'clean'", lambda s: farm.checkpoint(s, ["prod"], "clean")),
        (WrongState, "is stopped", lambda s: farm.balloon(s, "prod", 256 * MIB)),
        (UsageError, "at most 512M", lambda s: farm.balloon(s, "dev2", 1024 * MIB)),
        (UsageError, "can't go down", lambda s: farm.balloon(s, "dev2", MIB)),
        (NotFound, "there is no VM", lambda s: farm.destroy(s, ["nobody"])),
    ]
    for kind, words, call in cases:
        with made.site() as site, pytest.raises(kind, match=words) as refused:
            call(site)
        assert "\n" not in refused.value.message
    with made.site() as site, pytest.raises(NotFound) as near:
        site.vms(["prd"])
    assert near.value.remedy == "did you mean prod?"


def test_balloon_says_what_was_reached(made: Desk) -> None:
    done = made.run(farm.balloon, "dev2", 384 * MIB)
    assert lines(done) == ["dev2: memory 256M -> 384M"]
    assert done.result.vms == {"dev2": Ballooned(256 * MIB, asked=384 * MIB, reached=384 * MIB)}
    assert not made.run(farm.balloon, "dev2", 384 * MIB).changed


def test_an_idle_balloon_that_fails_is_a_warning(desk: Desk) -> None:
    desk.write("  prod: {memory: 512M, idle_memory: 64M}\n")  # under the fake guest's need
    desk.run(farm.clone_farm)
    assert any("stays at 512M while idle" in line for line in desk.heard.warnings)


def test_host_memory_is_a_limit_before_anything_is_begun(desk: Desk) -> None:
    desk.write(host="driver: fake, memory: 800M")
    with desk.site() as site, pytest.raises(NoSpace, match="may use 800M"):
        farm.clone_farm(site)
    assert desk.machine("prod") is None
    desk.write("  dev2: {memory: 512M, idle_memory: 256M}\n  prod: {memory: 512M, start: no}\n",
               host="driver: fake, memory: 800M")  # fmt: skip
    desk.run(farm.clone_farm)
    desk.run(farm.start, ["prod"])  # 256M idle + 512M


def test_a_full_store_is_a_forecast(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypervisors.api import Capacity

    monkeypatch.setattr(FakeDisks, "capacity", lambda self: Capacity(2**30, 300 * MIB))
    with desk.site() as site, pytest.raises(NoSpace, match="512M at least"):
        farm.clone_farm(site)
    desk.run(farm.clone_farm, ["prod"])


def test_destroy_takes_all_of_a_vm_and_nothing_else(made: Desk) -> None:
    made.run(farm.destroy, ["prod"])
    left = [name for name in made.files() if "prod" in Path(name).name]
    assert left == []
    with made.site() as site:
        assert list(site.allocator.recorded()) == ["dev2"]
    assert lines(made.run(farm.destroy, ["prod"])) == ["prod: is not there"]
    made.run(farm.clone_farm)


def test_destroy_the_whole_farm_keeps_build_records(made: Desk) -> None:
    with made.site() as site:
        record = site.paths.builds / "1" / "record.json"
        record.parent.mkdir(parents=True)
        record.write_text("{}")
    done = made.run(farm.destroy)
    assert done.result.kept == record.parent.parent
    assert record.exists()
    assert [path.name for path in record.parents[2].iterdir()] == ["builds"]
    assert not (made.directory / "kata.yaml.lock").exists()
    assert "remove 1 build record" in lines(made.run(farm.destroy, purge=True))
    assert not (made.directory / "state/farms").exists()
    made.run(farm.destroy)


def test_an_undeclared_vm_is_shown_and_can_be_destroyed(made: Desk) -> None:
    made.write("  dev2: {memory: 512M, idle_memory: 256M}\n")
    with made.site() as site:
        rows = {row.vm: row for row in farm.status(site).vms}
        assert not rows["prod"].declared
        assert site.farm.machine_of("prod") in {m.name for m in site.hypervisor("here").list()}
    made.run(farm.destroy, ["prod"])
    with made.site() as site:
        assert [row.vm for row in farm.status(site).vms] == ["dev2"]
        assert list(site.allocator.recorded()) == ["dev2"]


def test_gc_takes_leftovers_with_owner_age_and_size(made: Desk) -> None:
    with made.site() as site:
        (site.paths.seeds / "kata-gone.iso").write_bytes(b"x" * 2048)
        (site.paths.consoles / "kata-gone.log").write_bytes(b"")
        (site.paths.keys / "hostkeys/gone").write_text("secret")
    with made.site(plan=True) as site:
        planned = farm.gc(site)
        found = planned.result.leftovers
        assert {item.owner for item in found} == {"gone"}
        assert sorted(item.kind for item in found) == ["console log", "host key", "seed"]
        assert any("2K" in line for line in lines(planned))
    with made.site() as site:
        assert len(farm.gc(site).actions) == 3
        assert lines(farm.gc(site)) == ["nothing is left over"]
        assert site.paths.seeds.joinpath("kata-prod.iso").exists()


def test_gc_passes_over_what_is_in_use_and_its_plan_says_so(made: Desk) -> None:
    with made.site() as site:
        (site.paths.seeds / "kata-gone.iso").write_bytes(b"")
        (site.paths.seeds / "kata-busy.iso").write_bytes(b"")
    with made.site() as other, other.locks.hold(lock_of("busy"), doing="what takes long"):
        with made.site(plan=True) as site:
            planned = lines(farm.gc(site))
        with made.site() as site:
            done = lines(farm.gc(site))
    assert [line.partition(" (")[0] for line in done] == [line.partition(" (")[0] for line in planned]
    busy, gone = sorted(done)
    assert busy.startswith("busy: left alone, in use by ") and "doing: what takes long: " in busy
    assert gone.startswith("gone: remove seed ")
    with made.site() as site:
        assert [path.name for path in site.paths.seeds.glob("*gone*")] == []
        assert [path.name for path in site.paths.seeds.glob("*busy*")] == ["kata-busy.iso"]


def test_status_makes_nothing_and_survives_a_bad_host(desk: Desk) -> None:
    desk.file.write_text(
        "farm: kata\nhosts:\n  here: {driver: kvm}\n  far: {driver: xen, uri: 'xen+ssh://far/system'}\n"
        "templates: {base: {build: debian-12}}\n"
        "vms:\n  dev2: {host: here}\n  prod: {host: far}\n",
        encoding="utf-8",
    )
    with desk.site() as site:
        seen = farm.status(site)
    assert [(row.vm, row.state) for row in seen.vms] == [("dev2", "not made"), ("prod", "unknown")]
    assert "kata.yaml: host far is another machine, and user-mode networks" in seen.vms[1].error
    assert not (desk.directory / "state").exists()
    with desk.site() as site, pytest.raises(Unsupported):
        farm.clone_farm(site, ["prod"])


def test_busy_names_the_holder_and_status_shows_it(made: Desk) -> None:
    with made.site() as site:
        other = Locks(site.paths.locks)
        with other.hold("vm-prod", doing="cycle --from build-prod", is_build=True):
            with pytest.raises(Busy, match="doing: cycle --from build-prod"):
                farm.reset(site, ["prod"])
            row = farm.status(site).vms[1]
            assert row.holder
            assert (row.holder.pid, row.condition) == (os.getpid(), "building")
            farm.reset(site, ["dev2"])
            with pytest.raises(Busy):
                farm.destroy(site)
        with other.hold("template-base", doing="template-build base"), pytest.raises(Busy):
            farm.destroy(site)


def test_uses_nest_within_one_site(made: Desk) -> None:
    with made.site() as site, site.locks.hold("vm-prod", "vm-dev2", doing="cycle"):
        farm.balloon(site, "dev2", 512 * MIB)
        farm.reset(site)
        assert threading.active_count() >= 1


def test_a_damaged_journal_stops_changes_not_status(made: Desk) -> None:
    with made.site() as site:
        journal = site.paths.journal
    journal.write_bytes(b"rubbish" * 100)
    with made.site() as site:
        seen = farm.status(site)
        assert [row.state for row in seen.vms] == ["running", "running"]
        assert "damaged" in seen.warnings[0]
    with made.site() as site, pytest.raises(WrongState, match="damaged"):
        farm.reset(site, ["prod"])
    journal.unlink()
    made.run(farm.reset, ["prod"])


def test_an_ssh_host_is_left_to_its_admin(desk: Desk) -> None:
    flag = desk.directory / "was-reset"
    desk.file.write_text(
        "farm: metal\nhosts: {lab: {driver: ssh}}\nnetwork: {mode: bridge, bridge: br0}\nvms:\n"
        f"  dev2: {{address: 192.0.2.1, reset: [touch, {flag}]}}\n  prod: {{address: 192.0.2.2}}\n",
        encoding="utf-8",
    )
    done = desk.run(farm.clone_farm)
    assert not done.changed
    with desk.site() as site:
        outcome = farm.reset(site, ["dev2"], wait=False)
        assert outcome.result.vms["dev2"].proof.pristine is None
        assert flag.exists()
        with pytest.raises(Unsupported, match="no reset command"):
            farm.reset(site, ["prod"])
        assert [row.state for row in farm.status(site).vms] == ["unknown", "unknown"]
        assert Member(site, "dev2").endpoint().place == "192.0.2.1:22"
    assert not desk.run(farm.destroy, ["dev2"]).changed


class OneHypervisor(Site):
    """Two hosts of the farm file are two stores of one hypervisor."""

    def _open(self, host: str) -> OpenHost:
        opened = super()._open(host)
        state = self.paths.root / "one.state"
        opened._connect = lambda: FakeHypervisor(self.identity, opened.disks(), state, step=current_step)
        return opened


def test_a_vm_whose_disk_is_in_another_hosts_store_is_no_leftover(desk: Desk) -> None:
    desk.file.write_text(
        "farm: kata\nhosts: {fast: {driver: fake}, large: {driver: fake}}\n"
        "templates: {base: {build: debian-12, size: 64M}}\n"
        "vms:\n  dev2: {host: fast, memory: 512M}\n  prod: {host: large, memory: 512M}\n"
    )
    with OneHypervisor(load(desk.file), reporter=desk.heard) as site:
        farm.clone_farm(site)
        assert not farm.gc(site).changed
        assert {machine.owner.vm for machine in site.hypervisor("fast").list()} == {"dev2", "prod"}
        farm.stop(site, ["prod"], force=True)
        site.disks("large").destroy("kata-prod")
        assert {action.vm for action in farm.gc(site).actions if action.verb == "discard"} == {"prod"}
        assert [machine.owner.vm for machine in site.hypervisor("large").list()] == ["dev2"]


SLOW = """
import pathlib, signal, sys, time
import cli.composition
from hypervisors.fake.driver import FakeHypervisor
from inventory.errors import Interrupted
from tests import farm
from provision.engine.journal import current_step
from provision.engine.report import QuietReporter
from provision.site import open_site
real = FakeHypervisor.define
def define(self, spec, template):
    print("under way", flush=True)
    while True:  # until the next step is refused
        time.sleep(0.02)
        current_step("another step")
FakeHypervisor.define = define
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
try:
    with open_site(pathlib.Path(sys.argv[1]), reporter=QuietReporter()) as site:
        farm.clone_farm(site)
except Interrupted as error:
    print(error.message, "|", error.remedy)
"""


def test_ctrl_c_stops_each_vm_before_its_next_step(desk: Desk) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, desk.file],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == ["under way\n"] * 2
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert "interrupted; each VM stopped before its next step" in out
    assert process.returncode == 0
    with desk.site() as site:
        assert sorted(record.vm for record in site.journal.unfinished()) == ["dev2", "prod"]
        assert site.locks.held() == ()
    with desk.site() as site:
        done = farm.clone_farm(site)
    assert [action.verb for action in done.actions][:2] == ["recover", "recover"]
    assert desk.machine("prod").power == "running"
    assert not desk.run(farm.gc).changed


def test_opening_and_status_load_nothing_heavy(made: Desk) -> None:
    code = (
        "import sys, pathlib, cli.composition; from provision.site import open_site\n"
        "from tests import farm\n"
        "from provision.engine.report import QuietReporter\n"
        "with open_site(pathlib.Path(sys.argv[1]), reporter=QuietReporter()) as site:\n"
        "    farm.status(site)\n"
        "bad = {'asyncssh', 'jinja2', 'rich', 'libvirt', 'cryptography'} & set(sys.modules)\n"
        "sys.exit(' '.join(bad) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, made.file],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with open_site(made.file, reporter=QuietReporter()) as site:
        assert site.name == "kata.yaml"


def test_a_fake_world_that_is_damaged_is_named(made: Desk) -> None:
    with made.site() as site:
        state = site.paths.root / "fake-here.state"
    with closing(sqlite3.connect(state)) as world:
        world.execute("UPDATE items SET value = replace(value, '\"stopped\"', '\"asleep\"')")
        world.execute("UPDATE items SET value = replace(value, '\"running\"', '\"asleep\"')")
        world.commit()
    with (
        made.site() as site,
        pytest.raises(DriverFailed, match=r"fake-here\.state: not the fake") as caught,
    ):
        farm.stop(site)
    assert "remove it" in caught.value.remedy
    state.write_text("{}" * 1000)
    with made.site() as site, pytest.raises(DriverFailed, match="file is not a database"):
        farm.stop(site)
    state.unlink()
    with made.site() as site:
        assert farm.clone_farm(site).changed
