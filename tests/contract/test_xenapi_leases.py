"""Leases on a XenAPI server, whose holders share nothing but it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import xenapi_rig

from host.processes import Process
from hypervisors.xenapi import leases as leases_module
from hypervisors.xenapi.leases import PoolLeases
from hypervisors.xenapi.session import Sessions
from inventory.errors import Busy, TimedOut

PROD = ["kata-prod"]


@pytest.fixture
def server(xenapi):
    if isinstance(xenapi, xenapi_rig.RealServer):
        pytest.skip("counts calls and plants keys")
    return xenapi


@pytest.fixture
def rig(server, tmp_path):
    with xenapi_rig.opened(xenapi_rig.XenApiRig, tmp_path, server) as made:
        yield made


@pytest.fixture
def leases(rig):
    return PoolLeases("it", rig.sessions())


def config(rig) -> dict[str, str]:
    (pool,) = rig.sessions().call("pool.get_all_records").values()
    return {k: v for k, v in pool["other_config"].items() if k.startswith("farmhand:lease:")}


def plant(rig, *, until: float, process: str = "elsewhere:1:1") -> str:
    """Another holder's, as it would have left it."""
    (pool,) = rig.sessions().call("pool.get_all")
    key = f"farmhand:lease:{os.urandom(4).hex()}:0"
    facts = {"names": PROD, "note": "pid 7 of bob@pc2", "until": until, "process": process}
    rig.sessions().call("pool.add_to_other_config", pool, key, json.dumps(facts))
    return key


def test_three_calls_for_any_number_of_machines(rig, server) -> None:
    made: list[str] = []
    leases = PoolLeases("it", Sessions(server.server(), count=made.append))
    for names in (PROD, [f"kata-{n}" for n in range(200)]):
        with leases.hold(names, "the first"):
            assert len(config(rig)) == 1
        assert config(rig) == {}
    first = ["session.login_with_password", "pool.get_all"]
    each = [f"pool.{verb}_other_config" for verb in ("add_to", "get", "remove_from")]
    assert made == [*first, *each, *each]
    leases.sessions.close()


def test_another_holder_is_named_and_machines_of_others_are_free(rig, leases) -> None:
    other = PoolLeases("it", rig.sessions())
    with leases.hold(["kata-dev2", *PROD], "pid 3 of ann@pc1, doing: reset prod"):
        said = "kata-prod is held by pid 3 of ann@pc1, doing: reset prod"
        with pytest.raises(Busy, match=said), other.hold(PROD, "the other"):
            pass
        with other.hold(["kata-x"], "the other"):
            pass
        assert len(config(rig)) == 1
    with other.hold(PROD, "the other"):
        pass


def test_of_many_at_once_at_most_one_has_it(rig) -> None:
    inside, most, got = [], [], []

    def one(number: int) -> None:
        mine = PoolLeases("it", rig.sessions())
        for _ in range(4):
            try:
                with mine.hold(PROD, f"number {number}"):
                    inside.append(number)
                    most.append(len(inside))
                    time.sleep(0.02)
                    inside.remove(number)
                    got.append(number)
            except Busy:
                pass

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(6)))
    assert set(most) <= {1}
    assert config(rig) == {}


def test_it_is_renewed_and_seen_all_the_time(rig, leases, monkeypatch) -> None:
    monkeypatch.setattr(leases_module, "RENEWED", 0.02)
    with leases.hold(PROD, "one"):
        seen = [set(config(rig)) for _ in range(40)]
    assert all(seen)
    assert len(set.union(*seen)) > 2
    assert config(rig) == {}


def test_a_dead_holders_is_broken(rig, leases, monkeypatch) -> None:
    dead = Process.this().mark.rpartition(":")[0] + ":1"
    plant(rig, until=time.time() + 1000, process=dead)  # of this machine: it is known
    with leases.hold(PROD, "one"):
        assert len(config(rig)) == 1
    monkeypatch.setattr(leases_module, "WATCHED", 0.5)
    monkeypatch.setattr(leases_module, "_LOOK", 0.1)
    for until in (time.time() - 1, time.time() + 86400):  # the latter by a clock that is a day ahead
        plant(rig, until=until)
        with leases.hold(PROD, "one"):
            assert len(config(rig)) == 1
    assert config(rig) == {}


def test_a_living_ones_is_not_whatever_its_clock_says(rig, leases, monkeypatch) -> None:
    monkeypatch.setattr(leases_module, "WATCHED", 30.0)
    monkeypatch.setattr(leases_module, "RENEWED", 0.3)
    monkeypatch.setattr(leases_module, "_LOOK", 0.1)
    monkeypatch.setattr(leases_module, "LASTS", -1000.0)
    other = PoolLeases("it", rig.sessions())
    slow = "with a slow clock"
    with other.hold(PROD, slow), pytest.raises(Busy, match=slow), leases.hold(PROD, "one"):
        pass


def test_what_is_no_lease_is_in_nobodys_way(rig, leases) -> None:
    (pool,) = rig.sessions().call("pool.get_all")
    odd = {"farmhand:lease:": "", "farmhand:lease:x:0": "{}", "farmhand:lease:y": "[1]", "theirs": "1"}
    for key, value in odd.items():
        rig.sessions().call("pool.add_to_other_config", pool, key, value)
    with leases.hold(PROD, "one"):
        pass
    (left,) = rig.sessions().call("pool.get_all_records").values()
    assert odd.items() <= left["other_config"].items()
    for key in odd:
        rig.sessions().call("pool.remove_from_other_config", pool, key)


def test_its_thread_ends_with_it(leases) -> None:
    before = threading.active_count()
    with leases.hold(PROD, "one"):
        pass
    assert threading.active_count() == before


@pytest.fixture
def hasty(monkeypatch):
    """Of others' leases nobody waits for long."""
    for name, seconds in {"RENEWED": 0.1, "LASTS": -1.0, "WATCHED": 0.8, "SURE": 0.4}.items():
        monkeypatch.setattr(leases_module, name, seconds)
    monkeypatch.setattr(leases_module, "_LOOK", 0.1)


def a_vdi(rig) -> str:
    """Something to change."""
    return rig.disks().pool.new_vdi("kata-prod", 2**20, {})


def test_a_holder_that_was_stopped_too_long_changes_nothing_more(rig, leases, hasty) -> None:
    vdi = a_vdi(rig)
    out, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            mine = Sessions(rig.sessions()._server)
            with PoolLeases("it", mine).hold(PROD, "the stopped one"):
                mine.call("VDI.set_name_label", vdi, "before")
                os.kill(os.getpid(), signal.SIGSTOP)
                mine.call("VDI.set_name_label", vdi, "after")
                os.write(told, b"it went on\n")
        except BaseException as error:  # noqa: BLE001 - told to the test
            os.write(told, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(0)
    os.close(told)
    try:
        with os.fdopen(out) as said:
            assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
            with leases.hold(PROD, "pid 9 of bob@pc2"):
                os.kill(child, signal.SIGCONT)
                why = said.readline()
                assert why.startswith("LeaseLost: ") and "kata-prod is held by pid 9 of bob@pc2" in why
                assert rig.sessions().call("VDI.get_name_label", vdi) == "before"
                assert len({key.rpartition(":")[0] for key in config(rig)}) == 1
        assert config(rig) == {}
    finally:
        os.kill(child, signal.SIGCONT)
        os.waitpid(child, 0)


def test_one_that_was_stopped_and_not_broken_goes_on(rig, server, hasty, monkeypatch) -> None:
    made: list[str] = []
    mine = Sessions(server.server(), count=made.append)
    monkeypatch.setattr(leases_module, "RENEWED", 1000.0)
    vdi, change = a_vdi(rig), "VDI.set_name_label"
    with PoolLeases("it", mine).hold(PROD, "one"):
        made.clear()
        mine.call(change, vdi, "x")
        assert made == [change]
        monkeypatch.setattr(leases_module, "SURE", -1.0)  # as if it had been stopped
        mine.call(change, vdi, "y")
        renewal = [f"pool.{verb}_other_config" for verb in ("add_to", "get", "remove_from")]
        logins = ["session.login_with_password"]  # it has one in use
        assert made[1:] == [*logins, *renewal, change]
        assert len(config(rig)) == 1
    assert config(rig) == {}
    mine.close()


def test_a_renewal_whose_answer_is_lost_leaves_no_key(rig, leases, monkeypatch) -> None:
    monkeypatch.setattr(leases_module, "RENEWED", 0.02)
    add, failed = PoolLeases.add, threading.Event()

    def cut_off(self, key, value):
        add(self, key, value)
        if not key.endswith(":0") and not failed.is_set():
            failed.set()
            raise TimedOut("no answer")

    monkeypatch.setattr(PoolLeases, "add", cut_off)
    with leases.hold(PROD, "one"):
        assert failed.wait(30)
        first = set(config(rig))
        while set(config(rig)) & first:
            time.sleep(0.02)
    assert config(rig) == {}
