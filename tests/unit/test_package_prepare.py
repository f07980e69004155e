"""What is in the way of builds is told before the first builder is reset: all of it, and what to do."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from package_farm import (
    BUILDER,
    PackageFarm,
    changelog,
    commit,
    control,
    deb_files,
    farm,  # noqa: F401 - a fixture
    repository,
    rpm_files,
)

from builds.packages import prepare
from builds.packages.downloads import fetched, place_of
from builds.packages.graph import Graph
from builds.packages.inputs import BuildInputs
from builds.packages.planning import graph_of_sources, plan_of
from builds.packages.prepare import PackagesNotReady, check_all, outside_of, problems_of
from builds.packages.record import PackageOrigin, PackageRecord, PackageRecords
from builds.packages.sources import PackageSources, SourceProblem, read_sources
from builds.record import FileRecord
from host.run import Runner
from inventory.errors import FarmhandError, Unfit, WrongState, calls_in, spelled
from inventory.packages import Download
from provision.engine import registry
from provision.engine.runner import perform
from provision.site import Site
from tests.debs import deb, fields
from tests.unit.test_signing import Admin

# ruff: noqa: F811 - the fixture's name


def looked(site: Site) -> tuple[PackageSources, Graph]:
    sources = read_sources(site)
    return sources, graph_of_sources(sources, outside_of(site))


def problems(farm: PackageFarm) -> dict[str, str]:
    """By what they are, what to do."""
    with farm.site(plan=True) as site:
        found = problems_of(site, *looked(site))
    lines = farm.file.read_text().splitlines()
    for problem in found:
        assert problem.remedy, problem
        file, line, column = problem.where.rsplit(":", 2)
        assert file == str(farm.file)
        at = lines[int(line) - 1][int(column) - 1 :]
        assert at.strip()
        if problem.package and problem.package not in lines[int(line) - 1]:
            assert at.startswith(f"'{farm.all}'"), problem
    return {f"{problem.package}: {problem.what}": spelled(problem.remedy) for problem in found}


def only(farm: PackageFarm) -> str:
    ((what, remedy),) = problems(farm).items()
    return f"{what} -- {remedy}"


def passed(farm: PackageFarm, package: str, version: str, tree: str, *files: FileRecord) -> str:
    """A good build of it. Returns its id."""
    with farm.site() as site:
        number, directory = PackageRecords(site.paths).begin(package)
        record = PackageRecord(
            package=package, name=package, number=number, farm="packs", run="r", result="passed",
            started="2026-11-01T10:00:00.000+00:00", directory=directory, outputs=files,
            inputs=BuildInputs(format="deb", tree=tree, version=version, recipe="", template="",
                               architecture="amd64"),
            source=PackageOrigin(place="/src", tree=tree, stated=version, when=0, commit="c0ffee" * 6,
                                 subject="As it was"),
        )  # fmt: skip
        record.save()
        return record.id


def publish(farm: PackageFarm, *packages: bytes) -> None:
    with farm.site() as site:
        paths = []
        for number, data in enumerate(packages):
            paths.append(farm.directory / f"p{number}_1.0-1_amd64.deb")
            paths[-1].write_bytes(data)
        perform(site, registry.operation("repo-add")(repo="stable", channel="experimental", paths=paths))


def test_a_farm_that_is_ready_has_none(farm: PackageFarm) -> None:
    repository(farm.all / "hello", deb_files())
    farm.declare("")
    assert problems(farm) == {}
    with farm.site(plan=True) as site:
        check_all(site, *looked(site))


def test_all_is_told_at_once(farm: PackageFarm) -> None:
    hello = repository(farm.all / "hello", {**deb_files(), "debian/control": control(depends="one")})
    repository(farm.all / "twice", {**deb_files("twice"), "debian/control": control("twice").replace(
        "Package: twice", "Package: hello")})  # fmt: skip
    repository(farm.all / "bad", {**deb_files("bad"), **rpm_files("bad")})
    repository(farm.all / "tool", rpm_files())
    build = passed(farm, "hello", "1.0-1", "b" * 40)
    farm.declare(
        f"fetching: {{git: {hello}, downloads: [{{url: 'http://127.0.0.1:9/x', sha256: {'0' * 64}}}]}}",
        ", outside: no",
        builders="builder, away",
        vms=f"{BUILDER}, away: {{host: none, memory: 64M, template: base}}",
        more=f", signing: [{{fingerprint: {'A' * 40}, home: {farm.directory}}}]",
    )
    found = problems(farm)
    for what, remedy in {
        "bad: ": "keep one of them",
        ": source package hello is there twice": "have one of them make it",
        ": hello is made by hello and twice": "have one of them make it",
        ": one is missing, for hello (Build-Depends)": "add the package",
        ": debhelper-compat (= 13) is missing": "add the package",
        ": repository stable takes deb, and tool is rpm": "a farm of their own",
        ": away is on a fake host, where nothing can be run": "builds packages",
        f"hello: version 1.0-1 is that of build {build}, from other contents: commit c0ffeec0ff (As it "
        "was)": "dch --increment",
        ": repository stable: ": "",
        "fetching: http://127.0.0.1:9/x can't be fetched": "curl --head",
    }.items():
        (whole,) = [each for each in found if each.startswith(what)] or [sorted(found)]
        assert whole in found, what
        assert remedy in found.pop(whole)
    assert found == {}
    with farm.site(plan=True) as site, pytest.raises(PackagesNotReady) as caught:
        check_all(site, *looked(site))
    lines = caught.value.message.splitlines()
    assert lines[0].endswith("10 problems keep the packages from being built")
    assert len(lines) == 11
    assert len(caught.value.as_dict()["problems"]) == 10
    assert "dch --increment" in spelled(caught.value.remedy)


def test_one_problem_is_one_line() -> None:
    error = PackagesNotReady(
        "packs", [SourceProblem("hello", "it is gone", "farm.yaml:3:4", "bring it back")]
    )
    assert (error.message, error.remedy) == ("farm.yaml:3:4: hello: it is gone", "bring it back")


# ---- Versions.


def test_a_version_is_free_or_refused(farm: PackageFarm) -> None:
    where = repository(farm.all / "hello", deb_files())
    farm.declare("")
    tree = farm.read().states["hello"].tree
    passed(farm, "hello", "1.0-1", tree)
    assert problems(farm) == {}
    commit(where, "Two", {"hello.c": "other\n"})
    assert "hello: version 1.0-1 is that of build hello/1, from other contents" in only(farm)
    commit(where, "Three", {"debian/changelog": changelog(version="1.0-2")})
    assert problems(farm) == {}
    commit(where, "Four", {"debian/changelog": changelog(version="1.0-1")})
    farm.declare("", ", versions: commits")
    assert problems(farm) == {}


def test_what_the_channel_has_from_elsewhere_is_refused_by_name(farm: PackageFarm) -> None:
    repository(farm.all / "hello", deb_files())
    farm.declare("")
    data = deb(fields("libhello", "1.0-1", more="Source: hello\n"))
    publish(farm, data, deb(fields("other", "1.0-1")))
    said = only(farm)
    assert "hello: version 1.0-1 is in stable's experimental already" in said
    assert "libhello 1.0-1 amd64" in said
    file = FileRecord(name="libhello_1.0-1_amd64.deb", size=len(data),
                      sha256=hashlib.sha256(data).hexdigest())  # fmt: skip
    passed(farm, "hello", "1.0-1", farm.read().states["hello"].tree, file)
    assert problems(farm) == {}


# ---- The graph.


def test_without_anything_from_outside_the_repository_has_it_or_nobody(farm: PackageFarm) -> None:
    depends = "debhelper-compat (= 13), virtual, lib-dev (>= 2)"
    repository(farm.all / "hello", {**deb_files(), "debian/control": control(depends=depends)})
    farm.declare("", ", outside: no")
    provides = "Provides: debhelper-compat (= 12),\n debhelper-compat (= 13)\n"
    publish(
        farm,
        deb(fields("debhelper", "13.1", more=provides)),
        deb(fields("lib-dev", "2.1", more="Provides: virtual\n")),
    )
    assert problems(farm) == {}
    commit(farm.all / "hello", "Two", {"debian/control": control(depends=f"{depends}, lib-dev (>= 3)")})
    assert problems(farm) == {}, "nobody knows what is installed in the builders"
    passed(farm, "other", "1.0-1", "b" * 40)
    assert "lib-dev (>= 3) is missing, for hello" in only(farm)


def test_what_rpm_packages_want_from_outside_only_rpm_can_tell(farm: PackageFarm) -> None:
    farm.declare("", ", outside: no", format="rpm")
    with farm.site(plan=True) as site:
        assert outside_of(site) is None


# ---- Builders, keys, room.


@pytest.mark.parametrize(
    ("vms", "said"),
    [
        ("builder: {host: none, memory: 64M, template: base}", "where nothing can be run"),
        ("builder: {host: here, address: 127.0.0.1}", "has no reset command"),
    ],
)
def test_builders_that_can_not_build(farm: PackageFarm, vms: str, said: str) -> None:
    repository(farm.all / "hello", deb_files())
    farm.declare("", vms=vms)
    assert said in only(farm)


def test_builders_that_are_not_made_are_one_problem(farm: PackageFarm) -> None:
    repository(farm.all / "hello", deb_files())
    like = "{host: kvm, memory: 64M, template: base}"
    farm.declare("", builders="one, two", vms=f"one: {like}, two: {like}")
    assert only(farm) == ": one, two are not made yet -- make what is missing: clone-farm"


@pytest.fixture(scope="module")
def admin() -> Iterator[Admin]:
    with tempfile.TemporaryDirectory(prefix="fh") as place:
        made = Admin(Path(place, "home"))
        yield made
        made.close()


def test_a_key_that_expired_is_told_before_anything_is_built(farm: PackageFarm, admin: Admin) -> None:
    repository(farm.all / "hello", deb_files())
    good = admin.make("good")
    old = admin.make("old", until="2d", at="20200101T000000")
    farm.declare("", more=f", signing: [{{fingerprint: {good}, home: {admin.home}}}]")
    assert problems(farm) == {}
    farm.declare("", more=f", signing: [{{fingerprint: {old}, home: {admin.home}}}]")
    said = only(farm)
    assert "expired on" in said
    assert "gpg --quick-set-expire" in said


def test_what_would_not_fit_is_not_begun(farm: PackageFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(farm.all / "hello", deb_files())
    farm.declare("")
    last = passed(farm, "hello", "0.9-1", "b" * 40, FileRecord(name="x.deb", size=2**60, sha256=""))
    assert last == "hello/1"
    said = only(farm)
    assert "no room for about 2147483648.0G of packages" in said
    # what did not change is not built
    passed(farm, "hello", "1.0-1", farm.read().states["hello"].tree,
           FileRecord(name="x.deb", size=2**60, sha256=""))  # fmt: skip
    assert problems(farm) == {}
    monkeypatch.setattr(prepare, "SPARE", 2**62)
    assert problems(farm) == {}


# ---- Downloads.


class _Server(ThreadingHTTPServer):
    """``files``: by their paths. ``asked``: method and path of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        data = self.server.files.get(self.path.partition("?")[0])
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data or b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("FARMHAND_CACHE_DIR", str(tmp_path / "cache"))
    found = _Server()
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def _download(server: _Server, name: str, data: bytes) -> Download:
    return Download(url=f"{server.url}/{name}", sha256=hashlib.sha256(data).hexdigest())


def test_a_download_is_fetched_once_and_checked(server: _Server) -> None:
    server.files["/a.tar"] = b"data"
    one = _download(server, "a.tar?token=secret", b"data")
    path = fetched(Runner(), one)
    assert (path, path.read_bytes()) == (place_of(one), b"data")
    assert fetched(Runner(), one) == path
    assert server.asked == ["GET /a.tar?token=secret"]
    server.files["/empty"] = b""
    empty = fetched(Runner(), _download(server, "empty", b""))
    assert (empty.read_bytes(), empty.stat().st_mode & 0o777) == (b"", 0o644)
    path.write_bytes(b"damaged")
    assert fetched(Runner(), one).read_bytes() == b"data"
    server.files["/a.tar"] = b"another"
    path.unlink()
    with pytest.raises(Unfit) as caught:
        fetched(Runner(), one)
    assert "is another file than it must be" in caught.value.message
    assert "secret" not in caught.value.message
    assert list(path.parent.iterdir()) == []
    del server.files["/a.tar"]
    with pytest.raises(WrongState, match="the server answers 404"):
        fetched(Runner(), one)


def test_downloads_are_asked_for_and_not_fetched(farm: PackageFarm, server: _Server) -> None:
    where = repository(farm.directory / "hello", deb_files())
    server.files = {"/there": b"1", "/kept": b"2"}
    names = {"there": b"1", "kept": b"2", "gone": b"3"}
    downloads = [_download(server, name, data) for name, data in names.items()]
    listed = ", ".join(f"{{url: '{one.url}', sha256: {one.sha256}}}" for one in downloads)
    farm.declare(f"hello: {{git: {where}, downloads: [{listed}]}}")
    fetched(Runner(), downloads[1])
    server.asked.clear()
    assert "/gone can't be fetched: the server answers 404" in only(farm)
    assert sorted(server.asked) == ["HEAD /gone", "HEAD /there"]


def test_remedies_name_tasks_that_there_are(farm: PackageFarm) -> None:
    repository(farm.all / "hello", deb_files())
    farm.declare("")
    passed(farm, "hello", "0.9-1", "b" * 40, FileRecord(name="x.deb", size=2**60, sha256=""))
    with farm.site(plan=True) as site:
        (problem,) = problems_of(site, *looked(site))
    assert [call.task for call in calls_in(problem.remedy)] == ["gc"]
    assert isinstance(PackagesNotReady("packs", [problem]), FarmhandError)


def test_a_plan_tells_what_is_not_committed(farm: PackageFarm) -> None:
    where = repository(farm.all / "hello", deb_files())
    farm.declare("")
    (where / "hello.c").write_text("other\n")
    with farm.site(plan=True) as site:
        sources, graph = looked(site)
        plan = plan_of(site, sources, graph, template="")
    assert plan.notes == (f"hello: 1 uncommitted change in {where}: not built",)
