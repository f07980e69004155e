"""The use cases, under one roof: what tasks and builds call.

Each finishes or undoes first what a killed process left, takes the VMs' locks, plans by real reads,
then acts, its VMs side by side. With ``site.plan`` the very same actions are computed and nothing is
done: no lock, no file, no daemon.
"""

from __future__ import annotations

from provision.operations.balloon import MemoryPlan, balloon, balloon_all, memory_plan
from provision.operations.checkpoint import checkpoint
from provision.operations.clone import clone_farm
from provision.operations.destroy import destroy
from provision.operations.gc import gc
from provision.operations.merge import merge
from provision.operations.recover import recover
from provision.operations.reset import reset
from provision.power import start, stop
from provision.status import FarmStatus, HostStatus, VmStatus, status

__all__ = [
    "FarmStatus",
    "HostStatus",
    "MemoryPlan",
    "VmStatus",
    "balloon",
    "balloon_all",
    "checkpoint",
    "clone_farm",
    "destroy",
    "gc",
    "memory_plan",
    "merge",
    "recover",
    "reset",
    "start",
    "status",
    "stop",
]
