"""A XenAPI server for tests, a process of its own: python server.py DIRECTORY

It speaks XML-RPC (POST /) and JSON-RPC 1.0 and 2.0 (POST /jsonrpc) over https and http, and PUT
/import_raw_vdi and GET /export_raw_vdi. It prints one JSON line: the ports, and the fingerprint of the
certificate it made itself; the certificate is in DIRECTORY/ca.pem, the credentials (root, secret) in
DIRECTORY/credentials. It lives until its standard input closes. What it does and refuses is in world.py,
what it holds callers to in model.py.

POST /test-control is the tests' own: {"begin": true} forgets all, "keep" and
"put_back" make it as it was once, "knobs" sets database.Knobs, "log" has
the calls since it was asked last, "world" a line for each object, "expire" ends all sessions. One of
"fail" is {"call": "VM.clone" or "*", "nth": 1, "how": [...]}, counted among the calls of that name that
come from then on: ["error", CODE, PARAMETER...] refuses; ["drop-before"] and ["drop-after"] hang up
without an answer, before doing it or when it is done; ["answer-early"], for PUT, says that it did what
it has not read, and hangs up; ["block", SECONDS] does it that much later; ["expire"] has the session
forgotten; ["dies", PARTS] does so many parts of it, where it has parts, as a host does whose power goes,
and hangs up; ["cut", PARTS] is the same, and takes what of the database wasn't written to its disk;
["cut-unnoticed"] is the same right after the answer, and the server is up again before the next call;
["written"] writes the database when it is done, as a server does by itself now and then.
"cut" does that now. "harm" has what went wrong within guests,
"collisions" how often a storage change met another in its SR; "settle" waits until all tasks are over.
Async.X counts as X, and fails in its task.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import ssl
import subprocess
import sys
import threading
import time
import xmlrpc.client
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from database import Knobs
from model import CALLS, Failure, arity, check, on_the_wire
from world import World

_TEST = "/test-control"


class Dropped(Exception):
    """The connection is closed without an answer."""


class Faults:
    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._wanted: list[dict[str, Any]] = []
        self.log: list[str] = []

    def want(self, faults: list[dict[str, Any]]) -> None:
        with self._guard:
            self._wanted = [dict(fault) for fault in faults]

    def of(self, name: str) -> list[str]:
        """How this call is to fail."""
        with self._guard:
            self.log.append(name)
            for fault in self._wanted:
                if fault["call"] in (name, "*"):
                    fault["nth"] -= 1
                    if fault["nth"] == 0:
                        return [str(word) for word in fault["how"]]
        return []

    def take_log(self) -> list[str]:
        with self._guard:
            log, self.log = self.log, []
            return log


class Server:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made = 0
        self._kept: dict[str, Any] = {}
        self.begin()

    def begin(self) -> None:
        """With nothing but what a fresh installation has."""
        if self._made:
            self.world.contents.close()
        self._made += 1
        contents = self._directory / f"vdis-{self._made}"
        contents.mkdir()
        self.world = World(contents, Knobs(users={"root": "secret"}))
        self.faults = Faults()

    def call(self, name: str, given: list[Any], *, json_: bool = False, at: str = "") -> Any:
        """The value as it goes on the wire, or Failure; Dropped. ``at``: the address it was asked at."""
        plain = name.removeprefix("Async.")
        how = self.faults.of(plain)
        if how[:1] == ["drop-before"]:
            raise Dropped
        if plain not in CALLS or (plain != name and not CALLS[plain]["async"]):
            raise Failure("MESSAGE_METHOD_UNKNOWN", name)
        arity(plain, len(given))
        parameters = CALLS[plain]["params"]
        if json_:
            given = [
                _texts(v) if p[1] != "float" else v for v, p in zip(given, parameters, strict=False)
            ]
        if parameters and parameters[0][0] == "session_id":
            handle = str(given[0])
            if how[:1] == ["expire"]:
                self.world.drop("session", handle)
            self.world.session_of(handle)
            if plain == "session.logout":
                self.world.logout(handle)
                return ""
            given, parameters = given[1:], parameters[1:]
        knobs = self.world.knobs
        if plain.startswith("session.login") and knobs.slave_of and at != knobs.master_at:
            raise Failure("HOST_IS_SLAVE", knobs.slave_of)
        typed = [check(p[1], value, p[0]) for value, p in zip(given, parameters, strict=False)]
        handler = self.world.handler(plain)
        if handler is None:
            raise Failure("MESSAGE_METHOD_UNKNOWN", f"{name} (this server is a test's: not implemented)")

        def do() -> Any:
            if how[:1] == ["error"]:
                raise Failure(*how[1:])
            if how[:1] == ["block"]:
                time.sleep(float(how[1]))
            with self.world.in_turn(plain, typed):
                return handler(*typed)

        if how[:1] in (["dies"], ["cut"]):
            parts, lost = int(how[1]) if how[1:] else 1, how[0] == "cut"
            self.world.call_and_die(lambda: handler(*typed), parts, lost=lost)
            raise Dropped
        if plain != name:
            value: Any = str(self.world.run_task(plain, do))
        elif plain == "event.from":
            value = _batch(do(), json_=json_)
        else:
            with self.world.changed:  # what is told is of one moment
                pass
            value = on_the_wire(CALLS[plain]["result"], do(), json_=json_)
        if how[:1] == ["written"]:
            self.world.sync()
        if how[:1] == ["cut-unnoticed"]:
            self.world.call_and_die(lambda: None, lost=True)
        if how[:1] == ["drop-after"]:
            raise Dropped
        return value

    def control(self, request: dict[str, Any]) -> Any:
        if request.get("begin"):
            self.begin()
        if "knobs" in request:
            self.world.turn(**request["knobs"])
        if "fail" in request:
            self.faults.want(request["fail"])
        if request.get("keep"):
            self._kept = self.world.kept()
        if request.get("cut"):
            self.world.call_and_die(lambda: None, lost=True)
        if request.get("put_back"):
            self.world.put_back(self._kept)
        if request.get("expire"):
            for handle in list(self.world.objects["session"]):
                self.world.drop("session", handle)
        if request.get("world"):
            return self.world.told()
        if request.get("settle"):
            self.world.settle()
        if request.get("collisions"):
            return self.world.collisions
        if request.get("harm"):
            return self.world.harm
        return self.faults.take_log() if request.get("log") else None


def _texts(value: Any) -> Any:
    """JSON's whole numbers as XenAPI's decimal strings."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return [_texts(item) for item in value]
    if isinstance(value, dict):
        return {k: _texts(v) for k, v in value.items()}
    return value


def _batch(batch: dict[str, Any], *, json_: bool) -> dict[str, Any]:
    events = []
    for event in batch["events"]:
        told = dict(event)
        if "snapshot" in told:
            class_, record = told["snapshot"]
            told["snapshot"] = on_the_wire(f"{class_} record", record, json_=json_)
        events.append(told)
    counts = {k: v if json_ else str(v) for k, v in batch["valid_ref_counts"].items()}
    return {"events": events, "token": batch["token"], "valid_ref_counts": counts}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    xenapi: Server

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:  # a client that was killed while it asked
            self.close_connection = True
            return
        path = urlsplit(self.path).path
        try:
            if path == _TEST:
                self._answer(json.dumps(self.xenapi.control(json.loads(body))), "application/json")
            elif path.startswith("/jsonrpc"):
                self._answer(self._json(json.loads(body)), "application/json")
            else:
                self._answer(self._xml(body), "text/xml")
        except Dropped:
            self.close_connection = True

    def _asked_at(self) -> str:
        return str(self.connection.getsockname()[0])

    def _xml(self, body: bytes) -> str:
        arguments, name = xmlrpc.client.loads(body)
        try:
            value = self.xenapi.call(str(name), list(arguments), at=self._asked_at())
            answer = {"Status": "Success", "Value": value}
        except Failure as failure:
            answer = {"Status": "Failure", "ErrorDescription": failure.description}
        return xmlrpc.client.dumps((answer,), methodresponse=True)

    def _json(self, request: dict[str, Any]) -> str:
        second = request.get("jsonrpc") == "2.0"
        head: dict[str, Any] = {"id": request.get("id")}
        try:
            value = self.xenapi.call(request["method"], list(request["params"]), json_=True)
        except Failure as failure:
            code, *rest = failure.description
            if second:
                return json.dumps(
                    {"jsonrpc": "2.0", "error": {"code": 1, "message": code, "data": rest}, **head}
                )
            told = {"Status": "Failure", "ErrorDescription": failure.description}
            return json.dumps({"result": told, "error": None, **head})
        if second:
            return json.dumps({"jsonrpc": "2.0", "result": value, **head})
        return json.dumps({"result": {"Status": "Success", "Value": value}, "error": None, **head})

    def do_PUT(self) -> None:
        length = int(self.headers["Content-Length"])
        how = self.xenapi.faults.of("PUT /import_raw_vdi")
        try:
            if how[:1] == ["drop-before"]:
                raise Dropped
            if how == ["answer-early"]:
                self.close_connection = True
                self._answer("", "text/plain")
                return
            vdi, world = self._authorized("/import_raw_vdi"), self.xenapi.world
            if how[:1] == ["error"]:
                raise Failure(*how[1:])
            if how[:1] in (["dies"], ["cut"]):
                lost = how[0] == "cut"
                world.call_and_die(lambda: world.write(vdi, self.rfile, length // 2), lost=lost)
                raise Dropped
            world.write(vdi, self.rfile, length)
            if how[:1] == ["drop-after"]:
                raise Dropped
            self._answer("", "text/plain")
        except Failure as failure:
            self.close_connection = True
            self._answer(str(failure), "text/plain", 500)
        except (Dropped, ConnectionError):
            self.close_connection = True

    def do_GET(self) -> None:
        try:
            vdi = self._authorized("/export_raw_vdi")
            record = self.xenapi.world.get("VDI", vdi)
        except Failure as failure:
            self._answer(str(failure), "text/plain", 500)
            return
        with self.xenapi.world.contents.path(record["uuid"]).open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Length", str(record["virtual_size"]))
            self.end_headers()
            while piece := file.read(2**20):
                self.wfile.write(piece)

    def _authorized(self, path: str) -> str:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if parts.path != path:
            raise Failure("INTERNAL_ERROR", f"no {parts.path}")
        self.xenapi.world.session_of(query["session_id"][0])
        return query["vdi"][0]

    def _answer(self, text: str, kind: str, status: int = 200) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """It logs the calls' names, see Faults."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that was killed, or does not trust the certificate."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*_)  # type: ignore[arg-type]


class _TlsListener(_Listener):
    context: ssl.SSLContext

    def get_request(self) -> tuple[Any, Any]:
        plain, address = super().get_request()
        # the handshake is the connection's own thread's matter
        wrap = self.context.wrap_socket
        return wrap(plain, server_side=True, do_handshake_on_connect=False), address


def certificate(directory: Path) -> str:
    """Made for 127.0.0.1 and .2 by openssl(1); its SHA-256."""
    pem, key = directory / "ca.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=xen",
         "-addext", "subjectAltName=IP:127.0.0.1,IP:127.0.0.2", "-keyout", key, "-out", pem],
        check=True, capture_output=True,
    )  # fmt: skip
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.read_text())).hexdigest()


def serve(directory: Path) -> dict[str, Any]:
    """Starts it, in threads."""
    server = Server(directory)
    handler = type("Bound", (Handler,), {"xenapi": server})
    fingerprint = certificate(directory)
    credentials = directory / "credentials"
    credentials.touch(mode=0o600)
    credentials.write_text("root\nsecret\n")
    http = _Listener(("127.0.0.1", 0), handler)
    https = _TlsListener(("127.0.0.1", 0), handler)
    https.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    https.context.load_cert_chain(directory / "ca.pem", directory / "key.pem")
    second = _TlsListener(("127.0.0.2", https.server_port), handler)  # the pool's other host
    second.context = https.context
    for listener in (http, https, second):
        threading.Thread(target=listener.serve_forever, daemon=True).start()
    return {"http": http.server_port, "https": https.server_port, "fingerprint": fingerprint}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    print(json.dumps(serve(parser.parse_args().directory)), flush=True)
    sys.stdin.read()
