"""What only XenAPI's driver has: certificates, sessions, the pool's master, what each call may fail
with; and how few calls it takes. On the test server: simulated."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import xenapi_rig
from rigs import MIB, SIZE, template

from host.run import Runner
from hypervisors.api import Owner, Power
from hypervisors.xenapi.disks import XenApiDisks
from hypervisors.xenapi.driver import XenApiHypervisor
from hypervisors.xenapi.errors import XenApiError
from hypervisors.xenapi.pool import Pool
from hypervisors.xenapi.session import Sessions
from hypervisors.xenapi.wait import watch
from inventory.errors import (
    Call,
    DriverFailed,
    FarmhandError,
    NoSpace,
    NotFound,
    TimedOut,
    Unsupported,
    UsageError,
    WrongState,
    calls_in,
)
from tests.identities import KATA

ROOT = Path(__file__).parents[2]
NAME = "kata-prod"
PROD = Owner(KATA, "prod")


rig, server, kept = xenapi_rig.machines, xenapi_rig.its_server, xenapi_rig.kept  # fixtures


@pytest.fixture
def made(rig, kept):
    """Written to since its checkpoint: now it holds B."""
    rig.write(NAME, "B")
    return kept


# -- the connection ---------------------------------------------------------------------------------


def test_a_certificate_of_another_is_refused_and_no_password_sent(server, tmp_path):
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    other = xenapi_rig.TestServer()
    try:
        for ca, fingerprint in ((other.ca, ""), (None, ""), (None, "00" * 32)):
            server.log()
            with pytest.raises(DriverFailed, match="not trusted"):
                Sessions(server.server(ca=ca, fingerprint=fingerprint)).call("pool.get_all")
            assert server.log() == []
    finally:
        other.close()


@pytest.mark.parametrize("how", ["ca", "fingerprint", "insecure"])
def test_each_way_to_trust_it(server, how):
    trust = {"ca": server.ca} if how == "ca" else {"ca": None, "fingerprint": server.fingerprint}
    if how != "insecure" and not trust[how]:
        pytest.skip(f"not run: FARMHAND_XENAPI_{how.upper()} doesn't say")
    if how == "insecure":
        trust = {"ca": None, "insecure": True}
    sessions = Sessions(server.server(**trust))
    assert len(sessions.call("pool.get_all")) == 1
    sessions.close()


def test_credentials_are_ours_alone_and_never_shown(server, tmp_path):
    loose = tmp_path / "credentials"
    loose.write_text("root\nwrong\n")
    for mode, kind, words in (
        (0o644, WrongState, "others may read"),
        (0o600, DriverFailed, "AUTHENTICATION"),
    ):
        loose.chmod(mode)
        with pytest.raises(kind, match=words) as caught:
            Sessions(replace(server.server(), credentials=loose)).call("pool.get_all")
        assert "wrong" not in str(caught.value)


def test_a_slave_names_the_master(server):
    server.tell(knobs={"slave_of": "127.0.0.2", "master_at": "127.0.0.2"})
    sessions = Sessions(server.server())
    server.log()
    assert len(sessions.call("pool.get_all")) == 1
    assert sessions.url == server.https.replace("127.0.0.1", "127.0.0.2")
    sessions.close()
    assert server.log() == ["session.login_with_password"] * 2 + ["pool.get_all", "session.logout"]


def test_a_pool_whose_hosts_name_each_other_is_refused(server):
    server.tell(knobs={"slave_of": "127.0.0.2", "master_at": "nowhere"})
    server.log()
    with pytest.raises(DriverFailed, match="master"):
        Sessions(server.server()).call("pool.get_all")
    assert server.log() == ["session.login_with_password"] * 2


def test_an_expired_session_is_renewed_and_the_call_done_once(rig, server, made):
    server.tell(expire=True)
    server.log()
    assert made.find(NAME).name == NAME
    assert server.log().count("session.login_with_password") == 1
    server.fail("VM.clone", ["expire"])
    rig.disks().restore(NAME, "clean")
    assert list(made.leftovers()) == []


def test_a_server_that_blocks_is_waited_for_and_one_that_hangs_is_not(rig, server, made):
    server.fail("VM.clone", ["block", 3])
    rig.disks().restore(NAME, "clean")
    short = rig.disks()
    short.pool.sessions._server = replace(short.pool.sessions._server, call_limit=1.0)
    server.fail("VM.clone", ["block", 4])
    with pytest.raises(TimedOut, match="no answer"):
        short.restore(NAME, "one")
    assert rig.read(NAME) == "\0"


def test_a_switch_that_lands_late_loses_nothing(rig, server, made):
    """Its caller had given up, and the fresh disk is removed again, before the server gets to it."""
    short = rig.disks()
    short.pool.sessions._server = replace(short.pool.sessions._server, call_limit=0.5)
    (ref,) = rig.sessions().call("VM.get_by_name_label", NAME)
    disk = short.find(NAME)
    server.fail("VM.set_other_config", ["block", 2])
    with pytest.raises(TimedOut):
        short.restore(NAME, "clean")
    for record in watch(rig.sessions(), f"VM/{ref}", 30):
        if record["other_config"]["farmhand:disk"].split()[0] != disk.path.name:
            break
    again = rig.disks()
    for left in made.leftovers():
        made.discard(left)
    assert again.find(NAME).path == disk.path
    assert [d.path for d in again.list()] == [disk.path]
    assert rig.read(NAME) == "B" and not again.pristine(NAME, "clean")
    made.start(NAME)
    made.reset(NAME, "one")
    assert rig.read(NAME) == "A" and again.pristine(NAME, "one")
    assert list(made.leftovers()) == []


def test_callers_wait_for_each_other(rig, server, made):
    server.tell(knobs={"slow": 0.2, "back_off": 0.3})
    with ThreadPoolExecutor(3) as pool:
        owners = [Owner(KATA, f"n{n}") for n in range(3)]
        disks = rig.disks()
        list(pool.map(lambda o: disks.clone(rig.template, f"kata-{o.vm}", o, SIZE), owners))
    assert len(disks.list()) == 4


# -- refusals ---------------------------------------------------------------------------------------


def test_refusals_are_told_apart(rig, server, made):
    server.tell(knobs={"host_memory": 2**31 + MIB})
    server.tell(knobs={"host_memory": 64 * MIB})
    with pytest.raises(NoSpace, match="NO_HOSTS_AVAILABLE"):
        made.start(NAME)
    server.tell(knobs={"host_memory": 2**36, "sr_size": 2**29})
    server.fail("VM.clone", ["error", "SR_FULL", "10", "5"])
    with pytest.raises(NoSpace, match="SR_FULL"):
        rig.disks().restore(NAME, "clean")
    assert rig.read(NAME) == "B"
    user = replace(rig.spec("dev2").nic, mode="user")
    with pytest.raises(Unsupported, match="user-mode"):
        made.define(replace(rig.spec("dev2"), nic=user), rig.template)
    assert made.find("kata-dev2") is None and list(made.leftovers()) == []


def test_a_disk_that_the_server_makes_no_larger(rig, server, made):
    """It is in use, its storage can't, or has no room, or has none of that size."""
    disks = rig.disks()
    made.start(NAME)
    with pytest.raises(WrongState, match="is not stopped"):
        disks.enlarge(NAME, 2 * SIZE)
    with pytest.raises(XenApiError, match="VDI_IN_USE"):  # as it answers whoever doesn't ask first
        (vm,) = rig.sessions().call("VM.get_by_name_label", NAME)
        ref = rig.sessions().call("VM.get_record", vm)["other_config"]["farmhand:disk"].split()[1]
        rig.sessions().call("VDI.resize", ref, str(2 * SIZE))
    made.stop(NAME, grace=0)
    for kind, error in (
        (Unsupported, ["SR_OPERATION_NOT_SUPPORTED", "OpaqueRef:sr"]),
        (NoSpace, ["SR_BACKEND_FAILURE_44", "", "There is insufficient space", ""]),
        (UsageError, ["SR_BACKEND_FAILURE_79", "", "VDI Invalid size", ""]),
    ):
        server.fail("VDI.resize", ["error", *error])
        with pytest.raises(kind, match=f"make the disk of {NAME} 128M: {error[0]}"):
            disks.enlarge(NAME, 2 * SIZE)
        assert (disks.find(NAME).size, rig.read(NAME)) == (SIZE, "B")
    assert disks.enlarge(NAME, 2 * SIZE - 512).size == 2 * SIZE, "a VHD has whole blocks"
    made.start(NAME)


def test_a_larger_disk_that_was_lost_comes_back_as_large(rig, server, made):
    disks = rig.disks()
    disks.enlarge(NAME, 2 * SIZE)
    call = rig.sessions().call
    call("VDI.destroy", call("VDI.get_by_uuid", disks.find(NAME).path.name))
    made.reset(NAME, "one")
    assert (disks.find(NAME).size, rig.read(NAME)) == (2 * SIZE, "A")


def test_a_guest_without_agent_is_switched_off(rig, server, made):
    server.tell(knobs={"agent": False})
    made.start(NAME)
    made.stop(NAME, grace=30)
    assert made.find(NAME).power is Power.STOPPED


def test_a_guest_that_does_not_obey_is_told_as_it_is(rig, server, made):
    server.tell(knobs={"obeys": False, "lag": 1})
    made.start(NAME)
    with pytest.raises(TimedOut, match="192M"):
        made.balloon(NAME, 96 * MIB, timeout=0.5)
    vm = rig.pool().machine(NAME)  # and is pressed no further
    limits = {int(vm.record[f"memory_dynamic_{end}"]) // MIB for end in ("min", "max")}
    assert limits == {192}


def test_a_full_copy_is_a_task_with_progress(rig, server):
    told = []
    pool = rig.pool(copy=True, progress=lambda what, part: told.append((what, part)))
    disks = type(rig.disks())(pool, rig.disks()._runner)
    server.log()
    disks.clone(rig.template, "kata-full", Owner(KATA, "full"), SIZE)
    log = server.log()
    assert "VM.copy" in log and "task.destroy" in log and "VM.clone" not in log
    assert told[-1] == ("VM.copy", 1.0)
    assert disks.find("kata-full").used >= SIZE


def test_a_task_that_fails(rig, server):
    disks = type(rig.disks())(rig.pool(copy=True), rig.disks()._runner)
    server.fail("VM.copy", ["error", "SR_FULL", "10", "5"])
    with pytest.raises(NoSpace):
        disks.clone(rig.template, "kata-full", Owner(KATA, "full"), SIZE)
    assert disks.find("kata-full") is None and list(disks.leftovers()) == []


def test_the_seed_is_a_disk_of_its_own_and_follows_the_file(rig, server, tmp_path):
    seed = tmp_path / "seed.iso"
    seed.write_bytes(b"one" * 1000)
    hypervisor = rig.hypervisor()
    hypervisor.define(replace(rig.spec("prod"), seed=seed), rig.template)
    disks = [line for line in server.tell(world=True) if line.startswith("VBD 3")]
    assert len(disks) == 1
    hypervisor.checkpoint(NAME, "one")
    seed.write_bytes(b"two" * 1000)
    hypervisor.start(NAME)
    hypervisor.reset(NAME, "one")
    hypervisor.destroy(NAME)
    assert list(hypervisor.leftovers()) == []
    assert not [line for line in server.tell(world=True) if "prod" in line or "new" in line]


@pytest.mark.parametrize(
    "mark", [{"vm": "../../../victim"}, {"created": "soon"}, {"template": "\x9b2J"}]
)
def test_a_damaged_mark_is_nobodys(rig, server, made, mark):
    """Named once, and left alone with all that is its machine's."""
    warned = []
    pool = Pool(rig.sessions(), KATA, warn=warned.append)
    hypervisor = XenApiHypervisor(XenApiDisks(pool, Runner()))
    call = pool.sessions.call
    (ref,) = call("VM.get_by_name_label", NAME)
    for key, text in mark.items():
        call("VM.remove_from_other_config", ref, f"farmhand:{key}")
        call("VM.add_to_other_config", ref, f"farmhand:{key}", text)
    before = server.tell(world=True)
    assert hypervisor.list() == []
    assert hypervisor.find(NAME).owner is None
    for leftover in hypervisor.leftovers():
        hypervisor.discard(leftover)
    for change in (hypervisor.destroy, hypervisor.start, lambda name: hypervisor.reset(name, "clean")):
        with pytest.raises(FarmhandError):
            change(NAME)
    assert server.tell(world=True) == before
    (told,) = warned
    assert f"VM {NAME} (" in told
    assert told.isprintable()


def test_vbds_that_stay_a_while_are_not_in_the_way(rig, server, made):
    server.tell(knobs={"lazy_vbds": True})
    made.reset(NAME, "one")
    assert rig.read(NAME) == "A"
    made.start(NAME)


def test_copies_that_an_admin_made_of_ours_are_not_ours(rig, made):
    call = rig.sessions().call
    (ref,) = call("VM.get_by_name_label", NAME)
    copy = call("VM.clone", ref, "kata-mine")
    snapshot = call("VM.snapshot", ref, "kata-my snapshot")
    assert made.find("kata-mine").owner is None
    assert [m.name for m in made.list()] == [NAME]
    assert list(made.leftovers()) == []
    made.reset(NAME, "one")
    made.destroy(NAME)
    assert list(made.leftovers()) == []
    for kept in (copy, snapshot):
        assert call("VM.get_record", kept)["VBDs"]
        (vbd,) = call("VM.get_record", kept)["VBDs"]
        assert call("VDI.get_record", call("VBD.get_record", vbd)["VDI"])


# -- every call may fail ------------------------------------------------------------------------------

HOWS = {
    "refused": ["error", "INTERNAL_ERROR", "told to"],
    "before": ["drop-before"],
    "after": ["drop-after"],
    "dies": ["dies"],
    "cut": ["cut"],  # it loses what of its database isn't on its disk
    "cut, unnoticed": ["cut-unnoticed"],
}
CLONING = ("VM.clone", "VM.copy", "VM.snapshot", "VM.checkpoint", "VM.revert", "VDI.create")
"""Cut off within, or right after, they leave disks whose uuids nobody knows: see docs/xenapi.md."""


def nobodys(calls: list[str], number: int) -> bool:
    """Whether power that fails at this call may leave such disks."""
    return any(call in CLONING for call in calls[max(0, number - 3) : number])


def act(operation: str, hypervisor: XenApiHypervisor, rig) -> None:
    disks = hypervisor._disks
    match operation.removesuffix(", running"):
        case "define":
            hypervisor.define(rig.spec("dev2"), rig.template)
        case "clone":
            disks.clone(rig.template, "kata-dev2", Owner(KATA, "dev2"), SIZE)
        case "start":
            hypervisor.start(NAME)
        case "checkpoint":
            hypervisor.checkpoint(NAME, "two")
        case "reset":
            hypervisor.reset(NAME, "one")
        case "reset to clean":
            hypervisor.reset(NAME, "clean")
        case "enlarge":
            disks.enlarge(NAME, 2 * SIZE)
        case "destroy":
            hypervisor.destroy(NAME)
        case "destroy the disk":
            disks.destroy(NAME)
        case "seal":
            disks.seal(rig.image("U"), template(2))
        case "remove the template":
            disks.remove_template("base@2")


UNCHANGING = re.compile(r"get_|event\.from|session\.|PUT ")
OPERATIONS = (
    "define", "clone", "start", "checkpoint", "reset", "reset to clean", "reset, running", "enlarge",
    "destroy", "destroy, running", "destroy the disk", "seal", "remove the template",
)  # fmt: skip


# the others' calls are among those of these
OFTEN = ("define", "start", "checkpoint", "reset, running", "reset to clean", "enlarge",
         "destroy, running", "seal", "remove the template")  # fmt: skip
MANY = os.environ.get("FARMHAND_KILLS") == "many"
SEED = int(os.environ.get("FARMHAND_SEED") or random.SystemRandom().randrange(10**6))
UNNOTICED = ("checkpoint", "reset, running", "seal")  # the others' last calls are among those of these
CASES = [
    (operation, how)
    for operation in (OPERATIONS if MANY else OFTEN)
    for how in HOWS
    if MANY or how != "cut, unnoticed" or operation in UNNOTICED
]


@pytest.mark.parametrize(("operation", "how"), CASES)
def test_whatever_call_fails_all_is_old_or_new(rig, server, made, operation, how):
    """Each call of each operation in turn, refused, hung up on, or cut by the host's death: the state is
    the old or the new one, what is left over is found and removed, and the operation can be done."""
    _prepare(operation, made, rig)
    server.tell(keep=True)
    server.log()
    act(operation, rig.hypervisor(), rig)
    calls = server.log()
    assert len(calls) > 3
    for number, call in enumerate(calls, 1):
        server.tell(put_back=True)
        hypervisor = rig.hypervisor()
        server.fail("*", HOWS[how], nth=number)
        # it goes through where the failed call only tidies up, or the session is made anew
        with contextlib.suppress(FarmhandError):
            act(operation, hypervisor, rig)
        server.tell(fail=[])
        _old_or_new(rig, operation, f"{operation}, call {number}, {call}, {how}")
        left = _all_removed(rig)
        whole = how in ("refused", "before", "after") or not nobodys(calls, number)
        context = f"{operation}, call {number}, {call}, {how}: {left}"
        assert not left or (not whole and {line.split()[0] for line in left} == {"VDI"}), context


@pytest.mark.parametrize("operation", ["checkpoint", "reset, running", "destroy, running"])
def test_a_server_that_wrote_its_database_in_between(rig, server, made, operation):
    """By itself, after one call; its power fails at a later one. A few pairs, or each."""
    _prepare(operation, made, rig)
    server.tell(keep=True)
    server.log()
    act(operation, rig.hypervisor(), rig)
    calls = server.log()
    changing = [n for n, call in enumerate(calls, 1) if not UNCHANGING.search(call)]
    pairs = list(itertools.combinations(changing, 2))
    for first, second in pairs if MANY else random.Random(SEED).sample(pairs, min(8, len(pairs))):
        server.tell(put_back=True)
        hypervisor = rig.hypervisor()
        written = {"call": "*", "nth": first, "how": ["written"]}
        # whoever is told of the first is not counted for the second
        server.tell(fail=[written, {"call": "*", "nth": second - 1, "how": ["cut"]}])
        with contextlib.suppress(FarmhandError):
            act(operation, hypervisor, rig)
        server.tell(fail=[])
        context = f"{operation}, written after {calls[first - 1]}, cut at {calls[second - 1]}, {SEED}"
        _old_or_new(rig, operation, context)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_done_outlives_the_servers_power(rig, server, made, operation):
    """When the command is at its end."""
    _prepare(operation, made, rig)
    with contextlib.closing(rig.hypervisor()) as hypervisor:
        act(operation, hypervisor, rig)
    server.tell(cut=True)
    hypervisor, disks = rig.hypervisor(), rig.disks()
    prod = hypervisor.find(NAME)
    assert (prod is None) == (operation in ("destroy", "destroy, running"))
    disk = disks.find(NAME)
    wanted = {"define": "dev2", "clone": "dev2"}.get(operation)
    assert wanted is None or disks.find(f"kata-{wanted}")
    if operation == "checkpoint":
        assert [c.name for c in disk.checkpoints] == ["clean", "one", "two"]
    if operation.startswith("reset"):
        name = "clean" if "clean" in operation else "one"
        assert disks.pristine(NAME, name)
        hypervisor.start(NAME)
        assert rig.read(NAME) == {"clean": "\0", "one": "A"}[name]
    if operation == "start":
        assert not disks.pristine(NAME, disk.base)
    if operation == "enlarge":
        assert disks.find(NAME).size == 2 * SIZE
    labels = [sealed.label for sealed in disks.templates()]
    assert labels == (["base@1", "base@2"] if operation == "seal" else ["base@1"])
    assert _all_removed(rig) == []


def test_a_machine_whose_disk_is_gone_is_put_back(rig, server, made):
    """The storage has lost it, not we: it isn't swept away, and has what it was cloned with."""
    call = rig.sessions().call
    for name, letter in (("one", "A"), ("clean", "\0")):
        path = rig.disks().find(NAME).path
        call("VDI.destroy", call("VDI.get_by_uuid", path.name))
        disks = rig.disks()
        assert disks.find(NAME) is None and not disks.pristine(NAME, "one")
        assert [kept.name for kept in disks.left(NAME)] == ["clean", "one"]
        assert disks.left("kata-nobody") == []
        assert list(made.leftovers()) == []
        with pytest.raises(NotFound, match="no disk") as caught:
            made.start(NAME)
        assert Call("reset", vm="prod", to="one") in calls_in(caught.value.remedy)
        made.reset(NAME, name)
        assert rig.read(NAME) == letter and disks.pristine(NAME, name) and disks.left(NAME) == []


def test_a_file_that_vanished_is_not_in_the_way(rig, server, made):
    """Its record is there until the server looks at its storage: here that of the machine's own disk."""
    path = rig.disks().find(NAME).path
    for file in server.directory.glob(f"vdis-*/{path.name}"):
        file.unlink()
    with pytest.raises(FarmhandError):
        made.start(NAME)
    made.reset(NAME, "one")
    assert rig.read(NAME) == "A"
    made.destroy(NAME)
    assert list(made.leftovers()) == []


def test_disks_that_lost_their_names_are_found(rig, server, made):
    """Of ours by what was noted of them; what may be anybody's is named, and left alone."""
    before = server.tell(world=True)
    call = rig.sessions().call
    theirs = call("VM.clone", call("VM.get_by_name_label", NAME)[0], "kata-mine")
    (vbd,) = call("VM.get_record", theirs)["VBDs"]
    vdi = call("VBD.get_record", vbd)["VDI"]
    strange = call("VDI.get_record", vdi)["uuid"]
    server.fail("VM.set_other_config", ["cut"])
    with pytest.raises(FarmhandError):
        made.reset(NAME, "one")
    assert set(server.tell(world=True)) == set(before)
    again = rig.hypervisor()
    [left] = again.leftovers()
    assert strange not in left.ref
    assert "lost its power" in left.why
    assert list(again.doubtful()) == [strange]
    again.discard(left)
    assert list(again.leftovers()) == []
    assert list(again.doubtful()) == [strange]
    assert list((rig.place / "notes").iterdir()) == []
    assert rig.read(NAME) == "B"


def test_statistics_of_the_run_before_are_not_believed(rig, server, made):
    server.tell(knobs={"lag": 3})
    for _ in range(2):  # the second start begins with what the first run was ballooned to
        made.start(NAME)
        assert made.find(NAME).current == made.memory(NAME).actual == 192 * MIB
        made.stop(NAME, grace=0)
        made.start(NAME)
        assert made.balloon(NAME, 96 * MIB, timeout=30) == 96 * MIB
        assert made.find(NAME).current == 96 * MIB
        made.stop(NAME, grace=0)


def test_the_table_names_the_calls_that_fail_in_turn(rig, server, made):
    server.tell(keep=True)
    called: set[str] = set()
    for operation in OPERATIONS:
        server.tell(put_back=True)
        _prepare(operation, made, rig)
        server.log()
        act(operation, rig.hypervisor(), rig)
        called |= {call for call in server.log() if not UNCHANGING.search(call)}
    table = (ROOT / "docs/xenapi.md").read_text()
    assert set(re.findall(r"\| `(\S+)` \|.*each call fails in turn", table)) == called


def _prepare(operation: str, hypervisor: XenApiHypervisor, rig) -> None:
    if operation == "remove the template":
        hypervisor._disks.seal(rig.image("U"), template(2))
    if operation.endswith(", running"):
        hypervisor.start(NAME)


def _all_removed(rig) -> list[str]:
    """What is there yet when all that we know of is removed."""
    hypervisor, disks = rig.hypervisor(), rig.disks()
    for disk in disks.list():
        hypervisor.destroy(disk.machine)
    for sealed in disks.templates():
        disks.remove_template(sealed.label)
    for left in hypervisor.leftovers():
        hypervisor.discard(left)
    hypervisor.doubtful()  # the server looks at its storage
    return rig.server.tell(world=True)


def _old_or_new(rig, operation: str, context: str) -> None:
    hypervisor, disks = rig.hypervisor(), rig.disks()
    for left in hypervisor.leftovers():
        hypervisor.discard(left)
    assert list(hypervisor.leftovers()) == [], context
    prod, disk = hypervisor.find(NAME), disks.find(NAME)
    assert (prod is None) == (disk is None), context
    if disk is None:
        assert operation.startswith("destroy"), context
        return
    new = {"reset": "A", "reset, running": "A", "reset to clean": "\0"}.get(operation, "B")
    content = rig.read(NAME)
    assert content in ("B", new), context
    assert content != "B" or not disks.pristine(NAME, disk.base) or disk.base == "two", context
    kept = [c.name for c in disk.checkpoints]
    assert kept == ["clean", "one"] or (operation, kept[2:]) == ("checkpoint", ["two"]), context
    labels = [t.label for t in disks.templates()]
    assert labels == ["base@1"] or operation in ("seal", "remove the template"), context
    through = {
        "define": bool(hypervisor.find("kata-dev2")),
        "clone": bool(disks.find("kata-dev2")),
        "start": prod.power is Power.RUNNING,
        "checkpoint": kept[2:] == ["two"],
        "enlarge": False,  # may be done again
        "seal": "base@2" in labels,
        "remove the template": "base@2" not in labels,
    }
    if not through.get(operation):
        act(operation, hypervisor, rig)
    if operation.startswith("destroy"):
        assert hypervisor.find(NAME) is None or operation == "destroy the disk", context
        return
    for sealed in disks.templates() if operation in ("seal", "remove the template") else ():
        disks.clone(sealed, f"kata-{sealed.generation}", Owner(KATA, str(sealed.generation)), SIZE)
        assert rig.read(f"kata-{sealed.generation}") == "\0U"[sealed.generation - 1], context
    for name, letter in (("one", "A"), ("two", "B")):
        if name == "one" or operation == "checkpoint":
            hypervisor.reset(NAME, name)
            assert rig.read(NAME) == letter, context
            assert disks.pristine(NAME, name), context
    assert operation != "enlarge" or disks.find(NAME).size == 2 * SIZE, context


def test_a_server_that_refuses_a_disks_content_early_is_heard(rig, made):
    """It answers and hangs up while we still send: the disk is in use."""
    made.start(NAME)
    with pytest.raises(DriverFailed, match="content was refused: HTTP 500"):
        rig.write(NAME, "C")


def test_a_server_that_hears_no_more_is_not_believed(rig, server, made):
    """It says 200 to content that it did not read: more than the sockets between hold."""
    image = rig.place / "whole"
    image.write_bytes(b"C" * SIZE)
    server.fail("PUT /import_raw_vdi", ["answer-early"])
    ref = rig.sessions().call("VDI.get_by_uuid", rig.disks().find(NAME).path.name)
    with pytest.raises(DriverFailed, match="import_raw_vdi"):
        rig.sessions().put(ref, image, SIZE)


# -- how few calls ------------------------------------------------------------------------------------


def test_calls_per_vm_are_few_and_no_more_for_fifty(rig, capsys):
    one, each = rig.calls_a_vm(1), rig.calls_a_vm(3 if xenapi_rig.REAL_URL else 50)
    with capsys.disabled():
        print(f"\nXenAPI calls a VM: {one} for one VM, {each} each for fifty")
    for what, most in xenapi_rig.MOST_CALLS.items():
        assert each[what] <= one[what] <= most


# -- the calls, and how each was checked ------------------------------------------------------------

MODEL = json.loads((ROOT / "tests/xenapi/datamodel.json").read_text())


def used_calls() -> set[str]:
    """Every call the driver's text names."""
    text = "".join(p.read_text() for p in (ROOT / "hypervisors/xenapi").glob("*.py"))
    classes = "|".join(MODEL["classes"])
    found = set(re.findall(rf'"((?:{classes})\.[A-Za-z_]+)"', text))
    return found | {"session.login_with_password"}


def test_every_call_is_in_the_data_model_and_in_the_table():
    table = (ROOT / "docs/xenapi.md").read_text()
    for name in sorted(used_calls()):
        assert name in MODEL["calls"], f"{name} is no call of XenAPI's"
        assert f"| `{name}` |" in table, f"{name} is missing in the table of docs/xenapi.md"
    listed = set(re.findall(r"\| `(\w+\.\w+)` \|", table))
    assert listed == used_calls(), "the table of docs/xenapi.md has calls that we don't make"


def test_both_protocols_say_the_same(server):
    """JSON-RPC, as XML-RPC has it: types, arity, errors with their parameters."""

    def ask(method: str, *arguments: object, version: str = "2.0") -> dict:
        body = {"jsonrpc": version, "method": method, "params": arguments, "id": 1}
        if version == "1.0":
            del body["jsonrpc"]
        with urllib.request.urlopen(
            f"{server.http}/jsonrpc", json.dumps(body).encode(), timeout=10
        ) as answer:
            return json.loads(answer.read())

    session = ask("session.login_with_password", "root", "secret")["result"]
    (ref,) = ask("VM.get_by_name_label", session, "Other install media")["result"]
    assert ask("VM.start", session, ref, False, False)["error"] == {
        "code": 1, "message": "VM_IS_TEMPLATE", "data": [ref],
    }  # fmt: skip
    one = ask("VM.get_record", session, "OpaqueRef:no", version="1.0")["result"]
    assert one["ErrorDescription"] == ["HANDLE_INVALID", "VM", "OpaqueRef:no"]
    refused: list[tuple[str | None, str, list[object]]] = [
        ("MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.start", [session, ref]),
        ("FIELD_TYPE_ERROR", "VM.start", [session, ref, "no", False]),
        ("MESSAGE_METHOD_UNKNOWN", "VM.begin", [session, ref]),
        ("SESSION_INVALID", "VM.start", ["OpaqueRef:old", ref, False, False]),
        ("UUID_INVALID", "VM.get_by_uuid", [session, "no"]),
        ("EVENT_FROM_TOKEN_PARSE_FAILURE", "event.from", [session, ["vm"], "bad", 0.0]),
        (None, "VM.add_to_other_config", [session, ref, "k", "v"]),
    ]
    for code, method, arguments in refused:
        answer = ask(method, *arguments)
        assert answer.get("error", {}).get("message") == code, answer
    again = ask("VM.add_to_other_config", session, ref, "k", "v")["error"]
    assert again["message"] == "MAP_DUPLICATE_KEY"


def test_the_servers_own_revert_would_lose_a_disk(rig, server, made):
    """Why a cold reset doesn't use it: cut off within, neither the old disk is there nor the new."""
    call = rig.sessions().call
    (ref,) = call("VM.get_by_name_label", NAME)
    vm = call("VM.get_record", ref)
    server.fail("VM.revert", ["dies", 3])
    with pytest.raises(DriverFailed):
        call("VM.revert", vm["snapshots"][0])
    assert call("VM.get_record", ref)["VBDs"] == []
    assert rig.disks().find(NAME) is None
    assert [kept.name for kept in rig.disks().left(NAME)] == ["clean", "one"]
