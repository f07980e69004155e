"""clone-farm: every declared VM exists, from its template's generation, started and reachable."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from hypervisors.api import (
    WARM,
    Disk,
    Machine,
    Power,
    Template,
    disk_with_data,
    is_fresh,
    own_checkpoints,
)
from inventory.errors import (
    Call,
    Conflict,
    FarmhandError,
    Interrupted,
    NoSpace,
    NotFound,
    joined,
    some,
)
from inventory.sizes import format_duration, format_size
from provision.allocate import Allocation
from provision.engine.facts import Facts, NoFacts
from provision.engine.operation import Operation, Recovery
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.report import Action
from provision.engine.run import Run
from provision.guest import identity
from provision.member import (
    Member,
    each,
    is_on,
    look_at_all,
    members_of,
    told_by,
    told_without_record,
)
from provision.perhaps_renamed import perhaps_renamed
from provision.power import (
    await_one,
    bring_up_to_date,
    check_accelerator,
    check_memory,
    must_wait,
    start_one,
    then_what,
    why_not_larger,
    why_redefine,
    write_identity,
)
from provision.site import Site
from provision.template_recipe import is_outdated, left_alone
from provision.vm_activity import OneVmActivity

if TYPE_CHECKING:
    from provision.missing_disk import MissingDisk

HEADROOM = 256 * 2**20
"""Bytes a linked clone needs at least, to boot and to begin its work. It may grow to its disk's
size: that is overcommitment by intent, as with any thin disk."""
_ASLEEP = 2**20
"""Bytes for one that is not started."""


@dataclass(frozen=True, slots=True)
class CloneFacts(Facts):
    """``again``: the machine was there and its disk was gone."""

    template: str
    again: bool


class _CloneActivity(OneVmActivity[CloneFacts]):
    """Undone if there is no machine yet. A machine is complete: it stays, and the next clone-farm goes
    on."""

    name = "clone"
    facts = CloneFacts

    def made_anew(self, _facts: CloneFacts, _vm: str, _clean: str) -> bool:
        return True

    def go_on(self, _member: Member, _machine: Machine, facts: CloneFacts) -> Recovery[CloneFacts]:
        whole = "the machine is as it was" if facts.again else "the machine is complete"
        return Recovery(f"{whole}; clone-farm goes on from there")

    def unmade(self, member: Member, _facts: CloneFacts) -> Recovery[CloneFacts]:
        return Recovery("undone, nothing of it stays", lambda _: _undo(member))


class _RedefineActivity(OneVmActivity[NoFacts]):
    name = "redefine"
    facts = NoFacts
    leaves_as_it_was = True


CLONE = _CloneActivity()
REDEFINE = _RedefineActivity()


@dataclass(frozen=True, slots=True)
class CloneResult:
    """``diff``: how the network services' files and records differ from what they were."""

    diff: str = ""


@dataclass(frozen=True, slots=True)
class CloneFarm(Operation[CloneResult]):
    """Make the VMs that are missing, start those that should run, wait until their ssh answers.
    What is already as declared is left alone, so a second call changes nothing.

    A definition that differs from the farm file is changed while the VM is stopped; a running one
    keeps its own until its next stop or reset. VMs stay on the template generation they were cloned
    from. One VM's failure doesn't stop the others.

    Errors: NoSpace (disk or memory, before anything is begun), Conflict and NotOurs (names),
    TimedOut with the console's tail, Several, Busy."""

    name = "clone-farm"
    vms: tuple[str, ...] = ()
    start: bool = True
    wait: bool = True

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def plan(self, run: Run) -> Plan[CloneResult]:
        site, members = run.site, members_of(run.site, run.vms)
        check_accelerator(members)
        templates = _CloneTemplates(site)
        machines = look_at_all(members)
        ours = [member for member in members if member.can_power]
        missing = [member for member in ours if machines[member.vm] is None]
        for host in dict.fromkeys(member.host for member in missing):
            site.opened(host).check_places()
        disks = each(ours, Member.disk)
        gone = _gone(ours, machines, disks)
        made = [one.vm for one in ours if machines[one.vm] is not None]
        seen = told_by({vm: one.address for vm, one in machines.items() if one})
        told = {**seen, **told_without_record(site, but=run.vms)}
        given = site.allocator.peek_all(made, told=told) if made else {}
        to_start = [
            one for one in ours
            if self.start and one.declared.start and not is_on(machines[one.vm])
            if one.vm not in gone or gone[one.vm].template
        ]  # fmt: skip
        starting = {member.vm for member in to_start}
        new = [*missing, *(one for one in ours if one.vm in gone and gone[one.vm].template)]
        _check_space(site, new, starting)
        first = list(check_memory(to_start, wait=self.wait))
        unbuilt = dict.fromkeys(
            templates.name_of(one) for one in missing if templates.newest(one) is None
        )
        first += [Action("template", "", f"make template {name}: there is none yet") for name in unbuilt]
        first += _outdated(site, templates, ours)
        first += _renamed(site, missing)
        jobs: dict[str, list[Job]] = {}
        for member in members:
            vm, machine = member.vm, machines[member.vm]
            if not member.can_power:
                jobs[vm] = [job("keep", vm, "on an ssh host: nothing to make")]
            elif machine is None:
                jobs[vm] = _make(member, templates, disks[vm])
            elif vm in gone:
                jobs[vm] = [_make_again(member, gone[vm])]
            else:
                jobs[vm] = _keep(
                    member, machine, disks[vm], templates, given[vm],
                    waits=self.wait and vm not in starting,
                )  # fmt: skip
            if vm in starting:
                text = f"start{then_what(member, wait=self.wait)}"
                jobs[vm].append(job("start", vm, text, partial(start_one, member, wait=self.wait)))
            if member.can_power and member.declared.reset_to == WARM:
                from provision.operations.first_warm import first_warm

                made_now = member in new
                runs = self.wait and (vm in starting or (not made_now and is_on(machine)))
                jobs[vm] += first_warm(member, None if made_now else disks[vm], new=made_now, runs=runs)
            if not jobs[vm]:
                jobs[vm] = [job("keep", vm, "already as declared")]
        before = [foretold(*first), _adopt(site, told), Job((), partial(_allocate, missing, told))]
        diffs: list[str] = []
        if site.farm.services.used:  # before they start: DHCP is the first thing they ask for
            from provision.network.apply import in_step

            before.insert(2, in_step(run, diffs, [], new=run.vms))
        return Plan([alone(*before), jobs], lambda: CloneResult("".join(diffs)))


def _outdated(site: Site, templates: _CloneTemplates, members: Sequence[Member]) -> list[Action]:
    """A note on each newest generation that is older than its recipe."""
    found = {one.label: one for one in map(templates.newest, members) if one}
    return [
        Action("note", "", joined((f"{one.label} is older than the file's recipe",
                                   Call("template-build", name=one.name)), ": "))
        for one in found.values() if is_outdated(site, one)
    ]  # fmt: skip


def _renamed(site: Site, missing: Sequence[Member]) -> list[Action]:
    """A note where the one that is missing may be made under the name that it had before."""
    if len(missing) != 1:
        return []
    (member,) = missing
    driver = site.hypervisor(member.host, look=True)
    former = (vm for vm in site.allocator.recorded() if vm not in site.farm.vms)
    there = [vm for vm in former if driver.find(site.farm.machine_of(vm))]
    hint = perhaps_renamed([member.vm], there)
    return [Action("note", there[0], ("is no longer in the farm file; ", hint))] if hint else []


def _adopt(site: Site, told: Mapping[str, IPv4Address]) -> Job:
    """Record what machines say of themselves, where the record says otherwise."""
    recorded = site.allocator.recorded() if told else {}
    wrong = {
        vm: address
        for vm, address in told.items()
        if vm in site.farm.vms and not site.farm.vms[vm].address
        if vm not in recorded or recorded[vm].address != address
    }
    would = site.allocator.peek_all(wrong, told=told) if wrong else {}
    found = {vm: address for vm, address in wrong.items() if would[vm].address == address}
    if not found:
        return Job(())
    text = f"by its machine's mark, which {site.allocator.lock_file} doesn't say: recorded there"
    actions = [Action("note", vm, f"has {address} {text}") for vm, address in found.items()]

    def adopt() -> None:
        site.allocator.allocate_all(found, told=told)

    return Job(tuple(actions), adopt)


def _allocate(members: Sequence[Member], told: Mapping[str, IPv4Address]) -> None:
    """Allocate for all of them at once, for the lock file is written whole. If something can't be given,
    only the VM that it is for fails."""
    if members:
        with contextlib.suppress(FarmhandError):
            vms = [member.vm for member in members]
            given = members[0].site.allocator.allocate_all(vms, told=told)
            for member in members:
                member.was_given(given[member.vm])


def _undo(member: Member) -> None:
    """Remove what a clone that did not end left. A machine that exists is complete, and stays."""
    if member.look() is not None:
        return
    from provision.leftovers import discard_of

    discard_of([member])
    disk = member.disk()
    if disk is not None:
        if own_checkpoints(disk):  # none that a clone has made
            raise disk_with_data(disk)
        member.store.destroy(member.machine)
    identity.remove_identity(member.site.paths, member.vm, member.machine)


class _CloneTemplates:
    """The templates of this run's clones, as they were when it began. A missing one is made once, by the
    VM that comes first. If that fails, all VMs that wait for it fail."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._guard = threading.Lock()
        self._seen: dict[str, Mapping[str, Template]] = {}  # by host and name
        self._failed: dict[str, FarmhandError] = {}

    def name_of(self, member: Member) -> str:
        name = self._site.farm.template_of(member.vm)
        if name is None:
            raise NotFound(
                f"{self._site.name}: {member.vm} has no template, and the farm file declares none",
                remedy="declare one under 'templates:'",
            )
        return name

    def newest(self, member: Member) -> Template | None:
        """The newest generation in the VM's store."""
        host = member.host
        if host not in self._seen:
            found = sorted(self._site.templates(host), key=lambda t: t.generation)
            self._seen[host] = {template.name: template for template in found}
        return self._seen[host].get(self.name_of(member))

    def get(self, member: Member) -> Template:
        name = self.name_of(member)
        with self._guard:
            if name in self._failed:
                raise self._failed[name]
            found = self.newest(member)
            if found is not None:
                return found
            from provision.operations.templates import ensure_template

            try:
                ensure_template(self._site, name, member.host)
            except FarmhandError as error:
                self._failed[name] = error
                raise
            self._seen.clear()
            found = self.newest(member)
            if found is None:
                raise NotFound(
                    f"{self._site.name}: template {name} is not in the store of host {member.host}",
                    remedy=Call("template-build", name=name),
                )
            return found


def _gone(
    members: Sequence[Member],
    machines: Mapping[str, Machine | None],
    disks: Mapping[str, Disk | None],
) -> dict[str, MissingDisk]:
    """The VMs that have a machine and no disk."""
    found: dict[str, MissingDisk] = {}
    for member in members:
        machine = machines[member.vm]
        if machine is None or disks[member.vm] is not None:
            continue
        from provision.missing_disk import missing_disk

        if one := missing_disk(member, machine):
            found[member.vm] = one
    return found


def _make_again(member: Member, gone: MissingDisk) -> Job:
    vm = member.vm
    if gone.template:
        text = f"{gone.text}: a new one from {gone.template.label}"
        return job("clone", vm, text, partial(_clone, member, gone.template, again=True))

    def refuse() -> None:
        raise gone.error(member)

    return job("note", vm, joined((gone.text, gone.remedy)), refuse)


def _make(member: Member, templates: _CloneTemplates, disk: Disk | None) -> list[Job]:
    site, vm, declared = member.site, member.vm, member.declared
    jobs: list[Job] = []
    if disk is not None:
        if not is_fresh(member.store, disk):
            raise disk_with_data(disk)
        text = "remove a disk that no machine has and nothing was written to"
        jobs.append(job("discard", vm, text, partial(_undo, member)))
    name, found = templates.name_of(member), templates.newest(member)
    if member.info.guests and site.farm.ssh.key is None and left_alone(site, name, found):
        raise identity.no_key(site.farm, name)
    size = declared.disk or site.farm.templates[name].size
    if found is not None:
        if declared.disk is not None and declared.disk < found.size:
            raise Conflict(
                f"{site.name}: {vm}'s disk of {format_size(declared.disk)} is smaller than "
                f"{found.label}, {format_size(found.size)}",
                remedy="raise or leave out 'disk'",
            )
        size = declared.disk or found.size
    text = (
        f"clone from {found.label if found else name}: disk {format_size(size)}, "
        f"memory {format_size(declared.memory)}, {declared.vcpus} vCPU"
    )
    jobs.append(job("clone", vm, text, lambda: _clone(member, templates.get(member))))
    return jobs


def _clone(member: Member, template: Template, *, again: bool = False) -> None:
    """``again``: the machine is there and its disk is gone."""
    began, site, vm = time.monotonic(), member.site, member.vm
    with site.journal.begin(CLONE, [vm], CloneFacts(template.label, again)) as entry:
        try:
            if again:
                entry.step("remove the definition, whose disk is gone")
                member.driver.destroy(member.machine)
            entry.step("give it an identity")
            identity.expect_own_key(site.paths, vm, own=left_alone(site, template.name, template))
            write_identity(member)
            spec = member.spec(member.allocate())
            spec = replace(spec, disk_size=spec.disk_size or template.size)
            entry.step("make disk and machine")
            member.driver.define(spec, template)
        except (Interrupted, Conflict):  # the second: what is in the way is not of this clone's making
            raise
        except Exception:
            with contextlib.suppress(FarmhandError):  # the first error is the one to show
                _undo(member)
            raise
    site.reporter.say(
        f"cloned from {template.label} in {format_duration(time.monotonic() - began)}", vm=vm
    )


def _keep(
    member: Member,
    machine: Machine,
    disk: Disk | None,
    templates: _CloneTemplates,
    given: Allocation,
    *,
    waits: bool,
) -> list[Job]:
    """``waits``: if it runs, wait until it answers."""
    jobs: list[Job] = []
    vm, declared = member.vm, member.declared
    reason = why_redefine(member, machine, member.spec(given))
    running = is_on(machine) or machine.power is Power.SUSPENDED  # which runs on as it was
    if reason and running:
        text = f"takes effect at its next stop or reset: change its definition {reason}"
        jobs.append(job("note", vm, text))
    elif reason:
        text = f"change its definition {reason}"
        jobs.append(job("redefine", vm, text, partial(_redefine, member)))
    found = templates.newest(member)
    now = disk.template if disk else machine.template
    if found is not None and now != found.label:
        text = f"stays on {now}; {found.label} is newer: "
        jobs.append(job("note", vm, (text, Call("renew", vm=vm))))
    if disk is not None and declared.disk is not None and disk.size != declared.disk:
        text = f"its disk is {format_size(disk.size)}, declared {format_size(declared.disk)}: "
        text += why_not_larger(member, disk) or "it grows at its next start"
        jobs.append(job("note", vm, text))
    if is_on(machine) and waits and declared.start and must_wait(member):
        jobs.append(await_one(member))
    return jobs


def _redefine(member: Member) -> None:
    with member.site.journal.begin(REDEFINE, [member.vm], NoFacts()):
        bring_up_to_date(member, member.present(), member.disk())


def _check_space(site: Site, members: Sequence[Member], starting: Collection[str]) -> None:
    for host in dict.fromkeys(member.host for member in members):
        new = [member.vm for member in members if member.host == host]
        free = site.disks(host).capacity().free
        wanted = sum(HEADROOM if vm in starting else _ASLEEP for vm in new)
        if free < wanted:
            raise NoSpace(
                f"{site.name}: the disk store of host {host} has {format_size(free)} free; cloning "
                f"{some(new)} takes {format_size(wanted)} at least",
                remedy=(Call("gc"), " shows what can go, or give the host's 'disks' another path"),
            )
