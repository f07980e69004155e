"""fetch: a file from a web address, whose content is known beforehand, brought to a VM.

curl(1) does the talking: it knows http, TLS, proxies and redirects, gives up where nothing comes any
more, and says how it ended by its status. What it brings is counted and summed here as it comes, and
kept in the cache, by its sha256. WebDAV needs nothing more: its GET is that of http (RFC 4918, 9.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import unquote, urlsplit

from builds.step_kind import StepKind
from inventory.base import at_key, quote
from inventory.sizes import format_duration, format_size

if TYPE_CHECKING:
    from builds.step_run import StepFailed, StepRun
    from inventory.fields import FilePath, Label, Line, Size
    from provision.site import Site

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")  # a line of sha256sum(1)
_ADDRESS = re.compile(r"https?://[!-~]+")
_MODE = re.compile(r"[0-7]{3,4}")
_OWNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_SMALL = 2**20  # bytes: of a sum file, of a signature
_BLOCK = 2**20
_REDIRECTS = 5
_CONNECT = 30  # seconds
_SLOW, _PATIENCE = 1024, 60
"""Given up where fewer bytes a second came, for so many seconds."""

# Of curl(1), EXIT CODES.
_REFUSED, _HTTP, _LOOP, _TOO_BIG = 1, 22, 47, 63


@dataclass(frozen=True, kw_only=True)
class FetchStep(StepKind):
    """Fetch a file from a web or WebDAV address, and bring it to a VM. What it must hold is known: by
    its `sha256`, or by a signed sum file."""

    KIND: ClassVar = "fetch"
    VMS: ClassVar = ("to",)
    TOOLS: ClassVar = ("curl", "gpgv")

    fetch: Line
    """The file's address: http or https, without a login in it."""
    to: Label
    """The VM."""
    path: Line
    """What it is called there: a path, relative to the login's home or absolute. Its directory is made
    if it is missing."""
    sha256: Line | None = None
    """The file's sum."""
    sums: Line | None = None
    """In place of `sha256`: the address of a sum file, as `sha256sum` makes it, that names the file."""
    signature: Line | None = None
    """The address of the sum file's detached signature."""
    keyring: FilePath | None = None
    """A file of public keys, not armoured (`gpg --export`), one of which must have signed the sums."""
    max_size: Size = 2**30
    """No more than that is taken."""
    mode: Line = "0644"
    """Its permissions in the VM."""
    owner: Line | None = None
    """Its owner in the VM, `user` or `user:group`; absent: the login."""
    netrc: FilePath | None = None
    """A file of logins, as netrc(5) has it, that nobody else may read."""
    login: Line | None = None
    """The name of an environment variable of farmhand's with `user:password`, or a token. It goes to the
    host of `fetch` alone."""

    def __post_init__(self) -> None:
        for key in ("fetch", "sums", "signature"):
            address = getattr(self, key)
            if address is not None:
                _check_address(key, address)
        if (self.sha256 is None) == (self.sums is None):
            text = "a file is known by its 'sha256' or by 'sums', one of them"
            raise at_key("", text, "sha256", "sums")
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise at_key("sha256", f"{quote(self.sha256)} is not 64 digits of 0-9 and a-f")
        for key in ("signature", "keyring"):
            if (getattr(self, key) is None) != (self.sums is None):
                raise at_key("", "'sums', 'signature' and 'keyring' belong together", "sums", key)
        if self.path.rpartition("/")[2] in ("", ".", ".."):
            raise at_key("path", f"{quote(self.path)} ends without the file's name")
        if not _MODE.fullmatch(self.mode):
            raise at_key("mode", f"{quote(self.mode)} is not a mode such as 0644")
        if self.owner is not None and not _OWNER.fullmatch(self.owner):
            raise at_key("owner", f"{quote(self.owner)} is not a user, or user:group")
        if self.login is not None and not _VARIABLE.fullmatch(self.login):
            raise at_key("login", "this is not the name of an environment variable")

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.login,) if self.login else ()

    @property
    def _name(self) -> str:
        """As a sum file has it."""
        return unquote(urlsplit(self.fetch).path).rpartition("/")[2]

    def does(self) -> str:
        known = f"sha256 {self.sha256[:12]}" if self.sha256 else f"signed by a key of {self.keyring}"
        limit = f"{format_size(self.max_size)} and {format_duration(self.timeout)}"
        return f"fetch {_shown(self.fetch)}, {known}, to {self.to}:{self.path}, at most {limit}"

    def details(self) -> Mapping[str, str]:
        owner = f", owner {self.owner}" if self.owner else ""
        return {"from": _shown(self.fetch), "path": f"{self.path}, mode {self.mode}{owner}"}

    def check(self, site: Site) -> None:
        """That the files that it reads here are there, and its login."""
        import os

        from inventory.errors import NotFound, WrongState

        keyring = self._keyring(site)
        if keyring is not None and not (os.access(keyring, os.R_OK) and keyring.is_file()):
            raise NotFound(
                f"{site.name}: step {self.name}: keyring: there is no file {keyring} that can be read"
            )
        self._checked_netrc(site)
        if self.login is not None and not os.environ.get(self.login, "").isprintable():
            raise WrongState(f"{site.name}: step {self.name}: {self.login} has control characters")
        if self.login is not None and not os.environ.get(self.login):
            raise NotFound(
                f"{site.name}: step {self.name}: its login is in no environment variable {self.login}",
                remedy=f"export {self.login}=user:password, or a token",
            )

    async def carry_out(self, work: StepRun) -> None:
        sha256 = self.sha256 or await self._signed_sum(work)
        file = await self._cached(work, sha256)
        connection = await work.machines.connection(self.to)
        ready = [f"chmod {self.mode} --"]
        if self.owner:
            ready.append(f"chown {self.owner} --")
        with work.meter.guest():
            moved = await connection.put_file(file, self.path, sha256=sha256, ready=ready)
        work.log.say(f"{self.to}:{self.path}: {format_size(moved.size)}, sha256 {sha256}")
        work.keep(moved, vm=self.to, path=self.path, flow="in")

    # -- the cache ----------------------------------------------------------------------------

    async def _cached(self, work: StepRun, sha256: str) -> Path:
        """The file with that content, fetched unless it is in the cache."""
        import hashlib
        import os
        import threading

        from host.files import file_error, open_new, own_directory, sweep, sync
        from host.paths import cache_dir
        from provision.guest.ssh_connection import in_thread

        home = cache_dir() / "fetched"
        place = home / sha256
        found = await in_thread(lambda: _sum_of(place))
        if found == sha256:
            if place.stat().st_size > self.max_size:
                raise self._too_big(self.fetch, self.max_size)
            work.log.say(f"{_shown(self.fetch)} is in the cache")
            work.details["cache"] = "it was there"
            return place
        if found:
            work.log.say(f"{place} is damaged: it is fetched again")
        own_directory(home, mode=0o711)
        sweep(home)
        part = home / f".{sha256}.{os.getpid()}.{threading.get_ident()}"
        digest = hashlib.sha256()
        try:
            with open_new(part, mode=0o600 if self.netrc or self.login else 0o644) as file:

                def write(data: bytes) -> None:
                    digest.update(data)
                    file.write(data)

                await self._get(work, self.fetch, self.max_size, write)
                if digest.hexdigest() != sha256:
                    raise _failed(
                        f"{_shown(self.fetch)} has sha256 {digest.hexdigest()}, not {sha256}",
                        remedy="see whether the address or the sum in the farm file is an old one"
                        if self.sha256
                        else "it is another file than the one that was signed",
                    )
                file.flush()
                os.fsync(file.fileno())
            part.replace(place)
            sync(home)
        except OSError as error:
            raise file_error(error, place, "write") from error
        finally:
            part.unlink(missing_ok=True)
        return place

    # -- the signed sum file ------------------------------------------------------------------

    async def _signed_sum(self, work: StepRun) -> str:
        from tempfile import TemporaryDirectory

        from provision.guest.ssh_connection import in_thread

        keyring = self._keyring(work.site)
        assert self.sums and self.signature and keyring
        sums, signature = bytearray(), bytearray()
        await self._get(work, self.sums, _SMALL, sums.extend)
        await self._get(work, self.signature, _SMALL, signature.extend)
        with TemporaryDirectory(prefix="farmhand-") as directory:
            files = Path(directory, "signature"), Path(directory, "sums")
            for file, data in zip(files, (signature, sums), strict=True):
                file.write_bytes(data)
            result = await in_thread(
                lambda: work.site.runner.read(
                    "gpgv", "--homedir", directory, "--keyring", keyring, "--weak-digest", "SHA1",
                    "--status-fd", "1", *files, ok=(0, 1, 2),
                )
            )  # fmt: skip
        said = {words[1]: words[2:] for line in result.stdout.splitlines()
                if len(words := line.split()) > 1}  # fmt: skip
        shown = _shown(self.sums)
        # A key that has expired or was revoked has words of its own (GnuPG's doc/DETAILS).
        if "GOODSIG" not in said or "VALIDSIG" not in said or "BADSIG" in said:
            if "BADSIG" in said:
                why = f"{shown} was changed after it was signed"
            elif "NO_PUBKEY" in said:
                why = f"{shown} is signed by key {said['NO_PUBKEY'][0]}, which is not in {keyring}"
            elif "EXPKEYSIG" in said or "REVKEYSIG" in said:
                key = (said.get("EXPKEYSIG") or said["REVKEYSIG"])[0]
                why = f"{shown} is signed by key {key}, which has expired or was revoked"
            else:
                last = (result.stderr.strip().splitlines() or ["gpgv says nothing"])[-1]
                why = f"{shown} is not signed by a key of {keyring}: {_line(last)}"
            raise _failed(why, remedy=f"see that {keyring} has the key that signs it, not armoured")
        signer = said["VALIDSIG"][0]
        work.log.say(f"{shown} is signed by {signer}")
        work.details["signed by"] = signer
        matches = map(_SUM.fullmatch, sums.decode(errors="replace").splitlines())
        found = {match[1].lower() for match in matches if match and match[2] == self._name}
        if len(found) != 1:
            raise _failed(f"{shown} has {len(found) or 'no'} sum{'s' * bool(found)} of {self._name}")
        return found.pop()

    # -- the way there ------------------------------------------------------------------------

    async def _get(self, work: StepRun, url: str, most: int, write: Callable[[bytes], object]) -> None:
        """What is at an address, handed on as it comes; ``most`` bytes of it. StepFailed."""
        import asyncio

        from host.run import hang_up
        from inventory.sizes import about

        process = await work.site.runner.serve(*self._curl(work.site, url, most))
        assert process.stdin and process.stdout and process.stderr
        errors = asyncio.ensure_future(process.stderr.read())
        size, told = 0, work.seconds
        try:
            process.stdin.write(self._config(url).encode())
            process.stdin.close()
            while data := await process.stdout.read(_BLOCK):
                size += len(data)
                if size > most:
                    raise self._too_big(url, most)
                await asyncio.to_thread(write, data)
                if work.seconds - told >= 1:
                    told = work.seconds
                    work.site.reporter.working(f"fetching {_shown(url)}; {about(size)}", vm=self.to)
            status = await process.wait()
            said = await errors
        finally:
            errors.cancel()
            await hang_up(process)
        if status:
            raise self._judged(url, most, status, said)
        work.log.say(f"fetched {_shown(url)}: {format_size(size)}")

    def _curl(self, site: Site, url: str, most: int) -> tuple[str, ...]:
        redirects = "=https" if url.startswith("https:") else "=http,https"
        netrc = self._checked_netrc(site)
        return (
            "curl", "--disable", "--config", "-", "--silent", "--fail", "--globoff",
            "--write-out", "%{stderr}%{json}", "--max-filesize", str(most),
            "--location", "--max-redirs", str(_REDIRECTS),
            "--proto", "=http,https", "--proto-redir", redirects,
            "--connect-timeout", str(_CONNECT),
            "--speed-limit", str(_SLOW), "--speed-time", str(_PATIENCE),
            *(("--netrc-file", str(netrc)) if netrc else ()),
        )  # fmt: skip

    def _config(self, url: str) -> str:
        """What others may not see in a list of processes."""
        import os

        lines = {"url": url}
        login = os.environ.get(self.login, "") if self.login else ""
        if login and _origin(url) == _origin(self.fetch):
            lines["user" if ":" in login else "oauth2-bearer"] = login
        quoted = ((key, text.replace("\\", "\\\\").replace('"', '\\"')) for key, text in lines.items())
        return "".join(f'{key} = "{text}"\n' for key, text in quoted)

    def _judged(self, url: str, most: int, status: int, said: bytes) -> StepFailed:
        """By how curl ended."""
        import json

        try:
            answer: dict[str, Any] = json.loads(said)
        except ValueError:
            answer = {}
        shown, code = _shown(url), answer.get("response_code") or 0
        if status == _TOO_BIG:
            return self._too_big(url, most)
        if status == _HTTP:
            remedy = "give the step a 'login' or 'netrc' that may read it" if code in (401, 403) else ""
            return _failed(f"{shown}: the server answers {code}", remedy=remedy, server=code >= 500)
        if status == _REFUSED and 300 <= code < 400:
            only = "https" if url.startswith("https:") else "http or https"
            return _failed(f"{shown}: it redirects to what is not {only}, which is not followed")
        if status == _LOOP:
            return _failed(f"{shown}: it redirects more than {_REDIRECTS} times")
        why = _line(str(answer.get("errormsg") or f"curl exited with {status}"))
        return _failed(f"{shown}: {why}", server=True)

    def _too_big(self, url: str, most: int) -> StepFailed:
        larger = "if it is meant to be, give the step a larger 'max_size'"
        return _failed(
            f"{_shown(url)} is larger than {format_size(most)}",
            remedy=larger if url == self.fetch else "",
        )

    def _keyring(self, site: Site) -> Path | None:
        return _placed(site, self.keyring)

    def _checked_netrc(self, site: Site) -> Path | None:
        """curl opens it by its name: it is looked at right before that, too. WrongState."""
        from host.files import check_secret

        path = _placed(site, self.netrc)
        if path is not None:
            check_secret(path, f"the logins of step {self.name}")
        return path


def _failed(message: str, *, remedy: str = "", server: bool = False) -> StepFailed:
    """``server``: it or the way there failed; else it is the file."""
    from builds.step_run import StepFailed

    if server:
        return StepFailed("infrastructure", message, remedy=remedy or "see what ails that server")
    return StepFailed("dependencies", message, remedy=remedy or "put the step in the farm file right")


def _check_address(key: str, address: str) -> None:
    try:
        parts = urlsplit(address)
        known = bool(_ADDRESS.fullmatch(address) and parts.hostname) and (parts.port or 0) >= 0
    except ValueError:  # a port that is no number
        known = False
    if not known:
        raise at_key(key, f"{quote(address)} is not an address such as https://host/file")
    if parts.username is not None or parts.password is not None:
        raise at_key(key, "a login doesn't belong into an address: use 'netrc' or 'login'")


def _shown(url: str) -> str:
    """Without what may be a secret."""
    parts = urlsplit(url)
    return parts._replace(query="...", fragment="").geturl() if parts.query else url


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _placed(site: Site, path: Path | None) -> Path | None:
    from inventory.reading import resolve

    return None if path is None else resolve(site.farm.path, path)


def _sum_of(file: Path) -> str:
    """Its sha256; empty where there is none, or it can't be read."""
    import hashlib

    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""


def _line(text: str) -> str:
    """Of another program's words, fit for a message."""
    from host.printable import plain

    return " ".join(plain(text).split())[:300]
