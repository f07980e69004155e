"""A small farm to kill things in, on a store of choice, and what must hold after each kill.

A kill is at a journal step (right when it was written, or right when what it announced was done), at a
call of a server's API (right when it was answered), or at a moment drawn from the operation's measured
length: then either the process alone, whose commands live on, or with all commands it had started.
``FARMHAND_KILLS=many`` in the environment: every step and call, and many moments, also where a kill
takes seconds. A number instead of "many": so many steps and calls of each operation, and half as many
moments. ``FARMHAND_SEED`` draws the same ones again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from places import SIZE, Place
from still import StillSite

from host.paths import state_dir
from hypervisors.api import Disk, Template
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.guest.identity import host_key, seed_file
from provision.member import Member, is_on
from provision.site import Site
from tests import farm

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("child.py")
_WISH = os.environ.get("FARMHAND_KILLS", "")
MANY, FEW = _WISH == "many", _WISH == "few"
EACH = int(_WISH) if _WISH.isdecimal() else 0
SEED = int(os.environ.get("FARMHAND_SEED") or random.SystemRandom().randrange(10**6))

FARM = """\
farm: kill
hosts:
{hosts}
templates:
  base: {{build: debian-12, size: 64M{template}}}
  spare: {{import: spare.qcow2, size: 16M}}
vms:
{vms}
{more}
"""


@dataclass
class Kills:
    """What happened, for the summary."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    open: dict[str, None] = field(default_factory=dict)
    """Not yet recovered and found to be right: at the end, what was lost."""

    def add(self, operation: str, label: str) -> None:
        self.counts[operation, label] = self.counts.get((operation, label), 0) + 1


KILLS = Kills()


@dataclass(frozen=True)
class Kill:
    """At step ``number``, "written" or "done"; at call ``number``, "called"; or after so many seconds,
    "alone" or "together"."""

    when: str
    number: float

    def __str__(self) -> str:
        if self.when in ("written", "done"):
            return f"killed when step {self.number} was {self.when}"
        if self.when == "called":
            return f"killed when call {self.number} was answered"
        return f"killed {self.when} after {self.number:.3f} s"


@dataclass(frozen=True)
class Length:
    """Of an operation that nobody interrupts."""

    steps: int
    calls: int
    seconds: float


class Children:
    """The process whose forks are killed, see child.py."""

    def __init__(self, place: Place) -> None:
        words = (word for word in ("still", "listens") if getattr(place, word))
        self._server = subprocess.Popen(
            [sys.executable, CHILD, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: object) -> tuple[int, str, float]:
        """The wait status, what it printed, and how long it took, in seconds."""
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        status, text, seconds = json.loads(self._server.stdout.readline())
        return status, text, seconds

    def close(self) -> None:
        with self._server:
            assert self._server.stdin
            self._server.stdin.close()


class Bench:
    """``chosen`` and ``moments``: how many kills at steps and calls (None: at all) and at random moments
    each operation gets. ``more``: lines for the farm file."""

    def __init__(
        self,
        directory: Path,
        place: Place,
        *,
        chosen: int | None = None,
        moments: int = 4,
        vms: Sequence[str] = ("dev2", "prod"),
        disk: str = "",
        idle: str = "",
        more: str = "",
    ) -> None:
        self._children = Children(place)
        self.place = place
        self.driver = place.label
        self.chosen = None if MANY else EACH or chosen
        self.moments = moments * 4 if MANY else -(-EACH // 2) or moments
        self.file = directory / "kill.yaml"
        size = (f", disk: {disk}" if disk else "") + (f", idle_memory: {idle}" if idle else "")
        turns = zip(vms, itertools.cycle(place.hosts), strict=False)
        lines = "\n".join(
            f"  {vm}: {{host: {host}, template: base, memory: {place.memory[1]}M{size}}}"
            for vm, host in turns
        )
        hosts = "\n".join(f"  {host}: {{{place.host}}}" for host in place.hosts)
        more = "\n".join(filter(None, (place.more, more)))
        text = FARM.format(hosts=hosts, template=place.template, vms=lines, more=more)
        self.file.write_text(text, encoding="utf-8")
        self.vms = tuple(vms)
        self.shapes: list[dict[str, list[str]]] = []

    def site(self, *, plan: bool = False) -> Site:
        kind = StillSite if self.place.still else Site
        return kind(load(self.file), reporter=QuietReporter(), plan=plan)

    def seal(self) -> None:
        """A template, as it would be built, with nothing to boot on it."""
        with self.site() as site:
            site.prepare()
            for host in self.place.hosts:
                if any(t.name == "base" for t in site.disks(host).templates()):
                    continue
                image = self.file.with_name("base.qcow2")
                self.place.make_image(image)
                template = Template(
                    name="base", generation=1, ref="", size=SIZE, sha256="",
                    created=datetime.now(UTC), origin="nothing", firstboot="farmhand",
                )  # fmt: skip
                site.disks(host).seal(image, template)

    def disk(self, site: Site, vm: str) -> Disk | None:
        return site.disks(site.farm.host_of(vm)).find(Member(site, vm).machine)

    def kills(
        self,
        operation: str,
        verb: str,
        arguments: Mapping[str, Any],
        put_back: Callable[[], None],
        *,
        shapes: bool = True,
    ) -> Iterator[str]:
        """Run it again and again, each time killed elsewhere. After each kill the caller looks and
        recovers; ``put_back`` makes all as it was before. ``shapes``: what there is after a recovery is
        what there was before the operation, or what there is after it."""
        dice = random.Random(f"{SEED} {operation} {self.driver}")
        put_back()
        before = self.shape()
        length = self.uninterrupted(verb, arguments)
        self.shapes = [before, self.shape()] if shapes else []
        for kill in self._drawn(length, dice):
            put_back()
            text = self.killed_at(kill.when, kill.number, verb, arguments)
            if text is None:
                continue  # it was through before
            KILLS.add(operation, self.driver)
            context = f"{operation} on {self.driver}, {kill}: {text} (FARMHAND_SEED={SEED})"
            KILLS.open[context] = None
            yield context
            del KILLS.open[context]
        self.shapes = []

    def _drawn(self, length: Length, dice: random.Random) -> list[Kill]:
        kills = [Kill(when, n) for n in range(1, length.steps + 1) for when in ("written", "done")]
        kills += [Kill("called", n) for n in range(1, length.calls + 1)]
        if self.chosen is not None:
            kills = sorted(dice.sample(kills, min(self.chosen, len(kills))), key=kills.index)
        for n in range(self.moments):
            # one in each part of its length
            moment = (n + dice.random()) / self.moments * length.seconds
            kills.append(Kill(dice.choice(("alone", "together")), moment))
        return kills

    def uninterrupted(self, verb: str, arguments: Mapping[str, Any]) -> Length:
        status, text, seconds = self._children.ask([str(self.file), "never", 0, verb, dict(arguments)])
        assert status == 0, f"{verb} {arguments} failed by itself; see its standard error"
        steps, calls = text.split()
        return Length(int(steps), int(calls), seconds)

    def killed_at(self, when: str, number: float, verb: str, arguments: Mapping[str, Any]) -> str | None:
        """The step's text, or what ran; None if it was through before that."""
        request = [str(self.file), when, number, verb, dict(arguments)]
        status, step, _ = self._children.ask(request)
        if status == 0:
            return None
        assert status == signal.SIGKILL, f"wait status {status}: {request}; see its standard error"
        return step

    def close(self) -> None:
        self._children.close()

    # -- what there is ----------------------------------------------------------------------------

    def shape(self) -> dict[str, list[str]]:
        """All objects and files of the farm's, by VM; found without any of our code but names."""
        found = [*self.place.everything(), *self._files()]
        found += [f"runs {name}" for name in self.place.running(self.file.parent)]
        parts: dict[str, list[str]] = {vm: [] for vm in (*self.vms, "")}
        for line in sorted(found):
            vm = next((vm for vm in self.vms if re.search(rf"\b{vm}\b", line)), "")
            parts["" if line.startswith("allocation") else vm].append(line)
        return parts

    def _check_shape(self, context: str) -> None:
        """Each VM is as it was before the operation or as it is after it, in all that there is of it;
        what belongs to none of them is there before or after."""
        now, (before, after) = self.shape(), self.shapes
        for vm in self.vms:
            if _whole(now[vm]) not in (_whole(before[vm]), _whole(after[vm])):
                what = {"before": before[vm], "after": after[vm], "now": now[vm]}
                raise AssertionError(f"{context}: of {vm} there is\n{json.dumps(what, indent=1)}")
        seen, one, other = Counter(now[""]), Counter(before[""]), Counter(after[""])
        surplus, missing = seen - (one | other), (one & other) - seen
        assert not surplus and not missing, f"{context}: left over {surplus}, missing {missing}"

    def _files(self) -> list[str]:
        """But for journal, logs, lock files, notes of which there may be one too many, what SQLite takes
        back when it looks, what libvirtd keeps for itself, and the world of machines that run nothing,
        where each is a line."""
        found = []
        for path in state_dir().rglob("*"):
            name = str(path.relative_to(state_dir()))
            if path.is_dir() or re.search(
                r"journal\.db|\.(db|state)-journal$|/locks/|/untold/|\.log(\.\d)?$|^lvm/|\.lock$|generations\.json",
                name,
            ):
                continue
            if "/libvirt/" in name and not re.search(r"qemu/[^/]*\.xml$", name):
                continue
            if path.name.endswith(".state"):
                with contextlib.closing(sqlite3.connect(path)) as world:
                    names = world.execute("SELECT name FROM items WHERE kind = 'machines'")
                    found += [f"machine {name}" for (name,) in names]
                continue
            found.append(re.sub(r"[0-9a-f]{8,}|@\d+", "N", f"file {name}"))
        lock = self.file.with_name(self.file.name + ".lock")
        if lock.exists():
            found += [f"allocation {vm}" for vm in json.loads(lock.read_text())["vms"]]
        return found

    # -- what must hold ---------------------------------------------------------------------------

    def nothing_half_made(self, site: Site, context: str) -> None:
        """Right after the kill, before anything is recovered: a machine that can be started is
        complete, with a sound disk and its identity."""
        for vm in site.farm.vms:
            machine = Member(site, vm).look()
            if machine is None:
                continue
            disk = self.disk(site, vm)
            if disk is None:
                assert not is_on(machine), context
                continue
            assert disk.template == "base@1", context
            assert next(c.name for c in disk.checkpoints) == "clean", context
            assert seed_file(site.paths, machine.name).exists(), context
            assert host_key(site.paths, vm), context
            self.place.check(disk)

    def recovered(self, context: str) -> list[str]:
        """Recover, as planned, to the end; nothing is left. What was done."""
        with self.site(plan=True) as site:
            planned = farm.recover(site).actions
        with self.site() as site:
            done = farm.recover(site).actions
        assert done == planned, context
        with self.site() as site:
            assert farm.recover(site).changed is False, f"{context}: twice"
            assert site.journal.unfinished() == (), context
        with self.site(plan=True) as site:
            left = farm.gc(site)
            assert not left.changed, f"{context}: {[str(a) for a in left.actions]}"
            assert site.locks.held() == (), context
        if self.shapes:
            self._check_shape(context)
        return [str(action) for action in done]

    def usable(self, context: str) -> None:
        """The names are free for what was meant: all VMs can be made, and then all is as declared."""
        with self.site() as site:
            farm.clone_farm(site, wait=False)
            again = farm.clone_farm(site, wait=False)
            assert not again.changed, f"{context}: {[str(a) for a in again.actions]}"
            assert all(is_on(Member(site, vm).look()) for vm in site.farm.vms), context

    # -- a disk's content -------------------------------------------------------------------------

    def write_on(self, site: Site, vm: str) -> None:
        """So that the old disk can be told from a fresh one; the VM is stopped."""
        disk = self.disk(site, vm)
        assert disk
        self.place.write(disk, site)

    def content(self, site: Site, vm: str) -> str:
        """ "old": what was written is there, all of it; "new": provably the checkpoint."""
        return self.place.content(site, vm)


def _whole(lines: list[str]) -> list[str]:
    """Of a VM: a machine that is all there may run or not, one that is gone does not run."""
    return [line for line in lines if not line.startswith("runs ")] or lines
