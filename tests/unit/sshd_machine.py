"""Machines for tests: real sshd processes on free loopback ports, each with a home of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from hypervisors.run import which
from provision.remote import Endpoint


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_key(path: Path) -> str:
    """An ed25519 key pair; returns the public half as it stands in known_hosts."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)
    return path.with_name(path.name + ".pub").read_text().strip()


@dataclass
class Sshd:
    """One sshd, as the current user. ``home`` is where its logins land."""

    name: str
    root: Path
    client_key: Path
    forwarding: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def log(self) -> Path:
        return self.root / "sshd.log"

    def prepare(self) -> Sshd:
        self.home.mkdir(parents=True)
        self.host_key = make_key(self.root / "host")
        authorized = self.root / "authorized_keys"
        shutil.copy(self.client_key.with_name(self.client_key.name + ".pub"), authorized)
        server = next(
            p for p in ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server")
            if Path(p).exists()
        )  # fmt: skip
        (self.root / "config").write_text(
            f"""ListenAddress 127.0.0.1:{self.port}
HostKey {self.root}/host
AuthorizedKeysFile {authorized}
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding {"yes" if self.forwarding else "no"}
Subsystem sftp {server}
SetEnv HOME={self.home} {" ".join(f"{key}={value}" for key, value in self.environment.items())}
ForceCommand cd "$HOME" && exec sh -c "$SSH_ORIGINAL_COMMAND"
"""
        )
        return self

    def start(self) -> Sshd:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        sshd = which("sshd")
        assert sshd, "these tests need openssh-server"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sshd, "-D", "-e", "-f", self.root / "config"], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def sessions(self) -> list[int]:
        """The pids of the processes that serve its connections."""
        assert self.process
        return [int(p) for p in _children(self.process.pid)]

    def cut(self) -> None:
        """Kill the processes that serve connections: what a guest's crash looks like from here."""
        for pid in self.sessions():
            for child in _children(pid):  # the unprivileged half, where there is one
                if Path(f"/proc/{child}/comm").read_text().strip() == "sshd":
                    _kill(int(child))
            _kill(pid)

    def stop(self) -> None:
        if self.process:
            self.cut()
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def endpoint(self, **changed: object) -> Endpoint:
        values = {
            "vm": self.name,
            "host": "127.0.0.1",
            "port": self.port,
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "key": self.client_key,
            "host_key": self.host_key,
        }
        return Endpoint(**{**values, **changed})


def _children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether it runs: a zombie nobody has collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def gone(pid: int, patience: float = 20) -> bool:
    deadline = time.monotonic() + patience
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def wait_for(what, patience: float = 30):
    """Until ``what()`` is true; its value."""
    deadline = time.monotonic() + patience
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value
