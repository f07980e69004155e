"""A repository as plain files, for web servers and object stores that know no links."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from repo_tree import RepoTree, check_tree, make_deb

from inventory.errors import NotFound, NotOurs, UsageError
from repositories.change import GenerationContent, changing
from repositories.generation import Reason
from repositories.mirrors.objects import LaidOut, lay_out_objects
from repositories.serving.server import Server
from tests.rpms import rpm


@pytest.fixture
def tree(tmp_path: Path) -> RepoTree:
    made = RepoTree(tmp_path / "repository", grace=0)
    made.publish("tested", ("one", make_deb("one", size=5000)), ("two", make_deb("two")))
    made.publish("experimental", ("three", make_deb("three")))
    return made


def check_plain(top: Path, *channels: str, by_hash: bool = False) -> None:
    """Each channel whole, by what a plain server serves; no links."""
    assert not [path for path in top.rglob("*") if path.is_symlink()]
    assert {path.name for path in (top / "dists").iterdir()} == set(channels)
    for channel in channels:
        alone = top.parent / f"alone-{channel}"
        (alone / "dists").mkdir(parents=True)
        (alone / "dists" / channel).symlink_to(top / "dists" / channel)
        (alone / "pool").symlink_to(top / "pool")
        check_tree(alone, by_hash=by_hash)
        shutil.rmtree(alone)


def test_plain_files(tree: RepoTree, tmp_path: Path) -> None:
    target = tmp_path / "store" / "objects"
    (tree.top / "key.asc").write_text("a key\n")
    done = lay_out_objects(tree.repository, target)
    check_plain(target, "tested", "experimental")
    assert (target / "key.asc").read_text() == "a key\n"
    assert not (target / ".farmhand").exists()
    for path in (path for path in target.rglob("*") if path.is_dir()):
        assert path.stat().st_mode & 0o777 == 0o755
    for path in target.rglob("*.deb"):
        assert path.stat().st_nlink > 1, "a hard link where it can be one"
    assert done == LaidOut(done.files, done.files, 0)
    assert lay_out_objects(tree.repository, target) == LaidOut(done.files, 0, 0)


def test_only_what_changed_is_written(tree: RepoTree, tmp_path: Path) -> None:
    target = tmp_path / "objects"
    before = lay_out_objects(tree.repository, target)
    tree.publish("tested", ("late", make_deb("late")))
    done = lay_out_objects(tree.repository, target)
    check_plain(target, "tested", "experimental")
    # A package; Packages twice, and the superseded one stays; Release.
    assert (done.written, done.removed) == (4, 0)
    assert done.files == before.files + 2


def test_superseded_files_stay_for_the_grace_time(tmp_path: Path) -> None:
    tree, target = RepoTree(tmp_path / "repository"), tmp_path / "objects"
    tree.publish("tested", ("one", make_deb("one")))
    lay_out_objects(tree.repository, target)
    before = {path.relative_to(target) for path in target.rglob("*.deb")}
    with changing(tree.repository) as change:
        base = tree.repository.head("tested")
        assert base
        gone = tuple(tree.repository.packages(base))
        reason = Reason("remove", "tests")
        made = change.commit("tested", GenerationContent(base, remove=gone), reason)
        change.publish(made, reason, expected=base.sequence)
    done = lay_out_objects(tree.repository, target)
    assert done.removed == 0
    assert {path.relative_to(target) for path in target.rglob("*.deb")} == before
    check_plain(target, "tested")


def test_without_hard_links(tree: RepoTree, tmp_path: Path) -> None:
    """On another file system: one of this machine's memory."""
    target = Path("/dev/shm") / f"objects-{os.getpid()}"
    assert Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev
    try:
        done = lay_out_objects(tree.repository, target)
        check_plain(target, "tested", "experimental")
        assert lay_out_objects(tree.repository, target) == LaidOut(done.files, 0, 0)
        (deb,) = target.glob("pool/*/*/one_*.deb")
        deb.write_bytes(b"damaged")
        (target / "dists" / "tested" / "Release").write_text("damaged")
        (target / "pool" / ".left.123").write_text("of one that was killed")
        assert lay_out_objects(tree.repository, target) == LaidOut(done.files, 2, 1)
        check_plain(target, "tested", "experimental")
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_what_is_not_ours_is_left_alone(tree: RepoTree, tmp_path: Path) -> None:
    target = tmp_path / "objects"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(NotOurs, match="is no layout of kata: it has mine"):
        lay_out_objects(tree.repository, target)
    (target / "mine").unlink()
    lay_out_objects(tree.repository, target)
    other = RepoTree(tmp_path / "other")
    with pytest.raises(NotFound):
        lay_out_objects(other.repository, target)
    other.publish("tested")
    with pytest.raises(NotOurs, match="is laid out from "):
        lay_out_objects(other.repository, target)
    for within in (tree.top, tree.top / "objects", tree.top.parent):
        with pytest.raises(UsageError, match="are within each other"):
            lay_out_objects(tree.repository, within)


def test_rpm(tmp_path: Path) -> None:
    """Each channel has a directory of its own, that dnf reads by a server without links."""
    tree, target = RepoTree(tmp_path / "repository", format="rpm"), tmp_path / "objects"
    one, two = rpm("one"), rpm("two")
    tree.publish_files("tested", one)
    tree.publish_files("experimental", one, two)
    lay_out_objects(tree.repository, target)
    assert not [path for path in target.rglob("*") if path.is_symlink()]
    with Server(target) as server:
        for channel, wanted in (("tested", [one]), ("experimental", [one, two])):
            home = tmp_path / f"dnf-{channel}"
            url = f"{server.url}/channels/{channel}"
            argv = [
                "dnf", "-q", "-y", f"--installroot={home}", "--releasever=1", "--setopt=reposdir=",
                f"--repofrompath=kata,{url}", "--repoid=kata", "--nogpgcheck", "install",
                "--downloadonly", f"--downloaddir={home}/got", *(p.name.split("-")[0] for p in wanted),
            ]  # fmt: skip
            done = subprocess.run(argv, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            got = {path.name: path.read_bytes() for path in (home / "got").iterdir()}
            assert got == {path.name: path.read_bytes() for path in wanted}
    tree.publish_files("experimental", rpm("three"))
    again = lay_out_objects(tree.repository, target)
    assert again.written == 5, "a package, three indexes, repomd.xml"


@pytest.mark.parametrize("step", range(1, 40, 3))
def test_killed_at_any_file(tree: RepoTree, tmp_path: Path, step: int, monkeypatch) -> None:
    """Old or new, and the next run ends it."""
    target = tmp_path / "objects"
    lay_out_objects(tree.repository, target)
    tree.publish("tested", *((f"n{n}", make_deb(f"n{n}")) for n in range(10)))
    left = [step]

    class Killed(BaseException):
        pass

    def dies(name: str):
        real = getattr(Path, name)

        def instead(*args, **kwargs):
            if args[0].is_relative_to(target):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
            return real(*args, **kwargs)

        return instead

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies("replace"))
        patch.setattr(Path, "unlink", dies("unlink"))
        try:
            lay_out_objects(tree.repository, target)
        except Killed:
            check_plain(target, "tested", "experimental", by_hash=True)
    lay_out_objects(tree.repository, target)
    check_plain(target, "tested", "experimental")
    assert not list(target.rglob(".n*"))
