"""Package repositories: a full disk, publishers side by side, what is durable before a pointer moves."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import MANY, ROOT
from test_repository_kills import RepoBench

from tests.repos import FORMATS, RepoFarm, read_all

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fh-", dir="/dev/shm") as place:
        monkeypatch.setenv("FARMHAND_STATE_DIR", f"{place}/now/s")
        monkeypatch.setenv("FARMHAND_RUNTIME_DIR", f"{place}/r")
        yield Path(place)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_disk_that_is_full_from_some_point_on(place: Path, kind: str) -> None:
    """Where nothing more can be made, written or renamed; only removed."""
    bench = RepoBench(place, kind)
    farm = bench.farm
    farm.add(farm.package())
    request = {"channel": "experimental", "paths": [str(farm.package("more"))]}
    bench.keep()
    bench.put_back()
    before = read_all(farm.top)
    total = bench.points("repo-add", request)
    after = read_all(farm.top)
    told = set()
    for point in range(1, total + 1, 1 if MANY else 9):
        bench.put_back()
        status, text = bench.ask(point, "full", "repo-add", request)
        context = f"full at {point} of {total}: {text}"
        assert os.waitstatus_to_exitcode(status) in (0, 2), f"{context}; see its standard error"
        now = read_all(farm.top)["experimental"]
        if os.waitstatus_to_exitcode(status) == 2:
            told.add(text.split()[0])
            moved = "is generation 2 now" in text
            assert now == (after if moved else before)["experimental"], context
        bench.recover()
        read_all(farm.top)
        status, text = bench.ask(0, "full", "repo-add", request)
        assert status == 0, f"{context}: {text}"
        assert read_all(farm.top)["experimental"] == after["experimental"], context
        bench.nothing_left_over(context)
    assert told == {"NoSpace"}
    bench.close()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_small_file_system(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, that fills up while packages are added, in several places."""
    monkeypatch.setattr("host.files.SPARE", 0)
    small = place / "small"
    small.mkdir()
    for kilobytes in (280, 300, 330, 400) if MANY else (300,):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,mode=755", "none", small],
                       check=True)  # fmt: skip
        try:
            farm = RepoFarm(place, kind)
            farm.top = small / "repository"
            farm.declare("")
            failed = None
            good: list[str] = []
            for number in range(60):
                text = os.urandom(9000).hex() if kind == "deb" else "x"
                try:
                    farm.add(farm.package(f"p{number % 4}", f"{number // 4}.0-1", text=text))
                except Exception as error:  # noqa: BLE001 - looked at below
                    failed = error
                    break
                good = farm.read()
            assert type(failed).__name__ == "NoSpace", failed
            assert farm.read() == good if good else True
            assert not [line for line in farm.fsck() if "damaged" in line]
            if good:
                read_all(farm.top)
            subprocess.run(["mount", "-o", "remount,size=40m", small], check=True)
            farm.add(farm.package("last"))
            assert "last 1.0-1" in farm.read() and set(good) <= set(farm.read())
            assert farm.fsck() == []
        finally:
            subprocess.run(["umount", small], check=True)


ADD = """\
import sys
from pathlib import Path
from tests.repos import RepoFarm
farm = RepoFarm.__new__(RepoFarm)
farm.file, verb, *words = Path(sys.argv[1]), *sys.argv[2:]
sys.stdin.readline()
try:
    if verb == "add":
        farm.add(Path(words[0]))
    else:
        farm.promote(from_=words[0], to="tested")
except Exception as error:
    print(type(error).__name__, error)
else:
    print("done")
"""


def _side_by_side(farm: RepoFarm, *commands: tuple[str, ...]) -> list[str]:
    """Each in a process of its own, begun at once. What they said."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, farm.file, *words], cwd=ROOT, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for words in commands
    ]  # fmt: skip
    for process in started:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate()[0].strip() for process in started]


@pytest.mark.parametrize("kind", FORMATS)
def test_publishers_side_by_side(place: Path, kind: str) -> None:
    farm = RepoFarm(place, kind)
    names = [f"p{number}" for number in range(5)]
    files = [farm.package(name) for name in names]
    said = _side_by_side(farm, *(("add", str(file)) for file in files))
    assert said == ["done"] * 5
    assert farm.read() == [f"{name} 1.0-1" for name in names], "each add survives"
    assert farm.repository.documents.sequences() == (1, 2, 3, 4, 5)
    said = _side_by_side(farm, ("promote", "2"), ("promote", "3"), ("promote", "4"))
    won = [words for words in said if words == "done"]
    lost = [words for words in said if words != "done"]
    assert won, said
    assert all(words.startswith("Conflict packages's channel tested moved meanwhile") for words in lost)
    assert len(farm.repository.documents.log("tested")) == len(won)
    assert farm.fsck() == []
    read_all(farm.top)


CALLS = (
    "openat,write,fsync,fdatasync,sync,rename,renameat,renameat2,link,linkat,symlink,symlinkat,mkdir,"
    "mkdirat,unlink,unlinkat"
)


@pytest.mark.parametrize(
    ("kind", "count"), [("deb", 1), ("rpm", 1), ("deb", 70)], ids=["deb", "rpm", "many debs"]
)
def test_all_that_a_pointer_reaches_is_durable_before_it_moves(
    place: Path, kind: str, count: int
) -> None:
    """By what strace sees: each file was synced after it was last written, and each directory after the
    last name in it was made, before the pointer's rename."""
    farm = RepoFarm(place, kind)
    files = [farm.package(f"p{number}") for number in range(count)]
    log = place / "trace"
    code = (
        "import sys; from pathlib import Path; from tests.repos import RepoFarm\n"
        "farm = RepoFarm.__new__(RepoFarm); farm.file = Path(sys.argv[1])\n"
        "farm.add(*map(Path, sys.argv[2:]))"
    )
    subprocess.run(
        ["strace", "-f", "-y", "-s", "0", "-o", log, "-e", f"trace={CALLS}",
         sys.executable, "-c", code, farm.file, *files],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    assert len(farm.read()) == count
    disk = Disk(str(farm.top))
    pointer = str(farm.top / "channels/experimental")
    assert any(disk.sees(line) == pointer for line in log.read_text().splitlines())
    # made again when they are missing, or moved away; the pointer's own directory is synced after it
    allowed = re.compile(r"/(staging|rendered|readings|channels)(/|$)")
    left = {path for path in disk.unsynced() if not allowed.search(path)}
    assert not left, sorted(left)


class Disk:
    """What of a directory's files is not on the disk yet, by a trace of system calls. A file of several
    names is one."""

    def __init__(self, top: str) -> None:
        self.top = top
        self._of: dict[str, int] = {}
        self._numbers = itertools.count()
        self._dirty: set[int] = set()

    def sees(self, line: str) -> str:
        """The name that was renamed to, if that is what the line has."""
        match = re.match(r"^\d+ +(\w+)\((.*)\) += (-?\d+)", line)
        if not match or int(match[3]) < 0:
            return ""
        call, words = match[1], match[2]
        paths = re.findall(r'"([^"]*)"', words)
        if call in ("write", "fsync", "fdatasync"):
            (path, *_) = re.findall(r"\d+<([^>]*)>", words)
            (self._dirty.add if call == "write" else self._dirty.discard)(self._id(path))
        elif call == "sync":
            self._dirty.clear()
        elif call.startswith("unlink"):
            self._of.pop(paths[0], None)
        elif call.startswith(("mkdir", "symlink", "link")) or (call == "openat" and "O_CREAT" in words):
            self._dirty.add(self._id(paths[-1].rpartition("/")[0]))
            if call.startswith("link"):
                self._of[paths[-1]] = self._id(paths[0])
        elif call.startswith("rename"):
            old, new = paths
            for path in [p for p in self._of if p == old or p.startswith(f"{old}/")]:
                self._of[new + path[len(old) :]] = self._of.pop(path)
            self._dirty.add(self._id(new.rpartition("/")[0]))
            return str(new)
        return ""

    def _id(self, path: str) -> int:
        return self._of.setdefault(path, next(self._numbers))

    def unsynced(self) -> set[str]:
        return {
            path for path, one in self._of.items() if one in self._dirty and path.startswith(self.top)
        }
