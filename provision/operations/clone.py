"""clone-farm: every declared VM exists, from its template's generation, started and reachable."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from hypervisors.api import Disk, Machine, Power, Template
from inventory.errors import Conflict, FarmhandError, Interrupted, NoSpace, NotFound, some
from inventory.sizes import format_duration, format_size
from provision.allocate import Allocation
from provision.engine.report import Action, Outcome
from provision.engine.work import Job, begin, is_on
from provision.guest import identity
from provision.leftovers import discard_of
from provision.lost import Lost, lost
from provision.power import (
    answers,
    bring_up_to_date,
    check_accelerator,
    check_memory,
    deflate,
    start_one,
    then_what,
    wait_until_ready,
    why_redefine,
    write_identity,
)
from provision.site import Site

HEADROOM = 256 * 2**20
"""Bytes a linked clone needs at least, to boot and to begin its work. It may grow to its disk's
size: that is overcommitment by intent, as with any thin disk."""
_ASLEEP = 2**20
"""Bytes for one that is not started."""


def clone_farm(site: Site, vms: Sequence[str] = (), *, start: bool = True, wait: bool = True) -> Outcome:
    """Make the VMs that are missing, start those that should run, wait until their ssh answers.
    What is already as declared is left alone, so a second call changes nothing.

    A definition that differs from the farm file is changed while the VM is stopped; a running one
    keeps its own until its next stop or reset. VMs stay on the template generation they were cloned
    from. One VM's failure doesn't stop the others.

    Errors: NoSpace (disk or memory, before anything is begun), Conflict and NotOurs (names),
    TimedOut with the console's tail, Several, Busy."""
    names = site.vms(vms)
    with begin(site, "clone-farm", names) as run:
        check_accelerator(site.members(names))
        templates = _Templates(site)
        machines = {vm: site.member(vm).look() for vm in names}
        ours = [vm for vm in names if site.member(vm).can_power]
        missing = [vm for vm in ours if machines[vm] is None]
        for host in dict.fromkeys(map(site.farm.host_of, missing)):
            site.opened(host).check_places()
        disks = {vm: site.member(vm).disk() for vm in ours}
        gone = _gone(site, machines, disks)
        given = site.allocator.peek_all(vm for vm in ours if machines[vm] is not None)
        to_start = [
            vm
            for vm in names
            if start and site.farm.vms[vm].start and vm in ours and not is_on(machines[vm])
            if vm not in gone or gone[vm].template
        ]
        starting = frozenset(to_start)
        _check_space(site, [*missing, *(vm for vm in gone if gone[vm].template)], starting)
        run.add(*check_memory(site.members(to_start) if to_start else (), wait=wait))
        unbuilt = dict.fromkeys(templates.name_of(vm) for vm in missing if templates.newest(vm) is None)
        run.add(
            *(Action("template", "", f"make template {name}: there is none yet") for name in unbuilt)
        )
        jobs: dict[str, list[Job]] = {}
        for vm in names:
            machine = machines[vm]
            if not site.member(vm).can_power:
                jobs[vm] = [Job(Action("keep", vm, "on an ssh host: nothing to make"))]
            elif machine is None:
                jobs[vm] = _make(site, vm, templates, disks[vm])
            elif vm in gone:
                jobs[vm] = [_make_again(site, vm, gone[vm])]
            else:
                jobs[vm] = _keep(
                    site, vm, machine, disks[vm], templates, given[vm],
                    starting=vm in starting, wait=wait,
                )  # fmt: skip
            if vm in starting:
                action = Action("start", vm, f"start{then_what(site.member(vm), wait=wait)}")
                jobs[vm].append(Job(action, partial(start_one, site.member(vm), wait=wait)))
            if not jobs[vm]:
                jobs[vm] = [Job(Action("keep", vm, "already as declared"))]
        if site.farm.services.used:
            from provision.network.apply import keep_in_step

            keep_in_step(run, new=names)  # before they start: DHCP is the first thing they ask for
        if missing and not site.plan:
            with contextlib.suppress(FarmhandError):  # then the one that it is about fails by itself
                site.allocator.allocate_all(missing)  # as one: the lock file is written whole
        run.carry_out(jobs)
        return run.outcome()


def undo_clone(site: Site, vm: str) -> None:
    """Take away what a clone that didn't end left. A machine that exists is complete: it stays."""
    member = site.member(vm)
    if member.look() is not None:
        return
    discard_of([member])
    if member.disk() is not None:
        member.store.destroy(member.machine)
    identity.remove_identity(site.paths, vm, member.machine)


class _Templates:
    """The templates of this run's clones, as they were when it began. One that is missing is made once,
    by whichever VM comes first; a failure is every waiting VM's."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._guard = threading.Lock()
        self._seen: dict[str, Mapping[str, Template]] = {}  # by host and name
        self._failed: dict[str, FarmhandError] = {}

    def name_of(self, vm: str) -> str:
        name = self._site.farm.template_of(vm)
        if name is None:
            raise NotFound(
                f"{self._site.name}: {vm} has no template, and the farm file declares none",
                remedy="declare one under 'templates:'",
            )
        return name

    def newest(self, vm: str) -> Template | None:
        """The newest generation in the VM's store."""
        host = self._site.farm.host_of(vm)
        if host not in self._seen:
            found = sorted(self._site.disks(host).templates(), key=lambda t: t.generation)
            self._seen[host] = {template.name: template for template in found}
        return self._seen[host].get(self.name_of(vm))

    def get(self, vm: str) -> Template:
        name = self.name_of(vm)
        with self._guard:
            if name in self._failed:
                raise self._failed[name]
            found = self.newest(vm)
            if found is not None:
                return found
            from provision.operations.templates import ensure_template

            try:
                ensure_template(self._site, name, self._site.farm.host_of(vm))
            except FarmhandError as error:
                self._failed[name] = error
                raise
            self._seen.clear()
            found = self.newest(vm)
            if found is None:
                raise NotFound(
                    f"{self._site.name}: template {name} is not in the store of host "
                    f"{self._site.farm.host_of(vm)}",
                    remedy=f"./invoke template-build {name}",
                )
            return found


def _gone(
    site: Site, machines: Mapping[str, Machine | None], disks: Mapping[str, Disk | None]
) -> dict[str, Lost]:
    """The VMs whose machine is there and whose disk is not."""
    found: dict[str, Lost] = {}
    for vm, disk in disks.items():
        machine = machines[vm]
        if machine is not None and disk is None and (one := lost(site.member(vm), machine)):
            found[vm] = one
    return found


def _make_again(site: Site, vm: str, gone: Lost) -> Job:
    if gone.template:
        text = f"{gone.text}: a new one from {gone.template.label}"
        return Job(Action("clone", vm, text), partial(_clone, site, vm, gone.template, again=True))

    def refuse() -> None:
        raise gone.error(site.member(vm))

    return Job(Action("note", vm, f"{gone.text}; {gone.remedy}"), refuse)


def _make(site: Site, vm: str, templates: _Templates, disk: Disk | None) -> list[Job]:
    declared = site.farm.vms[vm]
    jobs: list[Job] = []
    if disk is not None:
        # A disk without a machine. Untouched since cloning, nothing is lost with it.
        if not site.member(vm).store.pristine(site.member(vm).machine, "clean"):
            raise Conflict(
                f"{site.name}: {vm} has a disk that was written to ({disk.path}), but no machine",
                remedy=f"copy what you need from it, then remove it: ./invoke destroy --vm {vm}",
            )
        action = Action("discard", vm, "remove a disk that no machine has and nothing was written to")
        jobs.append(Job(action, lambda: undo_clone(site, vm)))
    found = templates.newest(vm)
    size = declared.disk or site.farm.templates[templates.name_of(vm)].size
    if found is not None:
        if declared.disk is not None and declared.disk < found.size:
            raise Conflict(
                f"{site.name}: {vm}'s disk of {format_size(declared.disk)} is smaller than "
                f"{found.label}, {format_size(found.size)}",
                remedy="raise or leave out 'disk'",
            )
        size = declared.disk or found.size
    text = (
        f"clone from {found.label if found else templates.name_of(vm)}: disk {format_size(size)}, "
        f"memory {format_size(declared.memory)}, {declared.vcpus} vCPU"
    )
    jobs.append(Job(Action("clone", vm, text), lambda: _clone(site, vm, templates.get(vm))))
    return jobs


def _clone(site: Site, vm: str, template: Template, *, again: bool = False) -> None:
    """``again``: its machine is there, its disk is gone."""
    began, member = time.monotonic(), site.member(vm)
    with site.journal.operation("clone", vm=vm, template=template.label, again=again) as operation:
        try:
            if again:
                operation.step("remove the definition, whose disk is gone")
                member.driver.destroy(member.machine)
            operation.step("give it an identity")
            write_identity(member)
            spec = member.spec(member.allocate())
            spec = replace(spec, disk_size=spec.disk_size or template.size)
            operation.step("make disk and machine")
            member.driver.define(spec, template)
        except Interrupted:
            raise
        except Exception:
            with contextlib.suppress(FarmhandError):  # the first error is the one to show
                undo_clone(site, vm)
            raise
    site.reporter.say(
        f"cloned from {template.label} in {format_duration(time.monotonic() - began)}", vm=vm
    )


def _keep(
    site: Site,
    vm: str,
    machine: Machine,
    disk: Disk | None,
    templates: _Templates,
    given: Allocation,
    *,
    starting: bool,
    wait: bool,
) -> list[Job]:
    jobs: list[Job] = []
    declared = site.farm.vms[vm]
    reason = why_redefine(site.member(vm), machine, site.member(vm).spec(given))
    running = is_on(machine) or machine.power is Power.SUSPENDED  # which runs on as it was
    if reason and running:
        text = f"takes effect at its next stop or reset: change its definition {reason}"
        jobs.append(Job(Action("note", vm, text)))
    elif reason:
        text = f"change its definition {reason}"
        jobs.append(Job(Action("redefine", vm, text), lambda: _redefine(site, vm)))
    found = templates.newest(vm)
    if found is not None and machine.template != found.label:
        text = f"stays on {machine.template}; to move to {found.label}, destroy and clone it"
        jobs.append(Job(Action("note", vm, text)))
    if disk is not None and declared.disk is not None and disk.size != declared.disk:
        text = (
            f"its disk is {format_size(disk.size)}, declared {format_size(declared.disk)}: "
            "takes effect when it is destroyed and cloned again"
        )
        jobs.append(Job(Action("note", vm, text)))
    if is_on(machine) and wait and not starting and declared.start and not answers(site.member(vm)):
        text = "runs, but its ssh doesn't answer: wait for it"
        jobs.append(Job(Action("wait", vm, text), lambda: _await(site, vm)))
    return jobs


def _redefine(site: Site, vm: str) -> None:
    with site.journal.operation("redefine", vm=vm):
        member = site.member(vm)
        bring_up_to_date(member, member.present(), member.disk())


def _await(site: Site, vm: str) -> None:
    with site.journal.operation("wait", vm=vm):
        # Since when it runs isn't known for sure: any boot of this machine is the one meant.
        member = site.member(vm)
        wait_until_ready(member, since=float("-inf"))
        machine, idle = member.look(), member.declared.idle_memory
        if machine is not None and idle is not None and machine.current > idle:
            deflate(member)


def _check_space(site: Site, missing: Sequence[str], starting: Collection[str]) -> None:
    for host in dict.fromkeys(map(site.farm.host_of, missing)):
        new = [vm for vm in missing if site.farm.host_of(vm) == host]
        free = site.disks(host).capacity().free
        wanted = sum(HEADROOM if vm in starting else _ASLEEP for vm in new)
        if free < wanted:
            raise NoSpace(
                f"{site.name}: the disk store of host {host} has {format_size(free)} free; cloning "
                f"{some(new)} takes {format_size(wanted)} at least",
                remedy="./invoke gc shows what can go, or give the host's 'disks' another path",
            )
