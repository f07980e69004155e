"""Operations as plain calls, as tests ask for them: each carries one out, see ``engine/runner.py``; with
``site.plan`` it says what would be done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from provision.engine.report import NoResult, Outcome
from provision.engine.runner import perform
from provision.operations.adopt import Adopt, AdoptResult
from provision.operations.balloon import Balloon, BalloonAll, BalloonResult, MemoryPlan, memory_plan
from provision.operations.checkpoint import CheckpointResult, TakeCheckpoint
from provision.operations.checkpoint_remove import RemoveCheckpoint
from provision.operations.clone import CloneFarm, CloneResult
from provision.operations.destroy import Destroy, DestroyResult
from provision.operations.gc import Gc, GcResult
from provision.operations.merge import Merge
from provision.operations.recover import Recover, RecoverResult
from provision.operations.rename import Rename, RenameResult
from provision.operations.renew import Renew
from provision.operations.reset import Reset, ResetResult
from provision.operations.templates import (
    RemoveResult,
    SealResult,
    TemplateBuild,
    TemplateImport,
    TemplateRemove,
    template_list,
)
from provision.power import Start, Stop
from provision.site import Site
from provision.status import FarmStatus, HostStatus, VmStatus, status

if TYPE_CHECKING:
    from provision.network.apply import ApplyResult

__all__ = [
    "FarmStatus",
    "HostStatus",
    "MemoryPlan",
    "VmStatus",
    "adopt",
    "balloon",
    "balloon_all",
    "checkpoint",
    "checkpoint_remove",
    "clone_farm",
    "destroy",
    "gc",
    "memory_plan",
    "merge",
    "network_apply",
    "recover",
    "rename",
    "renew",
    "reset",
    "start",
    "status",
    "stop",
    "template_build",
    "template_import",
    "template_list",
    "template_remove",
]


def adopt(site: Site, vms: Sequence[str] = (), *, of: str = "") -> Outcome[AdoptResult]:
    """``site``: open for it (``open_site(adopting=True)``)."""
    return perform(site, Adopt(tuple(vms), of))


def balloon(site: Site, vm: str, target: int) -> Outcome[BalloonResult]:
    return perform(site, Balloon(vm, target))


def balloon_all(site: Site) -> Outcome[BalloonResult]:
    return perform(site, BalloonAll())


def checkpoint(
    site: Site, vms: Sequence[str], name: str, *, warm: bool = False, wait: bool = True
) -> Outcome[CheckpointResult]:
    return perform(site, TakeCheckpoint(name, tuple(vms), warm, wait))


def clone_farm(
    site: Site, vms: Sequence[str] = (), *, start: bool = True, wait: bool = True
) -> Outcome[CloneResult]:
    return perform(site, CloneFarm(tuple(vms), start, wait))


def destroy(site: Site, vms: Sequence[str] = (), *, purge: bool = False) -> Outcome[DestroyResult]:
    return perform(site, Destroy(tuple(vms), purge))


def gc(site: Site) -> Outcome[GcResult]:
    return perform(site, Gc())


def checkpoint_remove(site: Site, vms: Sequence[str], label: str) -> Outcome[NoResult]:
    return perform(site, RemoveCheckpoint(label=label, vms=tuple(vms)))


def rename(site: Site, vm: str, was: str, *, wait: bool = True) -> Outcome[RenameResult]:
    return perform(site, Rename(vm, was, wait))


def renew(site: Site, vms: Sequence[str] = (), *, wait: bool = True) -> Outcome[NoResult]:
    return perform(site, Renew(tuple(vms), wait))


def merge(site: Site, vms: Sequence[str] = (), *, wait: bool = True) -> Outcome[NoResult]:
    return perform(site, Merge(tuple(vms), wait))


def network_apply(
    site: Site, services: Sequence[str] = (), *, force: bool = False, take_aside: bool = False
) -> Outcome[ApplyResult]:
    from provision.network.apply import NetworkApply  # most farms have no services

    return perform(site, NetworkApply(tuple(services), force, take_aside))


def recover(site: Site) -> Outcome[RecoverResult]:
    return perform(site, Recover())


def reset(
    site: Site,
    vms: Sequence[str] = (),
    *,
    to: str = "",
    start: bool = True,
    wait: bool = True,
    cold: bool = False,
) -> Outcome[ResetResult]:
    return perform(site, Reset(tuple(vms), to, start, wait, cold))


def start(
    site: Site, vms: Sequence[str] = (), *, wait: bool = True, cold: bool = False
) -> Outcome[NoResult]:
    return perform(site, Start(tuple(vms), wait, cold))


def stop(site: Site, vms: Sequence[str] = (), *, force: bool = False) -> Outcome[NoResult]:
    return perform(site, Stop(tuple(vms), force))


def template_build(site: Site, name: str, *, fresh: bool = False) -> Outcome[SealResult]:
    return perform(site, TemplateBuild(name, fresh))


def template_import(site: Site, name: str, image: Path | None = None) -> Outcome[SealResult]:
    return perform(site, TemplateImport(name, image))


def template_remove(site: Site, label: str) -> Outcome[RemoveResult]:
    return perform(site, TemplateRemove(label))
