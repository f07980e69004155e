"""Progress on stderr: dated lines, and on a terminal one live line below them.

Plain control sequences (ECMA-48: erase line, carriage return) on one line that is never wider than the
terminal, so that a narrow window, ``script`` and a slow ssh connection all show the same. Nobody may
read it, for a stream that was taken over (streams.py) never raises.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from cli.streams import columns, steer
from host.printable import plain, printable
from inventory.errors import Text, spelled

_SPINNER = "|/-\\"
_ERASE = "\r\x1b[2K"
_HEARTBEAT = 10.0
_STILL = 60.0
_LINE_MAX = 4096  # bytes shown of a command's line


class Screen:
    """A Reporter (provision.engine.report). Safe to use from several threads. Off a terminal
    ``working`` is shown when it is news and nothing was said for a while: a log needs no spinner, but
    a long wait should be seen to be one."""

    def __init__(self, stream: TextIO, words: Callable[[Text], str] = spelled) -> None:
        self._stream = stream
        self._words = words
        self._lock = threading.RLock()
        self._partial: dict[str, bytes] = {}
        self._last = time.monotonic()
        self._said = ""

    def say(self, text: Text, *, vm: str = "") -> None:
        self._line(self._words(text), vm)

    def working(self, text: str, *, vm: str = "") -> None:
        with self._lock:
            line = f"{vm} {text}"
            patience = _STILL if _what(line) == _what(self._said) else _HEARTBEAT
            if line != self._said and time.monotonic() - self._last >= patience:
                self._said = line
                self._line(text, vm)

    def warn(self, text: Text, *, vm: str = "") -> None:
        self._line(f"warning: {self._words(text)}", vm)

    def stream(self, vm: str, data: bytes) -> None:
        """Output of a command in a VM, as it comes; shown by whole lines, prefixed with the VM. Only the
        log has all of a very long one."""
        with self._lock:
            *lines, rest = (self._partial.get(vm, b"") + data).split(b"\n")
            self._partial[vm] = _shown(rest)
            if lines:
                shown = (plain(_shown(line).decode(errors="replace")) for line in lines)
                self._write("".join(f"{vm} | {line}\n" for line in shown))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Another program has the terminal: no live line meanwhile."""
        yield

    def close(self) -> None:
        with self._lock:
            for vm, rest in self._partial.items():
                if rest:
                    self.stream(vm, b"\n")
            self._partial.clear()

    def _line(self, text: str, vm: str) -> None:
        with self._lock:
            indent = ""  # of further lines, which nobody is to take for lines of their own
            for part in printable(text).rstrip("\n").split("\n"):
                self._write(f"{time.strftime('%H:%M:%S')} {f'{vm}: ' if vm else ''}{indent}{part}\n")
                indent = "  "
            self._last = time.monotonic()

    def _write(self, text: str, *, erase: bool = False) -> None:
        steer(self._stream, _ERASE if erase else "", text)
        self._stream.flush()


def _shown(line: bytes) -> bytes:
    """What is seen of a line, ended or not: its beginning; of one that is rewritten by carriage returns,
    that of its last state. More may be appended to it."""
    if len(line) <= _LINE_MAX:
        return line
    body = line.rstrip(b"\r")
    state = body[body.rfind(b"\r") + 1 :][:_LINE_MAX]
    return state + (b"\r" if len(body) < len(line) else b"")


def _fit(text: str, end: str, width: int) -> str:
    room = max(width - len(end), 4)
    return (text if len(text) <= room else text[: room - 1] + "…") + end


def _what(text: str) -> str:
    """Of what is under way, without how far it is."""
    return text.partition(";")[0]


class LiveScreen(Screen):
    """With the live line: what is under way on each VM, and since when."""

    def __init__(self, stream: TextIO, words: Callable[[Text], str] = spelled) -> None:
        super().__init__(stream, words)
        self._under_way: dict[str, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._shown = False
        self._aside = False
        self._turn = 0
        self._thread = threading.Thread(target=self._spin, name="screen", daemon=True)
        self._thread.start()

    def working(self, text: str, *, vm: str = "") -> None:
        with self._lock:
            known, since = self._under_way.get(vm, ("", 0.0))
            first = printable(text).partition("\n")[0]
            same = _what(known) == _what(first)
            self._under_way[vm] = (first, since if same else time.monotonic())
            self._draw()

    def _line(self, text: str, vm: str) -> None:
        with self._lock:
            # What is said of a VM replaces what was under way there.
            self._under_way.pop(vm, None)
            super()._line(text, vm)

    def _write(self, text: str, *, erase: bool = False) -> None:
        super()._write(text, erase=erase or self._shown)
        self._shown = False

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        with self._lock:
            if self._shown:
                self._write("")
            self._aside = True
        try:
            yield
        finally:
            with self._lock:
                self._aside = False

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2)
        with self._lock:
            self._under_way.clear()
            self._draw()
        super().close()

    def _spin(self) -> None:
        while not self._stop.wait(0.25):
            with self._lock:
                self._turn += 1
                self._draw()

    def _draw(self) -> None:
        if self._aside:
            return
        if not self._under_way:
            if self._shown:
                self._write("")
            return
        now = time.monotonic()
        width = columns(self._stream, 80) - 1
        share = (width - 2) // len(self._under_way) - 3  # each VM is seen, also in a narrow window
        parts = [
            _fit(f"{vm}: {text}" if vm else text, f" {now - since:.0f}s", share)
            for vm, (text, since) in sorted(self._under_way.items())
        ]
        line = f"{_SPINNER[self._turn % len(_SPINNER)]} {' · '.join(parts)}"
        self._write(line if len(line) <= width else line[: width - 1] + "…", erase=True)
        self._shown = True


class QuietScreen(Screen):
    """Warnings alone."""

    def say(self, text: Text, *, vm: str = "") -> None:
        """Drops it."""

    def working(self, text: str, *, vm: str = "") -> None:
        """Drops it."""

    def stream(self, vm: str, data: bytes) -> None:
        """Drops it."""


def open_screen(
    stream: TextIO, words: Callable[[Text], str] = spelled, *, quiet: bool = False
) -> Screen:
    """Live on a terminal that can erase a line, dated lines elsewhere. ``words``: how the calls in what
    is said are worded. ``quiet``: warnings alone."""
    if quiet:
        return QuietScreen(stream, words)
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveScreen(stream, words)
    return Screen(stream, words)
