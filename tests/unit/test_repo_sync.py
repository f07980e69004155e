"""A mirror on another host: a real rsync to real sshds, that are cut off at any moment."""

from __future__ import annotations

import os
import random
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from repo_tree import RepoTree, check_repository, make_deb
from sshd_machine import Sshd, free_port, make_key

from host.leases import FileLeases
from host.run import Runner
from inventory.errors import (
    Busy,
    ConnectionLost,
    FarmhandError,
    NotFound,
    NotOurs,
    UsageError,
    WrongState,
)
from repositories.change import changing
from repositories.mirrors.snapshot import take_snapshot
from repositories.mirrors.sync import Synced, SyncTarget, sync
from repositories.pages import write_pages

_PHASES = 6
"""Connections of a sync: a look, packages, indexes, entries, lists, pointers."""


@pytest.fixture
def tree(tmp_path: Path) -> RepoTree:
    made = RepoTree(tmp_path / "repository")
    made.publish("tested", *((f"p{number}", make_deb(f"p{number}", size=20000)) for number in range(8)))
    return made


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    make_key(tmp_path / "client")
    machine = Sshd("far", tmp_path / "far", tmp_path / "client").prepare().start()
    yield machine
    machine.stop()


def target_of(sshd: Sshd, port: int = 0, directory: str = "mirror") -> SyncTarget:
    known = sshd.root / "known hosts %h'$X"  # as a path may be
    known.write_text("".join(f"[127.0.0.1]:{p} {sshd.host_key}\n" for p in {port, sshd.port}))
    return SyncTarget(
        host="127.0.0.1", directory=str(sshd.home / directory), port=port or sshd.port,
        key=sshd.client_key, known_hosts=known,
    )  # fmt: skip


def run(tree: RepoTree, target: SyncTarget, *, remove: bool = False) -> Synced:
    return sync(tree.repository, target, Runner(), lambda _text: None, remove=remove)


def content(top: Path) -> dict[str, object]:
    """By path: what a link leads to, or a file's inode by its first name, bytes and mode. Without the
    published trees that no pointer leads to any more."""
    heads = {str(link.resolve()) for link in top.glob("channels/*") if link.is_symlink()}
    past = {path for path in top.glob("published/*/*") if str(path.resolve()) not in heads}
    first: dict[int, str] = {}
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if name.startswith(".") or past.intersection(path.parents):
            continue
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            inode = first.setdefault(path.stat().st_ino, name)
            found[name] = (inode, path.read_bytes(), oct(path.stat().st_mode))
    return found


def plain(found: dict[str, object]) -> dict[str, object]:
    """Without the modes: keys and mirror lists have another one here."""
    return {name: each if isinstance(each, str) else each[:2] for name, each in found.items()}


def test_a_mirror_is_all_that_is_served(tree: RepoTree, sshd: Sshd) -> None:
    tree.publish("experimental", ("one", make_deb("one")))
    write_pages(tree.repository)
    directory = "a b/c'd\"e/*$(x)[1]\\"
    target = target_of(sshd, directory=directory)
    done = run(tree, target)
    mirror = sshd.home / directory
    assert plain(content(mirror)) == plain(content(tree.top))
    assert {mode for _, _, mode in (v for v in content(mirror).values() if not isinstance(v, str))} == {
        "0o100444"
    }
    assert not (mirror / ".farmhand").exists()
    assert done.channels == {"experimental": 2, "tested": 1}
    assert done.files > 9
    assert done.bytes > 160000
    again = run(tree, target)
    assert (again.files, again.bytes, again.removed) == (0, 0, 0)
    tree.publish("tested", ("late", make_deb("late", size=100000)))
    more = run(tree, target)
    assert 100000 < more.bytes < 120000
    assert check_repository(mirror) == check_repository(tree.top)


@contextmanager
def cutting(sshd: Sshd, connection: int, after: int) -> Iterator[int]:
    """A way to the sshd, by its port, that breaks when so many bytes went there on that connection, from
    0; and the sshd's sessions with it."""
    port, left = free_port(), [after]
    listening = socket.create_server(("127.0.0.1", port))
    ended = threading.Event()

    def pump(source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(4096):
                if counted:
                    left[0] -= len(data)
                    if left[0] <= 0 and not ended.is_set():
                        ended.set()
                        sshd.cut()
                        break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        try:
            for number in count():
                near, _ = listening.accept()
                if ended.is_set():
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", sshd.port))
                for ends in ((near, far, number == connection), (far, near, False)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()
        except OSError:
            pass

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield port
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def test_a_cut_leaves_the_mirror_whole(tree: RepoTree, sshd: Sshd) -> None:
    """At 20 points, some in each phase; then one more run completes it. A connection takes about 4000
    bytes by itself."""
    mirror, chance = sshd.home / "mirror", random.Random(7)
    run(tree, target_of(sshd))
    before = check_repository(mirror)
    cut = seen = 0
    for number in range(20):
        debs = [(f"n{number}-{n}", make_deb(f"n{number}-{n}", size=4000)) for n in range(3)]
        tree.publish("tested", *debs)
        now = check_repository(tree.top)
        phase = number % _PHASES
        with cutting(sshd, phase, chance.randrange(2000, 15000 if phase == 1 else 5500)) as port:
            try:
                run(tree, target_of(sshd, port))
                assert check_repository(mirror) == now
            except ConnectionLost as error:
                assert "\n" not in error.message
                cut += 1
        found = check_repository(mirror)
        assert found in (before, now), "neither the old state nor the new one"
        seen += found == now
        if found == now:
            before = now
    assert cut >= 12
    run(tree, target_of(sshd), remove=True)
    assert plain(content(mirror)) == plain(content(tree.top))
    assert not [path for path in mirror.rglob(".*") if not path.name.startswith(".mirror-of-")]
    assert check_repository(mirror) == check_repository(tree.top)


def test_what_is_gone_here_goes_there_last(tree: RepoTree, sshd: Sshd) -> None:
    """Only where that is asked for, and not a mark or what a mirror's admin put beside it."""
    target, mirror = target_of(sshd), sshd.home / "mirror"
    tree.publish("experimental", ("one", make_deb("one")))
    run(tree, target)
    (mirror / "robots.txt").write_text("no\n")
    (mirror / "pool" / ".p1.deb.Ab3dEf").write_text("what a cut transfer left")
    kept = content(mirror)
    (gone,) = tree.top.glob("pool/*/*/one_1.0_all.deb")
    gone.unlink()
    gone.parent.rmdir()
    with changing(tree.repository) as change:
        change.collect(tree.repository.documents.read(2))
    for path in (tree.top / "channels").glob("experimental*"):
        path.unlink()
    (tree.top / "dists" / "experimental").unlink()
    for path in sorted((tree.top / "published" / "experimental").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    (tree.top / "published" / "experimental").rmdir()
    run(tree, target)
    assert content(mirror) == kept
    done = run(tree, target, remove=True)
    assert done.removed > 10
    left = plain(content(mirror))
    assert left.pop("robots.txt")
    assert left == plain(content(tree.top))
    assert not (mirror / "pool" / ".p1.deb.Ab3dEf").exists()
    check_repository(mirror)


def test_what_is_no_mirror_is_left_alone(tree: RepoTree, sshd: Sshd, tmp_path: Path) -> None:
    mirror = sshd.home / "mirror"
    mirror.mkdir()
    (mirror / "pool").mkdir()
    with pytest.raises(NotOurs, match="is no mirror of kata: it has pool"):
        run(tree, target_of(sshd), remove=True)
    (mirror / "pool").rmdir()
    run(tree, target_of(sshd))
    other = RepoTree(tmp_path / "other")
    other.publish("tested")
    with pytest.raises(NotOurs, match="is a mirror of another repository"):
        run(other, target_of(sshd), remove=True)


def test_one_at_a_time(tree: RepoTree, sshd: Sshd) -> None:
    target = target_of(sshd)
    with (
        FileLeases(tree.layout.syncs).hold((f"the sync to {target}",), f"pid {os.getpid()} here"),
        pytest.raises(Busy, match=f"the sync to {re.escape(str(target))} is held by pid"),
    ):
        run(tree, target)
    run(tree, target)


def test_the_repository_goes_on_meanwhile(tree: RepoTree, sshd: Sshd) -> None:
    """What is published during a sync is for the next one."""
    mirror, states = sshd.home / "mirror", []

    def say(text: str) -> None:
        if text.startswith("metadata"):
            states.append(check_repository(tree.top))
            for number in range(3):  # so that the published tree is gone that the pointer led to
                tree.publish("tested", (f"late{number}", make_deb(f"late{number}")))

    done = sync(tree.repository, target_of(sshd), Runner(), say)
    assert done.channels == {"tested": 1}
    assert [check_repository(mirror)] == states
    run(tree, target_of(sshd), remove=True)
    assert check_repository(mirror) == check_repository(tree.top)


def test_a_generation_collected_meanwhile_is_left_out(tree: RepoTree) -> None:
    tree.publish("tested", ("two", make_deb("two")))
    with tree.repository.staging() as staging:
        snapshot = take_snapshot(tree.repository, staging.directory / "mirror")
        with changing(tree.repository) as change:
            change.collect(tree.repository.documents.read(1))
        snapshot.forget_collected(tree.repository)
        assert {one.path for one in snapshot.trees} == {"generations/2", "published/tested/2"}
        with changing(tree.repository) as change:
            change.collect(tree.repository.documents.read(2))
        with pytest.raises(WrongState, match="its channel tested moved on meanwhile"):
            snapshot.forget_collected(tree.repository)


def test_what_is_missing_is_one_line(tree: RepoTree, sshd: Sshd, tmp_path: Path, monkeypatch) -> None:
    def refused(target: SyncTarget) -> FarmhandError:
        with pytest.raises(FarmhandError) as raised:
            run(tree, target)
        assert "\n" not in raised.value.message
        return raised.value

    target = target_of(sshd)
    unknown = refused(replace(target, known_hosts=tmp_path / "none"))
    assert isinstance(unknown, ConnectionLost)
    assert "Host key verification failed" in unknown.message
    assert isinstance(refused(replace(target, port=free_port())), ConnectionLost)
    (sshd.home / "file").touch()
    assert "Not a directory" in refused(target_of(sshd, directory="file/below")).message
    with pytest.raises(NotFound, match="there is nothing in repository kata yet"):
        run(RepoTree(tmp_path / "none"), target)
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "sh").symlink_to("/bin/sh")
    sshd.stop()
    config = sshd.root / "config"
    config.write_text(config.read_text().replace("SetEnv ", f"SetEnv PATH={bare} "))
    sshd.start()
    assert "has no rsync" in refused(target_of(sshd)).message
    monkeypatch.setattr("repositories.mirrors.sync.which", lambda _name: None)
    assert refused(target).message == "rsync is not installed here"


def test_places() -> None:
    for text, found in (
        ("host:/srv/mirror", ("host", "/srv/mirror", "", None)),
        ("joe@host.example.org:/srv/a b", ("host.example.org", "/srv/a b", "joe", None)),
        ("joe@[fd00::1]:2222:/srv", ("fd00::1", "/srv", "joe", 2222)),
    ):
        target = SyncTarget.parse(text)
        assert (target.host, target.directory, target.user, target.port) == found
    for text in (
        "/srv", "host", "host:srv", "host::module", "-oProxyCommand=x:/srv", "a b:/srv", "-x@host:/srv",
        "host:/", "host:/srv\n", ":/srv", "host:123456:/srv",
    ):  # fmt: skip
        with pytest.raises(UsageError):
            SyncTarget.parse(text)
