"""libvirt's errors in an admin's words."""

from __future__ import annotations

import libvirt
import pytest

from hypervisors.libvirt.errors import connection_lost, translate
from inventory.errors import DriverFailed, FarmhandError, WrongState, spelled


def error(message: str, code: int = libvirt.VIR_ERR_INTERNAL_ERROR) -> libvirt.libvirtError:
    """As libvirt raises it: the parts of virterror.h's struct _virError."""
    made = libvirt.libvirtError("it failed")
    made.err = (code, libvirt.VIR_FROM_NONE, message, libvirt.VIR_ERR_ERROR, None, None, None, -1, -1)
    return made


@pytest.mark.parametrize(
    ("said", "code", "kind", "message", "remedy"),
    [
        (
            "libxl_domain_info failed for domain '5'", libvirt.VIR_ERR_INTERNAL_ERROR, WrongState,
            "look up prod: it is going down", "status shows its state",
        ),
        (
            "Failed to connect socket to '/run/libvirt/virtlogd-sock': No such file or directory",
            libvirt.VIR_ERR_SYSTEM_ERROR, DriverFailed, "look up prod: no virtlogd there",
            "systemctl start virtlogd",
        ),
        (
            "Failed to connect socket to '/run/libvirt/libvirt-sock': No such file or directory",
            libvirt.VIR_ERR_SYSTEM_ERROR, DriverFailed, "look up prod: no libvirtd there",
            "systemctl start libvirtd",
        ),
        (
            "internal error: qemu unexpectedly closed the monitor: "
            "2026-11-29T00:00:00.0Z qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69",
            libvirt.VIR_ERR_INTERNAL_ERROR, DriverFailed, "look up prod: internal error: qemu",
            "do without KVM: FARMHAND_ACCELERATOR=tcg",
        ),
        (
            "internal error: process exited while connecting to monitor: "
            "qemu-system-x86_64: failed to initialize kvm: Permission denied",
            libvirt.VIR_ERR_INTERNAL_ERROR, DriverFailed, "look up prod: internal error: process",
            "do without KVM: FARMHAND_ACCELERATOR=tcg",
        ),
        (
            "internal error: qemu unexpectedly closed the monitor: "
            "qemu-system-x86_64: -device x,id=kvm-1: 'x' is not a valid device model name",
            libvirt.VIR_ERR_INTERNAL_ERROR, DriverFailed, "look up prod: internal error: qemu",
            "doctor checks the host",
        ),
    ],
    ids=["destroyed under Xen", "no virtlogd", "no libvirtd", "an MSR", "no KVM", "another reason"],
)  # fmt: skip
def test_what_is_said_and_what_to_do(
    said: str, code: int, kind: type[FarmhandError], message: str, remedy: str
) -> None:
    told = translate(error(said, code), "look up prod")
    assert type(told) is kind
    assert told.message.startswith(message)
    assert spelled(told.remedy).startswith(remedy)
    assert not connection_lost(error(said, code))
