"""Connections to libvirt: the one place that makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from host.files import check_files_left

if TYPE_CHECKING:
    import libvirt

_FILES = 32  # a connection opens three or four; other threads open some at the same time


def connect(uri: str) -> libvirt.virConnect:
    """``libvirt.open``, where there is room for it: GLib, which libvirt is made with, ends the process
    by SIGTRAP where it can't make an eventfd(2) for a new connection (its g_main_context_new()).
    Errors: WrongState; libvirtError."""
    import libvirt

    libvirt.registerErrorHandler(lambda *_: None, None)  # it prints on stderr otherwise
    check_files_left(_FILES, "connect to libvirt")
    return libvirt.open(uri)
