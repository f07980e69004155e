"""The cycle as the journal has it: its memory goes down again after a kill; how far it came its record
says."""

from __future__ import annotations

from dataclasses import dataclass

from provision.engine.facts import Facts
from provision.engine.journal import Entry, Record
from provision.engine.operation import Activity, Recovery
from provision.member import Member, is_on
from provision.power import deflate
from provision.site import Site


@dataclass(frozen=True, slots=True)
class CycleFacts(Facts):
    """``build``: the record's id."""

    build: str


class _CycleActivity(Activity[CycleFacts]):
    name = "cycle"
    facts = CycleFacts

    def recover(self, site: Site, record: Record, _facts: CycleFacts) -> Recovery[CycleFacts]:
        members = [site.member(vm) for vm in record.vms if vm in site.farm.vms]
        high = [member for member in members if member.can_power and _is_inflated(member)]

        def calm(_: Entry[CycleFacts]) -> None:
            for member in high:
                deflate(member)

        text = f"balloon down {', '.join(member.vm for member in high)}" if high else "noted"
        return Recovery(f"{text}; log shows how far it came", calm)


CYCLE = _CycleActivity()


def _is_inflated(member: Member) -> bool:
    machine, idle = member.look(), member.declared.idle_memory
    return machine is not None and is_on(machine) and idle is not None and machine.current > idle
