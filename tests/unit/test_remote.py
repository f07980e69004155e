"""The ssh connection, against real sshds."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from sshd_machine import Sshd, alive, free_port, gone, make_key, wait_for

from host.progress import Progress, Pulse
from host.run import Runner
from inventory.errors import (
    Call,
    Conflict,
    DriverFailed,
    NotFound,
    TimedOut,
    Unfit,
    Unsupported,
    UsageError,
    WrongState,
    calls_in,
)
from inventory.model import Limits
from provision.guest.connection import Connection
from provision.guest.remote import tail_of
from provision.guest.ssh_connection import wait_ready


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def dev2(tmp_path: Path, key: Path):
    machine = Sshd("dev2", tmp_path / "dev2", key).prepare().start()
    yield machine
    machine.stop()


@pytest.fixture
def prod(tmp_path: Path, key: Path):
    machine = Sshd("prod", tmp_path / "prod", key).prepare().start()
    yield machine
    machine.stop()


def ready(
    endpoint, *, since=0.0, timeout=20.0, running=lambda: True, tail=lambda: "",
    pulse=lambda: None, said=None,
):  # fmt: skip
    said = [] if said is None else said
    progress = Progress(pulse, timeout)
    waiting = wait_ready(
        endpoint, since=since, progress=progress, running=running, tail=tail, working=said.append
    )
    return asyncio.run(waiting), said


def run(machine: Sshd, script: str, *, timeout: float = 30, env=None):
    """Status, time-out and output of one script."""

    async def go():
        parts: list[bytes] = []
        async with await Connection.open(machine.endpoint()) as connection:
            result = await connection.run(script, timeout=timeout, env=env, log=parts.append)
        return result, b"".join(parts)

    return asyncio.run(go())


# -- waiting ------------------------------------------------------------------------------------


def test_ready_tells_boot_id_and_skew(dev2):
    answer, _ = ready(dev2.endpoint())
    assert answer.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert abs(answer.skew) < 2
    assert answer.uptime > 0


def test_ready_waits_for_a_machine_that_comes_up_late(tmp_path, key):
    machine = Sshd("dev2", tmp_path / "late", key).prepare()
    threading.Timer(0.7, machine.start).start()
    try:
        _, said = ready(machine.endpoint())
        assert any("no connection" in line for line in said)
    finally:
        machine.stop()


def test_a_stranger_is_named_at_once(dev2, tmp_path):
    other = make_key(tmp_path / "other")
    with pytest.raises(Conflict, match=f"dev2: somebody else answers at 127.0.0.1:{dev2.port}"):
        ready(dev2.endpoint(host_key=other), timeout=600)
    with pytest.raises(Conflict, match="somebody else"):
        asyncio.run(Connection.open(dev2.endpoint(host_key=other)))


def test_a_stranger_with_another_kind_of_key_is_a_stranger(dev2, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", tmp_path / "ecdsa"], check=True)
    other = (tmp_path / "ecdsa.pub").read_text().rsplit(None, 1)[0]
    with pytest.raises(Conflict, match="somebody else"):
        ready(dev2.endpoint(host_key=other), timeout=600)


def test_a_server_with_keys_of_several_kinds_is_known_by_the_one_it_is_known_by(dev2):
    dev2.stop()
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", dev2.root / "rsa"], check=True)
    rsa = (dev2.root / "rsa.pub").read_text().rsplit(None, 1)[0]
    config = dev2.root / "config"
    config.write_text(f"HostKey {dev2.root}/rsa\n{config.read_text()}")
    dev2.start()
    ready(dev2.endpoint())
    ready(dev2.endpoint(host_key=rsa))


def test_the_boot_from_before_is_not_ready(dev2):
    with pytest.raises(TimedOut, match="still the boot from before") as caught:
        ready(dev2.endpoint(), since=time.monotonic(), timeout=1, tail=lambda: "login:")
    assert caught.value.detail == "login:"
    assert Call("console", vm="dev2") in calls_in(caught.value.remedy)


def test_the_wait_says_what_it_sees(dev2):
    dev2.stop()
    pulse = Pulse(console=70, said="\x1b[32mStarting\x07 systemd-udevd\n", read=2**27, written=0)
    with pytest.raises(TimedOut, match=r"nothing has gone on in it for 3s \(console") as caught:
        ready(dev2.endpoint(), timeout=3, pulse=lambda: pulse)
    said: list[str] = []
    with pytest.raises(WrongState):
        ready(dev2.endpoint(), running=_for(3), pulse=lambda: pulse, said=said)
    assert re.search(
        r"^waiting for ssh; console \ds ago: 'Starting\\x07 systemd-udevd', disk \ds ago: 128M; "
        r"no connection \(Connection refused\)$",
        said[-1],
    )
    assert "no connection" in caught.value.message


def _for(seconds):
    began = time.monotonic()
    return lambda: time.monotonic() < began + seconds


def test_a_stopped_machine_ends_the_wait(dev2):
    dev2.stop()
    with pytest.raises(WrongState, match="dev2 stopped"):
        ready(dev2.endpoint(), timeout=600, running=lambda: False, tail=lambda: "Kernel panic")


def test_an_open_port_without_ssh_is_not_ready(key, dev2):
    """As QEMU's port forward: it accepts, then says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = dev2.endpoint(port=silent.getsockname()[1])
        with pytest.raises(TimedOut, match="nothing speaks there"):
            ready(endpoint, timeout=1.5)


def test_an_address_that_never_answers_is_no_open_port(dev2):
    """A server whose queue is full: the kernel drops what asks to connect, as where nobody is."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first:
        first.connect(full.getsockname())
        with pytest.raises(TimedOut, match="nothing answers at that address yet") as caught:
            ready(dev2.endpoint(port=full.getsockname()[1]), timeout=1)
    assert "open" not in caught.value.message
    assert caught.value.remedy[0] == "see whether it has that address: "


def test_a_refused_key_is_waited_out_and_named(dev2, tmp_path):
    make_key(tmp_path / "unknown")
    with pytest.raises(TimedOut, match="refuses the key"):
        ready(dev2.endpoint(key=tmp_path / "unknown"), timeout=0.5)


def test_a_machine_of_nobodys_is_learned_once(dev2, prod, tmp_path):
    known, told = tmp_path / "known_hosts", []
    unknown = {"host_key": "", "known_hosts": known, "pinned": told.append}
    ready(dev2.endpoint(**unknown))
    assert known.read_text().split()[:2] == [f"[127.0.0.1]:{dev2.port}", "ssh-ed25519"]
    ready(dev2.endpoint(**unknown))
    assert len(known.read_text().splitlines()) == 1
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)
    ready(dev2.endpoint(**unknown))
    assert len(known.read_text().splitlines()) == 1
    shown = subprocess.run(
        ["ssh-keygen", "-lf", dev2.root / "host.pub"], check=True, capture_output=True, text=True
    )
    (line,) = told
    assert shown.stdout.split()[1] in line and str(known) in line
    known.write_text(f"[127.0.0.1]:{prod.port} {dev2.host_key}\n")
    with pytest.raises(Conflict, match="somebody else"):
        ready(prod.endpoint(**unknown))
    assert told == [line]
    known.unlink()
    ready(prod.endpoint(**unknown))
    assert len(told) == 2, "never again without a word"


def test_no_key_is_accepted_without_a_word(dev2):
    with pytest.raises(ValueError, match="no host key"):
        dev2.endpoint(host_key="")


def test_unknown_address(dev2):
    with pytest.raises(NotFound, match="nowhere"):
        ready(dev2.endpoint(host="nowhere.invalid"))


# -- commands -----------------------------------------------------------------------------------


def test_output_is_merged_in_order_and_streams(dev2):
    async def go():
        seen: list[bytes] = []
        both = asyncio.Event()

        def log(data: bytes) -> None:
            seen.append(data)
            if b"two" in b"".join(seen):
                both.set()

        async with await Connection.open(dev2.endpoint()) as connection:
            script = "echo one; echo two >&2; while [ ! -e go ]; do sleep 0.02; done; echo three"
            task = asyncio.ensure_future(connection.run(script, timeout=30, log=log))
            await asyncio.wait_for(both.wait(), 120)  # before it ends: it waits for us
            (dev2.home / "go").touch()
            result = await task
        return result, b"".join(seen)

    result, output = asyncio.run(go())
    assert (result.status, result.timed_out, output) == (0, False, b"one\ntwo\nthree\n")


def test_a_command_that_reads_stdin_does_not_eat_the_script(dev2):
    result, output = run(dev2, "cat; read x || echo closed\necho after")
    assert output == b"closed\nafter\n"
    assert result.status == 0


@pytest.mark.parametrize(
    ("script", "status"), [("exit 7", 7), ("false; echo no", 1), ("echo $unset", 2), ("kill -9 $$", 137)]
)
def test_status(dev2, script, status):
    result, output = run(dev2, script)
    assert (result.status, result.timed_out) == (status, False)
    assert b"no\n" not in output


def test_environment_and_bytes_are_passed_as_they_are(dev2):
    value = "a 'b' \"c\" $HOME `id` \\ ünï\nsecond line"
    result, output = run(dev2, "printf %s \"$GIT_REVISION\"; printf '\\377\\000\\001'; pwd",
                         env={"GIT_REVISION": value})  # fmt: skip
    assert result.status == 0
    assert output == value.encode() + b"\xff\x00\x01" + f"{dev2.home}\n".encode()
    with pytest.raises(UsageError, match="not the name"):
        run(dev2, "true", env={"A;B": "x"})


def test_a_long_script_arrives_whole(dev2):
    script = "".join(f": line {n}\n" for n in range(9000)) + "echo end"
    assert run(dev2, script)[1] == b"end\n"
    with pytest.raises(UsageError, match="bytes"):
        run(dev2, "x" * 200_000)


TREE = 'sleep 300 & sh -c "trap \\"\\" TERM; sleep 301 & wait; sleep 302" & echo $! > pids; \
sleep 303 & echo $! >> pids; echo started; wait'


def test_a_time_limit_ends_the_whole_tree(dev2):
    result, output = run(dev2, TREE, timeout=1)
    assert result.timed_out
    assert output == b"started\n"
    for pid in (dev2.home / "pids").read_text().split():
        assert gone(int(pid))


def test_cancelling_ends_the_whole_tree(dev2):
    async def go():
        started = asyncio.Event()
        async with await Connection.open(dev2.endpoint()) as connection:
            task = asyncio.ensure_future(
                connection.run(TREE, timeout=300, log=lambda _data: started.set())
            )
            await asyncio.wait_for(started.wait(), 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for pid in (dev2.home / "pids").read_text().split():
                assert gone(int(pid))
            assert (await connection.output("echo usable")) == "usable\n"

    asyncio.run(go())


def test_a_lost_connection_is_told_and_leaves_nothing_running(dev2):
    async def go():
        output: list[bytes] = []
        connection = await Connection.open(dev2.endpoint())
        task = asyncio.ensure_future(connection.run(TREE, timeout=300, log=output.append))
        while b"started" not in b"".join(output):
            await asyncio.sleep(0.02)
        dev2.cut()
        with pytest.raises(DriverFailed, match=r"dev2: the ssh connection to 127\.0\.0\.1:\d+ was lost"):
            await task
        with pytest.raises(DriverFailed):
            await connection.output("true")
        assert connection.closed
        await connection.close()

    asyncio.run(go())
    for pid in (dev2.home / "pids").read_text().split():
        assert gone(int(pid))


def test_a_daemon_left_behind_does_not_hold_up_the_step(dev2):
    result, output = run(dev2, "sleep 60 & echo $! > pid; echo done")
    assert (result.status, output) == (0, b"done\n")
    assert alive(int((dev2.home / "pid").read_text()))
    os.kill(int((dev2.home / "pid").read_text()), 15)


def test_clock(dev2):
    async def go():
        async with await Connection.open(dev2.endpoint()) as connection:
            return await connection.facts()

    assert abs(asyncio.run(go()).skew) < 2


# -- files --------------------------------------------------------------------------------------


def test_get(dev2, tmp_path):
    (dev2.home / "out dir").mkdir()
    (dev2.home / "out dir" / "a-1.rpm").write_bytes(os.urandom(3_000_000))
    (dev2.home / "out dir" / "b $x.rpm").write_bytes(b"")
    (dev2.home / "out dir" / "c.rpm").mkdir()

    async def go(*patterns):
        async with await Connection.open(dev2.endpoint()) as connection:
            files = await connection.list(patterns, Limits())
            for file in files:
                await connection.get(file, tmp_path / "artifacts")
            return files

    files = asyncio.run(go("out dir/*.rpm", "~/out dir/a-[0-9].rpm"[2:]))
    assert [file.name for file in files] == ["a-1.rpm", "b $x.rpm"]
    for file in files:
        data = (tmp_path / "artifacts" / file.name).read_bytes()
        assert data == (dev2.home / "out dir" / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(list((tmp_path / "artifacts").iterdir())) == 2
    for hostile in ("$(touch hacked)", "`touch hacked`", "; touch hacked", "'", "-e"):
        with pytest.raises(NotFound, match="no file matches"):
            asyncio.run(go(hostile))
    assert not (dev2.home / "hacked").exists()


def test_two_files_of_one_name_are_refused(dev2):
    for name in ("x", "y"):
        (dev2.home / name).mkdir()
        (dev2.home / name / "same").touch()

    async def go():
        async with await Connection.open(dev2.endpoint()) as connection:
            await connection.list(["*/same"], Limits())

    with pytest.raises(Unfit, match="two files called same"):
        asyncio.run(go())


def test_transfer_and_put(dev2, prod, tmp_path):
    data = os.urandom(5_000_000)
    (dev2.home / "prod-1.rpm").write_bytes(data)
    (tmp_path / "more").write_bytes(b"more")

    async def go():
        async with (
            await Connection.open(dev2.endpoint()) as source,
            await Connection.open(prod.endpoint()) as target,
        ):
            moved = await source.list(["*.rpm"], Limits())
            await source.carry(moved[0], target, "in/coming")
            put = await target.put([tmp_path / "more"], str(prod.home / "in"))
            return moved, put

    moved, put = asyncio.run(go())
    assert (prod.home / "in/coming/prod-1.rpm").read_bytes() == data
    assert [f.name for f in (prod.home / "in/coming").iterdir()] == ["prod-1.rpm"]
    assert moved[0].sha256 == hashlib.sha256(data).hexdigest()
    assert (prod.home / "in/more").read_text() == "more"
    assert put[0].size == 4


def test_writing_where_one_may_not_names_the_place(dev2, prod):
    (dev2.home / "file").touch()
    (prod.home / "taken").touch()

    async def go():
        async with (
            await Connection.open(dev2.endpoint()) as source,
            await Connection.open(prod.endpoint()) as target,
        ):
            (file,) = await source.list(["file"], Limits())
            await source.carry(file, target, "taken")

    with pytest.raises(DriverFailed, match="prod: writing taken/file"):
        asyncio.run(go())


# -- the source ---------------------------------------------------------------------------------


def repository(path: Path) -> str:
    path.mkdir()
    git = ["git", "-C", path, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    (path / "file").write_text("one")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "One"], check=True)
    return subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_git_is_offered_read_only_and_nothing_else(dev2, tmp_path):
    commit = repository(tmp_path / "100% kata")
    repository(tmp_path / "other")

    async def go():
        output: list[bytes] = []
        async with await Connection.open(dev2.endpoint(), runner=Runner(changes=False)) as connection:
            url = await connection.offer_git(tmp_path / "100% kata", name="kata")
            assert url.startswith("git://127.0.0.1:")
            assert url.endswith("/kata.git")
            script = """git clone -q "$URL" src; git -C src rev-parse HEAD
                git -C src fetch -q origin "$C"
                git -C src push -q origin HEAD:refs/heads/evil 2>/dev/null && echo pushed
                git archive --remote="$URL" HEAD 2>/dev/null | wc -c"""
            env = {"URL": url, "C": commit}
            result = await connection.run(script, env=env, timeout=60, log=output.append)
        return result, b"".join(output).decode(), url

    result, output, url = asyncio.run(go())
    assert result.status == 0, output
    assert output.split() == [commit, "0"]
    port = int(url.split(":")[2].split("/")[0])
    with socket.socket() as probe:  # the listener went with the connection
        assert wait_for(lambda: probe.connect_ex(("127.0.0.1", port)) != 0)


def test_git_is_not_offered_where_forwarding_is_off(tmp_path, key):
    machine = Sshd("dev2", tmp_path / "m", key, forwarding=False).prepare().start()
    repository(tmp_path / "kata")

    async def go():
        async with await Connection.open(machine.endpoint()) as connection:
            await connection.offer_git(tmp_path / "kata", name="kata")

    try:
        with pytest.raises(Unsupported, match="forwards no ports"):
            asyncio.run(go())
    finally:
        machine.stop()


def test_nobody_there(dev2):
    with pytest.raises(DriverFailed, match="no ssh at"):
        asyncio.run(Connection.open(dev2.endpoint(port=free_port())))
    with pytest.raises(NotFound, match="no private key"):
        asyncio.run(Connection.open(dev2.endpoint(key=Path("/nonexistent"))))


def test_tail(tmp_path):
    log = tmp_path / "console.log"
    assert tail_of(log) == tail_of(None) == ""
    log.write_bytes(b"".join(b"line %d\r\n" % n for n in range(100)))
    assert tail_of(log, lines=2) == "line 98\nline 99"
    log.write_bytes(b"\x1b[2J\x1b[01;01HBooting\x1b[0m\r\n\r\n")
    assert tail_of(log) == "Booting", "it clears nobody's screen"
