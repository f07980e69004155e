"""Steps that need root in a VM, and logins that can't be it."""

from __future__ import annotations

from collections.abc import Sequence

from builds.step_kind import StepKind
from inventory.errors import Unsupported
from provision.site import Site


def wanted(site: Site, steps: Sequence[StepKind], vm: str) -> str:
    """The first of the steps that needs root in the VM, where the login is another; "" if none does."""
    if site.farm.ssh.user == "root":
        return ""
    return next((step.name for step in steps if step.needs_root and vm in step.vms), "")


def check_told(site: Site, steps: Sequence[StepKind], vm: str) -> None:
    """Unsupported where the farm file itself says that the login can't be root: farmhand makes its VMs'
    logins, and this one has no `sudo`. Of others' images only they know."""
    template = site.farm.templates.get(site.farm.template_of(vm) or "")
    if template is None or template.first_boot != "farmhand" or site.farm.ssh.user in site.farm.ssh.sudo:
        return
    if step := wanted(site, steps, vm):
        raise no_root(site, vm, step)


def no_root(site: Site, vm: str, step: str) -> Unsupported:
    """The login can't be root, which that step needs."""
    user = site.farm.ssh.user
    return Unsupported(
        f"{site.name}: step {step} needs root on {vm}, and {user} can't be it there: no sudo without a "
        "password",
        vm=vm,
        remedy=f"write 'sudo: {user}' under 'ssh:' and make {vm} anew, or have the image do so; "
        "or log in as root ('ssh: user:')",
    )
