"""Signing by gpg(1), without a terminal.

While a signer is open, it has a home (GNUPGHOME) of its own in the runtime directory, with the keys that
it signs by and an agent that serves it alone. The admin's home is read, never written in, and an agent
that runs there isn't asked. A passphrase goes to our agent over its socket, and nowhere else.

The agent ends with the signer. If farmhand is killed, it ends by itself within a minute, and the next
signer removes the home."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from host.files import check_own_directory, file_error, own_directory, read_secret, remove, write_new
from host.paths import runtime_dir
from host.printable import last_line, one_line
from host.processes import end, is_there
from host.run import CommandResult, Runner
from inventory.errors import (
    FarmhandError,
    NoSpace,
    Remedy,
    TimedOut,
    Unsupported,
    UsageError,
    WrongState,
)
from repositories.signing.armour import PUBLIC_KEY, plain

TOOLS = {"gpg": "gpg", "gpg-agent": "gpg-agent", "gpgconf": "gpgconf"}
"""Commands that signing runs, each with its Debian package."""
SOON = timedelta(days=30)
"""So long before a key's end it is warned of."""

_LIMIT = 60  # seconds of one call of gpg; a slow machine needs 3 for a passphrase
_KEY_FILE = 2**20  # bytes
_PASSPHRASE = 255  # bytes: gpg-agent's own limit
_ROOM = 4 * 2**20  # bytes
_SOCKET_PATH = 107  # bytes, unix(7)
_FINGERPRINT = re.compile(r"[0-9A-F]{40}")
_GRIP = re.compile(r"[0-9A-F]{40}")
_HOME = re.compile(r"\.gpg\.([1-9]\d*)\.\w+")
_AGENT = """\
disable-scdaemon
extra-socket none
browser-socket none
allow-preset-passphrase
# A key from a file is locked anew in this home, by this count, and each signature unlocks it: the usual
# count takes 0.1 s and more. Whoever could read what lies here could ask the agent as well.
s2k-count 65536
"""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key to sign by. ``fingerprint``: the primary key's, 40 hex digits. ``home``: the GNUPGHOME that
    has its secret part; or ``file``: the exported secret key. ``passphrase_file``: its first line is
    the passphrase; None: the key has none."""

    fingerprint: str
    home: Path | None = None
    file: Path | None = None
    passphrase_file: Path | None = None

    @property
    def where(self) -> Path:
        place = self.home or self.file
        assert place
        return place


@dataclass(frozen=True, slots=True)
class _Part:
    """A primary key or a subkey, as a line of gpg's list has it (GnuPG's doc/DETAILS). ``secret``: "+"
    if its secret part is there; a card's number if it is on that. ``made``, ``ends``: seconds since the
    epoch; 0: it has no end."""

    fingerprint: str
    grip: str
    validity: str
    uses: str
    secret: str
    made: int
    ends: int


class GpgSigner:
    """Signs with all its keys at once, the first one first. What ``open_signer`` gives."""

    def __init__(self, gpg: _Gpg, keys: Sequence[tuple[SigningKey, _Part, int]]) -> None:
        self._gpg = gpg
        self._keys = tuple(keys)
        self._by = tuple(
            word for _, part, _ in keys for word in ("--local-user", f"{part.fingerprint}!")
        )
        minimal = ("--export-options", "export-minimal")
        self._public = gpg.run("--armor", *minimal, "--export", *self.fingerprints).stdout.encode()

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the primary keys."""
        return tuple(key.fingerprint for key, _, _ in self._keys)

    def detached(self, data: bytes) -> bytes:
        """An armoured detached signature."""
        return self._signed("--detach-sign", data)

    def clear(self, data: bytes) -> bytes:
        """The text (in UTF-8) with its signature in one (RFC 9580, 7)."""
        data.decode()  # what isn't text must not be signed as one
        return self._signed("--clear-sign", data)

    def public(self) -> bytes:
        """The public keys, armoured, in one block."""
        return self._public

    def public_binary(self) -> bytes:
        """The public keys as gpgv and apt's ``signed-by`` take them in a file named .gpg."""
        return plain(PUBLIC_KEY, self._public)

    def warnings(self, now: datetime | None = None) -> tuple[str, ...]:
        """Of keys that end within 30 days, a line each."""
        limit = ((now or datetime.now(UTC)) + SOON).timestamp()
        return tuple(
            f"the signing key {key.fingerprint} expires on {_day(ends)}, and clients then refuse "
            "what it signs: give it more time (gpg --quick-set-expire), or sign with another beside it"
            for key, _, ends in self._keys
            if 0 < ends <= limit
        )

    def _signed(self, how: str, data: bytes) -> bytes:
        result = self._gpg.run("--armor", *self._by, how, data=data)
        if result.status:
            raise WrongState(
                f"gpg could not sign with {' and '.join(self.fingerprints)}: {_reason(result)}",
                remedy="publish again; nothing was changed",
            )
        return result.stdout.encode()


@contextlib.contextmanager
def open_signer(keys: Sequence[SigningKey], runner: Runner) -> Iterator[GpgSigner]:
    """A signer, whose keys were each tried. FarmhandError where one can't sign or its end has come, and
    then nothing was changed. Not for threads side by side."""
    assert keys
    for key in keys:
        if not _FINGERPRINT.fullmatch(key.fingerprint):
            raise UsageError(
                f"{one_line(key.fingerprint, 60)!r} is no fingerprint of a signing key",
                remedy="give its 40 hex digits, as gpg --list-keys shows them",
            )
    with _own_home(runner) as home, _agent(home, runner) as agent:
        gpg = _Gpg(runner, home)
        found = []
        for key in keys:
            _bring(key, gpg)
            part, ends = _usable(key, gpg)
            if key.passphrase_file is not None:
                agent.passphrase(part.grip, _passphrase(key.passphrase_file))
            _try(key, part, gpg)
            found.append((key, part, ends))
        yield GpgSigner(gpg, found)


# ---- The home and its agent


@contextlib.contextmanager
def _own_home(runner: Runner) -> Iterator[Path]:
    top = runtime_dir()
    own_directory(top, mode=0o711)
    _sweep(top, runner)
    try:
        if shutil.disk_usage(top).free < _ROOM:
            raise NoSpace(
                f"no room for the home of gpg in {top}", remedy=f"make room on the file system of {top}"
            )
        home = Path(tempfile.mkdtemp(prefix=f".gpg.{os.getpid()}.", dir=top))
    except OSError as error:
        raise file_error(error, top / ".gpg", "make the directory") from error
    try:
        _write(home / "gpg-agent.conf", _AGENT.encode())
        yield home
    finally:
        _remove(home, runner)


def _sweep(top: Path, runner: Runner) -> None:
    """Remove the homes of signers that were killed; their agents see that, and end."""
    for path in top.glob(".gpg.*"):
        match = _HOME.fullmatch(path.name)
        if match and not is_there(int(match[1])):
            _remove(path, runner)


def _remove(home: Path, runner: Runner) -> None:
    """Where the user has a directory in /run/user, gpg makes one there for the home's sockets."""
    with contextlib.suppress(FarmhandError):  # not there: nor then are its sockets
        runner.read("gpgconf", "--homedir", home, "--remove-socketdir", timeout=_LIMIT, ok=range(256))
    remove(home)


class _SigningAgent:
    """A gpg-agent, asked over its socket (its own protocol: Assuan's manual, 2)."""

    def __init__(self, socket_path: Path) -> None:
        self._socket = socket_path
        self.pid = int(self._ask(b"GETINFO pid"))

    def passphrase(self, grip: str, passphrase: bytes) -> None:
        self._ask(b"PRESET_PASSPHRASE %s -1 %s" % (grip.encode(), passphrase.hex().encode()))

    def _ask(self, request: bytes) -> bytes:
        """WrongState, without a word of the request."""
        why = "it ended"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
                line.settimeout(_LIMIT)
                line.connect(str(self._socket))
                answers = line.makefile("rb")
                answers.readline()  # its greeting
                line.sendall(request + b"\n")
                data = b""
                for answer in answers:
                    if answer.startswith(b"D "):
                        data += answer[2:].rstrip(b"\n")
                    elif answer.startswith(b"OK"):
                        return data
                    elif answer.startswith(b"ERR"):
                        why = last_line(answer.decode(errors="replace"))
                        break
        except OSError as error:
            why = error.strerror or str(error)
        raise WrongState(
            f"our gpg-agent at {self._socket} does not do its part: {why}",
            remedy="see that gpg-agent --version works here, and try again",
        )


@contextlib.contextmanager
def _agent(home: Path, runner: Runner) -> Iterator[_SigningAgent]:
    place = _socket(home, runner)
    # It watches its child, cat, which ends with its input, however we end
    process = runner.talk("gpg-agent", "--homedir", home, "--quiet", "--daemon", "--", "cat")
    handle = -1
    try:
        assert process.stdin and process.stdout
        if not _echoes(process.stdin, process.stdout):
            process.kill()
            said = process.communicate()[1].decode(errors="replace")
            raise WrongState(
                f"gpg-agent does not start: {last_line(said, 200) or 'it says nothing'}",
                remedy="see that gpg-agent --version works here, and that the file system of "
                f"{home.parent} has room",
            )
        agent = _SigningAgent(place)
        handle = os.pidfd_open(agent.pid)
        yield agent
    finally:
        if handle >= 0:
            for how in (signal.SIGTERM, signal.SIGKILL):
                if end(handle, how, timeout=1):
                    break
            os.close(handle)
        process.kill()
        process.communicate()


def _socket(home: Path, runner: Runner) -> Path:
    """Where the home's agent listens. UsageError: its path is too long."""
    listed = runner.read("gpgconf", "--homedir", home, "--list-dirs", "agent-socket", timeout=_LIMIT)
    place = Path(listed.stdout.rstrip("\n"))
    too_long = len(os.fsencode(f"{place}.ssh")) - _SOCKET_PATH
    if too_long > 0:
        raise UsageError(
            f"{home.parent}: {too_long} bytes too long for the socket of a gpg-agent in it",
            remedy="set FARMHAND_RUNTIME_DIR to a shorter path",
        )
    return place


def _echoes(to: IO[bytes], back: IO[bytes]) -> bool:
    """Whether the child is there, and so the agent's socket."""
    try:
        to.write(b"\n")
        to.flush()
    except BrokenPipeError:
        return False
    return bool(select.select([back], [], [], _LIMIT)[0] and os.read(back.fileno(), 1))


@dataclass(frozen=True, slots=True)
class _Gpg:
    runner: Runner
    home: Path

    def run(self, *args: str | Path, data: bytes = b"", home: Path | None = None) -> CommandResult:
        """Any status; what went wrong is among its status lines."""
        started = time.monotonic()
        try:
            return self.runner.read(
                "gpg", "--homedir", home or self.home, "--batch", "--no-tty", "--no-options", "--quiet",
                "--no-autostart", "--no-auto-check-trustdb", "--trust-model", "always", "--lock-never",
                "--ignore-time-conflict", "--pinentry-mode", "loopback", "--digest-algo", "SHA512",
                "--status-fd", "2", *args,
                timeout=_LIMIT, ok=range(256), input=data,
            )  # fmt: skip
        except TimedOut:
            raise TimedOut(
                f"gpg did not end within {time.monotonic() - started:.0f} s, and was ended: {args[-1]}",
                remedy="see what this machine is busy with, and try again",
            ) from None


# ---- The keys


def _bring(key: SigningKey, gpg: _Gpg) -> None:
    """Put it into our home. FarmhandError."""
    if key.home is not None:
        _bring_from_home(key, key.home, gpg)
        return
    assert key.file
    secret = read_secret(key.file, "the signing key", _KEY_FILE)
    result = gpg.run("--import", data=secret)
    if not any(line[0] == "IMPORT_OK" for line in _status(result)):
        raise WrongState(
            f"{key.file} holds no OpenPGP key: {_reason(result)}",
            remedy=f"gpg --export-secret-keys {key.fingerprint} > FILE, mode 0600",
        )


def _bring_from_home(key: SigningKey, home: Path, gpg: _Gpg) -> None:
    check_own_directory(home)
    if not any((home / name).exists() for name in ("pubring.kbx", "pubring.gpg")):
        # gpg would make one
        raise WrongState(
            f"{home} is no home of gpg: it has no pubring.kbx",
            remedy="name the GNUPGHOME that has the key",
        )
    exported = gpg.run("--armor", "--export", key.fingerprint, home=home).stdout
    if not exported:
        raise _lacking(key, f"{home} has no key {key.fingerprint}")
    gpg.run("--import", data=exported.encode())
    for part in _parts(key, gpg):
        path = home / "private-keys-v1.d" / f"{part.grip}.key"
        if path.is_symlink() or path.exists():
            secret = read_secret(path, "the signing key", _KEY_FILE)
            _write(gpg.home / "private-keys-v1.d" / path.name, secret)


def _usable(key: SigningKey, gpg: _Gpg) -> tuple[_Part, int]:
    """The part to sign by: the newest that may, as gpg itself chooses; and when it or the key ends, 0:
    never. FarmhandError: there is none."""
    parts = _parts(key, gpg)
    if not parts:
        raise _lacking(key, f"{key.where} has no key {key.fingerprint}")
    primary = parts[0]
    if primary.fingerprint != key.fingerprint:
        raise UsageError(
            f"{key.fingerprint} is a subkey's fingerprint",
            remedy=f"give its key's: {primary.fingerprint}",
        )
    _refuse(key, primary, "the signing key")
    signing = sorted((part for part in parts if "s" in part.uses), key=lambda part: part.made)
    good = [part for part in signing if part.validity not in "reidn" and part.secret == "+"]  # noqa: S105
    if not good:
        for part in reversed(signing):
            _refuse(key, part, "the signing key's subkey" if part is not primary else "the signing key")
        if any(part.secret for part in signing):
            raise Unsupported(
                f"the signing key {key.fingerprint} is on a smart card, which may ask a terminal",
                remedy="make it a subkey for signing that lies in a file",
            )
        if signing:
            raise _lacking(
                key, f"{key.where} lacks the secret part of the signing key {key.fingerprint}"
            )
        raise _lacking(key, f"the key {key.fingerprint} is not made for signing")
    best = good[-1]
    return best, min((ends for ends in (primary.ends, best.ends) if ends), default=0)


def _refuse(key: SigningKey, part: _Part, called: str) -> None:
    called = f"{called} {part.fingerprint}"
    if part.validity == "r":
        raise WrongState(f"{called} was revoked: nothing is signed with it", remedy=_OTHER)
    if part.validity == "e":
        raise WrongState(
            f"{called} expired on {_day(part.ends)}: clients would refuse what it signs",
            remedy=f"give it more time (gpg --quick-set-expire {key.fingerprint} 2y), export it again, "
            "and let clients have its new public key; or sign with another one",
        )
    if part.made > time.time():
        raise WrongState(
            f"{called} was made on {_day(part.made)}, which is yet to come",
            remedy="see whether this machine's clock is right: date, timedatectl",
        )
    if part.validity in "idn" or "D" in part.uses:
        raise WrongState(f"{called} is invalid or disabled", remedy=_OTHER)


_OTHER = "sign with another key, and let clients have its public key"


def _try(key: SigningKey, part: _Part, gpg: _Gpg) -> None:
    """FarmhandError unless it signs."""
    result = gpg.run("--armor", "--local-user", f"{part.fingerprint}!", "--detach-sign")
    if result.status == 0:
        return
    asked = any(line[0] == "NEED_PASSPHRASE" for line in _status(result))
    remedy: Remedy = _OTHER
    if asked and key.passphrase_file is None:
        why = "it has a passphrase, and no passphrase file is named"
        remedy = "name a file with it (passphrase_file), mode 0600"
    elif asked:
        why = f"{key.passphrase_file} does not have its passphrase"
        remedy = "its first line must be the passphrase, and nothing else"
    else:
        why = _reason(result)
    raise WrongState(
        f"the signing key {key.fingerprint} of {key.where} does not sign: {why}", remedy=remedy
    )


def _lacking(key: SigningKey, what: str) -> FarmhandError:
    return WrongState(
        what,
        remedy=f"see gpg --homedir {shlex.quote(str(key.home))} --list-secret-keys"
        if key.home
        else f"gpg --export-secret-keys {key.fingerprint} > FILE, mode 0600",
    )


def _passphrase(path: Path) -> bytes:
    """The file's first line. WrongState."""
    line = read_secret(path, "the passphrase", 4096).split(b"\n")[0].removesuffix(b"\r")
    if not 0 < len(line) <= _PASSPHRASE:
        raise WrongState(f"{path} has no passphrase: its first line has {len(line)} bytes")
    return line


def _parts(key: SigningKey, gpg: _Gpg) -> list[_Part]:
    """The primary key, then its subkeys; empty if there is no such key."""
    listed = gpg.run("--with-colons", "--with-keygrip", "--with-secret", "--list-keys", key.fingerprint)
    parts, line = [], [""]
    fingerprint = ""
    for fields in (text.split(":") for text in listed.stdout.splitlines()):
        if fields[0] in ("pub", "sub"):
            line = fields
        elif fields[0] == "fpr":
            fingerprint = fields[9]
        elif fields[0] == "grp" and _GRIP.fullmatch(fields[9]):
            parts.append(
                _Part(
                    fingerprint, fields[9], line[1], line[11], line[14],
                    int(line[5] or 0), int(line[6] or 0),
                )
            )  # fmt: skip
    return parts


def _status(result: CommandResult) -> Iterator[list[str]]:
    """The words of gpg's status lines (GnuPG's doc/DETAILS)."""
    for line in result.stderr.splitlines():
        if line.startswith("[GNUPG:] "):
            yield line.split()[1:]


def _reason(result: CommandResult) -> str:
    said = [line for line in result.stderr.splitlines() if not line.startswith("[GNUPG:]")]
    return last_line("\n".join(said), 200).removeprefix("gpg: ") or f"gpg ends with {result.status}"


def _day(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(0o700, exist_ok=True)
        write_new(path, data, mode=0o600)
    except OSError as error:
        raise file_error(error, path, "write") from error
