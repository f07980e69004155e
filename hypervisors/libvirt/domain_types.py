"""What differs between the hypervisors that libvirt drives: KVM (or QEMU's emulation), and Xen's libxl
(``hypervisors.libvirt.libxl``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hypervisors.api import Capabilities, Disk, MachineSpec, MemoryUse, StepFn
from hypervisors.libvirt import balloon
from hypervisors.libvirt.domain_xml import DomainDefinition, domain_xml
from hypervisors.libvirt.kvm import KvmVerdict
from hypervisors.libvirt.qemu_process import kill_qemu
from inventory.errors import FarmhandError

if TYPE_CHECKING:
    import libvirt

# libvirt/libvirt-domain.h, a module imported late
_SHUTDOWN_ACPI, SHUTDOWN_PARAVIRT = 1, 16
UNDEFINE_MANAGED_SAVE = 1
_UNDEFINE_SNAPSHOTS, _UNDEFINE_NVRAM, _UNDEFINE_CHECKPOINTS = 2, 4, 16


class DomainType(Protocol):
    """``shutdown`` and ``undefine``: flags for virDomainShutdownFlags and virDomainUndefineFlags."""

    @property
    def shutdown(self) -> int: ...

    @property
    def maps_memory(self) -> bool:
        """Whether a machine can be given memory that is mapped from a file (``libvirt.warm``)."""

    @property
    def saves_paused(self) -> bool:
        """Whether libvirt saves a machine that was paused, and so several at one moment."""

    @property
    def undefine(self) -> int: ...

    def capabilities(self) -> Capabilities: ...

    def xml(self, spec: MachineSpec, disk: Disk, template: str, *, system: bool, uuid: str) -> str:
        """The whole definition. Unsupported for what such a machine can't have."""

    def cut_power(self, name: str, uuid: str) -> bool:
        """Cut the power in a quicker way than libvirt's own. False if there is none: nothing was
        done."""

    def console_log(self, name: str, seen: DomainDefinition) -> Path | None: ...

    def set_memory(
        self, domain: libvirt.virDomain, name: str, target: int, timeout: float, step: StepFn
    ) -> int:
        """See ``Hypervisor.balloon``."""

    def memory(self, domain: libvirt.virDomain, name: str) -> MemoryUse:
        """See ``Hypervisor.memory``."""

    def notes(self, connection: libvirt.virConnect) -> Mapping[str, str]:
        """See ``WatchedMachines.notes``."""

    def why_no_start(self, domain: libvirt.virDomain, seen: DomainDefinition) -> FarmhandError | None:
        """The cause of a failed start, where libvirt's own words don't tell it; None if there is no more
        to say."""


@dataclass(frozen=True, slots=True)
class Qemu:
    """KVM, or QEMU's emulation where that doesn't work."""

    kvm: KvmVerdict
    shutdown: int = _SHUTDOWN_ACPI
    maps_memory: bool = True
    saves_paused: bool = True
    undefine: int = UNDEFINE_MANAGED_SAVE | _UNDEFINE_SNAPSHOTS | _UNDEFINE_NVRAM | _UNDEFINE_CHECKPOINTS

    def capabilities(self) -> Capabilities:
        return Capabilities(
            driver="kvm" if self.kvm.usable else "qemu",
            accelerated=self.kvm.usable,
            live_balloon=True,
            warm_checkpoints=False,
            notes=(self.kvm.why,),
            why_accelerated=self.kvm.why,
        )

    def xml(self, spec: MachineSpec, disk: Disk, template: str, *, system: bool, uuid: str) -> str:
        return domain_xml(
            spec, disk.path, disk.format, template, kvm=self.kvm.usable, system=system, uuid=uuid
        )

    def cut_power(self, name: str, uuid: str) -> bool:
        """libvirt's own destroy looks every 0.2 s whether QEMU is gone; a QEMU that is killed directly
        is noted in a few milliseconds."""
        return kill_qemu(name, uuid)

    def console_log(self, name: str, seen: DomainDefinition) -> Path | None:  # noqa: ARG002
        return seen.console_log

    def set_memory(
        self, domain: libvirt.virDomain, name: str, target: int, timeout: float, step: StepFn
    ) -> int:
        return balloon.set_memory(domain, name, target, timeout, step)

    def memory(self, domain: libvirt.virDomain, name: str) -> MemoryUse:
        return balloon.memory(domain, name)

    def notes(self, connection: libvirt.virConnect) -> Mapping[str, str]:
        return balloon.notes(connection)

    def why_no_start(self, domain: libvirt.virDomain, seen: DomainDefinition) -> None:  # noqa: ARG002
        return
