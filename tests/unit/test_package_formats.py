"""Packages are built by their formats in a builder: dpkg-buildpackage and rpmbuild, apt and rpm, and the
kernel's own limits, all real."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from builds.packages.formats.rpm import spec_facts
from builds.step_run import StepLog
from inventory.packages import PackageSource
from provision.guest.connection import Connection
from tests import debs
from tests.build_machine import USER, WHEN, BuildMachine, Builds, contents, deb_source, index, packed
from tests.rpms import rpm

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a builder a root of its own"
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with BuildMachine.running(tmp_path_factory.mktemp("builder")) as made:
        yield made


@pytest.fixture
def build(machine, tmp_path):
    return Builds(machine, tmp_path)


LOOK = """
env | sort >out/env; umask >out/umask; id -un >out/user; pwd >out/directory
ls -l /proc/self/ns >/dev/null; cat /proc/net/dev >out/net; ls /proc | grep -c '^[0-9]' >out/processes
ls -A /tmp /run >out/tmp; hostname >out/host; ps -o sid= -p $$$$ >out/session
grep -E 'NoNewPrivs|CapBnd' /proc/self/status >out/rights
(echo x >/tmp/it && echo x >/dev/shm/it && cat /tmp/it) >out/writes
ls $$DOWNLOADS >out/downloads
"""


def test_a_deb_is_built_apart_from_the_vm(machine, build, tmp_path):
    (tmp_path / "extra.bin").write_text("extra\n")
    done = build(
        deb_source(rules=LOOK), downloads=(tmp_path / "extra.bin",),
        source=PackageSource(git="x", options=("noopt terse",)), profiles=frozenset({"nocheck"}),
        env={"BUILD_ID": "7"},
    )  # fmt: skip
    assert done.failed is None, done.log
    assert sorted(done.files) == [
        "hello_1.0-1_all.deb", "hello_1.0-1_amd64.buildinfo", "hello_1.0-1_amd64.changes",
    ]  # fmt: skip
    out = contents(done.files["hello_1.0-1_all.deb"], tmp_path) / "usr/share/hello/out"
    said = {path.name: path.read_text().rstrip("\n") for path in out.iterdir()}
    given = dict(line.split("=", 1) for line in said["env"].splitlines())
    builder = done.built.builder
    assert builder.environment.items() <= given.items()
    assert "SECRET" not in given
    assert (given["LANG"], given["TZ"], given["GIT_REVISION"]) == ("C.UTF-8", "UTC", "main")
    assert (given["BUILD_ID"], given["SOURCE_DATE_EPOCH"]) == ("7", str(WHEN))
    assert given["DEB_BUILD_OPTIONS"] == f"noopt terse nocheck parallel={builder.cpus}"
    assert given["DEB_BUILD_PROFILES"] == "nocheck"
    assert said["user"] == builder.user == USER
    assert said["directory"] == builder.directory == "/build/hello-1.0-1/source"
    assert (said["umask"], builder.umask) == ("0022", "0022")
    assert [line.split()[0] for line in said["net"].splitlines()[2:]] == ["lo:"]
    assert int(said["processes"]) < 12  # those of the build
    assert said["tmp"].split() == ["/run:", "lock", "/tmp:"]
    assert (said["host"], said["writes"], said["downloads"]) == ("localhost", "x", "extra.bin")
    assert said["rights"].split() == ["CapBnd:", "0" * 16, "NoNewPrivs:", "1"]
    assert (builder.vm, builder.cpus) == ("builder", os.cpu_count())
    assert builder.memory > 2**28
    assert builder.kernel.startswith("Linux ")
    assert "sse2" in builder.features or "asimd" in builder.features
    (installed,) = done.installed
    assert installed == done.built.installed
    assert {"dpkg-dev", "make"} <= {one.name for one in installed}
    assert all(one.version and one.architecture and not one.sha256 for one in installed)
    buildinfo = done.files["hello_1.0-1_amd64.buildinfo"].decode()
    assert "Build-Path: /build/hello-1.0-1/source\n" in buildinfo
    assert "getting" not in done.log
    assert machine.prints(f"getent passwd {USER}").split(":")[5:] == [
        f"/var/lib/{USER}", "/usr/sbin/nologin\n",
    ]  # fmt: skip


def test_two_builds_are_the_same_byte_for_byte(build):
    one = build(deb_source(rules="echo $$PWD $$HOME $$USER $$(umask) $$(hostname) >out/x"))
    other = build(deb_source(rules="echo $$PWD $$HOME $$USER $$(umask) $$(hostname) >out/x"))
    assert one.files["hello_1.0-1_all.deb"] == other.files["hello_1.0-1_all.deb"]


def test_what_is_left_running_ends_with_the_build(machine, build):
    done = build(deb_source(rules=(
        "setsid -f sleep 12345\n(trap '' TERM HUP; sleep 12345) & echo >out/x"
    )))  # fmt: skip
    assert done.failed is None, done.log
    assert machine.prints(f"ps -o args= -u {USER} || true") == ""


def test_a_build_ends_when_its_time_is_over(machine, build):
    done = build(deb_source(rules="trap '' TERM; setsid -f sleep 12345; sleep 12345"), seconds=4)
    assert done.failed.failure == "time-out"
    assert str(done.failed).startswith("not done within its limit of 4.0s: ended while")
    assert machine.prints(f"ps -o args= -u {USER} || true") == ""


LIMITS = [
    ("perl -e '$$x = q(x) x (300 * 2**20)'", PackageSource(git="x", memory=200 * 2**20),
     "used more than its memory of 200M"),
    ("dd if=/dev/zero of=large bs=1M count=9", PackageSource(git="x", disk=8 * 2**20),
     "made a file of more than 8M"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "source", "message"), LIMITS)
def test_what_is_over_a_limit_ends_cleanly(build, rules, source, message):
    done = build(deb_source(rules=rules), source=source)
    assert (done.failed.failure, str(done.failed)) == ("source", message), done.log
    assert done.failed.remedy


def test_processes_are_bounded(build):
    done = build(deb_source(rules=(
        "perl -e 'for (1..5000) { my $$p = fork(); defined $$p or die qq(cannot fork: $$!\\n); "
        "if (!$$p) { sleep 600; exit } }'"
    )))  # fmt: skip
    assert str(done.failed) == "had more than 4096 processes", done.log


def test_network_is_named_as_what_is_missing(build):
    rules = "perl -MIO::Socket::INET -e 'IO::Socket::INET->new(q(192.0.2.1:80)) or die $$!'"
    done = build(deb_source(rules=rules))
    assert done.failed.failure == "source"
    assert str(done.failed) == "Network is unreachable at -e line 1. (a build has no network)", done.log
    assert "downloads" in done.failed.remedy


FAILED = [
    ("gcc -c no.c -o out", "cc1: fatal error: no.c: No such file or directory", "source"),
    ("cp nonesuch out", "cp: cannot stat 'nonesuch': No such file or directory", "source"),
    ("false", "make: *** [debian/rules:7: out] Error 1", "source"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "message", "kind"), FAILED)
def test_a_failed_build_says_its_first_error(build, rules, message, kind):
    done = build(deb_source(rules=rules))
    assert (str(done.failed), done.failed.failure) == (message, kind), done.log


def test_build_dependencies_come_from_the_repository(machine, build):
    for name, version in (("kata-dev", "1.0"), ("kata-dev", "2.0"), ("kata-data", "1.0")):
        (machine.repo / f"{name}_{version}.deb").write_bytes(
            debs.deb(debs.fields(name, version, "all"), {f"usr/share/{name}/v": version.encode()})
        )
    index(machine.repo)
    machine.prints("apt-get update -q")
    rules = "cp /usr/share/kata-dev/v out"
    done = build(deb_source(rules=rules, wants="kata-dev, nonesuch <!stage1>"), outside=False)
    assert done.failed.failure == "dependencies"
    assert str(done.failed) == ("can't install what it needs: nonesuch but it is not installable"), (
        done.log
    )
    assert not done.installed
    done = build(
        deb_source(rules=rules, wants="kata-dev, nonesuch <!stage1>"),
        outside=False,
        profiles=frozenset({"stage1"}),
        install=("kata-dev=1.0", "dpkg-dev=0"),
    )
    assert str(done.failed) == (
        "can't install what it needs: Version '0' for 'dpkg-dev' was not found"
    ), done.log
    for install, version in ((None, "2.0"), (("kata-dev=1.0",), "1.0")):
        done = build(
            deb_source(rules=rules, wants="kata-dev, nonesuch <!stage1>"),
            outside=False,
            profiles=frozenset({"stage1"}),
            install=install,
        )
        assert done.failed is None, done.log
        (dev,) = (one for one in done.installed[0] if one.name == "kata-dev")
        data = (machine.repo / f"kata-dev_{version}.deb").read_bytes()
        assert (dev.version, dev.listed) == (version, hashlib.sha256(data).hexdigest())


def test_lists_that_are_too_old_are_read_anew(machine, build):
    for name in ("kata-new", "kata-gone"):
        made = debs.deb(debs.fields(name, "1.0", "all"), {f"usr/share/{name}": b"x"})
        (machine.repo / f"{name}_1.0.deb").write_bytes(made)
    index(machine.repo)
    machine.prints("rm -rf /var/lib/apt/lists/*")
    (machine.repo / "kata-gone_1.0.deb").unlink()
    done = build(deb_source(wants="kata-new"))
    assert done.failed is None, done.log
    assert "kata-new" in {one.name for one in done.installed[0]}
    done = build(deb_source(wants="kata-gone"))
    assert done.failed.failure == "infrastructure"
    assert str(done.failed).startswith("what it needs can't be fetched: Failed to fetch"), done.log


def test_nothing_to_install_needs_no_apt(machine, build):
    machine.prints("mv /usr/bin/apt-get /usr/bin/apt-away")
    try:
        done = build(deb_source(rules=": >out/x", wants="dpkg-dev, make | nonesuch"))
    finally:
        machine.prints("mv /usr/bin/apt-away /usr/bin/apt-get")
    assert done.failed is None, done.log


def test_a_tool_that_is_missing_is_named_with_its_package(machine, build):
    machine.prints("mv /usr/bin/fakeroot /usr/bin/fakeroot-away")
    try:
        done = build()
    finally:
        machine.prints("mv /usr/bin/fakeroot-away /usr/bin/fakeroot")
    assert (str(done.failed), done.failed.failure) == ("there is no fakeroot in the VM", "environment")
    assert "'packages: [fakeroot]'" in done.failed.remedy


def test_a_debian_source_package_is_built(build, tmp_path):
    tree = tmp_path / "hello-1.0"
    files = deb_source(version="1.0", rules="cp debian/changelog out")
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    (tree / "debian/rules").chmod(0o755)
    subprocess.run(["dpkg-source", "-b", tree], cwd=tmp_path, check=True, capture_output=True)
    made = (tmp_path / "hello_1.0.dsc", tmp_path / "hello_1.0.tar.xz")
    changed = files["debian/changelog"].replace("(1.0)", "(1.0+1)")
    done = build(
        version="1:1.0+1",
        source=PackageSource(dsc=made[0]),
        state={"files": made, "changes": {"debian/changelog": changed.encode()}},
        tar=packed(tmp_path / "it.tar", {path.name: path.read_bytes() for path in made}),
    )
    assert done.failed is None, done.log
    assert "hello_1.0+1_all.deb" in done.files
    assert done.built.builder.directory == "/build/hello-1_1.0+1/source"
    out = contents(done.files["hello_1.0+1_all.deb"], tmp_path) / "usr/share/hello/out"
    assert (out / "changelog").read_text() == changed
    made[1].write_bytes(b"x")
    done = build(
        version="1.0",
        source=PackageSource(dsc=made[0]),
        tar=packed(tmp_path / "it.tar", {path.name: path.read_bytes() for path in made}),
    )
    assert done.failed.failure == "source"
    assert "the source can't be unpacked: dpkg-source: error: " in str(done.failed)


SPEC = """
Name: kata
Version: 1.0
Release: 1
Summary: Kata
License: MIT
Source0: https://example.org/%{name}-%{version}.tar.gz
MORE
%description
Kata.
%prep
%setup -q
%build
COMMANDS
%install
mkdir -p %{buildroot}/usr/share/kata
cp -r out/* %{buildroot}/usr/share/kata/
%files
/usr/share/kata
"""


def spec(commands="mkdir out; cp greeting out", more="BuildArch: noarch", **files):
    text = SPEC.replace("COMMANDS", commands).replace("MORE", more)
    return {"kata.spec": text, "greeting": "hello\n", **files}


def queried(data: bytes, at: Path, form: str) -> str:
    (at / "it.rpm").write_bytes(data)
    done = subprocess.run(
        ["rpm", "-qp", "--qf", form, at / "it.rpm"], check=True, capture_output=True, text=True
    )
    return done.stdout


def test_an_rpm_is_built_apart_and_the_same_each_time(build, tmp_path):
    told = "[[ -n $BASH ]]\nenv | grep -v BUILD_ROOT | sort >out/env; id -un >out/user; umask >out/umask"
    commands = f"mkdir out\n{told}; pwd >out/directory\ncp greeting out\ntouch out/greeting"
    one, other = (build(spec(commands), name="kata") for _ in range(2))
    assert one.failed is None, one.log
    assert list(one.files) == ["kata-1.0-1.noarch.rpm"]
    data = one.files["kata-1.0-1.noarch.rpm"]
    assert data == other.files["kata-1.0-1.noarch.rpm"]
    assert queried(data, tmp_path, "%{BUILDTIME} %{BUILDHOST}") == f"{WHEN} localhost"
    unpacked = subprocess.run(["rpm2cpio", tmp_path / "it.rpm"], check=True, capture_output=True)
    subprocess.run(["cpio", "-id", "--quiet"], cwd=tmp_path, input=unpacked.stdout, check=True)
    said = {path.name: path.read_text().strip() for path in (tmp_path / "usr/share/kata").iterdir()}
    assert (said["user"], said["umask"], said["greeting"]) == (USER, "0022", "hello")
    assert said["directory"] == "/build/kata-1.0-1/rpmbuild/BUILD/kata-1.0"
    assert "SECRET" not in said["env"]
    assert {"rpm", "make"} <= {each.name for each in one.installed[0]}


def test_what_a_spec_file_says_is_what_rpm_makes_of_it(machine, tmp_path, build):
    more = """BuildArch: noarch
%bcond_without tests
%global want kata-dev
BuildRequires: %{want} >= 1.0, (a or b)
%if %{with tests}
BuildRequires: nonesuch
%endif
BuildConflicts: evil
Provides: virtual = 3
Source1: %(id -un).conf
%package doc
Summary: Doc
%description doc
Doc.
%files doc"""
    done = build(
        spec(more=more), name="kata", source=PackageSource(git="x", options=("--without=tests",))
    )
    assert done.failed.failure == "dependencies"

    async def ask():
        log = StepLog(tmp_path / "log", "builder", None)
        async with await Connection.open(machine.endpoint()) as connection:
            return await spec_facts(connection, done.order, log)

    facts = asyncio.run(ask())
    assert facts.build_requires == ("(a or b)", "kata-dev >= 1.0")
    assert facts.build_conflicts == ("evil",)
    assert facts.packages == ("kata", "kata-doc")
    assert facts.provides == ("kata = 1.0-1", "virtual = 3", "kata-doc = 1.0-1")
    assert set(facts.sources) == {"kata-1.0.tar.gz", f"{USER}.conf"}


@pytest.fixture(params=["dnf", "rpm"])
def tool(request, machine):
    if request.param == "rpm":
        machine.prints("mv /usr/bin/dnf /usr/bin/dnf-away")
    machine.prints("rm -rf ~/.rpmdb")
    yield request.param
    if request.param == "rpm":
        machine.prints("mv /usr/bin/dnf-away /usr/bin/dnf")


def test_build_requires_come_from_the_repository(machine, build, tool):
    for one in (
        rpm("kata-kit", "1.0", tags={"Requires": "kata-lore"}),
        rpm("kata-kit", "2.0", tags={"Requires": "kata-lore"}),
        rpm("kata-lore", "1.0"),
    ):
        shutil.copy(one, machine.rpms)
    subprocess.run(["createrepo_c", "-q", machine.rpms], check=True)
    wants = "BuildArch: noarch\nBuildRequires: kata-kit >= 1.0, kata-lore"
    commands = "mkdir out; cp /usr/share/kata-kit/version out"
    done = build(spec(commands, f"{wants}, nonesuch >= 3"), name="kata", outside=False)
    assert (str(done.failed), done.failed.failure) == (
        "can't install what it needs: nothing provides nonesuch >= 3", "dependencies",
    ), done.log  # fmt: skip
    for install, version in ((("kata-kit=1.0-1", "kata-lore=1.0-1"), "1.0-1"), (None, "2.0-1")):
        machine.prints("rm -rf ~/.rpmdb /usr/share/kata-kit")
        done = build(spec(commands, wants), name="kata", outside=False, install=install)
        assert done.failed is None, done.log
        assert [o.version for o in done.installed[0] if o.name == "kata-kit"] == [version]
        assert "farmhand-wanted" not in {o.name for o in done.installed[0]}
    done = build(spec(commands, wants), name="kata", install=("kata-kit=7-1",))
    assert done.failed.failure == "dependencies"
    assert "kata-kit" in str(done.failed)


SPECS = [
    (spec("false"), "error: Bad exit status from", "source"),
    (spec("true"), "cp: cannot stat 'out/*': No such file or directory", "source"),
    (spec(more="Nonesuch: 1"), "error: line 8: Unknown tag: Nonesuch: 1", "source"),
    (spec(more="Source1: other.conf"),
     "error: other.conf is not beside the spec file, and not under 'downloads'", "source"),
    ({**spec(), "kata.spec": spec()["kata.spec"].replace("%files", ": >%{buildroot}/x\n%files")},
     "error: Installed (but unpackaged) file(s) found: /x", "source"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message", "kind"), SPECS)
def test_a_failed_rpm_says_its_first_error(build, files, message, kind):
    done = build(files, name="kata")
    assert done.failed.failure == kind
    assert str(done.failed).startswith(message), done.log


def test_a_source_rpm_is_built(build, tmp_path):
    source = rpm("hello", "1.0", source=True)
    done = build(
        name="hello",
        source=PackageSource(srpm=source),
        state={"files": (source,)},
        tar=packed(tmp_path / "it.tar", {source.name: source.read_bytes()}, top="files"),
    )
    assert done.failed is None, done.log
    assert list(done.files) == ["hello-1.0-1.noarch.rpm"]
