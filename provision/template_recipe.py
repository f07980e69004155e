"""What a farm's templates are built from, and which of their generations are older than that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hypervisors.api import Template
from inventory.errors import Call, FarmhandError, Text, UsageError, some

if TYPE_CHECKING:
    from provision.guest.debian import Recipe
    from provision.member import Member
    from provision.site import Site


def storing_hosts(site: Site) -> list[str]:
    """Hosts with a disk store. Machines that are known by ssh alone are never cloned onto."""
    return [name for name, host in site.farm.hosts.items() if host.INFO.disks]


def hosts_of(site: Site, name: str) -> list[str]:
    """The hosts that have VMs of the template; if none has, the first that could. UsageError if none
    could."""
    using = {site.farm.host_of(vm) for vm in site.farm.vms if site.farm.template_of(vm) == name}
    storing = storing_hosts(site)
    hosts = [host for host in storing if host in using] or storing[:1]
    if not hosts:
        raise UsageError(f"template {name}: the farm has no host that clones disks")
    return hosts


def recipe_of(site: Site, name: str) -> Recipe:
    """What a built template is built from now. With the logins that the farm file names: those keys work
    even without a seed. The farm's own key comes with each VM's seed. With a kernel that boots on all of
    its hosts. Errors: NotFound, UsageError, InventoryError."""
    from provision.guest.debian import load_recipe
    from provision.guest.identity import authorized

    source, ssh = site.farm.templates[name], site.farm.ssh
    assert source.build is not None
    logins = {login: authorized(site.farm, entries) for login, entries in ssh.users.items()}
    if ssh.authorized_keys:
        own = authorized(site.farm, ssh.authorized_keys)
        logins[ssh.user] = tuple(dict.fromkeys((*logins.get(ssh.user, ()), *own)))
    paravirtual = any(site.farm.hosts[host].paravirtual for host in hosts_of(site, name))
    packages = (*source.packages, *(("sudo",) if ssh.sudo else ()))
    return load_recipe(source.build, packages=packages, logins=logins, paravirtual=paravirtual)


def left_alone(site: Site, name: str, sealed: Template | None) -> bool:
    """Whether nobody tells the clones of that template anything at their first boot. The farm file goes
    before what was noted when the image was imported."""
    source = site.farm.templates.get(name)
    return ((source and source.firstboot) or (sealed and sealed.firstboot)) == "none"


_WORDS = 3
"""Of the origin of what is built."""


def origin(recipe: str, key: str, packages: bytes = b"") -> str:
    """``Template.origin`` of what is built: the recipe's name, its digest (``key``), and the digest of
    both and of the packages that came of it, version by version. Two of the same have the same
    content."""
    lines = sorted(packages.splitlines())
    content = hashlib.sha256(b"\n".join((key.encode(), *lines))).hexdigest()[:16]
    return f"{recipe} {key} {content}"


def content_of(template: Template) -> tuple[list[str], int, str]:
    """Equal for generations that are the same: see ``origin``; of an imported one the image's digest."""
    return template.origin.split()[-1:], template.size, template.firstboot


def is_outdated(site: Site, template: Template) -> bool:
    """Whether the farm file, or farmhand's own recipe, would make another one now, however new its
    packages are. False where nobody can tell: what is imported, and a recipe that can't be read."""
    source = site.farm.templates.get(template.name)
    if source is None or source.build is None:
        return False
    try:
        key = recipe_of(site, template.name).digest(source.size)
    except FarmhandError:
        return False
    made_of = template.origin.split()
    return len(made_of) == _WORDS and made_of[:2] != [source.build, key]


def notes_of(members: Sequence[Member]) -> Sequence[Text]:
    """``generation_notes`` of these VMs' hosts, by a look at their stores."""
    notes: dict[Text, None] = {}
    for host in dict.fromkeys(member.host for member in members if member.info.disks):
        there = {one.vm: one.disk() for one in members if one.host == host}
        used = {vm: disk.template for vm, disk in there.items() if disk}
        site = members[0].site
        notes |= dict.fromkeys(generation_notes(site, site.templates(host), used))
    return tuple(notes)


def generation_notes(
    site: Site, templates: Iterable[Template], used: Mapping[str, str]
) -> Sequence[Text]:
    """What there is to say of a host's templates. ``used``: by VM, the generation that it is on.

    A newest generation that ``is_outdated``; VMs that are on an older one than the newest."""
    newest: dict[str, Template] = {}
    for template in sorted(templates, key=lambda one: one.generation):
        if template.farm == site.identity:
            newest[template.name] = template
    meant = {vm: newest.get(site.farm.template_of(vm) or "") for vm in used if vm in site.farm.vms}
    notes: list[Text] = []
    for name in sorted({template.name for template in meant.values() if template}):
        if is_outdated(site, newest[name]):
            again = Call("template-build", name=name)
            notes.append((f"{newest[name].label} is older than the file's recipe: ", again))
    behind = {vm: one.label for vm, one in meant.items() if one and used[vm] and used[vm] != one.label}
    for label in sorted(set(behind.values())):
        vms = [vm for vm, other in behind.items() if other == label]
        text = f"{label} is newer than what {some(vms)} {'is' if len(vms) == 1 else 'are'} on: "
        notes.append((text, Call("renew", vm=vms[0]) if len(vms) == 1 else Call("renew", all=True)))
    return notes
