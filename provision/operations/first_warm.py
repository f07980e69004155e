"""The checkpoint ``warm`` that clone-farm makes of a VM, disk and memory, once it answered for the first
time, where the farm file sends its resets there."""

from __future__ import annotations

from functools import partial

from hypervisors.api import CLEAN, WARM, Disk
from inventory.errors import Call, Text
from provision.clean_state import clean_of
from provision.engine.plan import Job, job
from provision.engine.recovery import leaves_as_it_was, made_anew
from provision.member import Member
from provision.operations.checkpoint import check_keeps_memory, keep_warm

_BACK = 100
"""Activities of a VM that are looked back at."""


def first_warm(
    member: Member, disk: Disk | None, *, new: bool, runs: bool, then_off: bool = False
) -> list[Job]:
    """Its checkpoint ``warm``, where it has none. ``runs``: it will, and will have answered.
    ``then_off``: see ``CheckpointFacts``."""
    vm = member.vm
    kept = next((one for one in disk.checkpoints if one.name == WARM), None) if disk else None
    memory = member.memories().get(WARM) if kept and kept.warm else None
    trouble = memory.trouble if memory else ""
    if not new and (disk is None or (kept and kept.warm and not trouble)):
        return []
    if kept:
        has = f"a memory that can't be used ({trouble})" if trouble else "no memory"
        lost: Text = (f"its checkpoint {WARM} has {has}: made anew after ", Call("destroy", vm=vm))
        return [job("note", vm, lost)]
    check_keeps_memory(member)
    clean = clean_of(disk.checkpoints, disk.template) if disk else CLEAN
    if not new and not _as_cloned(member, clean):
        used: Text = (
            f"has no checkpoint {WARM}, and was used since it was cloned: ",
            Call("reset", vm=vm, to=CLEAN), ", then ", Call("clone-farm"), " makes it",
        )  # fmt: skip
        return [job("note", vm, used)]
    if not runs:
        return [job("note", vm, f"gets its checkpoint {WARM} when clone-farm has seen it answer")]
    keep = partial(keep_warm, [member], WARM, {}, then_off=then_off)
    text = f"once it answers, keep as {WARM}, disk and memory"
    return [job("checkpoint", vm, text, keep)]


def _as_cloned(member: Member, clean: str) -> bool:
    """Whether all that was done to a VM, since it was cloned or reset to clean, or that was remade, is
    that it was started and stopped. Not so where nobody knows. ``clean``: its name in the store."""
    records = member.site.journal.history(_BACK, vm=member.vm, steps=False)
    anew = next((one for one in records if made_anew(one, member.vm, clean)), None)
    if anew is None:
        return False
    # not only later ones: a build that resets its VMs itself was begun before that
    others = [one for one in records if one is not anew and not leaves_as_it_was(one)]
    return all(one.ended and one.ended <= anew.started for one in others)
