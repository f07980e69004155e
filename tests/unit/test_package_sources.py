"""From a farm to the state of its source packages: real git, source packages of dpkg-source and
rpmbuild."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from package_farm import (
    PackageFarm,
    changelog,
    commit,
    control,
    deb_files,
    farm,  # noqa: F401 - a fixture
    git,
    repository,
    rpm_files,
    write,
)

from builds.packages import contents as module
from builds.packages.git_place import git_place, object_named
from builds.packages.packing import pack
from builds.packages.sources import PackageSources
from host.files import remove
from host.run import Runner
from inventory.errors import NotFound, UsageError
from tests.rpms import rpm

# ruff: noqa: F811 - the fixture's name


def _one(found: PackageSources, name: str = "hello"):
    assert not found.problems, found.problems
    return found.states[name]


def _problem(found: PackageSources) -> str:
    (problem,) = found.problems
    return str(problem)


def _programs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """All that is started from now on."""
    started: list[tuple[str, ...]] = []
    real = subprocess.Popen

    def popen(args, *more, **others):
        started.append(tuple(args))
        return real(args, *more, **others)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return started


def _tar(state, directory: Path) -> dict[str, tarfile.TarInfo]:
    target = directory / "source.tar"
    pack(Runner(), state, target)
    with tarfile.open(target) as tar:
        return {entry.name: entry for entry in tar}


def _text(directory: Path, name: str) -> bytes:
    with tarfile.open(directory / "source.tar") as tar:
        file = tar.extractfile(name)
        assert file
        return file.read()


# ---- git.


def test_a_deb_and_an_rpm_package_are_found_by_looking(farm: PackageFarm) -> None:
    repository(farm.all / "hello", deb_files())
    repository(farm.all / "tool", rpm_files())
    found = farm.read()
    assert not found.problems
    deb, rpm_ = found.states["hello"], found.states["tool"]
    assert (deb.format, deb.stated, deb.given, deb.commits) == ("deb", "1.0-1", "1.0-1", 1)
    assert deb.control is not None
    assert deb.control.name == "hello"
    assert deb.tree == git(farm.all / "hello", "rev-parse", "HEAD^{tree}")
    assert deb.commit == git(farm.all / "hello", "rev-parse", "HEAD")
    assert (deb.subject, deb.asked, deb.when) == ("One", "HEAD", 1769940000)
    assert (rpm_.format, rpm_.stated, rpm_.spec) == ("rpm", "2.0-1", "tool.spec")
    assert found.revision == "HEAD"


def test_nothing_is_started_for_packages_that_did_not_change(
    farm: PackageFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However their commits are named: a branch, a packed one, tags, a commit, a linked work tree, a
    bare repository."""
    top = farm.directory
    packed = repository(top / "packed", deb_files("packed"))
    git(packed, "branch", "stable")
    git(packed, "pack-refs", "--all")
    tagged = repository(top / "tagged", deb_files("tagged"))
    git(tagged, "tag", "-a", "-m", "x", "v1")
    tagged2 = repository(top / "tagged2", deb_files("tagged2"))
    git(tagged2, "tag", "-a", "-m", "x", "v1")
    git(tagged2, "pack-refs", "--all")
    fixed = commit(repository(top / "fixed", deb_files("fixed")), "Two", {"x": "y"})
    git(packed, "worktree", "add", "-q", "-b", "other", top / "linked")
    commit(top / "linked", "Other", {"debian/changelog": changelog("packed", "9-1")})
    git(top, "clone", "-q", "--bare", "fixed", "bare.git")
    many = repository(top / "many", {f"p{n}/{name}": text for n in range(3)
                                     for name, text in deb_files(f"p{n}").items()})  # fmt: skip
    repository(farm.all / "hello", deb_files())
    farm.declare(
        "packed: {git: packed, revision: stable}\n"
        "tagged: {git: tagged, revision: v1}\n"
        "tagged2: {git: tagged2, revision: refs/tags/v1}\n"
        f"fixed: {{git: fixed, revision: {fixed}}}\n"
        "linked: {git: linked}\n"
        "bare: {git: bare.git, revision: master}\n"
        + "".join(f"p{n}: {{git: many, path: p{n}}}\n" for n in range(3))
    )
    first = farm.read()
    assert not first.problems
    assert first.states["linked"].stated == "9-1"
    assert first.states["bare"].commit == fixed
    assert first.states["tagged2"].commit == git(tagged2, "rev-parse", "HEAD")
    assert first.states["p2"].tree == git(many, "rev-parse", "HEAD:p2")
    started = _programs(monkeypatch)
    again = farm.read()
    assert started == []
    assert [replace(s, control=None) for s in again.states.values()] == [
        replace(s, control=None) for s in first.states.values()
    ]


def test_names_mean_what_they_mean_to_git(farm: PackageFarm) -> None:
    """By names that are several things at once, and some that only git knows."""
    where = repository(farm.directory / "r", {"a": "1"})
    first = git(where, "rev-parse", "HEAD")
    second = commit(where, "Two", {"a": "2"})
    git(where, "branch", "both", first)
    git(where, "tag", "both", second)
    git(where, "branch", "tags/odd", first)
    git(where, "update-ref", "refs/remotes/origin/main", first)
    git(where, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main")
    git(where, "update-ref", "refs/heads/deep/er/branch", first)
    git(where, "symbolic-ref", "refs/heads/link", "refs/heads/deep/er/branch")
    for packed in (False, True):
        if packed:
            git(where, "pack-refs", "--all")
        place = git_place(where)
        assert place
        for name in ("HEAD", "both", "heads/both", "refs/heads/both", "origin", "origin/main", "link",
                     "tags/odd", "deep/er/branch", "master"):  # fmt: skip
            wanted = git(where, "rev-parse", "-q", "--verify", name)
            found = object_named(place, name)
            assert found and found[0] == wanted, (name, packed)
        for name in (
            "nothing",
            "master~1",
            "HEAD^",
            "@",
            first[:8],
            "master@{0}",
            "ORIG_HEAD",
            "config",
        ):
            assert object_named(place, name) is None, name


def test_expressions_and_abbreviations_are_asked_of_git(farm: PackageFarm) -> None:
    where = repository(farm.directory / "r", deb_files())
    first = git(where, "rev-parse", "HEAD")
    commit(where, "Two", {"debian/changelog": changelog(version="2.0-1")})
    for name in ("master~1", first[:9], "HEAD^"):
        farm.declare(f"hello: {{git: r, revision: {name}}}")
        assert _one(farm.read()).commit == first
    farm.declare("hello: {git: r, revision: mastre}")
    assert "has no revision 'mastre'" in _problem(farm.read())
    assert farm.read().problems[0].remedy == "did you mean master?"


def test_the_revision_of_a_package_beats_that_of_the_command(farm: PackageFarm) -> None:
    where = repository(farm.directory / "r", deb_files())
    git(where, "branch", "mine")
    other = repository(farm.directory / "s", deb_files("other"))
    commit(other, "Two", {"debian/changelog": changelog("other", "2.0-1")})
    git(other, "branch", "release", "HEAD~1")
    farm.declare("hello: {git: r, revision: mine}\nother: {git: s}", ", revision: release")
    found = farm.read()
    assert (found.revision, found.states["other"].stated) == ("release", "1.0-1")
    found = farm.read("master")
    assert (found.revision, found.states["other"].stated) == ("master", "2.0-1")
    assert found.states["hello"].asked == "mine"
    with pytest.raises(UsageError):
        farm.read("--upload-pack=x")


def test_what_is_not_committed_is_a_note_and_not_built(
    farm: PackageFarm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = repository(farm.all / "hello", deb_files())
    assert _one(farm.read()).notes == ()
    (where / "hello.c").write_text("other\n")
    state = _one(farm.read())
    assert state.notes == (f"1 uncommitted change in {where}: not built",)
    started = _programs(monkeypatch)
    assert _one(farm.read()).notes == state.notes
    assert started == []
    assert _tar(state, tmp_path)
    assert _text(tmp_path, "source/hello.c") == deb_files()["hello.c"].encode()
    git(where, "add", "-A")
    (where / "debian/rules").unlink()
    assert _one(farm.read()).notes == (f"2 uncommitted changes in {where}: not built",)
    git(where, "reset", "-q", "--hard")
    assert _one(farm.read()).notes == ()


def test_all_problems_are_told_at_once_each_with_its_place(farm: PackageFarm) -> None:
    top = farm.directory
    repository(farm.all / "good", deb_files("good"))
    repository(farm.all / "nothing", {"README": "x"})
    repository(farm.all / "both", {**deb_files("both"), **rpm_files("both")})
    repository(farm.all / "specs", {**rpm_files("a"), **rpm_files("b")})
    repository(farm.all / "link", {k: v for k, v in deb_files("link").items() if k != "debian/control"})
    (farm.all / "link/debian/control").symlink_to("/etc/hostname")
    commit(farm.all / "link")
    repository(farm.all / "named", {**deb_files("named"), "debian/changelog": changelog("other")})
    repository(farm.all / "bare-control", {"debian/control": control()})
    repository(farm.all / "versioned", deb_files("versioned", "v1_0"))
    (farm.all / "plain").mkdir()
    (farm.all / "empty").mkdir()
    git(farm.all / "empty", "init", "-q")
    broken = repository(farm.all / "broken", deb_files("broken"))
    (broken / ".git/HEAD").write_text("0" * 40 + "\n")
    repository(top / "mono", {"inner/README": "x"})
    farm.declare(
        "gone: {git: nowhere}\nundirected: {git: mono, path: outer}\nneither: {git: mono, path: inner}\n"
        "unpacked: {git: all/plain}\nwithout: {dsc: no.dsc}\nspecless: {srpm: no.src.rpm}\n"
        "profiled: {git: rpm, profiles: [nocheck]}"
    )
    repository(top / "rpm", rpm_files())
    found = farm.read()
    assert list(found.states) == ["good"]
    said = {problem.package: problem for problem in found.problems}
    for name, what in {
        "both": "debian/control and both.spec: is it deb or rpm",
        "specs": "2 spec files: a.spec, b.spec",
        "link": "debian/control is a link",
        "named": "debian/changelog is of other, and its debian/control of named",
        "bare-control": "no debian/changelog",
        "versioned": "version 'v1_0'",
        "empty": "no revision 'HEAD'",
        "broken": "broken",
        "gone": "there is no directory",
        "undirected": "has no directory 'outer'",
        "neither": "neither debian/control nor a spec file",
        "unpacked": "neither debian/control nor a spec file",
        "without": "No such file",
        "specless": "No such file",
        "profiled": "'profiles' are for deb",
    }.items():
        assert what in said.pop(name).what, name
    assert said == {}
    lines = farm.file.read_text().splitlines()
    for problem in found.problems:
        _, line, column = problem.where.rsplit(":", 2)
        at = lines[int(line) - 1]
        assert problem.package in at or "directory: " in at
        if problem.package == "undirected":
            assert at[int(column) - 1 :].startswith("outer")
    assert sorted(note.partition(":")[0] for note in found.notes) == ["nothing", "plain"]


def test_a_directory_that_is_no_repository_is_taken_as_it_is(farm: PackageFarm, tmp_path: Path) -> None:
    """Each state is a commit of a repository of ours; a plan says the same and commits nothing."""
    write(farm.all / "hello", deb_files())
    write(farm.directory / "set" / "tool", rpm_files())
    farm.declare("tool: {git: set, path: tool}")
    first = farm.read()
    assert first.problems == ()
    hello, tool = first.states["hello"], first.states["tool"]
    assert (hello.format, hello.stated, hello.commits) == ("deb", "1.0-1", 1)
    assert (tool.format, tool.spec, tool.path) == ("rpm", "tool.spec", "tool")
    assert farm.read().states["hello"].commit == hello.commit
    assert farm.read("main").states["hello"].commit == hello.commit
    (farm.all / "hello" / "README").write_text("more")
    planned = farm.read(plan=True).states["hello"]
    assert (planned.commits, planned.tree == hello.tree) == (2, False)
    assert hello.repository is not None
    assert git(hello.repository, "rev-parse", "HEAD") == hello.commit
    second = farm.read()
    now = second.states["hello"]
    assert (now.tree, now.commit, now.commits) == (planned.tree, planned.commit, 2)
    assert second.states["tool"].commit == tool.commit
    with farm.site() as site:
        pack(site.runner, now, tmp_path / "tar")
    with tarfile.open(tmp_path / "tar") as tar:
        assert "source/README" in tar.getnames()
    assert not list((farm.all / "hello").rglob(".git"))


def test_only_some_are_read(farm: PackageFarm) -> None:
    repository(farm.all / "hello", deb_files())
    repository(farm.all / "bad", {**deb_files("bad"), **rpm_files("bad")})
    assert list(farm.read(only=["hello"]).states) == ["hello"]
    with pytest.raises(NotFound) as caught:
        farm.read(only=["helo"])
    assert caught.value.remedy == "did you mean hello?"


def test_submodules_and_lfs_are_refused_by_name(farm: PackageFarm) -> None:
    inner = repository(farm.directory / "inner", {"a": "b"})
    where = repository(farm.all / "hello", deb_files())
    git(where, "-c", "protocol.file.allow=always", "submodule", "add", "-q", inner, "lib/inner")
    commit(where)
    assert "it has submodules, which the build would not get: lib/inner" in _problem(farm.read())
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'1' * 64}\nsize 9\n"
    other = repository(farm.directory / "mono", {
        ".gitattributes": "*.bin filter=lfs\n",
        **{f"p/{name}": text for name, text in deb_files("p").items()}, "p/x.bin": pointer,
    })  # fmt: skip
    git(where, "rm", "-qf", "lib/inner", ".gitmodules")
    commit(where, "Other", {".gitattributes": "*.bin filter=lfs\n", "data/y.bin": pointer})
    assert "kept by Git LFS, which the build would not get: data/y.bin" in _problem(farm.read())
    farm.declare(f"p: {{git: {other}, path: p}}")
    found = farm.read(only=["p"])
    assert "x.bin" in _problem(found)


def test_a_cut_off_history_is_a_note(farm: PackageFarm) -> None:
    where = repository(farm.directory / "r", deb_files())
    commit(where, "Two", {"x": "y"})
    git(farm.directory, "clone", "-q", "--depth=1", f"file://{where}", "all/hello")
    state = _one(farm.read())
    assert (state.commits, state.notes) == (0, ("its history is cut off here",))
    git(farm.all / "hello", "fetch", "-q", "--unshallow")
    state = _one(farm.read())
    assert (state.commits, state.notes) == (2, ())


def test_nothing_of_a_repository_is_run_and_nothing_is_written_there(
    farm: PackageFarm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With hooks, filters, an fsmonitor, somebody else as owner, and another repository in the
    environment."""
    fired = tmp_path / "fired"
    where = repository(farm.all / "hello", {
        **deb_files(), ".gitattributes": "* filter=evil\nhello.c export-ignore\nv export-subst\n",
        "v": "$Format:%H$\n",
    })  # fmt: skip
    trap = f"touch {fired}; cat"
    for key in ("filter.evil.smudge", "filter.evil.clean", "filter.evil.process", "core.fsmonitor",
                "core.pager", "core.sshCommand", "tar.tar.command"):  # fmt: skip
        git(where, "config", key, trap)
    git(where, "config", "log.showSignature", "true")
    git(where, "config", "gpg.program", trap)
    git(where, "config", "core.hooksPath", str(tmp_path))
    for hook in ("post-index-change", "reference-transaction"):
        (tmp_path / hook).write_text(f"#!/bin/sh\ntouch {fired}\n")
        (tmp_path / hook).chmod(0o755)
    head = git(where, "rev-parse", "HEAD", GIT_CONFIG_COUNT="0")
    evil = git(where, "commit-tree", "-m", "evil", f"{head}^{{tree}}")
    git(where, "replace", head, evil)
    fired.unlink(missing_ok=True)
    os.utime(where / "hello.c")  # git would look again, and note that in its index
    other = repository(farm.directory / "other", {"x": "y"})
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"):
        monkeypatch.setenv(name, str(other / ".git" / ("index" if "INDEX" in name else "")))
    if os.geteuid() == 0:
        for path in (where, *where.rglob("*")):
            os.chown(path, 12345, 12345, follow_symlinks=False)

    def seen() -> dict[str, object]:
        return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_ctime_ns) for p in where.rglob("*")}

    before = seen()
    state = _one(farm.read())
    assert (state.commit, state.subject) == (head, "One")
    entries = _tar(state, tmp_path)
    assert seen() == before
    assert not fired.exists()
    assert "source/hello.c" in entries
    assert _text(tmp_path, "source/v") == b"$Format:%H$\n"


def test_a_fifo_where_git_has_a_file_is_not_waited_for(farm: PackageFarm) -> None:
    where = repository(farm.all / "hello", deb_files())
    ref = where / ".git/refs/heads/master"
    ref.unlink()
    (farm.all / "fifo").mkdir()
    os.mkfifo(farm.all / "fifo/.git")
    ref.write_text("nothing\n")
    (where / ".git/packed-refs").unlink(missing_ok=True)
    found = farm.read()
    assert {problem.package for problem in found.problems} == {"hello", "fifo"}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 1, "entries": []}',
                                    b'{"format": 9, "entries": {}}', b"\xff", None])  # fmt: skip
def test_a_damaged_cache_is_made_anew(farm: PackageFarm, damage: bytes | None) -> None:
    repository(farm.all / "hello", deb_files())
    first = _one(farm.read())
    with farm.site() as site:
        kept = site.paths.root / "sources" / "read.json"
    if damage is None:
        kept.write_text(kept.read_text().replace('"format": "deb"', '"format": 7'))
    else:
        kept.write_bytes(damage)
    assert replace(_one(farm.read()), control=None) == replace(first, control=None)
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_plan_writes_nothing(farm: PackageFarm) -> None:
    upstream = repository(farm.directory / "up", deb_files())
    farm.declare(f"hello: {{git: 'ssh://nobody/up'}}\nlocal: {{git: {upstream}}}")
    with farm.site() as site:
        root = site.paths.root
    farm.read(plan=True, only=["local"])
    assert not root.exists()


def test_a_repository_of_sha256_ids(farm: PackageFarm, tmp_path: Path) -> None:
    where = farm.all / "hello"
    where.mkdir()
    git(where, "init", "-q", "--object-format=sha256")
    head = commit(where, "One", deb_files())
    state = _one(farm.read())
    assert (state.commit, len(state.tree), state.commits) == (head, 64, 1)
    assert "source/debian/control" in _tar(state, tmp_path)


def test_what_a_partial_clone_lacks_is_not_fetched_by_its_program(
    farm: PackageFarm, tmp_path: Path
) -> None:
    where = repository(farm.all / "hello", deb_files())
    fired = tmp_path / "fired"
    for key, value in {
        "core.repositoryFormatVersion": "1", "extensions.partialClone": "origin",
        "remote.origin.url": str(where), "remote.origin.promisor": "true",
        "remote.origin.uploadpack": f"touch {fired}; git-upload-pack",
    }.items():  # fmt: skip
        git(where, "config", key, value)
    for lost in ("HEAD^{tree}", "HEAD"):
        id_ = git(where, "rev-parse", lost)
        (where / ".git/objects" / id_[:2] / id_[2:]).unlink()
        for revision in ("HEAD", "HEAD^{commit}", "HEAD^{tree}"):
            assert farm.read(revision).problems
    assert not fired.exists()


def test_a_directory_that_is_gone_is_one_problem_of_several(farm: PackageFarm) -> None:
    farm.declare("hello: {git: nowhere}\nhome: {git: '~nosuchuser/x'}\nfile: {dsc: '~nosuchuser/x.dsc'}")
    farm.file.write_text(farm.file.read_text().replace(f"'{farm.all}'", "gone"))
    assert sorted(problem.package for problem in farm.read().problems) == ["", "file", "hello", "home"]


def test_two_of_one_name_in_the_directory(farm: PackageFarm) -> None:
    repository(farm.all / "hello", deb_files())
    git(farm.all, "clone", "-q", "--bare", "hello", "hello.git")
    repository(farm.all / "not a name", deb_files("x"))
    found = farm.read()
    assert list(found.states) == ["hello"]
    assert len(found.notes) == 2


# ---- URLs.


@pytest.fixture
def served(farm: PackageFarm, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A repository, and a URL of it: git's own way of saying that one address means another."""
    upstream = repository(farm.directory / "up", deb_files())
    config = farm.directory / "gitconfig"
    config.write_text(
        f'[url "file://{farm.directory}/"]\n\tinsteadOf = https://git.example/\n'
        f'[url "file://{farm.directory}/"]\n\tinsteadOf = https://me:secret@git.example/\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    return "https://git.example/up", upstream


def test_a_url_is_mirrored_and_followed(
    farm: PackageFarm, served: tuple[str, Path], tmp_path: Path
) -> None:
    url, upstream = served
    first = git(upstream, "rev-parse", "HEAD")
    farm.declare(f"hello: {{git: '{url}'}}")
    state = _one(farm.read())
    assert (state.commit, state.place, state.stated) == (first, url, "1.0-1")
    assert "source/debian/control" in _tar(state, tmp_path)
    git(upstream, "checkout", "-q", "-b", "next")  # its HEAD is another branch now
    second = commit(upstream, "Two", {"debian/changelog": changelog(version="2.0-1")})
    git(upstream, "branch", "-D", "master")
    assert _one(farm.read()).commit == second
    assert "has no revision 'master'" in _problem(farm.read("master"))
    planned = farm.read(plan=True)
    assert _one(planned).commit == second
    git(upstream, "symbolic-ref", "HEAD", "refs/heads/gone")
    assert "no revision 'HEAD'" in _problem(farm.read())
    git(upstream, "symbolic-ref", "HEAD", "refs/heads/next")
    with farm.site() as site:
        (mirror,) = (site.paths.root / "sources").glob("*.git")
    for damage in (mirror / "objects", mirror / "refs", mirror / "HEAD"):
        remove(damage)  # a mirror is made anew
        assert _one(farm.read()).commit == second


def test_a_url_out_of_reach_is_a_problem_unless_its_commit_is_here(
    farm: PackageFarm, served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, upstream = served
    url = "https://me:secret@git.example/up"
    head = git(upstream, "rev-parse", "HEAD")
    farm.declare(f"hello: {{git: '{url}'}}")
    assert _one(farm.read()).place == "https://me:********@git.example/up"
    with farm.site() as site:
        kept = [p for p in site.paths.root.rglob("*") if p.is_file() and b"secret" in p.read_bytes()]
    assert kept == []
    upstream.rename(farm.directory / "away")
    problem = _problem(farm.read())
    assert "https://me:********@git.example/up is out of reach" in problem
    assert "secret" not in problem
    state = _one(farm.read(head))
    assert _tar(state, tmp_path)
    started = _programs(monkeypatch)
    assert _one(farm.read(head)).commit == head
    assert started == []


# ---- Source packages.


def _dpkg_source(where: Path, *args: str | Path) -> None:
    done = subprocess.run(
        ["dpkg-source", *args], cwd=where, capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C", "SOURCE_DATE_EPOCH": "1769940000"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _dsc(where: Path, format_: str, version: str = "1.0-1") -> Path:
    native = "native" in format_ or "-" not in version
    tree = where / f"hello-{version.partition('-')[0]}"
    write(tree, {name: text for name, text in deb_files(version=version).items()
                 if not name.startswith("debian/")})  # fmt: skip
    if not native:
        upstream = where / f"hello_{version.partition('-')[0]}.orig.tar.gz"
        subprocess.run(["tar", "-C", where, "-czf", upstream, tree.name], check=True)
    write(tree, deb_files(version=version))
    (tree / "debian/source/format").write_text(f"{format_}\n")
    _dpkg_source(where, "-b", tree.name)
    (found,) = where.glob("*.dsc")
    return found


@pytest.mark.parametrize(
    ("format_", "version"),
    [("3.0 (quilt)", "1.0-1"), ("3.0 (native)", "1.0"), ("1.0", "1.0-1"), ("1.0", "1.0")],
)
def test_debian_source_packages(
    farm: PackageFarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str, version: str
) -> None:
    dsc = _dsc(farm.directory, format_, version)
    farm.declare(f"it: {{dsc: {dsc.name}}}")
    state = _one(farm.read(), "it")
    assert (state.format, state.stated, state.commits) == ("deb", version, 0)
    assert state.when == 1769940000
    assert state.control is not None
    assert state.control.name == "hello"
    assert state.tree == hashlib.sha256(dsc.read_bytes()).hexdigest()
    assert state.files[0] == dsc
    entries = _tar(state, tmp_path)
    assert sorted(entries) == sorted(["source", *(f"source/{file.name}" for file in state.files)])
    for file in state.files:
        assert _text(tmp_path, f"source/{file.name}") == file.read_bytes()
    started = _programs(monkeypatch)
    hashed: list[object] = []
    monkeypatch.setattr(module, "check_files", lambda *args: hashed.append(args))
    assert replace(_one(farm.read(), "it"), control=None) == replace(state, control=None)
    assert started == hashed == []


def test_damaged_and_hostile_source_packages_are_refused(farm: PackageFarm, tmp_path: Path) -> None:
    dsc = _dsc(farm.directory, "3.0 (quilt)")
    farm.declare("it: {dsc: bad.dsc}")
    text = dsc.read_text()
    lines = text.partition("Checksums-Sha256:")[2].splitlines()
    packed = next(line for line in lines if line.endswith(".debian.tar.xz"))
    sum_, size, name = packed.split()
    bad = farm.directory / "bad.dsc"
    os.mkfifo(farm.directory / "fifo.tar.xz")
    for changed, why in {
        text.replace(name, "../../x.debian.tar.xz"): "no file here may be called so",
        text.replace(name, "x.debian.tar.xz"): "x.debian.tar.xz isn't beside it",
        text.replace(name, "fifo.tar.xz"): "fifo.tar.xz is no regular file",
        text.replace(sum_, "0" * len(sum_)): "is damaged",
        text.replace(size, "1"): "should have 1 at most",
        text.replace("3.0 (quilt)", "3.0 (custom)"): "its format is '3.0 (custom)'",
        text.replace("Version: 1.0-1", "Version: 2.0-1"): "it is of hello 2.0-1",
        text + "\nVersion: 3\n": "is no field",
        text + "\x1b[2J": "control character",
        "": "is no field",
        f"Version: 6\n-----BEGIN PGP SIGNED MESSAGE-----\n\n{text}": "two fields|is no field",
        "x" * (2**20 + 5): "should have 1048576 at most",
    }.items():
        assert changed != text
        bad.write_text(changed)
        found = farm.read()
        assert found.problems, why
        problem = _problem(found)
        assert any(part in problem for part in why.split("|")), (problem, why)
    # a source that is changed after it was looked at
    bad.write_text(text)
    state = _one(farm.read(), "it")
    (farm.directory / name).write_bytes(b"x" * int(size))
    with pytest.raises(Exception, match="aren't what they were"):
        pack(Runner(), state, tmp_path / "source.tar")
    assert list(tmp_path.iterdir()) == []
    assert "is damaged" in _problem(farm.read())


def test_a_bomb_is_not_unpacked(farm: PackageFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    dsc = _dsc(farm.directory, "3.0 (native)", "1.0")
    farm.declare(f"it: {{dsc: {dsc.name}}}")
    monkeypatch.setattr("repositories.deb.dsc._LEAST", 2000)
    monkeypatch.setattr("repositories.deb.dsc._RATIO", 2)
    assert "grows to more than" in _problem(farm.read())


def test_a_source_rpm(farm: PackageFarm, tmp_path: Path) -> None:
    package = rpm("tool", "3.1", "2.fc40", source=True, tags={"Epoch": "1"})
    farm.declare(f"tool: {{srpm: {package}}}\nbinary: {{srpm: {rpm('hello')}}}")
    found = farm.read()
    state = found.states["tool"]
    assert (state.format, state.stated, state.spec) == ("rpm", "1:3.1-2.fc40", "it.spec")
    assert sorted(_tar(state, tmp_path)) == ["source", f"source/{package.name}"]
    assert "it is a binary rpm package" in _problem(found)


# ---- For the builder.


def test_the_same_state_is_packed_as_the_same_bytes(farm: PackageFarm, tmp_path: Path) -> None:
    where = repository(farm.all / "hello", deb_files())
    (where / "debian/rules").chmod(0o775)
    (where / "link").symlink_to("hello.c")
    commit(where, "Two")
    state = _one(farm.read())
    packed = []
    for umask in (0o077, 0o002):
        before = os.umask(umask)
        pack(Runner(), state, tmp_path / "source.tar")
        os.umask(before)
        packed.append((tmp_path / "source.tar").read_bytes())
    assert packed[0] == packed[1]
    entries = _tar(state, tmp_path)
    assert {(e.uid, e.gid, e.uname, e.mtime) for e in entries.values()} == {(0, 0, "", state.when)}
    assert entries["source/debian/rules"].mode == 0o755
    assert entries["source/hello.c"].mode == 0o644
    assert entries["source/link"].linkname == "hello.c"
    assert (tmp_path / "source.tar").stat().st_mode & 0o777 == 0o600


def test_commits_to_other_packages_change_nothing_in_what_is_packed(
    farm: PackageFarm, tmp_path: Path
) -> None:
    """Nor does another commit with the same tree: one version, one time, the same bytes."""
    files = {f"hello/{name}": text for name, text in deb_files().items()}
    spec = rpm_files()["tool.spec"] + "%changelog\n* Fri Nov 20 2026 A <a@example.org> - 2.0-1\n- x\n"
    where = repository(farm.directory / "mono", {**files, "tool/tool.spec": spec})
    farm.declare("hello: {git: mono, path: hello}\ntool: {git: mono, path: tool}")
    packed = []
    for _ in range(2):
        found = farm.read()
        assert (found.states["hello"].when, found.states["tool"].when) == (1769940000, 1795176000)
        for state in found.states.values():
            pack(Runner(), replace(state, given=f"{state.stated}.9"), tmp_path / "source.tar")
            packed.append((tmp_path / "source.tar").read_bytes())
        write(where, {"README": "x"})
        git(where, "add", "-A")
        later = "Sun, 01 Mar 2026 10:00:00 +0000"
        git(where, "commit", "--allow-empty", "-qm", "Later", GIT_COMMITTER_DATE=later)
    assert packed[:2] == packed[2:]


def test_changes_are_packed_and_the_source_stays(farm: PackageFarm, tmp_path: Path) -> None:
    where = repository(farm.all / "hello", deb_files())
    state = replace(_one(farm.read()), changes={"debian/changelog": b"other\n"})
    _tar(state, tmp_path)
    assert _text(tmp_path, "source/debian/changelog") == b"other\n"
    assert (where / "debian/changelog").read_text() == changelog()
    with pytest.raises(Exception, match="no debian/nothing"):
        pack(Runner(), replace(state, changes={"debian/nothing": b""}), tmp_path / "source.tar")


def test_names_that_lead_out_are_not_packed(farm: PackageFarm, tmp_path: Path) -> None:
    """Trees that git itself would never make."""
    where = repository(farm.all / "hello", deb_files())
    blob = git(where, "hash-object", "-w", "hello.c")
    link = subprocess.run(["git", "-C", where, "hash-object", "-w", "--stdin"], input=b"/etc",
                          capture_output=True, check=True).stdout.decode().strip()  # fmt: skip
    state = _one(farm.read())

    def tree(*entries: tuple[str, str, str]) -> str:
        data = b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(id_) for mode, name, id_ in entries)
        made = subprocess.run(
            ["git", "-C", where, "hash-object", "-t", "tree", "-w", "--literally", "--stdin"],
            input=data, capture_output=True, check=True,
        )  # fmt: skip
        return made.stdout.decode().strip()

    inner = tree(("100644", "x", blob))
    for bad in (
        tree(("40000", "..", inner)),
        tree(("120000", "a", link), ("40000", "a", inner)),
    ):
        with pytest.raises(Exception, match=r"leads out|can't read"):
            pack(Runner(), replace(state, tree=bad), tmp_path / "source.tar")
    assert list(tmp_path.iterdir()) == []
