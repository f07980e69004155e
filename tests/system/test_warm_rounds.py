"""A booted Debian kept and put back, disk and memory, round after round: what its disk has and what its
processes know is of the checkpoint's moment each time. By name, for it takes minutes:

./invoke test --only tests/system/test_warm_rounds.py
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_demo import ROOT, Place

pytestmark = [pytest.mark.system, pytest.mark.timeout(7200)]

ROUNDS = int(os.environ.get("FARMHAND_ROUNDS", "100"))
_COUNTER = """\
nohup sh -c 'n=0; while :; do n=$((n + 1)); echo $n >/run/count; sleep 0.2; done' >/dev/null 2>&1 &
echo $! >/run/counter
"""


class KeptVm(Place):
    """The farm of one VM, and what is typed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        farm = yaml.safe_load((ROOT / "inventory" / "default.yaml").read_text())
        farm |= {"farm": "rounds", "vms": {"dev2": {"memory": "512M", "reset_to": "warm"}}}
        path = directory / "farm.yaml"
        path.write_text(yaml.safe_dump(farm))
        self.environment["FARMHAND_FARM"] = str(path)

    def said(self, command: str) -> str:
        done = self("ssh", "--vm", "dev2", "--command", command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def typed(self, *words: str) -> str:
        done = self(*words)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def kept() -> Iterator[KeptVm]:
    directory = Path(tempfile.mkdtemp(prefix="fhw"))
    directory.chmod(0o711)  # QEMU runs as another user and passes through
    vm = KeptVm(directory)
    try:
        vm.typed("clone-farm")
        yield vm
    finally:
        vm("destroy", "--all", "--yes")
        shutil.rmtree(directory, ignore_errors=True)


def test_round_after_round_disk_and_memory_are_those_of_the_checkpoint(kept: KeptVm) -> None:
    (found,) = kept.json("status")["vms"]
    assert "warm" in found["warm"], "clone-farm has kept it"
    kept.said(_COUNTER)
    process = kept.said("cat /run/counter")
    for number in range(1, ROUNDS + 1):
        name = f"ready-{number}"
        count = int(kept.said(f"echo {number} >/root/round; sync; cat /run/count"))
        kept.typed("checkpoint", "--vm", "dev2", "--name", name, "--warm")
        later = int(kept.said("cat /run/count"))
        assert later > count, "it runs on"
        kept.said(f"echo lost >/root/round; sync; kill {process}; rm /run/count")
        kept.typed("reset", "--vm", "dev2", "--to", name)
        round_, alive, now, clock = kept.said(
            f"cat /root/round; kill -0 {process} && echo yes; cat /run/count; date +%s"
        ).split()
        assert (int(round_), alive) == (number, "yes")
        assert int(now) >= count, "its memory is of that moment"
        assert abs(int(clock) - int(time.time())) <= 2
    assert kept.json("reset", "--vm", "dev2")["ok"], "and to the one that clone-farm made"
    assert kept.said("cat /root/round 2>/dev/null || echo none") == "none"
