"""The real apt, against archives that the format's functions word, over HTTP."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from repositories.change import GenerationContent, changing
from repositories.deb.format import DebFormat
from repositories.format import ClientSource, IndexFile, Release
from repositories.generation import Reason
from repositories.package import Package
from repositories.repository import Repository, Settings
from repositories.staging import Staged
from tests.apt_machine import AptMachine
from tests.debs import deb, fields, sum_of

FORMAT = DebFormat()
CHANNEL = "tested"
MOVES = 110
FILE = """probe (1) 1%3a2+~ü"<>^{|}&;@=,:!$*'[]\\.deb"""  # whatever may be in a file's name
GRACE = 40
"""Of so many moves, the earlier index is there."""


class ThrowAwaySigner:
    """gpg with one key in a home of its own; as ``repositories.format.Signer``."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700)
        self._argv = ["gpg", "--homedir", str(home), "--batch", "--yes", "--passphrase", ""]
        self._gpg("--quick-generate-key", "Probe", "ed25519", "sign", "never")

    def _gpg(self, *words: str, data: bytes = b"") -> bytes:
        argv = [*self._argv, *words]
        return subprocess.run(argv, input=data, check=True, capture_output=True, timeout=60).stdout

    def detached(self, data: bytes) -> bytes:
        return self._gpg("--armor", "--detach-sign", data=data)

    def clear(self, data: bytes) -> bytes:
        return self._gpg("--clear-sign", data=data)

    def public(self) -> bytes:
        return self._gpg("--armor", "--export")

    def end(self) -> None:
        subprocess.run(["gpgconf", "--homedir", self._argv[2], "--kill", "all"], check=True)


@pytest.fixture(scope="module")
def signer() -> Iterator[ThrowAwaySigner]:
    place = Path(tempfile.mkdtemp(prefix="fhg-"))  # short: a socket is in it
    signer = ThrowAwaySigner(place / "gnupg")
    try:
        yield signer
    finally:
        signer.end()
        shutil.rmtree(place)


class Archive:
    """A repository's directory, made by hand. One channel."""

    def __init__(self, top: Path, signer: ThrowAwaySigner | None) -> None:
        self.top, self.signer = top, signer
        self._made: list[dict[str, Path]] = []
        (top / "channels").mkdir(parents=True)
        for link, leads in FORMAT.links(CHANNEL).items():
            (top / link).parent.mkdir()
            (top / link).symlink_to(leads)

    def generation(
        self, number: int, packages: Sequence[bytes], *, architectures: tuple[str, ...] = ("amd64",)
    ) -> None:
        """Made, and not yet the channel's."""
        when = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
        release = Release("probes", CHANNEL, number, when, "", ("main",), architectures)
        listed: dict[str, list[bytes]] = {
            section: [] for section in FORMAT.all_sections(release.components, architectures)
        }
        for package, text in map(self._add, packages):
            for section in FORMAT.sections(package, architectures):
                listed[section].append(text)
        indexes, files = [], dict[str, bytes]()
        for section, texts in listed.items():
            head, tail = FORMAT.frame("Packages", len(texts))
            packed = b"".join(gzip.compress(part, mtime=0) for part in (head, *texts, tail))
            index = IndexFile(
                section, "Packages", sum_of(packed), sum_of(b"".join([head, *texts, tail]))
            )
            indexes.append(index)
            names = (FORMAT.lasting(release, index), *FORMAT.passing(release, index))
            files |= dict.fromkeys(names, packed)
        files |= FORMAT.entries(release, FORMAT.summary(release, indexes), self.signer)
        tree = self.top / f"generations/{number}"
        for path, data in files.items():
            file = tree / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            # clients ask by time, in whole seconds, whether there is something newer
            os.utime(file, (when.timestamp(), when.timestamp()))
        (tree / "pool").symlink_to("../../pool")
        published = self.top / f"published/{CHANNEL}/{number}"
        for path, file in {**self._lasting(), **{path: tree / path for path in files}}.items():
            (published / path).parent.mkdir(parents=True, exist_ok=True)
            (published / path).hardlink_to(file)
        (published / "pool").symlink_to("../../../pool")
        self._made.append({FORMAT.lasting(release, index): tree for index in indexes})

    def _lasting(self) -> dict[str, Path]:
        """What the latest generations have under names that last."""
        return {path: tree / path for made in self._made[-GRACE:] for path, tree in made.items()}

    def _add(self, data: bytes) -> tuple[Package, bytes]:
        sum_ = sum_of(data)
        private = self.top / "private"
        private.write_bytes(data)
        reading = FORMAT.read(private, FILE, sum_, "main")
        package = Package(
            reading.name, reading.version, reading.architecture,
            sum_.sha256, sum_.size, FILE, "main",
        )  # fmt: skip
        (self.top / package.place).parent.mkdir(parents=True, exist_ok=True)
        private.rename(self.top / package.place)
        return package, reading.texts["Packages"].encode()

    def publish(self, number: int, url: str) -> None:
        link = self.top / "channels/.new"
        link.symlink_to(f"../published/{CHANNEL}/{number}")
        link.rename(self.top / "channels" / CHANNEL)
        mirrors = self.top / "channels/.mirrors"
        mirrors.write_text(f"{url}/generations/{number}\n")
        mirrors.rename(self.top / f"channels/{CHANNEL}.mirrors")


class Served:
    """A directory over HTTP/1.1. ``asked``: the paths that were, with the answers' status."""

    def __init__(self, top: Path) -> None:
        self.asked: list[tuple[str, int]] = []
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_request(self, code: int | str = "-", _size: int | str = "-") -> None:
                asked.append((self.path, int(code)))

            def log_message(self, *_: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(top))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def end(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fetched(self) -> list[str]:
        return [path for path, status in self.asked if status == 200]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "archive").mkdir()
    served = Served(tmp_path / "archive")
    try:
        yield served
    finally:
        served.end()


def source(url: str, signer: ThrowAwaySigner | None, *, pinned: bool, base: str = "") -> str:
    base = base or f"{url}/channels/{CHANNEL}"
    return FORMAT.stanza(
        ClientSource(
            "probes", CHANNEL, base, f"{base}.mirrors" if pinned else None,
            f"{url}/key.asc" if signer else None, signer.public() if signer else None,
            ("main",), ("amd64",),
        )
    )  # fmt: skip


def probe(version: int | str, architecture: str = "amd64", name: str = "probe") -> bytes:
    files = {f"usr/share/{name}": f"{version}\n".encode()}
    return deb(fields(name, str(version), architecture), files)


@pytest.mark.parametrize("pinned", [False, True], ids=["plain", "pinned"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_a_client_updates_and_installs(
    tmp_path: Path, served: Served, signer: ThrowAwaySigner, signed: bool, pinned: bool
) -> None:
    """From what is pasted as it is: no warning, indexes by their sums, several members as one; packages
    that fit all architectures too."""
    archive = Archive(tmp_path / "archive", signer if signed else None)
    archive.generation(1, [probe(1), *(probe(n, "all", f"other{n}") for n in range(9))])
    archive.publish(1, served.url)
    machine = AptMachine(tmp_path / "machine")
    machine.source(source(served.url, archive.signer, pinned=pinned))
    machine.update()
    assert [machine.candidate(name) for name in ("probe", "other8", "other9")] == ["1", "8", ""]
    said = machine.run("apt-get", "install", "-y", "probe", "other8")
    assert (said.returncode, said.stderr) == (0, ""), said.stdout + said.stderr
    assert (machine.top / "root/usr/share/probe").read_text() == "1\n"
    assert (machine.top / "root/usr/share/other8").read_text() == "8\n"
    indexes = [path for path in served.fetched() if "/binary-" in path]
    assert indexes and all("/by-hash/SHA256/" in path for path in indexes)
    trees = {path.split("/")[2] for path in served.fetched() if "/dists/" in path}
    assert trees == ({"1"} if pinned else {CHANNEL})
    # the next generation: a newer one
    archive.generation(2, [probe(2)])
    archive.publish(2, served.url)
    machine.update()
    assert machine.candidate("probe") == "2"


def test_a_client_that_reads_the_repository_itself(
    tmp_path: Path, served: Served, signer: ThrowAwaySigner
) -> None:
    """``deb URL tested main``, as everybody writes it."""
    archive = Archive(tmp_path / "archive", signer)
    archive.generation(1, [probe(1)])
    archive.publish(1, served.url)
    machine = AptMachine(tmp_path / "machine")
    machine.source(source(served.url, signer, pinned=False, base=served.url))
    machine.update()
    said = machine.run("apt-get", "install", "-y", "probe")
    assert (said.returncode, said.stderr) == (0, ""), said.stdout + said.stderr


@pytest.mark.parametrize("harm", ["another key", "changed", "unsigned"])
def test_a_client_refuses_what_nobody_signed(
    tmp_path: Path, served: Served, signer: ThrowAwaySigner, harm: str
) -> None:
    other = tempfile.mkdtemp(prefix="fhg-")
    archive = Archive(tmp_path / "archive", signer)
    stranger = ThrowAwaySigner(Path(other) / "gnupg") if harm == "another key" else None
    try:
        archive.signer = {"another key": stranger, "changed": signer, "unsigned": None}[harm]
        archive.generation(1, [probe(1)])
    finally:
        if stranger:
            stranger.end()
        shutil.rmtree(other)
    archive.publish(1, served.url)
    if harm == "changed":
        for name in ("InRelease", "Release"):
            file = archive.top / f"published/{CHANNEL}/1/dists/{CHANNEL}/{name}"
            file.write_bytes(file.read_bytes().replace(b"Label: probes", b"Label: prodes"))
    machine = AptMachine(tmp_path / "machine")
    machine.source(source(served.url, signer, pinned=False))
    assert machine.run("apt-get", "update", "--error-on=any").returncode == 100
    assert machine.candidate("probe") == ""


def test_packages_that_fit_all_have_an_index_of_their_own_where_it_is_asked_for(
    tmp_path: Path, served: Served
) -> None:
    archive = Archive(tmp_path / "archive", None)
    archive.generation(1, [probe(1, "all")], architectures=("all",))
    archive.generation(2, [probe(2, "all")], architectures=("all", "amd64"))
    machine = AptMachine(tmp_path / "machine")
    machine.source(source(served.url, None, pinned=False))
    for number, directory in ((1, "binary-all"), (2, "binary-amd64")):
        archive.publish(number, served.url)
        served.asked.clear()
        machine.update()
        assert machine.candidate("probe") == str(number)
        assert {Path(path).parts[6] for path in served.fetched() if "/binary-" in path} == {directory}


@pytest.fixture(scope="module", params=["signed", "unsigned"])
def moving(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, signer: ThrowAwaySigner
) -> Iterator[tuple[Archive, Served]]:
    """An archive with many generations, each with packages of its number alone."""
    archive = Archive(
        tmp_path_factory.mktemp("moving") / "archive", signer if request.param == "signed" else None
    )
    for number in range(1, MOVES + 1):
        archive.generation(number, [probe(number), probe(number, "all", "other")])
    served = Served(archive.top)
    try:
        yield archive, served
    finally:
        served.end()


@pytest.mark.parametrize("pinned", [False, True], ids=["plain", "pinned"])
def test_no_client_fails_while_a_channel_moves(
    tmp_path: Path, moving: tuple[Archive, Served], pinned: bool
) -> None:
    """It sees one generation, old or new, and never an older one again."""
    archive, served = moving
    archive.publish(1, served.url)
    machine = AptMachine(tmp_path / "machine")
    machine.source(source(served.url, archive.signer, pinned=pinned))

    def move() -> None:
        for number in range(2, MOVES + 1):
            time.sleep(0.025)
            archive.publish(number, served.url)

    def look() -> int:
        machine.update()
        one, other = machine.candidate("probe"), machine.candidate("other")
        assert one == other
        return int(one)

    mover = threading.Thread(target=move)
    mover.start()
    seen = []
    try:
        while mover.is_alive():
            seen.append(look())
    finally:
        mover.join()
    assert look() == MOVES
    assert len(set(seen)) > 3
    assert seen == sorted(seen)


def repository_of(top: Path, url: str) -> Repository:
    return Repository(
        Settings(
            name="probes", format="deb", top=top, channels=(CHANNEL,), components=("main",), url=url
        )
    )


def add(repository: Repository, file: Path, data: bytes) -> Staged:
    """Published, by the code that does so."""
    file.write_bytes(data)
    with repository.staging() as staging:
        item = staging.take(file, component="main")
        with changing(repository) as change:
            base = repository.head(CHANNEL)
            reason = Reason("add", "test")
            made = change.commit(CHANNEL, GenerationContent(base, add=[item]), reason)
            change.publish(made, reason, expected=base.sequence if base else 0)
    return item


def test_two_generations_of_one_second_are_two(tmp_path: Path, served: Served) -> None:
    """A client asks by the time of what it has, in whole seconds, whether there is something newer."""
    top = tmp_path / "archive"
    repository = repository_of(top, served.url)
    machine = AptMachine(tmp_path / "machine")
    machine.source(source(served.url, None, pinned=False))
    items = []
    for version in range(1, 5):
        items.append(add(repository, tmp_path / "probe.deb", probe(version)))
        machine.update()
        assert machine.candidate("probe") == str(version)
    times = [
        int((tree / f"dists/{CHANNEL}/Release").stat().st_mtime)
        for tree in sorted((top / "generations").iterdir())
    ]
    assert times == sorted(set(times))
    # others' repositories may be farmhand's
    assert [found.sha256 for found in FORMAT.published(top)] == [item.package.sha256 for item in items]


def test_a_repository_that_names_no_architectures(tmp_path: Path, served: Served) -> None:
    """It has those of its packages; until one comes that is of some, what fits all."""
    repository = repository_of(tmp_path / "archive", served.url)
    machine = AptMachine(tmp_path / "machine")
    machine.source(source(served.url, None, pinned=False))
    add(repository, tmp_path / "probe.deb", probe(1, "all"))
    machine.update()
    assert machine.candidate("probe") == "1"
    add(repository, tmp_path / "probe.deb", probe(2, name="other"))
    machine.update()
    assert (machine.candidate("probe"), machine.candidate("other")) == ("1", "2")
    indexes = {Path(path).parts[6] for path in served.fetched() if "/binary-" in path}
    assert indexes == {"binary-all", "binary-amd64"}
