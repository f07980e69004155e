"""What the recoveries of all activities on VMs have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from hypervisors.api import Machine, Owner
from inventory.errors import Busy, Call, FarmhandError, Interrupted, WrongState
from provision.engine.facts import Facts
from provision.engine.operation import Activity, Recovery
from provision.engine.recovery import half_done, whole
from provision.guest.identity import sweep_seeds
from provision.member import Member

if TYPE_CHECKING:
    from provision.engine.record import Record
    from provision.member import Member
    from provision.site import Site

F = TypeVar("F", bound=Facts)


class VmActivity(Activity[F]):
    """An activity on VMs. Their leftovers are removed once it is recovered."""

    def needs_names(self, facts: F) -> bool:
        """Whether it alone knows something of its VMs, and so must not be forgotten where the farm file
        has lost the name of one that is still there: it may be called something else by now."""
        return self.half_done(facts)

    def check_names(self, site: Site, record: Record, facts: F) -> None:
        """WrongState for one of which ``needs_names`` is true."""
        for vm in record.vms if self.needs_names(facts) else ():
            if vm not in site.farm.vms and _is_made(site, vm):
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
        if vm not in site.farm.vms:
            self.check_names(site, record, facts)
            return Recovery("it is no longer declared; noted" if vm else "noted")
        member = Member(site, vm)
        if not member.can_power:
            return Recovery(f"noted; on {member.info.called} nothing is undone")
        machine = member.look()
        return self.unmade(member, facts) if machine is None else self.go_on(member, machine, facts)

    def go_on(self, _member: Member, _machine: Machine, _facts: F) -> Recovery[F]:
        """Recovery if its machine is there. By default nothing is to do: the operation can simply be
        called again."""
        return Recovery("noted")

    def unmade(self, _member: Member, _facts: F) -> Recovery[F]:
        """Recovery if there is no machine."""
        return Recovery("its machine is gone; noted")


def _is_made(site: Site, vm: str) -> bool:
    """Whether a VM that is no longer declared has a machine, on whichever host."""
    name, owner = site.farm.machine_of(vm), Owner(site.identity, vm)
    drivers = (site.hypervisor(one, look=True) for one in site.farm.hosts if site.has_disks(one))
    return any((machine := one.find(name)) is not None and machine.owner == owner for one in drivers)
