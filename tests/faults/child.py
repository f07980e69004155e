"""Runs use cases, each in a process of its own that kills itself at a chosen journal step.

One JSON list a line on standard input: FARM_FILE WHEN NUMBER VERB ARGUMENTS; one back: the wait status,
the step's text, and how long it took. Each request is a fork of this process, which has imported
everything and opened nothing: hundreds of kills would else be mostly hundreds of starts of Python.

WHEN "written": right after step NUMBER was written, its change not begun. "done": at the first thing
written after that, so its change was made. Product code has no hook for this: the journal's own
methods are wrapped here. "called": when call NUMBER of a server's API was answered; the text is the
call's name. "putting": event NUMBER is written, and its transaction open; "telling" and "told": right
before and right after a receiver is told of event NUMBER. "alone": after NUMBER seconds, its commands
live on; "together": they are killed too. "never": the text is the numbers of steps and of calls.

Arguments: "still", machines run nothing, see still.py; "listens", there are guests that shut down when
they are asked to.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from still import StillSite

import cli.composition  # noqa: F401 - what there is
import hypervisors.disks.lvm.classic  # imported for the forks, as the next ones are
import hypervisors.disks.lvm.thin
import hypervisors.disks.zfs.disks  # noqa: F401
import provision.guest.seed  # noqa: F401
from hypervisors.fake import world as fake_world
from hypervisors.xenapi.session import Sessions
from inventory.loader import load
from provision.engine import events, journal
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.events.webhook import Webhook
from provision.member import Member
from provision.operations import checkpoint
from provision.site import Site
from tests import farm

_kind: type[Site] = Site


def arm(when: str, number: int) -> None:
    real_step, real_write = journal.Entry.step, journal.Journal.write
    guard = threading.Lock()
    seen = 0
    armed = False

    def step(self: journal.Entry, text: str) -> None:
        nonlocal seen, armed
        real_step(self, text)
        with guard:
            seen += 1
            if seen == number:
                print(text, flush=True)
                if when == "written":
                    os.kill(os.getpid(), signal.SIGKILL)
                armed = True

    def write(self: journal.Journal, *arguments: Any, **more: Any) -> int:
        if armed:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_write(self, *arguments, **more)

    journal.Entry.step = step  # type: ignore[method-assign]
    journal.Journal.write = write  # type: ignore[method-assign]


def watch_calls(told: Callable[[str], None]) -> None:
    """Told a XenAPI server's calls, each once it was answered, and all that it did is done."""
    real_call, real_put = Sessions.call, Sessions.put

    def call(self: Sessions, name: str, *arguments: object) -> Any:
        answer = real_call(self, name, *arguments)
        told(name)
        return answer

    def put(self: Sessions, vdi: str, image: Path, size: int) -> None:
        real_put(self, vdi, image, size)
        told("PUT /import_raw_vdi")

    Sessions.call, Sessions.put = call, put  # type: ignore[method-assign]


def arm_calls(number: int) -> None:
    guard = threading.Lock()
    seen = 0

    def told(name: str) -> None:
        nonlocal seen
        with guard:
            seen += 1
            if seen == number:
                print(f"call {name}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    watch_calls(told)


def arm_events(when: str, number: int) -> None:
    guard = threading.Lock()
    seen = 0

    def passing(kind: str, words: str) -> None:
        nonlocal seen
        with guard:
            seen += kind == when
            if seen == number and kind == when:
                print(words, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    real_put, real_deliver = events.Outbox.put, Webhook.deliver

    def put(self: events.Outbox, *arguments: Any) -> None:
        real_put(self, *arguments)
        passing("putting", f"event of {arguments[1].verb}, {arguments[2]}")

    def deliver(self: Webhook, event: events.Event) -> None:
        passing("telling", f"event {event.type}")
        real_deliver(self, event)
        passing("told", f"event {event.type}")

    events.Outbox.put, Webhook.deliver = put, deliver  # type: ignore[method-assign]


def count() -> list[str]:
    """The steps, as they are written."""
    real_step = journal.Entry.step
    texts: list[str] = []

    def step(self: journal.Entry, text: str) -> None:
        real_step(self, text)
        texts.append(text)

    journal.Entry.step = step  # type: ignore[method-assign]
    return texts


def use_case(file: str, when: str, number: float, verb: str, arguments: dict[str, Any]) -> None:
    calls: list[str] = []
    texts = count() if when == "never" else None
    if when == "never":
        watch_calls(calls.append)
    if when == "called":
        arm_calls(int(number))
    if when in ("putting", "telling", "told"):
        arm_events(when, int(number))
    if when in ("written", "done"):
        arm(when, int(number))
    if "listens" not in sys.argv:
        checkpoint.GRACE = 0.2
    with _kind(load(Path(file)), reporter=QuietReporter()) as site:
        (clean if verb == "clean" else getattr(farm, verb))(site, **arguments)
    if texts is not None:
        print(len(texts), len(calls))


def clean(site: Site, vms: list[str], packages: list[str]) -> None:
    """There is no guest to wait for; instead of tools, the first package's letter is written, where the
    disk of a running machine can be written to."""
    from places import FakePlace, StillQcow2Place

    from builds import clean

    def equip(member: Member, *_: object) -> list[str]:
        place = {"FakeDisks": FakePlace, "Qcow2Disks": StillQcow2Place}.get(type(member.store).__name__)
        disk = member.disk()
        assert disk
        if place is not None:
            place().write(disk, site, {"ccache": "C", "git": "N"}[packages[0]])
        return packages

    clean.equip = equip
    for kind in set(map(type, site.farm.hosts.values())):
        kind.INFO = replace(kind.INFO, guests=False, forwards=False)
    perform(site, clean.Clean(tuple(vms), packages=tuple(packages)))


def kill_after(seconds: float, pid: int, *, together: bool) -> str:
    """Unless it ended by itself. What it was running, as text."""
    handle = os.pidfd_open(pid)
    try:
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        if waiting.poll(seconds * 1000):
            return ""
        signal.pidfd_send_signal(handle, signal.SIGSTOP)  # starts nothing more meanwhile
        commands = descendants(pid)
        if together:
            for command in commands:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(command, signal.SIGKILL)
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)
    return f"while it ran {', '.join(commands.values()) or 'nothing'}"


def descendants(pid: int) -> dict[int, str]:
    """Children and theirs: pid and name. A daemon has another parent by now."""
    children: dict[int, list[tuple[int, str]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            children.setdefault(int(rest.split()[1]), []).append((int(stat.parent.name), name))
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        for child, name in children.get(todo.pop(), ()):
            found[child] = name
            todo.append(child)
    return found


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        when, seconds = request[1], float(request[2])
        read, write = os.pipe()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.dup2(write, 1)  # what it prints is the step's text
            status = 1
            try:
                use_case(*request)
                status = 0
            except BaseException:  # noqa: BLE001 - a child tells all
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(write)
        ran = ""
        if when in ("alone", "together"):
            ran = kill_after(seconds, pid, together=when == "together")
        _, status = os.waitpid(pid, 0)
        took = time.monotonic() - started
        with os.fdopen(read) as told:  # a step's text fits into the pipe
            text = told.read()
        print(json.dumps([status, ran or text.strip(), took]), flush=True)


if __name__ == "__main__":
    for stored in fake_world.KINDS:
        fake_world.adapter(stored)  # for the forks, too
    _kind = StillSite if "still" in sys.argv else Site
    serve()
