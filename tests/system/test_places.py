"""A VM under a private libvirtd, whatever the umask and the directories' names, as root and as an
ordinary user; and each thing that was made has the mode that we mean it to have."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

from tests import boot_sector

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.system
NOBODY = 65534
FARM = """\
farm: try
templates: {base: {import: raw.img}}
vms: {a: {memory: 64M}}
"""
# For the state: all at once. For the sockets: an ordinary user's libvirt can't do ',' and '='.
AWKWARD = '-Jo o\'b "x" a:b %d%% k,=v ü {} $H \\t #;'
SHORT = "-ü\" :%'\\#;"
CACHE = 'c a;c,h"e=%'

OWN, PASSED, SECRET, SEEN = 0o700, 0o711, 0o600, 0o644
# By path below state/, cache/ or run/. None: libvirt's own, whose place tells how far others come. What
# is in no row is not to be written by others.
MODES: tuple[tuple[str, int | None], ...] = (
    (r"state(/farms(/try(/(consoles|seeds|disks(/(templates|vms(/try-a)?))?)?)?)?)?", PASSED),
    (r"state/farms/try/(keys(/hostkeys)?|locks)", OWN),
    (r"state/farms/try/keys/(id_ed25519|hostkeys/a)", SECRET),
    (r"state/farms/try/keys/(id_ed25519\.pub|hostkeys/a\.pub|hostkeys/\.known_hosts)", SEEN),
    (r"state/(claims\.db|farms/try/(journal\.db(-wal|-shm)?|locks/[\w.-]+\.lock))", SECRET),
    (r"state/farms/try/(seeds/try-a\.(iso|sum)|consoles/try-a\.log)", SECRET),
    (r"state/farms/try/disks/(\.lock|vms/try-a/disk\.qcow2)", SECRET),
    (r"state/farms/try/disks/(templates/base@1\.json|vms/try-a/owner\.json)", SEEN),
    (r"state/farms/try/disks/templates/base@1\.qcow2", 0o400),
    (r"state/farms/try/generations\.json", SEEN),
    (r"state/farms/try/libvirt(/(etc|lib|log|etc/libvirt))?", PASSED),
    (r"state/farms/try/libvirt/(etc/(libvirtd|qemu)\.conf|log/libvirtd\.log)", SECRET),
    (r"state/farms/try/libvirt/etc/libvirt/qemu\.conf", SECRET),
    (r"state/farms/try/libvirt/etc/(passwd|group)", SEEN),
    (r"state/farms/try/libvirt/(etc|lib|log)/.+", None),
    (r"run", PASSED),
    (r"cache/images", OWN),
    (r"cache/images/\.(lock|running)", SECRET),
    (r"cache/libvirt", PASSED),
    (r"cache/libvirt/.+", None),
    (r"run/try(/(k|run))?", PASSED),
    (r"run/try/lock", SECRET),
    (r"run/try/run/.+", None),
)
# An ordinary user's QEMU is the user: nobody else need pass through here
USERS: tuple[tuple[str, int | None], ...] = (
    (r"run/try", OWN),
    (r"state/farms/try/libvirt/log", OWN),
    (r"cache/libvirt", OWN),
)


class Place:
    def __init__(self, directory: Path, umask: int, user: bool) -> None:
        self.directory = directory
        self.umask = umask
        self.tops = {
            "state": directory / AWKWARD / "state",
            "cache": directory / CACHE,
            "run": directory / SHORT,
        }
        self.farm = directory / "try.yaml"
        self.farm.write_text(FARM)
        with (directory / "raw.img").open("wb") as image:
            image.write(boot_sector.IDLE)
            image.truncate(2**20)
        # Not root, but the checkout and its Python may be where only root comes
        self.drop = (
            ["setpriv", "--reuid", f"{NOBODY}", "--regid", f"{NOBODY}", "--clear-groups",
             "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
            if user and os.geteuid() == 0 else []
        )  # fmt: skip
        (directory / AWKWARD).mkdir(mode=0o755)
        (directory / AWKWARD).chmod(0o755)
        if self.drop:
            for path in (directory, directory / AWKWARD):
                os.chown(path, NOBODY, NOBODY)

    def __call__(self, *words: str) -> dict[str, object]:
        invoke = [sys.executable, "-P", ROOT / "cli" / "start.py", "--search-root", ROOT]
        done = subprocess.run(
            [*self.drop, *invoke, *words, "--json"],
            cwd=self.directory / AWKWARD,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("FARMHAND_")},
                "HOME": str(self.directory),
                "FARMHAND_STATE_DIR": "state",  # from where we are on; the others from /
                "FARMHAND_CACHE_DIR": str(self.tops["cache"]),
                "FARMHAND_RUNTIME_DIR": str(self.tops["run"]),
                "FARMHAND_FARM": str(self.farm),
            },
            umask=self.umask, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        data = json.loads(done.stdout)
        assert isinstance(data, dict)
        return data

    def made(self) -> Iterator[tuple[str, int]]:
        """Each thing that is there, named from its top on, but symbolic links and sockets."""
        for name, top in self.tops.items():
            for path in (top, *sorted(top.rglob("*"))):
                seen = path.lstat().st_mode
                if stat.S_ISDIR(seen) or stat.S_ISREG(seen):
                    yield "/".join((name, *path.relative_to(top).parts)), stat.S_IMODE(seen)


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fh"))
    path.chmod(0o755)
    yield path
    rmtree(path)


@pytest.mark.parametrize(
    ("who", "umask"),
    [("root", 0o000), ("root", 0o027), ("root", 0o077), ("user", 0o000), ("user", 0o077)][
        0 if os.geteuid() == 0 else 3 :
    ],
)
def test_a_vm_runs_and_modes_are_ours(directory: Path, who: str, umask: int) -> None:
    place = Place(directory, umask, who == "user")
    try:
        place("clone-farm", "--no-wait")
        vms = place("status")["vms"]
        assert [(vm["vm"], vm["state"]) for vm in vms] == [("a", "running")]  # type: ignore[attr-defined]
        rows = (*USERS, *MODES) if who == "user" else MODES
        wrong, met = [], set()
        for path, mode in place.made():
            for pattern, wanted in rows:
                if re.fullmatch(pattern, path):
                    met.add(pattern)
                    if wanted is not None and mode != wanted:
                        wrong.append(f"{path} is {mode:o}, not {wanted:o}")
                    break
            else:
                if mode & 0o022:
                    wrong.append(f"{path} is {mode:o}")
        assert not wrong
        assert len(met) > 15
    finally:
        place("destroy", "--all", "--purge")
    assert not (place.tops["state"] / "farms" / "try").exists()
