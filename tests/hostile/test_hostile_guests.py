"""Guests that send too much, lie about it, or never end: real sshds, with tools that aren't what they
seem."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from neighbour import NEEDS_ROOT

from host import files
from host.run import Runner
from inventory.errors import DriverFailed, FarmhandError, NoSpace, NotFound, Unfit
from inventory.model import Limits
from provision.guest import connection as connecting
from provision.guest import shell
from provision.guest.connection import Connection, Moved
from tests.unit.sshd_machine import Sshd, children, gone, make_key, wait_for

BASH = "/bin/bash"
MANY = Limits()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Callable[..., Sshd]]:
    """Makes one; what it is given are scripts that stand in its PATH before the real tools."""
    make_key(tmp_path / "key")
    made: list[Sshd] = []

    def make(**tools: str) -> Sshd:
        place = tmp_path / "tools"
        place.mkdir()
        for name, script in tools.items():
            (place / name).write_text(f"#!/bin/sh\n{script}\n")
            (place / name).chmod(0o755)
        path = {"PATH": f"{place}:/usr/bin:/bin:/usr/sbin:/sbin"}
        machine = Sshd("dev2", tmp_path / "dev2", tmp_path / "key", environment=path, shell=BASH)
        made.append(machine.prepare().start())
        return machine

    yield make
    for machine in made:
        machine.stop()


def with_it(machine: Sshd, work: Callable[[Connection], object]) -> object:
    async def go() -> object:
        async with await Connection.open(machine.endpoint(), runner=Runner(changes=False)) as connection:
            return await work(connection)

    return asyncio.run(go())


# -- what is printed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        "echo $$ >pid; exec yes",
        "echo $$ >pid; exec yes >&2",
        "echo $$ >pid; exec tr '\\0' y </dev/zero",  # without newline
        "trap '' TERM; yes & echo $! >pid; wait",
        "yes & echo $! >pid",  # it is gone, and what it started holds the output open
    ],
    ids=["stdout", "stderr", "one line", "deaf", "left behind"],
)
def test_a_script_that_prints_without_end_is_ended(
    guest: Callable[..., Sshd], script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting, "_WRAPPER", connecting._WRAPPER.replace("-lt 10", "-lt 1"))
    machine, kept = guest(), bytearray()

    async def go(connection: Connection) -> None:
        result = await connection.run(script, timeout=300, log=kept.extend, most=100_000)
        assert (result.status, result.cut, result.timed_out) == (124, True, False)
        assert len(kept) == 100_000
        assert set(kept) <= set(b"y\n")
        assert await connection.output("echo usable") == "usable\n"

    with_it(machine, go)
    assert gone(int((machine.home / "pid").read_text()))


def test_what_is_just_within_the_limit_is_none_too_much(guest: Callable[..., Sshd]) -> None:
    kept = bytearray()

    async def go(connection: Connection) -> None:
        result = await connection.run("printf 12345; exit 3", timeout=60, log=kept.extend, most=5)
        assert (result.status, result.cut, bytes(kept)) == (3, False, b"12345")
        result = await connection.run("exit 4", timeout=60, log=kept.extend, most=0)
        assert (result.status, result.cut) == (4, False)

    with_it(guest(), go)


def test_the_answer_to_a_small_question_is_small(guest: Callable[..., Sshd]) -> None:
    async def go(connection: Connection) -> None:
        with pytest.raises(DriverFailed, match="dev2: a command printed more than 64K"):
            await connection.output("yes")
        with pytest.raises(DriverFailed, match=r"failed with 3: y{299}…$"):
            await connection.output("head -c 50000 /dev/zero | tr '\\0' y; exit 3")

    with_it(guest(), go)


@pytest.mark.parametrize(
    "facts",
    [
        "exec yes",
        "yes '' | head -n 90000",
        "yes >&2",
        "echo x; echo nan nan",
        "printf '%040d\\n9 9\\n' 7",
    ],
)
def test_boot_id_and_clock_are_read_from_no_flood(guest: Callable[..., Sshd], facts: str) -> None:
    async def go(connection: Connection) -> None:
        with pytest.raises(DriverFailed) as refused:
            await connection.facts()
        assert len(refused.value.message) < 500

    with_it(guest(cat=facts), go)


@pytest.mark.parametrize("clock", ["echo nan", "echo inf.5", "printf '%0999d\\n' 7", "echo 1e999.1"])
def test_a_clock_that_shows_no_time_is_none(guest: Callable[..., Sshd], clock: str) -> None:
    async def go(connection: Connection) -> None:
        with pytest.raises(DriverFailed, match="boot id and clock can't be read"):
            await connection.facts()

    with_it(guest(date=clock), go)


def test_a_question_that_nobody_answers_is_given_up(
    guest: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "ANSWER_SECONDS", 1.0)
    with pytest.raises(DriverFailed, match="not answered within 1 s"):
        with_it(guest(sha256sum="exec sleep 300"), lambda connection: connection.facts())


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [b"new\nline", b"not\xffutf-8", b"\x1b[2J", "\u202ecod.exe".encode(), b"a\rb"]
)
def test_a_name_that_can_not_be_shown_is_refused(guest: Callable[..., Sshd], name: bytes) -> None:
    machine = guest()
    Path(os.fsdecode(bytes(machine.home) + b"/" + name)).touch()

    async def go(connection: Connection) -> None:
        with pytest.raises(Unfit, match="bytes that can't be shown") as refused:
            await connection.list(["*"], MANY)
        assert refused.value.message.isprintable()

    with_it(machine, go)


def test_names_that_are_only_odd_are_kept(guest: Callable[..., Sshd], tmp_path: Path) -> None:
    machine = guest()
    names = ["x" * 255, "-rf", "--", "a b", "$(touch hacked)", ".hidden", "ünï", "a'\"b", "*"]
    for name in names:
        (machine.home / "out").mkdir(exist_ok=True)
        (machine.home / "out" / name).write_text(name)
        (machine.home / name).write_text(name)

    async def go(connection: Connection) -> None:
        found = await connection.list(["out/*", "out/.h*"], MANY)
        for file in (*found, *await connection.list(["-*"], MANY)):
            await connection.get(file, tmp_path / "got")
            await connection.carry(file, connection, "carried")
        assert {file.name for file in found} == set(names)

    with_it(machine, go)
    for place in (tmp_path / "got", machine.home / "carried"):
        assert {path.name: path.read_text() for path in place.iterdir()} == {n: n for n in names}
    assert not list(tmp_path.rglob("hacked"))


def test_links_and_devices_come_as_the_files_they_stand_for_or_not(
    guest: Callable[..., Sshd], tmp_path: Path
) -> None:
    machine, out = guest(), tmp_path / "dev2" / "home" / "out"
    (out / "directory").mkdir(parents=True)
    (out / "file").write_text("content")
    (out / "hard").hardlink_to(out / "file")
    (out / "link").symlink_to("file")
    (out / "up").symlink_to("..")
    (out / "nowhere").symlink_to("/nonexistent")
    (out / "null").symlink_to("/dev/null")
    os.mkfifo(out / "fifo")

    async def go(connection: Connection) -> None:
        for file in await connection.list(["out/*"], MANY):
            await connection.get(file, tmp_path / "got")
        for pattern in ("out/up", "out/null", "out/fifo", "out/..", "/dev/zero"):
            with pytest.raises(NotFound):
                await connection.list([pattern], MANY)

    with_it(machine, go)
    got = {path.name: path.lstat() for path in (tmp_path / "got").iterdir()}
    assert set(got) == {"file", "hard", "link"}
    assert all(seen.st_mode == 0o100644 and seen.st_nlink == 1 for seen in got.values())


@pytest.mark.parametrize(
    ("sizes", "limits", "key", "summed"),
    [
        ((10,) * 5, Limits(files=3), "files", 3),
        ((10, 2**31, 10), Limits(file_size=2**30), "file_size", 1),
        ((10, 2**42, 10), Limits(), "file_size", 1),
        ((10, 2**32, 10), Limits(total_size=2**31), "total_size", 1),
    ],
    ids=["files", "one file", "one file, by default", "all together"],
)
def test_too_much_is_known_before_any_of_it_is_read(
    guest: Callable[..., Sshd], sizes: tuple[int, ...], limits: Limits, key: str, summed: int
) -> None:
    machine = guest(sha256sum='echo sum >>"$HOME/summed"; exec /usr/bin/sha256sum')
    (machine.home / "out").mkdir()
    for number, size in enumerate(sizes):
        with (machine.home / "out" / f"{number}").open("wb") as file:
            file.truncate(size)

    async def go(connection: Connection) -> None:
        (machine.home / "summed").unlink()
        with pytest.raises(Unfit) as refused:
            await connection.list(["out/*"], limits)
        assert f"larger '{key}'" in str(refused.value.remedy)

    with_it(machine, go)
    assert len((machine.home / "summed").read_text().splitlines()) == summed


def test_patterns_count_together(guest: Callable[..., Sshd]) -> None:
    machine = guest()
    for name in "abcd":
        (machine.home / name).write_text(name * 100)

    async def go(connection: Connection) -> None:
        assert len(await connection.list(["[ab]", "[a-d]"], Limits(files=4, total_size=400))) == 4
        for limits in (Limits(files=3), Limits(total_size=399)):
            with pytest.raises(Unfit):
                await connection.list(["[ab]", "[b-d]"], limits)

    with_it(machine, go)


LIES = [
    "",
    "no sense\\0\\n",
    "5 short\\nname\\0\\n",
    "-1 SUM\\nname\\0\\n",
    "99999999999999999999999 SUM\\nname\\0\\n",
    "5 SUM\\n..\\0\\n",
    "5 SUM\\nout/\\0\\n",
    "5 SUM\\n/\\0\\n",
    "5 SUM\\n\\033[2Jname\\0\\n",
    "5 SUM\\nname",
    "9000000000000 SUM\\nname\\0\\n",
    "5 -\\nname\\0\\n",
]


@pytest.mark.parametrize("lie", LIES)
def test_what_a_guest_says_of_its_files_is_not_believed(guest: Callable[..., Sshd], lie: str) -> None:
    text = lie.replace("SUM", "0" * 64)
    machine = guest(
        setsid=f"""case $3 in *'ls -dnL'*) printf '{text}'; exit 0; esac
exec /usr/bin/setsid "$@\""""
    )

    async def go(connection: Connection) -> None:
        with pytest.raises(FarmhandError) as refused:
            await connection.list(["name"], MANY)
        assert refused.value.message.isprintable()

    with_it(machine, go)


def test_a_list_without_end_is_ended(guest: Callable[..., Sshd]) -> None:
    machine = guest(setsid="case $3 in *'ls -dnL'*) exec yes; esac; exec /usr/bin/setsid \"$@\"")

    async def go(connection: Connection) -> None:
        with pytest.raises(DriverFailed, match="printed more than"):
            await connection.list(["*"], Limits(files=3))

    with_it(machine, go)


@pytest.mark.parametrize("stream", ["exec yes", "exit 0", "head -c 3", "cat() { :; }; exec tr x y"])
def test_a_stream_is_held_against_what_was_said_of_it(
    guest: Callable[..., Sshd], tmp_path: Path, stream: str
) -> None:
    machine = guest()
    (machine.home / "file").write_text("xyz" * 1000)
    (machine.root / "liar").write_text(f"#!/bin/sh\n{stream}\n")
    (machine.root / "liar").chmod(0o755)

    async def go(connection: Connection) -> None:
        (file,) = await connection.list(["file"], MANY)
        (tmp_path / "tools" / "cat").symlink_to(machine.root / "liar")
        with pytest.raises(DriverFailed, match=r"file arrived as sha256 .*, but the guest says"):
            await connection.get(file, tmp_path / "got")

    with_it(machine, go)
    assert not list((tmp_path / "got").iterdir())


@pytest.mark.parametrize("change", ["grows", "shrinks", "is another", "is a device", "is gone"])
@pytest.mark.parametrize("way", ["get", "carry"])
def test_a_file_that_changed_meanwhile_is_told_from_a_bad_disk(
    guest: Callable[..., Sshd], tmp_path: Path, change: str, way: str
) -> None:
    machine = guest()
    there = machine.home / "file"
    there.write_text("as it was")

    async def go(connection: Connection) -> None:
        (file,) = await connection.list(["file"], MANY)
        if change == "grows":
            with there.open("a") as open_there:
                open_there.write("x" * 5_000_000)
        elif change in ("shrinks", "is another"):
            there.write_text("as it is."[: 9 if change == "is another" else 2])
        else:
            there.unlink()
        if change == "is a device":
            there.symlink_to("/dev/zero")
        with pytest.raises(Unfit, match="file changed while it was read"):
            if way == "get":
                await connection.get(file, tmp_path / "got")
            else:
                await connection.carry(file, connection, "carried")

    with_it(machine, go)
    for place in (tmp_path / "got", machine.home / "carried"):
        assert not place.is_dir() or not list(place.iterdir())


# -- room ---------------------------------------------------------------------------------------


def test_holes_take_no_room(guest: Callable[..., Sshd], tmp_path: Path) -> None:
    machine = guest()
    with (machine.home / "disk.img").open("wb") as image:
        image.write(b"begin")
        image.seek(2**24)
        image.write(b"middle")
        image.truncate(2**25)

    async def go(connection: Connection) -> str:
        (file,) = await connection.list(["disk.img"], MANY)
        await connection.get(file, tmp_path)
        return file.sha256

    sha256 = with_it(machine, go)
    got = tmp_path / "disk.img"
    assert hashlib.sha256(got.read_bytes()).hexdigest() == sha256
    assert got.stat().st_size == 2**25
    assert got.stat().st_blocks * 512 < 2**23


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 40 MiB beyond what stays free."""
    place = tmp_path / "small"
    place.mkdir()
    size = files.SPARE + 40 * 2**20
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@NEEDS_ROOT
def test_what_does_not_fit_is_not_begun(guest: Callable[..., Sshd], small: Path) -> None:
    """By its size alone: it is sparse, and the guest's disk has it easily."""
    machine = guest(cat='echo read >>"$HOME/begun"; exec /bin/cat')
    with (machine.home / "sparse.img").open("wb") as image:
        image.truncate(2**31)

    async def go(connection: Connection) -> None:
        file = Moved("sparse.img", "sparse.img", 2**31, "0" * 64)  # as it is listed, without a sum of it
        with pytest.raises(NoSpace, match=r"no room for 2\.0G in .*small") as refused:
            await connection.get(file, small)
        assert "make room" in str(refused.value.remedy)

    with_it(machine, go)
    assert not list(small.iterdir())
    assert not (machine.home / "begun").exists()


@NEEDS_ROOT
def test_room_that_others_take_meanwhile_is_not_fought_over(
    guest: Callable[..., Sshd], small: Path
) -> None:
    """The guest sends a part, waits for the disk to fill, and goes on."""
    machine = guest(cat='head -c 5000000; while [ ! -e "$HOME/go" ]; do sleep 0.05; done; exec /bin/cat')
    (machine.home / "data").write_bytes(os.urandom(20_000_000))

    async def go(connection: Connection) -> None:
        (file,) = await connection.list(["data"], MANY)
        getting = asyncio.ensure_future(connection.get(file, small))
        while not any(path.stat().st_size for path in small.glob(".*.part")):
            await asyncio.sleep(0.02)
        (small / "other").write_bytes(os.urandom(35 * 2**20))
        (machine.home / "go").touch()
        with pytest.raises(NoSpace):
            await getting

    with_it(machine, go)
    assert [path.name for path in small.iterdir()] == ["other"]


# -- the source ---------------------------------------------------------------------------------


def test_a_guest_gets_no_more_programs_of_ours_than_it_can_use(
    guest: Callable[..., Sshd], tmp_path: Path
) -> None:
    """Each client of the offered repository is a git daemon here."""
    subprocess.run(["git", "init", "-q", tmp_path / "kata"], check=True)

    async def go(connection: Connection) -> None:
        url = await connection.offer_git(tmp_path / "kata", name="kata")
        port = int(url.split(":")[2].split("/")[0])
        said: list[str] = []

        def refused() -> bool:
            said.extend(connection.git_said())
            return bool(said)

        with contextlib.ExitStack() as clients:
            for _ in range(40):
                clients.enter_context(socket.create_connection(("127.0.0.1", port)))
            await asyncio.to_thread(wait_for, refused)
            assert said == ["more than 16 clients at once: one was refused"]
            assert len(_daemons()) <= 16
        await asyncio.to_thread(wait_for, lambda: not _daemons())
        assert "refs" not in await connection.output(f"git ls-remote {url}")

    with_it(guest(), go)


def _daemons() -> list[int]:
    """Git daemons that this process has started."""
    found = []
    for pid in children(os.getpid()):
        with contextlib.suppress(OSError):
            if b"daemon" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found
