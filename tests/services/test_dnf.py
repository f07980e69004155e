"""Real dnf on rpm repositories that change under it, over a real web server.

FARMHAND_PUBLISHES=1000: so many publishes, rather than a hundred."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from networks import wait_for

from host.run import Runner, which
from repositories.change import GenerationContent, changing
from repositories.format import ClientSource
from repositories.generation import Generation, Reason
from repositories.repository import Repository, Settings
from repositories.serving.server import Server
from repositories.signing.gpg import GpgSigner, SigningKey, open_signer
from tests.rpms import rpm
from tests.unit.sshd_machine import free_port

PUBLISHES = int(os.environ.get("FARMHAND_PUBLISHES", "100"))
LOOKS = 8
"""That each client has had, at the least, while they were published."""
CLIENT = Path(__file__).with_name("dnf_client.py")
STATES = ("1.0", "2.0", "3.0")
NAMES = ("one", "two")
# librepo makes /run/user/0, to which gpg then moves its sockets: not on this machine
_ALONE = ("unshare", "--mount", "--propagation", "private", "sh", "-c",
          'mount -t tmpfs farmhand /run && exec "$@"', "sh")  # fmt: skip


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Short, for sockets."""
    with tempfile.TemporaryDirectory(prefix="fhd-") as directory:
        monkeypatch.setenv("FARMHAND_RUNTIME_DIR", f"{directory}/r")
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def signer(place: Path) -> Iterator[GpgSigner]:
    home = place / "gpg"
    home.mkdir(mode=0o700)
    gpg = ("gpg", "--homedir", home, "--batch", "--quiet", "--pinentry-mode", "loopback")
    who = ("--passphrase", "", "--quick-generate-key", "farm@example.org", "ed25519", "sign", "never")
    subprocess.run([*gpg, *who], check=True)
    told = subprocess.run(
        [*gpg, "--with-colons", "-k"], check=True, capture_output=True, text=True
    ).stdout
    fingerprint = next(line for line in told.splitlines() if line.startswith("fpr:")).split(":")[9]
    try:
        with open_signer([SigningKey(fingerprint, home=home)], Runner()) as found:
            yield found
    finally:
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=True)
        subprocess.run(["gpgconf", "--homedir", home, "--remove-socketdir"], check=False)


@dataclass
class Farm:
    """A repository whose channels have each of ``STATES`` as a generation."""

    repository: Repository
    signer: GpgSigner
    states: dict[str, list[Generation]]

    @property
    def top(self) -> Path:
        return self.repository.settings.top

    def publish(self, channel: str) -> None:
        """The next state."""
        states = self.states[channel]
        numbers = [state.sequence for state in states]
        with changing(self.repository, self.signer) as change:
            head = self.repository.documents.head(channel)
            state = states[(numbers.index(head) + 1) % len(states)]
            change.publish(state, Reason("promote", "test"), expected=head)


def farm(top: Path, url: str, signer: GpgSigner, channels: tuple[str, ...]) -> Farm:
    repository = Repository(Settings(name="base", format="rpm", top=top, channels=channels, url=url))
    made = Farm(repository, signer, {channel: [] for channel in channels})
    for channel in channels:
        for version in STATES:
            with repository.staging() as staging, changing(repository, signer) as change:
                taken = [staging.take(rpm(name, version)) for name in NAMES]
                head = repository.documents.head(channel)
                content, reason = GenerationContent(None, add=taken), Reason("add", "test")
                state = change.commit(channel, content, reason)
                change.publish(state, reason, expected=head)
                made.states[channel].append(state)
    return made


def seen(version: str) -> list[str]:
    return [f"{name}-{version}-1.noarch" for name in NAMES]


@contextlib.contextmanager
def nginx(place: Path, top: Path) -> Iterator[str]:
    port = free_port()
    (place / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {place}/pid; error_log {place}/error.log;\n"
        "events {}\nhttp { access_log off; client_body_temp_path "
        f"{place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/f; "
        f"uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;\n"
        f"server {{ listen 127.0.0.1:{port}; root {top}; }} }}\n"
    )
    tool = which("nginx")
    assert tool, "these tests need nginx: apt-get install nginx-light"
    server = subprocess.Popen([tool, "-e", place / "error.log", "-c", place / "nginx.conf"])

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        wait_for(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@dataclass
class Client:
    process: subprocess.Popen[str]
    looks: list[dict[str, object]]
    reader: threading.Thread

    @classmethod
    def start(cls, place: Path, setting: str, key: str, stop: Path) -> Client:
        place.mkdir()
        process = subprocess.Popen(
            [*_ALONE, "/usr/bin/python3", CLIENT, place, setting, key, stop],
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(place), "LC_ALL": "C.UTF-8"},
        )
        looks: list[dict[str, object]] = []

        def read() -> None:
            assert process.stdout
            looks.extend(json.loads(line) for line in process.stdout)

        reader = threading.Thread(target=read)
        reader.start()
        return cls(process, looks, reader)

    def end(self) -> list[dict[str, object]]:
        assert self.process.wait() == 0
        self.reader.join()
        assert self.process.stdout
        self.process.stdout.close()
        return self.looks


def test_no_look_fails_and_each_sees_one_state_while_generations_come(
    place: Path, signer: GpgSigner
) -> None:
    """By a plain URL and pinned by the mirror list, signed and not. What is signed and read by a plain
    URL comes from our own server: see ``RpmFormat``."""
    (place / "repo").mkdir(mode=0o755)
    with nginx(place, place / "repo") as url, Server(place / "repo") as server:
        made = farm(place / "repo", url, signer, ("busy",))
        stop, key = place / "stop", f"{url}/key.asc"
        plain, pinned = f"baseurl={url}/channels/busy", f"mirrorlist={url}/channels/busy.mirrors"
        asked = {
            "plain": (plain, ""),
            "pinned": (pinned, ""),
            "pinned, signed": (pinned, key),
            "plain, signed": (f"baseurl={server.url}/channels/busy", key),
        }
        clients = {
            name: Client.start(place / f"c{n}", *what, stop)
            for n, (name, what) in enumerate(asked.items())
        }
        try:
            wait_for(lambda: all(client.looks for client in clients.values()), 60)
            first = [len(client.looks) for client in clients.values()]
            published = 0
            while published < PUBLISHES or not all(
                len(client.looks) > before + LOOKS
                for client, before in zip(clients.values(), first, strict=True)
            ):
                assert all(client.process.poll() is None for client in clients.values())
                made.publish("busy")
                published += 1
        finally:
            stop.touch()
            looks = {name: client.end() for name, client in clients.items()}
        states = [{"seen": seen(version)} for version in STATES]
        for name, found in looks.items():
            assert not [look for look in found if look not in states], name
            assert len({str(look) for look in found}) > 1, name


# -- one publish between the two files -------------------------------------------------------------


@contextlib.contextmanager
def hooked(top: Path, hook: Callable[[str], None]) -> Iterator[str]:
    """A web server that calls ``hook`` with each path before it answers."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hook(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(top)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def dnf(place: Path, stanza: str, *words: str) -> subprocess.CompletedProcess[str]:
    for name in ("repos", "nothing", "log"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "repos" / "base.repo").write_text(f"{stanza}metadata_expire=0\nskip_if_unavailable=0\n")
    (place / "dnf.conf").write_text("[main]\n")
    places = {"cachedir": "cache", "persistdir": "p", "logdir": "log", "reposdir": "repos",
              "varsdir": "nothing", "pluginpath": "nothing"}  # fmt: skip
    settings = (f"--setopt={name}={place / where}" for name, where in places.items())
    argv = (
        "dnf",
        "-y",
        "-q",
        "--refresh",
        "-c",
        place / "dnf.conf",
        f"--installroot={place}/root",
        "--releasever=1",
    )
    return subprocess.run(
        [*_ALONE, *argv, *settings, *words],
        check=False, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(place), "LC_ALL": "C.UTF-8"},
    )  # fmt: skip


def one_state(text: str) -> bool:
    return text in ["".join(f"{name}-0:{version}-1.noarch\n" for name in NAMES) for version in STATES]


def test_a_publish_between_repomd_and_its_signature(place: Path, signer: GpgSigner) -> None:
    """Pinned clients never see it. Those of a plain URL on any web server take it once a run, and after
    a second one use nothing, say so, and go on when they are run again."""
    due: list[str] = []

    def hook(path: str) -> None:
        if path.endswith("/repomd.xml.asc") and due:
            made.publish(due.pop())

    with hooked(place / "repo", hook) as url:
        made = farm(place / "repo", url, signer, ("tested",))

        def stanza(*, pinned: bool) -> str:
            channel = f"{url}/channels/tested"
            source = ClientSource(
                "base", "tested", channel, f"{channel}.mirrors" if pinned else None,
                f"{url}/key.asc", signer.public(), (), (),
            )  # fmt: skip
            return made.repository.format.stanza(source)

        def query(name: str, publishes: int, *, pinned: bool) -> subprocess.CompletedProcess[str]:
            due[:] = ["tested"] * publishes
            return dnf(place / name, stanza(pinned=pinned), "repoquery")

        for publishes in (0, 1, 2):
            found = query("pinned", publishes, pinned=True)
            assert found.returncode == 0 and one_state(found.stdout), found
        first = query("plain", 0, pinned=False)
        assert first.returncode == 0 and one_state(first.stdout), first
        made.publish("tested")
        once = query("plain", 1, pinned=False)
        assert once.returncode == 0 and one_state(once.stdout), once
        made.publish("tested")
        failed = query("plain", 2, pinned=False)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert "Bad GPG signature" in failed.stderr
        again = query("plain", 0, pinned=False)
        assert again.returncode == 0 and one_state(again.stdout), again


def test_our_server_pairs_repomd_and_its_signature(place: Path, signer: GpgSigner) -> None:
    """A publish after each and every repomd.xml, before its signature is asked for."""

    def told(line: str) -> None:
        if '/repomd.xml"' in line:
            made.publish("tested")
            between.append(line)

    between: list[str] = []
    (place / "repo").mkdir(mode=0o755)
    with Server(place / "repo", access=told) as server:
        made = farm(place / "repo", server.url, signer, ("tested",))
        channel = f"{server.url}/channels/tested"
        source = ClientSource(
            "base", "tested", channel, None, f"{server.url}/key.asc", signer.public(), (), ()
        )
        for look in range(1, 4):
            found = dnf(place / "client", made.repository.format.stanza(source), "repoquery")
            assert found.returncode == 0 and one_state(found.stdout), found
            assert len(between) >= 2 * look


def test_the_client_s_file_as_it_is_pasted(place: Path, signer: GpgSigner) -> None:
    with nginx(place, place / "repo") as url:
        made = farm(place / "repo", url, signer, ("tested",))
        channel = f"{url}/channels/tested"
        source = ClientSource(
            "base", "tested", channel, f"{channel}.mirrors", f"{url}/key.asc", signer.public(), (), ()
        )
        words = ("install", "--downloadonly", f"--downloaddir={place / 'got'}", *NAMES)
        done = dnf(place / "client", made.repository.format.stanza(source), *words)
        assert done.returncode == 0, done
        assert sorted(path.name for path in (place / "got").glob("*.rpm")) == [
            f"{name}-{STATES[-1]}-1.noarch.rpm" for name in NAMES
        ]
        for path in (place / "got").glob("*.rpm"):
            assert path.read_bytes() == rpm(path.name.split("-")[0], STATES[-1]).read_bytes()
        # What nobody signed isn't used
        tree = made.repository.layout.tree(made.states["tested"][-1].sequence)
        (tree / "repodata/repomd.xml.asc").unlink()
        refused = dnf(place / "other", made.repository.format.stanza(source), "makecache")
        assert refused.returncode == 1, refused
