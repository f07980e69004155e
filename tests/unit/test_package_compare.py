"""Two builds of one package, compared byte by byte: which members of which output differ, in what."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from builds.packages.compare import OutputDifference, compared, explained
from builds.packages.verified import Verified, verified
from builds.record import FileRecord
from host.files import open_new
from host.run import Runner, which
from inventory.errors import WrongState
from tests.debs import ar, deb, fields, member, tar
from tests.rpms import rpm

CONTROL = ("./control", fields().encode())
DOC = "usr/share/doc/probe/build-time"


def outputs(directory: Path, files: Mapping[str, bytes]) -> list[FileRecord]:
    """What a build made, with its record of it."""
    (directory / "artifacts").mkdir(parents=True, exist_ok=True)
    found = []
    for name, data in files.items():
        path = f"artifacts/{name}"
        (directory / path).write_bytes(data)
        sum_ = hashlib.sha256(data).hexdigest()
        found.append(FileRecord(name=name, size=len(data), sha256=sum_, path=path))
    return found


def of_two(
    tmp_path: Path, one: Mapping[str, bytes], other: Mapping[str, bytes]
) -> tuple[OutputDifference, ...]:
    first, second = tmp_path / "first", tmp_path / "second"
    return compared(outputs(first, one), first, outputs(second, other), second)


def told(tmp_path: Path, one: bytes, other: bytes, name: str = "probe_1.0-1_amd64.deb") -> list[str]:
    found = of_two(tmp_path, {name: one}, {name: other})
    return [line for each in found for line in each.lines("probe/7", "its rebuild")]


def made(*data: tuple[str | tarfile.TarInfo, bytes], control: bytes = b"", end: str = "gz") -> bytes:
    """A package with just these members."""
    packed = [gzip.compress(tar(*members), mtime=0) for members in ([("./control", control)], data)]
    return ar(
        ("debian-binary", b"2.0\n"), (f"control.tar.{end}", packed[0]), (f"data.tar.{end}", packed[1])
    )


def plain(name: str, **given: object) -> tarfile.TarInfo:
    info = member(name)
    for key, value in given.items():
        setattr(info, key, value)
    return info


def test_a_member_with_another_content(tmp_path: Path) -> None:
    one, other = deb(files={DOC: b"12:00"}), deb(files={DOC: b"12:01"})
    assert told(tmp_path, one, other) == [f"probe_1.0-1_amd64.deb: ./{DOC}: content"]
    assert told(tmp_path, one, one) == []


CASES: Mapping[str, tuple[tarfile.TarInfo, tarfile.TarInfo, str]] = {
    "mode": (plain("./a"), plain("./a", mode=0o600), "mode 0644 -> 0600"),
    "owner": (
        plain("./a", uname="root", gname="root"),
        plain("./a", uid=1000, uname="ann", gname="root"),
        "owner root/0:root/0 -> ann/1000:root/0",
    ),
    "time": (
        plain("./a", mtime=86400),
        plain("./a", mtime=1),
        "time 1970-01-02T00:00:00Z -> 1970-01-01T00:00:01Z",
    ),
    "kind": (
        plain("./a", type=tarfile.SYMTYPE, linkname="b"),
        plain("./a", type=tarfile.LNKTYPE, linkname="b"),
        "kind symbolic link -> hard link",
    ),
    "link": (
        plain("./a", type=tarfile.SYMTYPE, linkname="b"),
        plain("./a", type=tarfile.SYMTYPE, linkname="c"),
        "link b -> c",
    ),
    "device": (
        plain("./a", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        plain("./a", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        "device 1:3 -> 1:5",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_else_of_a_member_differs(tmp_path: Path, case: str) -> None:
    one, other, says = CASES[case]
    control = fields().encode()
    found = told(tmp_path, made((one, b""), control=control), made((other, b""), control=control))
    assert found == [f"probe_1.0-1_amd64.deb: ./a: {says}"]


def test_who_has_it_alone_and_what_of_it_is_in_another_order(tmp_path: Path) -> None:
    control = fields().encode()
    one = made(("./a", b""), ("./b", b""), control=control)
    assert told(tmp_path, one, made(("./a", b""), ("./c", b""), control=control)) == [
        "probe_1.0-1_amd64.deb: ./b: only in probe/7",
        "probe_1.0-1_amd64.deb: ./c: only in its rebuild",
    ]
    assert told(tmp_path, one, made(("./b", b""), ("./a", b""), control=control)) == [
        "probe_1.0-1_amd64.deb: data.tar: order"
    ]


def test_fields_and_scripts(tmp_path: Path) -> None:
    one = deb(fields(more="Depends: libc6 (>= 2.36)\n"), scripts=[("./postinst", b"one")])
    other = deb(fields(more="Depends: libc6 (>= 2.38)\nX-Built: on b\n"), scripts=[("./postinst", b"2")])
    assert told(tmp_path, one, other) == [
        "probe_1.0-1_amd64.deb: control: Depends: value libc6 (>= 2.36) -> libc6 (>= 2.38)",
        "probe_1.0-1_amd64.deb: control: X-Built: only in its rebuild",
        "probe_1.0-1_amd64.deb: control/postinst: content",
    ]
    reordered = "".join(sorted(fields().splitlines(keepends=True)[:2], reverse=True))
    reordered += "".join(fields().splitlines(keepends=True)[2:])
    assert told(tmp_path, deb(), deb(reordered)) == ["probe_1.0-1_amd64.deb: control/control: content"]


def test_only_packed_in_another_way(tmp_path: Path) -> None:
    assert told(tmp_path, deb(), deb(xz=True)) == [
        "probe_1.0-1_amd64.deb: the same contents, packed or signed in another way"
    ]


def test_what_is_no_package_any_more_and_what_never_was_one(tmp_path: Path) -> None:
    (line,) = told(tmp_path, deb(), b"!<arch>\nx")
    assert line.startswith("probe_1.0-1_amd64.deb: content; probe_1.0-1_amd64.deb: ")
    assert "\n" not in line
    assert told(tmp_path, b"1", b"2", "notes.txt") == ["notes.txt: content"]


def test_few_of_very_many(tmp_path: Path) -> None:
    files = [(f"./{number:04}", b"") for number in range(1000)]
    control = fields().encode()
    found = told(tmp_path, made(*files, control=control), made(control=control))
    assert len(found) == 201
    assert found[-1] == "probe_1.0-1_amd64.deb: 800 more differences"


def test_names_are_shown_as_one_line(tmp_path: Path) -> None:
    control = fields().encode()
    found = told(tmp_path, made(("./a\x1b[2J\nb", b""), control=control), made(control=control))
    assert found == [r"probe_1.0-1_amd64.deb: ./a\x1b[2J\nb: only in probe/7"]


def test_rpm_packages(tmp_path: Path) -> None:
    def against(other: Path) -> list[str]:
        return told(tmp_path, rpm().read_bytes(), other.read_bytes(), "hello-1.0-1.noarch.rpm")

    path = "/usr/share/hello/version"
    assert against(rpm()) == []
    assert against(rpm(files={path: "1.1\n"})) == [f"hello-1.0-1.noarch.rpm: {path}: content"]
    assert against(rpm(defines={"_buildhost": "other.example"})) == [
        "hello-1.0-1.noarch.rpm: build host: value builder.example -> other.example"
    ]
    (line,) = against(
        rpm(sections=[f"%attr(0600,root,root) {path}"], tags={"Summary": "hello for tests"})
    )
    assert line.startswith(f"hello-1.0-1.noarch.rpm: {path}: mode ")
    assert against(rpm(defines={"_binary_payload": "w3.zstdio"})) == [
        "hello-1.0-1.noarch.rpm: the same contents, packed or signed in another way"
    ]
    more = against(rpm(files={path: "1.0\n", "/usr/share/hello/more": ""}))
    assert "hello-1.0-1.noarch.rpm: /usr/share/hello/more: only in its rebuild" in more


def test_outputs_as_a_whole(tmp_path: Path) -> None:
    """What a build tells of itself has its time: it isn't compared."""

    def kept(side: str) -> Mapping[str, bytes]:
        told = {"probe_1.0-1_amd64.buildinfo": side.encode(), "probe_1.0-1_amd64.changes": side.encode()}
        return {"probe_1.0-1_amd64.deb": deb(), f"{side}.txt": b"", **told}

    found = of_two(tmp_path, kept("first"), kept("second"))
    assert list(map(str, found)) == [
        "first.txt: only in the first", "second.txt: only in the second"
    ]  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    records = outputs(first, kept("first")), outputs(second, kept("second"))
    (second / "artifacts" / "probe_1.0-1_amd64.deb").unlink()
    with pytest.raises(WrongState, match=r"cannot read .*second/artifacts/probe_1"):
        compared(records[0], first, records[1], second)


def test_in_one_line(tmp_path: Path) -> None:
    found = of_two(tmp_path, {"a.deb": deb(files={DOC: b"1"})}, {"a.deb": deb(files={"usr/x": b""})})
    assert len(found) == 1
    assert str(found[0]).startswith("a.deb: ./usr/share: only in the first and ")


# -- diffoscope: where it is installed; a stand-in for what it may do wrong --------------------------


def tool(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "diffoscope"
    with open_new(path, mode=0o755) as file:
        file.write(f"#!/bin/sh\n{script}\n".encode())
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.fixture
def found(tmp_path: Path) -> tuple[OutputDifference, ...]:
    name = "probe_1.0-1_amd64.deb"
    return of_two(
        tmp_path, {name: deb(files={DOC: b"12:00"})}, {name: deb(files={DOC: b"12:01"})}
    )  # fmt: skip


Found = tuple[OutputDifference, ...]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 2", "exited with 2"),
        ("exit 1", "left nothing that can be read"),
    ],
)
def test_diffoscope_is_never_needed(
    tmp_path: Path, found: Found, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    tool(tmp_path, script, monkeypatch)
    (one,), why = explained(Runner(), found, tmp_path)
    assert says in why
    assert one.explained is None
    assert [*one.lines("a", "b")] == [f"probe_1.0-1_amd64.deb: ./{DOC}: content"]


def test_its_text_is_bounded_and_printable(
    tmp_path: Path, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = r"""while [ $# -gt 1 ]; do [ "$1" != --text ] || out=$2; shift; done
{ printf '\033[2Jdiffers\n'; yes | head -c 3000000; } >"$out"; exit 1"""
    tool(tmp_path, write, monkeypatch)
    (one,), why = explained(Runner(), found, tmp_path)
    assert why == ""
    assert one.explained == tmp_path / "probe_1.0-1_amd64.deb.diffoscope.txt"
    text = one.explained.read_text()
    assert text.startswith("differs\ny\n")
    assert len(text) <= 2**20


def test_without_diffoscope(tmp_path: Path, found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    if which("diffoscope"):  # it is there: what it really says
        (one,), why = explained(Runner(), found, tmp_path)
        assert why == ""
        assert one.explained
        assert "12:01" in one.explained.read_text()
        return
    monkeypatch.setattr(shutil, "which", lambda *_args, **_more: None)
    (one,), why = explained(Runner(), found, tmp_path)
    assert (one.explained, why) == (None, "diffoscope is not installed")


# -- what is kept of it ------------------------------------------------------------------------------


def test_what_is_kept_beside_the_record(tmp_path: Path) -> None:
    assert verified(tmp_path) is None
    known = Verified(
        rebuild=2, at="2026-11-29T12:00:00+00:00", identical=False, differences=("a.deb: ./x: content",)
    )
    known.save(tmp_path)
    assert verified(tmp_path) == known
    assert (tmp_path / "verified.json").stat().st_mode & 0o777 == 0o644
    for damage in (b"", b"[]", b'{"format": 2}', b'{"format": 1, "rebuild": "x"}'):
        (tmp_path / "verified.json").write_bytes(damage)
        assert verified(tmp_path) is None
