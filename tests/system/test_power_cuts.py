"""The plug of the whole lab pulled while operations run on ZFS, LVM thin and LVM classic at once; booted
again, recovered: each disk is what it was before the operation or what it is after it, nothing is left.

Four cuts; FARMHAND_CUTS says how many, FARMHAND_SEED draws the same operations and moments again (how
far they come by then depends on the machine).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from typing import Any

import pytest

from host.run import Runner
from tests.lab.machine import Machine

pytestmark = [pytest.mark.system, pytest.mark.timeout(7200)]
CUTS = int(os.environ.get("FARMHAND_CUTS") or 4)
SEED = os.environ.get("FARMHAND_SEED") or str(random.SystemRandom().randrange(10**6))
HOSTS = ("zfs", "thin", "linked")
LONGEST = 25.0  # seconds of work before a cut
# No KVM: whether it works would be found out anew after each boot, and no machine is started here.
SCRIPT = (
    "rm -f /dev/kvm; cd /root/farmhand && PYTHONPATH=.:tests/faults PYTHONDONTWRITEBYTECODE=1 "
    "exec /opt/venv/bin/python tests/faults/cuts.py"
)


class Worker:
    """Operations on one host, as they are told."""

    def __init__(self, machine: Machine, host: str, seed: str, vms: dict[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            machine.ssh_argv(f"{SCRIPT} work {host} {seed}"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdin
        self._process.stdin.write(json.dumps(vms) + "\n")
        self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.lines.append(json.loads(line))

    def runs(self) -> bool:
        return self._process.poll() is None

    def end(self) -> str:
        """After the cut. What it said on standard error."""
        self._process.kill()
        self._reader.join()
        assert self._process.stderr
        text = self._process.stderr.read()
        self._process.wait()
        return text


def test_power_cuts() -> None:
    dice = random.Random(SEED)
    machine = Machine("system-cuts", Runner(), print)
    machine.remove()
    machine.start(temporary=True)
    counts: dict[str, int] = {}
    try:
        machine.deliver_tree()
        vms: dict[str, Any] = json.loads(machine.run(f"{SCRIPT} prepare", timeout=600).stdout)
        for cut in range(1, CUTS + 1):
            workers = [Worker(machine, host, f"{SEED}x{cut}", vms) for host in HOSTS]
            limit = time.monotonic() + 300
            while not all(worker.lines for worker in workers):  # Python takes its time to start there
                assert time.monotonic() < limit
                assert all(worker.runs() for worker in workers), [worker.end() for worker in workers]
                time.sleep(0.1)
            time.sleep(dice.random() * LONGEST)
            assert all(worker.runs() for worker in workers), [worker.end() for worker in workers]
            machine.pull_the_plug()
            told = [worker.end() for worker in workers]
            allowed = {vm: [now] for vm, now in vms.items()}
            story = []
            for worker in workers:
                for line in worker.lines:
                    both = [line["before"], line["after"]] if "verb" in line else [line["done"]]
                    if line.get("verb") == "write":
                        both.append({**line["after"], "letter": "?"})
                    allowed[line["vm"]] = both
                last = worker.lines[-1]
                what = last.get("verb", "nothing")
                counts[what] = counts.get(what, 0) + 1
                story.append(f"{last['vm']}: {what}, after {len(worker.lines)} lines")
            context = f"cut {cut}, FARMHAND_SEED={SEED}: {'; '.join(story)}"
            machine.boot_again()
            answer = machine.run(f"{SCRIPT} check", timeout=600)
            report = json.loads(answer.stdout)
            print(f"{context}\n  {report}")
            assert all("marked" in text for text in report["removed"]), f"{context}\n{report}"
            for vm, found in report["vms"].items():
                vms[vm] = _settled(allowed[vm], found, f"{context}\n{report}\n{told}")
        print(f"{CUTS} cuts of 3 stores at work, amid {counts}, losses 0")
    finally:
        machine.remove()


def _settled(allowed: list[Any], found: Any, context: str) -> Any:
    """Which of the allowed it is, the newest first."""
    for state in reversed(allowed):
        if state is None or found is None:
            if state is found:
                return state
        elif set(state["kept"]) == set(found["kept"]) and state["letter"] in ("?", found["letter"]):
            return state
    raise AssertionError(f"{context}\nfound {found}, allowed {allowed}")
