"""A cycle's cache for packages: a real apt-cacher-ng, reached through ssh; what came by it is told."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cycle_farm import Lab, lab, plan_cycle, reset, run, run_cycle
from sshd_machine import free_port, wait_for

from builds.package_cache import PROGRAM, PackageCache
from host.ports import listener
from host.processes import pids
from host.run import which
from inventory.errors import BuildFailed, DriverFailed, InventoryError
from inventory.loader import load
from provision.site import Site
from tests.rpms import rpm
from tests.unit.cli_farm import ROOT

__all__ = ["lab"]
# curl is what apt-get is here: it asks a proxy as apt does.
GET = 'curl -sS --fail --noproxy "" -x "$http_proxy" -o got {}; cat got'


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    for place in ("debian/pool", "secret"):
        (tmp_path / "www" / place).mkdir(parents=True)
    (tmp_path / "www/debian/pool/tool_1.2-3_all.deb").write_text("a package\n")
    (tmp_path / "www/secret/file").write_text("not for guests\n")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", free_port()), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def site_of(lab: Lab, mirror: ThreadingHTTPServer, *scripts: str) -> Site:
    farm = load_with(lab, [f"{base(mirror)}/debian/"], *scripts)
    return Site(load(farm), reporter=lab.told)


def base(mirror: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{mirror.server_address[1]}"


def load_with(lab: Lab, cache: list[str], *scripts: str) -> Path:
    steps = [reset("dev2"), *(run(f"get-{n}", script) for n, script in enumerate(scripts))]
    file = lab.farm_file(steps)
    farm = json.loads(file.read_text())
    farm["cycle"]["package_cache"] = cache
    file.write_text(json.dumps(farm))
    return file


def test_what_came_through_it_is_in_the_record_and_comes_without_the_mirror(
    lab: Lab, mirror: ThreadingHTTPServer
) -> None:
    assert which(PROGRAM), "packages-dev.txt names it"
    url = f"{base(mirror)}/debian/pool/tool_1.2-3_all.deb"
    with site_of(lab, mirror, GET.format(url), "true") as site:
        assert any("packages through a cache" in str(line) for line in plan_cycle(site))
        record = run_cycle(site)
        mirror.shutdown()
        mirror.server_close()
        again = run_cycle(site)
    for build in (record, again):
        (package,) = (file for file in build.inputs if file.name.endswith(".deb"))
        assert (package.name, package.path, package.size) == ("tool_1.2-3_all.deb", url, 10)
        assert package.sha256 == hashlib.sha256(b"a package\n").hexdigest()
    assert not proxies(lab), "it ends with the build"


def proxies(lab: Lab) -> list[int]:
    home = str(lab.root / "state").encode()
    found = []
    for pid in pids():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if PROGRAM.encode() in words and home in words:
            found.append(pid)
    return found


def test_nothing_else_is_reached_by_it(lab: Lab, mirror: ThreadingHTTPServer) -> None:
    for path in ("secret/file", "debian/../secret/file", "debian/%2e%2e/secret/file"):
        script = GET.replace("curl", "curl --path-as-is").format(f"{base(mirror)}/{path}")
        with site_of(lab, mirror, script) as site, pytest.raises(BuildFailed) as failed:
            run_cycle(site)
        assert "not for guests" not in failed.value.detail
    assert not proxies(lab)


def test_one_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builds.package_cache._PATIENCE", 2.0)  # it goes on without its port
    monkeypatch.setattr("builds.package_cache._PORTS", range(40000, 50000))  # which it can't take
    with pytest.raises(DriverFailed, match="does not start: Error resolving"):
        PackageCache(tmp_path / "cache", ["http://127.0.0.1:1/x"], print).__enter__()


@pytest.mark.parametrize(
    "url", ["ftp://mirror.example.org/x", "http://a/b c", "http://a/x;y", "file:///"]
)
def test_what_is_no_repository_is_refused(lab: Lab, url: str) -> None:
    with pytest.raises(InventoryError, match=r"neither an http\(s\) URL nor 'host'"):
        load(load_with(lab, [url], "true"))


def test_it_ends_also_where_farmhand_is_killed(tmp_path: Path) -> None:
    text = (
        "import sys, time\nfrom pathlib import Path\nfrom builds.package_cache import PackageCache\n"
        "with PackageCache(Path(sys.argv[1]), ['http://mirror.example.org/x'], print) as cache:\n"
        "    print(cache.port, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", text, tmp_path / "cache"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        port = int(child.stdout.readline())
        assert listener(port)
        child.kill()
    wait_for(lambda: not listener(port))


DNF = """
export no_proxy=  # the mirror of this test is on the loopback
dnf() {
    command dnf -q -y --installroot "$HOME/root" --releasever 1 --setopt=reposdir=/nonexistent \\
        --setopt=cachedir="$HOME/cache" --setopt=keepcache=1 --repofrompath=tools,%s --nogpgcheck "$@"
}
dnf install --downloadonly tool
find "$HOME/cache" -name '*.rpm'
"""


def test_dnf_goes_through_it(lab: Lab, mirror: ThreadingHTTPServer, tmp_path: Path) -> None:
    """A real dnf, and one that begins anew; later packages are seen, and it goes on without the
    mirror."""
    home = tmp_path / "www/fedora/os"
    home.mkdir(parents=True)

    def publish(version: str) -> bytes:
        package = rpm("tool", version)
        shutil.copy(package, home)
        subprocess.run(["createrepo_c", "-q", home], check=True)
        return package.read_bytes()

    first = publish("1")
    url = f"{base(mirror)}/fedora/os"
    file = load_with(lab, [f"{base(mirror)}/fedora/"], DNF % url)
    with Site(load(file), reporter=lab.told) as site:
        records = [run_cycle(site)]
        second = publish("2")
        records.append(run_cycle(site))
        mirror.shutdown()
        mirror.server_close()
        records.append(run_cycle(site))
    assert [any("from the cache alone" in note for note in one.notes) for one in records] == [
        False, False, True,
    ]  # fmt: skip
    for record, content in zip(records, (first, second, second), strict=True):
        (package,) = (one for one in record.inputs if one.name.endswith(".rpm"))
        assert package.sha256 == hashlib.sha256(content).hexdigest()
        assert package.path == f"{url}/{package.name}"
