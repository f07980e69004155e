"""What the recoveries of all activities on VMs have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from hypervisors.api import Machine
from inventory.errors import Busy, Call, FarmhandError, Interrupted
from provision.engine.facts import Facts
from provision.engine.operation import Activity, Recovery
from provision.engine.recovery import whole
from provision.guest.identity import sweep_seeds
from provision.member import Member

if TYPE_CHECKING:
    from provision.engine.record import Record
    from provision.member import Member
    from provision.site import Site

F = TypeVar("F", bound=Facts)


class VmActivity(Activity[F]):
    """An activity on VMs. Their leftovers are removed once it is recovered."""

    def after(self, site: Site, record: Record) -> None:
        """If something can't be removed now, the activity is recovered all the same: gc finds it again,
        and fails as long as it is there."""
        from provision.leftovers import discard_of

        members = [Member(site, vm) for vm in record.vms if vm in site.farm.vms]
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
    nothing."""

    def recover(self, site: Site, record: Record, facts: F) -> Recovery[F]:
        vm = record.vm
        if vm not in site.farm.vms:
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
