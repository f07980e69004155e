"""What the recoveries of all activities on VMs have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from hypervisors.api import Machine, Owner, Power
from inventory.errors import Busy, Call, FarmhandError, Interrupted, WrongState
from provision.engine.facts import Facts
from provision.engine.operation import Activity, Recovery
from provision.engine.recovery import half_done, whole
from provision.guest.identity import sweep_seeds
from provision.member import Member, is_half_started, runs_unnoted, settle

if TYPE_CHECKING:
    from provision.engine.journal import Entry
    from provision.engine.record import Record
    from provision.site import Site

F = TypeVar("F", bound=Facts)


class VmActivity(Activity[F]):
    """An activity on VMs. Their leftovers are removed once it is recovered."""

    def needs_names(self, facts: F) -> bool:
        """Whether it alone knows something of its VMs, and so must not be forgotten where the farm file
        has lost the name of one that is still there (it may be called something else by now), or has
        it on another host."""
        return self.half_done(facts)

    def check_names(self, site: Site, record: Record, facts: F) -> None:
        """WrongState for one of which ``needs_names`` is true, and which isn't where the farm file has
        it."""
        for vm in record.vms if self.needs_names(facts) else ():
            there = _host_of(site, vm)
            if there is None or (vm in site.farm.vms and there == site.farm.host_of(vm)):
                continue
            if vm in site.farm.vms:
                raise WrongState(
                    f"{site.name}: {vm} is on host {there}, not on {site.farm.host_of(vm)}, and its "
                    f"{record.verb} is half done",
                    remedy=(f"give it 'host: {there}' again, then ", Call("recover")),
                )
            raise WrongState(
                f"{site.name}: {vm} is not in the farm file any more, and its {record.verb} is half "
                "done",
                remedy=(
                    f"put {vm} back in the farm file, ", Call("recover"), ", then rename it; "
                    "or, if it is to go, ", Call("destroy", vm=vm),
                ),
            )  # fmt: skip

    def after(self, site: Site, record: Record) -> None:
        """If something can't be removed now, the activity is recovered all the same: gc finds it again,
        and fails as long as it is there. What another activity has left half done, which may look like
        remains, is that one's."""
        from provision.leftovers import discard_of

        others = (one for one in site.journal.unfinished() if one.id != record.id and half_done(one))
        theirs = {vm for one in others for vm in one.vms}
        members = [Member(site, vm) for vm in record.vms if vm in site.farm.vms and vm not in theirs]
        try:
            discard_of(members)
        except (Busy, Interrupted):
            raise
        except FarmhandError as error:
            text = ("something of it is left over, for ", Call("gc"), ": ", whole(error))
            site.reporter.warn(text, vm=members[0].vm if len(members) == 1 else "")
        sweep_seeds(site.paths, {member.machine for member in members})


class OneVmActivity(VmActivity[F]):
    """An activity on one VM. For a VM that is no longer declared, or not ours to power, recovery does
    nothing; see ``needs_names``."""

    def recover(self, site: Site, record: Record, facts: F) -> Recovery[F]:
        vm = record.vm
        self.check_names(site, record, facts)
        if vm not in site.farm.vms:
            return Recovery("it is no longer declared; noted" if vm else "noted")
        member = Member(site, vm)
        if not member.can_power:
            return Recovery(f"noted; on {member.info.called} nothing is undone")
        machine = member.look()
        if machine is None:
            return self.unmade(member, facts)
        stands = is_half_started(member, machine)
        if not (stands or runs_unnoted(machine)):
            return self.go_on(member, machine, facts)
        then = self.go_on(member, replace(machine, power=Power.SUSPENDED) if stands else machine, facts)

        def settled(entry: Entry[F]) -> None:
            settle(member)
            now = member.look()
            then = self.go_on(member, now, facts) if now else self.unmade(member, facts)
            if then.run is not None:
                then.run(entry)

        return Recovery(then.text, settled)  # one that is only being started looks the same for a moment

    def go_on(self, _member: Member, _machine: Machine, _facts: F) -> Recovery[F]:
        """Recovery if its machine is there. By default nothing is to do: the operation can simply be
        called again."""
        return Recovery("noted")

    def unmade(self, _member: Member, _facts: F) -> Recovery[F]:
        """Recovery if there is no machine."""
        return Recovery("its machine is gone; noted")


def _host_of(site: Site, vm: str) -> str | None:
    """The host that has the VM's machine, the farm file's first; None if none has."""
    name, owner = site.farm.machine_of(vm), Owner(site.identity, vm)
    hosts = [one for one in site.farm.hosts if site.has_disks(one)]
    if vm in site.farm.vms:
        hosts.sort(key=lambda one: one != site.farm.host_of(vm))
    for host in hosts:
        try:
            machine = site.hypervisor(host, look=True).find(name)
        except Interrupted:
            raise
        except FarmhandError:  # another host's trouble holds nothing up
            if vm not in site.farm.vms or host == site.farm.host_of(vm):
                raise
            continue
        if machine is not None and machine.owner == owner:
            return host
    return None
