"""Accounts and servers of all kinds, all real: what a login prints, asks and is, what its sshd allows,
what the machine behind it lacks."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from pathlib import Path

import pytest
from sshd_machine import Dropbear, Sshd, gone, make_key

from host.run import which
from inventory.errors import DriverFailed, Unsupported
from inventory.model import Limits
from provision.guest import shell
from provision.guest.connection import Connection

BASH, TCSH, FISH = "/bin/bash", "/bin/tcsh", "/usr/bin/fish"
ASKS = """echo "-- authorised use only --"
echo "-- this too --" >&2
read -p "Continue? [Y/n] " answer
"""
LOGINS: dict[str, dict] = {
    "prints": {"shell": BASH, "dotfiles": {".bashrc": "echo -- authorised use only --; echo x >&2\n"}},
    "prints no end of line": {"shell": BASH, "dotfiles": {".bashrc": "printf 'hello '\n"}},
    "prints a lot": {"shell": BASH, "dotfiles": {".bashrc": "seq 100000\n"}},
    "prints what it is to do": {"shell": BASH, "dotfiles": {".bashrc": "set -x; echo y >&2\n"}},
    "asks": {"shell": BASH, "dotfiles": {".bashrc": ASKS}},
    "swallows": {"shell": BASH, "dotfiles": {".bashrc": "head -n 1 >/dev/null\n"}},
    "fails": {"shell": BASH, "dotfiles": {".bashrc": "no-such-command\nset -o nounset\n"}},
    "tcsh": {"shell": TCSH, "dotfiles": {".cshrc": "echo hello; set noclobber; alias sh echo no\n"}},
    "fish": {"shell": FISH, "dotfiles": {".config/fish/config.fish": "echo hello\n"}},
    "a banner": {"shell": BASH, "options": ("Banner /etc/os-release", "PrintMotd yes")},
    "one session": {"shell": BASH, "options": ("MaxSessions 1",)},
    "no SFTP": {"shell": BASH, "sftp": False},
    "a command of its own": {"options": ("ForceCommand echo hi; eval \"$SSH_ORIGINAL_COMMAND\"",),
                             "shell": BASH},
}  # fmt: skip
HARD = "a 'b' \"c\" $HOME `id` \\ \\n ünï !! #{x} {a,b} *\nsecond line"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def login(tmp_path: Path, key: Path):
    machines = []

    def make(kind=Sshd, **of) -> Sshd:
        machines.append(kind("dev2", tmp_path / "dev2", key, **of).prepare().start())
        return machines[-1]

    yield make
    for machine in machines:
        machine.stop()


async def everything(machine: Sshd, tmp_path: Path) -> None:
    """All that a build does, with nothing in it of what the login says."""
    data = os.urandom(2_500_000)
    (machine.home / "out").mkdir()
    (machine.home / "out" / "a 'b'.rpm").write_bytes(data)
    (tmp_path / "local").write_bytes(data[:1000])
    async with await Connection.open(machine.endpoint()) as connection:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        facts = await connection.facts()
        assert facts.boot_id == boot
        assert abs(facts.skew) < 2
        assert await connection.output("echo one; echo two >&2") == "one\ntwo\n"
        parts: list[bytes] = []
        result = await connection.run(
            'printf %s "$V"; pwd; exit 7', env={"V": HARD}, timeout=60, log=parts.append
        )
        assert (result.status, result.timed_out) == (7, False)
        assert b"".join(parts).decode() == f"{HARD}{machine.home}\n"
        (got,) = await connection.list(["out/*.rpm"], Limits())
        await connection.get(got, tmp_path / "got")
        assert (tmp_path / "got" / "a 'b'.rpm").read_bytes() == data
        assert (got.size, got.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        await connection.put([tmp_path / "local"], "in/here")
        assert (machine.home / "in/here/local").read_bytes() == data[:1000]
        begun = asyncio.Event()
        script = "sleep 300 & echo $! >pid; echo begun; wait"
        slow = asyncio.ensure_future(connection.run(script, timeout=300, log=lambda _data: begun.set()))
        await begun.wait()
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert gone(int((machine.home / "pid").read_text()))


@pytest.mark.parametrize("of", LOGINS.values(), ids=list(LOGINS))
def test_any_login_will_do(login, tmp_path, of):
    asyncio.run(everything(login(**of), tmp_path))


def test_dropbear(login, tmp_path):
    asyncio.run(everything(login(Dropbear), tmp_path))


def test_a_machine_with_busybox_alone(login, tmp_path):
    """Its sh, setsid, sha256sum and date are of another make; coreutils' timeout(1) is none of them."""
    applets = tmp_path / "applets"
    applets.mkdir()
    busybox = which("busybox")
    assert busybox, "these tests need busybox"
    for name in ("sh", "cat", "date", "kill", "ls", "mkdir", "mv", "rm", "setsid", "sha256sum", "sleep",
                 "wc", "pwd", "printf"):  # fmt: skip
        (applets / name).symlink_to(busybox)
    asyncio.run(everything(login(environment={"PATH": str(applets)}, shell=BASH), tmp_path))


def test_what_a_machine_lacks_is_told_by_name(login, tmp_path):
    applets = tmp_path / "applets"
    applets.mkdir()
    for name in ("sh", "cat", "ls", "mkdir", "mv", "rm", "wc"):
        (applets / name).symlink_to(f"/bin/{name}" if name != "wc" else "/usr/bin/wc")
    machine = login(environment={"PATH": str(applets)}, shell=BASH)
    with pytest.raises(Unsupported, match=r"dev2: \w+ finds no setsid, sleep, sha256sum") as caught:
        asyncio.run(Connection.open(machine.endpoint()))
    assert "PATH" in caught.value.remedy


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ({"shell": "/usr/sbin/nologin"}, "runs no commands: it says: This account is currently not"),
        ({"shell": "/bin/false"}, "runs no commands"),
        ({"shell": "RBASH"}, "runs no commands: it says: .*restricted"),
        ({"shell": BASH, "options": ("ForceCommand echo only this",)}, "it says: only this"),
        ({"shell": BASH, "options": ("ForceCommand internal-sftp",)}, "runs no commands?"),
        ({"shell": BASH, "options": ("MaxSessions 0",)}, "opens no session"),
        ({"shell": BASH, "dotfiles": {".bashrc": "echo 'Who are you?'; while :; do read x; done\n"}},
         r"runs no command, and does not end: it says: Who are you\?"),
        ({"shell": BASH, "dotfiles": {".bashrc": "exec fish\n"}}, "runs no command, and does not end"),
    ],
    ids=["nologin", "false", "rbash", "forced", "sftp only", "no sessions", "asks for ever",
         "another shell"],
)  # fmt: skip
def test_a_login_that_runs_nothing_is_refused_in_words(login, tmp_path, monkeypatch, of, said):
    if of["shell"] == "RBASH":
        (tmp_path / "rbash").symlink_to(BASH)
        of = {**of, "shell": str(tmp_path / "rbash")}
    monkeypatch.setattr(shell, "START_SECONDS", 3.0)
    machine = login(**of)
    with pytest.raises(DriverFailed, match=f"^dev2: its (login|sshd) .*{said}") as caught:
        asyncio.run(Connection.open(machine.endpoint()))
    assert caught.value.remedy


@pytest.mark.parametrize("noise", ["yes", "yes >&2"])
def test_a_login_that_prints_without_end_is_not_listened_to(login, noise):
    machine = login(shell=BASH, dotfiles={".bashrc": f"{noise}\n"})
    with pytest.raises(DriverFailed, match=r"^dev2: its login prints without end: it says: y$"):
        asyncio.run(Connection.open(machine.endpoint()))


def test_a_login_that_has_ended_before_it_is_spoken_to(login, monkeypatch):
    """As on a busy host: what it said is told, not that the connection was lost."""
    real = shell._open

    async def slow(*arguments):
        opened = await real(*arguments)
        await asyncio.sleep(0.5)
        return opened

    monkeypatch.setattr(shell, "_open", slow)
    machine = login(shell="/usr/sbin/nologin")
    with pytest.raises(DriverFailed, match=r"^dev2: its login runs no commands: it says: "):
        asyncio.run(Connection.open(machine.endpoint()))


def test_a_date_that_knows_whole_seconds_only(login, tmp_path):
    """Asked for the time, and to set the clock; the machine's own is left alone."""
    applets = tmp_path / "applets"
    applets.mkdir()
    date = """#!/bin/sh
case "$*" in
    "+%s.%N") exec /bin/date +%s.%%N ;;
    *.*) echo "date: invalid date" >&2; exit 1 ;;
esac
echo "$*" > set
"""
    for name, text in {"date": date, "sudo": '#!/bin/sh\nshift\nexec "$@"\n'}.items():
        (applets / name).write_text(text)
        (applets / name).chmod(0o755)
    machine = login(environment={"PATH": f"{applets}:/usr/bin:/bin"}, shell=BASH)

    async def go():
        async with await Connection.open(machine.endpoint()) as connection:
            return await connection.facts(), await connection.set_clock()

    facts, left = asyncio.run(go())
    assert abs(facts.skew) < 2
    assert abs(left) < 2
    assert re.fullmatch(r"-u -s @\d+\n", (machine.home / "set").read_text())
