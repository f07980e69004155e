"""SIGKILL with events on their way: at each journal step, while an event is written, right before and
right after its receiver is told. The next command delivers what is left: no event is lost, one that
comes twice is the same, and each operation's come in their order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from bench import KILLS, Bench
from benches import bench_on
from places import FakePlace

from tests import farm
from tests.unit.receiver import SECRET, Receiver, receiving

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture(scope="module")
def bench(receiver: Receiver, cache: Path) -> Iterator[Bench]:
    more = f"events: {{chat: {{webhook: '{receiver.url}', secret_file: secret}}}}"
    with bench_on(FakePlace(), cache, more=more) as made:
        secret = made.file.with_name("secret")
        secret.write_text(SECRET)
        secret.chmod(0o600)
        yield made


def test_kills_at_each_step_of_a_reset(bench: Bench, receiver: Receiver) -> None:
    arguments = {"vms": ["dev2", "prod"], "wait": False}
    for context in bench.kills("reset, told", "reset", arguments, partial(_made, bench), shapes=False):
        with bench.site() as site:
            farm.recover(site)
        _nothing_lost(bench, receiver, context)


@pytest.mark.parametrize("when", ["putting", "telling", "told"])
def test_kills_around_each_event(bench: Bench, receiver: Receiver, when: str) -> None:
    arguments = {"vms": ["prod"], "wait": False}
    number = 0
    while True:
        number += 1
        _made(bench)
        cut = bench.killed_at(when, number, "reset", arguments)
        if cut is None:
            break
        KILLS.add("reset, around its events", bench.driver)
        with bench.site() as site:
            farm.recover(site)
        _nothing_lost(bench, receiver, f"{when} {number}: {cut}")
    assert number > 2, "its beginning and its end"
    if when == "told":
        assert len(receiver.tries) > len(set(receiver.tries)), "some came twice"


def _made(bench: Bench) -> None:
    with bench.site() as site:
        farm.clone_farm(site, wait=False)
        farm.start(site, ["dev2", "prod"], wait=False)


def _nothing_lost(bench: Bench, receiver: Receiver, context: str) -> None:
    assert all(len(bodies) == 1 for bodies in receiver.bodies.values()), f"{context}: two of one id"
    told: dict[int, list[str]] = {}
    for event in {event["id"]: event for event in receiver.got}.values():  # in the order they first came
        stage = event["type"].rpartition(".")[2]
        told.setdefault(event["data"]["operation"]["id"], []).append(stage)
    with bench.site(plan=True) as site:
        records = site.journal.history(100_000, steps=False)
    for record in records:
        last = {"done": "passed", "failed": "failed", "recovered": "recovered"}[record.outcome]
        assert told.pop(record.id) == ["began", last], f"{context}: {record.verb} {record.vms}"
    assert told == {}, f"{context}: told of what never was"
