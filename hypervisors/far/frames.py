"""The frames that an asker and its agent speak in, each to somebody who may be broken, or hostile.

A frame is a line: a JSON object. One with ``bytes`` is followed by that many bytes of a file. What is no
frame, is longer, deeper or of more parts than any of ours, is refused before memory is spent on it."""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

PING = 0.5  # seconds between signs of life, of both sides
CHUNK = 2**16
"""The most bytes of a file with one frame: also a slow line has it over before it counts as silent."""

_LONGEST = 2**24  # bytes of a line: all the disks of ten thousand VMs
_MOST = 2**20  # values in it, by the marks between them
_DEEPEST = 24  # objects and lists in one another


class Pipe:
    """Frames out and in. Any number of threads may send; one receives. ``outgoing``: a descriptor; if it
    doesn't block, ``waiting`` is called every ``PING`` seconds that nobody takes anything, with the
    seconds so far, and may raise. ``files``: whether frames may come with bytes of a file."""

    def __init__(
        self, incoming: IO[bytes], outgoing: int, *, files: bool, waiting: Callable[[float], None]
    ) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._chunk = CHUNK if files else 0
        self._waiting = waiting
        self._sending = threading.Lock()
        self._broken = False

    def send(self, frame: Mapping[str, object], data: bytes = b"") -> None:
        """OSError (as BrokenPipeError) where nobody is there any more."""
        if data:
            frame = {**frame, "bytes": len(data)}
        self.write(json.dumps(frame, separators=(",", ":")).encode() + b"\n" + data)

    def write(self, data: bytes) -> None:
        """Before the frames: what has another form. As ``send``."""
        with self._sending:
            if self._broken:
                raise BrokenPipeError
            try:
                self._write(memoryview(data))
            except BaseException:  # half a frame can't be taken back
                self._broken = True
                raise

    def _write(self, data: memoryview) -> None:
        waited = 0.0
        while data:
            try:
                data, waited = data[os.write(self._outgoing, data) :], 0.0
            except BlockingIOError:
                if self._broken:
                    raise BrokenPipeError from None
                ready = select.poll()
                ready.register(self._outgoing, select.POLLOUT)
                if not ready.poll(PING * 1000):
                    waited += PING
                    self._waiting(waited)

    def close(self) -> None:
        """Returns when nobody is sending any more, nor will be."""
        self._broken = True
        with self._sending:
            pass

    def receive(self) -> tuple[dict[str, Any], bytes] | None:
        """None at the end, also in the midst of a frame. ValueError for what is no frame of ours."""
        line = self._incoming.readline(_LONGEST)
        if not line.endswith(b"\n"):
            if len(line) == _LONGEST:
                raise ValueError(f"a frame of more than {_LONGEST} bytes")
            return None
        frame = _frame(line)
        size = frame.pop("bytes", 0)
        if type(size) is not int or not 0 <= size <= self._chunk:
            raise ValueError("a frame with more of a file than was agreed on")
        data = self._incoming.read(size) if size else b""
        return (frame, data) if len(data) == size else None


def _frame(line: bytes) -> dict[str, Any]:
    if sum(map(line.count, (b",", b"[", b"{"))) > _MOST:
        raise ValueError("a frame of too many values")
    try:
        frame = json.loads(line)
    except RecursionError:
        frame = None
        deep = True
    else:
        deep = _deep(frame)
    if deep:
        raise ValueError("a frame with too much in one another")
    if not isinstance(frame, dict):
        raise ValueError("a frame that is no object")
    return frame


def _deep(value: object) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
