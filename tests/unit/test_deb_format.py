"""Debian packages are read whole or refused; dpkg, apt and apt-ftparchive are asked what is right."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import random
import subprocess
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from inventory.errors import NotFound, Unfit
from repositories import packed
from repositories.deb import file as deb_file
from repositories.deb.changelog import parsed
from repositories.deb.control import control_of
from repositories.deb.format import DebFormat
from repositories.format import ClientSource, FoundPackage, IndexFile, Release, Sum
from repositories.package import Package, Reading
from repositories.packed import Damaged
from tests.apt_machine import AptMachine
from tests.debs import ar, deb, fields, member, read, stanzas, sum_of, tar

FORMAT = DebFormat()
GOOD_CONTROL = gzip.compress(tar(("./control", fields().encode())))
GOOD_DATA = gzip.compress(tar(("./usr/share/probe", b"probe\n")))
BINARY = ("debian-binary", b"2.0\n")
# Whatever Debian and Ubuntu packages have been packed with.
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}


def built(directory: Path, *options: str, control: str = "", name: str = "probe") -> Path:
    """A package that dpkg-deb makes."""
    top = directory / "top"
    (top / "DEBIAN").mkdir(parents=True, exist_ok=True)
    (top / "usr/share/doc/probe").mkdir(parents=True, exist_ok=True)
    (top / "usr/share/doc/probe/README").write_text("words\n" * 100)
    (top / "DEBIAN/control").write_text(control or fields(name))
    md5 = hashlib.md5(b"words\n" * 100).hexdigest()
    (top / "DEBIAN/md5sums").write_text(f"{md5}  usr/share/doc/probe/README\n")
    path = directory / f"{name}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", *options, "-b", top, path], check=True, capture_output=True
    )
    return path


@pytest.mark.parametrize("packer", ["gzip", "xz", "zstd", "none"])
@pytest.mark.parametrize("all_alike", ["--uniform-compression", "--no-uniform-compression"])
def test_what_dpkg_deb_makes(tmp_path: Path, packer: str, all_alike: str) -> None:
    data = built(tmp_path, f"-Z{packer}", all_alike).read_bytes()
    reading = read(tmp_path, data)
    assert (reading.name, reading.version, reading.architecture) == ("probe", "1.0-1", "amd64")
    sha256 = hashlib.sha256(data).hexdigest()
    assert reading.texts == {
        "Packages": f"{fields()}Filename: pool/{sha256[:2]}/{sha256}/probe_1.0-1_amd64.deb\n"
        f"Size: {len(data)}\nSHA256: {sha256}\n\n"
    }


def test_the_stanza_is_apt_ftparchives(tmp_path: Path) -> None:
    """Also where a package has fields that are the archive's to say."""
    more = (
        "Source: probes (1.0)\nInstalled-Size: 12\nDepends: a (>= 1:2~3), b | c:any,\n d\nX-Own: words\n"
        "Homepage:\n https://example.org\nMulti-Arch: foreign\n"
    )
    archive = tmp_path / "archive"
    archive.mkdir()
    ours = []
    for name, extra in (("probe", more), ("simple", "")):
        data = built(tmp_path, control=fields(name, more=extra), name=name).read_bytes()
        (archive / f"{name}.deb").write_bytes(data)
        ours += stanzas(read(tmp_path, data, f"{name}.deb").texts["Packages"])
    sums = ["--md5=no", "--sha1=no", "--sha512=no"]
    said = subprocess.run(
        ["apt-ftparchive", *sums, "packages", "."],
        cwd=archive,
        check=True,
        capture_output=True,
        text=True,
    )
    theirs = stanzas(said.stdout)
    places = [one.pop("Filename") for one in ours]
    assert [place.rpartition("/")[2] for place in places] == ["probe.deb", "simple.deb"]
    assert [one.pop("Filename") for one in theirs] == ["./probe.deb", "./simple.deb"]
    assert ours == theirs


def test_what_is_the_archives_to_say_is_left_out(tmp_path: Path) -> None:
    """apt would take its Filename for the place."""
    lies = "Filename: /etc/shadow\nsize: 1\nSHA512: 0\n"
    (stanza,) = stanzas(read(tmp_path, deb(fields(more=lies))).texts["Packages"])
    assert stanza["Filename"].startswith("pool/")
    assert not {"size", "SHA512"} & stanza.keys()


@pytest.mark.parametrize(("control", "data"), list(product(PACKERS, PACKERS)))
def test_all_that_packages_are_packed_with(tmp_path: Path, control: str, data: str) -> None:
    """What dpkg unpacks, no more."""
    path = tmp_path / "x.deb"
    whole = ar(
        BINARY,
        ("_gpgorigin", b"-"),  # deb(5): what begins with _ is passed over
        (f"control.tar{control}", PACKERS[control](gzip.decompress(GOOD_CONTROL))),
        (f"data.tar{data}", PACKERS[data](gzip.decompress(GOOD_DATA))),
        ("later", b"anything"),
    )
    path.write_bytes(whole)
    said = subprocess.run(["dpkg-deb", "-I", path], capture_output=True, check=False)
    if said.returncode == 0:
        assert read(tmp_path, whole).name == "probe"
    else:
        with pytest.raises(
            Unfit, match=f"there is control.tar{control} where control.tar, control.tar.gz"
        ):
            read(tmp_path, whole)
    assert (said.returncode == 0) == (control not in (".bz2", ".lzma"))


@pytest.mark.parametrize("end", [".gz", ".xz", ".zst", ".bz2"])
def test_several_streams_are_one(end: str) -> None:
    data = b"".join(PACKERS[end](part) for part in (b"a" * 300_000, b"", b"b"))
    assert b"".join(packed.unpacked(iter([data[:70], data[70:]]), end, 2**20)) == b"a" * 300_000 + b"b"


def test_a_cut_package_is_refused(tmp_path: Path) -> None:
    """Wherever it was cut off; most of a package is data."""
    whole = built(tmp_path, "-Zxz").read_bytes()
    read(tmp_path, whole)
    for at in {*range(0, len(whole), 7), *range(len(whole) - 80, len(whole))}:
        with pytest.raises(Unfit) as refused:
            read(tmp_path, whole[:at])
        assert "\n" not in str(refused.value)


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    """Any one of what was packed by xz, which has sums of all its parts."""
    whole = built(tmp_path, "-Zxz").read_bytes()
    starts = [whole.index(b"\xfd7zXZ"), whole.rindex(b"\xfd7zXZ")]
    ends = [whole.index(b"data.tar.xz") - 1, len(whole) - 1]
    for start, end in zip(starts, ends, strict=True):
        for at in {*range(start, end, 5), *range(end - 40, end)}:
            with pytest.raises(Unfit):
                read(tmp_path, whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_whatever_is_done_to_a_package_is_taken_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """With one line, and nothing else; also where gzip's and zstd's sums are right."""
    pack = PACKERS[data.draw(st.sampled_from([*PACKERS]))]
    raw = bytearray(tar(("./control", fields().encode()), ("./md5sums", b"")))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, 2047))] = data.draw(st.integers(0, 255))
    end = next(end for end, one in PACKERS.items() if one is pack)
    whole = bytearray(ar(BINARY, (f"control.tar{end}", pack(bytes(raw))), ("data.tar.gz", GOOD_DATA)))
    for _ in range(data.draw(st.integers(0, 2))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(tmp_path, bytes(whole))
    except Unfit as error:
        assert str(error).isprintable()


def test_a_file_that_was_changed_after_its_sum_was_taken(tmp_path: Path) -> None:
    one = hashlib.md5(b"one").hexdigest()
    other = hashlib.md5(b"other").hexdigest()
    link = member("./usr/link", tarfile.LNKTYPE, "./usr/file")

    def package(sums: str) -> bytes:
        control = tar(("./md5sums", sums.encode()), ("./control", fields().encode()))
        files = tar(("./usr/file", b"one"), (link, b""), ("./usr/empty", b""))
        return ar(
            BINARY, ("control.tar.xz", lzma.compress(control)), ("data.tar.zst", zstd.compress(files))
        )

    read(tmp_path, package(f"{one}  usr/file\n{one} *usr/link\n{one} ./usr/file\n"))
    read(tmp_path, package(f"{one}  usr/link\n"))
    for sums, why in (
        (f"{other}  usr/file\n", "usr/file has another checksum than md5sums says"),
        (f"{one}  usr/file\n{other}  usr/link\n", "usr/link has another checksum"),
        (f"{one}  usr/empty\n", "usr/empty has another"),
        (f"{one}  usr/gone\x1b[2J\n", r"usr/gone\\x1b\[2J is not in data.tar"),
        (f"\n{one[:-1]}  usr/file\n", "md5sums, line 2: it is no checksum with a name"),
    ):
        with pytest.raises(Unfit, match=why):
            read(tmp_path, package(sums))


def two(control: bytes = GOOD_CONTROL, data: bytes = GOOD_DATA) -> bytes:
    return ar(BINARY, ("control.tar.gz", control), ("data.tar.gz", data))


def with_data(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    return two(data=gzip.compress(tar(*members)))


def pax() -> bytes:
    info = member("x")
    info.pax_headers = {"comment": "x"}
    return two(data=gzip.compress(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)))


def large(name: str, kind: bytes, size: int) -> bytes:
    """A header that promises more than follows."""
    info = member(name, kind)
    info.size = size
    return two(data=gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is no Debian package: no ar archive"),
        (b"\x7fELF", "it is no Debian package: no ar archive"),
        (b"!<arch>\n", "its first member isn't debian-binary"),
        (ar(("control.tar.gz", GOOD_CONTROL)), "its first member isn't debian-binary"),
        (ar(("debian-binary", b"3.0\n")), "of another format than 2.0"),
        (ar(("debian-binary", b"2.0\n" * 100)), "debian-binary is larger than 64 bytes"),
        (ar(BINARY), "there is nothing where control.tar, control.tar.gz, control.tar.xz"),
        (ar(BINARY, ("data.tar.gz", GOOD_DATA), ("control.tar.gz", GOOD_CONTROL)), "data.tar.gz where"),
        (ar(BINARY, ("control.tar.Z", b"")), "there is control.tar.Z"),
        (ar(BINARY, ("control.tar.gz", GOOD_CONTROL)), r"nothing where data.tar, .*lzma should"),
        (two() + ar(("data.tar.xz", b""))[8:], "it has data.tar twice"),
        (two() + b"rest", "is no member of an ar archive"),
        (two() + ar(*[("x", b"")] * 40)[8:], "more than 32 members"),
        (two(control=b""), "control.tar.gz: it is empty"),
        (two(control=b"plain"), "control.tar.gz: it can't be unpacked"),
        (two(data=GOOD_DATA[:-1]), "data.tar.gz: it ends too early"),
        (two(data=GOOD_DATA + b"x"), "data.tar.gz: it (can't be unpacked|ends too early)"),
        (two(data=gzip.compress(b"x" * 1024)), "data.tar.gz: it is no whole tar archive"),
        (two(data=gzip.compress(tar(("x", b"y" * 600))[:700])), "what is in it ends too early"),
        (two(gzip.compress(tar(("./postinst", b"")))), "control.tar has no control file"),
        (two(gzip.compress(tar(*[("control", b"x\n")] * 2))), "two files control"),
        (two(gzip.compress(tar(("control", b"x" * 2**20 + b"\n")))), "is larger than 1024 KiB"),
        (two(gzip.compress(tar(("postinst", bytes(65 * 2**20))))), "grows to more than 64 MiB"),
        (with_data(("../etc/passwd", b"")), r"\.\./etc/passwd in it leads out"),
        (with_data(("./usr/../../x\n", b"")), r"usr/../../x\\n in it leads out"),
        (with_data((member("x", tarfile.GNUTYPE_SPARSE), b"")), "x in it is of a kind that dpkg"),
        (pax(), "of a kind that dpkg doesn't unpack"),
        (large("x", tarfile.REGTYPE, 2**40), "what is in it ends too early"),
        (large("x", tarfile.REGTYPE, -1), "size below 0"),
        (large("x", tarfile.GNUTYPE_LONGNAME, 2**40), "a name in it is too long"),
        (large("x", tarfile.GNUTYPE_LONGLINK, -5), "a name in it is too long"),
    ],
)  # fmt: skip
def test_no_package(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(Unfit, match=why) as refused:
        read(tmp_path, data, "x\x1b[2J.deb")
    assert str(refused.value).startswith(r"x\x1b[2J.deb: ")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["probe#1.deb", "probe?.deb"])
def test_a_name_that_apt_does_not_fetch(tmp_path: Path, name: str) -> None:
    """It leaves these two as they are in a URL."""
    with pytest.raises(Unfit, match="apt fetches no file with # or"):
        read(tmp_path, deb(), name)


def test_long_names_and_all_kinds_of_files_are_taken(tmp_path: Path) -> None:
    name = "./usr/" + "long/" * 60 + "name"
    link = member("./usr/link", tarfile.SYMTYPE, "../" * 50 + "x")
    kinds = [member(f"./{kind!r}", kind) for kind in (b"3", b"4", b"5", b"6", b"7")]
    assert read(tmp_path, with_data((name, b"x" * 700), (link, b""), *((kind, b"") for kind in kinds)))


def test_what_grows_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller limit, for the sake of time; its ratio is the real one."""
    assert (deb_file._LEAST_DATA, deb_file._RATIO) == (2**30, 200)
    monkeypatch.setattr(deb_file, "_LEAST_DATA", 2**20)
    for pack in (gzip.compress, lzma.compress, zstd.compress, bz2.compress):
        data = pack(tar(("./x", bytes(2**23))))
        end = next(end for end, one in PACKERS.items() if one is pack)
        with pytest.raises(Unfit, match=rf"data.tar{end}: it grows to more than \d+ MiB"):
            read(tmp_path, ar(BINARY, ("control.tar.gz", GOOD_CONTROL), (f"data.tar{end}", data)))


def test_a_header_can_not_ask_for_all_memory() -> None:
    data = bytearray(lzma.compress(b"x", lzma.FORMAT_ALONE))
    data[1:5] = b"\xff\xff\xff\xff"  # the dictionary's size
    with pytest.raises(Damaged, match=r"[Mm]emory"):
        list(packed.unpacked(iter([bytes(data)]), ".lzma", 2**20))
    with pytest.raises(Damaged, match="more than 100000 streams"):
        list(packed.unpacked(iter([gzip.compress(b"")] * 100_001), ".gz", 2**20))


@pytest.mark.parametrize(
    ("control", "why"),
    [
        ("", "control.tar has no control file"),
        ("Version: 1\n", "has no field Package"),
        ("Package: probe\nVersion: 1\n", "has no field Architecture"),
        (fields("Probe"), "its Package has 'Probe', which Debian's policy doesn't allow"),
        (fields("p"), "its Package has 'p'"),
        (fields("../probe"), "its Package has '../probe'"),
        (fields("-probe"), "its Package has '-probe'"),
        (fields("probe\n x"), r"its Package has 'probe\\\\n x'"),
        (fields("a" * 300), "its Package has 'a+…'"),
        (fields(version=""), "its Version has ''"),
        (fields(version="a1"), "its Version has 'a1'"),
        (fields(version="1-"), "its Version has '1-'"),
        (fields(version="-1:1"), "its Version has"),
        (fields(version="1:"), "its Version has"),
        (fields(version="1_2"), "its Version has '1_2'"),
        (fields(version="9999999999:1"), "its Version has"),
        (fields(version="1 2"), "its Version has '1 2'"),
        (fields(version="1/../2"), "its Version has"),
        (fields(version="\uff11"), "its Version has '\uff11'"),
        (fields(architecture="any"), "its Architecture has 'any'"),
        (fields(architecture="any-amd64"), "its Architecture has"),
        (fields(architecture="linux-any"), "its Architecture has"),
        (fields(architecture="source"), "its Architecture has"),
        (fields(architecture="amd64 i386"), "its Architecture has"),
        (fields(architecture="../x"), "its Architecture has"),
        (fields(more="Source: ../x\n"), "its Source has"),
        (fields(more="Source: x (1) y\n"), "its Source has"),
        (fields(more="Foo: 1\nfoo: 2\n"), r"two fields foo \(line 6\)"),
        (fields(more="PACKAGE: other\n"), "two fields PACKAGE"),
        (fields(more="no field\n"), "line 5 of its control file is no field: no field"),
        (fields(more="Foo : bar\n"), "line 5 of its control file is no field"),
        (fields(more="-Foo: bar\n"), "no field"),
        (fields(more="# comment: x\n"), "no field"),
        (fields(more=": bar\n"), "no field"),
        (fields(more="Fü: bar\n"), "no field"),
        (fields(more="Foo: 1\n \t \n"), "line 6 of its control file is blank"),
        (fields(more="\n"), "line 5 of its control file is blank"),
        (fields() + "\nPackage: other\nVersion: 1\nArchitecture: all\n", "is blank"),
        (fields()[:-1], "ends in the middle of a line"),
        (" Foo: bar\n" + fields(), "line 1 of its control file is no field"),
        (fields(more="Foo: \x1b[2J\n"), r"control character: '\\x1b' in line 5"),
        (fields(more="Foo: a\rb\n"), "control character"),
        (fields(more="Foo: \x00\n"), "control character"),
        (fields(more="Foo: \x85Filename: x\n"), "control character"),
        (fields(more="Foo: \u2028Filename: x\n"), "control character"),
        (fields().encode() + b"Foo: \xe9\n", "is no UTF-8 at byte"),
        (fields(more="Depends: a, \n"), "its Depends has '', which apt can't read"),
        (fields(more="Depends: a b\n"), "its Depends has 'a b'"),
        (fields(more="Depends: a (>= )\n"), "its Depends has"),
        (fields(more="Depends: a (~ 1)\n"), "its Depends has"),
        (fields(more="Depends: a (= 1-)\n"), "its Depends has"),
        (fields(more="Depends: a (= x:1)\n"), "its Depends has"),
        (fields(more="Depends: a (=1)\n"), "its Depends has"),  # dpkg reads these two
        (fields(more="Depends: a (\n = 1)\n"), r"its Depends has 'a \(\\\\n = 1\)'"),
        (fields(more="Pre-Depends: a (>= 1\n"), "its Pre-Depends has"),
        (fields(more="Recommends: a [amd64]\n"), "its Recommends has"),
        (fields(more="Suggests: ${misc:Depends}\n"), "its Suggests has"),
        (fields(more="Conflicts: a | b\n"), "its Conflicts has 'a | b'"),
        (fields(more="Provides: a\xa0(= 1)\n"), "its Provides has"),
        (fields(more="Status: install ok installed\n"), "the field Status, which only an installed"),
        (fields(more="conffiles:\n /x 0\n"), "the field Conffiles, which only an installed"),
        (fields(more="Multi-Arch: maybe\n"), "its Multi-Arch has 'maybe', which is none of no, same"),
        (fields(more="Essential: 1\n"), "its Essential has '1'"),
        (fields(architecture="all", more="Multi-Arch: same\n"), "its Multi-Arch is same"),
    ],
)
def test_a_control_file_that_nobody_would_take(tmp_path: Path, control: str | bytes, why: str) -> None:
    with pytest.raises(Unfit, match=why) as refused:
        read(tmp_path, deb(control))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize(
    "control",
    [
        "\n\n" + fields() + "\n\n",
        fields("0ad", "1:0.0.26-3+b1~bpo12+1", "all"),
        fields(version="0~~1-a.b+c~d"),
        fields(architecture="musl-linux-amd64"),
        fields(more="Foo:\n bar\n\tbar\n"),
        fields(more="Depends:\nMulti-Arch:\nEssential:\nSource:\n"),
        fields(more="Source: A_b(1)\n"),
        fields(more="Depends: a(>=1)|b  ( <<  2 ) ,\n c:any\n"),
        fields(more="Provides: python3:any (= 3.11.2-1+b1), x (>= 1)\n"),
        fields(more="Tag: größe, ❤\n"),
    ],
)
def test_a_control_file_that_is_taken(tmp_path: Path, control: str) -> None:
    """dpkg-deb takes it as well."""
    data = deb(control)
    read(tmp_path, data)
    path = tmp_path / "x.deb"
    path.write_bytes(data)
    subprocess.run(["dpkg-deb", "-f", path], check=True, capture_output=True)


_RELATION = st.one_of(
    st.sampled_from(["a", "a (>= 1)", "b:any", "a", "a (<< 1:2~)", "x:amd64 (= 3-1)", "a\n (= 1)"]),
    st.sampled_from(["ab(>>1)", "c (<1)", "d (=\n\t1:1-1)", "e++.-_", "f:x", "g (> ~1+)"]),
    st.sampled_from(["a | b", "a (= 1)|\n b:any"]),
    st.text("ab (>=<1:~|,-+.[]\n\t$", max_size=4),
)


@st.composite
def controls(draw: st.DrawFn) -> str:
    names = ["Depends", "Pre-Depends", "Conflicts", "Provides", "Breaks", "Replaces", "Recommends"]
    used = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    lines = [f"{name}: {draw(_RELATION)}, {draw(_RELATION)}\n" for name in used]
    word = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)
    lines.append(f"X-Own: {draw(word)}\n .{draw(word)}\n")
    lines.append(f"Multi-Arch: {draw(st.sampled_from(['foreign', 'same', 'no', 'allowed']))}\n")
    lines.append(f"Installed-Size: {draw(word)}\nPriority: {draw(word)}\nSection: {draw(word)}\n")
    version = draw(st.sampled_from(["1", "0", "1:2.3-4", "1~~", "1-2-3", "1+.~-+.~", "001-0"]))
    return fields("NAME", version, "amd64", "".join(draw(st.permutations(lines))))


def test_whatever_is_taken_is_read_by_apt(tmp_path: Path) -> None:
    """One package that apt can't parse would end "apt-get update" of every client."""
    texts: list[str] = []

    @settings(max_examples=500, deadline=None, database=None)
    @given(controls())
    def collect(control: str) -> None:
        try:
            control_of(control.replace("NAME", "probe").encode())
        except Damaged:
            return
        made = deb(control.replace("NAME", f"probe{len(texts)}"))
        texts.append(read(tmp_path, made).texts["Packages"])

    collect()
    assert len(texts) > 150
    machine = AptMachine(tmp_path / "machine")
    status = machine.top / "root/var/lib/dpkg/status"
    status.write_text("".join(texts))
    known = machine.run("apt-cache", "pkgnames")
    told = [line for line in known.stderr.splitlines() if "Ignoring non-equal Provides" not in line]
    assert (told, known.returncode) == ([], 0)
    listed = machine.run(
        "dpkg", "--admindir", f"{machine.top}/root/var/lib/dpkg", "--update-avail", str(status)
    )
    assert listed.returncode == 0, listed.stderr
    assert {f"probe{n}" for n in range(len(texts))} <= set(known.stdout.split())


def dpkg_order(one: str, other: str) -> int:
    def holds(relation: str) -> bool:
        argv = ["dpkg", "--compare-versions", one, relation, other]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    return 0 if holds("eq") else (-1 if holds("lt") else 1)


def sign(number: int) -> int:
    return (number > 0) - (number < 0)


VERSIONS = st.from_regex(
    r"([0-9]{1,2}:)?[0-9][0-9az.+~]{0,5}(-[0-9A.+~]{1,4}){0,2}", fullmatch=True, alphabet="0129azA.+~-:"
)


@settings(max_examples=100, deadline=None)
@given(VERSIONS, VERSIONS)
@example("1.0", "1.0-0")
@example("0:1", "1")
@example("1~", "1")
@example("1~~a", "1~")
@example("1.0a", "1.0+")
@example("1.09", "1.9")
@example("1.00", "1.0")
@example("1-a-1", "1-a")
@example("1" + "0" * 40, "9" + "0" * 39)
def test_versions_stand_in_dpkgs_order(one: str, other: str) -> None:
    expected = dpkg_order(one, other)
    assert sign(FORMAT.compare(one, other)) == expected
    assert sign(FORMAT.compare(other, one)) == -expected
    assert FORMAT.compare(one, one) == 0


@given(st.text(max_size=20), st.text(max_size=20))
@example("9" * 5000, "9" * 4999 + "8")
def test_any_two_texts_have_an_order(one: str, other: str) -> None:
    assert sign(FORMAT.compare(one, other)) == -sign(FORMAT.compare(other, one))


WHEN = datetime(2026, 3, 1, 12, 0, 5, tzinfo=timezone(timedelta(hours=2)))
RELEASE = Release("tools", "tested", 7, WHEN, "Tools\nof ours", ("main",), ("amd64", "arm64"))


def test_where_packages_are_listed() -> None:
    def package(architecture: str) -> Package:
        return Package("probe", "1", architecture, "0" * 64, 1, "probe.deb", "main")

    both = ("amd64", "arm64")
    assert FORMAT.sections(package("amd64"), both) == ("main/binary-amd64",)
    assert FORMAT.sections(package("all"), both) == ("main/binary-amd64", "main/binary-arm64")
    assert FORMAT.sections(package("riscv64"), both) == ()
    assert FORMAT.all_sections(("main", "extra"), both) == (
        "extra/binary-amd64", "extra/binary-arm64", "main/binary-amd64", "main/binary-arm64"
    )  # fmt: skip
    assert FORMAT.sections(package("all"), ()) == ("main/binary-all",)
    assert FORMAT.all_sections(("main",), ()) == ("main/binary-all",)
    assert FORMAT.frame("Packages", 10) == (b"", b"")


def test_the_summary() -> None:
    index = IndexFile("main/binary-amd64", "Packages", Sum("a" * 64, 10), Sum("b" * 64, 200))
    assert FORMAT.summary(RELEASE, [index]).decode() == (
        "Origin: tools\nLabel: tools\nSuite: tested\nCodename: tested\n"
        "Date: Sun, 01 Mar 2026 10:00:05 UTC\nGeneration: 7\nAcquire-By-Hash: yes\n"
        "Architectures: amd64 arm64\nComponents: main\nDescription: Tools\\nof ours\nSHA256:\n"
        f" {'b' * 64}          200 main/binary-amd64/Packages\n"
        f" {'a' * 64}           10 main/binary-amd64/Packages.gz\n"
    )
    assert FORMAT.lasting(RELEASE, index) == f"dists/tested/main/binary-amd64/by-hash/SHA256/{'a' * 64}"
    assert FORMAT.passing(RELEASE, index) == ("dists/tested/main/binary-amd64/Packages.gz",)
    with_all = Release("tools", "tested", 7, WHEN, "", ("main",), ("all", "amd64"))
    assert b"\nNo-Support-for-Architecture-all: Packages\n" in FORMAT.summary(with_all, [])
    assert FORMAT.entries(RELEASE, b"x", None) == {"dists/tested/Release": b"x"}


def test_what_is_pasted_on_a_client() -> None:
    url = "https://farm.example/channels/tested"
    plain = ClientSource("tools", "tested", url, None, None, None, ("main", "extra"), ("amd64",))
    assert FORMAT.stanza(plain) == (
        "# /etc/apt/sources.list.d/tools-tested.sources\nTypes: deb\n"
        f"URIs: {url}\nSuites: tested\nComponents: main extra\nTrusted: yes\n"
    )
    key = b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nAAAA\n-----END PGP PUBLIC KEY BLOCK-----\n"
    pinned = ClientSource(
        "tools", "tested", url, f"{url}.mirrors", "https://farm.example/key.asc", key, ("main",), ()
    )
    assert FORMAT.stanza(pinned).splitlines() == [
        "# /etc/apt/sources.list.d/tools-tested.sources",
        "# The key is https://farm.example/key.asc; apt before 2.4 wants it in a file of its own.",
        "Types: deb",
        f"URIs: mirror+{url}.mirrors",
        "Suites: tested",
        "Components: main",
        "Signed-By:",
        " -----BEGIN PGP PUBLIC KEY BLOCK-----",
        " .",
        " AAAA",
        " -----END PGP PUBLIC KEY BLOCK-----",
    ]


def test_what_differs_is_named(tmp_path: Path) -> None:
    def differing(other: bytes) -> tuple[str, ...]:
        one, two = tmp_path / "one.deb", tmp_path / "two.deb"
        one.write_bytes(deb(fields(more="Depends: a\n"), {"usr/a": b"a", "usr/b": b"b"}))
        two.write_bytes(other)
        return FORMAT.differing(one, two)

    files = {"usr/a": b"a", "usr/b": b"b"}
    more = "Depends: a\n"
    assert differing(deb(fields(more=more), files)) == ()
    assert differing(deb(fields(more=more), files, xz=True)) == ()
    assert differing(deb(fields(more=more), files, mtime=9)) == ("times of files",)
    assert differing(deb(fields(version="2", more="Depends: b\n"), files)) == (
        "control: Depends", "control: Version"
    )  # fmt: skip
    assert differing(
        deb(fields(more=more), {"usr/a": b"A", "usr/c": b""}, scripts=[("./postinst", b"#!")], mtime=9)
    ) == ("./usr/a", "./usr/b", "./usr/c", "control/postinst")
    with pytest.raises(Unfit, match=r"two.deb: it is no Debian package"):
        differing(b"x")


CHANGELOG = """probe (1.0-2) unstable; urgency=medium

  * Second:
    goes on.

  * Third.

 -- A Person <a@example.org>  Sat, 28 Feb 2026 10:00:00 +0100

probe (1.0-1) unstable; urgency=low, binary-only=yes

  [ B ]
  * First.

 -- B <b@example.org>  whenever
Local variables:
mode: debian-changelog
"""


def test_changelogs(tmp_path: Path) -> None:
    def changelog(**files: bytes) -> list[tuple[str, str]]:
        path = tmp_path / "x.deb"
        path.write_bytes(deb(files={name.replace("_", "/"): data for name, data in files.items()}))
        return [(change.version, change.author) for change in FORMAT.changelog(path)]

    def at(name: str, data: str, pack: Callable[[bytes], bytes] = gzip.compress) -> dict[str, bytes]:
        return {f"usr_share_doc_probe_{name}": pack(data.encode())}

    both = [("1.0-2", "A Person <a@example.org>"), ("1.0-1", "B <b@example.org>")]
    rebuilt = "probe (1.0-2+b1) sid; urgency=low\n\n  * Rebuild.\n\n -- C <c@x>  Sun, 01 Mar 2026\n"
    upstream = at("changelog.gz", "2026: anything\n")
    assert changelog() == []
    assert changelog(**upstream) == []
    assert changelog(**at("changelog", CHANGELOG, bytes)) == both
    assert changelog(**at("changelog.gz", CHANGELOG)) == both
    assert changelog(**upstream, **at("changelog.Debian.gz", CHANGELOG)) == both
    assert changelog(
        **at("changelog.Debian.amd64.gz", rebuilt), **at("changelog.Debian.gz", CHANGELOG)
    ) == [("1.0-2+b1", "C <c@x>"), *both]
    assert changelog(**{"usr_share_doc_other_changelog.gz": gzip.compress(CHANGELOG.encode())}) == []
    with pytest.raises(Unfit, match="grows to more than 4 MiB"):
        changelog(**at("changelog.gz", "x" * 2**23))
    with pytest.raises(Unfit, match="can't be unpacked"):
        changelog(**at("changelog.gz", CHANGELOG, bytes))


def test_a_changelogs_entries() -> None:
    first, second = parsed(CHANGELOG.encode())
    assert first.lines == ("  * Second:", "    goes on.", "", "  * Third.")
    assert first.when == datetime(2026, 2, 28, 9, tzinfo=UTC)
    assert (second.lines, second.when) == (("  [ B ]", "  * First."), None)
    assert len(list(parsed(CHANGELOG.encode() * 2000))) == 1000
    assert not list(parsed(random.Random(1).randbytes(10_000)))


# Archives of others


def archive(top: Path, *, pack: str = ".gz", place: str = "pool/main/p/probe") -> tuple[str, Reading]:
    """A tree as aptly and reprepro publish one: returns the package's file."""
    data = deb()
    file = f"{place}/probe_1.0-1_amd64.deb"
    (top / file).parent.mkdir(parents=True, exist_ok=True)
    (top / file).write_bytes(data)
    stanza = f"{fields()}Filename: {file}\nSize: {len(data)}\nSHA256: {sum_of(data).sha256}\n\n".encode()
    index = top / "dists/stable/main/binary-amd64"
    index.mkdir(parents=True, exist_ok=True)
    (index / f"Packages{pack}").write_bytes(PACKERS[pack](stanza))
    (index / "Release").write_text("Component: main\n")
    name = "main/binary-amd64/Packages"
    (top / "dists/stable/Release").write_text(
        f"Components: main\nMD5Sum:\n {'0' * 32} 1 {name}\nSHA256:\n"
        f" {hashlib.sha256(stanza).hexdigest()} {len(stanza)} {name}\nSHA512:\n"
    )
    return file, read(top, data)


@pytest.mark.parametrize("pack", ["", ".gz", ".xz", ".zst", ".bz2"])
def test_a_published_tree(tmp_path: Path, pack: str) -> None:
    file, _ = archive(tmp_path, pack=pack)
    sum_ = sum_of(deb())
    expected = [FoundPackage(file, "main", sum_.sha256, sum_.size)]
    (tmp_path / "dists/old").symlink_to("stable")
    (tmp_path / "dists/round").symlink_to("..")
    (tmp_path / "dists/out").symlink_to("/")
    (tmp_path / "dists/self").symlink_to("self")
    installer = tmp_path / "dists/stable/main/debian-installer/binary-amd64"
    installer.mkdir(parents=True)
    (installer / "Packages").write_text("Package: x\nFilename: x.udeb\nSize: 1\n")
    assert list(FORMAT.published(tmp_path)) == expected
    # the same package under another distribution
    (tmp_path / "dists/testing").mkdir()
    (tmp_path / "dists/testing/main").symlink_to("../stable/main")
    assert list(FORMAT.published(tmp_path)) == expected


def test_flat_archives(tmp_path: Path) -> None:
    """As apt-ftparchive and dpkg-scanpackages write them."""
    built(tmp_path).rename(tmp_path / "probe.deb")
    said = subprocess.run(
        ["apt-ftparchive", "packages", "."], cwd=tmp_path, check=True, capture_output=True
    )
    (tmp_path / "Packages").write_bytes(said.stdout)
    sum_ = sum_of((tmp_path / "probe.deb").read_bytes())
    assert list(FORMAT.published(tmp_path)) == [
        FoundPackage("probe.deb", "main", sum_.sha256, sum_.size)
    ]
    release = subprocess.run(
        ["apt-ftparchive", "release", "."], cwd=tmp_path, check=True, capture_output=True
    )
    (tmp_path / "Release").write_bytes(release.stdout)
    assert len(list(FORMAT.published(tmp_path))) == 1
    (tmp_path / "Packages").write_bytes(said.stdout.replace(b"a probe", b"A probe"))
    with pytest.raises(Unfit, match=r"isn't what .*/Release tells of"):
        list(FORMAT.published(tmp_path))


@pytest.mark.parametrize(
    ("stanza", "why"),
    [
        ("Filename: ../x.deb\nSize: 1\n", r"has a Filename that is not taken: \.\./x.deb"),
        ("Filename: ./pool/../../x.deb\nSize: 1\n", "not taken"),
        ("Filename: /etc/x.deb\nSize: 1\n", "not taken"),
        ("Filename: .//etc/x.deb\nSize: 1\n", ""),
        ("Filename: ./\nSize: 1\n", "not taken"),
        ("Filename: a\x1b[2J\nSize: 1\n", r"not taken: a\\x1b\[2J"),
        ("Filename: out/x.deb\nSize: 1\n", "a link leads out of the repository"),
        ("Filename: loop/x.deb\nSize: 1\n", "a link leads out of the repository"),
        ("Filename: x.deb\n", "has no Filename, no Size"),
        ("Size: 1\n", "has no Filename, no Size"),
        ("Filename: x.deb\nSize: many\n", "has no Filename, no Size, or unreadable ones"),
        ("Filename: x.deb\nSize: -1\n", "has a SHA256 or a Size that is none"),
        ("Filename: x.deb\nSize: 1\nSHA256: 00\n", "has a SHA256 or a Size that is none"),
        ("Filename: x.deb\nSize: 1\n", ""),
    ],
)
def test_nothing_leads_out_of_an_archive(tmp_path: Path, stanza: str, why: str) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (tmp_path / "x.deb").touch()
    (top / "out").symlink_to("..")
    (top / "loop").symlink_to("loop")
    (top / "Packages").write_text(f"Package: probe\n{stanza}")
    if not why:
        assert [found.sha256 for found in FORMAT.published(top)] == [""]
        return
    with pytest.raises(Unfit, match=why) as refused:
        list(FORMAT.published(top))
    assert str(refused.value).isprintable()
    assert refused.value.remedy


def test_archives_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no Debian archive"):
        list(FORMAT.published(tmp_path))
    with pytest.raises(NotFound, match="no Debian archive"):
        list(FORMAT.published(tmp_path / "gone"))
    archive(tmp_path)
    index = tmp_path / "dists/stable/main/binary-amd64/Packages.gz"
    index.write_bytes(index.read_bytes()[:-3])
    with pytest.raises(Unfit, match=r"Packages.gz: it ends too early"):
        list(FORMAT.published(tmp_path))
    index.unlink()
    (tmp_path / "secret").write_text("Package: x\nFilename: x\nSize: 1\n")
    (tmp_path / "top").mkdir()
    (tmp_path / "top/Packages").symlink_to("../secret")
    with pytest.raises(Unfit, match="leads out"):
        list(FORMAT.published(tmp_path / "top"))
