"""Signing and its proof, by the real gpg and gpgv. No terminal is here, and no agent is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from host import processes
from host.run import Runner
from inventory.errors import CommandFailed, FarmhandError, TimedOut, Unfit, spelled
from repositories.signing import gpg as signing
from repositories.signing.armour import PUBLIC_KEY, SIGNATURE, armoured, plain
from repositories.signing.gpg import GpgSigner, SigningKey, open_signer
from repositories.signing.proof import ProvenText, prove_clear, prove_detached

ROOT = Path(__file__).resolve().parents[2]
TEXT = "Origin: café\n- a dash\n-----BEGIN x\nSuite: tested\n".encode()
RUN = Runner()


class Admin:
    """An admin's GNUPGHOME, with an agent of its own while keys are made."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700)
        (home / "gpg-agent.conf").write_text("s2k-count 65536\n")  # quick
        self.home = home

    def gpg(self, *args: str | Path, data: bytes = b"", passphrase: str = "") -> bytes:
        words = ("gpg", "--homedir", self.home, "--batch", "--no-tty", "--quiet", "--pinentry-mode")
        more = ("loopback", "--passphrase", passphrase)
        return subprocess.run([*words, *more, *args], input=data, capture_output=True, check=True).stdout

    def make(self, name: str, *, until: str = "never", passphrase: str = "", at: str = "") -> str:
        """Its fingerprint."""
        when = ("--faked-system-time", at) if at else ()
        uid = f"{name} <{name}@example.org>"
        self.gpg(*when, "--quick-gen-key", uid, "ed25519", "sign", until, passphrase=passphrase)
        return self.fingerprints(name)[0]

    def fingerprints(self, name: str) -> list[str]:
        lines = self.gpg("--with-colons", "--list-keys", name).decode().splitlines()
        return [line.split(":")[9] for line in lines if line.startswith("fpr")]

    def secret(self, fingerprint: str, file: Path, *more: str, passphrase: str = "") -> Path:
        export = ("--armor", "--export-secret-keys", *more, fingerprint)
        file.write_bytes(self.gpg(*export, passphrase=passphrase))
        file.chmod(0o600)
        return file

    def close(self) -> None:
        for how in ("all", "--remove-socketdir"):
            words = ("--kill", how) if how == "all" else (how,)
            subprocess.run(["gpgconf", "--homedir", self.home, *words], check=False)


@pytest.fixture(scope="module")
def admin() -> Iterator[Admin]:
    """Made once for all tests: they read it only."""
    with tempfile.TemporaryDirectory(prefix="fh") as place:
        made = Admin(Path(place, "home"))
        yield made
        made.close()


@pytest.fixture(scope="module")
def key(admin: Admin) -> SigningKey:
    return SigningKey(admin.make("first"), home=admin.home)


@pytest.fixture(scope="module")
def locked(admin: Admin) -> SigningKey:
    """With a passphrase, in files."""
    found = admin.make("second", passphrase="open sesame")
    admin.close()  # it knows the passphrase
    place = admin.home.parent
    file = admin.secret(found, place / "second.asc", passphrase="open sesame")
    word = place / "passphrase"
    word.write_text("open sesame\n")
    word.chmod(0o600)
    return SigningKey(found, file=file, passphrase_file=word)


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where signers have their homes: nothing is left of them."""
    with tempfile.TemporaryDirectory(prefix="fh") as place:
        monkeypatch.setenv("FARMHAND_RUNTIME_DIR", place)
        yield Path(place)
        assert agents(place) == []
        assert list(Path(place).iterdir()) == []


def agents(place: str) -> list[int]:
    found = []
    for pid in processes.pids():
        with suppress(OSError):
            words = processes.command_line(pid)
            if words[:1] == ("gpg-agent",) and any(place in word for word in words):
                found.append(pid)
    return found


def refused(*keys: SigningKey) -> tuple[str, str]:
    """What is said of keys that can't sign, and what to do."""
    with pytest.raises(FarmhandError) as caught, open_signer(keys, RUN):
        pytest.fail("it is open")
    assert "\n" not in caught.value.message
    return caught.value.message, spelled(caught.value.remedy)


def contents(place: Path) -> dict[Path, object]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_mode) for p in (place, *place.rglob("*"))}


def signs(signer: GpgSigner) -> None:
    proof = ProvenText(TEXT, signer.fingerprints)
    for keys in (signer.public(), signer.public_binary()):
        assert prove_detached(TEXT, signer.detached(TEXT), keys, RUN) == proof
        assert prove_clear(signer.clear(TEXT), keys, RUN) == proof


def test_a_key_of_a_home_signs_and_the_home_is_left_alone(key: SigningKey, admin: Admin) -> None:
    admin.close()
    before = contents(admin.home)
    with open_signer([key], RUN) as signer:
        assert signer.fingerprints == (key.fingerprint,)
        assert signer.warnings() == ()
        signs(signer)
        detached = signer.detached(TEXT)
        assert detached.startswith(b"-----BEGIN PGP SIGNATURE-----\n")
        assert b"\nHash: SHA512\n" in signer.clear(TEXT)
    assert contents(admin.home) == before


def test_an_agent_of_the_admin_s_stays(key: SigningKey, admin: Admin) -> None:
    admin.gpg("--list-secret-keys")
    before = agents(str(admin.home))
    assert before
    with open_signer([key], RUN) as signer:
        signs(signer)
    assert agents(str(admin.home)) == before


def test_two_keys_sign_at_once_and_clients_of_either_are_content(
    key: SigningKey, locked: SigningKey, admin: Admin
) -> None:
    both = (key.fingerprint, locked.fingerprint)
    with open_signer([key, locked], RUN) as signer:
        signs(signer)
        detached, clear = signer.detached(TEXT), signer.clear(TEXT)
        assert plain(PUBLIC_KEY, signer.public()) == signer.public_binary()
    for each in both:
        public = admin.gpg("--export", each)
        assert prove_detached(TEXT, detached, public, RUN) == ProvenText(TEXT, (each,))
        assert prove_clear(clear, public, RUN) == ProvenText(TEXT, (each,))
    with open_signer([locked, key], RUN) as signer:
        signs(signer)
        assert signer.fingerprints == both[::-1]


def test_two_passphrases(admin: Admin, locked: SigningKey, tmp_path: Path) -> None:
    word = "ßchlüssel  with blanks "
    other = admin.make("third", passphrase=word)
    admin.close()
    (tmp_path / "word").write_text(f"{word}\nand a line that isn't of it\n")
    (tmp_path / "word").chmod(0o600)
    in_home = SigningKey(other, home=admin.home, passphrase_file=tmp_path / "word")
    with open_signer([locked, in_home], RUN) as signer:
        signs(signer)


def test_the_newest_subkey_with_its_secret_signs(admin: Admin, tmp_path: Path) -> None:
    primary = admin.make("with-subkeys")
    admin.gpg("--quick-add-key", primary, "ed25519", "sign", "1y")
    alone = admin.secret(f"{admin.fingerprints('with-subkeys')[1]}!", tmp_path / "k")
    # The primary key's secret part stays at home, as it should
    alone.write_bytes(admin.gpg("--armor", "--export-secret-subkeys", primary))
    key = SigningKey(primary, file=alone)
    with open_signer([key], RUN) as signer:
        signs(signer)
        assert signer.warnings() == ()
        (warned,) = signer.warnings(datetime.now(UTC) + timedelta(days=340))
        assert primary in warned
    subkey = SigningKey(admin.fingerprints("with-subkeys")[1], file=alone)
    assert "is a subkey's fingerprint" in refused(subkey)[0]
    assert primary in refused(subkey)[1]


def test_secrets_are_in_no_argument_and_no_environment(
    locked: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program that is started writes down what it was given."""
    seen = tmp_path / "seen"
    for tool in ("gpg", "gpg-agent"):
        script = tmp_path / tool
        script.write_text(
            f"#!/bin/sh\n(tr '\\0' ' ' </proc/$$/cmdline; env) >>{seen}\n"
            f'exec {shutil.which(tool)} "$@"\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with open_signer([locked], RUN) as signer:
        signs(signer)
    text = seen.read_text()
    assert "--detach-sign" in text and "--daemon" in text
    assert "sesame" not in text and "PRIVATE" not in text


# ---- What can't sign


@pytest.mark.parametrize("kind", ["home", "file"])
def test_an_expired_key(admin: Admin, kind: str, tmp_path: Path) -> None:
    old = admin.make(f"old-{kind}", until="2021-01-01", at="20200101T000000")
    place = {"home": admin.home} if kind == "home" else {"file": admin.secret(old, tmp_path / "k")}
    message, remedy = refused(SigningKey(old, **place))
    assert message == (
        f"the signing key {old} expired on 2021-01-01: clients would refuse what it signs"
    )
    assert f"gpg --quick-set-expire {old} 2y" in remedy


def test_an_expired_subkey_and_one_that_was_revoked(admin: Admin) -> None:
    primary = admin.make("certifies", at="20200101T000000")
    admin.gpg("--quick-add-key", primary, "ed25519", "auth")  # makes no difference
    key = SigningKey(primary, home=admin.home)
    old = ("--faked-system-time", "20200101T000000")
    admin.gpg(*old, "--quick-add-key", primary, "ed25519", "sign", "2021-01-01")
    with open_signer([key], RUN) as signer:  # the primary one may, too
        signs(signer)
    revocation = (admin.home / "openpgp-revocs.d" / f"{primary}.rev").read_bytes()
    admin.gpg("--import", data=revocation.replace(b":-----", b"-----"))
    assert refused(key)[0] == f"the signing key {primary} was revoked: nothing is signed with it"


def test_only_the_subkey_signs_and_it_expired(admin: Admin) -> None:
    at = ("--faked-system-time", "20200101T000000")
    admin.gpg(*at, "--quick-gen-key", "only <only@example.org>", "ed25519", "cert", "never")
    primary = admin.fingerprints("only@example.org")[0]
    key = SigningKey(primary, home=admin.home)
    assert f"the key {primary} is not made for signing" in refused(key)[0]
    admin.gpg(*at, "--quick-add-key", primary, "ed25519", "sign", "2021-01-01")
    message, remedy = refused(key)
    assert "the signing key's subkey" in message and "expired on 2021-01-01" in message
    assert "gpg --quick-set-expire" in remedy


def test_an_end_within_30_days_is_warned_of(admin: Admin, key: SigningKey) -> None:
    ends = admin.make("ends", until="20d")
    later = admin.make("later", until="40d")
    keys = [SigningKey(each, home=admin.home) for each in (ends, later)]
    with open_signer([key, *keys], RUN) as signer:
        (warned,) = signer.warnings()
        day = datetime.now(UTC) + timedelta(days=20)
        assert ends in warned and f"{day:%Y-%m-%d}" in warned
        assert len(signer.warnings(datetime.now(UTC) + timedelta(days=11))) == 2


def test_a_key_of_a_day_to_come(admin: Admin) -> None:
    day = datetime.now(UTC) + timedelta(days=400)
    ahead = admin.make("ahead", at=f"{day:%Y%m%dT%H%M%S}")
    message, remedy = refused(SigningKey(ahead, home=admin.home))
    assert f"was made on {day:%Y-%m-%d}, which is yet to come" in message
    assert "clock" in remedy


def test_keys_without_their_secret_part(
    admin: Admin, key: SigningKey, locked: SigningKey, tmp_path: Path
) -> None:
    public = tmp_path / "public"
    public.write_bytes(admin.gpg("--armor", "--export", key.fingerprint))
    public.chmod(0o600)
    message, remedy = refused(SigningKey(key.fingerprint, file=public))
    assert message == f"{public} lacks the secret part of the signing key {key.fingerprint}"
    assert remedy == f"gpg --export-secret-keys {key.fingerprint} > FILE, mode 0600"
    # Another key's file; and a home that doesn't have it
    assert refused(SigningKey(key.fingerprint, file=locked.file))[0] == (
        f"{locked.file} has no key {key.fingerprint}"
    )
    none = "A" * 40
    message, remedy = refused(SigningKey(none, home=admin.home))
    assert message == f"{admin.home} has no key {none}"
    assert remedy == f"see gpg --homedir {admin.home} --list-secret-keys"


def test_passphrases_that_do_not_fit(locked: SigningKey, admin: Admin, tmp_path: Path) -> None:
    fingerprint, file = locked.fingerprint, locked.file
    for place in ({"file": file}, {"home": admin.home}):
        message, remedy = refused(SigningKey(fingerprint, **place))
        assert "it has a passphrase, and no passphrase file is named" in message
        assert "passphrase_file" in remedy
    word = tmp_path / "word"
    key = SigningKey(fingerprint, file=file, passphrase_file=word)
    assert refused(key)[0] == f"cannot read the passphrase {word}: No such file or directory"
    word.touch(mode=0o600)
    for content, said in (
        (b"wrong\n", f"{word} does not have its passphrase"),
        (b"open sesame\r\r\n", "does not have its passphrase"),
        (b"", "its first line has 0 bytes"),
        (b"x" * 256, "its first line has 256 bytes"),
        (b"x" * 5000, "more than 4096 bytes"),
    ):
        word.write_bytes(content)
        assert said in refused(key)[0]
    word.write_bytes(b"open sesame\r\n")
    with open_signer([key], RUN) as signer:
        signs(signer)
    word.chmod(0o640)
    message, remedy = refused(key)
    assert message == f"{word}: others may read or change the passphrase (mode 0640)"
    assert remedy == f"chmod 600 {word}"


def test_files_that_are_no_secret_of_ours(
    key: SigningKey, locked: SigningKey, admin: Admin, tmp_path: Path
) -> None:
    assert locked.file
    content = locked.file.read_bytes()
    file = tmp_path / "k"

    def said() -> str:
        return refused(SigningKey(locked.fingerprint, file=file))[0]

    assert said() == f"cannot read the signing key {file}: No such file or directory"
    file.symlink_to(locked.file)
    assert "is a symbolic link" in said()
    file.unlink()
    os.mkfifo(file, 0o600)
    assert "is a FIFO" in said()
    file.unlink()
    file.mkdir()
    assert "is a directory" in said()
    file.rmdir()
    os.link(locked.file, file)
    assert "another name" in said()
    file.unlink()
    file.write_bytes(content)
    file.chmod(0o644)
    assert "others may read or change the signing key (mode 0644)" in said()
    file.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(file, 65534, -1)
        assert "belongs to nobody, and we are root" in said()
        os.chown(file, 0, -1)
    # Damaged and hostile
    for bad in (b"", b"\0" * 1000, os.urandom(5000), content[:300], b"\xff" * 2**20,
                b"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n" + b"A" * 10000, b"\n" * 2**20):  # fmt: skip
        file.write_bytes(bad)
        assert f"{file} holds no OpenPGP key" in said()
    file.write_bytes(content[: len(content) // 2] + b"!" + content[len(content) // 2 :])
    assert str(file) in said()
    file.write_bytes(b"x" * (2**20 + 1))
    assert "more than 1048576 bytes" in said()
    # Many keys in one file: the one that is named
    file.write_bytes(admin.gpg("--export-secret-keys", key.fingerprint) + plain_secret(content))
    with open_signer([SigningKey(key.fingerprint, file=file)], RUN) as signer:
        signs(signer)
        assert signer.public_binary() == admin.gpg(
            "--export-options", "export-minimal", "--export", key.fingerprint
        )


def plain_secret(content: bytes) -> bytes:
    return plain("PRIVATE KEY BLOCK", content)


def test_homes_that_are_no_home_of_ours(key: SigningKey, admin: Admin, tmp_path: Path) -> None:
    home = tmp_path / "home"

    def said() -> str:
        return refused(SigningKey(key.fingerprint, home=home))[0]

    assert "it has no pubring.kbx" in said()
    home.mkdir(mode=0o700)
    assert "it has no pubring.kbx" in said()
    assert list(home.iterdir()) == []  # gpg would have made one
    home.rmdir()
    shutil.copytree(admin.home, home, ignore=shutil.ignore_patterns("S.*"))
    with open_signer([SigningKey(key.fingerprint, home=home)], RUN) as signer:
        signs(signer)
    home.chmod(0o770)
    assert "others may write" in said()
    home.chmod(0o700)
    for file in (home / "private-keys-v1.d").iterdir():
        file.chmod(0o640)
    assert "others may read or change the signing key" in said()
    for file in (home / "private-keys-v1.d").iterdir():
        file.unlink()
        file.symlink_to("/dev/null")
    assert "is a symbolic link" in said()
    (home / "pubring.kbx").write_bytes(b"\0" * 5000)
    assert f"{home} has no key" in said()
    if os.geteuid() == 0:
        link = tmp_path / "link"
        link.symlink_to(admin.home)
        with open_signer([SigningKey(key.fingerprint, home=link)], RUN) as signer:
            signs(signer)
        os.chown(link, 65534, -1, follow_symlinks=False)
        message, _ = refused(SigningKey(key.fingerprint, home=link))
        assert "is a link that nobody made" in message


@pytest.mark.parametrize("text", ["", "first", "-A", "a" * 40, "A" * 39 + "\n", "A" * 64, "\x1b[2J"])
def test_what_is_no_fingerprint(text: str, admin: Admin) -> None:
    message, _ = refused(SigningKey(text, home=admin.home))
    assert "is no fingerprint of a signing key" in message and message.isprintable()


# ---- The machine


@pytest.mark.parametrize("tool", ["gpg", "gpg-agent", "gpgconf", "gpgv"])
def test_a_tool_that_is_not_there(
    tool: str, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_signer([key], RUN) as signer:
        signature, public = signer.detached(TEXT), signer.public()
    for name in {"gpg", "gpg-agent", "gpgv", "gpgconf", "cat"} - {tool}:
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandFailed, match=f"cannot run {tool}: No such file") as caught:
        if tool == "gpgv":
            prove_detached(TEXT, signature, public, RUN)
        else:
            with open_signer([key], RUN):
                pass
    assert "doctor" in spelled(caught.value.remedy)


def test_an_agent_that_hangs(key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_signer([key], RUN) as signer:
        (pid,) = agents(os.environ["FARMHAND_RUNTIME_DIR"])
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(signing, "_LIMIT", 0.5)
        with pytest.raises(TimedOut, match="gpg did not end within") as caught:
            signer.detached(TEXT)
        assert "\n" not in caught.value.message


def test_an_agent_that_was_ended(key: SigningKey) -> None:
    with open_signer([key], RUN) as signer:
        (pid,) = agents(os.environ["FARMHAND_RUNTIME_DIR"])
        handle = os.pidfd_open(pid)
        processes.end(handle, signal.SIGKILL, timeout=10)
        os.close(handle)
        with pytest.raises(FarmhandError, match="gpg could not sign with") as caught:
            signer.clear(TEXT)
        assert "nothing was changed" in spelled(caught.value.remedy)


def test_an_agent_that_does_not_start(
    key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpg-agent").write_text("#!/bin/sh\necho 'gpg-agent: no room' >&2; exit 2\n")
    (tmp_path / "gpg-agent").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert refused(key)[0] == "gpg-agent does not start: gpg-agent: no room"


KILLED = """
import os, sys
from pathlib import Path
from host.run import Runner
from repositories.signing.gpg import SigningKey, open_signer
with open_signer([SigningKey(sys.argv[1], home=Path(sys.argv[2]))], Runner()):
    os.kill(os.getpid(), 9)
"""


def test_a_killed_signer_leaves_nothing_that_the_next_does_not_end(
    key: SigningKey, runtime: Path
) -> None:
    argv = [sys.executable, "-c", KILLED, key.fingerprint, str(key.home)]
    assert subprocess.run(argv, cwd=ROOT, check=False).returncode == -9
    (left,) = agents(str(runtime))
    assert len(list(runtime.iterdir())) == 1
    with open_signer([key], RUN) as signer, open_signer([key], RUN) as other:  # side by side, too
        assert len(list(runtime.iterdir())) == 2
        signs(signer)
        signs(other)
    until = time.monotonic() + 60
    while processes.started(left) and time.monotonic() < until:
        time.sleep(0.02)
    assert not processes.started(left)


OPENED = """
import sys
from pathlib import Path
from host.run import Runner
from inventory.errors import FarmhandError, spelled
from repositories.signing.gpg import SigningKey, open_signer
try:
    with open_signer([SigningKey(sys.argv[1], home=Path(sys.argv[2]))], Runner()) as signer:
        print(len(signer.detached(b"x")) > 100)
except FarmhandError as error:
    print(type(error).__name__, error.message, "|", spelled(error.remedy))
"""


def opened_elsewhere(key: SigningKey, place: str, prepare: str) -> str:
    """What comes of it in a mount namespace of its own, after that script."""
    script = f'{prepare}\n"$2" -c "$3" "$4" "$5"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-eu", "-c", script,
         "sh", place, sys.executable, OPENED, key.fingerprint, str(key.home)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "FARMHAND_RUNTIME_DIR": place},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kilobytes", [0, 8])
def test_a_full_disk(kilobytes: int, key: SigningKey) -> None:
    """On a real tmpfs with so much room."""
    with tempfile.TemporaryDirectory(prefix="fh") as place:
        said = opened_elsewhere(
            key,
            place,
            'mount -t tmpfs -o size=64k,mode=700 none "$1"\n'
            f'dd if=/dev/zero of="$1/x" bs=1k count={64 - kilobytes} 2>/dev/null',
        )
    room = f"make room on the file system of {place}"
    assert said == f"NoSpace no room for the home of gpg in {place} | {room}\n"


def test_gpg_s_sockets_lie_in_the_home_or_below_run_user(key: SigningKey) -> None:
    """By where the user has a directory of the login's; nothing is left there."""
    bare = 'mount -t tmpfs none /run\nmount -t tmpfs -o mode=700 none "$1"\n'
    login = bare + "mkdir -p -m 700 /run/user/0\n"
    look = "trap 'find /run/user/0/gnupg/* >&2 2>/dev/null && exit 1 || exit 0' EXIT\n"
    long = 'mkdir -m 700 "$1/' + "x" * 90 + '"\nexport FARMHAND_RUNTIME_DIR="$1/' + "x" * 90 + '"\n'
    with tempfile.TemporaryDirectory(prefix="fh") as place:
        for prepare in (bare, login, login + long):
            assert opened_elsewhere(key, place, prepare + look) == "True\n"
        said = opened_elsewhere(key, place, bare + long)
    assert "bytes too long for the socket of a gpg-agent in it | set FARMHAND_RUNTIME_DIR" in said


# ---- ProvenText


@pytest.fixture(scope="module")
def signed(key: SigningKey) -> tuple[bytes, bytes, bytes]:
    """Detached, clear, and the public key."""
    with tempfile.TemporaryDirectory(prefix="fh") as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FARMHAND_RUNTIME_DIR", place)
        with open_signer([key], RUN) as signer:
            return signer.detached(TEXT), signer.clear(TEXT), signer.public()


def test_changed_text_is_no_proof(signed: tuple[bytes, bytes, bytes], admin: Admin) -> None:
    detached, clear, public = signed
    with pytest.raises(Unfit, match="it was changed after it was signed"):
        prove_detached(TEXT + b"x", detached, public, RUN)
    with pytest.raises(Unfit, match="it was changed after it was signed"):
        prove_clear(clear.replace(b"tested", b"evil"), public, RUN)
    other = admin.gpg("--export", admin.make("other"))
    for proved in (
        lambda: prove_detached(TEXT, detached, other, RUN),
        lambda: prove_clear(clear, other, RUN),
    ):
        with pytest.raises(Unfit, match="which is none of the keys"):
            proved()


@pytest.mark.parametrize("junk", [b"", b"x", b"\0" * 1000, b"-----BEGIN PGP SIGNATURE-----\n", TEXT])
def test_what_is_no_signature_is_no_proof(junk: bytes, signed: tuple[bytes, bytes, bytes]) -> None:
    with pytest.raises(Unfit) as caught:
        prove_detached(TEXT, junk, signed[2], RUN)
    assert "\n" not in caught.value.message
    with pytest.raises(Unfit):
        prove_clear(junk, signed[2], RUN)
    with pytest.raises(Unfit):
        prove_detached(TEXT, signed[0], junk, RUN)


def test_text_around_the_signed_text_is_not_believed(
    signed: tuple[bytes, bytes, bytes], key: SigningKey, admin: Admin
) -> None:
    _, clear, public = signed
    evil = b"Suite: evil\n\n"
    more = b"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\nSuite: evil\n"
    for text in (evil + clear, clear + evil, clear + clear, more + clear, clear + more):
        with pytest.raises(Unfit, match=r"not signed|more in it than one"):
            prove_clear(text, public, RUN)
    # Nor a message of another kind
    message = admin.gpg("--armor", "--local-user", key.fingerprint, "--sign", data=TEXT)
    with pytest.raises(Unfit, match="it is not signed"):
        prove_clear(message, public, RUN)
    # Headers that nobody signed, in front of the text
    crafted = clear.replace(b"Hash: SHA512\n", b"Hash: SHA512\nSuite: evil\n")
    with pytest.raises(Unfit):
        assert prove_clear(crafted, public, RUN).text == TEXT
        raise Unfit("gpgv took it, and the text is the signed one")


def test_signatures_of_keys_whose_time_is_over(admin: Admin) -> None:
    was = ("--faked-system-time", "20200601T000000")
    old = admin.make("over", until="2021-01-01", at="20200101T000000")
    signature = admin.gpg(*was, "--local-user", old, "--detach-sign", data=TEXT)
    public = admin.gpg("--export", old)
    assert prove_detached(TEXT, signature, public, RUN) == ProvenText(TEXT, (), (old,))
    bad = admin.make("bad")
    signature = admin.gpg("--local-user", bad, "--detach-sign", data=TEXT)
    revocation = (admin.home / "openpgp-revocs.d" / f"{bad}.rev").read_bytes()
    admin.gpg("--import", data=revocation.replace(b":-----", b"-----"))
    with pytest.raises(Unfit, match=f"it is signed by {bad}, which was revoked"):
        prove_detached(TEXT, signature, admin.gpg("--export", bad), RUN)


def test_weak_sums_are_no_proof(key: SigningKey, admin: Admin) -> None:
    weak = admin.gpg(
        "--digest-algo", "SHA1", "--local-user", key.fingerprint, "--detach-sign", data=TEXT
    )
    with pytest.raises(Unfit):
        prove_detached(TEXT, weak, admin.gpg("--export", key.fingerprint), RUN)


# ---- Armour


def test_armour_is_as_gpg_has_it(signed: tuple[bytes, bytes, bytes], key: SigningKey) -> None:
    detached, _, public = signed
    assert armoured(SIGNATURE, plain(SIGNATURE, detached)) == detached
    assert armoured(PUBLIC_KEY, plain(PUBLIC_KEY, public)) == public


def test_armour_is_read_strictly(signed: tuple[bytes, bytes, bytes]) -> None:
    one = signed[0]
    packets = plain(SIGNATURE, one)
    assert plain(SIGNATURE, one + one) == packets * 2
    head = b"SIGNATURE-----\r\n"
    assert (
        plain(SIGNATURE, one.replace(b"\n", b"\r\n").replace(head, head + b"Comment: x\r\n", 1))
        == packets
    )
    no_sum = b"\n".join(line for line in one.split(b"\n") if not line.startswith(b"="))
    assert plain(SIGNATURE, no_sum) == packets  # it is optional (RFC 9580, 6.1)
    begin = b"-----BEGIN PGP SIGNATURE-----\n\n"
    for bad in (b"x", one[:-10], one.replace(b"SIGNATURE", b"MESSAGE"), one + b"x", b"x" + one,
                one.replace(b"\n=", b"AAAA\n=", 1), begin * 9, begin + b"\n" * 200000,
                begin + b"A" * 200000):  # fmt: skip
        with pytest.raises(Unfit):
            plain(SIGNATURE, bad)
    with pytest.raises(Unfit):
        plain(PUBLIC_KEY, one)
