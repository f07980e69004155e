"""Files from the web, by real servers and a real curl: a file is what it must be, or it isn't taken."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cycle_farm import Lab, lab, plan_cycle, run, run_cycle
from sshd_machine import free_port

from builds.checkup import with_source
from builds.record import BuildRecord, StepRecord, find_record
from builds.steps import fetch
from inventory.errors import BuildFailed, FarmhandError, InventoryError, Unsupported
from inventory.loader import loads
from provision.checkup import CheckReport

__all__ = ["lab"]
CONTENT = b"a ready package\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Answer = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """A server on loopback: by path, what it answers. It keeps what it was asked."""

    def __init__(self) -> None:
        web = self
        self.answers: dict[str, bytes | Answer] = {}
        self.asked: list[tuple[str, str]] = []  # path, Authorization
        self.closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.path, self.headers.get("Authorization", "")))
                answer = web.answers.get(self.path.partition("?")[0])
                if answer is None:
                    self.send_error(404)
                elif isinstance(answer, bytes):
                    head(self, length=len(answer))
                    self.wfile.write(answer)
                else:
                    answer(self)

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return self.server.server_port

    def url(self, path: str = "/tools.rpm", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def head(request: BaseHTTPRequestHandler, status: int = 200, *, length: int | None = None, **more: str):
    request.send_response(status)
    if length is not None:
        request.send_header("Content-Length", str(length))
    for name, value in more.items():
        request.send_header(name, value)
    request.end_headers()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = Web()
    server.answers["/tools.rpm"] = CONTENT
    yield server
    server.close()


def step(url: str, **more: str) -> dict:
    known = {} if "sums" in more else {"sha256": SHA256}
    return {"name": "get", "fetch": url, "to": "dev2", "path": "in/tools.rpm", "timeout": "60s",
            **known, **more}  # fmt: skip


def passes(lab: Lab, *steps: dict) -> BuildRecord:
    with lab.site([*steps], source=None) as site:
        return run_cycle(site)


def fails(lab: Lab, *steps: dict) -> StepRecord:
    """The step that failed, its error told in one line."""
    with lab.site([*steps], source=None) as site:
        with pytest.raises(BuildFailed) as caught:
            run_cycle(site)
        record = find_record(site.paths)
    failed = record.failed_step
    assert failed is not None
    assert "\n" not in caught.value.message
    assert not list((lab.root / "cache" / "fetched").glob(".*")), "no part is left"
    return failed


def said(record: BuildRecord) -> str:
    return "".join((record.directory / s.log).read_text() for s in record.steps)


def test_a_file_is_brought_recorded_and_kept(lab: Lab, web: Web) -> None:
    url = web.url("/tools.rpm?token=s3cret")
    record = passes(lab, step(url, mode="0750"), run("use", "ls -l in; test -x in/tools.rpm"))
    there = lab.dev2.home / "in" / "tools.rpm"
    assert there.read_bytes() == CONTENT
    assert there.stat().st_mode & 0o7777 == 0o750
    (file,) = record.inputs
    assert (file.name, file.size, file.sha256) == ("tools.rpm", len(CONTENT), SHA256)
    assert (file.vm, file.path) == ("dev2", "in/tools.rpm")
    assert record.outputs == ()
    assert SHA256 in record.page.read_text()
    everything = said(record) + record.path.read_text() + record.page.read_text()
    assert "s3cret" not in everything
    assert "/tools.rpm?..." in everything
    kept = lab.root / "cache" / "fetched" / SHA256
    assert kept.stat().st_mode & 0o777 == 0o644
    again = passes(lab, step(url))
    assert len(web.asked) == 1, "from the cache"
    assert again.steps[0].details["cache"]
    kept.write_bytes(b"rotten")
    dead = kept.with_name(f".{SHA256}.{2**22 + 1}.1")  # no process has that number
    dead.touch()
    passes(lab, step(url))
    assert "damaged" in said(find_record_of(lab))
    assert (kept.read_bytes(), len(web.asked)) == (CONTENT, 2)
    assert not dead.exists()
    assert there.read_bytes() == CONTENT


def find_record_of(lab: Lab) -> BuildRecord:
    with lab.site([run("any", "true")]) as site:
        return find_record(site.paths)


def test_the_plan_says_so_and_asks_nobody(lab: Lab, web: Web) -> None:
    with lab.site([step(web.url("/tools.rpm?token=s3cret"), max_size="1M")], source=None) as site:
        (line,) = [action for action in plan_cycle(site) if action.verb == "fetch"]
    assert (line.vm, web.asked) == ("dev2", [])
    assert line.text.startswith(f"get: fetch {web.url('/tools.rpm?...')}, sha256 {SHA256[:12]}, to dev2")
    assert not (lab.root / "cache" / "fetched").exists()


def test_what_it_needs_here_is_told_beforehand(
    lab: Lab, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = lab.root / "tools"
    tools.mkdir()
    (tools / "gpgv").symlink_to("/usr/bin/gpgv")
    with lab.site([step(web.url())], source=None) as site:
        assert [
            check.text for check in with_source(CheckReport(()), site.farm.path, ask=False).checks
        ] == ["curl, gpgv"]
        monkeypatch.setenv("PATH", str(tools))
        with pytest.raises(Unsupported, match="step get needs curl on this machine") as caught:
            plan_cycle(site)
        [check] = with_source(CheckReport(()), site.farm.path, ask=False).checks
    assert "install" in str(caught.value.remedy)
    assert (check.ok, check.level, check.remedy) == (False, "needed", caught.value.remedy)
    assert check.text.startswith("curl not found")


def test_another_file_is_not_taken(lab: Lab, web: Web) -> None:
    web.answers["/tools.rpm"] = b"something else"
    failed = fails(lab, step(web.url()))
    assert failed.failure == "dependencies"
    assert f"not {SHA256}" in failed.message
    assert not (lab.dev2.home / "in").exists()


def endless(request: BaseHTTPRequestHandler) -> None:
    head(request)
    while True:
        request.wfile.write(b"x" * 65536)


def drip(web: Web) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        head(request, length=len(CONTENT))
        while not web.closing.wait(0.2):
            request.wfile.write(b"x")
            request.wfile.flush()

    return answer


def too_short(request: BaseHTTPRequestHandler) -> None:
    head(request, length=len(CONTENT))
    request.wfile.write(CONTENT[:100])


def garbage(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"\x1b[31mnothing that http knows\r\n\r\n" * 100)


def moved(where: str) -> Answer:
    return lambda request: head(request, 302, length=0, Location=where)


HOSTILE: dict[str, tuple[bytes | Answer | None, str, str]] = {
    "endless": (endless, "dependencies", "is larger than 1M"),
    "too large": (lambda r: head(r, length=2**40), "dependencies", "is larger than 1M"),
    "too short": (too_short, "infrastructure", "bytes remaining"),
    "no http": (garbage, "infrastructure", "HTTP/0.9"),
    "not there": (None, "dependencies", "the server answers 404"),
    "broken": (lambda r: r.send_error(503), "infrastructure", "the server answers 503"),
    "to a file": (moved("file:///proc/version"), "dependencies", "not http or https, which is"),
    "to ftp": (moved("ftp://127.0.0.1/tools.rpm"), "dependencies", "which is not followed"),
    "in circles": (moved("/tools.rpm"), "dependencies", "redirects more than 5 times"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_servers(lab: Lab, web: Web, how: str) -> None:
    answer, failure, words = HOSTILE[how]
    web.answers.pop("/tools.rpm")
    if answer is not None:
        web.answers["/tools.rpm"] = answer
    failed = fails(lab, step(web.url(), max_size="1M"))
    assert (failed.failure, failed.status) == (failure, "failed")
    assert words in failed.message
    assert failed.message.isprintable()


def test_a_slow_drip_is_given_up(lab: Lab, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PATIENCE", 2)
    web.answers["/tools.rpm"] = drip(web)
    failed = fails(lab, step(web.url()))
    assert failed.failure == "infrastructure"
    assert "too slow" in failed.message


def test_the_steps_limit_ends_it(lab: Lab, web: Web) -> None:
    web.answers["/tools.rpm"] = drip(web)
    failed = fails(lab, {**step(web.url()), "timeout": "1s"})
    assert failed.failure == "time-out"


def test_nobody_there(lab: Lab) -> None:
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        failed = fails(lab, step(f"http://127.0.0.1:{taken.getsockname()[1]}/tools.rpm"))
    assert failed.failure == "infrastructure"
    assert "connect" in failed.message


def test_redirects_are_followed_the_login_stays(
    lab: Lab, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Web()
    other.answers["/real.rpm"] = CONTENT
    web.answers["/tools.rpm"] = moved(other.url("/real.rpm"))
    for login in ('builder:s3cret pa"ss\\', "t0ken"):
        monkeypatch.setenv("COMPANY", login)
        shutil.rmtree(lab.root / "cache" / "fetched", ignore_errors=True)
        passes(lab, step(web.url(), login="COMPANY"))
    other.close()
    basic = base64.b64encode(b'builder:s3cret pa"ss\\').decode()
    assert [given for _, given in web.asked] == [f"Basic {basic}", "Bearer t0ken"]
    assert [given for _, given in other.asked] == ["", ""]
    kept = lab.root / "cache" / "fetched" / SHA256
    assert kept.stat().st_mode & 0o777 == 0o600, "what needs a login is nobody else's"


def test_logins_are_looked_at_first(lab: Lab, web: Web) -> None:
    (lab.root / "logins").write_text("machine 127.0.0.1 login builder password s3cret\n")
    (lab.root / "logins").chmod(0o644)
    for more, words in (
        ({"netrc": "logins"}, "others may read or change the logins"),
        ({"netrc": "nowhere"}, "cannot read the logins of step get .*nowhere: No such file"),
        ({"login": "NOT_SET_ANYWHERE"}, "no environment variable NOT_SET_ANYWHERE"),
    ):
        with lab.site([step(web.url(), **more)], source=None) as site:
            for ask in (run_cycle, plan_cycle):
                with pytest.raises(FarmhandError, match=words):
                    ask(site)
    assert web.asked == []
    (lab.root / "logins").chmod(0o600)
    passes(lab, step(web.url(), netrc="logins"))
    assert web.asked[-1][1] == f"Basic {base64.b64encode(b'builder:s3cret').decode()}"


class Key:
    """Of a home of its own."""

    def __init__(self, home: Path, name: str) -> None:
        home.mkdir(mode=0o700)
        self.home = home
        self.gpg("--quick-gen-key", f"{name}@example.org", "ed25519", "sign", "never")
        self.ring = home / "ring.gpg"
        self.ring.write_bytes(self.gpg("--export"))

    def gpg(self, *args: str, data: bytes = b"") -> bytes:
        words = ("gpg", "--homedir", self.home, "--batch", "--no-tty", "--passphrase", "", "--quiet")
        return subprocess.run([*words, *args], input=data, capture_output=True, check=True).stdout

    def sign(self, data: bytes) -> bytes:
        return self.gpg("--detach-sign", data=data)

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", self.home, "--kill", "all"], check=True)


@pytest.fixture
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Key, Key]]:
    root = tmp_path_factory.mktemp("k")
    both = Key(root / "a", "company"), Key(root / "b", "stranger")
    yield both
    for key in both:
        key.close()


def test_signed_sums(lab: Lab, web: Web, keys: tuple[Key, Key]) -> None:
    company, stranger = keys
    sums = f"{'0' * 64}  other.rpm\n{SHA256} *tools.rpm\n".encode()
    signed = step(
        web.url(), sums=web.url("/SUMS"), signature=web.url("/SUMS.gpg"), keyring=str(company.ring)
    )
    web.answers |= {"/SUMS": sums, "/SUMS.gpg": company.sign(sums)}
    record = passes(lab, signed)
    assert (lab.dev2.home / "in" / "tools.rpm").read_bytes() == CONTENT
    assert len(record.steps[0].details["signed by"]) == 40
    short = f"{SHA256}  others.rpm\n".encode()
    twice = sums + f"{'1' * 64}  tools.rpm\n".encode()
    for text, signature, words in (
        (sums + b"x", company.sign(sums), "was changed after it was signed"),
        (sums, stranger.sign(sums), "which is not in"),
        (sums, b"nothing", "is not signed by a key"),
        (short, company.sign(short), "has no sum of tools.rpm"),
        (twice, company.sign(twice), "has 2 sums of tools.rpm"),
        (b"x" * (2**20 + 1), b"", "SUMS is larger than 1M"),
    ):
        web.answers |= {"/SUMS": text, "/SUMS.gpg": signature}
        failed = fails(lab, signed)
        assert (failed.failure, words in failed.message) == ("dependencies", True), failed.message


NGINX = """
daemon off; worker_processes 1; pid {root}/pid; error_log {root}/error; {user}
events {{ }}
http {{
  access_log off; client_body_temp_path {root}/body; proxy_temp_path {root}/p;
  fastcgi_temp_path {root}/f; uwsgi_temp_path {root}/u; scgi_temp_path {root}/s;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {root}/cert; ssl_certificate_key {root}/key;
    location / {{
      root {root}/files; dav_methods PUT DELETE MKCOL; create_full_put_path on;
      auth_basic dav; auth_basic_user_file {root}/users;
    }}
  }}
}}
"""


def test_a_real_webdav_server_with_tls(lab: Lab, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Autobuild paper's ready package: put into the company's DAV by one, fetched by the cycle."""
    root = lab.root / "dav"
    (root / "files").mkdir(parents=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", root / "key", "-out", root / "cert", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    (root / "users").write_text("builder:{PLAIN}s3cret\n")
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    (root / "conf").write_text(NGINX.format(root=root, port=port, user=user))
    nginx = subprocess.Popen(["nginx", "-c", root / "conf", "-e", root / "error"])
    try:
        url = f"https://localhost:{port}/ready/tools.rpm"
        trusted = ssl.create_default_context(cafile=str(root / "cert"))
        put(url, trusted)
        (lab.root / "logins").write_text("machine localhost login builder password s3cret\n")
        (lab.root / "logins").chmod(0o600)
        failed = fails(lab, step(url, netrc="logins"))
        assert failed.failure == "infrastructure"
        assert "certificate" in failed.message
        monkeypatch.setenv("CURL_CA_BUNDLE", str(root / "cert"))
        failed = fails(lab, step(url))
        assert failed.failure == "dependencies"
        assert "answers 401" in failed.message
        assert failed.remedy
        passes(lab, step(url, netrc="logins"))
        assert (lab.dev2.home / "in" / "tools.rpm").read_bytes() == CONTENT
    finally:
        nginx.terminate()
        nginx.wait()


def put(url: str, trusted: ssl.SSLContext) -> None:
    import time
    import urllib.error
    import urllib.request

    login = base64.b64encode(b"builder:s3cret").decode()
    for _ in range(200):
        request = urllib.request.Request(
            url, CONTENT, {"Authorization": f"Basic {login}"}, method="PUT"
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, context=trusted, timeout=5) as answer:
                assert answer.status == 201
                return
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.05)
    raise AssertionError("nginx does not listen")


def test_what_the_docs_show_loads() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "cycle.md").read_text()
    _, _, part = text.partition("## Files from the web")
    block = [ln for ln in part.partition("\n- **")[0].splitlines() if ln.startswith("    ")]
    base = "farm: x\nhosts: {lab: {driver: ssh}}\nvms: {prod: {address: 10.0.0.1}}\ncycle:\n  steps:\n"
    farm = loads("\n".join([base, *block]).encode(), Path("docs.yaml"))
    assert farm.cycle is not None
    assert [type(step) for step in farm.cycle.steps] == [fetch.FetchStep] * 2


REFUSED = {
    "fetch: ftp://host/file": "not an address",
    "fetch: 'https://host:x/file'": "not an address",
    "fetch: https:///file": "not an address",
    "fetch: https://me:secret@host/file": "a login doesn't belong",
    "sha256: 12": "not 64 digits",
    "path: in/": "ends without the file's name",
    "mode: '999'": "is not a mode",
    "owner: 'root; reboot'": "is not a user",
    "login: a-b": "not the name of an environment variable",
    "sums: https://host/SUMS": "one of them",
    "keyring: ring.gpg": "belong together",
    "to: nobody": "no VM 'nobody'",
    "max_size: 0": "must be more than",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_at_load(line: str, tmp_path: Path) -> None:
    good = {
        "name": "get",
        "fetch": "https://host/file",
        "to": "vm",
        "path": "in/file",
        "sha256": SHA256,
    }
    key, _, value = line.partition(": ")
    keys = {**good, key: value}
    text = "farm: x\nhosts: {lab: {driver: ssh}}\nvms: {vm: {address: 10.0.0.1}}\n"
    text += "cycle:\n  steps:\n    - "
    text += "\n      ".join(f"{name}: {given}" for name, given in keys.items()) + "\n"
    with pytest.raises(InventoryError) as caught:
        loads(text.encode(), tmp_path / "f.yaml")
    (problem,) = caught.value.problems
    assert REFUSED[line] in problem.message
    assert "step get" in problem.message
    assert "secret" not in problem.message
