"""Packages are built by their formats in a builder: dpkg-buildpackage and rpmbuild, apt and rpm, and the
kernel's own limits, all real."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from builds.packages.formats import build_format
from builds.packages.order import BuildOrder
from builds.packages.source import SourceState
from builds.step_run import StepFailed, StepLog
from inventory.packages import PackageBuilds, PackageSource
from provision.guest.connection import Connection
from tests import debs
from tests.build_machine import BuildMachine, deb_source, index, packed
from tests.unit.sshd_machine import make_key

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a builder a root of its own"
)
WHEN = 1793534400
USER = "farmhand-test"


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    top = tmp_path_factory.mktemp("builder")
    make_key(top / "key")
    root = top / "machine"
    root.mkdir()
    made = BuildMachine("builder", root, top / "key").prepare()
    made.start()
    yield made
    made.stop()


class Built:
    """What a build came to. ``files``: their bytes by name."""

    def __init__(self, machine, order, at):
        self.order, self.at = order, at
        self.installed = []
        self.failed = None
        self.built = None
        self.files = {}
        log = StepLog(at / "log", "builder", None)
        asyncio.run(self._go(machine, log))
        log.close()
        self.log = (at / "log").read_text(errors="replace")

    async def _go(self, machine, log):
        async def before(installed):
            self.installed.append(installed)

        async with await Connection.open(machine.endpoint()) as connection:
            try:
                form = build_format(self.order.state.format)
                self.built = await form.build(connection, self.order, log, before)
            except StepFailed as error:
                self.failed = error
                return
            for file in self.built.files:
                await connection.get(file, self.at / "got")
                self.files[file.name] = (self.at / "got" / file.name).read_bytes()


@pytest.fixture
def build(machine, tmp_path):
    count = 0

    def go(files=None, *, form="deb", name="hello", version="1.0-1", source=None, state=None, **more):
        nonlocal count
        count += 1
        at = tmp_path / f"b{count}"
        at.mkdir()
        declared = source or PackageSource(git="x")
        found = SourceState(
            name=name, format=form, declared=declared, place="x", tree="0" * 40, stated=version,
            given=version, when=WHEN, **(state or {}),
        )  # fmt: skip
        tar = more.pop("tar", None) or packed(at / "source.tar", files or deb_source(), when=WHEN)
        settings = PackageBuilds(builders=("builder",), repository="stable", user=USER)
        environment = {"SOURCE_DATE_EPOCH": str(WHEN), "GIT_REVISION": "main", **more.pop("env", {})}
        order = BuildOrder(
            name=name, state=found, source=tar, settings=settings, environment=environment,
            repository="farmhand-stable", **more,
        )  # fmt: skip
        return Built(machine, order, at)

    return go


def inside(machine, script):
    """What a script prints in the builder."""

    async def go():
        async with await Connection.open(machine.endpoint()) as connection:
            return await connection.output(script)

    return asyncio.run(go())


LOOK = """
env | sort >out/env; umask >out/umask; id -un >out/user; pwd >out/directory
ls -l /proc/self/ns >/dev/null; cat /proc/net/dev >out/net; ls /proc | grep -c '^[0-9]' >out/processes
ls -A /tmp /run >out/tmp; hostname >out/host; ps -o sid= -p $$$$ >out/session
grep -E 'NoNewPrivs|CapBnd' /proc/self/status >out/rights
(echo x >/tmp/it && echo x >/dev/shm/it && cat /tmp/it) >out/writes
ls $$DOWNLOADS >out/downloads
"""


def contents(data: bytes, at: Path) -> Path:
    """Where a .deb's files are unpacked to."""
    (at / "it.deb").write_bytes(data)
    subprocess.run(["dpkg-deb", "-x", at / "it.deb", at / "unpacked"], check=True)
    return at / "unpacked"


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
    assert inside(machine, f"getent passwd {USER}").split(":")[5:] == [
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
    assert inside(machine, f"ps -o args= -u {USER} || true") == ""


def test_a_build_ends_when_its_time_is_over(machine, build):
    done = build(deb_source(rules="trap '' TERM; setsid -f sleep 12345; sleep 12345"), seconds=4)
    assert done.failed.failure == "time-out"
    assert str(done.failed).startswith("not done within its limit of 4.0s: ended while")
    assert inside(machine, f"ps -o args= -u {USER} || true") == ""


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
    inside(machine, "apt-get update -q")
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
        assert [o.version for o in done.installed[0] if o.name == "kata-dev"] == [version]


def test_nothing_to_install_needs_no_apt(machine, build):
    inside(machine, "mv /usr/bin/apt-get /usr/bin/apt-away")
    try:
        done = build(deb_source(rules=": >out/x", wants="dpkg-dev, make | nonesuch"))
    finally:
        inside(machine, "mv /usr/bin/apt-away /usr/bin/apt-get")
    assert done.failed is None, done.log


def test_a_tool_that_is_missing_is_named_with_its_package(machine, build):
    inside(machine, "mv /usr/bin/fakeroot /usr/bin/fakeroot-away")
    try:
        done = build()
    finally:
        inside(machine, "mv /usr/bin/fakeroot-away /usr/bin/fakeroot")
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
