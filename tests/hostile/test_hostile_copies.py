"""Guests whose tar sends what is meant to land elsewhere, fill this machine, or never end."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from host import files
from inventory.errors import FarmhandError, NoSpace, Unfit
from provision.guest import copying
from provision.guest.connection import Connection
from provision.guest.copying import CopiedTree, copy_out
from tests.unit.sshd_machine import Sshd, make_key

Entry = tuple[str, bytes, object]  # name, type, what it has or where it leads


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where it is copied to, with a neighbour that nothing may touch."""
    (tmp_path / "here" / "neighbour").mkdir(parents=True)
    (tmp_path / "here" / "neighbour" / "file").write_text("mine\n")
    return tmp_path / "here"


@pytest.fixture
def copied(tmp_path: Path, place: Path) -> Iterator[Callable[..., CopiedTree]]:
    """Copies from a guest whose tar prints these bytes."""
    make_key(tmp_path / "key")
    tools, sent = tmp_path / "tools", tmp_path / "sent"
    tools.mkdir()
    path = {"PATH": f"{tools}:/usr/bin:/bin"}
    machine = Sshd("dev2", tmp_path / "dev2", tmp_path / "key", environment=path).prepare().start()
    (machine.home / "dir").mkdir()
    (machine.home / "file").write_text("file\n")

    def copy(data: bytes, *, of: str = "dir", script: str = "") -> CopiedTree:
        sent.write_bytes(data)
        (tools / "tar").write_text(f"#!/bin/sh\n{script or f'exec cat {sent}'}\n")
        (tools / "tar").chmod(0o755)

        async def go() -> CopiedTree:
            async with await Connection.open(machine.endpoint()) as connection:
                return await copy_out(connection, of, place, lambda _: None)

        return asyncio.run(go())

    yield copy
    machine.stop()
    assert (place / "neighbour" / "file").read_text() == "mine\n"
    assert {path.name for path in place.iterdir()} <= {"neighbour", "dir", "file"}
    assert {path.name for path in tmp_path.iterdir()} <= {
        "here", "key", "key.pub", "tools", "sent", "dev2",
    }  # fmt: skip


def packed(*entries: Entry, format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, kind, what in (("./", tarfile.DIRTYPE, ""), *entries):
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o7777
            if isinstance(what, bytes):
                info.size = len(what)
                tar.addfile(info, io.BytesIO(what))
            else:
                info.linkname = str(what)
                tar.addfile(info)
    return out.getvalue()


FILE, DIRECTORY, LINK, AGAIN = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize(
    "entries",
    [
        (("../neighbour/file", FILE, b"x"),),
        (("./a/../../neighbour/file", FILE, b"x"),),
        (("/etc/farmhand-hostile", FILE, b"x"),),
        (("./out", LINK, "../neighbour"), ("./out/file", FILE, b"x")),
        (("./out", LINK, "../neighbour/file"), ("./out", FILE, b"x")),
        (("./out", LINK, "../neighbour/file"), ("./again", AGAIN, "./out")),
        (("./again", AGAIN, "../neighbour/file"),),
        (("./again", AGAIN, "/etc/hostname"),),
        (("./a", DIRECTORY, ""), ("./a", LINK, "../neighbour"), ("./a/file", FILE, b"x")),
        (("./a\x1b[2J", FILE, b"x"),),
        (("./" + "d/" * 300 + "x", FILE, b"x"),),
        (("./a", FILE, b"x"), ("./a", FILE, b"y")),
        (("./a", FILE, b"x"), ("./a/b", FILE, b"y")),
    ],
    ids=["up", "up within", "absolute", "through a link", "over a link", "a link again", "another's",
         "an absolute one", "a directory that becomes a link", "a terminal's", "deep", "twice", "below"],
)  # fmt: skip
def test_names_that_lead_out_are_refused(copied, place, entries) -> None:
    with pytest.raises(FarmhandError):
        copied(packed(*entries))
    assert not (place / "dir").exists()


def test_links_that_lead_out_are_left_out(copied, place) -> None:
    done = copied(
        packed(
            ("./file", FILE, b"x"),
            ("./inside", LINK, "file"), ("./dangling", LINK, "nonesuch"), ("./self", LINK, "self"),
            ("./up", LINK, "../neighbour"), ("./absolute", LINK, "/etc"), ("./empty", LINK, ""),
            # each looks as if it stayed within
            ("./a/b/c/top", LINK, "../../.."), ("./through", LINK, "a/b/c/top/.."),
            ("./through2", LINK, "through/neighbour"),
            ("./lost", LINK, "up/../../neighbour"),
            ("./null", tarfile.CHRTYPE, ""), ("./pipe", tarfile.FIFOTYPE, ""),
        )
    )  # fmt: skip
    top = place / "dir"
    links = {str(path.relative_to(top)) for path in top.rglob("*") if path.is_symlink()}
    assert links == {"inside", "dangling", "self", "a/b/c/top"}
    assert done.left_out_count == 8
    assert all(os.path.realpath(top / name).startswith(str(top)) for name in links)
    assert (top / "file").stat().st_mode & 0o7777 == 0o755  # no other user's rights, none to set
    assert not [path for path in top.rglob("*") if path.is_fifo() or path.is_char_device()]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_name_without_end_takes_no_memory(copied, format: int, monkeypatch) -> None:
    data = packed(("./" + "n" * 100_000, FILE, b""), format=format)
    with pytest.raises(Unfit, match="its tar writes"):
        copied(data)


def test_sparse_headers_are_refused(copied) -> None:
    with pytest.raises(Unfit, match="headers that are not taken"):
        copied(packed(("./sparse", tarfile.GNUTYPE_SPARSE, b"")))


def test_what_is_no_archive(copied, place) -> None:
    good = packed(("./file", FILE, b"x" * 5000))
    bad = bytearray(good)
    bad[512:1024] = b"no header" * 56 + bytes(8)
    for data in (b"", b"hello\n", os.urandom(5000), bytes(10240), bytes(bad), good[:3000]):
        with pytest.raises(Unfit):
            copied(data)
        assert not (place / "dir").exists()


def test_more_than_there_is_room_for(copied, place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it says, and where it says less than it sends."""
    info = tarfile.TarInfo("./file")
    info.size = 2**60
    with pytest.raises(NoSpace):
        copied(packed()[:512] + info.tobuf(tarfile.GNU_FORMAT) + bytes(512))
    free = files.shutil.disk_usage(place).free
    monkeypatch.setattr(files, "SPARE", free - 4_000_000)
    with pytest.raises(NoSpace):  # every file of its own would fit
        copied(packed(*((f"./{n}", FILE, b"x" * 1_000_000) for n in range(12))))
    assert not (place / "dir").exists()


def test_files_without_end(copied, place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_ENTRIES", 50)
    with pytest.raises(Unfit, match="more than 50 files"):
        copied(packed(*((f"./{n}", FILE, b"") for n in range(60))))
    monkeypatch.setattr(copying, "_LINKS", 5)
    with pytest.raises(Unfit, match="more than 5 links"):
        copied(packed(*((f"./{n}", LINK, "x") for n in range(6))))


def test_where_a_file_was_asked_for(copied, place) -> None:
    """Its name is the one that was asked for, whatever is sent."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("../neighbour/file")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"new"))
    copied(out.getvalue(), of="file")
    assert (place / "file").read_bytes() == b"new"
    (place / "file").unlink()
    for kind, what in ((LINK, "neighbour/file"), (DIRECTORY, ""), (AGAIN, "neighbour/file")):
        data = packed(("./x", kind, what))[512:]
        with pytest.raises(Unfit):
            copied(data, of="file")
    with pytest.raises(Unfit, match="more than the one file"):
        copied(packed(("./x", FILE, b"x"), ("./y", FILE, b"y"))[512:], of="file")


def test_what_comes_after_the_archive_is_kept_nowhere(copied, place) -> None:
    """What comes after the archive is read, and kept nowhere: here 100 MB of it."""
    good = packed(("./file", FILE, b"x"))
    done = copied(good, script=f"cat {place.parent}/sent; head -c 100000000 /dev/zero")
    assert (done.entries, (place / "dir" / "file").read_bytes()) == (2, b"x")
