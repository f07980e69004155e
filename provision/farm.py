"""The use cases, under one roof: what tasks and builds call.

Each finishes or undoes first what a killed process left, takes the VMs' locks, plans by real reads,
then acts, its VMs side by side. With ``site.plan`` the very same actions are computed and nothing is
done: no lock, no file, no daemon.
"""

from __future__ import annotations

from provision.checkpoint import checkpoint, merge
from provision.clone import clone_farm
from provision.destroy import destroy
from provision.gc import gc
from provision.power import balloon, start, stop
from provision.recover import recover
from provision.reset import reset
from provision.status import FarmStatus, HostStatus, VmStatus, status

__all__ = [
    "FarmStatus",
    "HostStatus",
    "VmStatus",
    "balloon",
    "checkpoint",
    "clone_farm",
    "destroy",
    "gc",
    "merge",
    "recover",
    "reset",
    "start",
    "status",
    "stop",
]
