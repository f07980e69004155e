"""An HTTP receiver of events that can be made to fail, to hang and to drip; checks signatures as the
documentation tells receivers to."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECRET = "whsec_" + base64.b64encode(b"twenty-four secret bytes").decode()


def _documented() -> Callable[[str, Any, bytes], bool]:
    text = (Path(__file__).parents[2] / "docs/events.md").read_text()
    found: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], found)
    return found["is_genuine"]  # type: ignore[no-any-return]


is_genuine = _documented()


class Receiver(ThreadingHTTPServer):
    """``got``: the events that were taken; ``tries``: the ids of all that came. ``answer`` is asked for
    the status of each; None: nothing is answered until ``let_go``."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.got: list[dict[str, Any]] = []
        self.tries: list[str] = []
        self.bodies: dict[str, set[bytes]] = {}
        self.answer: Callable[[dict[str, Any]], int | None] = lambda _event: 204
        self.let_go = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks/farm?key=sesame"

    def told(self) -> list[tuple[str, str]]:
        """Type and verb of each that was taken."""
        return [(event["type"], event["data"]["operation"]["verb"]) for event in self.got]


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        event = json.loads(body)
        assert event["id"] == self.headers["webhook-id"]
        self.server.tries.append(event["id"])
        self.server.bodies.setdefault(event["id"], set()).add(body)
        genuine = is_genuine(SECRET, self.headers, body)
        status = self.server.answer(event) if genuine else 401
        if status is None:
            self.server.let_go.wait(60)
            return
        if status // 100 == 2:
            self.server.got.append(event)
        self.send_response(status)
        if status // 100 == 3:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""


@contextmanager
def receiving(port: int = 0) -> Iterator[Receiver]:
    receiver = Receiver(port)
    thread = threading.Thread(target=receiver.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.let_go.set()
        receiver.shutdown()
        receiver.server_close()
        thread.join()
