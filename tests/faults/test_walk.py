"""A random walk: operations drawn at random, each killed somewhere, its recovery killed too, one after
the other on the same two VMs. What a kill left meets all that came before it, and a kill costs no more
than the operation and a look; so the lab's stores get most of theirs here.

After each recovery a VM is, in content and checkpoints, what it was before the operation or what it is
after it; of one that isn't there, there is nothing: no volume, mapping, file, definition. At the end all
is destroyed, and nothing is left. (FARMHAND_KILLS and FARMHAND_SEED: see bench.py.)
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from bench import FEW, KILLS, MANY, SEED, Bench, Length
from benches import AT_RANDOM, HERE, STORES, bench_on, make_place, of_lab
from places import TEMPLATE

from provision.member import Member, is_on
from provision.site import Site
from tests import farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(7200)]
ROUNDS = {
    "fake": 25, "xenapi": 5, "kvm": 5, "zfs": 40, "lvm-thin": 12, "lvm-linked": 8, "lvm-full": 8,
    "kvm+zfs": 6, "kvm+lvm-thin": 4, "xen+lvm-thin": 12,
}  # fmt: skip


@dataclass(frozen=True)
class Vm:
    """What a VM has. ``letter`` is its disk's content; ``kept`` that of each checkpoint."""

    letter: str
    kept: Mapping[str, str]


@dataclass(frozen=True)
class Draw:
    """An operation, and what it makes of the VM."""

    verb: str
    arguments: dict[str, Any]
    after: Mapping[str, Vm | None]
    """Of each VM it changes. Several are changed as one."""

    def __str__(self) -> str:
        return f"{self.verb} of {' and '.join(self.after)}"


class Walk:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.dice = random.Random(f"{SEED} walk {bench.driver}")
        self.vms: dict[str, Vm | None] = {"dev2": None, "prod": None}
        self.on: dict[str, bool] = {"dev2": False, "prod": False}
        self.lengths: dict[str, Length] = {}
        self.story: list[str] = []
        self._letters = iter(string.ascii_uppercase * 1000)
        self._names = iter(f"c{n}" for n in range(10000))

    def learn(self) -> None:
        """Each operation once, uninterrupted: how long it takes, and how many steps it has."""
        new = Vm(TEMPLATE, {"clean": TEMPLATE})
        kept = replace(new, kept={**new.kept, "c": TEMPLATE})
        for verb, arguments, after in (
            ("clone_farm", {"wait": False}, new),
            ("checkpoint", {"name": "c", "wait": False}, kept),
            ("reset", {"to": "clean", "wait": False}, kept),
            ("destroy", {}, None),
        ):
            self.lengths[verb] = self.bench.uninterrupted(verb, {"vms": ["prod"], **arguments})
            self.vms["prod"] = after
            self.look("")

    def draw(self) -> Draw:
        vms = self.dice.choice((["dev2"], ["prod"], ["dev2", "prod"]))
        there = {vm: now for vm in vms if (now := self.vms[vm])}
        if len(there) < len(vms):
            vm = next(vm for vm in vms if vm not in there)
            after = {vm: Vm(TEMPLATE, {"clean": TEMPLATE})}
            return Draw("clone_farm", {"vms": [vm], "wait": False}, after)
        what = self.dice.choice(("reset", "reset", "reset", "checkpoint", "checkpoint", "destroy"))
        if what == "destroy":
            return Draw(what, {"vms": vms[:1]}, {vms[0]: None})
        if what == "reset" or any(len(now.kept) > 3 for now in there.values()):
            of_all = set.intersection(*(set(now.kept) for now in there.values()))
            to = self.dice.choice(sorted(of_all))
            arguments = {"vms": vms, "to": to, "wait": False}
            return Draw(
                "reset", arguments, {vm: replace(now, letter=now.kept[to]) for vm, now in there.items()}
            )
        name = next(self._names)
        arguments = {"vms": vms, "name": name, "wait": False}
        return Draw(what, arguments, {vm: _keeping(now, name) for vm, now in there.items()})

    def kill(self, draw: Draw) -> str | None:
        """None: it was through before."""
        length = self.lengths[draw.verb]
        when = self.dice.choice(("written", "done", "alone", "together", "alone", "together"))
        at: float = self.dice.randrange(1, length.steps + 1)
        if when in ("alone", "together"):
            at = self.dice.random() * length.seconds
        text = self.bench.killed_at(when, at, draw.verb, draw.arguments)
        self.story.append(
            f"{draw.verb} {draw.arguments}: {when} {at:.3g} of {length.steps}, {length.seconds:.2f} s: "
            f"{text}"
        )
        if text is not None:
            KILLS.add(f"{_shown(draw)}, walk", self.bench.driver)
        return text

    def kill_recovery(self, draw: Draw) -> None:
        seconds = self.lengths[draw.verb].seconds
        for _ in range(self.dice.choice((0, 1, 1, 2))):
            when, at = self.dice.choice(("alone", "together")), self.dice.random() * seconds
            text = self.bench.killed_at(when, at, "recover", {})
            self.story.append(f"recover: {when} {at:.3f} s: {text}")
            if text is None:
                break
            KILLS.add(f"recover of {_shown(draw)}, walk", self.bench.driver)

    def step(self) -> None:
        try:
            self._step()
        except AssertionError as error:
            raise AssertionError(self.told(str(error))) from error

    def _step(self) -> None:
        draw = self.draw()
        with self.bench.site() as site:
            for vm in draw.after:
                self.write(site, vm)
        if draw.verb == "checkpoint":  # it keeps what was just written
            there = {vm: now for vm in draw.after if (now := self.vms[vm])}
            name = draw.arguments["name"]
            draw = replace(draw, after={vm: _keeping(now, name) for vm, now in there.items()})
        context = f"{draw} on {self.bench.driver}, FARMHAND_SEED={SEED}"
        KILLS.open[context] = None
        killed = None
        if draw.verb == "clone_farm" and self.story and self.story[-1].startswith(("clone", "recover")):
            length = self.bench.uninterrupted(draw.verb, draw.arguments)  # else it would never be there
            self.story.append(f"{draw.verb} {draw.arguments}: {length.seconds:.2f} s")
        else:
            killed = self.kill(draw)
        if killed is not None:
            self.kill_recovery(draw)
            with self.bench.site() as site:
                farm.recover(site)
                assert site.journal.unfinished() == (), context
                assert site.locks.held() == (), context
        self.look(context, draw, through=killed is None)
        del KILLS.open[context]

    def write(self, site: Site, vm: str) -> None:
        now = self.vms[vm]
        disk = site.disks("here").find(Member(site, vm).machine) if now else None
        if now and disk:
            letter = next(self._letters)
            self.bench.place.write(disk, site, letter)
            self.vms[vm] = replace(now, letter=letter)

    def look(self, context: str, draw: Draw | None = None, *, through: bool = False) -> None:
        with self.bench.site() as site:
            store = site.disks("here")
            disks = {disk.owner.vm: disk for disk in store.list()}
            assert list(store.leftovers()) == [], context
            shape = self.bench.shape()
            old, new = True, True  # may all that the operation changes be what it was, or what it makes
            for vm, before in self.vms.items():
                disk, machine = disks.get(vm), Member(site, vm).look()
                now = None
                if disk:
                    assert machine, f"{context}: {vm} has a disk and no machine"
                    letter = self.bench.place.read(disk, site)
                    kept = {c.name for c in disk.checkpoints}
                    now = (letter, kept)
                    self.bench.place.check(disk)
                else:
                    assert shape[vm] == [], f"{context}: of {vm} is left {shape[vm]}"
                allowed = [before]
                if draw and vm in draw.after:
                    allowed = [draw.after[vm]] if through else [before, draw.after[vm]]
                    old, new = old and now == _told(before), new and now == _told(draw.after[vm])
                found = [a for a in allowed if now == _told(a)]
                assert found, f"{context}: {vm} is {now}, and should be in {allowed}"
                if draw and draw.verb in ("reset", "checkpoint") and self.on[vm] and disk:
                    assert is_on(machine), f"{context}: {vm} ran, and doesn't now"
                # what cannot be told apart is taken for the new one
                self.vms[vm], self.on[vm] = found[-1], is_on(machine)
            assert old or new, f"{context}: some are what they were, and some are not: {self.vms}"

    def told(self, context: str) -> str:
        return "\n".join([context, *self.story[-12:], *self.bench.place.everything()])


def _keeping(now: Vm, name: str) -> Vm:
    return replace(now, kept={**now.kept, name: now.letter})


def _told(vm: Vm | None) -> tuple[str, set[str]] | None:
    """What can be seen of it."""
    return (vm.letter, set(vm.kept)) if vm else None


def _shown(draw: Draw) -> str:
    return draw.verb.replace("_", "-") + (" --all" if len(draw.after) > 1 else "")


@pytest.fixture(
    params=[
        *(HERE if AT_RANDOM else ()),
        *(
            pytest.param(label, marks=of_lab(label))
            for label in (*STORES, "kvm+zfs", "kvm+lvm-thin", "xen+lvm-thin")
        ),
    ]
)
def walk(request: pytest.FixtureRequest, cache: Path) -> Iterator[Walk]:
    with bench_on(make_place(request.param, request), cache) as bench:
        yield Walk(bench)


def test_walk(walk: Walk) -> None:
    before = walk.bench.shape()
    walk.learn()
    rounds = ROUNDS[walk.bench.driver]
    for _ in range(rounds * 8 if MANY else rounds // 3 if FEW else rounds):
        walk.step()
    with walk.bench.site() as site:
        farm.destroy(site, list(site.farm.vms))
    after = walk.bench.shape()
    assert after["dev2"] == after["prod"] == [], walk.told("after destroy")
    surplus = Counter(after[""]) - Counter(before[""])
    assert all("/keys/" in line for line in surplus), surplus
