"""Machines for tests: real sshd processes on free loopback ports, each with a home of its own; where the
account matters, with one of its own in a passwd that only they see; or dropbear instead."""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from host.run import which
from provision.guest.remote import Endpoint

_PORTS = range(10000, 22000)
"""Not those that the kernel gives to connections, which may have one by the time that it is used
(ip(7), ip_local_port_range), nor farms' own (provision/allocate.py)."""


def free_port() -> int:
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


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
    options: tuple[str, ...] = ()  # lines of sshd_config before ours: the first one counts
    sftp: bool = True
    shell: str = ""  # the login shell of its account; "": the machine's own account, by sh
    dotfiles: dict[str, str] = field(default_factory=dict)
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
        for name, text in self.dotfiles.items():
            (self.home / name).parent.mkdir(parents=True, exist_ok=True)
            (self.home / name).write_text(text)
        self.write_passwd()
        self.configure()
        return self

    def write_passwd(self) -> None:
        mine = str(os.getuid())
        lines = []
        for line in Path("/etc/passwd").read_text().splitlines():
            entry = line.split(":")
            if entry[2] == mine:
                entry[1] = "*"  # no password, which is not the same as a locked account
                entry[5:7] = [str(self.home), self.shell or "/bin/sh"]
            lines.append(":".join(entry))
        (self.root / "passwd").write_text("\n".join(lines) + "\n")

    def configure(self) -> None:
        self.host_key = make_key(self.root / "host")
        authorized = self.root / "authorized_keys"
        shutil.copy(self.client_key.with_name(self.client_key.name + ".pub"), authorized)
        server = next(
            p for p in ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server")
            if Path(p).exists()
        )  # fmt: skip
        environment = {**({} if self.shell else {"HOME": str(self.home)}), **self.environment}
        force = """ForceCommand cd "$HOME" && exec sh -c "$SSH_ORIGINAL_COMMAND\""""
        (self.root / "config").write_text(
            "\n".join(self.options)
            + f"""
ListenAddress 127.0.0.1:{self.port}
HostKey {self.root}/host
AuthorizedKeysFile {authorized}
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding {"yes" if self.forwarding else "no"}
{f"Subsystem sftp {server}" if self.sftp else ""}
{f"SetEnv {' '.join(f'{key}={value}' for key, value in environment.items())}" if environment else ""}
{"" if self.shell else force}
"""
        )

    def command(self) -> list[str]:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        sshd = which("sshd")
        assert sshd, "these tests need openssh-server"
        return [sshd, "-D", "-e", "-f", str(self.root / "config")]

    def enclosed(self) -> list[str]:
        """Its command, where its passwd lies over the machine's: seen by it alone."""
        rights = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        script = 'mount --bind "$1" /etc/passwd && shift && exec "$@"'
        passwd = str(self.root / "passwd")
        return ["unshare", "--mount", *rights, "sh", "-c", script, "sh", passwd, *self.command()]

    def start(self) -> Sshd:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.enclosed() if self.shell else self.command(), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for(self._listens)
        return self

    def _listens(self) -> bool:
        assert self.process and self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def sessions(self) -> list[int]:
        """The pids of the processes that serve its connections."""
        assert self.process
        return children(self.process.pid)

    def cut(self) -> None:
        """Kill the processes that serve connections: what a guest's crash looks like from here."""
        for pid in self.sessions():
            for child in children(pid):  # the unprivileged half, where there is one
                with contextlib.suppress(OSError):  # it has just ended by itself
                    if Path(f"/proc/{child}/comm").read_text().strip() == "sshd":
                        _kill(child)
            _kill(pid)

    def stop(self) -> None:
        if self.process:
            enclosed = _namespace(self.process.pid)
            self.cut()
            self.process.terminate()
            self.process.wait(60)
            self.process = None
            if enclosed not in ("", _namespace(os.getpid())):
                for pid in (int(path.name) for path in Path("/proc").glob("[1-9]*")):
                    if _namespace(pid) == enclosed:  # a login's loop that nobody answers any more
                        _kill(pid)

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


@dataclass
class Dropbear(Sshd):
    """The small server of routers and rescue systems: without SFTP, where nothing else brings it."""

    shell: str = "/bin/sh"

    def configure(self) -> None:
        key = self.root / "host"
        made = subprocess.run(
            ["dropbearkey", "-t", "ed25519", "-f", key], check=True, capture_output=True, text=True
        )
        line = next(line for line in made.stdout.splitlines() if line.startswith("ssh-ed25519"))
        self.host_key = " ".join(line.split()[:2])
        (self.home / ".ssh").mkdir(mode=0o700)
        authorized = self.home / ".ssh" / "authorized_keys"
        shutil.copy(self.client_key.with_name(self.client_key.name + ".pub"), authorized)
        authorized.chmod(0o600)
        self.home.chmod(0o755)

    def command(self) -> list[str]:
        server = which("dropbear")
        assert server, "these tests need dropbear-bin"
        forwarding = [] if self.forwarding else ["-k"]
        where = ["-p", f"127.0.0.1:{self.port}", "-r", str(self.root / "host"), "-P", ""]
        return [server, "-F", "-E", *forwarding, *where]


def children(pid: int) -> list[int]:
    """Of its first thread."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _namespace(pid: int) -> str:
    """Of its mounts; "" where it is gone, or another user's."""
    try:
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    except OSError:
        return ""


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


def gone(pid: int, patience: float = 60) -> bool:
    deadline = time.monotonic() + patience
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def wait_for(what, patience: float = 60):
    """Until ``what()`` is true; its value."""
    deadline = time.monotonic() + patience
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value
