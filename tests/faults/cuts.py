"""Run in the lab by tests/system/test_power_cuts.py: one farm with a host for each store, on the spare
disks, with machines of the farm's own libvirtd; and what is done with it until the power is cut.

    prepare     pools, groups and the template
    work HOST SEED    operations drawn at random on that host's VMs, told on standard output before each
                      and after it, without end
    check       recovers, and tells what there is

The VMs as they should be come as JSON on standard input, and go as JSON on standard output: name to
{"letter": of its content, "kept": {checkpoint: letter}}, or null for one that isn't there. A letter "?"
is not known: the power was cut while it was written, which is the guest's own matter.
"""

from __future__ import annotations

import json
import os
import random
import string
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from places import SIZE, TEMPLATE, LvmPlace, Place, ZfsPlace, run

import cli.composition  # noqa: F401
from hypervisors.api import Template
from inventory.errors import Text, spelled
from inventory.loader import load
from provision.engine.report import Reporter
from provision.guest.identity import seed_file
from provision.member import Member
from provision.site import Site
from tests import farm

PLACES: dict[str, Place] = {
    "zfs": ZfsPlace("cutpool", 1),
    "thin": LvmPlace("cutthin", "pool", "lvm-thin"),
    "linked": LvmPlace("cutlinked", "", "lvm-linked"),
}
HERE = Path("/root/cuts")
FARM = """\
farm: cut
hosts:
HOSTS
templates:
  base: {build: debian-12, size: 64M}
vms:
VMS
"""


class OnStandardError:
    def say(self, text: Text, *, vm: str = "") -> None:
        print(f"{vm}: {spelled(text)}", file=sys.stderr)

    working = say
    warn = say


def site() -> Site:
    reporter: Reporter = OnStandardError()
    return Site(load(HERE / "cut.yaml"), reporter=reporter)


def prepare() -> None:
    HERE.mkdir()
    run("modprobe", "zfs")
    run("zpool", "create", "-f", "-O", "mountpoint=none", "cutpool", "/dev/vdb")
    run("vgcreate", "-q", "cutthin", "/dev/vdc")
    run("lvcreate", "-q", "--type", "thin-pool", "-L", "3G", "--poolmetadatasize", "8M", "-n", "pool",
        "cutthin")  # fmt: skip
    run("vgcreate", "-q", "cutlinked", "/dev/vdd")
    hosts = "\n".join(
        f"  {host}: {{{place.host}}}".replace("uri: 'qemu:///system', ", "")
        for host, place in PLACES.items()
    )
    vms = "\n".join(
        f"  {host}{n}: {{host: {host}, template: base, memory: 64M}}" for host in PLACES for n in (1, 2)
    )
    (HERE / "cut.yaml").write_text(FARM.replace("HOSTS", hosts).replace("VMS", vms))
    with site() as opened:
        opened.prepare()
        for host, place in PLACES.items():
            image = HERE / "base.qcow2"
            place.make_image(image)
            template = Template(
                name="base", generation=1, ref="", size=SIZE, sha256="", created=opened_at(),
                origin="nothing", firstboot="farmhand",
            )  # fmt: skip
            opened.disks(host).seal(image, template)
        told = dict.fromkeys(opened.farm.vms)
    os.sync()
    print(json.dumps(told))


def opened_at() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def work(host: str, seed: str) -> None:
    dice = random.Random(seed)
    letters = dice.sample(string.ascii_uppercase.replace(TEMPLATE, ""), 25)
    vms: dict[str, Any] = json.loads(sys.stdin.readline())
    names = (f"{seed}-{n}" for n in range(10**6))
    own = [vm for vm in vms if vm.startswith(host)]
    place = PLACES[host]
    while True:
        vm = dice.choice(own)
        now = vms[vm]
        verb = "clone" if now is None else dice.choice(("reset", "reset", "checkpoint", "destroy"))
        if now and now["letter"] == "?":
            verb = "reset"
        with site() as opened:
            if now and verb != "destroy" and now["letter"] != "?":
                letter = letters.pop(0)
                letters.append(letter)
                now = {**now, "letter": letter}
                say(vm=vm, verb="write", before=vms[vm], after=now)
                disk = opened.disks(host).find(opened.machine(vm))
                assert disk
                place.write(disk, opened, letter)
                say(vm=vm, done=now)
            after: Any = None
            if verb == "clone":
                after = {"letter": TEMPLATE, "kept": {"clean": TEMPLATE}}
            elif verb == "reset":
                to = dice.choice([name for name, letter in now["kept"].items() if letter != "?"])
                after = {**now, "letter": now["kept"][to]}
            elif verb == "checkpoint":
                name = next(names)
                after = {**now, "kept": {**now["kept"], name: now["letter"]}}
            say(vm=vm, verb=verb, before=now, after=after)
            if verb == "clone":
                farm.clone_farm(opened, [vm], start=False, wait=False)
            elif verb == "reset":
                farm.reset(opened, [vm], to=to, start=False, wait=False)
            elif verb == "checkpoint":
                farm.checkpoint(opened, [vm], name, wait=False)
            else:
                farm.destroy(opened, [vm])
            vms[vm] = after
            say(vm=vm, done=after)


def check() -> None:
    """Recovers; then nothing is left over, of what isn't there no object has the name, and each
    machine has its disk."""
    up = float(Path("/proc/uptime").read_text().split()[0])
    time.sleep(
        max(0.0, 35 - up)
    )  # what a cut left without a mark is known by its age, see hypervisors.disks.zfs.state
    with site() as opened:
        done = [str(action) for action in farm.recover(opened).actions]
        assert opened.journal.unfinished() == ()
        removed = [str(action) for action in farm.gc(opened).actions if action.verb == "discard"]
    with Site(load(HERE / "cut.yaml"), reporter=OnStandardError(), plan=True) as opened:
        left = farm.gc(opened)
        assert not left.changed, [str(action) for action in left.actions]
        assert opened.locks.held() == ()
    found: dict[str, Any] = {}
    with site() as opened:
        for host, place in PLACES.items():
            disks = {disk.owner.vm: disk for disk in opened.disks(host).list()}
            everything = place.everything()
            for vm in (f"{host}1", f"{host}2"):
                machine, disk = Member(opened, vm).look(), disks.get(vm)
                assert bool(machine) == bool(disk), f"{vm}: {machine}, {disk}"
                if disk is None:
                    name = opened.machine(vm)
                    others = [
                        line for line in everything if name in line or name.replace("-", "--") in line
                    ]
                    assert not others, others
                    found[vm] = None
                    continue
                seed = seed_file(opened.paths, opened.machine(vm)).read_bytes()
                assert seed[32769:32774] == b"CD001", (
                    f"{vm}: its seed is no ISO 9660 image (ECMA-119, 8.1)"
                )
                disk = replace(opened.disks(host).ready(opened.machine(vm)))  # type: ignore[attr-defined]
                found[vm] = {
                    "letter": place.read(disk, opened),
                    "kept": [kept.name for kept in disk.checkpoints],
                }
    print(json.dumps({"done": done, "removed": removed, "vms": found}))


if __name__ == "__main__":
    {"prepare": prepare, "work": work, "check": check}[sys.argv[1]](*sys.argv[2:])
