import tarfile
from pathlib import Path

import pytest

from inventory.errors import NotFound
from provision.guest.debian import _write_overlay, load_recipe, mounts_below, write_sources

DEB822 = """Types: deb
URIs: http://mirror.invalid/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

# another
Types: deb
URIs: http://mirror.invalid/security
Suites: bookworm-security
Components: main
"""
THIRD = """Types: deb
URIs: http://third.invalid/debian
Suites: bookworm
Components: stable
"""


def test_the_digest_follows_all_that_goes_in() -> None:
    plain = load_recipe("debian-12")
    digests = {
        plain.digest(4 << 30),
        plain.digest(5 << 30),
        load_recipe("debian-12", packages=("gdb",)).digest(4 << 30),
        load_recipe("debian-12", logins={"root": ("ssh-ed25519 A",)}).digest(4 << 30),
        load_recipe("debian-12", paravirtual=True).digest(4 << 30),
    }
    assert len(digests) == 5
    assert plain.digest(4 << 30) == load_recipe("debian-12").digest(4 << 30)


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(NotFound) as caught:
        load_recipe("debian-13")
    assert "debian-12" in caught.value.remedy


def test_our_files_belong_to_root_and_say_nothing_of_the_builder(tmp_path: Path) -> None:
    out = tmp_path / "o.tar"
    _write_overlay(load_recipe("debian-12", logins={"aleksi": ("ssh-ed25519 A",)}), out)
    with tarfile.open(out) as tar:
        members = {m.name: m for m in tar.getmembers()}
        assert all(m.uid == 0 and m.gid == 0 and m.mtime == 0 for m in members.values())
        assert members["usr/lib/farmhand/firstboot"].mode == 0o755
        assert members["etc/systemd/system"].isdir()
        assert members["etc/tmpfiles.d/systemd-nologin.conf"].issym()
        keys = tar.extractfile("usr/lib/farmhand/build/keys/aleksi")
        assert keys is not None
        assert keys.read() == b"ssh-ed25519 A\n"


def test_the_machine_s_own_debian_sources_are_used(tmp_path: Path) -> None:
    etc, work = tmp_path / "apt", tmp_path / "work"
    (etc / "sources.list.d").mkdir(parents=True)
    work.mkdir()
    assert write_sources("bookworm", work, etc) == []
    (etc / "sources.list.d/debian.sources").write_text(DEB822)
    (etc / "sources.list.d/third.sources").write_text(THIRD)
    (etc / "sources.list").write_text(
        "# deb http://off.invalid/debian bookworm main\n"
        "deb [signed-by=/k.gpg] http://list.invalid/debian bookworm main\n"
        "deb-src http://src.invalid/debian bookworm main\n"
        "deb http://third.invalid/debian bookworm stable\n"
    )
    found = {path.name: path.read_text() for path in write_sources("bookworm", work, etc)}
    assert found["host.list"] == "deb [signed-by=/k.gpg] http://list.invalid/debian bookworm main\n"
    assert found["host.sources"].count("Types: deb") == 2
    assert "third" not in found["host.sources"]
    assert write_sources("trixie", work, etc) == []


def test_mounts_are_seen_before_anything_is_removed(tmp_path: Path) -> None:
    root = f"{tmp_path}/a b/root".replace(" ", "\\040")
    info = "".join(
        f"36 35 98:0 / {point} rw,noatime - ext3 /dev/root rw\n"
        for point in (
            "/",
            "/proc",
            f"{root}/dev",
            f"{root}/dev/pts",
            f"{tmp_path}/a bc/x".replace(" ", "\\040"),
        )
    )
    below = mounts_below(tmp_path / "a b", info)
    assert below == [f"{tmp_path}/a b/root/dev/pts", f"{tmp_path}/a b/root/dev"]


def test_what_is_in_debian_12_by_itself() -> None:
    packages = set(load_recipe("debian-12").packages)
    assert {"ca-certificates", "curl", "git", "qemu-guest-agent"} <= packages
