"""Package repositories: what each change does, and what is left alone, in both formats."""

from __future__ import annotations

import gzip
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import repositories.render
from inventory.errors import Conflict, NotFound, Unfit, UsageError, WrongState, spelled
from inventory.loader import load
from inventory.sizes import rounded
from provision.engine.report import Outcome, QuietReporter
from provision.engine.runner import perform
from provision.operations.repositories import RepoAdd
from provision.package_repositories import client_source
from provision.site import Site
from repositories.difference import differences
from repositories.leases import give_back, take
from repositories.package import Package
from tests.debs import deb, fields
from tests.repos import FORMATS, RepoFarm, contents, others, read_all, read_tree


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory: a name must not be too long for gpg's sockets, nor a test wait for a disk."""
    with tempfile.TemporaryDirectory(prefix="fh", dir="/dev/shm") as place:
        monkeypatch.setenv("FARMHAND_STATE_DIR", f"{place}/s")
        monkeypatch.setenv("FARMHAND_RUNTIME_DIR", f"{place}/r")
        yield Path(place)


@pytest.fixture(params=FORMATS)
def repo(request: pytest.FixtureRequest, state: Path) -> RepoFarm:
    return RepoFarm(state, request.param)


def told(done: Outcome[Any]) -> str:
    return "\n".join(map(str, done.actions))


def test_add_and_add_again(repo: RepoFarm) -> None:
    file = repo.package()
    done = repo.add(file)
    assert done.result.added and done.result.packages == 1
    assert repo.versions() == repo.read() == ["hello 1.0-1"]
    before = contents(repo.top)
    again = repo.add(file)
    assert [action.verb for action in again.actions] == ["keep"]
    assert not again.changed
    assert contents(repo.top) == before
    assert repo.fsck() == []


def test_another_file_under_an_identity(repo: RepoFarm) -> None:
    repo.add(repo.package())
    before = contents(repo.top)
    with pytest.raises(Conflict, match=r"differ in .*usr/share/hello"):
        repo.add(repo.package(text="other"))
    with pytest.raises(Conflict):
        repo.add(repo.package(text="other"), channel="tested")
    with pytest.raises(Conflict):
        repo.perform("repo-add", plan=True, channel="tested", paths=(repo.package(text="other"),))
    assert contents(repo.top) == before


def test_two_files_of_one_identity_at_once(repo: RepoFarm) -> None:
    one = repo.package().rename(repo.incoming / f"one{repo.package().suffix}")
    with pytest.raises(Conflict, match="differ in"):
        repo.add(one, repo.package(text="other"))
    assert not repo.fsck()
    assert repo.versions() == []
    repo.add(one, repo.package())  # the same one twice
    assert repo.read() == ["hello 1.0-1"]


def test_remove(repo: RepoFarm) -> None:
    repo.add(repo.package(), repo.package("other"), repo.package("other", "2.0-1"))
    with pytest.raises(NotFound, match="has no package nothing, hello=7"):
        repo.remove("nothing", "hello=7", "other")
    repo.remove("other=1.0-1")
    assert repo.read() == ["hello 1.0-1", "other 2.0-1"]
    repo.remove("hello", "other")
    assert repo.read() == repo.versions() == []
    assert len(read_tree(repo.top / "generations/1")) == 3
    assert repo.fsck() == []
    repo.add(repo.package())
    assert repo.read() == ["hello 1.0-1"]


def test_promote(repo: RepoFarm) -> None:
    with pytest.raises(NotFound, match="nothing was published"):
        repo.promote()
    repo.add(repo.package(), repo.package("other"))
    repo.promote("other")
    assert repo.read("tested") == ["other 1.0-1"]
    assert not repo.promote("other").changed
    repo.promote()
    assert repo.read("tested") == repo.read()
    assert not repo.promote().changed
    repo.remove("other")
    repo.promote("hello", from_="1")
    with pytest.raises(NotFound, match="no generation 99: it has 1, 2, 3, 4"):
        repo.promote(from_="99")
    with pytest.raises(NotFound, match="has no channel 9999999999999999999"):
        repo.promote(from_="9" * 19)
    assert repo.fsck() == []


def test_rollback_has_a_fresh_date(repo: RepoFarm) -> None:
    with pytest.raises(NotFound, match="nothing was published"):
        repo.rollback()
    repo.add(repo.package())
    with pytest.raises(WrongState, match="no other generation"):
        repo.rollback()
    repo.add(repo.package("other"))
    repo.rollback()
    assert repo.read() == ["hello 1.0-1"]
    first, second, third = (repo.repository.documents.read(n) for n in (1, 2, 3))
    assert (third.origin, third.chunks) == (1, first.chunks)
    assert first.date < second.date < third.date
    with pytest.raises(NotFound, match="never had generation 7"):
        repo.rollback(to=7)
    repo.rollback(to=3)  # the present one: made anew
    assert repo.repository.documents.head("experimental") == 4
    assert read_tree(repo.top / "generations/4") == read_tree(repo.top / "generations/1")


def test_the_clock_went_back(repo: RepoFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, datetime)

    class Yesterday(datetime, metaclass=Same):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) - timedelta(days=1)

    repo.add(repo.package())
    assert repo.fsck() == []
    monkeypatch.setattr("repositories.change.datetime", Yesterday)
    monkeypatch.setattr("repositories.generation.datetime", Yesterday)
    for version in ("2.0-1", "3.0-1"):
        repo.add(repo.package(version=version))
    documents = repo.repository.documents
    dates = [documents.read(number).date for number in (1, 2, 3)]
    assert dates == sorted(set(dates))
    found = repo.repository.at("experimental", datetime.now(UTC) + timedelta(hours=1))
    assert found and found.sequence == 3
    assert not repo.gc().changed, "what was just published stays"
    assert repo.fsck() == []


def test_versions_limit(repo: RepoFarm) -> None:
    repo.declare("versions: 2")
    for version in ("1.0-1", "2.0-1", "3.0-1"):
        done = repo.add(repo.package(version=version))
    assert "remove hello 1.0-1" in told(done)
    assert repo.read() == ["hello 2.0-1", "hello 3.0-1"]
    done = repo.add(repo.package(version="0.5-1"))
    assert "leave out hello 0.5-1" in told(done)
    assert repo.read() == ["hello 2.0-1", "hello 3.0-1"]
    assert repo.fsck() == [], "what nobody lists isn't in the pool"


def test_a_channel_that_the_farm_file_names_no_more_stays_until_it_is_dropped(repo: RepoFarm) -> None:
    repo.add(repo.package())
    repo.promote()
    declared = repo.file.read_text()
    repo.file.write_text(declared.replace("[experimental, tested]", "[experimental]"))
    repo.age(timedelta(days=40))
    told = [str(action) for action in repo.gc().actions]
    assert any("generation 2: tested points to it, which the farm file doesn't name" in t for t in told)
    assert any(t.endswith("to let it go: repo-gc --repo packages --drop tested") for t in told)
    assert read_all(repo.top)["tested"]
    for channel, kind in (("experimental", UsageError), ("live", NotFound)):
        with pytest.raises(kind, match=channel):
            repo.gc(drop=(channel,))
    before = contents(repo.top)
    planned = repo.gc(drop=("tested",), plan=True)
    assert contents(repo.top) == before
    done = repo.gc({2: "build b used it"}, drop=("tested",))
    assert done.result.dropped == planned.result.dropped == ("tested",)
    assert planned.result.removed == done.result.removed == ()
    assert planned.result.kept["2"] == ("tested's clients may still read it",)
    assert set(read_all(repo.top)) == {"experimental", "1", "2"}
    assert not list(repo.top.glob("*/tested*"))
    assert repo.fsck() == []
    assert repo.gc(drop=("tested",)).result.dropped == ()
    repo.add(repo.package("other"))  # which tidies up
    assert (repo.top / "generations/2").is_dir()
    repo.age(timedelta(days=40))
    assert repo.gc().result.removed == (2,)
    assert repo.fsck() == []
    repo.file.write_text(declared)
    assert repo.repository.head("tested") is None
    repo.promote()
    assert [entry.sequence for entry in repo.repository.documents.log("tested")] == [4]
    assert repo.fsck() == []


def test_gc_says_who_keeps_what(repo: RepoFarm) -> None:
    repo.declare("keep: 1\nkeep_for: 60s\ngrace: 60s")
    for version in ("1.0-1", "2.0-1", "3.0-1", "4.0-1", "5.0-1"):
        repo.add(repo.package(version=version))
        repo.remove("hello")
    assert {"young"} <= set(repo.gc(plan=True).result.kept["2"])
    repo.age(timedelta(minutes=5))
    take(repo.repository.layout, 1, "build b")
    planned = repo.gc({3: "build c used it"}, plan=True)
    kept = planned.result.kept
    assert kept["10"] == ("experimental points to it", "one of experimental's last 1")
    assert kept["1"] == ("build b uses it",)
    assert kept["3"] == ("build c used it",)
    assert planned.result.removed == (2, 4, 5, 6, 7, 8, 9)
    used = _used(repo.top)
    done = repo.gc({3: "build c used it"})
    assert done.result.removed == planned.result.removed
    assert repo.repository.documents.sequences() == (1, 3, 10)
    read_all(repo.top)
    assert repo.fsck() == []
    assert used - _used(repo.top) >= done.result.freed > 0
    give_back(repo.repository.layout, "build b")
    repo.gc()
    assert repo.repository.documents.sequences() == (10,)
    repo.add(repo.package())
    assert repo.repository.documents.head("experimental") == 11, "no number is given twice"


def _used(top: Path) -> int:
    inodes = {p.lstat().st_ino: p.lstat().st_blocks * 512 for p in top.rglob("*") if p.is_file()}
    return sum(inodes.values())


def test_diff_with_changelog(repo: RepoFarm) -> None:
    repo.add(repo.package(version="9.0-1", changes="9.0-1 8.0-1"), repo.package("gone"))
    repo.remove("gone", "hello")
    repo.add(repo.package(version="10.0-1", changes="10.0-1 9.5-1 9.0-1 8.0-1"), repo.package("new"))
    repository = repo.repository
    one, other = (repository.generation(which) for which in ("1", "experimental"))
    found = differences(repository, one, other, changelogs=True)
    assert [(d.what, str(d).rsplit(" ", 1)[0]) for d in found] == [
        ("removed", "gone 1.0-1"), ("changed", "hello 9.0-1 -> 10.0-1"), ("added", "new 1.0-1"),
    ]  # fmt: skip
    assert [change.version.split(" ")[-1] for change in found[1].changes] == ["10.0-1", "9.5-1"]
    back = differences(repository, other, one, changelogs=True)
    assert [d.changes for d in back] == [()] * 3, "to go back is no change to read of"
    repo.add(repo.package(version="9.0-1", changes="9.0-1 8.0-1"))
    two = repo.repository.generation("experimental")
    more = differences(repo.repository, one, two)
    assert "hello 9.0-1 -> 10.0-1" not in " ".join(map(str, more)), "9.0-1 is in both"


def test_at_a_time(repo: RepoFarm) -> None:
    before = datetime.now(UTC)
    repo.add(repo.package())
    between = datetime.now(UTC)
    repo.add(repo.package("other"))
    repository = repo.repository
    assert repository.at("experimental", before) is None
    for moment, number in ((between, 1), (datetime.now(UTC), 2)):
        found = repository.at("experimental", moment)
        assert found and found.sequence == number
    first = repository.first_with(next(iter(repository.packages(repository.generation("2")))))
    assert first and first.sequence == 1


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_package_is_put_back_by_adding_it_again(repo: RepoFarm, damage: str) -> None:
    file = repo.package()
    repo.add(file)
    (pooled,) = (repo.top / "pool").glob("*/*/*")
    pooled.unlink()
    if damage == "changed":
        pooled.write_bytes(b"x")
    assert len(repo.fsck()) == 1
    planned = repo.perform("repo-add", plan=True, channel="experimental", paths=(file,))
    assert "put back hello 1.0-1" in told(planned)
    assert len(repo.fsck()) == 1
    repo.add(file)
    assert repo.fsck() == []
    assert repo.repository.documents.sequences() == (1,)
    assert pooled.stat().st_mode & 0o7777 == 0o444
    # also where another channel gets it
    pooled.unlink()
    pooled.write_bytes(b"x")
    repo.add(file, channel="tested")
    assert repo.fsck() == []


def test_unfit_files_are_all_named(repo: RepoFarm) -> None:
    good, bad = repo.package(), repo.package("bad")
    bad.write_bytes(bad.read_bytes()[:-40])
    link = repo.incoming / f"link{good.suffix}"
    link.symlink_to(good.name)
    other = repo.incoming / "some.txt"
    other.write_text("x")
    os.mkfifo(fifo := repo.incoming / f"pipe{good.suffix}")
    with pytest.raises(Unfit) as caught:
        repo.add(good, bad, link, other, fifo)
    reasons = bad.name, "is a symbolic link", "some.txt is not called", "no regular file"
    for words in ("4 of 5 files are not taken", *reasons):
        assert words in spelled(caught.value.message)
    assert repo.repository.documents.sequences() == ()
    assert repo.fsck() == []


def test_modes_under_any_umask(repo: RepoFarm) -> None:
    before = os.umask(0o077)
    try:
        repo.add(repo.package())
        repo.add(repo.package("other"))
    finally:
        os.umask(before)
    for path in repo.top.rglob("*"):
        if path.is_symlink():
            continue
        mode, place = path.stat().st_mode & 0o7777, path.relative_to(repo.top)
        if place.parts[0] == ".farmhand":
            assert mode & 0o077 == 0 or place.parts[1:2] != (), place
        elif path.is_dir():
            assert mode & 0o055 == 0o055, place
        else:
            assert mode & 0o444 == 0o444, place
            assert place.parts[0] != "pool" or mode == 0o444
    assert (repo.top / ".farmhand").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_may_write_in(repo: RepoFarm) -> None:
    repo.top.mkdir(mode=0o777)
    repo.top.chmod(0o777)
    with pytest.raises(WrongState, match="others may write"):
        repo.add(repo.package())
    assert list(repo.top.iterdir()) == []


@pytest.mark.parametrize("name", ["pool", "generations", "channels", "published", ".farmhand"])
def test_links_that_somebody_else_made(repo: RepoFarm, name: str, state: Path) -> None:
    if os.geteuid():
        pytest.fail("this test needs root")
    repo.add(repo.package())
    moved = (repo.top / name).rename(state / "moved")
    (repo.top / name).symlink_to(moved)
    os.lchown(repo.top / name, 1234, 1234)
    before = contents(repo.top)
    with pytest.raises(WrongState, match="is a link that uid 1234 made"):
        repo.add(repo.package("other"))
    assert contents(repo.top) == before


def test_another_repository_is_there(repo: RepoFarm) -> None:
    repo.add(repo.package())
    text = repo.file.read_text()
    repo.file.write_text(text.replace("  packages:", "  others:"))
    with pytest.raises(WrongState, match="is packages, a repository of"):
        _add_to(repo, "others")


def _add_to(repo: RepoFarm, name: str) -> None:
    with Site(load(repo.file), reporter=QuietReporter()) as site:
        perform(site, RepoAdd(repo=name, channel="tested", paths=(repo.package(),)))


def test_killed_while_it_was_first_made(repo: RepoFarm) -> None:
    (repo.top / ".farmhand").mkdir(parents=True)
    (repo.top / ".farmhand/.repository.json.999999999.7").write_text("{")
    repo.add(repo.package())
    assert repo.fsck() == []


def test_on_two_file_systems(repo: RepoFarm, tmp_path: Path) -> None:
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.fail("this test needs two file systems")
    repo.top.mkdir()
    elsewhere = Path(tempfile.mkdtemp(dir=tmp_path))
    (repo.top / "pool").symlink_to(elsewhere)
    with pytest.raises(WrongState, match="on another file system"):
        repo.add(repo.package())


def test_lines_of_the_url(repo: RepoFarm) -> None:
    repo.add(repo.package())
    mirrors = repo.top / "channels/experimental.mirrors"
    assert mirrors.read_text() == "http://packages.example/r/generations/1/\n"
    text = repo.file.read_text()
    repo.file.write_text(text.replace("http://packages.example/r", "https://other.example"))
    assert any("mirrors" in line for line in repo.fsck())
    repo.add(repo.package(), channel="tested")  # any change
    assert mirrors.read_text() == "https://other.example/generations/1/\n"
    repo.file.write_text(re.sub("url: .*", "", text))
    repo.remove("hello", channel="tested")
    assert not mirrors.exists()
    assert repo.fsck() == []
    with pytest.raises(WrongState, match="nobody said what packages is reached by"):
        client_source(repo.repository, "tested", None, plain=False)


def test_a_failed_change_leaves_nothing(repo: RepoFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.add(repo.package())
    before = contents(repo.top)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("repositories.change.RepositoryChange._point", fail)
    with pytest.raises(Exception, match="No space left"):
        repo.add(repo.package("other"), channel="tested")
    monkeypatch.undo()
    assert repo.fsck() == []
    changed = contents(repo.top).items() ^ before.items()
    assert {name for name, _ in changed} <= {".farmhand/sequence.json", "published/tested"}


class TestFsckNames:
    """Each kind of damage, and what is told of it."""

    @pytest.fixture
    def repo(self, request: pytest.FixtureRequest, state: Path) -> RepoFarm:
        made = RepoFarm(state, getattr(request, "param", "deb"))
        made.add(made.package(), made.package("other"))
        made.promote()
        assert made.fsck() == []
        return made

    @pytest.mark.parametrize("repo", FORMATS, indirect=True)
    @pytest.mark.parametrize(
        ("pattern", "words"),
        [
            ("pool/*/*/hello*", "hello 1.0-1 amd64 is damaged"),
            ("generations/1/[dr]*/**/*", "it is damaged"),
            (".farmhand/chunks/*/*", "a list of packages, is damaged"),
            (".farmhand/generations/1.json", "list of generation 1's packages, is damaged"),
            ("channels/tested.mirrors", "the next change of the repository puts it right"),
            (".farmhand/repository.json", "remove it: it is made anew"),
        ],
    )
    @pytest.mark.parametrize("how", ["changed", "gone"])
    def test_files(self, repo: RepoFarm, pattern: str, words: str, how: str) -> None:
        files = [p for p in repo.top.glob(pattern) if p.is_file() and not p.is_symlink()]
        assert files
        for file in files:
            data, mode = file.read_bytes(), file.stat().st_mode
            file.unlink()
            if how == "changed":
                file.write_bytes(data[:-1] + b"?")
            found = repo.fsck()
            assert found, file
            if how == "changed" and repo.kind == "deb":
                assert any(words in line for line in found), (file, found)
            file.unlink(missing_ok=True)
            file.write_bytes(data)
            file.chmod(mode)
            if "generations/1/" in str(file):
                _link_again(repo, file)
            assert repo.fsck() == [], file

    @pytest.mark.parametrize("name", ["published/tested/2", "generations/2", "channels/tested"])
    def test_what_is_gone(self, repo: RepoFarm, name: str) -> None:
        path = repo.top / name
        path.rename(repo.top / ".farmhand/aside")
        assert any("gone" in line for line in repo.fsck())

    @pytest.mark.parametrize(
        "name",
        [
            "pool/00/" + "0" * 64 + "/x.deb", ".farmhand/readings/00/" + "0" * 64 + ".json",
            "generations/9/x", "published/tested/1/x", ".farmhand/chunks/00/x",
            ".farmhand/.sequence.json.99999.1", "pool/x",
        ],
    )  # fmt: skip
    def test_orphans(self, repo: RepoFarm, name: str) -> None:
        path = repo.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        found = repo.fsck()
        assert len(found) == 1, found
        assert name.startswith(found[0].split(":")[0])
        if "repo-gc" in found[0]:
            repo.gc()
            assert repo.fsck() == []

    def test_the_pointer(self, repo: RepoFarm) -> None:
        pointer = repo.top / "channels/tested"
        for change in (
            lambda: pointer.symlink_to("../published/experimental/1"),
            lambda: pointer.symlink_to("../published/tested/x"),
            lambda: pointer.write_text("x"),
        ):
            pointer.unlink()
            change()
            assert any("should lead to a generation" in line for line in repo.fsck())
            with pytest.raises(WrongState, match="should lead to a generation"):
                repo.add(repo.package("third"), channel="tested")
        pointer.unlink()
        assert any("channels/tested: it is gone" in line for line in repo.fsck())
        repo.add(repo.package("third"), channel="tested")
        assert repo.read("tested") == ["hello 1.0-1", "other 1.0-1", "third 1.0-1"], "nothing is lost"
        assert repo.fsck() == []

    def test_a_lease(self, repo: RepoFarm) -> None:
        take(repo.repository.layout, 1, "build b")
        (file,) = (repo.top / ".farmhand/leases").iterdir()
        file.write_text("{}")
        assert any("a lease of a generation, is damaged" in line for line in repo.fsck())
        with pytest.raises(WrongState, match="a lease of a generation"):
            repo.gc()

    def test_the_log(self, repo: RepoFarm) -> None:
        log = repo.top / ".farmhand/logs/tested.jsonl"
        log.write_text(log.read_text()[:-20])
        assert any("its log ends with another" in line for line in repo.fsck())
        repo.add(repo.package("third"))
        assert repo.fsck() == []
        assert [e.sequence for e in repo.repository.documents.log("tested")] == [2]

    def test_an_index_that_lacks_a_package(
        self, repo: RepoFarm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its sums are right: whatever made it was wrong."""
        render = repositories.render.IndexRenderer._render

        def less(*arguments: Any) -> Any:
            parts = render(*arguments)
            part = next(iter(parts.values()))
            data = bytes(part.plain[: part.lengths[0]])
            return dict.fromkeys(parts, replace(part, plain=data, packed=gzip.compress(data)))

        monkeypatch.setattr("repositories.render.IndexRenderer._render", less)
        repo.add(repo.package("third"), channel="tested")
        assert any("2 packages of the generation are not in it" in line for line in repo.fsck())

    @pytest.mark.parametrize("cache", ["rendered", "readings"])
    @pytest.mark.parametrize("pattern", ["*.gz", "*[!z]"])
    def test_damaged_caches_get_into_no_index(self, repo: RepoFarm, cache: str, pattern: str) -> None:
        files = [p for p in (repo.top / ".farmhand" / cache).glob(f"*/{pattern}") if p.is_file()]
        for file in files:
            file.write_bytes(file.read_bytes().replace(b"hello", b"jello")[:-1] + b"\n")
        if cache == "readings":
            for file in (repo.top / ".farmhand/rendered").glob("*/*"):
                file.unlink()
        repo.rollback("tested", to=2)
        assert repo.fsck() == []
        assert repo.read("tested") == ["hello 1.0-1", "other 1.0-1"]


def _link_again(repo: RepoFarm, file: Path) -> None:
    """A file of a generation's has other names, by hard links."""
    data = file.read_bytes()
    for other in (repo.top / "published").rglob(file.name):
        if other.is_file() and other.read_bytes() == data:
            other.unlink()
            os.link(file, other)


class TestDebSections:
    """Components and architectures, which only deb has."""

    @pytest.fixture
    def repo(self, state: Path) -> RepoFarm:
        return RepoFarm(state, "deb")

    @staticmethod
    def made(repo: RepoFarm, name: str, architecture: str) -> Path:
        path = repo.incoming / f"{name}_1.0-1_{architecture}.deb"
        path.write_bytes(deb(fields(name, "1.0-1", architecture)))
        return path

    def sections(self, repo: RepoFarm) -> dict[str, list[str]]:
        dist = repo.top / "channels/experimental/dists/experimental"
        return {
            str(path.parent.relative_to(dist)): re.findall(
                r"^Package: (.*)$", gzip.decompress(path.read_bytes()).decode(), re.MULTILINE
            )
            for path in sorted(dist.rglob("Packages.gz"))
        }

    def test_what_fits_all_is_listed_from_the_first_on(self, repo: RepoFarm) -> None:
        repo.add(self.made(repo, "data", "all"))
        assert self.sections(repo) == {"main/binary-all": ["data"]}
        repo.add(self.made(repo, "tool", "amd64"))
        repo.add(self.made(repo, "tool", "arm64"))
        both = ["data", "tool"]
        assert self.sections(repo) == {"main/binary-amd64": both, "main/binary-arm64": both}
        assert repo.fsck() == []

    def test_declared_architectures_change(self, repo: RepoFarm) -> None:
        repo.declare("architectures: [amd64, arm64]")
        repo.add(self.made(repo, "data", "all"), self.made(repo, "tool", "arm64"))
        assert self.sections(repo)["main/binary-arm64"] == ["data", "tool"]
        with pytest.raises(Unfit, match="is for riscv64, and packages has amd64, arm64"):
            repo.add(self.made(repo, "tool", "riscv64"))
        repo.declare("architectures: [amd64, riscv64]")
        repo.add(self.made(repo, "tool", "riscv64"))
        assert self.sections(repo) == {
            "main/binary-amd64": ["data"], "main/binary-riscv64": ["data", "tool"],
        }  # fmt: skip
        assert repo.fsck() == []

    def test_components(self, repo: RepoFarm) -> None:
        repo.declare("components: [main, contrib]")
        file = repo.package()
        with pytest.raises(UsageError, match="no component non-free: it has main, contrib"):
            repo.add(file, component="non-free")
        repo.add(file)
        repo.add(file, component="contrib")
        repo.add(repo.package("other"), component="contrib")
        assert self.sections(repo) == {
            "contrib/binary-amd64": ["hello", "other"], "main/binary-amd64": ["hello"],
        }  # fmt: skip
        assert repo.fsck() == []
        repo.promote("hello")
        assert repo.versions("tested") == ["hello 1.0-1"] * 2

    def test_empty_repositories_can_be_read(self, repo: RepoFarm) -> None:
        repo.declare("components: [main]\narchitectures: [amd64]")
        repo.add(repo.package())
        repo.remove("hello")
        assert self.sections(repo) == {"main/binary-amd64": []}
        assert repo.fsck() == []


def test_a_component_is_not_for_rpm(state: Path) -> None:
    repo = RepoFarm(state, "rpm")
    with pytest.raises(UsageError, match="no component main"):
        repo.add(repo.package(), component="main")


def test_import(repo: RepoFarm) -> None:
    source = others(repo, "third", "fourth")
    with pytest.raises(NotFound, match="there is no directory"):
        repo.perform("repo-import", plan=True, channel="tested", source=source / "nothing")
    planned = repo.perform("repo-import", plan=True, channel="tested", source=source)
    assert not repo.top.exists()
    repo.perform("repo-import", channel="tested", source=source)
    assert repo.read("tested") == ["fourth 1.0-1", "third 1.0-1"]
    assert [str(a) for a in planned.actions] == [
        f"add {p} to tested, {rounded(p.size)}" for p in _listed(repo, "tested")
    ] + ["packages: tested gets a new generation"]
    damaged = next(source.rglob("third*"))
    damaged.write_bytes(damaged.read_bytes() + b"x")
    with pytest.raises(Unfit, match="is damaged: its sha256 is"):
        repo.perform("repo-import", channel="experimental", source=source)


def test_import_of_a_tree_of_links(repo: RepoFarm) -> None:
    """That lead to other places in it."""
    source = others(repo, "third")
    (file,) = source.rglob("third*")
    file.symlink_to(file.rename(source / file.name))
    repo.perform("repo-import", channel="tested", source=source)
    assert repo.read("tested") == ["third 1.0-1"]


def _listed(repo: RepoFarm, channel: str) -> list[Package]:
    head = repo.repository.head(channel)
    assert head
    return list(repo.repository.packages(head))
