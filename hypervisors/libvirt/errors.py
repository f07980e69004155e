"""libvirt's errors, translated once into ours (libvirt/virterror.h)."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from inventory.errors import (
    Call,
    Conflict,
    ConnectionLost,
    DriverFailed,
    FarmhandError,
    NotFound,
    Remedy,
    TimedOut,
    Unsupported,
    WrongState,
)

if TYPE_CHECKING:
    import libvirt

_FROM_RPC = 7
_RPC, _SYSTEM, _INTERNAL, _NO_CONNECT, _INVALID_CONN = 39, 38, 1, 5, 6
_LOST = r"[Ee]nd of file while|[Cc]onnection reset|[Bb]roken pipe|socket is closed|Cannot (write|recv)"
_LIBXL_LOG = "/var/log/libvirt/libxl/libxl-driver.log"
_NOBODY = r"Failed to find user record for uid '(\d+)'"
_KVM = r"(?i)qemu-system-\w+: (?:error: )?(?!-).*(?:\bkvm|failed to set MSR)"
_PORT = r"host forwarding rule '\w+:([0-9.]*):(\d+)-"


def need_binding() -> None:
    """Unsupported if this Python has no module libvirt. It must fit this machine's libvirt library, so
    it isn't among farmhand's other requirements."""
    if find_spec("libvirt") is None:
        raise Unsupported(
            f"{sys.executable} finds no module libvirt",
            remedy="as root: apt-get install -y --no-install-recommends python3-libvirt; a virtual "
            "environment sees it if it was made with --system-site-packages (see docs/installing.md)",
        )


def connection_lost(error: libvirt.libvirtError) -> bool:
    """Whether the error says that the connection will never answer again: the daemon is gone, or was
    started anew."""
    code, message = error.get_error_code(), error.get_error_message() or ""
    if code == _INVALID_CONN:
        return True
    return (
        error.get_error_domain() == _FROM_RPC
        and (code in {_RPC, _SYSTEM, _INTERNAL})
        and bool(re.search(_LOST, message))
    )


def unreachable(error: libvirt.libvirtError) -> bool:
    """Whether the error says that nobody listens there."""
    message = error.get_error_message() or ""
    return error.get_error_code() in {_NO_CONNECT, _SYSTEM} and "connect socket" in message


def going_down(error: libvirt.libvirtError) -> bool:
    """Whether the error says that Xen has the domain no more, though libvirt calls it running. libvirt
    destroys it without its own lock, and what is read meanwhile fails so (libxlDomainGetInfo() in
    libxl_driver.c)."""
    message = error.get_error_message() or ""
    return error.get_error_code() == _INTERNAL and "libxl_domain_info failed" in message


def translate(error: libvirt.libvirtError, doing: str) -> FarmhandError:
    """The error of ours for one of libvirt's. ``doing``: such as "start kata-prod"; it is part of the
    message."""
    code = error.get_error_code()
    message = " ".join((error.get_error_message() or "unknown error").split())
    if port := re.search(_PORT, message):
        return Conflict(
            f"{doing}: port {port[2]} of {port[1] or 'this host'} is taken",
            remedy=f"see who has it (ss -ltnp 'sport = :{port[2]}'), or give the VM another ssh_port",
        )
    if connection_lost(error):
        return ConnectionLost(
            f"{doing}: the connection to libvirtd was lost: {message}",
            remedy="run the command again: it finishes what was begun",
        )
    if unreachable(error):
        daemon = "virtlogd" if "virtlogd" in message else "libvirtd"  # the second asks the first
        return DriverFailed(
            f"{doing}: no {daemon} there: {message}",
            remedy=f"systemctl start {daemon}",
        )
    if uid := re.search(_NOBODY, message):
        return Unsupported(
            f"{doing}: {message}",
            remedy=f"libvirt wants an account: uid {uid[1]} has none (getent passwd {uid[1]})",
        )
    if going_down(error):
        return WrongState(f"{doing}: it is going down", remedy=(Call("status"), " shows its state"))
    if "libxenlight failed" in message:  # all that libvirt tells of it
        where = f"see why at the end of that host's {_LIBXL_LOG}"
        return DriverFailed(f"{doing}: {message}", remedy=where)
    by_code: dict[int, tuple[type[FarmhandError], Remedy]] = {
        42: (NotFound, (Call("status"), " shows what is there")),  # NO_DOMAIN
        43: (NotFound, "virsh net-list --all shows libvirt's networks"),  # NO_NETWORK
        55: (WrongState, (Call("status"), " shows its state")),  # OPERATION_INVALID
        3: (Unsupported, ""),  # NO_SUPPORT
        67: (Unsupported, (Call("doctor"), " shows what this host can do")),  # CONFIG_UNSUPPORTED
        68: (TimedOut, "another command holds the machine: try again"),  # OPERATION_TIMEOUT
        45: (DriverFailed, (Call("doctor"), " shows which permission is missing")),  # AUTH_FAILED
        79: (DriverFailed, (Call("doctor"), " shows which permission is missing")),  # AUTH_CANCELLED
        88: (DriverFailed, "add this user to the group libvirt"),  # ACCESS_DENIED
    }
    if re.search(_KVM, message):  # QEMU's words: it fails this guest, whatever was tried beforehand
        without = "do without KVM: FARMHAND_ACCELERATOR=tcg, or accelerator: tcg of its host"
        return DriverFailed(f"{doing}: {message}", remedy=without)
    if "already exists with uuid" in message:
        return Conflict(f"{doing}: {message}")
    family, remedy = by_code.get(code, (DriverFailed, (Call("doctor"), " checks the host")))
    return family(f"{doing}: {message}", remedy=remedy)
