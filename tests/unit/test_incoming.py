"""A directory that others put packages into: real files, real inotify, real threads."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from host.run import Runner
from inventory.errors import FarmhandError, Unfit, WrongState
from repositories.deb.changes import changes_of
from repositories.incoming import Incoming, Rejection, Upload
from tests.uploads import changes, gpg, uploader_keys

ROOT = Path(__file__).resolve().parents[2]
HOUR = 3600.0


class Box:
    """``at`` is the directory, ``rejected`` where what is refused goes."""

    def __init__(self, top: Path) -> None:
        self.at, self.rejected, self.secret = top / "incoming", top / "rejected", top / "secret"
        self.at.mkdir()
        self.secret.write_text("a secret")
        self.heard: list[Rejection] = []

    def open(self, suffix: str = ".rpm", **more: Any) -> Incoming:
        return Incoming(
            self.at,
            self.rejected,
            suffix,
            Runner(),
            **{"still": HOUR, "on_reject": self.heard.append, **more},
        )

    def names(self) -> list[str]:
        return sorted(path.name for path in self.at.iterdir())

    def upload(
        self, name: str = "hello_1_amd64", files: Mapping[str, bytes] | None = None, **more: str
    ) -> Path:
        """With its .changes file, which comes last."""
        files = {f"{name}.deb": b"a package"} if files is None else files
        for each, content in files.items():
            (self.at / each).write_bytes(content)
        place = self.at / f"{name}.changes"
        place.write_bytes(changes(files, **more))
        return place


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def refused(box: Box, name: str) -> str:
    """The reason; the one that was refused."""
    (rejection,) = box.heard
    assert rejection.name == name
    assert rejection.place.is_dir()
    assert (
        rejection.place.with_name(f"{rejection.place.name}.reason").read_text()
        == f"{rejection.reason}\n"
    )
    assert rejection.reason.isprintable()
    assert not [path for path in box.rejected.iterdir() if path.name.startswith(".")]
    return rejection.reason


# ---- When a file is complete


def test_a_file_is_complete_when_it_is_closed(box: Box) -> None:
    may_close, opened = threading.Event(), threading.Event()

    def write() -> None:
        with (box.at / "a.rpm").open("wb") as file:
            file.write(b"one")
            file.flush()
            opened.set()
            may_close.wait(60)
            file.write(b"two")

    with box.open() as incoming:
        writer = threading.Thread(target=write)
        writer.start()
        opened.wait(60)
        assert list(incoming.complete()) == []  # still growing
        may_close.set()
        assert incoming.wait(60)
        writer.join()
        (upload,) = incoming.complete()
        assert upload.name == "a.rpm" and upload.changes is None
        (file,) = upload.files
        assert (file.path, file.size) == (box.at / "a.rpm", 6)
        assert file.sha256 == hashlib.sha256(b"onetwo").hexdigest()
        incoming.taken(upload)
        assert box.names() == [] and list(box.rejected.iterdir()) == []
        assert list(incoming.complete()) == []
        assert not incoming.wait(0)


def test_a_file_that_is_moved_in_is_complete(box: Box, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"x")
    with box.open() as incoming:
        (tmp_path / "part").rename(box.at / "b.rpm")
        assert incoming.wait(60)
        (upload,) = incoming.complete()
        assert upload.name == "b.rpm"
        # Made anew under its name: not complete any more
        incoming.taken(upload)
        with (box.at / "b.rpm").open("wb"):
            assert list(incoming.complete()) == []
        (upload,) = incoming.complete()
        (box.at / "b.rpm").write_bytes(b"another")
        assert incoming.wait(60)


def test_what_was_there_before_is_complete_when_it_stood_still(box: Box) -> None:
    (box.at / "a.rpm").write_bytes(b"x")
    os.utime(box.at / "a.rpm", (0, 0))  # as rsync -t and cp -p do: its time says nothing
    with box.open() as incoming:
        assert list(incoming.complete()) == []
        assert not incoming.wait(0)
    with box.open(still=0) as incoming:
        assert [upload.name for upload in incoming.complete()] == ["a.rpm"]


def test_it_is_known_when_to_look_again(box: Box) -> None:
    with box.open(still=0.5) as incoming:
        assert list(incoming.complete()) == []
        assert incoming.soon == math.inf
        os.link(box.secret, box.at / "a.rpm")  # nobody is seen to close it
        box.secret.unlink()
        assert list(incoming.complete()) == []
        assert 0 < incoming.soon <= 0.5
        time.sleep(incoming.soon)
        assert [upload.name for upload in incoming.complete()] == ["a.rpm"]
        assert incoming.soon == math.inf


def test_only_looking_moves_nothing(box: Box) -> None:
    box.upload(files={"a.deb": b"right"})
    (box.at / "b.deb").write_bytes(b"x")
    (box.at / "evil.deb").symlink_to(box.secret)
    for with_changes in (False, True):
        before = box.names()
        with box.open(".deb", with_changes=with_changes, still=0, patience=0, look=True) as incoming:
            for upload in incoming.complete():
                incoming.taken(upload)
            incoming.reject(upload, "it is bad")
        assert {rejection.name for rejection in box.heard} >= {"evil.deb", upload.name}
        assert box.names() == before
        assert not box.rejected.exists()


def test_in_the_order_in_which_they_came(box: Box) -> None:
    with box.open() as incoming:
        for name in ("c.rpm", "a.rpm", "b.rpm"):
            (box.at / name).write_bytes(b"x")
            while (box.at / name).stat().st_ctime_ns == ctime_of_a_new_file(box):
                pass
        assert [upload.name for upload in incoming.complete()] == ["c.rpm", "a.rpm", "b.rpm"]
        # Whoever got one and did nothing with it gets it again
        assert len(list(incoming.complete())) == 3


def ctime_of_a_new_file(box: Box) -> int:
    probe = box.at.parent / "probe"
    probe.unlink(missing_ok=True)
    probe.touch()
    return probe.stat().st_ctime_ns


def test_ten_thousand_files(box: Box) -> None:
    for number in range(10_000):
        (box.at / f"{number}.rpm").write_bytes(b"%d" % number)
    with box.open(still=0) as incoming:
        seen = set()
        for upload in incoming.complete():
            seen.add(upload.files[0].sha256)
            incoming.taken(upload)
        assert len(seen) == 10_000
    assert box.names() == []


def test_more_events_than_the_kernel_keeps(box: Box) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for name in ("a.rpm", "b.rpm"):
        (box.at / name).touch()
    with box.open() as incoming:
        for number in range(limit + 10):  # one that is as the one before is told once
            os.close(os.open(box.at / ("a.rpm", "b.rpm")[number % 2], os.O_WRONLY))
        (box.at / "c.rpm").touch()
        assert incoming.wait(60)
        assert [upload.name for upload in incoming.complete()] == ["a.rpm", "b.rpm"]
    with box.open(still=0) as incoming:
        assert len(list(incoming.complete())) == 3


# ---- What is hostile


def make(kind: str, box: Box) -> str:
    """Its name."""
    name = "evil.rpm"
    path = box.at / name
    if kind == "link":
        path.symlink_to(box.secret)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "directory link":
        path.symlink_to(box.at.parent)
    elif kind == "hard link":
        path.hardlink_to(box.secret)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(box.at)
            server.bind(name)
            os.chdir(here)
    else:
        name = kind
        Path(os.fsdecode(os.fsencode(box.at) + b"/" + os.fsencode(name))).write_bytes(b"x")
    return name


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("link", "it is a link, a FIFO or the like, and no file"),
        ("dangling", "it is a link, a FIFO or the like, and no file"),
        ("directory link", "it is a link, a FIFO or the like, and no file"),
        ("fifo", "it is a link, a FIFO or the like, and no file"),
        ("socket", "it is a link, a FIFO or the like, and no file"),
        ("hard link", "it has another name too (a hard link)"),
        ("a\nb.rpm", "no file here may be called so"),
        ("-rf.rpm", "no file here may be called so"),
        ("a b.rpm", "no file here may be called so"),
        ("\x1b[2J.rpm", "no file here may be called so"),
        ("\udcff\udcfe.rpm", "no file here may be called so"),
        ("é.rpm", "no file here may be called so"),
        ("x" * 251 + ".rpm", "no file here may be called so"),
    ],
)
@pytest.mark.parametrize("with_changes", [False, True])
def test_what_is_hostile_is_refused_and_stops_no_other(
    kind: str, why: str, with_changes: bool, box: Box
) -> None:
    name = make(kind, box)
    box.upload(files={"good.rpm": b"good"})
    with box.open(still=0, with_changes=with_changes) as incoming:
        assert [upload.files[0].name for upload in incoming.complete()] == ["good.rpm"]
        assert refused(box, box.heard[0].name) == why
        (moved,) = box.heard[0].place.iterdir()
        assert moved.name.isprintable() and not moved.name.startswith(("-", "."))
        assert box.secret.read_text() == "a secret"
        assert os.fsdecode(name) not in box.names()
        box.heard.clear()
        list(incoming.complete())
        assert box.heard == []


def test_swapping_gives_nobody_s_secret_away(box: Box) -> None:
    """Somebody puts a file, a link and a hard link in turn under one name, as quickly as they can."""
    done = threading.Event()
    fresh = box.at.parent / "fresh"

    def swap() -> None:
        while not done.is_set():
            fresh.write_bytes(b"legit")
            fresh.rename(box.at / "a.rpm")
            fresh.symlink_to(box.secret)
            fresh.rename(box.at / "a.rpm")
            with suppress(FileNotFoundError):
                fresh.hardlink_to(box.secret)
                fresh.rename(box.at / "a.rpm")

    swapper = threading.Thread(target=swap)
    swapper.start()
    legit, seen = hashlib.sha256(b"legit").hexdigest(), 0
    try:
        with box.open(still=0) as incoming:
            for _ in range(300):
                for upload in incoming.complete():
                    assert upload.files[0].sha256 == legit
                    seen += 1
                    incoming.taken(upload)
    finally:
        done.set()
        swapper.join()
    assert box.secret.read_text() == "a secret"
    assert seen or box.heard


def test_directories_hidden_files_and_others_are_left_until_it_is_late(box: Box) -> None:
    (box.at / "sub").mkdir()
    (box.at / ".a.x7Yz1.rpm").write_bytes(b"of rsync")
    (box.at / "a.rpm.part").write_bytes(b"of scp")
    with box.open(still=0) as incoming:
        assert list(incoming.complete()) == []
        assert box.heard == [] and len(box.names()) == 3
    with box.open(still=0, patience=0) as incoming:
        assert list(incoming.complete()) == []
    assert box.names() == []
    assert all(rejection.reason.startswith("incomplete after") for rejection in box.heard)
    assert sorted(rejection.name for rejection in box.heard) == [".a.x7Yz1.rpm", "a.rpm.part", "sub"]


def test_what_goes_meanwhile_is_not_refused(box: Box) -> None:
    (box.at / "a.rpm").write_bytes(b"x")
    while ctime_of_a_new_file(box) == (box.at / "a.rpm").stat().st_ctime_ns:
        pass
    (box.at / "b.part").write_bytes(b"x")
    with box.open(still=0, patience=0) as incoming:
        uploads = incoming.complete()
        assert next(uploads).name == "a.rpm"
        (box.at / "b.part").unlink()
        assert list(uploads) == []
    assert box.heard == [] and list(box.rejected.iterdir()) == []


# ---- With a .changes file


def test_an_upload_is_complete_when_all_of_it_is_there(box: Box) -> None:
    files = {"hello_1_amd64.deb": b"one", "hello-doc_1_all.deb": b"", "hello_1.tar.xz": b"three"}
    with box.open(".deb", with_changes=True) as incoming:
        box.upload(files=files)
        (box.at / "hello_1.tar.xz").unlink()
        (box.at / "alone.deb").write_bytes(b"no .changes file lists it")
        assert list(incoming.complete()) == []
        with (box.at / "hello_1.tar.xz").open("wb") as file:
            file.write(b"th")  # truncated
            file.flush()
            assert list(incoming.complete()) == []
            file.write(b"rxx")
            file.flush()
            assert list(incoming.complete()) == []  # not right, not closed: who knows
            file.seek(0)
            file.write(b"three")
        (upload,) = incoming.complete()
        assert upload.name == "hello_1_amd64.changes"
        assert upload.changes is not None and upload.changes.distribution == "tested"
        assert (upload.changes.source, upload.changes.version, upload.signers) == ("hello", "1", ())
        assert {file.name: file.path.read_bytes() for file in upload.files} == files
        for file in upload.files:
            assert file.sha256 == hashlib.sha256(files[file.name]).hexdigest()
        incoming.taken(upload)
    assert box.names() == ["alone.deb"]
    assert box.heard == [] and list(box.rejected.iterdir()) == []


def test_what_stays_incomplete_is_refused_with_all_of_it(box: Box) -> None:
    box.upload(files={"a.deb": b"a", "b.deb": b"bbb", "c.deb": b"c"})
    (box.at / "c.deb").unlink()
    (box.at / "b.deb").write_bytes(b"b")
    (box.at / "alone.deb").write_bytes(b"x")
    with box.open(".deb", with_changes=True, still=0, patience=0) as incoming:
        assert list(incoming.complete()) == []
    assert box.names() == []
    reasons = {rejection.name: rejection.reason for rejection in box.heard}
    assert reasons["hello_1_amd64.changes"].endswith("it lacks b.deb, c.deb")
    assert reasons["alone.deb"].endswith("no .changes file lists it")
    (place,) = [r.place for r in box.heard if r.name != "alone.deb"]
    assert sorted(path.name for path in place.iterdir()) == ["a.deb", "b.deb", "hello_1_amd64.changes"]


BAD: dict[str, tuple[bytes, str]] = {
    name: (changes({"a.deb": b"x"}, **fields), why)
    for name, (fields, why) in {
        "up": ({"Files": f"\n {'0' * 32} 1 x y ../../x"}, "names '../../x'"),
        "up twice": ({"Checksums_Sha256": f"\n {'0' * 64} 1 ../../x"}, "names '../../x'"),
        "absolute": ({"Checksums_Sha256": f"\n {'0' * 64} 1 /scratch/x"}, "names '/scratch/x'"),
        "hidden": ({"Checksums_Sha256": f"\n {'0' * 64} 1 .bashrc"}, "names '.bashrc'"),
        "option": ({"Checksums_Sha256": f"\n {'0' * 64} 1 --help"}, "names '--help'"),
        "twice": ({"Checksums_Sha256": f"\n {'0' * 64} 1 a.deb" * 2}, "has a.deb twice"),
        "short": ({"Files": f"\n {'0' * 32} 1"}, "has 2 words, not 5"),
        "one line": ({"Files": "a b c"}, "is no list of files"),
        "empty line": ({"Files": f"\n {'0' * 32} 1 x y a.deb\n \n"}, "has 0 words"),
        "minus": ({"Checksums_Sha256": f"\n {'0' * 64} -1 a.deb"}, "no sum or size of a.deb"),
        "huge": ({"Checksums_Sha256": f"\n {'0' * 64} {'9' * 30} a.deb"}, "no sum or size of a.deb"),
        "md5 there": ({"Checksums_Sha256": f"\n {'0' * 32} 1 a.deb"}, "no sum or size of a.deb"),
        "sizes": ({"Files": f"\n {'0' * 32} 2 x y a.deb"}, "differ about a.deb"),
        "others": ({"Files": f"\n {'0' * 32} 1 x y b.deb"}, "differ about b.deb"),
        "more": (
            {"Checksums_Sha256": f"\n {'0' * 64} 1 a.deb\n {'0' * 64} 1 b.deb"},
            "list the same files",
        ),
        "no version": ({"Version": ""}, "it has no field Version"),
        "version": ({"Version": "1/../2"}, "its Version is '1/../2'"),
        "distribution": ({"Distribution": "../tested"}, "its Distribution is '../tested'"),
        "two lines": ({"Distribution": "tested\n evil"}, "its Distribution is 'tested\\\\n evil'"),
        "again": ({"source": "other"}, "two fields source"),
        "escape": ({"Maintainer": "\x1b[2J"}, "control character: '\\x1b'"),
        "md5": ({"Files": f"\n {'0' * 32} 1 x y a.deb"}, "a.deb is damaged: its md5 is"),
    }.items()
}
BAD |= {
    "empty": (b"", "line 1 is no field: it is empty"),
    "junk": (b"\xff\xfe\x00", "byte 0 is not UTF-8"),
    "nul": (b"Source: a\0b\n", "control character: '\\x00'"),
    "prose": (b"hello\n", "line 1 is no field: hello"),
    "indented": (b" hello\n", "line 1 is no field"),
    "two stanzas": (changes({"a.deb": b"x"}) + b"\nDistribution: evil\n", "it is empty"),
    "large": (b"Source: " + b"x" * 2**20, "more than 1M"),
    "signed twice": (b"-----BEGIN PGP SIGNED MESSAGE-----\n" * 2, "more in it than one signed text"),
    "torn": (b"-----BEGIN PGP SIGNED MESSAGE-----\n\n-----END PGP SIGNATURE-----\n", "is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_changes_files_that_are_none(name: str, box: Box) -> None:
    content, why = BAD[name]
    (box.at / "a.deb").write_bytes(b"x")
    (box.at / "z.changes").write_bytes(content)
    box.upload()
    with box.open(".deb", with_changes=True) as incoming:
        assert list(incoming.complete()) != []  # the good one, complete by its sums alone
        assert box.heard == []  # it may still be growing
    with box.open(".deb", with_changes=True, still=0) as incoming:
        assert [upload.name for upload in incoming.complete()] == ["hello_1_amd64.changes"]
    assert why in refused(box, "z.changes")


def test_names_lead_nowhere(box: Box) -> None:
    target = box.at.parent.parent / "x"
    content = changes({"a.deb": b"x"}).replace(b"a.deb", b"../../x")
    with pytest.raises(Unfit, match=r"names '\.\./\.\./x': no file here may be called so"):
        changes_of(content)
    assert not target.exists()


def test_a_file_with_another_content_is_refused_when_it_is_closed(box: Box) -> None:
    with box.open(".deb", with_changes=True) as incoming:
        box.upload(files={"a.deb": b"right"})
        (box.at / "a.deb").write_bytes(b"wrong")
        assert list(incoming.complete()) == []
    reason = refused(box, "hello_1_amd64.changes")
    assert reason.startswith("a.deb is damaged: its md5 is ")
    assert box.names() == []


def test_a_larger_file_is_refused(box: Box) -> None:
    with box.open(".deb", with_changes=True) as incoming:
        box.upload(files={"a.deb": b"right"})
        (box.at / "a.deb").write_bytes(b"more than right")
        assert list(incoming.complete()) == []
    assert refused(box, "hello_1_amd64.changes") == "a.deb has 15 bytes, not 5"


def test_a_link_in_an_upload(box: Box) -> None:
    box.upload(files={"a.deb": b"a secret"})
    (box.at / "a.deb").unlink()
    (box.at / "a.deb").symlink_to(box.secret)
    with box.open(".deb", with_changes=True, still=0) as incoming:
        assert list(incoming.complete()) == []
    assert refused(box, "a.deb").startswith("it is a link")
    assert box.names() == ["hello_1_amd64.changes"]


def test_what_two_uploads_list_stays_until_both_are_taken(box: Box) -> None:
    box.upload("hello_1_amd64", {"hello_1.tar.xz": b"source", "hello_1_amd64.deb": b"a"})
    box.upload(
        "hello_1_arm64", {"hello_1.tar.xz": b"source", "hello_1_arm64.deb": b"b"}, Architecture="arm64"
    )
    with box.open(".deb", with_changes=True) as incoming:
        taken = []
        for upload in incoming.complete():
            taken.append(upload.name)
            incoming.taken(upload)
            if len(taken) == 1:
                assert "hello_1.tar.xz" in box.names()
    assert sorted(taken) == ["hello_1_amd64.changes", "hello_1_arm64.changes"]
    assert box.names() == [] and box.heard == []


def test_a_refused_upload_takes_nothing_of_another_s_away(box: Box) -> None:
    files = {"hello_1_amd64.deb": b"a"}
    box.upload("evil", files)
    (box.at / "evil.changes").write_bytes(changes({"hello_1_amd64.deb": b"b"}))
    box.upload(files=files)
    claims = changes(files).replace(b"hello_1_amd64.deb", b"hello_1_amd64.changes")
    (box.at / "other.changes").write_bytes(claims)
    with box.open(".deb", with_changes=True, still=0) as incoming:
        assert [upload.name for upload in incoming.complete()] == ["hello_1_amd64.changes"]
        assert sorted(rejection.name for rejection in box.heard) == ["evil.changes", "other.changes"]
        (upload,) = incoming.complete()
        incoming.taken(upload)
    assert box.names() == []


def test_what_can_not_be_finished_stops_no_other(box: Box, tmp_path: Path) -> None:
    """A rejection that was cut off, whose place is no directory now."""
    (box.at / "a.rpm").write_bytes(b"x")
    (box.at / "b.rpm").write_bytes(b"x")
    info = (box.at / "a.rpm").stat()
    box.rejected.mkdir()
    member = {"name": "a.rpm", "inode": info.st_ino, "changed": info.st_ctime_ns}
    note = box.rejected / ".1-a.rpm.todo"
    note.write_text(json.dumps({"directory": str(box.at), "reason": "bad", "files": [member]}))
    (box.rejected / "1-a.rpm.reason").mkdir()
    (box.rejected / ".2-junk.todo").write_text("{")
    with box.open(still=0) as incoming:
        uploads = incoming.complete()
        assert next(uploads).name == "b.rpm"
        with pytest.raises(FarmhandError, match=r"1-a\.rpm\.reason"):
            next(uploads)
    (box.rejected / "1-a.rpm.reason").rmdir()
    with box.open(still=0) as incoming:
        assert [upload.name for upload in incoming.complete()] == ["b.rpm"]
    left = sorted(path.name for path in box.rejected.iterdir())
    assert left == ["1-a.rpm", "1-a.rpm.reason"]


def test_a_source_package_that_means_other_files(box: Box) -> None:
    def dsc(content: bytes) -> bytes:
        digest = hashlib.sha256(content).hexdigest()
        return f"Format: 3.0 (native)\nChecksums-Sha256:\n {digest} {len(content)} h.tar.xz\n".encode()

    box.upload("good", {"h.tar.xz": b"source", "good.dsc": dsc(b"source")})
    box.upload("evil", {"evil.dsc": dsc(b"other!"), "h.tar.xz": b"source"})
    with box.open(".deb", with_changes=True, still=0) as incoming:
        assert [upload.name for upload in incoming.complete()] == ["good.changes"]
    assert refused(box, "evil.changes") == "its .dsc means another h.tar.xz"


# ---- Signed


@pytest.fixture(scope="module")
def keys() -> Iterator[tuple[Path, str, bytes]]:
    with uploader_keys() as found:
        yield found


def test_an_upload_that_must_be_signed(box: Box, keys: tuple[Path, str, bytes]) -> None:
    home, signer, public = keys
    content = changes({"a.deb": b"x"})

    def clear(who: str) -> bytes:
        return gpg(home, "--local-user", who, "--clear-sign", data=content)

    def look(text: bytes, required: bytes = public) -> list[Upload]:
        box.heard.clear()
        (box.at / "a.deb").write_bytes(b"x")
        (box.at / "u.changes").write_bytes(text)
        with box.open(".deb", with_changes=True, still=0, keys=required) as incoming:
            found = list(incoming.complete())
            for upload in found:
                incoming.taken(upload)
            return found

    (upload,) = look(clear(signer))
    assert upload.signers == (signer,)
    assert upload.changes is not None and upload.changes.distribution == "tested"
    evil = b"Distribution: evil\n\n"
    for text, why in (
        (content, "it is not signed"),
        (clear("stranger@example.org"), "which is none of the keys"),
        (clear(signer).replace(b"tested", b"evil"), "it was changed after it was signed"),
        (evil + clear(signer), "is no field"),
        (clear(signer) + evil, "there is more in it than one signed text"),
    ):
        assert look(text) == []
        assert why in refused(box, "u.changes")
    # Where it need not be signed: what was signed is read, not what is around it
    (upload,) = look(clear("stranger@example.org"), b"")
    assert upload.signers == ()
    assert look(evil + clear(signer), b"") == []


# ---- Refusing


def test_two_of_one_name_are_refused_side_by_side(box: Box) -> None:
    with box.open() as incoming:
        places = []
        for content in (b"one", b"two"):
            (box.at / "a.rpm").write_bytes(content)
            (upload,) = incoming.complete()
            rejection = incoming.reject(upload, "it is damaged:\nin two lines")
            assert (rejection.place / "a.rpm").read_bytes() == content
            places.append(rejection.place)
        (box.rejected / f"{int(places[1].name.partition('-')[0]) + 1}-a.rpm").mkdir()  # somebody's
    with box.open() as incoming:
        (box.at / "a.rpm").write_bytes(b"three")
        (upload,) = incoming.complete()
        places.append(incoming.reject(upload, "").place)
    assert len({place.name.partition("-")[0] for place in places}) == 3
    assert (
        places[0].with_name(f"{places[0].name}.reason").read_text() == "it is damaged:\\nin two lines\n"
    )
    assert box.heard[-1].reason == "no reason was given"


def test_what_came_meanwhile_under_the_same_name_stays(box: Box) -> None:
    with box.open() as incoming:
        for act in (incoming.taken, lambda upload: incoming.reject(upload, "old")):
            (box.at / "a.rpm").write_bytes(b"old")
            (upload,) = incoming.complete()
            (box.at / "fresh").write_bytes(b"new")
            (box.at / "fresh").rename(box.at / "a.rpm")
            act(upload)
            assert (box.at / "a.rpm").read_bytes() == b"new"
            (upload,) = incoming.complete()
            incoming.taken(upload)


KILLED = """
import os, sys
from pathlib import Path
from host.run import Runner
from repositories import incoming

left = int(sys.argv[2])
def deadly(call):
    def called(*args, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return call(*args, **more)
    return called

top = Path(sys.argv[1])
places = top / "incoming", top / "rejected"
with incoming.Incoming(*places, ".deb", Runner(), with_changes=True, still=0) as box:
    (upload,) = box.complete()
    incoming.write_atomic, incoming.remove = deadly(incoming.write_atomic), deadly(incoming.remove)
    os.rename, os.unlink, os.mkdir = deadly(os.rename), deadly(os.unlink), deadly(os.mkdir)
    if sys.argv[3] == "reject":
        box.reject(upload, "it is bad")
    else:
        box.taken(upload)
"""


@pytest.mark.parametrize("how", ["reject", "taken"])
def test_killed_at_every_step(how: str, tmp_path: Path) -> None:
    """The next one goes on: the whole upload is in one place, with its reason, or as it was."""
    files = {"a.deb": b"a", "b.deb": b"b"}
    whole = sorted([*files, "hello_1_amd64.changes"])
    for step in range(1, 30):
        box = Box(tmp_path / str(step)) if (tmp_path / str(step)).mkdir() is None else None
        assert box
        box.upload(files=files)
        argv = [sys.executable, "-c", KILLED, str(box.at.parent), str(step), how]
        status = subprocess.run(argv, cwd=ROOT, check=False).returncode
        with box.open(".deb", with_changes=True, still=0) as incoming:
            for upload in incoming.complete():
                assert sorted(member.name for member in upload.members) == whole
                incoming.reject(upload, "again") if how == "reject" else incoming.taken(upload)
        assert box.names() == []
        left = sorted(path.name for path in box.rejected.iterdir())
        if how == "reject":
            place, reason = left
            assert reason == f"{place}.reason"
            assert sorted(path.name for path in (box.rejected / place).iterdir()) == whole
        else:
            assert left == []
        if status == 0:
            assert step > 5
            return
        assert status == -9
    pytest.fail("it never came to its end")


def test_two_directories_are_refused_to_one_place(tmp_path: Path) -> None:
    """What was cut off in one of them is not taken for the other's."""
    (tmp_path / "other").mkdir()
    box, other = Box(tmp_path), Box(tmp_path / "other")
    other.rejected = box.rejected
    for each in (box, other):
        each.upload()
    argv = [sys.executable, "-c", KILLED, str(tmp_path), "4", "reject"]
    assert subprocess.run(argv, cwd=ROOT, check=False).returncode == -9
    (note,) = box.rejected.glob(".*.todo")
    with other.open(".deb", with_changes=True, still=0) as incoming:
        (upload,) = incoming.complete()
        incoming.reject(upload, "of the other")
        assert note.exists()
    with box.open(".deb", with_changes=True, still=0) as incoming:
        assert list(incoming.complete()) == []
    found = sorted(path.name for path in box.rejected.iterdir() if path.is_dir())
    assert found == ["1-hello_1_amd64.changes", "2-hello_1_amd64.changes"]
    assert all(len(list((box.rejected / name).iterdir())) == 2 for name in found)
    reasons = [(box.rejected / f"{name}.reason").read_text() for name in found]
    assert reasons == ["it is bad\n", "of the other\n"]


def test_a_fault_with_one_stops_no_other(box: Box) -> None:
    (box.at / "evil.rpm").symlink_to(box.secret)
    (box.at / "good.rpm").write_bytes(b"x")
    with box.open(still=0) as incoming:
        shutil.rmtree(box.rejected)
        uploads = incoming.complete()
        assert next(uploads).name == "good.rpm"
        with pytest.raises(FarmhandError, match="cannot make the directory"):
            next(uploads)
        box.rejected.mkdir()
        assert [upload.name for upload in incoming.complete()] == ["good.rpm"]
        refused(box, "evil.rpm")


def test_rejected_may_lie_inside(box: Box) -> None:
    box.rejected = box.at / "rejected"
    (box.at / "evil.rpm").symlink_to(box.secret)
    with box.open(still=0, patience=0) as incoming:
        assert list(incoming.complete()) == []
        assert list(incoming.complete()) == []
    assert box.names() == ["rejected"]
    refused(box, "evil.rpm")


def test_directories_that_will_not_do(box: Box, tmp_path: Path) -> None:
    with pytest.raises(WrongState, match=r"cannot watch .*/nowhere: No such file"):
        Incoming(tmp_path / "nowhere", box.rejected, ".rpm", Runner())
    with pytest.raises(WrongState, match=r"cannot watch .*/secret: Not a directory"):
        Incoming(box.secret, box.rejected, ".rpm", Runner())
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as other,  # a tmpfs
        pytest.raises(WrongState, match="is on another file system"),
    ):
        Incoming(box.at, Path(other, "rejected"), ".rpm", Runner())
    with box.open() as incoming:
        box.at.rmdir()
        with pytest.raises(WrongState, match="incoming was removed"):
            list(incoming.complete())
    box.at.mkdir()
    with box.open() as incoming:
        box.at.rename(tmp_path / "elsewhere")
        with pytest.raises(WrongState, match="has gone while it was watched"):
            incoming.wait(60)
