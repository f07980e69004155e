"""Another machine's hypervisor and disk store: each method as ``hypervisors.api`` has it, asked of the
agent there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from host.files import make_directory, open_new
from host.progress import Pulse
from hypervisors.api import (
    Capabilities,
    Capacity,
    ChainedDisks,
    Checkpoint,
    Console,
    DeviceDisks,
    Disk,
    Disks,
    FarmDisks,
    Foreign,
    GrowableDisks,
    KeptMemory,
    Leftover,
    LostDisks,
    Machine,
    MachineSpec,
    MemoryUse,
    MergingDisks,
    Owner,
    StepFn,
    Template,
    WatchedDisks,
)
from hypervisors.disks.stores import store_class
from hypervisors.far.failures import on
from hypervisors.far.link import Link
from hypervisors.look import HostLook
from hypervisors.ownership import FarmIdentity


class FarDisks:
    """Implements ``hypervisors.api.Disks``; see ``far_disks``."""

    def __init__(self, link: Link, step: StepFn) -> None:
        self._link = link
        self._step = step

    def seal(self, image: Path, template: Template) -> Template:
        there = self._link.send(image, image.name)
        sealed: Template = self._link.call("host", "seal", there, template, step=self._step)
        image.unlink(missing_ok=True)
        return sealed

    def templates(self) -> Sequence[Template]:
        found: Sequence[Template] = self._ask("templates")
        return found

    def remove_template(self, label: str) -> None:
        self._ask("remove_template", label)

    def adopt_template(self, label: str, whose: FarmIdentity) -> None:
        self._ask("adopt_template", label, whose)

    def find(self, machine: str) -> Disk | None:
        found: Disk | None = self._ask("find", machine)
        return found

    def list(self) -> Sequence[Disk]:
        found: Sequence[Disk] = self._ask("list")
        return found

    def others(self) -> Sequence[Foreign]:
        found: Sequence[Foreign] = self._ask("others")
        return found

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        self._ask("adopt", machine, whose)

    def clone(self, template: Template, machine: str, owner: Owner, size: int) -> Disk:
        made: Disk = self._ask("clone", template, machine, owner, size)
        return made

    def checkpoint(self, machine: str, name: str) -> Checkpoint:
        made: Checkpoint = self._ask("checkpoint", machine, name)
        return made

    def restore(self, machine: str, name: str) -> Disk:
        restored: Disk = self._ask("restore", machine, name)
        return restored

    def remove_checkpoint(self, machine: str, name: str) -> None:
        self._ask("remove_checkpoint", machine, name)

    def move(self, machine: str, template: Template) -> Disk:
        moved: Disk = self._ask("move", machine, template)
        return moved

    def rename(self, machine: str, to: str, owner: Owner) -> Disk:
        renamed: Disk = self._ask("rename", machine, to, owner)
        return renamed

    def pristine(self, machine: str, name: str, *, quick: bool = False) -> bool | None:
        proven: bool | None = self._ask("pristine", machine, name, quick=quick)
        return proven

    def destroy(self, machine: str) -> None:
        self._ask("destroy", machine)

    def leftovers(self) -> Sequence[Leftover]:
        found: Sequence[Leftover] = self._ask("leftovers")
        return found

    def discard(self, leftover: Leftover) -> None:
        self._ask("discard", leftover)

    def capacity(self) -> Capacity:
        told: Capacity = self._ask("capacity")
        return told

    def _ask(self, method: str, *args: object, **options: object) -> Any:
        return self._link.call("disks", method, *args, step=self._step, **options)


class _FarFarmDisks(FarDisks):
    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        made: Mapping[str, Checkpoint] = self._ask("checkpoint_all", list(machines), name)
        return made

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        restored: Sequence[Disk] = self._ask("restore_all", list(machines), name)
        return restored


class _FarDeviceDisks(FarDisks):
    def ready(self, machine: str) -> Disk:
        found: Disk = self._ask("ready", machine)
        return found


class _FarWatchedDisks(FarDisks):
    def notes(self) -> Sequence[str]:
        told: Sequence[str] = self._ask("notes")
        return told


class _FarMergingDisks(FarDisks):
    def merge(self, machine: str) -> None:
        self._ask("merge", machine)


class _FarGrowableDisks(FarDisks):
    def enlarge(self, machine: str, size: int) -> Disk:
        larger: Disk = self._ask("enlarge", machine, size)
        return larger


class _FarChainedDisks(FarDisks):
    def grown_from(self, machine: str, name: str) -> Sequence[str]:
        found: Sequence[str] = self._ask("grown_from", machine, name)
        return found


class _FarLostDisks(FarDisks):
    def left(self, machine: str) -> Sequence[Checkpoint]:
        found: Sequence[Checkpoint] = self._ask("left", machine)
        return found


_MORE = {
    FarmDisks: _FarFarmDisks,
    DeviceDisks: _FarDeviceDisks,
    WatchedDisks: _FarWatchedDisks,
    MergingDisks: _FarMergingDisks,
    GrowableDisks: _FarGrowableDisks,
    ChainedDisks: _FarChainedDisks,
    LostDisks: _FarLostDisks,
}


def far_disks(link: Link, step: StepFn) -> Disks:
    """The store over there. It offers besides ``Disks`` what that store does. Nothing is asked yet."""
    kind = store_class(link.place.disks.store)
    offers = tuple(more for protocol, more in _MORE.items() if issubclass(kind, protocol))
    store: Disks = type("FarDisks", offers or (FarDisks,), {})(link, step)
    return store


def far_look(link: Link, names: Sequence[str], proven: Sequence[str]) -> HostLook:
    """As ``hypervisors.look.look_at``, over there: one question."""
    seen: HostLook = link.call("host", "look", list(names), list(proven))
    return replace(
        seen,
        capabilities=_over_ssh(link, seen.capabilities),
        troubles={name: on(link.name, error) for name, error in seen.troubles.items()},
    )


def _over_ssh(link: Link, able: Capabilities) -> Capabilities:
    return replace(able, notes=(*able.notes, f"on {link.name}, over ssh"))


class FarKvmTrust:
    """``hypervisors.libvirt.kvm_trust.KvmTrust`` of another machine."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def proven(self) -> bool:
        found: bool = self._link.call("kvm", "proven")
        return found

    def prove(self) -> None:
        self._link.call("kvm", "prove")

    def distrust(self, why: str) -> None:
        self._link.call("kvm", "distrust", why)
        self._link.forget()


@dataclass(frozen=True, slots=True)
class FarLeases:
    """Held by the agent, so they end with it, however that ends; the next one takes them again."""

    link: Link

    def hold(self, names: Sequence[str], note: str) -> AbstractContextManager[None]:
        """See ``hypervisors.api.Leases``."""
        return self.link.holding(names, note)


class FarHypervisor:
    """Implements ``hypervisors.api.Hypervisor``. ``console_log``: where a copy of the end of a machine's
    console log is kept here, by the machine's name."""

    def __init__(
        self,
        link: Link,
        terminal: Callable[[Sequence[str]], tuple[str, ...]],
        console_log: Callable[[str], Path],
        step: StepFn,
    ) -> None:
        self._link = link
        self._terminal = terminal
        self._console_log = console_log
        self._step = step

    # -- what only another machine's has ----------------------------------------------------------

    def at_home(self, spec: MachineSpec) -> MachineSpec:
        """The machine's spec with the paths that its seed and console log have over there."""
        seeds, consoles = self._link.known("host", "places")
        return replace(
            spec,
            seed=seeds / spec.seed.name if spec.seed else None,
            console_log=consoles / spec.console_log.name if spec.console_log else None,
        )

    def bring_seed(self, machine: str, seed: Path) -> None:
        """Send the machine's seed, unless it is the same over there."""
        digest = hashlib.sha256(seed.read_bytes()).hexdigest()
        if not self._link.call("host", "has_seed", machine, digest):
            there = self._link.send(seed, seed.name)
            self._step(f"put the seed of {machine} in its place")
            self._link.call("host", "take_seed", machine, there)

    def memory_available(self) -> int:
        """Bytes of memory that the machine could still give away."""
        found: int = self._link.call("host", "memory_available")
        return found

    def tidy(self) -> None:
        """Remove the farm's directories over there where they are empty. Called after its last VM and
        template."""
        self._link.call("host", "tidy")

    def missing(self, tools: Sequence[str], paths: Sequence[Path]) -> Sequence[str]:
        """Those of the tools and files that aren't there."""
        found: Sequence[str] = self._link.call("host", "missing", list(tools), list(paths))
        return found

    def kvm_trust(self) -> FarKvmTrust:
        """What guests have shown of that machine's KVM."""
        return FarKvmTrust(self._link)

    # -- hypervisors.api.Hypervisor ---------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        return _over_ssh(self._link, self._link.known("machines", "capabilities"))

    def find(self, name: str) -> Machine | None:
        found: Machine | None = self._ask("find", name)
        return found

    def list(self) -> Sequence[Machine]:
        found: Sequence[Machine] = self._ask("list")
        return found

    def others(self) -> Sequence[Foreign]:
        found: Sequence[Foreign] = self._ask("others")
        return found

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        self._ask("adopt", machine, whose)

    def define(self, spec: MachineSpec, template: Template) -> Machine:
        made: Machine = self._ask("define", spec, template)
        return made

    def redefine(self, spec: MachineSpec) -> Machine:
        made: Machine = self._ask("redefine", spec)
        return made

    def rename(self, name: str, spec: MachineSpec) -> Machine:
        made: Machine = self._link.call("host", "rename", name, spec, step=self._step)
        return made

    def start(self, name: str, *, cold: bool = False) -> None:
        self._ask("start", name, cold=cold)

    def stop(self, name: str, *, grace: float) -> None:
        self._ask("stop", name, grace=grace)

    def checkpoint(self, name: str, checkpoint: str, *, warm: bool = False) -> Checkpoint:
        made: Checkpoint = self._ask("checkpoint", name, checkpoint, warm=warm)
        return made

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        made: Mapping[str, Checkpoint] = self._ask("checkpoint_all", list(machines), name)
        return made

    def settle(self, machine: str) -> str:
        done: str = self._ask("settle", machine)
        return done

    def memories(self, machine: str) -> Mapping[str, KeptMemory]:
        kept: Mapping[str, KeptMemory] = self._ask("memories", machine)
        return kept

    def why_unusable(self, machine: str, checkpoint: str) -> str:
        why: str = self._ask("why_unusable", machine, checkpoint)
        return why

    def forget(self, machine: str, name: str) -> None:
        self._ask("forget", machine, name)

    def reset(self, name: str, checkpoint: str) -> None:
        self._ask("reset", name, checkpoint)

    def balloon(self, name: str, target: int, *, timeout: float) -> int:
        reached: int = self._ask("balloon", name, target, timeout=timeout)
        return reached

    def memory(self, name: str) -> MemoryUse:
        told: MemoryUse = self._ask("memory", name)
        return told

    def console(self, name: str) -> Console:
        found: Console
        found, text = self._link.call("host", "console", name)
        log = None
        if text:
            log = self._console_log(name)
            make_directory(log.parent, mode=0o711)
            with open_new(log) as file:
                file.write(text.encode())
        return Console(argv=self._terminal(found.argv) if found.argv else (), log=log)

    def pulse(self, name: str) -> Pulse | None:
        seen: Pulse | None = self._ask("pulse", name)
        return seen

    def notes(self) -> Mapping[str, str]:
        told: Mapping[str, str] = self._ask("notes")
        return told

    def destroy(self, name: str) -> None:
        self._link.call("host", "destroy", name, step=self._step)

    def leftovers(self) -> Sequence[Leftover]:
        found: Sequence[Leftover] = self._link.call("host", "leftovers")
        return found

    def discard(self, leftover: Leftover) -> None:
        self._link.call("host", "discard", leftover, step=self._step)

    def close(self) -> None:
        self._link.close()

    def _ask(self, method: str, *args: object, **options: object) -> Any:
        return self._link.call("machines", method, *args, step=self._step, **options)
