"""Package repositories with keys: signed, rotated, no longer signed; and what clients are told."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from inventory.errors import FarmhandError, spelled
from provision.package_repositories import client_source
from tests.repos import FORMATS, RepoFarm, contents, read_all
from tests.unit.test_signing import Admin


@pytest.fixture(scope="module")
def admin() -> Iterator[Admin]:
    with tempfile.TemporaryDirectory(prefix="fh") as place:
        made = Admin(Path(place, "home"))
        yield made
        made.close()


@pytest.fixture(scope="module")
def keys(admin: Admin) -> tuple[str, str]:
    return admin.make("first"), admin.make("second")


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fh", dir="/dev/shm") as place:
        monkeypatch.setenv("FARMHAND_STATE_DIR", f"{place}/s")
        monkeypatch.setenv("FARMHAND_RUNTIME_DIR", f"{place}/r")
        yield Path(place)


@pytest.fixture(params=FORMATS)
def repo(request: pytest.FixtureRequest, state: Path) -> RepoFarm:
    return RepoFarm(state, request.param)


def signed_by(repo: RepoFarm, admin: Admin, *keys: str) -> None:
    lines = "".join(f"  - {{fingerprint: {key}, home: {admin.home}}}\n" for key in keys)
    repo.declare(f"signing:\n{lines}" if keys else "")


def verified(tree: Path, keyring: Path) -> bool:
    """By gpgv, as clients do, with the keys of that file alone."""
    files = [tree / "repodata/repomd.xml.asc", tree / "repodata/repomd.xml"]
    if (tree / "dists").exists():
        (suite,) = (tree / "dists").iterdir()
        files = [suite / "Release.gpg", suite / "Release"]
        inline = _gpgv(keyring, suite / "InRelease")
        assert inline == _gpgv(keyring, *files)
    return _gpgv(keyring, *files)


def _gpgv(keyring: Path, *files: Path) -> bool:
    words = ["gpgv", "--status-fd", "1", "--homedir", keyring.parent, "--keyring", keyring, *files]
    told = subprocess.run(words, check=False, capture_output=True).stdout
    return b" GOODSIG " in told and b" BADSIG " not in told  # apt too takes one of several


def keyring_of(repo: RepoFarm, number: int) -> Path:
    """From what a client that pins the generation is told."""
    pinned = repo.repository.generation(str(number))
    source = client_source(repo.repository, "experimental", pinned, plain=False)
    assert source.armour and source.key
    path = repo.top / source.key.removeprefix("http://packages.example/r/")
    assert path.read_bytes() == source.armour
    plain = repo.file.with_name(f"{number}.gpg")
    plain.unlink(missing_ok=True)
    subprocess.run(["gpg", "--dearmor", "--output", plain, path], check=True, capture_output=True)
    return plain


def test_unsigned_signed_rotated_and_unsigned_again(
    repo: RepoFarm, admin: Admin, keys: tuple[str, str]
) -> None:
    first, second = keys
    for number, by in enumerate([(), (first,), (first, second), (second,), ()], 1):
        signed_by(repo, admin, *by)
        repo.add(repo.package(f"p{number}"))
        assert repo.fsck() == []
        source = client_source(repo.repository, "experimental", None, plain=False)
        assert (source.armour is not None) == bool(by), "as the channel is now"
        text = repo.repository.format.stanza(source)
        assert ("Trusted: yes" in text or "repo_gpgcheck=0" in text) == (not by)
    rings = {number: keyring_of(repo, number) for number in (2, 3, 4)}
    trees = {number: repo.top / f"generations/{number}" for number in rings}
    assert all(verified(trees[number], ring) for number, ring in rings.items())
    assert verified(trees[3], rings[2]), "clients that have the old key"
    assert verified(trees[3], rings[4]) == (repo.kind == "deb"), (
        "of an rpm repository the first key signs"
    )
    assert not verified(trees[4], rings[2])
    for number in (1, 5):
        pinned = repo.repository.generation(str(number))
        assert client_source(repo.repository, "experimental", pinned, plain=True).key is None
    read_all(repo.top)
    repo.declare("keep: 1\nkeep_for: 60s\ngrace: 60s")
    repo.age(timedelta(minutes=5))
    repo.gc()
    assert list((repo.top / ".farmhand/keys").iterdir()) == [], "nothing is signed by them any more"
    assert repo.fsck() == []


def test_signed_anew_with_another_key(repo: RepoFarm, admin: Admin, keys: tuple[str, str]) -> None:
    signed_by(repo, admin, keys[0])
    repo.add(repo.package())
    signed_by(repo, admin, keys[1])
    assert not repo.add(repo.package()).changed
    repo.rollback(to=1)
    assert verified(repo.top / "channels/experimental", repo.top / "key.gpg")
    assert verified(repo.top / "channels/experimental", keyring_of(repo, 2))
    assert repo.fsck() == []


def test_a_key_that_has_expired_publishes_nothing(repo: RepoFarm, admin: Admin) -> None:
    old = admin.make(f"expired-{repo.kind}", until="1d", at="20250101T000000")
    repo.add(repo.package())
    before = contents(repo.top)
    signed_by(repo, admin, old)
    with pytest.raises(FarmhandError, match="expired on 2025-01-02"):
        repo.add(repo.package("other"))
    assert contents(repo.top) == before
    assert repo.read() == ["hello 1.0-1"]


@pytest.mark.parametrize("what", ["signature", "key", "known", "expired"])
def test_fsck_of_what_is_signed(repo: RepoFarm, admin: Admin, keys: tuple[str, str], what: str) -> None:
    signed_by(repo, admin, keys[0])
    repo.add(repo.package())
    assert repo.fsck() == []
    if what == "signature":
        names = ["repodata/repomd.xml.asc"]
        if repo.kind == "deb":
            names = [f"dists/experimental/{name}" for name in ("InRelease", "Release.gpg")]
        for name in names:
            path = repo.top / "generations/1" / name
            data = path.read_bytes()
            path.unlink()
            assert any(name in line and "can't be read" in line for line in repo.fsck())
            lines = data.splitlines()
            at = len(lines) - 4
            lines[at] = lines[at][:-2] + b"A" + lines[at][-1:]
            path.write_bytes(b"\n".join(lines) + b"\n")
            assert any(name in line and "signature is not right" in line for line in repo.fsck())
    elif what == "known":
        for path in (repo.top / ".farmhand/keys").iterdir():
            path.unlink()
        assert any("the keys of a generation" in line for line in repo.fsck())
    elif what == "key":
        (repo.top / "key.gpg").unlink()
        assert any(line.startswith("key.gpg: it has not the keys") for line in repo.fsck())
        repo.rollback(to=1)
        assert repo.fsck() == []
    else:
        (repo.top / "published/experimental/1").rename(repo.top / "published/experimental/9")
        (repo.top / "channels/experimental").unlink()
        assert any("it is gone" in line for line in repo.fsck())


def test_remedies_of_fsck_can_be_done(repo: RepoFarm) -> None:
    repo.add(repo.package())
    index = next(p for p in (repo.top / "published/experimental/1").rglob("*") if ".gz" in p.name)
    data = index.read_bytes()
    index.unlink()
    index.write_bytes(data[:-1] + b"?")
    found = repo.fsck()
    assert any("repo-rollback --repo packages --channel experimental --to 1" in line for line in found)
    repo.rollback(to=1)
    assert not [line for line in repo.fsck() if "generations/1/" not in line]
    with pytest.raises(FarmhandError) as caught:
        repo.rollback(to=5)
    assert "repo-log" in spelled(caught.value.remedy)
