"""sbuild builds a deb, in a chroot of Debian's archive. It takes minutes, the archive and gigabytes of
memory, so it is for who asks: FARMHAND_SBUILD=1 ./invoke test --only tests/services/test_sbuild.py"""

from __future__ import annotations

import os
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from shlex import quote

import pytest

from host.paths import cache_dir
from provision.guest.debian import write_sources
from tests import debs
from tests.build_machine import USER, BuildMachine, Builds, contents, deb_source, index

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a builder a root of its own"),
    pytest.mark.skipif(not os.environ.get("FARMHAND_SBUILD"), reason="for who asks: FARMHAND_SBUILD=1"),
]
NEEDS = ("sbuild", "uidmap", "mmdebstrap")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Files that say where this machine gets Debian's packages."""
    return write_sources("bookworm", tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def archive(sources):
    """Of a chroot; made once and kept."""
    path = cache_dir() / "tests" / "sbuild" / "bookworm.tar"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.tar")
        variant = ["--variant=buildd", "--include=fakeroot"]
        subprocess.run(["mmdebstrap", *variant, "bookworm", part, *sources], check=True)
        part.rename(path)
    return path


@pytest.fixture(scope="module")
def machine(tmp_path_factory, archive, sources):
    told = "; ".join(f"printf %s {quote(file.read_text())} >it-{quote(file.name)}" for file in sources)
    with BuildMachine.running(tmp_path_factory.mktemp("builder")) as made:
        made.prints(
            "cd /etc/apt/sources.list.d; mv farmhand-stable.sources /; "
            f"{told}; export DEBIAN_FRONTEND=noninteractive; "
            f"(apt-get update; apt-get install -y --no-install-recommends {' '.join(NEEDS)}) >/log 2>&1"
            " || { tail -n 5 /log; exit 1; }; rm it-*; mv /farmhand-stable.sources .",
            timeout=600,
        )
        # its chroots don't see this machine's directories, but its loopback
        serve = partial(SimpleHTTPRequestHandler, directory=str(made.repo))
        with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            made.prints(
                f"sed -i 's|^URIs: .*|URIs: http://127.0.0.1:{server.server_port}|' "
                "/etc/apt/sources.list.d/farmhand-stable.sources"
            )
            yield made
            server.shutdown()


@pytest.fixture
def build(machine, tmp_path):
    return Builds(machine, tmp_path)


def test_sbuild_builds(machine, build, archive, tmp_path):
    done = build(tool="sbuild")
    assert done.failed.failure == "environment"
    assert "there is no /var/lib/farmhand/sbuild.tar in the VM" in str(done.failed)
    machine.prints(f"mkdir -p /var/lib/farmhand; ln -s {archive} /var/lib/farmhand/sbuild.tar")
    for version in ("1.0", "2.0"):
        (machine.repo / f"kata-dev_{version}.deb").write_bytes(
            debs.deb(debs.fields("kata-dev", version, "all"))
        )
    index(machine.repo)
    told = (
        "cat /proc/net/dev >out/net; id -un >out/user; umask >out/umask; ls $$DOWNLOADS >out/downloads;"
        "env | sort >out/env; pwd >out/pwd"
    )
    files = deb_source(wants="kata-dev, nonesuch <!stage1>", rules=told)
    done = build(files, tool="sbuild", outside=False)
    assert (str(done.failed), done.failed.failure) == (
        "can't install what it needs: nonesuch but it is not installable", "dependencies",
    ), done.log  # fmt: skip
    stage = {"profiles": frozenset({"stage1"}), "tool": "sbuild", "outside": False}
    one, other = (build(files, **stage) for _ in range(2))
    assert one.failed is None, one.log
    assert one.files["hello_1.0-1_all.deb"] == other.files["hello_1.0-1_all.deb"]
    out = contents(one.files["hello_1.0-1_all.deb"], tmp_path) / "usr/share/hello/out"
    said = {path.name: path.read_text().rstrip("\n") for path in out.iterdir()}
    assert [line.split()[0] for line in said["net"].splitlines()[2:]] == ["lo:"]
    assert said["pwd"] == one.built.builder.directory == "/build/hello-1.0-1/source"
    assert (said["user"], said["umask"]) == (USER, "0022")
    assert (
        one.built.builder.environment.items()
        <= dict(line.split("=", 1) for line in said["env"].splitlines()).items()
    )
    found = {each.name: each.version for each in one.installed[0]}
    assert found["kata-dev"] == "2.0"
    assert "dpkg-dev" in found
    done = build(files, install=("kata-dev=1.0",), **stage)
    assert done.failed is None, done.log
    assert {each.version for each in done.installed[0] if each.name == "kata-dev"} == {"1.0"}
    done = build(deb_source(rules="cp nonesuch out"), **stage)
    assert done.failed.failure == "source"
    assert str(done.failed) == "cp: cannot stat 'nonesuch': No such file or directory", done.log
    done = build(deb_source(rules="setsid -f sleep 1234; sleep 1234"), seconds=60, **stage)
    assert done.failed.failure == "time-out"
    assert machine.prints(f"ps -o args= -u {USER} || true") == ""
