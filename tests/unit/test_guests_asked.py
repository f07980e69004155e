"""Guests asked all at once: real sshds, one that hangs, one that isn't there, one that is full."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sshd_machine import Sshd, free_port, make_key

from hypervisors.api import FileSystem
from hypervisors.libvirt import guest_agent
from provision.guest import asking
from provision.guest.asking import GuestAnswer, ask_guests, full_places

LONG = 120.0  # seconds: a machine that is busy
HEAD = "Filesystem     1024-blocks     Used Available Capacity Mounted on\n"
MOUNTS = "".join(f"/dev/x /{at} ext4 rw,noatime 0 0\n" for at in ("", "b", "boot/efi"))


@contextlib.contextmanager
def machine(place: Path, shell: str = "") -> Iterator[Sshd]:
    place.mkdir()
    make_key(place / "key")
    made = Sshd("dev2", place / "dev2", place / "key", shell=shell).prepare().start()
    try:
        yield made
    finally:
        made.stop()


def test_who_answers_is_waited_for_and_who_does_not_holds_up_nobody(tmp_path: Path) -> None:
    """The limit is for those who don't: so it may be long here, where two answer and one is not there,
    and short where one hangs."""
    with machine(tmp_path / "a") as good:
        gone = replace(good.endpoint(), port=free_port())
        unknown = replace(good.endpoint(), host_key="", pinned=print)
        told = ask_guests([good.endpoint(), gone, unknown], LONG)
        assert [one.answers for one in told] == [True, False, True]
        assert told[0].full is not None
        assert told[2].full is None, "nobody learns a host key by looking"
        with socket.create_server(("127.0.0.1", 0)) as hung:
            silent = replace(good.endpoint(), port=hung.getsockname()[1])
            assert ask_guests([silent] * 100, 0.5) == [GuestAnswer(answers=False)] * 100
    assert ask_guests([]) == ()


def test_one_that_greets_and_then_hangs_is_known_to_answer(tmp_path: Path) -> None:
    with machine(tmp_path / "a") as good, socket.create_server(("127.0.0.1", 0)) as stuck:
        there = replace(good.endpoint(), port=stuck.getsockname()[1])
        held: list[socket.socket] = []

        def greet() -> None:
            one, _ = stuck.accept()
            one.sendall(b"SSH-2.0-stuck\r\n")
            held.append(one)

        thread = threading.Thread(target=greet)
        thread.start()
        assert ask_guests([there], 2.0) == [GuestAnswer(answers=True, full=None)]
        thread.join()
        held[0].close()


def test_what_its_agent_told_is_not_asked_again(tmp_path: Path) -> None:
    """Nor is it lost where no login works."""
    told = {"dev2": (FileSystem("/", 2**30, 0), FileSystem("/data", 2**30, 2**29))}
    full = ("/ (0B of 1G left)",)
    with machine(tmp_path / "a") as good:
        nobody_s = replace(good.endpoint(), key=tmp_path / "lost")
        gone = replace(good.endpoint(), port=free_port())
        assert ask_guests([nobody_s, gone], LONG, told=told) == [
            GuestAnswer(answers=True, full=full), GuestAnswer(answers=False, full=full)
        ]  # fmt: skip
        assert ask_guests([nobody_s], LONG) == [GuestAnswer(answers=True, full=None)]


@pytest.mark.parametrize(
    ("one", "read"),
    [
        (("/", "ext4", 100, 40), [FileSystem("/", 100, 60)]),
        (("/", "ext4", None, None), []),
        (("/snap", "squashfs", 100, 100), []),
        (("/", "ext4", 40, 100), []),
        (("/" * 5000, "ext4", 100, 40), []),
    ],
    ids=["whole", "no sizes", "read-only", "more than there is", "long"],
)
def test_what_an_agent_tells_is_judged(one: tuple[object, ...], read: list[FileSystem]) -> None:
    keys = ("mountpoint", "fstype", "total-bytes", "used-bytes")
    told = {f"fs.0.{key}": value for key, value in zip(keys, one, strict=True) if value is not None}
    assert list(guest_agent.file_systems_told({"fs.count": 1, **told})) == read
    assert list(guest_agent.file_systems_told({})) == []
    many = {f"fs.{n}.{key}": value for n in range(2000) for key, value in zip(keys, one, strict=True)}
    assert len(list(guest_agent.file_systems_told({"fs.count": 2**40, **many}))) == 1000 * len(read)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system for it")
def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    with machine(tmp_path / "a", shell="/bin/sh") as full:
        assert full.process
        place = tmp_path / "a" / "data"
        place.mkdir()
        fill = (
            f"mount -t tmpfs -o size=8M /dev/full-disk {place} && "
            f"! head -c 9M /dev/zero >{place}/log 2>/dev/null"
        )
        subprocess.run(["nsenter", "-t", str(full.process.pid), "-m", "sh", "-c", fill], check=True)
        (told,) = ask_guests([full.endpoint()], LONG)
    assert told.answers and told.full is not None
    assert any(one.startswith(f"{place} (0") for one in told.full), told


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("df: not found\n", None),
        (HEAD + "/dev/vda1 10000000 4000000 6000000 40% /\n" + MOUNTS, ()),
        (HEAD + "/dev/vda1 10000000 9999000 1024 100% /\n" + MOUNTS, ("/ (1M of 9.5G left)",)),
        (HEAD + "overlay 10000000 9999000 0 100% /\n" + MOUNTS, ("/ (0B of 9.5G left)",)),
        (HEAD + "/dev/vda15 126678 10922 115756 9% /boot/efi\n" + MOUNTS, ()),
        (HEAD + "tmpfs 10000 10000 0 100% /b\n" + MOUNTS, ()),
        (HEAD + "/dev/loop3 10000 10000 0 100% /snap\n/dev/loop3 /snap squashfs ro,nodev 0 0\n", ()),
        (HEAD + "/dev/vda1 x y z 100% /\n" + MOUNTS, None),
        (HEAD + f"/dev/a {'9' * 5000} 1 1 100% /\n/dev/b 1024 1024 0 100% /b\n" + MOUNTS,
         ("/b (0B of 1M left)",)),
    ],
    ids=["nothing", "no df", "room", "full", "root", "small", "memory", "read-only", "words", "long"],
)  # fmt: skip
def test_what_a_guest_says_of_its_disks(text: str, found: tuple[str, ...] | None) -> None:
    assert full_places(text) == found


def test_of_many_places_some_are_told() -> None:
    text = "".join(f"/dev/a{n} 99999 99999 0 100% /m{n}\n" for n in range(5000))
    mounts = "".join(f"/dev/a{n} /m{n} ext4 rw 0 0\n" for n in range(5000))
    many = full_places(HEAD + text + mounts)
    assert many is not None and len(many) == asking._PLACES
