"""The use cases, under one roof: what tasks and builds call.

Each finishes or undoes first what a killed process left, takes the VMs' locks, plans by real reads,
then acts, its VMs side by side. With ``site.plan`` the very same actions are computed and nothing is
done: no lock, no file, no daemon.
"""

from __future__ import annotations

from provision.balloon import MemoryPlan, balloon, balloon_all, memory_plan
from provision.checkpoint import checkpoint, merge
from provision.clone import clone_farm
from provision.destroy import destroy
from provision.gc import gc
from provision.power import start, stop
from provision.recover import recover
from provision.reset import reset
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
