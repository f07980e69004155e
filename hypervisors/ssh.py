"""Machines that nobody virtualizes, reached over ssh alone: real hardware, somebody else's cloud.

They are what the farm file lists. Their power is unknown and not ours to switch; a reset is a command
of the admin's (a PXE reinstall, a BMC script) or refused. Nothing here reaches the machine itself:
whether it answers is asked over ssh by whoever waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn

from host.run import Runner
from hypervisors.api import (
    Capabilities,
    Checkpoint,
    Console,
    Disks,
    Foreign,
    Hypervisor,
    Leftover,
    Machine,
    MachineSpec,
    MemoryUse,
    Owner,
    Power,
    StepFn,
    Template,
    no_step,
)
from hypervisors.host import DrivenHost, ListedMachine, OpenHost, Surroundings, no_disks
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, NotFound, Remedy, Unsupported
from inventory.hosts import DriverInfo

_RESET_LIMIT = 3600.0  # seconds: a machine may be installed anew


@dataclass(frozen=True, kw_only=True)
class SshHost(DrivenHost):
    """Machines that nobody virtualizes, reached over ssh alone."""

    INFO: ClassVar = DriverInfo(
        name="ssh", called="an ssh host", virtual=False, power=False, disks=False
    )

    driver: Literal["ssh"] = "ssh"

    def opened(self, around: Surroundings) -> OpenSsh:
        return OpenSsh(around)


class OpenSsh(OpenHost):
    """There is nothing to connect to."""

    def _connect(self) -> Hypervisor:
        around = self.around
        return SshHypervisor(around.farm, around.listed(), around.runner, step=around.callbacks.step)

    def _open_disks(self) -> Disks:
        raise no_disks(self.around, "ssh")


class SshHypervisor:
    """Implements ``hypervisors.api.Hypervisor``. ``machines``: by machine name."""

    def __init__(
        self,
        farm: FarmIdentity,
        machines: Mapping[str, ListedMachine],
        runner: Runner,
        *,
        step: StepFn = no_step,
    ) -> None:
        self._farm = farm
        self._machines = dict(machines)
        self._runner = runner
        self._step = step

    def capabilities(self) -> Capabilities:
        return Capabilities(
            driver="ssh",
            accelerated=False,
            live_balloon=False,
            warm_checkpoints=False,
            notes=("machines over ssh alone: reset is the admin's own command",),
        )

    def find(self, name: str) -> Machine | None:
        if name not in self._machines:
            return None
        vm = name.removeprefix(f"{self._farm.name}-")
        return Machine(
            name=name, owner=Owner(self._farm, vm), power=Power.UNKNOWN, memory=0, current=0, vcpus=0,
            mac="", disk=None, spec_hash="", template="",
        )  # fmt: skip

    def list(self) -> Sequence[Machine]:
        return [m for m in map(self.find, sorted(self._machines)) if m]

    def others(self) -> Sequence[Foreign]:
        """None: nobody makes these machines, so nothing is marked on them. Whoever lists one may reset
        it by his own command, and sees to others himself."""
        return ()

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        """See ``others``."""

    def define(self, spec: MachineSpec, template: Template) -> Machine:
        """Nothing to make: that the farm file lists it is all there is to it."""
        self._refuse(spec.name, f"be cloned from {template.label}", "remove 'template' from it")

    def redefine(self, spec: MachineSpec) -> Machine:
        self._refuse(spec.name, "be redefined", "change the machine itself")

    def rename(self, name: str, spec: MachineSpec) -> Machine:
        del name
        self._refuse(spec.name, "be renamed", "its name is the farm file's alone: it has it already")

    def start(self, name: str, *, cold: bool = False) -> None:  # noqa: ARG002
        self._refuse(name, "be started", "switch it on, then go on")

    def stop(self, name: str, *, grace: float) -> None:
        del grace
        self._refuse(name, "be stopped", ("shut it down by hand: ", Call("ssh"), ", then poweroff"))

    def checkpoint(self, name: str, checkpoint: str, *, warm: bool = False) -> Checkpoint:  # noqa: ARG002
        self._refuse(name, f"be checkpointed as {checkpoint}", "its reset command knows one state only")

    def reset(self, name: str, checkpoint: str) -> None:
        """Runs the admin's command. CommandFailed with its output, TimedOut after an hour."""
        machine = self._known(name)
        if not machine.reset_argv:
            self._refuse(name, "be reset", "give it a 'reset' command in the farm file")
        if checkpoint != "clean":
            self._refuse(name, f"go back to {checkpoint}", "its reset command knows 'clean' only")
        self._step(f"run the reset command of {name}")
        self._runner.change(*machine.reset_argv, timeout=_RESET_LIMIT)

    def balloon(self, name: str, target: int, *, timeout: float) -> int:
        del target, timeout
        self._refuse(name, "be ballooned", "leave 'idle_memory' out")

    def memory(self, name: str) -> MemoryUse:
        self._refuse(name, "have its memory looked at", (Call("ssh"), " reaches it"))

    def console(self, name: str) -> Console:
        self._refuse(name, "show a console", (Call("ssh"), " reaches it"))

    def pulse(self, name: str) -> None:
        """Nobody sees what goes on in it before its ssh answers."""

    def destroy(self, name: str) -> None:
        """Nothing of ours is there to be removed; NotFound for a name the farm file doesn't list."""
        self._known(name)

    def leftovers(self) -> Sequence[Leftover]:
        return ()

    def discard(self, leftover: Leftover) -> None:
        """It never named one, so there is none to discard."""
        raise NotFound(f"nothing of ours is called {leftover.ref} here")

    def close(self) -> None:
        """It holds nothing open."""

    def _known(self, name: str) -> ListedMachine:
        try:
            return self._machines[name]
        except KeyError:
            known = ", ".join(sorted(self._machines)) or "none"
            raise NotFound(
                f"the farm file lists no ssh machine {name}", remedy=f"known: {known}"
            ) from None

    def _refuse(self, name: str, what: str, remedy: Remedy) -> NoReturn:
        self._known(name)
        raise Unsupported(f"{name} is a machine over ssh alone: it can't {what}", remedy=remedy)
