"""What a real xapi 23.10 does and one would not expect, and how the driver stands it: who started a
machine, refused starts, shutdowns that seem to fail, storage changes side by side, tasks that change all
the time. On the test server, which does likewise: simulated."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import xenapi_rig
from rigs import FARM, MIB, SIZE

from hypervisors.api import Owner, Power
from hypervisors.xenapi.disks import XenApiDisks
from hypervisors.xenapi.errors import XenApiError
from hypervisors.xenapi.session import Sessions
from inventory.errors import DriverFailed, FarmhandError, NoSpace, Unsupported, WrongState
from provision.engine.report import QuietReporter
from provision.site import Site
from tests.identities import KATA

ROOT = Path(__file__).parents[2]
NAME = "kata-prod"


rig, server, made = xenapi_rig.machines, xenapi_rig.its_server, xenapi_rig.kept  # fixtures


def by_hand(rig, *calls: str) -> None:
    """As an admin does it."""
    call = rig.sessions().call
    (ref,) = call("VM.get_by_name_label", NAME)
    for name in calls:
        call(name, ref, *((False, False) if name == "VM.start" else ()))


# -- proof ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("to", ["clean", "one"])
@pytest.mark.parametrize("end", ["VM.hard_shutdown", "VM.clean_shutdown"])
def test_a_start_by_somebody_else_ends_the_proof(rig, made, to, end, quick):
    made.reset(NAME, to)
    disks = rig.disks()
    assert disks.pristine(NAME, to, quick=quick)
    by_hand(rig, "VM.start", end)
    assert not disks.pristine(NAME, to, quick=quick)
    made.reset(NAME, to)
    assert disks.pristine(NAME, to, quick=quick)


def test_a_checkpoint_of_one_that_ran_is_what_it_is(rig, made):
    disks = rig.disks()
    made.start(NAME)
    made.stop(NAME, grace=30)
    made.checkpoint(NAME, "two")
    assert disks.pristine(NAME, "two")
    by_hand(rig, "VM.start", "VM.hard_shutdown")
    assert not disks.pristine(NAME, "two")
    made.start(NAME)  # and has its disk


def test_writes_that_the_server_has_not_counted_yet_end_the_proof(rig, made):
    call, disks = rig.sessions().call, rig.disks()
    ref = call("VDI.get_by_uuid", disks.find(NAME).path.name)
    before = call("VDI.get_record", ref)["physical_utilisation"]
    rig.write(NAME, "B")
    assert call("VDI.get_record", ref)["physical_utilisation"] == before
    assert not disks.pristine(NAME, "one")


def test_what_cannot_be_looked_at_is_not_proven(rig, server, made):
    disks = rig.disks()
    server.fail("VDI.update", ["error", "SR_OPERATION_NOT_SUPPORTED", "OpaqueRef:sr"])
    assert disks.pristine(NAME, "one"), "storage that is always up to date"
    server.fail("VDI.update", ["error", "INTERNAL_ERROR", "SM has thrown"])
    assert not disks.pristine(NAME, "one")
    seen = disks.ours(NAME)
    rig.sessions().call("VBD.destroy", seen.attached[0])
    assert not disks.pristine(NAME, "one"), "no device is left to tell of a start"


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knob", "kind", "words"),
    [
        ({"host_memory": 64 * MIB}, NoSpace, "HOST_NOT_ENOUGH_FREE_MEMORY 201326592"),
        ({"unfit": "VM_HVM_REQUIRED"}, Unsupported, "VM_HVM_REQUIRED"),
        ({"unfit": "VM_INCOMPATIBLE_WITH_THIS_HOST"}, WrongState, "with features this host lacks"),
    ],
)
def test_a_refused_start_has_its_reason_and_leaves_the_disk_clean(rig, server, made, knob, kind, words):
    server.tell(knobs=knob)
    with pytest.raises(kind, match=rf"NO_HOSTS_AVAILABLE, xen: .*{words}") as caught:
        made.start(NAME)
    assert "OpaqueRef" not in str(caught.value)
    assert rig.disks().pristine(NAME, "one")
    server.tell(knobs={"host_memory": 2**36, "unfit": ""})
    made.start(NAME)
    assert not rig.disks().pristine(NAME, "one")


def test_a_refused_resume_has_its_reason_and_keeps_the_memory(rig, server, made):
    server.tell(knobs={"suspend_sr": True})
    made.start(NAME)
    by_hand(rig, "VM.suspend")
    server.tell(knobs={"unfit": "VM_INCOMPATIBLE_WITH_THIS_HOST"})
    with pytest.raises(WrongState, match="VM_INCOMPATIBLE_WITH_THIS_HOST"):
        made.start(NAME)
    server.tell(knobs={"unfit": ""})
    made.start(NAME)
    assert made.find(NAME).power is Power.RUNNING


def test_a_start_that_failed_half_way_is_not_taken_for_refused(rig, server, made):
    server.fail("VM.start", ["error", "INTERNAL_ERROR", "the domain died"])
    with pytest.raises(DriverFailed):
        made.start(NAME)
    assert not rig.disks().pristine(NAME, "one")


def test_without_the_licence_memory_is_as_it_was_defined(rig, server, made):
    assert made.capabilities().live_balloon
    server.tell(knobs={"dmc": False})
    bare = rig.hypervisor()
    can = bare.capabilities()
    assert not can.live_balloon
    assert any("Dynamic Memory Control" in note for note in can.notes)
    bare.start(NAME)
    assert bare.memory(NAME).least == bare.memory(NAME).maximum
    server.log()
    with pytest.raises(Unsupported, match="Dynamic Memory Control"):
        bare.balloon(NAME, 96 * MIB, timeout=5)
    assert "VM.set_memory_dynamic_range" not in server.log()
    bare.balloon(NAME, 192 * MIB, timeout=5)


def test_a_shutdown_that_worked_is_not_a_failure(rig, server, made):
    server.tell(knobs={"late_halt": True})
    for grace in (0, 30):
        made.start(NAME)
        made.stop(NAME, grace=grace)
        assert made.find(NAME).power is Power.STOPPED
    made.start(NAME)
    made.reset(NAME, "one")
    assert rig.disks().pristine(NAME, "one")
    made.start(NAME)
    made.destroy(NAME)
    assert made.find(NAME) is None and list(made.leftovers()) == []


def test_a_shutdown_that_did_not_work_is_one(server, made, monkeypatch):
    monkeypatch.setattr("hypervisors.xenapi.pool._HALTING", 0.2)
    made.start(NAME)
    why = "Object with type VM and id UUID/vbd.xvda does not exist in xenopsd"
    server.fail("VM.hard_shutdown", ["error", "INTERNAL_ERROR", why])
    with pytest.raises(DriverFailed, match="INTERNAL_ERROR"):
        made.stop(NAME, grace=0)
    assert made.find(NAME).power is Power.RUNNING


# -- templates that are VMs -------------------------------------------------------------------------


def test_neither_a_template_nor_what_is_half_made_of_it_can_start(rig, made):
    """By an admin who finds it in the list; and the list of templates stays theirs."""
    call, disks = rig.sessions().call, rig.disks()
    (template,) = disks.templates()
    golden = template.ref.partition(" ")[2]
    records = call("VM.get_all_records").values()
    there = [vm for vm in records if vm["is_a_template"] and not vm["is_a_snapshot"]]
    assert not [vm["name_label"] for vm in there if vm["name_label"].startswith(FARM)]
    with pytest.raises(XenApiError, match="OPERATION_BLOCKED"):
        call("VM.start", golden, False, False)
    with (
        pytest.raises(XenApiError, match="NO_HOSTS_AVAILABLE"),
        disks.growing(template, Owner(KATA, "half"), SIZE) as (vm, _, _),
    ):
        call("VM.start", vm.ref, False, False)
    disks.clone(template, "kata-bare", Owner(KATA, "bare"), SIZE)  # a disk that no machine has yet
    with pytest.raises(XenApiError, match="NO_HOSTS_AVAILABLE"):
        call("VM.start", disks.pool.machine("kata-bare").ref, False, False)
    made.start(NAME)


# -- side by side -----------------------------------------------------------------------------------

CLONE = """
import sys; sys.path[:0] = [{root!r}, {contract!r}]
from pathlib import Path
from hypervisors.api import Owner
from host.run import Runner
from tests.identities import KATA
from hypervisors.xenapi.disks import XenApiDisks
from hypervisors.xenapi.pool import Pool
from hypervisors.xenapi.session import Sessions, XenApiServer
server = XenApiServer(
    url={url!r}, credentials=Path({credentials!r}), ca=Path({ca!r}), turns=Path({turns!r})
)
disks = XenApiDisks(Pool(Sessions(server), KATA), Runner())
(template,) = disks.templates()
for n in range(3):
    disks.clone(template, f"kata-{who}{{n}}", Owner(KATA, f"{who}{{n}}"), {size})
    disks.restore(f"kata-{who}{{n}}", "clean")
"""


def test_one_storage_change_at_a_time(rig, server):
    """Of several threads, and of several processes: none meets another inside the server."""
    server.tell(knobs={"slow": 0.05})
    turns = rig.place / "turns"
    here = Sessions(server.server(turns=turns))
    disks = type(rig.disks())(type(rig.pool())(here, KATA), rig.disks()._runner)
    processes = [
        subprocess.Popen(
            [
                sys.executable, "-P", "-c",
                CLONE.format(
                    root=str(ROOT), contract=str(Path(__file__).parent), url=server.https, who=who,
                    credentials=str(server.credentials), ca=str(server.ca), turns=str(turns), size=SIZE,
                ),
            ]
        )
        for who in "pq"
    ]  # fmt: skip
    owners = [Owner(KATA, f"n{n}") for n in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda o: disks.clone(rig.template, f"kata-{o.vm}", o, SIZE), owners))
        list(pool.map(lambda o: disks.destroy(f"kata-{o.vm}"), owners))
    assert [process.wait() for process in processes] == [0, 0]
    assert server.tell(collisions=True) == 0
    here.close()


def test_without_turns_they_meet(rig, server):
    """So that the test above says something."""
    server.tell(knobs={"slow": 0.1})
    disks, owners = rig.disks(), [Owner(KATA, f"n{n}") for n in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda o: disks.clone(rig.template, f"kata-{o.vm}", o, SIZE), owners))
    assert server.tell(collisions=True) > 0


# -- the suites on a real server -----------------------------------------------------------------------


def test_what_needs_no_injected_failure_runs_on_a_real_server(tmp_path):
    """The test server as a server of somebody's: what can't be run there is said to be not run, the rest
    is, and all that was made is removed."""
    server = xenapi_rig.TestServer()
    rig, alone = f"{Path(__file__).with_name('test_xenapi.py')}::", Path(__file__)
    chosen = [
        f"{rig}test_copies_that_an_admin_made_of_ours_are_not_ours",
        f"{rig}test_the_seed_is_a_disk_of_its_own_and_follows_the_file",
        f"{rig}test_a_guest_without_agent_is_switched_off",
        f"{alone}::test_disks_are_called_after_their_machines",
        f"{alone}::test_a_start_by_somebody_else_ends_the_proof",
    ]
    env = {
        **os.environ, "FARMHAND_XENAPI_URL": server.https,
        "FARMHAND_XENAPI_CREDENTIALS": str(server.credentials),
        "FARMHAND_XENAPI_FINGERPRINT": server.fingerprint,
    }  # fmt: skip
    try:
        before = server.tell(world=True)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider",
             f"--basetemp={tmp_path / 'there'}", *chosen],
            cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "11 passed on xenapi (a real XenAPI server)" in done.stdout
        assert "switched_off: not run from here on: a real server can't be told ['knobs']" in done.stdout
        assert server.tell(world=True) == before
    finally:
        server.close()


# -- tasks, names -----------------------------------------------------------------------------------


def test_a_task_that_changes_all_the_time_is_looked_at_a_few_times(rig):
    counted = rig.calls_warm()
    for what, most in xenapi_rig.MOST_CALLS_WARM.items():
        assert counted[what] <= most, what


def test_disks_are_called_after_their_machines(rig, made):
    call = rig.sessions().call
    rig.disks().clone(rig.template, "kata-bare", Owner(KATA, "bare"), SIZE)
    for machine, to in ((NAME, ""), ("kata-bare", ""), (NAME, "clean"), (NAME, "one")):
        if to:
            made.reset(machine, to)
        vdi = call("VDI.get_by_uuid", rig.disks().find(machine).path.name)
        assert call("VDI.get_record", vdi)["name_label"] == machine


def test_a_second_farm_does_not_wait_for_ever(rig, server, made):
    """A call that fails gives its turn back."""
    turns = rig.place / "turns"
    disks = type(rig.disks())(
        type(rig.pool())(Sessions(server.server(turns=turns)), KATA), rig.disks()._runner
    )
    server.fail("VM.clone", ["drop-before"])
    with pytest.raises(FarmhandError):
        disks.restore(NAME, "one")
    disks.restore(NAME, "one")
    assert disks.pristine(NAME, "one")


def test_all_farms_of_a_storage_repository_take_turns(server, tmp_path, monkeypatch):
    for variable in ("STATE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{variable}_DIR", str(tmp_path / variable))

    def turns(farm: str, sr: str) -> Path | None:
        there = xenapi_rig.declared(server)
        host = replace(there.hosts["xen"], sr=sr)
        site = Site(replace(there, farm=farm, hosts={"xen": host}), reporter=QuietReporter(), plan=True)
        with site:
            disks = site.disks("xen")
            assert isinstance(disks, XenApiDisks)
            return disks.pool.sessions._server.turns

    one = turns("kata", "Local storage")
    assert one and one == turns("other", "Local storage") != turns("kata", "Other storage")
