"""What a first boot leaves to be waited for, or learnt: the guest's cloud-init, its own host key."""

from __future__ import annotations

import asyncio
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sshd_machine import Sshd, make_key

from host.progress import Progress
from hypervisors.api import Owner
from hypervisors.fake.driver import FakeDisks
from inventory.errors import Conflict, Text, TimedOut, UsageError, spelled
from inventory.loader import load
from provision.doctor import examine
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.guest import identity
from provision.guest.connection import Connection
from provision.guest.remote import Ready
from provision.guest.ssh_connection import wait_ready
from provision.member import Member
from provision.operations.adopt import Adopt
from provision.power import check_memory
from provision.site import Site
from tests import farm
from tests.identities import identity as marks_of


class CloudGuest(Sshd):
    """A machine with a /run of its own, and what cloud-init writes there."""

    @property
    def state(self) -> Path:
        return self.root / "cloud-init"

    def enclosed(self) -> list[str]:
        self.state.mkdir(exist_ok=True)
        script = (
            'mount -t tmpfs none /run && mkdir /run/sshd /run/cloud-init && mount --bind "$1" '
            '/run/cloud-init && shift && exec "$@"'
        )
        return ["unshare", "--mount", "sh", "-c", script, "sh", str(self.state), *super().enclosed()]

    def wait(self, timeout: float = 60) -> tuple[Ready, list[str]]:
        said: list[str] = []
        waiting = wait_ready(
            self.endpoint(), since=0.0, progress=Progress(lambda: None, timeout),
            running=lambda: True, tail=lambda: "", working=said.append,
        )  # fmt: skip
        return asyncio.run(waiting), said


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[CloudGuest]:
    make_key(tmp_path / "key")
    machine = CloudGuest("prod", tmp_path / "machine", tmp_path / "key", shell="/bin/sh")
    machine.prepare().start()
    yield machine
    machine.stop()


def test_ready_is_when_cloud_init_is_through(guest: CloudGuest) -> None:
    ended: list[str] = []

    def end() -> None:
        ended.append("before")
        (guest.state / "result.json").write_text('{"v1": {"datasource": "NoCloud", "errors": []}}')

    late = threading.Timer(1.5, end)
    late.start()
    ready, _ = guest.wait()
    assert ended and ready.troubles == ()


def test_one_that_never_ends_is_said_to_be_at_work(guest: CloudGuest) -> None:
    with pytest.raises(TimedOut, match="cloud-init is still at work there"):
        guest.wait(timeout=1)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ('{"v1": {"errors": ["no user \\u001b[2Jx", "two"]}}', ("no user \\x1b[2Jx", "two")),
        ('{"v1": {"errors": [1,2,3,4,5,6,7]}}', ("1", "2", "3", "4", "5", "and 2 more")),
        ("{}", ("its result can't be read: {}",)),
        ("[", ("its result can't be read: [",)),
        ("[" * 50000, (f"its result can't be read: {'[' * 299}…",)),
    ],
)
def test_its_errors_are_told(guest: CloudGuest, result: str, told: tuple[str, ...]) -> None:
    (guest.state / "result.json").write_text(result)
    assert guest.wait()[0].troubles == told


def test_one_that_is_switched_off_is_not_waited_for(guest: CloudGuest) -> None:
    (guest.state / "disabled").touch()
    assert guest.wait()[0].troubles == ()


def test_one_without_a_result_when_the_system_is_up_is_a_trouble(guest: CloudGuest) -> None:
    tools = guest.root / "tools"
    tools.mkdir()
    (tools / "systemctl").write_text("#!/bin/sh\n[ $1 = is-system-running ] && echo degraded; exit 1\n")
    (tools / "systemctl").chmod(0o755)
    guest.stop()
    config = guest.root / "config"
    config.write_text(f"SetEnv PATH={tools}:/usr/bin:/bin\n{config.read_text()}")
    guest.start()
    (trouble,) = guest.wait()[0].troubles
    assert trouble.startswith("it did not come to its end")


# -- firstboot: none ------------------------------------------------------------------------------

FARM = """\
farm: kata
hosts: {here: {driver: DRIVER}}
templates: {base: {import: base.img, size: 64M, firstboot: none}}
SSH
vms: {prod: {memory: 512M}, test: {memory: 512M}}
"""


class Heard(QuietReporter):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.warned.append(spelled(text))

    def say(self, text: Text, *, vm: str = "") -> None:
        self.said.append(f"{vm}: {spelled(text)}")


def learnt(heard: Heard) -> int:
    """How often a host key was."""
    return sum("prod: kata-prod was not known: its host key (SHA256:" in line for line in heard.said)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    with (tmp_path / "base.img").open("wb") as image:
        image.write(b"\0" * 510 + b"\x55\xaa")
        image.truncate(2**20)
    (tmp_path / "kata.yaml").write_text(
        FARM.replace("DRIVER", "fake").replace("SSH", f"ssh: {{key: {tmp_path / 'key'}}}")
    )
    make_key(tmp_path / "key")
    with Site(load(tmp_path / "kata.yaml"), reporter=Heard()) as opened:
        farm.clone_farm(opened)
        yield opened


@pytest.mark.parametrize("silent", [False, True])
def test_an_adopted_one_is_known_by_its_images_key(site: Site, silent: bool) -> None:
    """Nobody gave it one, and a reset would take its state and change nothing about that. ``silent``:
    the farm file says nothing of its template by now."""
    store = site.disks("here")
    assert isinstance(store, FakeDisks)
    theirs = marks_of("kata", "/root/farm.yaml")
    with store.store.change() as world:
        for disk in world.disks.all().values():
            disk.owner = Owner(theirs, disk.owner.vm)
        for fake in world.machines.all().values():
            assert fake.machine.owner
            fake.machine = replace(fake.machine, owner=Owner(theirs, fake.machine.owner.vm))
        world.templates["base@1"] = replace(world.templates["base@1"], farm=theirs)
    identity.learnt_hosts(site.paths, "prod").unlink()
    file = site.farm.path
    if silent:
        file.write_text(file.read_text().replace(", firstboot: none", ""))
    heard = Heard()
    with Site(load(file), reporter=heard, adopting=True) as opened:
        perform(opened, Adopt(("prod",)))
        member = Member(opened, "prod")
        assert member.look()
        assert member.keeps_own_key
        assert member.endpoint(seen=True).known_hosts == identity.learnt_hosts(opened.paths, "prod")
    assert not heard.warned


@pytest.fixture
def keyless(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """On a real host, and without a key that the image lets in."""
    text = FARM.replace("DRIVER", "kvm").replace("SSH\n", "").replace("farm: kata", "farm: keyless")
    (tmp_path / "kata.yaml").write_text(text)
    with tempfile.TemporaryDirectory(prefix="fh") as state:
        Path(state).chmod(0o711)  # QEMU's user passes through
        monkeypatch.setenv("FARMHAND_STATE_DIR", state)
        with Site(load(tmp_path / "kata.yaml"), reporter=Heard()) as opened:
            yield opened


LOCKED = r"^kata.yaml: template base has 'firstboot: none', so nobody tells its VMs whose key to let in"


def test_without_a_key_its_image_is_imported_and_that_is_a_warning(keyless: Site) -> None:
    assert farm.template_import(keyless, "base").changed
    heard = keyless.reporter
    assert isinstance(heard, Heard)
    (warned,) = heard.warned
    assert re.match(LOCKED, warned)
    assert warned.endswith("; before they are cloned, set that to a private key that its image lets in "
                           "already")  # fmt: skip


def test_without_a_key_nothing_is_cloned_and_doctor_says_so(keyless: Site) -> None:
    for imported in (False, True):
        if imported:
            farm.template_import(keyless, "base")
        with pytest.raises(UsageError, match=LOCKED):
            farm.clone_farm(keyless, start=False)
    assert not identity.learnt_hosts(keyless.paths, "prod").exists()
    found = [one for one in examine(keyless.farm.path, hosts=False).checks if one.name == "ssh key"]
    assert [(one.ok, one.level) for one in found] == [(False, "needed")]
    assert re.match(LOCKED, spelled(found[0].text))


def test_what_the_image_was_imported_as_counts_where_the_file_is_silent(keyless: Site) -> None:
    farm.template_import(keyless, "base")
    file = keyless.farm.path
    file.write_text(file.read_text().replace(", firstboot: none", ""))
    with Site(load(file), reporter=Heard()) as silent, pytest.raises(UsageError, match=LOCKED):
        farm.clone_farm(silent)


def test_without_a_key_one_that_is_there_is_neither_started_nor_logged_in_to(keyless: Site) -> None:
    member = Member(keyless, "prod")
    identity.expect_own_key(keyless.paths, "prod", own=True)
    with pytest.raises(UsageError, match=LOCKED):
        check_memory([member], wait=False)
    with pytest.raises(UsageError, match=LOCKED):
        member.endpoint()
    identity.expect_own_key(keyless.paths, "prod", own=False)
    identity.make_host_key(keyless.paths, "prod", member.machine)
    assert member.endpoint().host_key, "it was told our key when it was cloned"


def test_such_a_vm_has_no_seed_and_no_key_that_it_never_has(site: Site) -> None:
    member = Member(site, "prod")
    assert member.endpoint().host_key == ""
    assert member.spec(member.allocate()).seed is None
    assert not identity.seed_file(site.paths, member.machine).exists()
    assert not identity.host_key_file(site.paths, "prod").exists()
    assert farm.clone_farm(site).changed is False, "its definition is as it was"


def test_its_host_key_is_learnt_at_its_first_start_and_then_no_other_is_taken(
    site: Site, tmp_path: Path
) -> None:
    machine = Sshd("prod", tmp_path / "machine", tmp_path / "key").prepare().start()
    member = Member(site, "prod")

    def log_in(port: int) -> None:
        async def go() -> None:
            async with await Connection.open(replace(here, port=port)) as connection:
                await connection.output("true")

        here = replace(member.endpoint(), host="127.0.0.1", user=machine.endpoint().user)
        asyncio.run(go())

    try:
        log_in(machine.port)
        heard = site.reporter
        assert isinstance(heard, Heard)
        assert learnt(heard) == 1
        known = identity.learnt_hosts(site.paths, "prod").read_text()
        assert known == f"kata-prod {machine.host_key}\n"
        log_in(machine.port)
        assert learnt(heard) == 1
        farm.reset(site, ["prod"], to="clean")
        machine.stop()
        make_key(machine.root / "another")
        for half in ("", ".pub"):
            (machine.root / f"another{half}").replace(machine.root / f"host{half}")
        machine.start()
        with pytest.raises(Conflict, match=r"its host key .* is not the one prod had before"):
            log_in(machine.port)
        argv = member.ssh_argv(member.endpoint())
        assert {"HostKeyAlias=kata-prod", "StrictHostKeyChecking=accept-new"} <= set(argv)
        assert identity.learnt_hosts(site.paths, "test").read_bytes() == b"", "each has its own"
        farm.destroy(site, ["prod"])
        farm.clone_farm(site, ["prod"])
        log_in(machine.port)
        assert learnt(heard) == 2, "a clone made anew is learnt anew"
    finally:
        machine.stop()
