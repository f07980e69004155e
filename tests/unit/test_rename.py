"""VMs renamed, on the fake: what goes along, what is refused and why, and what tells that one can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_farm import CommandLine
from test_farm import Desk, lines
from test_renew import content, memories, write

from builds import clean
from hypervisors.api import Owner, Power, spec_hash
from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from inventory.errors import (
    Busy,
    Conflict,
    DriverFailed,
    FarmhandError,
    Interrupted,
    NotFound,
    NotOurs,
    Unsupported,
    UsageError,
    WrongState,
    spelled,
)
from provision.clean_state import clean_state
from provision.engine.journal import Entry
from provision.engine.runner import perform
from provision.guest import identity
from provision.member import Member
from provision.operations.checkpoint_remove import kept_states
from provision.status import status
from tests import farm
from tests.identities import identity as identity_of

DEV = "  dev2: {memory: 512M, idle_memory: 256M}\n"
BOTH = f"{DEV}  prod: {{memory: 512M}}\n"
RENAMED = f"{DEV}  build: {{memory: 512M}}\n"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Of dev2 and prod, which run; prod holds what its guest wrote and a checkpoint."""
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    write(desk, b"kept")
    desk.run(farm.checkpoint, ["prod"], "tools")
    write(desk, b"mine")
    return desk


@pytest.fixture
def renamed(made: Desk) -> Desk:
    """The farm file calls prod build."""
    made.write(RENAMED)
    return made


def given(desk: Desk, vm: str) -> tuple[object, ...]:
    with desk.site() as site:
        got = site.allocator.recorded()[vm]
        return got.mac, got.address, got.ssh_port, (site.paths.keys / "hostkeys" / vm).read_bytes()


def refused(desk: Desk, kind: type[FarmhandError], vm: str = "build", was: str = "prod") -> str:
    """What is told, by the plan and by the run; nothing was changed."""
    before = desk.files()
    told = []
    for plan in (True, False):
        with desk.site(plan=plan) as site, pytest.raises(kind) as caught:
            farm.rename(site, vm, was)
        told.append(f"{caught.value.message} | {spelled(caught.value.remedy)}")
        with desk.site() as site:
            assert site.journal.unfinished() == ()
    assert told[0] == told[1]
    new = {path for path in desk.files() if path not in before and "/locks/" not in path}
    assert all(path.endswith(("-wal", "-shm", ".state")) for path in new)
    return told[0]


def test_all_that_a_vm_has_goes_along(made: Desk) -> None:
    before = given(made, "prod")
    made.write(RENAMED)
    done = made.run(farm.rename, "build", "prod")
    assert lines(done) == [
        "build: shut down, prod becomes build: machine, disk, checkpoints, keys, what it was given; "
        "start, wait until its ssh answers",
        "build: its guest takes the host name build, and another machine-id, when it boots next",
    ]
    assert given(made, "build") == before
    machine = made.machine("build")
    with made.site() as site:
        member = Member(site, "build")
        assert (machine.power, machine.owner) == (Power.RUNNING, Owner(site.identity, "build"))
        assert machine.spec_hash == spec_hash(member.spec(member.allocate()))
        assert member.driver.find("kata-prod") is member.store.find("kata-prod") is None
        assert list(site.allocator.recorded()) == ["build", "dev2"]
        files = [path for path in site.paths.root.rglob("*") if "prod" in path.name]
        assert [path for path in files if path.parent != site.paths.locks] == []
        assert [one.checkpoint.name for one in kept_states(site, ["build"])] == ["clean", "tools"]
    assert content(made, "build") == b"mine"
    assert not made.run(farm.clone_farm).changed, "it is as declared"
    made.run(farm.reset, ["build"], to="tools")
    assert content(made, "build") == b"kept"
    with made.site() as site:
        farm.stop(site, ["build"], force=True)
        assert Member(site, "build").store.pristine("kata-build", "tools")
        assert lines(farm.gc(site))[0] == "nothing is left over"


def test_one_that_is_stopped_stays_stopped(renamed: Desk) -> None:
    with renamed.site() as site:
        site.hypervisor("here").stop("kata-prod", grace=0)
    assert lines(renamed.run(farm.rename, "build", "prod"))[0] == (
        "build: prod becomes build: machine, disk, checkpoints, keys, what it was given"
    )
    assert renamed.machine("build").power is Power.STOPPED


def test_what_is_known_of_its_clean_goes_along(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "equip", lambda *_: ["ccache 1.0 amd64"])
    made.run(perform, clean.Clean(("prod",), packages=("ccache",)))
    made.write(RENAMED)
    made.run(farm.rename, "build", "prod")
    with made.site() as site:
        found = Member(site, "build").disk()
        assert found
        assert clean_state(site.paths, "build", found).words == "base@1 with ccache"


def test_its_memory_goes_along(made: Desk) -> None:
    made.run(farm.checkpoint, ["prod"], "hot", warm=True)
    with made.site() as site:
        farm.reset(site, ["prod"], to="hot", start=False)
        (seal,) = [kept.seal for kept in memories(Member(site, "prod")).values()]
    made.write(RENAMED)
    told = lines(made.run(farm.rename, "build", "prod"))
    assert told[-1] == "build: a guest that runs on from hot has its old host name, until it boots"
    machine = made.machine("build")
    assert machine.power is Power.SUSPENDED, "its disk provably is the checkpoint"
    with made.site() as site:
        (kept,) = memories(Member(site, "build")).values()
        assert kept.seal == seal


def test_memory_that_is_bound_to_the_name_is_refused(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    made.run(farm.checkpoint, ["prod"], "hot", warm=True)
    made.write(RENAMED)
    real = FakeHypervisor.memories

    def read(self: FakeHypervisor, machine: str) -> Any:
        return {name: replace(kept, how="read") for name, kept in real(self, machine).items()}

    monkeypatch.setattr(FakeHypervisor, "memories", read)
    assert refused(made, Unsupported) == (
        "kata.yaml: prod can't be renamed with warm checkpoints here (hot): their memory is given back "
        "under its old name alone | put prod back in the farm file, remove them: checkpoint-remove --vm "
        "prod --name hot; then rename it"
    )


def test_what_is_refused(made: Desk) -> None:
    first = "give prod its new name there first, everywhere it is named; then the same again"
    assert refused(made, NotFound) == f"kata.yaml: there is no VM 'build' | {first}"
    made.write(f"{BOTH}  build: {{memory: 512M}}\n")
    assert refused(made, WrongState) == f"kata.yaml: prod is still in the farm file | {first}"
    assert "has that name" in refused(made, UsageError, "build", "build")
    made.write(RENAMED)
    assert refused(made, NotFound, was="prd") == (
        "kata.yaml: no VM that is made and not in the farm file is called 'prd' | did you mean prod?"
    )
    made.run(farm.clone_farm, ["build"])
    assert refused(made, Conflict).startswith("kata.yaml: build is made already | if that one is to go:")


def test_what_differs_is_refused(made: Desk) -> None:
    made.file.write_text(made.file.read_text().replace("prod", "build").replace("base:", "other:"))
    assert refused(made, WrongState) == (
        "kata.yaml: prod is of template base, and build is to be of other | give it 'template: base'"
    )
    two = "driver: fake}, there: {driver: fake"
    made.write("  dev2: {host: here}\n  build: {host: there}\n", host=two)
    told = refused(made, WrongState)
    assert "prod is on host here, and build is to be on there | give it 'host: here'" in told


def test_an_ssh_host_has_nothing_to_rename(made: Desk) -> None:
    hosts = "driver: fake}, iron: {driver: ssh"
    made.write("  dev2: {host: here}\n  build: {host: iron, address: 192.0.2.9}\n", host=hosts)
    assert "build is on an ssh host: nothing of it has a name" in refused(made, Unsupported)


def test_one_that_is_another_farms(renamed: Desk) -> None:
    with renamed.site() as site:
        world: Any = site.hypervisor("here")
        with world._store.change() as changed:
            one = changed.machines["kata-prod"]
            from dataclasses import replace

            one.machine = replace(one.machine, owner=Owner(identity_of("kata"), "prod"))
    assert "kata-prod on host here belongs to farm" in refused(renamed, NotOurs)


@pytest.mark.parametrize("vm", ["prod", "build"])
def test_one_that_is_busy(renamed: Desk, vm: str) -> None:
    import threading

    with renamed.site() as site, site.locks.hold(f"vm-{vm}", doing="cycle"):
        failed: list[BaseException] = []

        def other() -> None:
            with pytest.raises(Busy) as caught:
                farm.rename(site, "build", "prod")
            failed.append(caught.value)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"{vm} is held by pid" in str(failed[0])


def test_the_allocation_that_the_new_name_had_before_goes(renamed: Desk) -> None:
    """As where somebody showed or applied the network services before."""
    before = given(renamed, "prod")
    with renamed.site() as site:
        other = site.allocator.allocate("build")
        assert other.mac != before[0]
    renamed.run(farm.rename, "build", "prod")
    assert given(renamed, "build") == before
    renamed.run(farm.clone_farm)
    assert given(renamed, "build") == before


@pytest.mark.parametrize("at", ["shut it down", "give build what"])
def test_taken_back_it_has_what_it_was_given(
    renamed: Desk, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """And not what the other name was given before."""
    before = given(renamed, "prod")
    with monkeypatch.context() as patch, renamed.site() as site, pytest.raises(Interrupted):
        site.allocator.allocate("build")
        _fails(patch, at, Interrupted("as if it was killed"))
        farm.rename(site, "build", "prod")
    renamed.write(BOTH)
    renamed.run(farm.recover)
    assert given(renamed, "prod") == before


def _fails(monkeypatch: pytest.MonkeyPatch, at: str, error: BaseException) -> None:
    real = Entry.step

    def step(self: Entry[Any], text: str) -> None:
        real(self, text)
        if text.startswith(at):
            raise error

    monkeypatch.setattr(Entry, "step", step)


STEPS = ("shut it down", "give build what", "give build the keys", "rename the disk", "rename kata-prod")


@pytest.mark.parametrize("at", STEPS)
@pytest.mark.parametrize("back", [False, True], ids=["on", "back"])
def test_cut_off_it_goes_where_the_farm_file_says(
    made: Desk, monkeypatch: pytest.MonkeyPatch, at: str, back: bool
) -> None:
    before = given(made, "prod")
    made.write(RENAMED)
    with monkeypatch.context() as patch, made.site() as site, pytest.raises(Interrupted):
        _fails(patch, at, Interrupted("as if it was killed"))
        farm.rename(site, "build", "prod")
    vm, was = ("prod", "build") if back else ("build", "prod")
    if back:
        made.write(BOTH)
    with made.site() as site:
        told = lines(farm.recover(site))
    how = "take it back, it is prod again" if back else "go on, it is build from now on"
    assert told[0].endswith(f"was interrupted: {how}; start it again")
    assert given(made, vm) == before
    assert content(made, vm) == b"mine"
    assert made.machine(vm).power is Power.RUNNING
    with made.site() as site:
        member = Member(site, vm)
        assert member.driver.find(f"kata-{was}") is member.store.find(f"kata-{was}") is None
        assert was not in site.allocator.recorded()
    assert not made.run(farm.clone_farm).changed
    made.run(farm.reset, [vm], to="tools")


@pytest.mark.parametrize("at", STEPS)
def test_typed_again_it_goes_on(renamed: Desk, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    with monkeypatch.context() as patch, renamed.site() as site, pytest.raises(Interrupted):
        _fails(patch, at, Interrupted("as if it was killed"))
        farm.rename(site, "build", "prod")
    with renamed.site(plan=True) as site:
        planned = lines(farm.rename(site, "build", "prod"))
    with renamed.site() as site:
        done = lines(farm.rename(site, "build", "prod"))
    assert planned[0] == done[0]
    assert planned[1:] == ["build: recovered, it is what prod was"]
    assert done[1:] == ["build: is what prod was, already"]
    assert content(renamed, "build") == b"mine"


def test_interrupted_while_it_is_given_back_it_goes_on(
    renamed: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, renamed.site() as site, pytest.raises(Interrupted):
        patch.setattr(FakeHypervisor, "rename", _raiser(DriverFailed("not now")))
        patch.setattr(FakeHypervisor, "start", _raiser(Interrupted("interrupted")))
        farm.rename(site, "build", "prod")
    renamed.run(farm.recover)
    assert content(renamed, "build") == b"mine"
    assert renamed.machine("build").power is Power.RUNNING


def _raiser(error: Exception) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


def test_half_renamed_it_is_left_alone(renamed: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two parts look like remains of two VMs; neither is used, nor removed."""
    real = FakeHypervisor.rename

    def half(self: FakeHypervisor, name: str, spec: Any) -> Any:
        self._disks.rename(name, spec.name, spec.owner)
        raise DriverFailed("the hypervisor is gone", remedy="bring it back")

    monkeypatch.setattr(FakeHypervisor, "rename", half)
    with renamed.site() as site, pytest.raises(WrongState) as caught:
        farm.rename(site, "build", "prod")
    assert caught.value.message == (
        "the hypervisor is gone; prod is half renamed to build, and stays stopped"
    )
    assert spelled(caught.value.remedy) == (
        "bring it back; then recover goes on; or, with prod back in the farm file, takes it back"
    )
    with renamed.site() as site, pytest.raises(WrongState, match="a rename of prod, build is half done"):
        farm.clone_farm(site)
    with renamed.site() as site:
        told = lines(farm.gc(site))
        for vm in ("build", "prod"):  # a disk without a machine, and a machine without a disk
            assert f"{vm}: left alone until its rename is recovered: kata-{vm}: recover" in told
        assert not any("remove" in line for line in told)
    for vms, which in (("", "neither"), (f"{RENAMED}  prod: {{memory: 512M}}\n", "both")):
        renamed.write(vms or DEV)
        with renamed.site() as site, pytest.raises(WrongState, match=f"names {which} of prod and build"):
            farm.recover(site)
    renamed.write(RENAMED)
    monkeypatch.setattr(FakeHypervisor, "rename", real)
    with renamed.site() as site:
        farm.recover(site)
    assert content(renamed, "build") == b"mine"
    assert renamed.machine("build").power is Power.RUNNING


def test_a_refusal_of_the_driver_leaves_all_as_it_was(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean, "equip", lambda *_: ["ccache 1.0 amd64"])
    made.run(perform, clean.Clean(("prod",), packages=("ccache",)))
    before = given(made, "prod")
    made.write(RENAMED)

    def fails(*_: object) -> None:
        raise DriverFailed("not today", remedy="tomorrow")

    with monkeypatch.context() as patch, made.site() as site:
        patch.setattr(FakeHypervisor, "rename", fails)
        with pytest.raises(DriverFailed, match="not today"):
            farm.rename(site, "build", "prod")
        assert site.journal.unfinished() == ()
        machine = site.hypervisor("here").find("kata-prod")
        assert machine is not None and machine.power is Power.RUNNING
        assert identity.seed_file(site.paths, "kata-prod").exists()
        assert not identity.seed_file(site.paths, "kata-build").exists()
    assert given(made, "prod") == before
    with made.site() as site:
        assert "build" not in site.allocator.recorded()
        disk = site.disks("here").find("kata-prod")
        assert disk
        assert clean_state(site.paths, "prod", disk).words == "base@1 with ccache"
    made.run(farm.rename, "build", "prod")
    assert given(made, "build") == before


def test_half_renamed_it_can_be_destroyed(renamed: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise DriverFailed("not now")

    with monkeypatch.context() as patch, renamed.site() as site, pytest.raises(Interrupted):
        _fails(patch, "rename kata-prod", Interrupted("as if it was killed"))
        farm.rename(site, "build", "prod")
    with monkeypatch.context() as patch, renamed.site() as site:
        patch.setattr(FakeHypervisor, "rename", fails)
        farm.destroy(site, ["build", "prod"])
        assert [disk.machine for disk in site.disks("here").list()] == ["kata-dev2"]
        assert [machine.name for machine in site.hypervisor("here").list()] == ["kata-dev2"]
    with renamed.site() as site:
        assert "nothing of it is there any more" in lines(farm.recover(site))[0]
    renamed.run(farm.clone_farm)


def test_the_network_services_are_told(made: Desk) -> None:
    """The new name has the old one's address, in the plan, too."""
    hosts = made.file.with_name("hosts")
    network = (
        "network: {mode: bridge, bridge: br0, subnet: 192.0.2.0/24, addressing: static}\n"
        f"services: {{hosts: {{config: {hosts}}}}}\n"
    )
    with made.file.open("a") as file:
        file.write(network)
    made.run(farm.stop, force=True)
    made.run(farm.clone_farm, start=False)
    (line,) = [line for line in hosts.read_text().splitlines() if "prod" in line]
    made.write(RENAMED)
    with made.file.open("a") as file:
        file.write(network)
    with made.site(plan=True) as site:
        planned = farm.rename(site, "build", "prod")
    with made.site() as site:
        done = farm.rename(site, "build", "prod")
    assert done.actions == planned.actions
    assert done.result == planned.result
    assert any(str(hosts) in one for one in lines(done))
    assert line.replace("prod", "build") in hosts.read_text().splitlines()
    assert "prod" not in hosts.read_text()
    assert not made.run(farm.clone_farm, start=False).changed


def test_who_looks_is_told(renamed: Desk) -> None:
    """status, clone-farm and destroy, where one VM isn't made and one is in the farm file no more."""
    hint = "if it is build by now: rename --vm build --was prod"
    with renamed.site() as site:
        (row,) = [row for row in status(site).vms if row.vm == "prod"]
        assert spelled(row.error) == f"no longer in the farm file: destroy removes it; {hint}"
    with renamed.site(plan=True) as site:
        note = f"prod: is no longer in the farm file; {hint}"
        assert note in lines(farm.clone_farm(site))
        assert lines(farm.destroy(site, ["prod"]))[0] == note
        assert note not in lines(farm.destroy(site, ["dev2"]))
    renamed.write(f"{RENAMED}  more: {{memory: 512M}}\n")
    with renamed.site(plan=True) as site:
        assert "rename" not in " ".join(lines(farm.clone_farm(site))), "which of the two is it?"
        (row,) = [row for row in status(site).vms if row.vm == "prod"]
        assert "rename" not in spelled(row.error)


def test_the_command(tmp_path: Path) -> None:
    from cli_farm import command_line

    for cli in command_line(tmp_path):
        _by_command(cli)


def _by_command(cli: CommandLine) -> None:
    assert cli("clone-farm").status == 0
    cli.farm.write_text(cli.farm.read_text().replace("prod:", "build:"))
    told = cli("status")
    assert "rename --vm build --was prod" in told.out
    assert cli("rename", "build").error == "farmhand: --was is missing"
    planned = cli("rename", "build", "--was", "prod", "--plan", "--json").json
    assert [one["vm"] for one in planned["actions"]] == ["build", "build"]
    assert cli("status", "--json").json["vms"][-1]["vm"] == "prod"
    done = cli("rename", "build", "--was", "prod", "--json").json
    assert done["ok"] and done["actions"] == planned["actions"]
    again = cli("rename", "build", "--was", "prod")
    assert again.status == 0
    assert "is what prod was, already" in again.out
    other = cli("rename", "build", "--was", "other")
    assert other.status == 1
    assert "no VM that is made and not in the farm file is called 'other'" in other.error
    assert cli("clone-farm", "--json").json["changed"] is False
    assert "rename  prod, build" in cli("history", "build").out


def test_a_disk_store_is_never_asked_for_what_it_has(renamed: Desk) -> None:
    """Done twice, it is done once."""
    renamed.run(farm.rename, "build", "prod")
    with renamed.site() as site:
        farm.stop(site, ["build"], force=True)
        store = site.disks("here")
        assert isinstance(store, FakeDisks)
        disk = store.find("kata-build")
        assert store.rename("kata-prod", "kata-build", Owner(site.identity, "build")) == disk
        with pytest.raises(NotFound):
            store.rename("kata-nobody", "kata-no", Owner(site.identity, "no"))


def test_its_guest_is_told_its_new_name(made: Desk) -> None:
    """By a seed of another instance, which it takes up at its next boot; its host key is what it was."""
    with made.site() as site:
        before = identity.seed_data(site.farm, site.paths, Member(site, "prod").allocate())
    made.write(RENAMED)
    made.run(farm.rename, "build", "prod")
    with made.site() as site:
        after = identity.seed_data(site.farm, site.paths, Member(site, "build").allocate())
        seed = identity.seed_file(site.paths, "kata-build").read_bytes()[: 32 * 1024]
        known = identity.known_hosts(site.paths, "build").read_text()
    assert (before.hostname, after.hostname) == ("prod", "build")
    assert before.instance_id != after.instance_id
    assert (before.host_key, before.mac) == (after.host_key, after.mac)
    assert b"\nhostname=build\n" in seed
    assert known == f"kata-build {' '.join(after.host_key_pub.split()[:2])}\n"


def test_a_key_that_was_learnt_is_known_by_the_new_name(made: Desk) -> None:
    with made.site() as site:
        paths = site.paths
    identity.expect_own_key(paths, "odd", own=True)
    identity.learnt_hosts(paths, "odd").write_text(
        "kata-odd ssh-ed25519 AAAA\nkata-odder ssh-rsa BBBB\n"
    )
    for _ in range(2):
        identity.rename_identity(paths, "odd", "kata-odd", to="even", to_machine="kata-even")
    learnt = identity.learnt_hosts(paths, "even")
    assert learnt.read_text() == "kata-even ssh-ed25519 AAAA\nkata-odder ssh-rsa BBBB\n"
    assert learnt.stat().st_mode & 0o777 == 0o600
    assert not identity.learnt_hosts(paths, "odd").exists()


def test_one_that_nobody_tells_anything_keeps_its_name_inside(made: Desk) -> None:
    text = made.file.read_text().replace("prod", "build")
    made.file.write_text(text.replace("size: 64M", "size: 64M, firstboot: none"))
    with made.file.open("a") as file:
        file.write("ssh: {key: id}\n")
    with made.site(plan=True) as site:
        told = lines(farm.rename(site, "build", "prod"))
    assert told[-1] == (
        "build: nobody tells its guest: its host name is as it was; give it build in the guest"
    )
