"""Runs tasks of package repositories, each in a process of its own that kills itself at a point.

One JSON list a line on standard input: FARM_FILE POINT FAULT TASK REQUEST; one back: the wait status,
and what it said. Each request is a fork of this process, which has imported everything, and has
nothing open.

A point is right before something that changes the file system, whoever asks for it: Python's audit
events (sys.addaudithook) tell of each, and os.write and os.fsync, which have none, are wrapped. POINT 0:
none; then what is said is how many points there were. FAULT "kill": SIGKILL at the point; "full": from
there on nothing more can be written, and at the end what is said is the error."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import cli.composition  # noqa: F401 - what there is
import repositories.deb.format
import repositories.rpm.format
import repositories.signing.gpg
from host.files import of_the_disk
from inventory.errors import FarmhandError, WrongState, spelled
from inventory.loader import load
from provision.engine import registry
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.package_repositories import opened
from provision.repository_queue import Queue
from provision.site import Site

_CHANGES = (
    "os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime",
    "os.truncate", "subprocess.Popen",
)  # fmt: skip
_GROWS = ("os.rename", "os.link", "os.symlink", "os.mkdir", "open", "write")


class Points:
    def __init__(self, at: int, fault: str) -> None:
        self.at, self.fault = at, fault
        self.seen = 0
        self.armed = False

    def reached(self, what: str) -> None:
        if not self.armed:
            return
        self.seen += 1
        if self.at and self.seen >= self.at:
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what in _GROWS:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self.reached(event)

    def wrap(self) -> None:
        write, fsync = os.write, os.fsync

        def writing(handle: int, data: bytes) -> int:
            self.reached("write")
            return write(handle, data)

        def syncing(handle: int) -> None:
            self.reached("fsync")
            fsync(handle)

        os.write, os.fsync = writing, syncing
        sys.addaudithook(self.audit)


def carry_out(file: str, at: int, fault: str, task: str, request: dict[str, Any]) -> None:
    points = Points(at, fault)
    points.wrap()
    if task == "queue":
        look(file, points, request["uploads"])
        return
    paths = {key: tuple(map(Path, request[key])) for key in ("paths",) if key in request}
    source = {"source": Path(request["source"])} if "source" in request else {}
    pinned = {"pinned": {}} if task == "repo-gc" else {}
    names = {key: tuple(request[key]) for key in ("packages", "drop") if key in request}
    asked = {**request, **paths, **source, **pinned, **names}
    with Site(load(Path(file)), reporter=QuietReporter()) as site:
        site.prepare()
        points.armed = True
        perform(site, registry.operation(task)(**asked))
        points.armed = False
    if not at:
        print(points.seen)


def look(file: str, points: Points, uploads: list[tuple[str, str]]) -> None:
    """A queue's turn. ``uploads``: what is moved where while it is there; what is there already is
    closed anew, so that it counts as complete."""
    with Site(load(Path(file)), reporter=QuietReporter()) as site:
        site.prepare()

        def act(name: str, **asked: Any) -> object:
            return perform(site, registry.operation(name)(**asked))

        with Queue(site, opened(site.farm), act) as queue:
            for source, target in uploads:
                if Path(source).exists():
                    Path(source).rename(target)
                elif Path(target).exists():
                    Path(target).open("ab").close()
            points.armed = True
            events = list(queue.turn(dict))
            points.armed = False
    if left := [event for event in events if event.what == "left"]:
        raise WrongState(spelled(left[0].text))
    if not points.at:
        print(points.seen)


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.dup2(write, 1)
            status = 1
            try:
                carry_out(*request)
                status = 0
            except FarmhandError as error:
                status = 2
                print(type(error).__name__, error.message)
            except OSError as error:  # as the command line does
                shown = of_the_disk(error)
                assert shown, error
                status = 2
                print(type(shown).__name__, shown.message)
            except BaseException:  # noqa: BLE001 - a child tells all
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(write)
        with os.fdopen(read) as told:  # also commands that outlive it have the pipe: see its end first
            _, status = os.waitpid(pid, 0)
            os.set_blocking(told.fileno(), False)
            text = told.read() or ""
        print(json.dumps([status, text.strip()]), flush=True)


if __name__ == "__main__":
    repositories.rpm.format._createrepo_c()  # for the forks, too
    serve()
