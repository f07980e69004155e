"""Real WebDAV servers on loopback: Apache with mod_dav, nginx with dav-ext, wsgidav."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from host.file_lock import FileLock
from host.files import make_directory
from host.paths import cache_dir

USER, PASSWORD = "aleksi", 'ä"\\:word'
_REALM = "locks"
_APACHE = """
ServerRoot {d}
ServerName 127.0.0.1
Listen 127.0.0.1:{port}
User #65534
Group #65534
PidFile {d}/pid
ErrorLog {d}/error
LogLevel info
{modules}
{tls}
DocumentRoot {d}/root
DavLockDB {d}/db/locks
DavMinTimeout 1
<Location />
  Dav On
  Require all granted
{login}
</Location>
"""
_MODULES = (
    "mpm_event", "authn_core", "authz_core", "authn_file", "authz_user", "auth_basic", "auth_digest",
    "dav", "dav_fs",
)  # fmt: skip
_BASIC = "  AuthType Basic\n  AuthName locks\n  AuthUserFile {d}/users\n  Require valid-user"
_DIGEST = (
    "  AuthType Digest\n  AuthName locks\n  AuthDigestProvider file\n  AuthUserFile {d}/users\n"
    "  Require valid-user"
)
_NGINX = """
load_module /usr/lib/nginx/modules/ngx_http_dav_ext_module.so;
daemon off;
master_process off;
pid {d}/pid;
error_log {d}/error;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {d}/t1; proxy_temp_path {d}/t2; fastcgi_temp_path {d}/t3;
    uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;
    dav_ext_lock_zone zone=locks:1m timeout=60m;
    server {{
        listen 127.0.0.1:{port};
        root {d}/root;
        location / {{
            dav_methods PUT DELETE MKCOL COPY MOVE;
            dav_ext_methods PROPFIND OPTIONS LOCK UNLOCK;
            dav_ext_lock zone=locks;
        }}
    }}
}}
"""
_WSGIDAV = """
import io, sys
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgidav.wsgidav_app import WsgiDAVApp

class Handler(WSGIRequestHandler):
    def log_message(self, *_): pass

class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

root, port, kind, user, password = sys.argv[1:]
users = {user: {"password": password}} if kind != "none" else True
app = WsgiDAVApp({
    "provider_mapping": {"/": root}, "simple_dc": {"user_mapping": {"*": users}}, "lock_storage": True,
    "http_authenticator": {"accept_basic": kind == "basic", "accept_digest": kind == "digest",
                           "default_to_digest": kind == "digest"},
    "verbose": 0, "logging": {"enable": False}, "hotfixes": {"re_encode_path_info": True},
})
server = Server(("127.0.0.1", int(port)), Handler)
def bounded(environ, start):  # wsgiref's input has no end
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return app({**environ, "wsgi.input": io.BytesIO(body)}, start)

server.set_app(bounded)
server.serve_forever()
"""
KINDS = ("apache", "nginx", "wsgidav")
_VERSION = "4.3.5"
"""Of wsgidav. It asks for libraries older than ours: it has an environment of its own, in the cache."""


class DavServer:
    """``start`` and ``stop`` as often as wanted: its files stay, and what it keeps of locks on disk.
    ``login``: none, basic or digest. ``pem``: certificate and key in one file, for TLS (Apache)."""

    def __init__(self, kind: str, directory: Path, login: str = "none", pem: Path | None = None) -> None:
        self.kind = kind
        self.login = login
        self.directory = directory
        self.root = directory / "root"
        self._pem = pem
        for name in ("root", "db"):
            (directory / name).mkdir()
            (directory / name).chmod(0o777)
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http{'s' if self._pem else ''}://127.0.0.1:{self.port}/kata.lock"

    @property
    def file(self) -> Path:
        return self.root / "kata.lock"

    def start(self) -> DavServer:
        argv = getattr(self, f"_{self.kind}")()
        with (self.directory / "out").open("ab") as out:
            self._process = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return self
            except OSError:
                running = self._process.poll() is None and time.monotonic() < deadline
                logs = [self.directory / name for name in ("out", "error")]
                assert running, "".join(log.read_text() for log in logs if log.exists())
                time.sleep(0.02)

    def add_user(self, user: str, password: str) -> None:
        """For Digest."""
        both = hashlib.md5(f"{user}:{_REALM}:{password}".encode()).hexdigest()
        with (self.directory / "users").open("a") as file:
            file.write(f"{user}:{_REALM}:{both}\n")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _apache(self) -> list[str]:
        d, login = self.directory, ""
        modules = "\n".join(
            f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so"
            for name in (*_MODULES, *(("ssl",) if self._pem else ()))
        )
        if self.login == "basic":
            login = _BASIC.format(d=d)
            hashed = subprocess.run(
                ["openssl", "passwd", "-apr1", "-stdin"], input=PASSWORD, text=True, check=True,
                capture_output=True,
            ).stdout  # fmt: skip
            (d / "users").write_text(f"{USER}:{hashed}")
        elif self.login == "digest":
            login = _DIGEST.format(d=d)
            self.add_user(USER, PASSWORD)
        tls = f"SSLEngine on\nSSLCertificateFile {self._pem}" if self._pem else ""
        text = _APACHE.format(d=d, port=self.port, modules=modules, login=login, tls=tls)
        if login:
            text = text.replace("  Require all granted\n", "")
        (d / "conf").write_text(text)
        return ["/usr/sbin/apache2", "-f", str(d / "conf"), "-DFOREGROUND"]

    def _nginx(self) -> list[str]:
        (self.directory / "conf").write_text(_NGINX.format(d=self.directory, port=self.port))
        return ["nginx", "-c", str(self.directory / "conf")]

    def _wsgidav(self) -> list[str]:
        argv = [str(self.root), str(self.port), self.login, USER, PASSWORD]
        return [str(_wsgidav_python()), "-c", _WSGIDAV, *argv]


def _wsgidav_python() -> Path:
    place = cache_dir() / "tests" / f"wsgidav-{_VERSION}"
    make_directory(place.parent, mode=0o711)
    with FileLock(place.with_name(f"{place.name}.lock")).hold():
        if not (place / "ready").exists():
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
            pip = [place / "bin" / "python", "-m", "pip", "install", "-q", f"wsgidav=={_VERSION}"]
            subprocess.run(pip, check=True)
            (place / "ready").touch()
    return place / "bin" / "python"


@contextmanager
def dav_server(kind: str, login: str = "none", pem: Path | None = None) -> Iterator[DavServer]:
    """One that runs. Its directory is where a user other than root may pass."""
    directory = Path(tempfile.mkdtemp(prefix="fh-dav-", dir="/dev/shm"))
    directory.chmod(0o755)
    server = DavServer(kind, directory, login, pem)
    try:
        yield server.start()
    finally:
        server.stop()
        shutil.rmtree(directory)


def credentials(directory: Path) -> Path:
    path = directory / "dav-login"
    path.write_text(f"{USER}:{PASSWORD}\n")
    path.chmod(0o600)
    return path


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
