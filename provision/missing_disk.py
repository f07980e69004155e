"""A VM whose machine is there and whose disk is not: removed by hand, or gone with what it was on.

``clone-farm`` makes it a new disk, from the template generation that it was cloned from, but only if
nothing can be lost by that. Not while the VM runs, for its guest still has the old disk open. Not if
something of the disk is left. And not if that generation is missing, too: then, most likely, the store
itself isn't there, such as a file system that is not mounted."""

from __future__ import annotations

from dataclasses import dataclass

from hypervisors.api import Checkpoint, Disk, Disks, LostDisks, Machine, Template
from inventory.errors import Call, FarmhandError, NotFound, Remedy
from provision.engine.recovery import without_disk
from provision.member import Member, is_on
from provision.site import Site


@dataclass(frozen=True, slots=True)
class MissingDisk:
    """``text`` and ``remedy``: a line each. ``template``: what a new disk may be made from at once;
    None: somebody has to look first."""

    text: str
    remedy: Remedy
    template: Template | None = None

    def error(self, member: Member) -> FarmhandError:
        return NotFound(f"{member.site.name}: {member.vm}: {self.text}", remedy=self.remedy)


def missing_disk(member: Member, machine: Machine) -> MissingDisk | None:
    """None if its disk is there, or it has none of ours."""
    site, vm, host = member.site, member.vm, member.host
    if not member.has_store or member.disk() is not None:
        return None
    if has_disk_elsewhere(site, host, machine.name):
        return None
    for record in site.journal.unfinished():
        if member.vm in record.vms and (why := without_disk(record)):
            return MissingDisk(why, (Call("recover"), " goes on with it"))
    store = member.store
    gone = "its disk is gone"
    if is_on(machine):
        return MissingDisk(
            f"{gone} while it runs: what its guest writes is lost when it stops",
            ("copy what you need out of it, ", Call("stop", vm=vm), ", then ", Call("clone-farm")),
        )
    if kept := left_of(store, machine.name):
        again: Remedy = (Call("destroy", vm=vm), ", which gives them up, then ", Call("clone-farm"))
        if grows_from(store, machine.name):
            again = (Call("reset", vm=vm, to=kept[-1]), " makes it a new one from there; or ", again)
        return MissingDisk(f"{gone}; its checkpoints are left: {', '.join(kept)}", again)
    rest = [] if isinstance(store, LostDisks) else store.leftovers()
    if refs := [left.ref for left in rest if left.owner == member.owner]:
        return MissingDisk(
            f"{gone}; something of it is left: {', '.join(refs)}",
            (Call("destroy", vm=vm), " gives that up; then ", Call("clone-farm")),
        )
    labelled = [t for t in store.templates() if t.label == machine.template]
    template = next((t for t in labelled if t.farm == member.site.identity), None)
    if template is None and labelled:
        return MissingDisk(
            f"{gone}, and its template {machine.template} belongs to farm {labelled[0].farm}",
            (Call("destroy", vm=vm), " gives it up; then ", Call("clone-farm"), " makes a new one"),
        )
    if template is None:
        return MissingDisk(
            f"{gone}, and so is its template {machine.template}",
            (
                f"see that what host {host} keeps its disks on is mounted; if all is lost: ",
                Call("destroy", vm=vm),
                ", then ",
                Call("clone-farm"),
            ),
        )
    remedy = (Call("clone-farm", vm=vm), f" makes it a new one from {template.label}")
    return MissingDisk(gone, remedy, template)


def left_of(store: Disks, machine: str) -> tuple[str, ...]:
    """Names of checkpoints, except clean, that outlived the machine's disk."""
    if not isinstance(store, LostDisks):
        return ()
    return tuple(kept.name for kept in store.left(machine) if kept.name != "clean")


def grows_from(store: Disks, machine: str) -> tuple[Checkpoint, ...]:
    """The checkpoints that a reset can make a new disk from when the old one is gone."""
    kept = tuple(store.left(machine)) if isinstance(store, LostDisks) else ()
    return kept if "clean" in (one.name for one in kept) else ()


def left_to_people(site: Site, host: str, name: str) -> bool:
    """Whether a machine without a disk in its host's store must not be cleared away, because somebody
    has to look first (see ``missing_disk``). Its definition may tell whose the disk is when that comes
    back, and its guest may still be writing."""
    if has_disk_elsewhere(site, host, name):
        return True
    machine = site.hypervisor(host, look=True).find(name)
    if machine is None or not site.has_disks(host):
        return False
    if machine.owner is not None and machine.owner.vm in site.farm.vms:
        host = site.farm.host_of(machine.owner.vm)
    store = site.disks(host)
    return (
        is_on(machine)
        or bool(left_of(store, name))
        or all(template.label != machine.template for template in store.templates())
    )


def has_disk_elsewhere(site: Site, host: str, machine: str) -> bool:
    """Whether another host's store has its disk. Two hosts of the farm file may be one hypervisor with
    two stores, and a driver knows only its own."""
    others = (site.disks(other) for other in site.farm.hosts if other != host and site.has_disks(other))
    return any(store.find(machine) is not None for store in others)


def require(member: Member, machine: Machine, disk: Disk | None) -> None:
    """Check, before the disk is used, that it was found. NotFound if it is gone."""
    found = missing_disk(member, machine) if disk is None else None
    if found is not None:
        raise found.error(member)
