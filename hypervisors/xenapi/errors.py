"""What a XenAPI server says when it refuses, made one of ours, once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from inventory.errors import (
    Call,
    Conflict,
    DriverFailed,
    FarmhandError,
    NoSpace,
    NotFound,
    Remedy,
    Unsupported,
    UsageError,
    WrongState,
)

GONE = ("HANDLE_INVALID", "UUID_INVALID")
"""The object isn't there, or isn't any more."""

_KINDS: dict[str, tuple[type[FarmhandError], Remedy]] = {
    "HANDLE_INVALID": (NotFound, ("it is gone: somebody removed it meanwhile; ", Call("status"))),
    "UUID_INVALID": (NotFound, ("it is gone: somebody removed it meanwhile; ", Call("status"))),
    "VM_BAD_POWER_STATE": (WrongState, "somebody else starts or stops it too: look again"),
    "OTHER_OPERATION_IN_PROGRESS": (WrongState, "wait for it: xe task-list shows what is going on"),
    "OPERATION_NOT_ALLOWED": (WrongState, "xe vm-param-get param-name=blocked-operations tells more"),
    "OPERATION_BLOCKED": (WrongState, "an admin blocked it: xe vm-param-get "
                          "param-name=blocked-operations"),
    "VM_IS_TEMPLATE": (WrongState, Call("recover")),
    "VM_IS_SNAPSHOT": (WrongState, Call("recover")),
    "VDI_IN_USE": (WrongState, "it is attached elsewhere: xe vbd-list vdi-uuid=..."),
    "DEVICE_ALREADY_EXISTS": (WrongState, "something was attached by hand: xe vbd-list"),
    "VM_LACKS_FEATURE": (Unsupported, "install xe-guest-utilities in the template"),
    "VM_MISSING_PV_DRIVERS": (Unsupported, "install xe-guest-utilities in the template"),
    "VM_LACKS_FEATURE_SUSPEND": (Unsupported, "install xe-guest-utilities in the template"),
    "VM_NO_SUSPEND_SR": (Unsupported, "give the pool a suspend image SR: xe pool-param-set "
                         "suspend-image-SR=..."),
    "FEATURE_RESTRICTED": (Unsupported, "the server's licence doesn't cover it"),
    "LICENCE_RESTRICTION": (Unsupported, "the server's licence doesn't cover it"),
    "SR_FULL": (NoSpace, ("make room in the storage repository: ", Call("gc"), " shows what can go")),
    "SR_OPERATION_NOT_SUPPORTED": (Unsupported, "its storage repository's driver can't do that (xe "
                                   "sr-list params=type): another 'sr' may"),
    "SR_BACKEND_FAILURE_79": (UsageError, "the storage repository has no disks of that size"),
    "SR_BACKEND_FAILURE_44": (NoSpace, ("make room in the storage repository: ", Call("gc"))),
    "NO_HOSTS_AVAILABLE": (NoSpace, "no host can run it now; most often for want of memory: stop or "
                           "balloon another VM"),
    "HOST_NOT_ENOUGH_FREE_MEMORY": (NoSpace, "stop or balloon another VM"),
    "VM_HVM_REQUIRED": (Unsupported, "switch virtualization (VT-x, AMD-V) on in the host's firmware"),
    "VM_INCOMPATIBLE_WITH_THIS_HOST": (WrongState, ("its memory is of a host with other CPU features: "
                                       "start it there, or give the memory up: ", Call("stop"))),
    "VM_REQUIRES_SR": (WrongState, "the host has no access to its storage: xe pbd-list"),
    "VM_REQUIRES_NETWORK": (WrongState, "the host isn't on its network: xe pif-list"),
    "HOST_DISABLED": (WrongState, "it is in maintenance: xe host-enable"),
    "HOST_NOT_LIVE": (DriverFailed, "the host is down: xe host-list"),
    "MEMORY_CONSTRAINT_VIOLATION_MAXPIN": (Unsupported, "the server's licence has no Dynamic Memory "
                                           "Control: set 'memory' in the farm file instead"),
    "MEMORY_CONSTRAINT_VIOLATION": (UsageError, "give a size within the VM's limits"),
    "MEMORY_CONSTRAINT_VIOLATION_ORDER": (UsageError, "give a size within the VM's limits"),
    "MAC_INVALID": (UsageError, "give the VM another 'mac'"),
    "DUPLICATE_VM": (Conflict, "another VM has its name"),
    "SESSION_AUTHENTICATION_FAILED": (DriverFailed, "check user and password in the host's "
                                      "'credentials' file"),
    "RBAC_PERMISSION_DENIED": (DriverFailed, "the user needs the role pool-operator or higher"),
    "HOST_STILL_BOOTING": (DriverFailed, "wait until the server is up, then again"),
    "TASK_CANCELLED": (DriverFailed, "somebody cancelled it on the server: do it again"),
}  # fmt: skip


class XenApiError(Exception):
    """An error as the server told it: a code and its parameters. It stays within this package."""

    def __init__(self, description: Sequence[str]) -> None:
        super().__init__(" ".join(description))
        self.code = description[0] if description else "UNKNOWN"
        self.parameters = tuple(description[1:])


def translate(error: XenApiError, doing: str) -> FarmhandError:
    kind, remedy = _KINDS.get(error.code, (DriverFailed, "see /var/log/xensource.log on the server"))
    words = ", ".join(part for part in error.parameters if part)
    return kind(f"{doing}: {error.code}{f' ({words})' if words else ''}"[:500], remedy=remedy)


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise what the server refuses within the ``with`` as an error of ours."""
    try:
        yield
    except XenApiError as error:
        raise translate(error, doing) from error
