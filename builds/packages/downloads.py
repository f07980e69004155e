"""Files that builds need beside their sources: fetched here, checked, and kept in a cache that all farms
of this user share, by their sums. A builder VM has no network while it builds."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from host.check import install
from host.files import SPARE, check_room, file_error, make_file, own_directory, sweep
from host.paths import cache_dir
from host.printable import one_line
from host.run import Runner, which
from inventory.errors import FarmhandError, Unfit, Unsupported, WrongState
from inventory.packages import Download
from inventory.sizes import about
from repositories.deb.dsc import open_source_file

TOOL = "curl"
_LONG = 86400.0
_PATIENCE = 30
"""Seconds in which a server must have answered, and in which something must have come."""
_AT_ONCE = 8
_ODD = (405, 501)
"""Answers of servers that only GET is asked of."""


def place_of(download: Download) -> Path:
    return cache_dir() / "downloads" / download.sha256 / download.name


def fetched(runner: Runner, download: Download) -> Path:
    """The file, from the cache or its address. NoSpace; Unsupported: there is no curl; Unfit: it is
    another than it must be; WrongState: it can't be fetched."""
    path = place_of(download)
    try:
        if _is_there(path, download.sha256):
            return path
        check_tool()
        own_directory(path.parent.parent, mode=0o711)
        own_directory(path.parent, mode=0o711)
        check_room(path.parent, 0)
        sweep(path.parent, path.name)
        part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        most = max(shutil.disk_usage(path.parent).free - SPARE, 0)
        try:
            make_file(part)  # curl makes none where nothing comes
            _curl(runner, download.url, "--output", part, "--max-filesize", str(most), timeout=_LONG)
            if not _is_there(part, download.sha256):
                raise Unfit(
                    f"{shown(download)} is another file than it must be ({about(part.stat().st_size)}): "
                    f"its sha256 is {_sum(part)}, and the farm file says {download.sha256}",
                    remedy="see why it changed; then give its sum in 'downloads'",
                )
            part.chmod(0o644)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise file_error(error, path, "keep the download") from error
    return path


def check_tool() -> None:
    """Unsupported: what fetches isn't on this machine."""
    if which(TOOL) is None:
        raise Unsupported(f"downloads are fetched by {TOOL}, which isn't here", remedy=install(TOOL))


def unready(runner: Runner, downloads: Iterable[Download]) -> Iterator[tuple[Download, FarmhandError]]:
    """Those that are neither in the cache nor to be had, and why. Nothing is fetched."""
    wanted = {one.url: one for one in downloads if not _is_file(place_of(one))}
    if not wanted:
        return

    def ask(download: Download) -> FarmhandError | None:
        try:
            check_tool()
            _curl(runner, download.url, "--head", "--output", "/dev/null", timeout=2 * _PATIENCE)
        except FarmhandError as error:
            return error
        return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for download, error in zip(wanted.values(), pool.map(ask, wanted.values()), strict=True):
            if error is not None:
                yield download, error


def shown(download: Download) -> str:
    """Its address, without what may be a secret."""
    parts = urlsplit(download.url)
    return parts._replace(query="...", fragment="").geturl() if parts.query else download.url


def _curl(runner: Runner, url: str, *how: str | Path, timeout: float) -> None:
    redirects = "=https" if url.startswith("https:") else "=http,https"
    quoted = url.replace("\\", "\\\\").replace('"', '\\"')  # not for all to see in a list of processes
    found = runner.read(
        TOOL, "--disable", "--config", "-", "--silent", "--show-error", "--globoff", "--location",
        "--max-redirs", "10", "--proto", "=http,https", "--proto-redir", redirects,
        "--connect-timeout", str(_PATIENCE), "--speed-limit", "1", "--speed-time", str(_PATIENCE),
        "--write-out", "%{http_code}", *how,
        input=f'url = "{quoted}"\n'.encode(), timeout=timeout, ok=range(256),
    )  # fmt: skip
    code = int(found.stdout[-3:]) if found.stdout[-3:].isdigit() else 0
    if found.status == 0 and (code < 400 or ("--head" in how and code in _ODD)):
        return
    why = f"the server answers {code}" if code >= 400 else one_line(found.stderr.strip(), 300)
    parts = urlsplit(url)
    address = parts._replace(query="...", fragment="").geturl() if parts.query else url
    raise WrongState(
        f"{address} can't be fetched: {why or f'curl exited with {found.status}'}",
        remedy=f"see curl --head '{address}'; or correct it in 'downloads'",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _is_there(path: Path, sha256: str) -> bool:
    return _is_file(path) and _sum(path) == sha256


def _sum(path: Path) -> str:
    with open_source_file(path, 2**63) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
