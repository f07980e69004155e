"""Package repositories beside those who keep them today: whole commands, on the same packages, in one
run. aptly, reprepro and createrepo_c are measured where they are installed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.figures import Figure
from tests.many_packages import make_debs, make_rpms, names

ROOT = Path(__file__).resolve().parents[1]
Say = Callable[[str], None]
_TENTH = 0.1
_TWICE = 2.0  # what hashing costs, where it is most of the work
_SNAPSHOT = 0.05  # seconds, beside what a command costs by itself
_LARGE, _MIB = 200, 2**20  # packages of a real one's size, and bytes of each
_DISK = 15 * 2**20
_FARM = """\
farm: bench
templates: {{base: {{build: debian-12}}}}
vms: {{prod: {{}}}}
repositories:
  debs:
    format: deb
    path: {top}/debs
    channels: [experimental, tested]
    architectures: [amd64]
    incoming: {top}/uploads/debs
  rpms:
    format: rpm
    path: {top}/rpms
    channels: [experimental, tested]
    incoming: {top}/uploads/rpms
  large:
    format: deb
    path: {top}/large
    channels: [tested]
    architectures: [amd64]
"""


def measure(place: Path, count: int, rounds: int, say: Say) -> Iterator[Figure]:
    """A repository of so many packages, of each format; one changed in each round. And one of few that
    are as large as real ones, for what reads them all."""
    ours = _Ours(place)
    for suffix, make, peers in (
        ("debs", make_debs, (_Aptly, _Reprepro)), ("rpms", make_rpms, (_Createrepo,)),
    ):  # fmt: skip
        if suffix == "rpms" and shutil.which("rpmbuild") is None:
            say("rpmbuild is not installed (apt-get install rpm): no figures of rpms")
            continue
        yield from _of(place / suffix, suffix, make, peers, ours, count, rounds, say)
    about = f"{_LARGE} debs of 1 MiB"
    say(about)
    make_debs(place / "large", names(_LARGE), "1.0", _MIB)
    ours.run("repo-add", "--repo", "large", "--path", place / "large")
    yield from _checked(ours, "large", about, _TWICE)


def _of(
    place: Path,
    suffix: str,
    make: Callable[[Path, list[str], str], list[Path]],
    peers: Sequence[type[_Peer]],
    ours: _Ours,
    count: int,
    rounds: int,
    say: Say,
) -> Iterator[Figure]:
    about = f"{count} {suffix}"
    say(f"{about}: making them")
    all_of_them = make(place / "all", names(count), "1.0")
    fresh, uploaded = (
        [
            make(
                place / f"fresh{version}{turn}", [names(count)[turn * 97 % count]], f"{version}.{turn}"
            )[0]
            for turn in range(rounds)
        ]
        for version in (2, 3)
    )
    seconds: dict[str, list[float]] = {}
    say(f"{about}: farmhand")
    ours.run("repo-add", "--repo", suffix, "--path", all_of_them[0].parent)
    present = []
    for kind in peers:
        if shutil.which(kind.PROGRAM) is None:
            say(f"{kind.PROGRAM} is not installed: left out")
            continue
        say(f"{about}: {kind.PROGRAM}")
        present.append(peer := kind(place / kind.PROGRAM))
        peer.begin(all_of_them)
    one = f"{about}: one changed, farmhand"
    snapshot, bare = f"{about}: a snapshot, farmhand", f"{about}: looking, farmhand"
    before = ours.metadata(suffix)
    for turn, path in enumerate(fresh):
        say(f"{about}: round {turn + 1} of {rounds}")
        add = partial(ours.run, "repo-add", "--repo", suffix, "--path", path)
        work: dict[str, Callable[[], object]] = {one: add}
        for peer in present:
            work[f"{about}: one changed, {peer.PROGRAM}"] = partial(peer.change, path)
        way = ("--from", "experimental", "--to", "tested")
        work[snapshot] = partial(ours.run, "repo-promote", "--repo", suffix, *way)
        work[bare] = partial(ours.run, "repo-log", "--repo", suffix)
        for name, run in work.items():
            seconds.setdefault(name, []).append(_timed(run))
    grown = (ours.metadata(suffix) - before) / (2 * rounds)
    queued, taken = (
        f"{about}: one changed, a queue that runs",
        f"{about}: a snapshot, in a process that runs",
    )
    say(queued)
    with ours.queue(suffix) as publish:
        seconds[queued] = [publish(path) for path in uploaded]
    seconds[taken] = ours.snapshots(suffix, rounds)
    for name, values in seconds.items():
        yield Figure(name, tuple(values))
    for peer in present:
        beside = f"{about}: one changed, {peer.PROGRAM}"
        yield Figure(f"{one}, beside {peer.PROGRAM}", tuple(seconds[one]), _TENTH, beside)
        yield Figure(f"{queued}, beside {peer.PROGRAM}", tuple(seconds[queued]), _TENTH, beside)
    alone = tuple(a - b for a, b in zip(seconds[snapshot], seconds[bare], strict=True))
    yield Figure(f"{snapshot}, beyond looking", alone, _SNAPSHOT)
    yield Figure(f"{taken}, by itself", tuple(seconds[taken]), _SNAPSHOT)
    yield Figure(f"{about}: disk of a generation", (grown,), _DISK, unit="B")
    yield from _checked(ours, suffix, about, None)


def _checked(ours: _Ours, name: str, about: str, limit: float | None) -> Iterator[Figure]:
    """repo-fsck beside the bare reading of the same packages."""
    checked = tuple(_timed(lambda: ours.run("repo-fsck", "--repo", name)) for _ in range(3))
    files = [path for path in (ours.top / name / "pool").rglob("*") if path.is_file()]
    summed = tuple(_timed(lambda: _sha256sum(files)) for _ in range(3))
    yield Figure(f"{about}: repo-fsck", checked)
    yield Figure(f"{about}: sha256sum of the packages", summed)
    beside = f"{about}: sha256sum of the packages"
    yield Figure(f"{about}: repo-fsck, beside sha256sum", checked, limit, beside)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _sha256sum(files: Sequence[Path]) -> None:
    names_ = b"\0".join(map(os.fsencode, files))
    subprocess.run(["xargs", "-0", "sha256sum"], input=names_, check=True, stdout=subprocess.DEVNULL)


class _Ours:
    def __init__(self, place: Path) -> None:
        self.top = place / "farmhand"
        for name in ("debs", "rpms"):
            (self.top / "uploads" / name / "experimental").mkdir(parents=True)
        farm = place / "farm.yaml"
        farm.write_text(_FARM.format(top=self.top))
        self._environment = {
            **os.environ,
            "FARMHAND_STATE_DIR": str(place / "s"),
            "FARMHAND_RUNTIME_DIR": str(place / "t"),
            "FARMHAND_FARM": str(farm),
        }
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, *words: str | Path) -> None:
        subprocess.run(
            [sys.executable, "-P", "cli/start.py", *map(str, words)], cwd=ROOT, env=self._environment,
            check=True, capture_output=True,
        )  # fmt: skip

    @contextlib.contextmanager
    def queue(self, name: str) -> Iterator[Callable[[Path], float]]:
        """A queue that goes on. What is given publishes a package's file: seconds, from the moment that
        it is moved in until the channel has it."""
        argv = (sys.executable, "-P", "cli/start.py", "repo-queue", "--watch", "--repo", name)
        place, pointer = (
            self.top / "uploads" / name / "experimental",
            self.top / name / "channels/experimental",
        )
        with subprocess.Popen(
            argv, cwd=ROOT, env=self._environment, stderr=subprocess.DEVNULL
        ) as process:  # fmt: skip

            def publish(path: Path) -> float:
                before = pointer.readlink()
                copy = place.with_name(path.name)
                shutil.copyfile(path, copy)
                began = time.perf_counter()
                copy.rename(place / path.name)
                while pointer.readlink() == before:
                    assert process.poll() is None, "the queue ended"
                    time.sleep(0.0005)
                return time.perf_counter() - began

            try:
                opened = Path(f"/proc/{process.pid}/fdinfo")
                while not any("inotify wd" in _text(path) for path in opened.iterdir()):
                    time.sleep(0.01)
                yield publish
            finally:
                process.terminate()

    def snapshots(self, name: str, rounds: int) -> list[float]:
        """Seconds of each, in a process that runs."""
        done = subprocess.run(
            [sys.executable, "-P", Path(__file__).with_name("snapshots.py"), name, str(rounds)],
            cwd=ROOT, env={**self._environment, "PYTHONPATH": str(ROOT)}, check=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return [float(line) for line in done.stdout.split()]

    def metadata(self, name: str) -> int:
        """Bytes on the disk of all but the packages; a file with several names counts once."""
        seen: set[int] = set()
        total = 0
        for directory, _, files in os.walk(self.top / name):
            if directory.startswith(str(self.top / name / "pool")):
                continue
            for file in files:
                found = Path(directory, file).lstat()
                if found.st_ino not in seen:
                    seen.add(found.st_ino)
                    total += found.st_blocks * 512
        return total


class _Peer:
    PROGRAM: str

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()

    def begin(self, files: Sequence[Path]) -> None:
        raise NotImplementedError

    def change(self, path: Path) -> None:
        raise NotImplementedError


def _quiet(*argv: str | Path) -> None:
    subprocess.run(list(map(str, argv)), check=True, capture_output=True)


class _Aptly(_Peer):
    PROGRAM = "aptly"

    def begin(self, files: Sequence[Path]) -> None:
        self._conf = self.place / "conf"
        self._conf.write_text(
            json.dumps({"rootDir": str(self.place), "architectures": ["amd64"], "gpgDisableSign": True})
        )
        self._run("repo", "create", "-distribution=tested", "-component=main", "r")
        self._run("repo", "add", "r", files[0].parent)
        self._run("publish", "repo", "-skip-signing", "r")

    def change(self, path: Path) -> None:
        self._run("repo", "add", "r", path)
        self._run("publish", "update", "-skip-signing", "tested")

    def _run(self, *words: str | Path) -> None:
        _quiet("aptly", f"-config={self._conf}", *words)


class _Reprepro(_Peer):
    PROGRAM = "reprepro"

    def begin(self, files: Sequence[Path]) -> None:
        (self.place / "conf").mkdir()
        text = "Codename: tested\nComponents: main\nArchitectures: amd64\n"
        (self.place / "conf" / "distributions").write_text(text)
        _quiet("reprepro", "-b", self.place, "-C", "main", "includedeb", "tested", *files)

    def change(self, path: Path) -> None:
        _quiet("reprepro", "-b", self.place, "-C", "main", "includedeb", "tested", path)


class _Createrepo(_Peer):
    PROGRAM = "createrepo_c"

    def begin(self, files: Sequence[Path]) -> None:
        for file in files:
            os.link(file, self.place / file.name)
        _quiet("createrepo_c", "--update", self.place)

    def change(self, path: Path) -> None:
        os.link(path, self.place / path.name)
        _quiet("createrepo_c", "--update", self.place)
