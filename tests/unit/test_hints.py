"""Hints follow from what a tool said: here from what tools did say, recorded (mmdebstrap 1.3.5, apt
2.6.1, unshare of util-linux 2.38.1), and from what they say while this runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from host.files import file_error
from host.hints import Hint
from host.run import Runner
from inventory.errors import CommandFailed, NoSpace, spelled
from provision.guest import debian
from provision.guest.debian import build_image, load_recipe

ROOT = Path(__file__).resolve().parents[2]
END = """\
I: main() received signal PIPE: waiting for setup...
I: removing tempdir /tmp/mmdebstrap.kIEKg2TyxZ...
E: mmdebstrap failed to run
"""
UPDATE = "E: apt-get update --error-on=any -oAPT::Status-Fd=<$fd> -oDpkg::Use-Pty=false failed\n"
# What was said, which line tells, and the words of the remedy
SAID = {
    "name": (
        "Err:1 http://mirror.invalid/debian bookworm InRelease\n"
        "  Could not resolve 'mirror.invalid'\n"
        "Reading package lists...\n"
        "E: Failed to fetch http://mirror.invalid/debian/dists/bookworm/InRelease  Could not resolve "
        "'mirror.invalid'\n"
        "E: Some index files failed to download. They have been ignored, or old ones used instead.\n"
        + UPDATE,
        "Could not resolve 'mirror.invalid'",
        ("/etc/resolv.conf", "mirror.invalid"),
    ),
    "refused": (
        "  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)\n"
        "Reading package lists...\n"
        "E: Failed to fetch http://127.0.0.1:9/debian/dists/bookworm/InRelease  Could not connect to "
        "127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)\n" + UPDATE,
        "Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)",
        ("127.0.0.1:9 is out of reach", "proxies"),
    ),
    "no suite": (
        "Err:2 http://127.0.0.1:18991 bookworm Release\n"
        "  404  File not found [IP: 127.0.0.1 18991]\n"
        "E: The repository 'http://127.0.0.1:18991 bookworm Release' does not have a Release file.\n"
        + UPDATE,
        "E: The repository 'http://127.0.0.1:18991 bookworm Release' does not have a Release file.",
        ("no bookworm", "sources.list"),
    ),
    "empty": (
        "I: Pinned packages:\n"
        "E: apt-get update did not find any indices for architecture 'amd64' in suite 'bookworm'\n",
        "E: apt-get update did not find any indices for architecture 'amd64' in suite 'bookworm'",
        ("no bookworm",),
    ),
    "unsigned": (
        "E: The repository 'http://127.0.0.1:18991 bookworm Release' is not signed.\n" + UPDATE,
        "E: The repository 'http://127.0.0.1:18991 bookworm Release' is not signed.",
        ("no signature",),
    ),
    "key": (
        "Err:1 http://mirror.example/debian bookworm InRelease\n"
        "  The following signatures couldn't be verified because the public key is not available: "
        "NO_PUBKEY 6ED0E7B82643E131 NO_PUBKEY 78DBA3BC47EF2265\n"
        "E: The repository 'http://mirror.example/debian bookworm InRelease' is not signed.\n" + UPDATE,
        "The following signatures couldn't be verified because the public key is not available: "
        "NO_PUBKEY 6ED0E7B82643E131 NO_PUBKEY 78DBA3BC47EF2265",
        ("debian-archive-keyring",),
    ),
    "gpgv": (
        "  gpgv, gpgv2 or gpgv1 required for verification, but neither seems installed\n"
        "E: The repository 'http://mirror.example/debian bookworm InRelease' is not signed.\n" + UPDATE,
        "gpgv, gpgv2 or gpgv1 required for verification, but neither seems installed",
        ("apt-get install gpgv", "/dev/null"),
    ),
    "clock behind": (
        "E: Release file for http://127.0.0.1:18991/dists/bookworm/Release is not valid yet (invalid "
        "for another 8d 23h 59min 50s). Updates for this repository will not be applied.\n" + UPDATE,
        "E: Release file for http://127.0.0.1:18991/dists/bookworm/Release is not valid yet (invalid "
        "for another 8d 23h 59min 50s). Updates for this repository will not be applied.",
        ("clock", "behind"),
    ),
    "clock ahead": (
        "E: Release file for http://127.0.0.1:18991/dists/bookworm/Release is expired (invalid since 3d "
        "0h 0min 1s). Updates for this repository will not be applied.\n" + UPDATE,
        "E: Release file for http://127.0.0.1:18991/dists/bookworm/Release is expired (invalid since 3d "
        "0h 0min 1s). Updates for this repository will not be applied.",
        ("clock", "ahead"),
    ),
    "room": (
        "Err:4 http://mirror.example/debian bookworm/main amd64 Packages\n"
        "  Write error - write (28: No space left on device)\n"
        "E: Failed to fetch http://mirror.example/debian/dists/bookworm/main/binary-amd64/Packages  "
        "Write error - write (28: No space left on device)\n" + UPDATE,
        "Write error - write (28: No space left on device)",
        ("make room on the file system of /the/cache",),
    ),
    "noexec": (
        "I: installing essential packages...\n"
        "chroot: failed to run command \u2018dpkg\u2019: Permission denied\n"
        "E: setup failed: E: env --unset=TMPDIR chroot /tmp/x dpkg --install failed\n",
        "chroot: failed to run command \u2018dpkg\u2019: Permission denied",
        ("noexec", "/the/cache"),
    ),
    "own package": (
        "Building dependency tree...\nE: Unable to locate package no-such-package\n"
        "E: setup failed: E: apt-get --yes install openssh-server no-such-package failed\n",
        "E: Unable to locate package no-such-package",
        ("'packages' of the template in the farm file",),
    ),
    "the recipe's package": (
        "Building dependency tree...\nE: Unable to locate package openssh-server\n"
        "E: setup failed: E: apt-get --yes install openssh-server no-such-package failed\n",
        "E: Unable to locate package openssh-server",
        ("templates/recipes/debian-12.yaml",),
    ),
    "root that is no mount point": (
        "unshare: cannot change root filesystem propagation: Invalid argument\n",
        "unshare: cannot change root filesystem propagation: Invalid argument",
        ("mount --bind",),
    ),
    "no rights": (
        "unshare: unshare failed: Operation not permitted\n",
        "unshare: unshare failed: Operation not permitted",
        ("CAP_SYS_ADMIN",),
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_builders_said(case: str) -> None:
    said, line, words = SAID[case]
    recipe = load_recipe("debian-12", packages=["no-such-package"])
    found = debian._hint(said + END, recipe, Path("/the/cache"))
    assert found.line == line
    for word in words:
        assert word in found.remedy
    assert "{" not in found.remedy


def test_where_nothing_is_known_there_is_no_hint() -> None:
    recipe = load_recipe("debian-12")
    said = "I: cleaning package lists and apt cache...\nE: the moon is in the wrong phase\n" + END
    assert debian._hint(said, recipe, Path("/x")) == Hint()


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A build of the recipe that ships, with these sources: the error, and the log."""

    def build(source: str) -> tuple[CommandFailed, Path]:
        def sources(_suite: str, work: Path) -> list[Path]:
            (work / "host.list").write_text(source)
            return [work / "host.list"]

        monkeypatch.setattr(debian, "write_sources", sources)
        monkeypatch.setattr(debian, "apt_settings", lambda _runner: "")
        place = tmp_path / 'a "b" c:d,e=%\''  # which apt can't be told of
        place.mkdir(mode=0o711)
        log = place / "build.log"
        recipe = replace(load_recipe("debian-12"), variant="custom")
        with pytest.raises(CommandFailed) as caught:
            build_image(
                Runner(), recipe, size=2**30, out=place / "x.qcow2",
                packages=place / "x.packages", log=log,
            )  # fmt: skip
        return caught.value, log

    return build


def test_a_mirror_that_refuses(failed) -> None:
    error, log = failed("deb [trusted=yes] http://127.0.0.1:9/debian bookworm main\n")
    assert error.message.startswith("recipe debian-12 can't be built: Could not connect to 127.0.0.1:9")
    assert error.remedy.startswith("127.0.0.1:9 is out of reach") and str(log) in error.remedy
    assert log.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in log.parent.iterdir() if not p.name.startswith(".")) == [log.name]


# All of / in a directory that is no mount point by itself
CHROOT = """
for place in /*; do
    if [ -h "$place" ]; then cp -P "$place" "$1"
    elif [ -d "$place" ]; then mkdir "$1$place" && mount --rbind "$place" "$1$place" || exit 9; fi
done
shift_to=$1; shift
exec chroot "$shift_to" "$@"
"""
START = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hypervisors.libvirt.private import PrivateLibvirt
from inventory.errors import FarmhandError, spelled
place = Path(sys.argv[2])
try:
    PrivateLibvirt(place / "s", place / "r", place / "c", True).uri()
except FarmhandError as error:
    print(error.message)
    print(error.remedy)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="root's libvirtd is what needs a mount namespace")
@pytest.mark.parametrize("lacks", ["rights", "a mount point", "room"])
def test_what_the_private_libvirtd_can_not_do_without(lacks: str) -> None:
    with tempfile.TemporaryDirectory(prefix="fh") as name:
        place, bare = Path(name, "place"), Path(name, "bare")
        place.mkdir()
        bare.mkdir()
        start = [sys.executable, "-P", "-c", START, str(ROOT), str(place)]
        if lacks == "rights":
            start = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *start]
        elif lacks == "a mount point":
            start = ["unshare", "-m", "sh", "-c", CHROOT, "sh", str(bare), *start]
        else:
            full = 'mount -t tmpfs -o size=64k,mode=700 none "$0"; cat /dev/zero >"$0/x" 2>&-; exec "$@"'
            start = ["unshare", "-m", "sh", "-c", full, str(place), *start]
        done = subprocess.run(
            start, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
    message, remedy = done.stdout.splitlines()
    if lacks == "rights":
        assert message == "the private libvirtd did not start: unshare: Operation not permitted"
        assert "CAP_SYS_ADMIN" in remedy
    elif lacks == "a mount point":
        assert message == "the private libvirtd did not start: mount none on /: Invalid argument"
        assert "mount --bind" in remedy and "CAP_SYS_ADMIN" not in remedy
    else:
        assert "No space left on device" in message
        assert remedy.startswith(f"make room on the file system of {place}")


def test_a_file_error_s_remedy_follows_from_its_number(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, words in ((file / "x", "a file is where a directory"), (tmp_path, "a directory is where")):
        with pytest.raises(OSError) as caught:
            path.write_bytes(b"")
        assert words in file_error(caught.value, path, "write").remedy
    with pytest.raises(OSError) as caught, Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")
    assert isinstance(file_error(caught.value, Path("/dev/full"), "write"), NoSpace)


def test_what_can_not_be_run_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    dull = tmp_path / "dull"
    dull.write_text("not a program")
    with pytest.raises(CommandFailed) as caught:
        Runner().read(dull)
    assert "Permission denied" in caught.value.message and not caught.value.remedy
    with pytest.raises(CommandFailed) as caught:
        Runner().read("farmhand-no-such-command")
    assert spelled(caught.value.remedy).startswith("install it")
