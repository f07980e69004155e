"""The side that asks: one agent on another machine, started when it is first needed, and anew when a
call finds it gone."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from host.run import Runner
from hypervisors.api import Callbacks, StepFn, no_step
from hypervisors.far.agent import PING
from hypervisors.far.parcel import COMMAND, parcel
from hypervisors.far.wire import Pipe, decode, encode
from hypervisors.libvirt.opening import Place
from inventory.errors import ConnectionLost, DriverFailed, FarmhandError

_OPENING = 90.0  # seconds: ssh's own limit, and what waits for an earlier agent's end
_ABANDONED = 60.0  # seconds that a call may go on after nobody wants it: until its next step
_CHUNK = 2**20


class Link:
    """Any number of threads may call. ``name``: of the machine, for messages. ``argv``: makes a command
    one that runs there."""

    def __init__(
        self,
        name: str,
        argv: Callable[[Sequence[str]], tuple[str, ...]],
        place: Place,
        callbacks: Callbacks,
        *,
        plan: bool = False,
    ) -> None:
        self.name = name
        self.place = place
        self._argv = argv
        self._callbacks = callbacks
        self._plan = plan
        self._opening = threading.Lock()
        self._line: _Line | None = None

    def call(
        self, of: str, method: str, *args: object, step: StepFn = no_step, **options: object
    ) -> Any:
        """The errors of the method itself, and DriverFailed where the machine can't be reached, or the
        connection is lost on the way. What ``step`` raises abandons the change."""
        return self._open().ask(of, method, args, options, step)

    def send(self, file: Path, name: str) -> Path:
        """A copy there, durable, under a name of its own. NoSpace and the like as DriverFailed."""
        line, sent, said = self._open(), 0, time.monotonic()
        with file.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            there: Path = line.ask("host", "new_file", (name,))
            while chunk := source.read(_CHUNK):
                line.send({"file": str(there)}, chunk)
                sent += len(chunk)
                if time.monotonic() > said + 1:
                    said = time.monotonic()
                    self._callbacks.working(
                        f"sending {file.name} to {self.name}: {sent * 100 // size} %"
                    )
            line.ask("host", "end_file", (there,))
        return there

    def close(self) -> None:
        with self._opening:
            if self._line:
                self._line.close()
            self._line = None

    def _open(self) -> _Line:
        with self._opening:
            if self._line is None or self._line.lost:
                if self._line:
                    self._line.close()
                self._line = _Line(self.name, self._argv(COMMAND), self._callbacks)
                try:
                    self._line.open(self.place, plan=self._plan)
                except BaseException:
                    self._line.close()
                    self._line = None
                    raise
            return self._line


class _Line:
    """One agent's process, as seen from here: ssh's."""

    def __init__(self, name: str, argv: Sequence[str], callbacks: Callbacks) -> None:
        self._name = name
        self._callbacks = callbacks
        self._errors: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - see close
        self._process = Runner().talk(*argv, errors=self._errors)
        assert self._process.stdin and self._process.stdout
        self._pipe = Pipe(self._process.stdout, self._process.stdin)
        self._numbers = itertools.count(1)
        self._calls: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._opened: queue.Queue[dict[str, Any]] = queue.Queue()
        self._ended = threading.Event()
        self._noise = ""

    @property
    def lost(self) -> bool:
        return self._ended.is_set()

    def open(self, place: Place, *, plan: bool) -> None:
        threading.Thread(target=self._receive, daemon=True).start()
        code = parcel()
        try:
            assert self._process.stdin
            self._process.stdin.write(b"%d\n" % len(code) + code)
            self._pipe.send({"open": encode(place), "plan": plan})
            threading.Thread(target=self._ping, daemon=True).start()
            answer = self._opened.get(timeout=_OPENING)
        except queue.Empty:
            raise DriverFailed(
                f"{self._name} did not answer within {_OPENING:g} s",
                remedy=f"try: ssh {self._name} true",
            ) from None
        except OSError:  # it ended: it says why
            answer = self._opened.get(timeout=_OPENING)
        if "refused" in answer:
            raise decode(answer["refused"])
        if "lost" in answer:
            why = self._last_words()
            raise DriverFailed(
                f"no farmhand agent on {self._name}: {why or 'the connection ended'}",
                remedy="this must work, asking nothing: "
                f"ssh {self._name} python3 -c \"'import libvirt'\""
                " (Python 3.11 or later; Debian's python3-libvirt)",
            )

    def ask(
        self,
        of: str,
        method: str,
        args: Sequence[object],
        options: Mapping[str, object] = MappingProxyType({}),
        step: StepFn = no_step,
    ) -> Any:
        """See ``Link.call``."""
        doing = f"{method} {args[0]}" if args and isinstance(args[0], str) else method
        frame = {"of": of, "method": method, "args": encode(args), "options": encode(options)}
        number, answers = next(self._numbers), queue.Queue[dict[str, Any]]()
        self._calls[number] = answers
        try:
            if self.lost:  # since then nobody is told of it
                raise self._lost(doing)
            self.send({"call": number, **frame}, doing=doing)
            answer = self._follow(number, answers, doing, step)
        finally:
            del self._calls[number]
        if "lost" in answer:
            raise self._lost(doing)
        if "failed" in answer:
            error: FarmhandError = decode(answer["error"])
            raise error
        return decode(answer["value"])

    def _follow(
        self, number: int, answers: queue.Queue[dict[str, Any]], doing: str, step: StepFn
    ) -> dict[str, Any]:
        """Until the call has ended there, also where nobody wants it any more: at its next step it is
        told so, and then tidies up; so that nothing goes on behind the back of whoever looks now. One
        that comes to no step in time, or a second Ctrl-C, cuts the connection."""
        raised: BaseException | None = None
        told = True
        while True:
            try:
                answer = answers.get(timeout=_ABANDONED if raised else None)
            except BaseException as error:  # noqa: BLE001 - Ctrl-C, or nothing came; raised below
                if raised:
                    self._process.kill()
                    raise raised from None
                raised, told = error, False
                continue
            if "step" not in answer:
                break
            go = told
            told = True
            if go:
                try:
                    step(answer["text"])
                except BaseException as error:  # noqa: BLE001 - raised below
                    raised, go = raised or error, False
            self.send({"go" if go else "stop": number}, doing=doing)
        if raised:
            raise raised
        return answer

    def send(self, frame: dict[str, Any], data: bytes = b"", *, doing: str = "send a file") -> None:
        try:
            self._pipe.send(frame, data)
        except (OSError, ValueError):
            raise self._lost(doing) from None

    def close(self) -> None:
        """The agent ends when its input does, whatever it was doing."""
        self._ended.set()
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
        if self._process.stdout:
            self._process.stdout.close()

    def _receive(self) -> None:
        try:
            while (received := self._pipe.receive()) is not None:
                self._hand_on(received[0])
        except (OSError, ValueError) as error:  # json's has what it could not read
            self._noise = str(getattr(error, "doc", error)).strip()
        self._ended.set()
        self._opened.put({"lost": True})
        for answers in list(self._calls.values()):
            answers.put({"lost": True})

    def _hand_on(self, frame: dict[str, Any]) -> None:
        if "warn" in frame:
            self._callbacks.warn((f"{self._name}: ", decode(frame["warn"])))
        elif "working" in frame:
            self._callbacks.working(frame["working"])
        elif "ready" in frame or "refused" in frame:
            self._opened.put(frame)
        else:
            number = next(frame[key] for key in ("step", "done", "failed") if key in frame)
            if answers := self._calls.get(number):
                answers.put(frame)

    def _ping(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not self._ended.wait(PING):
                self._pipe.send({"ping": 1})

    def _lost(self, doing: str) -> ConnectionLost:
        why = self._last_words()
        return ConnectionLost(
            f"the connection to {self._name} was lost ({doing}){': ' + why if why else ''}",
            remedy="run the command again: what was cut off is finished, or undone, first",
        )

    def _last_words(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            return lines[-1].strip() if lines else self._noise
        return self._noise
