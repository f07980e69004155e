"""One agent's process, as seen from here: ssh's. Whatever goes wrong with it ends the line, and all that
wait for an answer are told: neither what it sends is relied on, nor that it sends anything."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import IO, Any

from host.printable import last_line
from host.processes import account
from host.run import Runner
from hypervisors.api import Callbacks, StepFn, no_step
from hypervisors.far.agent import GREETING
from hypervisors.far.failures import no_agent, on
from hypervisors.far.frames import PING, Pipe
from hypervisors.far.parcel import parcel
from hypervisors.far.wire import decode, encode
from hypervisors.libvirt.opening import Place
from inventory.errors import ConnectionLost, DriverFailed, FarmhandError, Interrupted

QUIET = 20.0  # seconds without a sign of life; less than the agent's own ``SILENCE``
OPENING = 60.0  # seconds until the first one: ssh's own limits, and Python's start there
_ABANDONED = 5.0  # seconds that a call may go on after nobody wants it: until its next step
_WAITING = 10.0  # seconds without news of a call, until it is said what is waited for
_UNTAKEN = 4  # frames of one call; an agent sends the next one when the last one was answered
_TAIL = 4096  # bytes kept of what is no frame: what a login prints, what ssh says
_NOISE = 2**20  # bytes that a login may print before the agent speaks
_WARNINGS = 1000  # that one agent may have


class AgentLine:
    """``login``: ssh to that machine, as one types it. Any number of threads may ask."""

    def __init__(self, name: str, login: str, argv: Sequence[str], callbacks: Callbacks) -> None:
        self._name = name
        self._login = login
        self._callbacks = callbacks
        self._process = Runner().talk(*argv)
        assert self._process.stdin and self._process.stdout and self._process.stderr
        os.set_blocking(self._process.stdin.fileno(), False)
        self._pipe = Pipe(
            self._process.stdout, self._process.stdin.fileno(), files=False,
            waiting=self._while_nothing_is_taken,
        )  # fmt: skip
        self._numbers = itertools.count(1)
        self._calls: dict[int, queue.Queue[dict[str, Any]]] = {}
        self.heard = 0
        self.handing_on = False
        self.greeted = False
        self._warnings = 0
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._why = ""
        self._refused: FarmhandError | None = None
        self._printed = b""
        self._errors = b""
        self._listening = threading.Thread(
            target=self._listen, args=(self._process.stderr,), daemon=True
        )

    @property
    def lost(self) -> bool:
        return self._ended.is_set()

    def open(self, place: Place, *, plan: bool) -> None:
        """Sends what an agent is made of, and what it is for. Whether there is one then, the first call
        sees: so that it takes no turn of its own."""
        self._listening.start()
        threading.Thread(target=self._receive, args=(self._process.stdout,), daemon=True).start()
        code = parcel()
        asker = f"{account(os.geteuid())}@{socket.gethostname()}, process {os.getpid()}"
        try:
            self._pipe.write(b"%d\n" % len(code) + code)
            self._pipe.send({"open": encode(place), "plan": plan, "for": asker})
        except OSError:
            pass  # it ended: the first call sees that, too
        except BaseException:
            self.lose("nobody waits for it any more")
            raise
        threading.Thread(target=self._ping, daemon=True).start()

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
        number = next(self._numbers)
        answers = self._calls[number] = queue.Queue(_UNTAKEN)
        try:
            if self.lost:  # since then nobody is told of it
                raise self._error(doing)
            self.send({"call": number, **frame}, doing=doing)
            answer = self._follow(number, answers, doing, step)
        finally:
            del self._calls[number]
        try:
            if "failed" in answer:
                error = decode(answer["error"])
                if not isinstance(error, FarmhandError):
                    raise TypeError("an error that is none")
            else:
                return decode(answer["value"])
        except Exception as wrong:  # noqa: BLE001 - whatever it makes of what it was not sent for
            self.lose(_no_answer(wrong))
            raise self._error(doing) from None
        raise on(self._name, error)

    def _follow(
        self, number: int, answers: queue.Queue[dict[str, Any]], doing: str, step: StepFn
    ) -> dict[str, Any]:
        """Until the call has ended there, also where nobody wants it any more: at its next step it is
        told so, and then tidies up; so that nothing goes on behind the back of whoever looks now. One
        that comes to no step in time, or a second Ctrl-C, cuts the connection."""
        raised: BaseException | None = None
        told = True
        patience, waited, since = _Patience(self), 0.0, time.strftime("%H:%M:%S")
        while True:
            try:
                answer = answers.get(timeout=PING)
            except queue.Empty:
                patience.tick()
                waited += PING
                if self.lost:
                    raise raised or self._error(doing) from None
                if raised is None and self._callbacks.interrupted():
                    raised, told, waited = Interrupted(f"interrupted: {doing}"), False, 0.0
                if raised and waited >= _ABANDONED:
                    self.lose("nobody waits for it any more")
                    raise raised from None
                if waited % _WAITING == 0:
                    self._callbacks.working(f"waiting for {self._name} since {since}: {doing}")
                continue
            except BaseException as error:  # noqa: BLE001 - Ctrl-C; raised below
                if raised:
                    self.lose("nobody waits for it any more")
                    raise raised from None
                raised, told, waited = error, False, 0.0
                continue
            waited = 0.0
            if "lost" in answer:
                raise raised or self._error(doing)
            if "step" not in answer:
                break
            go = told
            told = True
            if go:
                try:
                    step(answer["text"])
                except BaseException as error:  # noqa: BLE001 - raised below
                    raised, go = raised or error, False
            try:
                self.send({"go" if go else "stop": number}, doing=doing)
            except FarmhandError as lost:
                raise raised or lost from None
        if raised:
            raise raised
        return answer

    def send(self, frame: dict[str, Any], data: bytes = b"", *, doing: str = "send a file") -> None:
        try:
            self._pipe.send(frame, data)
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it has more to say than we
                self._process.wait(1)
            self.lose()
            raise self._error(doing) from None
        except BaseException:  # Ctrl-C within a frame
            self.lose("nobody waits for it any more")
            raise

    def lose(self, why: str = "") -> None:
        """Ends it. ``why``: what is wrong with the agent; "": ssh knows."""
        with self._guard:
            if self.lost:
                return
            self._why = why
            self._ended.set()
        self._process.kill()
        for answers in list(self._calls.values()):
            with contextlib.suppress(queue.Full):
                answers.put_nowait({"lost": True})

    def close(self) -> None:
        """The agent ends when its input does, whatever it was doing. ssh is left to itself: it may serve
        others, too (ControlMaster of ssh_config(5))."""
        with self._guard:
            self._ended.set()
        self._pipe.close()
        assert self._process.stdin
        self._process.stdin.close()
        threading.Thread(target=self._process.wait, daemon=True).start()

    # -- what comes -------------------------------------------------------------------------------

    def _receive(self, output: IO[bytes]) -> None:
        why = ""
        try:
            self._skip_noise(output)
            while (received := self._pipe.receive()) is not None:
                self.handing_on = True
                self._hand_on(received[0])
                self.heard += 1
                self.handing_on = False
        except Exception as wrong:  # noqa: BLE001 - whatever it makes of what it was not sent for
            why = _no_answer(wrong)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)  # it says why
        self.lose(why)
        output.close()

    def _skip_noise(self, output: IO[bytes]) -> None:
        """What the login there prints before the agent speaks."""
        size = 0
        while (line := output.readline(_TAIL)) and not line.endswith(GREETING):
            size += len(line)
            if size > _NOISE:
                raise ValueError(f"a login that prints {_NOISE} bytes")
            self._printed = (self._printed + line)[-_TAIL:]
        self.greeted = bool(line)
        self.heard += 1

    def _listen(self, errors: IO[bytes]) -> None:
        with errors:
            while data := errors.read1(_TAIL):  # type: ignore[attr-defined]
                self._errors = (self._errors + data)[-_TAIL:]

    def _hand_on(self, frame: dict[str, Any]) -> None:
        if "ping" in frame:
            return
        if "warn" in frame:
            self._warnings += 1
            if self._warnings > _WARNINGS:
                raise ValueError("too many warnings")
            self._callbacks.warn((f"{self._name}: ", decode(frame["warn"])))
        elif "working" in frame:
            self._callbacks.working(f"{self._name}: {last_line(frame['working'], 200)}")
        elif "refused" in frame:
            error = decode(frame["refused"])
            if not isinstance(error, FarmhandError):
                raise TypeError("an error that is none")
            self._refused = on(self._name, error, there=True)
            self.lose()
        else:
            kind = next((key for key in ("step", "done", "failed") if key in frame), "")
            number = frame.get(kind)
            if type(number) is not int or (kind == "step" and not isinstance(frame["text"], str)):
                raise ValueError("a frame of no kind that there is")
            if number not in self._calls:
                raise ValueError("an answer to what nobody asked")
            self._calls[number].put_nowait(frame)

    def _ping(self) -> None:
        with contextlib.suppress(OSError, FarmhandError):
            while not self._ended.wait(PING):
                self._pipe.send({"ping": 1})

    def _while_nothing_is_taken(self, seconds: float) -> None:
        if self.greeted and seconds >= QUIET:
            self.lose(f"its agent took nothing for {QUIET:g} s")
        elif seconds >= OPENING:
            self.lose(f"it did not answer within {OPENING:g} s")
        if self.lost:
            raise BrokenPipeError
        if self._callbacks.interrupted():
            raise Interrupted(f"interrupted: {self._name} takes no more")

    # -- why it ended -----------------------------------------------------------------------------

    def _error(self, doing: str) -> FarmhandError:
        if self._refused:
            return self._refused
        self._listening.join(1)  # for ever, where ssh left somebody behind who has it open
        errors, printed = (
            data.decode(errors="replace").strip() for data in (self._errors, self._printed)
        )
        if not self.greeted and self._why:
            return DriverFailed(f"{self._name}: {self._why}", remedy=f"try: {self._login} true")
        if not self.greeted:
            return no_agent(self._name, self._login, errors or printed)
        why = self._why or last_line(errors, 200)
        return ConnectionLost(
            f"the connection to {self._name} was lost ({doing}){': ' + why if why else ''}",
            remedy="run the command again: what was cut off is finished, or undone, first",
        )


class _Patience:
    """With a line that is not heard of, while somebody waits. Reckoned by looks at it: time in which
    this process was stopped itself (Ctrl-Z) doesn't count, nor that of a warning being written."""

    def __init__(self, line: AgentLine) -> None:
        self._line = line
        self._heard = -1
        self._looks = 0

    def tick(self) -> None:
        """Each ``PING`` seconds. Ends the line when it was quiet for too long."""
        line = self._line
        if line.heard != self._heard or line.handing_on:
            self._heard, self._looks = line.heard, 0
            return
        self._looks += 1
        if line.greeted and self._looks * PING >= QUIET:
            line.lose(f"nothing was heard from its agent for {QUIET:g} s")
        elif self._looks * PING >= OPENING:
            line.lose(f"it did not answer within {OPENING:g} s")


def _no_answer(wrong: Exception) -> str:
    what = last_line(str(wrong)) or type(wrong).__name__
    return f"it sent what no agent sends: {what}"
