"""What the cache directory has, told and removed by gc; never what is in use."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_farm import CommandLine, command_line

from host.space import taken
from inventory.errors import Busy
from provision import caches
from provision.caches import cached, drop


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    yield from command_line(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """With something of each kind."""
    top = tmp_path / "cache"
    top.mkdir(mode=0o711)
    for name in (
        "venv-0123456789ab/lib/x.py", "images/aa.qcow2", "images/aa.json", "images/aa.packages",
        "fetched/ab12", "downloads/ab12/data.tar.gz", "lab/image-1/disk", "lab/start-1/ram",
        "lab/build.lock", "test-guest-1/kernel", "test-debian.qcow2", "tests/rpms/x.rpm",
        "images/.lock", "setup.lock", "kvm-0.json", "mine/of-somebody",
    ):  # fmt: skip
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"x" * 100_000)
    for lock in ("images/.lock", "setup.lock", "lab/build.lock"):
        (top / lock).chmod(0o600)
    return top


def names(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()} - {
        str(path.relative_to(cache)) for path in cache.glob("farms-*/*")
    }


def test_told_planned_and_removed(cli: CommandLine, cache: Path) -> None:
    before = names(cache)
    told = cli("gc")
    assert "in the cache: 1 built image, " in told.out
    assert "gc --caches" in told.out
    planned = cli("gc", "--caches", "--plan")
    assert f"would: remove built image {cache}/images/aa.qcow2" in planned.out
    assert names(cache) == before
    done = cli("gc", "--caches", "--json").json["facts"]
    assert {Path(one["path"]).name for one in done["caches"]} == {
        "venv-0123456789ab", "aa.qcow2", "ab12", "image-1", "start-1", "test-guest-1",
        "test-debian.qcow2", "rpms",
    }  # fmt: skip
    assert done["freed"] >= 600_000
    beside = {
        "fetched/ab12",
        "downloads/ab12/data.tar.gz",
    }  # may be wanted by what runs beside this test
    assert names(cache) - beside == {
        "images/.lock", "setup.lock", "lab/build.lock", "kvm-0.json", "mine/of-somebody",
    }  # fmt: skip
    left = cli("gc").out
    assert "built image" not in left and "lab" not in left


def test_what_is_in_use_stays(cli: CommandLine, cache: Path) -> None:
    with (cache / "images" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = ["sleep", "600"]
        told_of = subprocess.Popen(["sh", "-c", 'read _ ', "sh", f"{cache}/lab/image-1/disk"],
                                   stdin=subprocess.PIPE)  # fmt: skip
        with (cache / "test-guest-1" / "kernel").open() as held:
            runs = subprocess.Popen(argv, stdin=held)
        inside = subprocess.Popen(argv, cwd=cache / "venv-0123456789ab")
        command = subprocess.Popen(
            ["sh", "-c", "read _", "/somewhere/cli/start.py"], stdin=subprocess.PIPE
        )
        try:
            done = cli("gc", "--caches", "--json").json["facts"]
        finally:
            for process in (told_of, runs, inside, command):
                process.kill()
                process.communicate()
    kept = {"images/aa.qcow2", "images/aa.json", "test-guest-1/kernel", "lab/image-1/disk",
            "venv-0123456789ab/lib/x.py", "fetched/ab12", "downloads/ab12/data.tar.gz"}  # fmt: skip
    assert kept <= names(cache), "a command of farmhand's that runs may want what was fetched"
    assert not {"lab/start-1/ram", "test-debian.qcow2", "tests/rpms/x.rpm"} & names(cache)
    used = {Path(one["path"]).name: one["in_use"] for one in done["caches"]}
    assert f"pid {runs.pid} " in used["test-guest-1"]
    assert f"pid {told_of.pid} " in used["image-1"]
    assert f"pid {inside.pid} " in used["venv-0123456789ab"]
    assert used["ab12"]  # of another command, be it one that runs beside this test
    assert not used["start-1"]


def test_a_cache_that_a_link_leads_to(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache)
    with (cache / "test-guest-1" / "kernel").open() as held:
        process = subprocess.Popen(["sleep", "600"], stdin=held)
    try:
        used = {item.path.name: item.in_use for item in cached(tmp_path / "link")}
        assert f"pid {process.pid} " in used["test-guest-1"]
    finally:
        process.kill()
        process.wait()


def test_begun_to_be_used_since_the_plan(cache: Path) -> None:
    items = {item.path.name: item for item in cached(cache)}
    with (cache / "images" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Busy):
            drop(items["aa.qcow2"], cache)
    with (cache / "test-guest-1" / "kernel").open() as held:
        process = subprocess.Popen(["sleep", "600"], stdin=held)
    try:
        with pytest.raises(Busy, match=f"in use by pid {process.pid}"):
            drop(items["test-guest-1"], cache)
    finally:
        process.kill()
        process.wait()
    drop(items["test-guest-1"], cache)
    assert not (cache / "test-guest-1").exists()
    drop(items["test-guest-1"], cache)  # somebody else was quicker


def test_the_environment_that_we_run_in_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(cache / "venv-0123456789ab"))
    (item,) = (item for item in cached(cache) if item.path.name.startswith("venv-"))
    with pytest.raises(Busy, match="in use by this very command"):
        drop(item, cache)


def test_cut_off_the_rest_goes_the_next_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = (item for item in cached(cache) if item.path.name == "image-1")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(caches, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        drop(item, cache)
    monkeypatch.undo()
    assert not item.path.exists()
    (rest,) = (item for item in cached(cache) if item.path.name.startswith(".gone-"))
    drop(rest, cache)
    assert not [*cache.rglob(".gone-*")]


def test_room_that_files_take(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    (tmp_path / "again").hardlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path)
    said = subprocess.run(["du", "-s", "-B1", tmp_path], check=True, capture_output=True, text=True)
    assert taken(tmp_path) == int(said.stdout.split()[0])
    assert taken(tmp_path / "nonesuch") == 0
