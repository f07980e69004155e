"""rpm packages and rpm-md metadata, held against rpm, createrepo_c and gpg themselves."""

from __future__ import annotations

import configparser
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host.run import Runner, which
from inventory.errors import NotFound, Unfit
from repositories.format import ClientSource, IndexFile, Release, Sum
from repositories.package import Package, Reading, place
from repositories.rpm.file import issuers, read_rpm
from repositories.rpm.format import RpmFormat
from repositories.signing.gpg import SigningKey, open_signer
from tests.rpms import rpm

ROOT = Path(__file__).resolve().parents[2]
FORMAT = RpmFormat()
RELEASE = Release(
    repository="base", channel="tested", sequence=7, date=datetime(2026, 11, 20, tzinfo=UTC)
)
LIBRARY = {"Name": "libé"}
RICH = {
    "Epoch": "3",
    "Requires": "hello >= 1.0, (a or b), /bin/sh",
    "Requires(pre)": "coreutils",
    "Provides": "thing = 2:5-1",
    "Conflicts": "old < 2",
    "Obsoletes": "older",
    "Recommends": "nice",
    "Suggests": "nicer",
    "Supplements": "base",
    "Enhances": "better",
    "URL": "https://example.org/?a=1&b=2",
    "Vendor": "A & B <c>",
}
CHANGES = (
    "%changelog\n"
    "* Fri Nov 20 2026 Zoë B <z@example.org> - 3:2.5-1.fc40\n- second\n- of two lines\n"
    "* Thu Nov 19 2026 Zoë B <z@example.org> 3:2.4-1\n- first\n"
)
POST = "%post\necho <installed>\n"
FILES = {"/usr/bin/rich": "#!/bin/sh\n", "/etc/rich.conf": "a=1\n", "/usr/share/rich/a & b": "x\n"}


def rich(**more: Any) -> Path:
    return rpm(
        "rich", "2.5", "1.fc40", tags={**RICH, **more.pop("tags", {})}, files=more.pop("files", FILES),
        sections=(POST, CHANGES), **more,
    )  # fmt: skip


def sum_of(data: bytes) -> Sum:
    return Sum(hashlib.sha256(data).hexdigest(), len(data))


def read(path: Path) -> Reading:
    return FORMAT.read(path, path.name, sum_of(path.read_bytes()), "")


def package_of(path: Path) -> Package:
    found, sum_ = read(path), sum_of(path.read_bytes())
    return Package(found.name, found.version, found.architecture, sum_.sha256, sum_.size, path.name)


# -- reading ---------------------------------------------------------------------------------------


def test_what_a_package_says_of_itself() -> None:
    found = read(rich())
    assert (found.name, found.version, found.architecture) == ("rich", "3:2.5-1.fc40", "noarch")
    assert (found.source, found.signers) == ("rich", ())
    assert tuple(found.texts) == FORMAT.KINDS
    for text in found.texts.values():
        assert text.startswith("<package ")
        assert text.endswith("</package>\n")
    assert f'<location href="{package_of(rich()).place}"/>' in found.texts["primary"]
    plain = read(rpm())
    assert plain.version == "1.0-1"  # an epoch of 0 is left out


def test_a_subpackage_and_a_source_package_name_their_source() -> None:
    assert read(rpm("lib", tags={"Name": "lib"})).source == "lib"
    source = read(rpm(source=True))
    assert (source.name, source.architecture, source.source) == ("hello", "src", "hello")


def test_what_is_read_depends_on_the_bytes_alone(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.write_bytes(rich().read_bytes())
    os.utime(copy, (1, 1))
    sum_ = sum_of(copy.read_bytes())
    assert FORMAT.read(copy, rich().name, sum_, "") == read(rich())


# -- damage ----------------------------------------------------------------------------------------


def test_each_damage_that_rpm_sees_is_seen(tmp_path: Path) -> None:
    data, path = rpm().read_bytes(), tmp_path / "hello-1.0-1.noarch.rpm"
    seen = 0
    for at in range(0, len(data), 61):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        words = ["rpmkeys", "--checksig", "--nosignature", path]
        if subprocess.run(words, check=False, capture_output=True).returncode:
            seen += 1
            with pytest.raises(Unfit, match=r"^hello-1\.0-1\.noarch\.rpm ") as told:
                read(path)
            assert "\n" not in str(told.value)
    assert seen > 25


@pytest.mark.parametrize("size", [0, 3, 95, 96, 100, 111, 112, 500, 2000, 4500, -700, -100, -1])
def test_one_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.rpm"
    path.write_bytes(rpm().read_bytes()[:size])
    with pytest.raises(Unfit, match=r"a\.rpm is (damaged: |no rpm package)"):
        read(path)


def test_one_with_more_at_its_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.rpm"
    path.write_bytes(rpm().read_bytes() + b"x")
    with pytest.raises(Unfit, match="and says that it has"):
        read(path)


def test_sizes_that_nothing_has_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.rpm"
    for count, size in ((2**32 - 1, 16), (1, 2**32 - 1), (0, 16), (0xFFFF, 64 * 2**20), (9, 0)):
        head = bytes.fromhex("8eade80100000000") + count.to_bytes(4) + size.to_bytes(4)
        path.write_bytes(rpm().read_bytes()[:96] + head + b"x" * 100)
        with pytest.raises(Unfit, match="signature header"):
            read(path)


def altered(path: Path, old: bytes, new: bytes) -> bytes:
    """The package with ``new`` in its header in the place of ``old``, and with digests that fit."""
    assert len(old) == len(new)
    found, data = read_rpm(path, path.name), path.read_bytes()
    blob = found.header.blob
    assert blob.count(old) >= 1
    changed = blob.replace(old, new)
    data = found.head[: -len(blob)] + changed + data[len(found.head) :]
    payload = data[len(found.head) :]
    for was, now in (
        (hashlib.sha256(blob).hexdigest().encode(), hashlib.sha256(changed).hexdigest().encode()),
        (hashlib.sha1(blob).hexdigest().encode(), hashlib.sha1(changed).hexdigest().encode()),
        (hashlib.md5(blob + payload).digest(), hashlib.md5(changed + payload).digest()),
    ):
        assert data.count(was) == 1
        data = data.replace(was, now)
    return data


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("victim\0", "vic/im\0", "is no name of a package"),
        ("victim\0", "vic\nim\0", "is no name of a package"),
        ("victim\0", "\x1b[31m \0", "is no name of a package"),
        ("victim\0", "-ictim\0", "is no name of a package"),
        ("victim\0", "\0ictim\0", "is no name of a package"),
        ("9.8.7\0", "9-8.7\0", "is no version of a package"),
        ("9.8.7\0", "9:8.7\0", "is no version of a package"),
        ("77.el9\0", "77/el9\0", "is no release of a package"),
        ("noarch\0", "no\narc\0", "is no architecture of a package"),
        ("noarch\0", "../../\0", "is no architecture of a package"),
        ("a summary", "a\x01summary", "dnf wouldn't take what it says of its summary: "),
        ("a summary", "a\ufffeummry", "dnf wouldn't take what it says of its summary: "),
        ("/usr/share/victim/", "/usr/share/\x07ictim/", "dnf wouldn't take what it says of its files: "),
    ],
)
def test_what_no_package_manager_would_take_is_refused(
    tmp_path: Path, old: str, new: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of it with digests that are right."""
    victim = rpm("victim", "9.8.7", "77.el9", tags={"Summary": "a summary"})
    path = tmp_path / "v.rpm"
    path.write_bytes(altered(victim, old.encode(), new.encode()))
    with pytest.raises(Unfit, match=words) as told:
        read(path)
    assert str(told.value).isprintable()
    del told
    assert capfd.readouterr() == ("", "")


def test_bytes_that_are_no_utf_8_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "v.rpm"
    victim = rpm("victim", "9.8.7", "77.el9", tags={"Summary": "a summary"})
    path.write_bytes(altered(victim, b"a summary", b"a \xff\xfemmary"))
    for text in read(path).texts.values():
        text.encode()


def test_the_library_says_nothing_and_is_used_late(tmp_path: Path) -> None:
    """Where rpm was never installed, and on its import, it would complain on standard error."""
    path = rpm()
    program = f"""
import os, sys
from pathlib import Path
from repositories.format import Sum
from repositories.rpm.format import RpmFormat
assert "createrepo_c" not in sys.modules
before = dict(os.environ)
path = Path({str(path)!r})
print(RpmFormat().read(path, path.name, Sum("ab" * 32, 5), "").name)
assert "createrepo_c" in sys.modules and before == dict(os.environ)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RPM_CONFIGDIR": str(tmp_path / "none")},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
    assert not list(tmp_path.iterdir())


# -- signatures ------------------------------------------------------------------------------------


class Home:
    """A GNUPGHOME with keys that were made for a test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700)

    def gpg(self, *words: str | Path, data: bytes = b"") -> bytes:
        argv = [
            "gpg",
            "--homedir",
            self.path,
            "--batch",
            "--quiet",
            "--pinentry-mode",
            "loopback",
            *words,
        ]
        done = subprocess.run(argv, input=data, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def key(self, name: str, kind: str = "ed25519") -> str:
        """Its fingerprint."""
        self.gpg(
            "--passphrase", "", "--quick-generate-key", f"{name}@example.org", kind, "sign", "never"
        )
        told = self.gpg("--with-colons", "--list-keys", f"{name}@example.org").decode()
        return next(line for line in told.splitlines() if line.startswith("fpr:")).split(":")[9]


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    """Short, for the socket of its agent; also our runtime directory."""
    with tempfile.TemporaryDirectory(prefix="fhg-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FARMHAND_RUNTIME_DIR", f"{directory}/r")
        found = Home(Path(directory, "home"))
        yield found
        subprocess.run(["gpgconf", "--homedir", found.path, "--kill", "all"], check=True)
        subprocess.run(["gpgconf", "--homedir", found.path, "--remove-socketdir"], check=False)


def signed(path: Path, home: Home, name: str) -> Path:
    settings = ("__gpg /usr/bin/gpg", f"_gpg_name {name}@example.org", f"_gpg_path {home.path}")
    words = [f"--define={each}" for each in settings]
    done = subprocess.run(
        ["rpmsign", "--addsign", *words, path], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("kind", ["ed25519", "rsa2048"])
def test_who_signed_a_package(tmp_path: Path, home: Home, kind: str) -> None:
    fingerprint = home.key(kind, kind)
    path = tmp_path / rpm().name
    path.write_bytes(rpm().read_bytes())
    assert read(signed(path, home, kind)).signers == (fingerprint,)


def test_an_issuer_as_old_signatures_have_it() -> None:
    """Of version 3, in a packet of the old form; and what is no packet names nobody."""
    body = bytes([3, 5, 0, *(1, 2, 3, 4), *bytes.fromhex("00112233AABBCCDD"), 1, 2, 0, 0])
    assert list(issuers(bytes([0x88, len(body)]) + body)) == ["00112233AABBCCDD"]
    assert list(issuers(bytes([0x88, 200]) + b"\4")) == []


@given(st.binary(max_size=80))
def test_what_is_no_signature_names_nobody_and_ends(data: bytes) -> None:
    for issuer in issuers(data):
        assert issuer.isalnum() or not issuer


def test_metadata_are_signed_by_the_first_key_alone(tmp_path: Path, home: Home) -> None:
    keys = [home.key(name) for name in ("old", "new")]
    summary = FORMAT.summary(RELEASE, ())
    with open_signer([SigningKey(key, home=home.path) for key in keys], Runner()) as signer:
        entries = FORMAT.entries(RELEASE, summary, signer)
        assert signer.detached(summary) != entries["repodata/repomd.xml.asc"]
    assert entries["repodata/repomd.xml"] == summary
    (signature,) = FORMAT.signatures(RELEASE)
    (tmp_path / "asc").write_bytes(entries[signature])
    told = home.gpg("--status-fd", "1", "--verify", tmp_path / "asc", "-", data=summary).decode()
    assert [line.split()[2] for line in told.splitlines() if " VALIDSIG " in line] == [keys[0]]
    assert set(FORMAT.entries(RELEASE, summary, None)) == {"repodata/repomd.xml"}


# -- versions --------------------------------------------------------------------------------------

_ORACLE = """%{lua:
for line in io.stdin:lines() do
    local one, two = line:match("^(%S+) (%S+)$")
    io.stdout:write(rpm.vercmp(one, two), "\\n")
    io.stdout:flush()
end
}"""


@pytest.fixture(scope="module")
def rpm_says() -> Iterator[Callable[[str, str], int]]:
    process = subprocess.Popen(
        ["rpm", "--eval", _ORACLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin and process.stdout

    def ask(one: str, two: str) -> int:
        assert process.stdin and process.stdout
        process.stdin.write(f"{one} {two}\n")
        return int(process.stdout.readline())

    with process:
        yield ask
        process.stdin.close()


_parts = st.one_of(
    st.text("0123456789ab.~^_+", min_size=1, max_size=8),
    st.lists(st.sampled_from(("1", "01", "10", "a", "rc", "~", "^", ".", "_")), min_size=1).map("".join),
)  # fmt: skip
_versions = st.tuples(st.sampled_from(["", "0:", "1:", "10:"]), _parts, _parts).map(
    lambda v: f"{v[0]}{v[1]}-{v[2]}"
)


@settings(
    max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(_versions, _versions)
def test_versions_are_ordered_as_rpm_does(
    rpm_says: Callable[[str, str], int], one: str, other: str
) -> None:
    assert FORMAT.compare(one, other) == rpm_says(one, other)
    assert FORMAT.compare(one, one) == 0


@pytest.mark.parametrize(
    ("older", "newer"),
    [("1.0~rc1-1", "1.0-1"), ("1.0-1", "1.0^git1-1"), ("1.0^git1-1", "1.0.1-1"), ("9-1", "10-1"),
     ("2-9", "1:1-1"), ("1.a-1", "1.1-1"), ("1-1", "1-1.1"), ("1-" + "9" * 5000, "1-1" + "0" * 5000)],
)  # fmt: skip
def test_well_known_orders(older: str, newer: str, rpm_says: Callable[[str, str], int]) -> None:
    assert (FORMAT.compare(older, newer), FORMAT.compare(newer, older)) == (-1, 1)
    assert rpm_says(older, newer) == -1


# -- metadata --------------------------------------------------------------------------------------


def metadata(top: Path, paths: Sequence[Path]) -> bytes:
    """Write a repository as the pool does it: members of gzip, one for a run of packages. Returns
    repomd.xml."""
    (top / "repodata").mkdir(parents=True)
    readings, indexes = [read(path) for path in paths], []
    for kind in FORMAT.KINDS:
        before, after = FORMAT.frame(kind, len(paths))
        runs = [r.texts[kind].encode() for r in readings]
        members = [before, *(b"".join(runs[at : at + 2]) for at in range(0, len(runs), 2)), after]
        packed = b"".join(gzip.compress(member, mtime=0) for member in members)
        index = IndexFile("", kind, sum_of(packed), sum_of(b"".join(members)))
        (top / FORMAT.lasting(RELEASE, index)).write_bytes(packed)
        assert FORMAT.passing(RELEASE, index) == ()
        indexes.append(index)
    summary = FORMAT.summary(RELEASE, indexes[::-1])
    (top / "repodata/repomd.xml").write_bytes(summary)
    return summary


def parsed(top: Path) -> dict[str, dict[str, object]]:
    """All that createrepo_c's parser finds, by sha256."""
    import createrepo_c

    packages, warnings = createrepo_c.RepositoryReader.from_path(str(top)).parse_packages()
    assert not warnings
    own = ("location_href", "time_file", "copy", "nevra", "nvra")
    names = [n for n in dir(createrepo_c.Package) if not n.startswith("_") and n not in own]
    return {key: {name: getattr(package, name) for name in names} for key, package in packages.items()}


def several() -> list[Path]:
    return [
        rich(),
        rpm(),
        rpm(version="2.0"),
        rpm(source=True),
        rpm("émigré"[1:].replace("é", "e"), tags={"Summary": 'Ünïcödé <&> "quotes" 日本'}),
        rpm("empty", files={}),
        rpm("many", files={f"/opt/many/d{n}/f{n}": str(n) for n in range(40)}),
    ]


def test_metadata_are_those_that_createrepo_makes(tmp_path: Path) -> None:
    import createrepo_c

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in several():
        shutil.copy(path, theirs)
    tool = which("createrepo_c")
    assert tool, "this test needs createrepo_c: apt-get install createrepo-c"
    subprocess.run([tool, "--quiet", theirs], check=True)
    metadata(tmp_path / "ours", several())
    ours = parsed(tmp_path / "ours")
    assert len(ours) == len(several())
    assert ours == parsed(theirs)
    repomd = createrepo_c.Repomd(str(tmp_path / "ours/repodata/repomd.xml"))
    assert repomd.revision == "7"
    assert [record.type for record in repomd.records] == list(FORMAT.KINDS)
    for record in repomd.records:
        packed = (tmp_path / "ours" / record.location_href).read_bytes()
        plain = gzip.decompress(packed)
        assert (record.checksum_type, record.checksum) == ("sha256", hashlib.sha256(packed).hexdigest())
        assert record.checksum_open == hashlib.sha256(plain).hexdigest()
        assert (record.size, record.size_open) == (len(packed), len(plain))
        assert record.timestamp == int(RELEASE.date.timestamp())
        assert record.location_href == f"repodata/{record.checksum}-{record.type}.xml.gz"
        assert f'packages="{len(several())}"'.encode() in plain


def test_a_repository_without_packages(tmp_path: Path) -> None:
    metadata(tmp_path, ())
    assert parsed(tmp_path) == {}
    assert list(FORMAT.published(tmp_path)) == []


def test_sections() -> None:
    package = package_of(rpm())
    assert FORMAT.sections(package, ("x86_64",)) == FORMAT.all_sections((), ("x86_64",)) == ("",)
    other = Package("a", "1-1", "aarch64", "", 0, "a.rpm")
    assert FORMAT.sections(other, ("x86_64",)) == ()
    assert FORMAT.sections(other, ()) == FORMAT.sections(other, ("aarch64",)) == ("",)


def source_of(**given: Any) -> ClientSource:
    values: dict[str, Any] = {
        "repository": "base", "channel": "tested", "url": "https://r.example/base/channels/tested",
        "mirrors": None, "key": None, "armour": None, "components": (), "architectures": (), **given,
    }  # fmt: skip
    return ClientSource(**values)


def test_the_client_s_file() -> None:
    def stanza(**given: Any) -> dict[str, str]:
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(FORMAT.stanza(source_of(**given)))
        assert parser.sections() == ["base-tested"]
        return dict(parser["base-tested"])

    plain = stanza()
    assert plain["baseurl"] == "https://r.example/base/channels/tested"
    assert (plain["gpgcheck"], plain["repo_gpgcheck"]) == ("0", "0")
    assert "gpgkey" not in plain
    assert "mirrorlist" not in plain
    pinned = stanza(mirrors="https://r.example/m", key="https://r.example/base/key.asc", armour=b"k")
    assert pinned["mirrorlist"] == "https://r.example/m"
    assert "baseurl" not in pinned
    assert (pinned["repo_gpgcheck"], pinned["gpgkey"]) == ("1", "https://r.example/base/key.asc")
    assert FORMAT.stanza(source_of()).startswith("# /etc/yum.repos.d/base-tested.repo\n")


# -- two packages ----------------------------------------------------------------------------------


def test_what_two_packages_differ_in() -> None:
    def differing(**given: Any) -> tuple[str, ...]:
        return FORMAT.differing(rich(), rich(**given))

    assert differing() == ()
    assert differing(defines={"_binary_payload": "w3.zstdio"}) == ()  # only in how it is packed
    assert differing(defines={"_buildhost": "other.example"}) == ("build host",)
    assert differing(tags={"Summary": "other"}) == ("summary",)
    assert differing(tags={"Requires": "other"}) == ("requires",)
    changed = {**FILES, "/etc/rich.conf": "a=2\n"}
    assert differing(files=changed) == ("/etc/rich.conf",)
    more = {**FILES, "/usr/bin/more": "x"}
    assert differing(files=more) == ("/usr/bin/more",)
    one, other = rpm(source=True), rpm(source=True, tags={"License": "GPL"})
    assert "license" in FORMAT.differing(one, other)
    assert any(name.endswith("it.spec") for name in FORMAT.differing(one, other))


def test_signed_or_not_is_no_difference(tmp_path: Path, home: Home) -> None:
    home.key("third")
    path = tmp_path / rpm().name
    path.write_bytes(rpm().read_bytes())
    assert FORMAT.differing(rpm(), signed(path, home, "third")) == ()


def test_the_changelog() -> None:
    second, first = FORMAT.changelog(rich())
    assert (second.version, second.author) == ("3:2.5-1.fc40", "Zoë B <z@example.org>")
    assert second.when == datetime(2026, 11, 20, 12, tzinfo=UTC)
    assert second.lines == ("- second", "- of two lines")
    assert (first.version, first.lines) == ("3:2.4-1", ("- first",))
    assert FORMAT.changelog(rpm()) == ()


# -- repositories of others ------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gz", "xz", "zstd", "bz2"])
def test_the_packages_of_a_repository_that_createrepo_made(tmp_path: Path, compression: str) -> None:
    (tmp_path / "Packages").mkdir()
    for path in several():
        (tmp_path / "Packages" / path.name).write_bytes(path.read_bytes())
    program = "import sys, createrepo_c; sys.exit(createrepo_c.createrepo_c())"
    words = ["--quiet", "--general-compress-type", compression, str(tmp_path)]
    subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True)
    found = {f.file: f for f in FORMAT.published(tmp_path)}
    assert found.keys() == {f"Packages/{path.name}" for path in several()}
    for path in several():
        known = found[f"Packages/{path.name}"]
        assert Sum(known.sha256, known.size) == sum_of(path.read_bytes())
        assert known.component == ""


def test_no_repository_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is no rpm repository"):
        list(FORMAT.published(tmp_path))


@pytest.mark.parametrize(
    "href", ["../x.rpm", "/etc/x.rpm", "a/../../x.rpm", "", ".", "a/&#10;b.rpm", "a/&#x202e;b.rpm"]
)
def test_paths_that_lead_out_are_refused(tmp_path: Path, href: str) -> None:
    text = (
        read(rpm()).texts["primary"].replace(place(sum_of(rpm().read_bytes()).sha256, rpm().name), href)
    )
    before, after = FORMAT.frame("primary", 1)
    write_primary(tmp_path, before + text.encode() + after)
    with pytest.raises(Unfit, match="leads out of its repository") as told:
        list(FORMAT.published(tmp_path))
    assert str(told.value).isprintable()


def write_primary(top: Path, plain: bytes, **changes: str) -> None:
    """A repository of nothing else."""
    (top / "repodata").mkdir()
    packed = gzip.compress(plain)
    index = IndexFile("", "primary", sum_of(packed), sum_of(plain))
    name = FORMAT.lasting(RELEASE, index)
    (top / name).write_bytes(packed)
    summary = FORMAT.summary(RELEASE, [index]).decode()
    for old, new in changes.items():
        assert old in summary
        summary = summary.replace(old, new)
    (top / "repodata/repomd.xml").write_text(summary)


def test_metadata_that_lead_out_are_refused(tmp_path: Path) -> None:
    before, after = FORMAT.frame("primary", 0)
    write_primary(tmp_path, before + after)
    summary = tmp_path / "repodata/repomd.xml"
    text = summary.read_text()
    (tmp_path.parent / "outside.gz").write_bytes(b"secret")
    start = text.index('href="') + 6
    for href in ("../outside.gz", "/dev/zero", "repodata/../../outside.gz"):
        summary.write_text(text[:start] + href + text[text.index('"', start) :])
        with pytest.raises(Unfit, match="leads out of its repository"):
            list(FORMAT.published(tmp_path))
    link = tmp_path / "repodata" / "link.gz"
    link.symlink_to("../../outside.gz")
    summary.write_text(text[:start] + "repodata/link.gz" + text[text.index('"', start) :])
    with pytest.raises(Unfit, match="a link leads out of the repository"):
        list(FORMAT.published(tmp_path))
    os.mkfifo(tmp_path / "repodata" / "fifo.gz")  # nobody writes into it
    summary.write_text(text[:start] + "repodata/fifo.gz" + text[text.index('"', start) :])
    with pytest.raises(Unfit, match="isn't there"):
        list(FORMAT.published(tmp_path))
    based = text.replace("<location ", '<location xml:base="http://evil.example/" ')
    summary.write_text(based)
    with pytest.raises(Unfit, match="leads out of its repository"):
        list(FORMAT.published(tmp_path))


def test_damaged_metadata_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metadata(tmp_path, several()[:2])
    summary = tmp_path / "repodata/repomd.xml"
    whole = summary.read_bytes()
    (primary,) = (tmp_path / "repodata").glob("*-primary.xml.gz")
    packed = primary.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(Unfit, match=words) as told:
            list(FORMAT.published(tmp_path))
        assert str(told.value).isprintable()

    primary.write_bytes(packed[:-20])
    refused("is damaged: its sum")
    primary.unlink()
    refused("isn't there, though repodata/repomd.xml names it")
    primary.write_bytes(packed)
    for text in (
        b"",
        b"<repomd",
        whole[:200],
        b"\0" * 100,
        whole.replace(b'type="primary"', b'type="x"'),
    ):
        summary.write_bytes(text)
        refused(".")
    for coding in (b"utf-7", b"none-such", b"utf-16"):
        summary.write_bytes(whole.replace(b"UTF-8", coding))
        refused(".")
    summary.write_bytes(whole.replace(b'checksum type="sha256"', b'checksum type="crc32"'))
    refused("of a kind that isn't known")
    summary.write_bytes(whole)
    assert len(list(FORMAT.published(tmp_path))) == 2
    assert capfd.readouterr() == ("", "")
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["repodata"]'
