"""Logins that a step needs root of."""

from __future__ import annotations

from inventory.errors import Unsupported
from provision.site import Site


def no_root(site: Site, vm: str, what: str) -> Unsupported:
    """The login can't be root, which that needs, such as "step install"."""
    user = site.farm.ssh.user
    return Unsupported(
        f"{site.name}: {what} needs root on {vm}, and {user} can't be it there: no sudo without a "
        "password",
        vm=vm,
        remedy=f"write 'sudo: {user}' under 'ssh:' and make {vm} anew, or have the image do so; "
        "or log in as root ('ssh: user:')",
    )
