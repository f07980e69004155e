"""destroy: VMs, or the whole farm, with all that is theirs and nothing that isn't."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from host.files import remove
from hypervisors.api import not_ours
from inventory.errors import (
    Busy,
    Call,
    Conflict,
    FarmhandError,
    Interrupted,
    NotFound,
    NotOurs,
    Text,
    UnknownName,
    WrongState,
    did_you_mean,
    some,
)
from provision.clean_state import forget_tools
from provision.engine.facts import Facts
from provision.engine.journal import current_entry, current_step
from provision.engine.locks import lock_of
from provision.engine.operation import Operation, Recovery
from provision.engine.parallel import side_by_side
from provision.engine.plan import Job, Plan, alone, job
from provision.engine.record import Record
from provision.engine.recovery import build_of, can_be_foreseen, without_disk
from provision.engine.report import Action
from provision.engine.run import Run
from provision.guest import identity
from provision.leftovers import Survey, answering, of_drivers, of_files, survey
from provision.member import Member
from provision.missing_disk import left_of
from provision.namesakes import told
from provision.perhaps_renamed import perhaps_renamed
from provision.site import Site
from provision.vm_activity import VmActivity


@dataclass(frozen=True, slots=True)
class DestroyFacts(Facts):
    """``whole``: the farm itself goes. ``purge``: its build records go, too."""

    whole: bool = False
    purge: bool = False


class _DestroyActivity(VmActivity[DestroyFacts]):
    """Recovery finishes it: what is gone can't be brought back. Before its first step nothing is."""

    name = "destroy"
    facts = DestroyFacts

    def recover(self, site: Site, record: Record, facts: DestroyFacts) -> Recovery[DestroyFacts]:
        if not record.steps:
            return Recovery("it had not begun, nothing is gone")
        if facts.whole:
            text = "finish it, the whole farm goes"
            return Recovery(text, lambda _: _finish_farm(site, purge=facts.purge))
        return Recovery("finish it", lambda _: erase(site, record.vms))

    def concerns(self, site: Site, record: Record, facts: DestroyFacts) -> tuple[str, ...]:
        return tuple(site.farm.vms) if facts.whole else record.vms

    def locks(self, site: Site, record: Record, facts: DestroyFacts) -> tuple[str, ...]:
        return tuple(map(lock_of, self.concerns(site, record, facts)))

    def half_done(self, _facts: DestroyFacts) -> bool:
        """One that was made anew meanwhile would go, too."""
        return True

    def needs_names(self, _facts: DestroyFacts) -> bool:
        return False


DESTROY = _DestroyActivity()


@dataclass(frozen=True, slots=True)
class DestroyResult:
    """``kept``: where build records stay. ``diff``: how the network services' files and records differ
    from what they were."""

    kept: Path | None = None
    diff: str = ""


@dataclass(frozen=True, slots=True)
class Destroy(Operation[DestroyResult]):
    """Remove VMs: machine, disk and checkpoints, seed, host key, console log, and what they were given.
    With no VM named, remove the whole farm: then its templates, its private daemon, its state
    directory, and all that is its in network services, too. A service that fails keeps nothing. Build
    records stay (the result says where) unless ``purge``. What is gone already is no error.

    VMs that are no longer in the farm file can be named as long as their machines exist.

    Errors: UnknownName, NotOurs, Busy (for the whole farm also by work on templates or builds);
    WrongState, when all else is gone, where something of it may still be live in a service."""

    name = "destroy"
    at_any_time = True
    vms: tuple[str, ...] = ()
    purge: bool = False

    def affected(self, site: Site) -> tuple[str, ...]:
        if self.vms:
            return _names(site, self.vms)
        return tuple(dict.fromkeys((*site.farm.vms, *survey(site).vms)))

    def locks(self, site: Site) -> tuple[str, ...]:
        return () if self.vms else ("cycle", *(f"template-{name}" for name in site.farm.templates))

    def doing(self, vms: Sequence[str]) -> str:
        return f"destroy {some(vms)}" if self.vms else "destroy the whole farm"

    def plan(self, run: Run) -> Plan[DestroyResult]:
        return _plan_vms(run) if self.vms else _plan_farm(run, purge=self.purge)


def _plan_vms(run: Run) -> Plan[DestroyResult]:
    site = run.site
    foreign = [vm for vm in run.vms if vm in site.farm.vms and not Member(site, vm).info.virtual]
    for vm in run.vms:
        _refuse_others(site, vm)
    hosts = _where(site, run.vms)
    seen = survey(site, hosts)
    there = _there(site, seen, [vm for vm in run.vms if vm not in foreign])
    said = _renamed(site, seen, run.vms)
    said += [
        job("note", vm, f"on {Member(site, vm).info.called}: not ours to destroy") for vm in foreign
    ]
    said += [job("keep", vm, "is not there") for vm in run.vms if vm not in there and vm not in foreign]

    def act() -> Sequence[Action]:
        with site.journal.begin(DESTROY, list(there), DestroyFacts()):
            gone = erase(site, there, hosts)
        return [
            _destroyed(vm) if vm in gone else Action("note", vm, _may_be_on(site, vm, hosts))
            for vm in there
        ]

    # Killed after the network services: a VM without records, not records without a VM.
    diffs: list[str] = []
    live: list[str] = []
    jobs = [*said, *_of_network(run, diffs, live, gone=run.vms)]
    if there:
        jobs.append(Job(tuple(map(_destroyed, there)), act))
    jobs.append(Job((), partial(_refuse_if_live, site, some(run.vms), live, Call("network-apply"))))
    return Plan([alone(*jobs)], lambda: DestroyResult(diff="".join(diffs)))


def _renamed(site: Site, seen: Survey, vms: Collection[str]) -> list[Job]:
    """A note on one that may go on under its new name instead."""
    undeclared = [vm for vm in seen.vms if vm not in site.farm.vms]
    unmade = [vm for vm in site.farm.vms if vm not in seen.vms and site.farm.driver_of(vm).virtual]
    hint = perhaps_renamed(unmade, undeclared)
    if not hint or undeclared[0] not in vms:
        return []
    return [job("note", undeclared[0], ("is no longer in the farm file; ", hint))]


def _refuse_if_live(site: Site, what: str, live: Collection[str], again: Call) -> None:
    if live:
        from provision.network.apply import refuse_if_live

        refuse_if_live(site, f"destroyed {what}", live, again)


def _destroyed(vm: str) -> Action:
    return Action("destroy", vm, "destroy machine, disk, checkpoints and identity")


def _of_network(run: Run, diffs: list[str], live: list[str], *, gone: Sequence[str] | None) -> list[Job]:
    from provision.network.apply import has_services, in_step

    if not run.site.farm.services.used and not has_services(run.site):
        return []
    return [in_step(run, diffs, live, gone=gone)]


def erase(site: Site, vms: Collection[str], hosts: Sequence[str] | None = None) -> Collection[str]:
    """Remove all that is these VMs', within an operation under way. A VM that can't be destroyed keeps
    what it has; its error is raised at the end. So does one that wasn't found, as long as it may be on
    a host that doesn't answer. Returns the others. ``hosts``: those that are looked at; None: all that
    answer. Safe to call again after a kill."""
    gone: dict[str, None] = {}
    looked = _where(site, vms) if hosts is None else hosts
    unfinished = site.journal.unfinished()
    parted = {vm for record in unfinished if without_disk(record) for vm in record.vms}

    def one(vm: str) -> None:
        found = _unmake(site, vm, looked, in_parts=vm in parted)
        if not found and (text := _may_be_on(site, vm, looked)):
            site.reporter.warn(text, vm=vm)
            return
        current_step("remove its seed, keys and console log")
        identity.remove_identity(site.paths, vm, site.farm.machine_of(vm))
        forget_tools(site.paths, vm)
        gone[vm] = None
        site.reporter.say("destroyed", vm=vm)

    try:
        side_by_side(site, {vm: partial(one, vm) for vm in vms})
    except Interrupted:
        raise
    except FarmhandError:
        _erase_rest(site, gone, looked)
        raise
    _erase_rest(site, gone, looked)
    return gone


def _may_be_on(site: Site, vm: str, looked: Collection[str]) -> Text:
    """That it may be on hosts that weren't looked at, in words; "" if it was looked for on all."""
    away = [host for host in _hosts(site, vm) if host not in looked]
    if not away:
        return ""
    where = some(away)
    text = f"what it may have on {where} stays, and so do its keys and addresses: "
    return (text, Call("destroy", vm=vm), f" again when {where} answers")


def _where(site: Site, vms: Collection[str]) -> list[str]:
    """The hosts where these VMs may be: all that answer. The farm file's must; for one that is no longer
    in there, all must."""
    if any(vm not in site.farm.vms for vm in vms):
        return list(site.farm.hosts)
    return answering(site, {site.farm.host_of(vm) for vm in vms})


def _erase_rest(site: Site, vms: Collection[str], hosts: Sequence[str]) -> None:
    """Remove what takes a look at the whole farm: one look for all of them."""
    for item in (*of_drivers(site, hosts), *of_files(site, ())):
        if item.what.owner is not None and item.what.owner.vm in vms:
            current_step(f"remove {item.what.kind} {item.what.ref}")
            item.discard()
    current_step("give back addresses, MACs and ports")
    site.allocator.release(*vms)
    looked_for = {vm for vm in vms if not _may_be_on(site, vm, hosts)}
    for record in _stuck(site):
        if looked_for.issuperset(record.vms):
            site.journal.settle(
                record.id, "recovered", f"destroyed: {some(record.vms)}", build=build_of(record)
            )


def _stuck(site: Site) -> list[Record]:
    """What was cut off and can't be recovered as things are: such as what another farmhand noted. Once
    its VMs are gone nothing of it is left to be done, and their names must not stay blocked by it."""
    entry = current_entry()
    return [
        record
        for record in site.journal.unfinished()
        if record.vms and not (entry and record.id == entry.id) and not can_be_foreseen(site, record)
    ]


def _vms_of(records: Sequence[Record]) -> set[str]:
    return {vm for record in records for vm in record.vms}


def _unmake(site: Site, vm: str, looked: Collection[str], *, in_parts: bool) -> bool:
    """Whether anything of it was found. What another farm of this name has under its name stays; and
    what is nobody's on a host where it isn't declared. ``in_parts``: its disk may be there, and not be
    found."""
    name = site.farm.machine_of(vm)
    found = False
    own = site.farm.host_of(vm) if vm in site.farm.vms else None
    for host in (one for one in _hosts(site, vm) if one in looked):
        driver = site.hypervisor(host, look=True)
        machine = driver.find(name)
        if machine is not None:
            if machine.owner is None:
                if own not in (None, host):
                    continue
                what = f"{site.name}: machine {name} on host {host}"
                raise not_ours(what, None, site.identity)
            if machine.owner.farm != site.identity:
                continue
            driver.destroy(name)
            found = True
        store = site.disks(host)
        disk = store.find(name)
        if disk is not None and disk.owner.farm != site.identity:
            continue
        kept = disk is not None or bool(left_of(store, name))
        if kept or in_parts:
            store.destroy(name)
        found |= kept
    return found


def _refuse_others(site: Site, vm: str) -> None:
    """NotOurs where a machine of that name is another farm's."""
    name = site.farm.machine_of(vm)
    for host in _hosts(site, vm) if vm not in site.farm.vms else [site.farm.host_of(vm)]:
        machine = site.hypervisor(host, look=True).find(name)
        if machine is not None and machine.owner and machine.owner.farm != site.identity:
            what = f"{site.name}: machine {name} on host {host}"
            raise not_ours(what, machine.owner, site.identity)


def _names(site: Site, vms: Sequence[str]) -> tuple[str, ...]:
    known = dict.fromkeys(site.farm.vms)
    if not known.keys() >= frozenset(vms):
        seen = survey(site)
        known |= dict.fromkeys((*seen.vms, *seen.given, *_vms_of(_stuck(site))))
    for vm in vms:
        if vm not in known:
            raise UnknownName(
                f"{site.name}: there is no VM {vm!r}",
                remedy=did_you_mean(vm, known, f"it has {some(known)}"),
            )
    return tuple(vm for vm in known if vm in vms)


def _hosts(site: Site, vm: str) -> list[str]:
    """The hosts where it may be, its own first: any, for it may have been made before the farm file
    named that one."""
    hosts = [host for host in site.farm.hosts if site.has_disks(host)]
    if vm not in site.farm.vms:
        return hosts
    member = Member(site, vm)
    return list(dict.fromkeys([member.host, *hosts])) if member.info.virtual else []


def _there(site: Site, seen: Survey, vms: Sequence[str]) -> dict[str, None]:
    """Those of the VMs of which anything is there, in their order."""
    paths = site.paths
    known = {*seen.vms, *seen.given, *_vms_of(_stuck(site))}
    known |= {item.what.owner.vm for item in seen.left if item.what.owner}

    def has_file(vm: str) -> bool:
        name = site.farm.machine_of(vm)
        files = (
            identity.seed_file(paths, name),
            identity.host_key_file(paths, vm),
            identity.learnt_hosts(paths, vm),
            identity.console_log(paths, name),
        )
        return any(path.exists() for path in files)

    return dict.fromkeys(vm for vm in vms if vm in known or has_file(vm))


# The whole farm


def _plan_farm(run: Run, *, purge: bool) -> Plan[DestroyResult]:
    site, builds = run.site, run.site.paths.builds
    _refuse_if_in_use(site)
    _refuse_strangers(site)
    there = _there(site, survey(site), run.vms)
    actions = list(map(_destroyed, there))
    actions += [Action("destroy", "", f"remove template {label}") for _, label in _templates(site)]
    records = _records(builds)
    kept = builds if records and not purge else None
    if records and purge:
        actions.append(Action("destroy", "", f"remove {records} build record{'s' * (records > 1)}"))
    elif records:
        actions.append(Action("note", "", f"build records stay in {builds} (a purge removes them)"))
    if _is_used(site):
        stopped = "stop its daemon, " if _has_daemon(site) else ""
        actions.append(Action("destroy", "", f"{stopped}remove {site.paths.root}"))
        if others := _others_files(site):
            text = f"stays: files that aren't this farm's, such as {others[0]}"
            actions.append(Action("note", "", text))
    actions += [Action("note", "", text) for host in site.farm.hosts for text in told(site, host)]
    if not any(action.verb == "destroy" for action in actions):
        actions.insert(0, Action("keep", "", "nothing is there"))
        end = Job(tuple(actions), partial(_end, site))
        return Plan([alone(end)], lambda: DestroyResult(kept))

    live: list[str] = []

    def act() -> None:
        with site.journal.begin(DESTROY, (), DestroyFacts(whole=True, purge=purge)):
            erase(site, there)
            raze(site, purge=purge)
        _refuse_if_live(site, "the farm", live, Call("destroy", all_=True, purge=purge))
        _end(site)
        site.reporter.say("the farm is destroyed")

    diffs: list[str] = []
    stages = [alone(*_of_network(run, diffs, live, gone=None), Job(tuple(actions), act))]
    return Plan(stages, lambda: DestroyResult(kept, "".join(diffs)))


def _is_used(site: Site) -> bool:
    """Whether anything was ever done to the farm. The journal tells: it is written first and removed
    last."""
    return site.paths.journal.exists() or _has_daemon(site)


def _has_daemon(site: Site) -> bool:
    daemon = site.daemon()
    if daemon is None or daemon.is_anothers():
        return False
    return daemon.directory.exists() or daemon.running()  # the directory may be lost


def _end(site: Site) -> None:
    last_of(site)
    site.allocator.lock_file.unlink(missing_ok=True)


def _records(builds: Path) -> int:
    if not builds.is_dir():
        return 0
    return sum(path.is_dir() and not path.is_symlink() for path in builds.iterdir())  # "last" is a link


def raze(site: Site, *, purge: bool) -> None:
    """Remove all else, after the VMs, within an operation under way. The journal and the locks stay:
    they are needed to the end; and what is known of services that are still to be told. Safe to call
    again after a kill."""
    for item in survey(site).left:
        current_step(f"remove {item.what.kind} {item.what.ref}")
        item.discard()
    for host, label in _templates(site):
        current_step(f"remove template {label}")
        try:
            site.disks(host).remove_template(label)
        except WrongState as error:  # a VM that another farm adopted depends on it
            site.reporter.warn(f"stays: {error.message}")
        except NotFound:  # gone meanwhile
            continue
    current_step("forget what was given out")
    site.allocator.forget()
    if _has_daemon(site) and (daemon := site.daemon()):
        current_step("stop the private daemon")
        for host in site.farm.hosts:
            site.disconnect(host)
        daemon.stop(force=True)
    keep = {site.paths.journal.name, site.paths.locks.name}
    keep |= {f"{site.paths.journal.name}{end}" for end in ("-wal", "-shm")}
    if not purge:
        keep.add(site.paths.builds.name)
    if _others_files(site):
        keep.add(site.paths.disks.name)
    keep |= _of_services_to_be_told(site)
    if site.paths.root.is_dir():
        for path in sorted(site.paths.root.iterdir()):
            if path.name not in keep:
                current_step(f"remove {path.name}")
                remove(path)
    if (daemon := site.daemon()) is None or not daemon.is_anothers():
        remove(site.paths.runtime)
    for host in site.farm.hosts:
        if far := site.far(host):
            current_step(f"remove what is empty on {host}")
            far.tidy()


def _of_services_to_be_told(site: Site) -> set[str]:
    """Names of the files by which another destroy knows what to tell which service, and what is ours."""
    from provision.network.state import StateFile

    known = StateFile.below(site.paths.root)
    return {known.path.name, site.keeper.path.name} if known.read().behind else set()


def _finish_farm(site: Site, *, purge: bool) -> None:
    """Do what is left to do of a whole farm's destroy that was killed."""
    seen = survey(site)
    erase(site, _there(site, seen, tuple(dict.fromkeys((*seen.vms, *site.farm.vms)))))
    raze(site, purge=purge)


def last_of(site: Site) -> None:
    """Remove journal, locks, and the directory itself. A kill in between leaves nothing of worth. Events
    that can't be delivered now go with the journal."""
    site.outbox.close()
    for text in site.journal.troubles():
        site.reporter.warn(f"{text}; they go with the farm")
    site.journal.close()
    if site.paths.root.is_dir():
        keep = [site.paths.builds, site.paths.locks]
        if _others_files(site):
            keep.append(site.paths.disks)
        for path in site.paths.root.iterdir():
            if path not in keep:
                remove(path)
    site.locks.remove_all()
    for directory in (site.paths.builds, site.paths.root, site.paths.root.parent):
        with contextlib.suppress(OSError):  # build records, or other farms, are in it
            directory.rmdir()


def _templates(site: Site) -> list[tuple[str, str]]:
    """(host, label) of the farm's templates, declared or not, newest first. A store that hosts share
    counts once."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for host in site.farm.hosts:
        if site.has_disks(host):
            for template in sorted(site.templates(host), key=lambda t: -t.generation):
                seen.setdefault((template.ref, template.label), (host, template.label))
    return list(seen.values())


def _refuse_if_in_use(site: Site) -> None:
    """Busy if somebody else holds a lock on anything of the farm (a cycle, a template being built)."""
    for holder in site.locks.held():
        if not site.locks.mine(holder.lock):
            raise Busy(
                f"{site.name}: the farm is in use by {holder}",
                remedy=f"wait until that ends, or end it (kill {holder.pid}) and try again",
            )


def _refuse_strangers(site: Site) -> None:
    """Refuse while there are machines in the farm's own libvirtd that would go with it unseen: somebody
    defined them by hand, or they are VMs of a host that the farm file has no more."""
    daemon = site.daemon()
    if daemon is None:
        return
    served = [host for host in site.farm.hosts if site.opened(host).daemon()]
    ours = {machine.name for host in served for machine in site.hypervisor(host, look=True).list()}
    strangers = sorted(daemon.defined() - ours)
    if strangers and not served:
        raise Conflict(
            f"{site.name}: the farm's private libvirtd has {', '.join(strangers)}, and no host of the "
            "file is served by it any more",
            remedy="put that host back (driver: kvm), then destroy the farm",
        )
    if strangers:
        raise NotOurs(
            f"{site.name}: its private libvirtd has {', '.join(strangers)}, without our mark: "
            "the daemon is not taken away under it",
            remedy="undefine that yourself, or destroy VMs by their names",
        )


def _others_files(site: Site) -> list[Path]:
    """Files among the farm's own disks that are no template's, no VM's of this farm and no lock:
    somebody put an image, or a copy of a VM's directory, there; or this farm had another identity."""
    from hypervisors.disks.qcow2.leftovers import strangers

    return strangers(site.paths.disks, site.identity)
