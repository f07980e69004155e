"""A hypervisor that was never started has no machines: what plans and ``status`` see of a private
daemon that doesn't run and never defined anything. Looking must not start one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from hypervisors.api import (
    Capabilities,
    Checkpoint,
    Console,
    Foreign,
    Leftover,
    Machine,
    MachineSpec,
    MemoryUse,
    Template,
)
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, NotFound


class NullHypervisor:
    """Answers questions, refuses the rest."""

    def capabilities(self) -> Capabilities:
        return Capabilities(
            driver="kvm",
            accelerated=False,
            live_balloon=True,
            warm_checkpoints=True,
            notes=("its private daemon is not running: nothing was made yet",),
        )

    def find(self, name: str) -> Machine | None:  # noqa: ARG002
        return None

    def list(self) -> Sequence[Machine]:
        return ()

    def others(self) -> Sequence[Foreign]:
        return ()

    def adopt(self, machine: str, whose: FarmIdentity) -> None:  # noqa: ARG002
        self._refuse(machine)

    def define(self, spec: MachineSpec, template: Template) -> Machine:  # noqa: ARG002
        self._refuse(spec.name)

    def redefine(self, spec: MachineSpec) -> Machine:
        self._refuse(spec.name)

    def rename(self, name: str, spec: MachineSpec) -> Machine:  # noqa: ARG002
        self._refuse(name)

    def start(self, name: str, *, cold: bool = False) -> None:  # noqa: ARG002
        self._refuse(name)

    def stop(self, name: str, *, grace: float) -> None:  # noqa: ARG002
        self._refuse(name)

    def checkpoint(self, name: str, checkpoint: str, *, warm: bool = False) -> Checkpoint:  # noqa: ARG002
        self._refuse(name)

    def reset(self, name: str, checkpoint: str) -> None:  # noqa: ARG002
        self._refuse(name)

    def balloon(self, name: str, target: int, *, timeout: float) -> int:  # noqa: ARG002
        self._refuse(name)

    def memory(self, name: str) -> MemoryUse:
        self._refuse(name)

    def console(self, name: str) -> Console:
        self._refuse(name)

    def pulse(self, name: str) -> None:  # noqa: ARG002
        return None

    def destroy(self, name: str) -> None:
        self._refuse(name)

    def leftovers(self) -> Sequence[Leftover]:
        return ()

    def discard(self, leftover: Leftover) -> None:
        self._refuse(leftover.ref)

    def close(self) -> None:
        """Nothing is open."""

    def _refuse(self, name: str) -> NoReturn:
        raise NotFound(f"{name} does not exist", remedy=("make it: ", Call("clone-farm")))
