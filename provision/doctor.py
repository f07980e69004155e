"""What a host needs, checked by trying: each check with what to do about it.

A check is ``needed`` (broken: nothing works without it) or a ``note`` (something works less well, or is
simply worth knowing). Nothing here changes the host, but for modes of our own files where that is asked
for.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from host import paths
from host.check import Check, Level, install
from host.memory import memory_available
from host.processes import account
from host.program import CHECKOUT, PROGRAM
from host.run import which
from hypervisors.api import ON
from hypervisors.disks.stores import STORES
from hypervisors.host import DrivenHost, all_drivers
from inventory.errors import Call, FarmhandError, UsageError, some
from inventory.hosts import DriverInfo, Host, NeededFile, Tool
from inventory.model import Farm
from inventory.sizes import about
from provision.checkup import CheckReport
from provision.farm_cache import known_farm

if TYPE_CHECKING:
    from hypervisors.far.drivers import FarHypervisor
    from provision.site import Site

# Of farmhand itself
_MODULES = ("pydantic", "yaml", "asyncssh", "jinja2", "cryptography")
# Of farmhand itself: command, Debian package, what it is for, needed
_TOOLS: tuple[tuple[Tool, Level], ...] = (
    (Tool(command="ssh", package="openssh-client", purpose="the ssh task"), "needed"),
    (Tool(command="git", package="git", purpose="fetches what is built"), "needed"),
)
# To make what VMs are cloned from, and what they read at their first boot
_IMAGE_TOOLS: tuple[tuple[Tool, Level], ...] = (
    (Tool(command="qemu-img", package="qemu-utils", purpose="makes disks"), "needed"),
    (Tool(command="genisoimage", package="genisoimage", purpose="writes first-boot data"), "needed"),
    (Tool(command="mmdebstrap", package="mmdebstrap", purpose="builds templates"), "note"),
    (Tool(command="mke2fs", package="e2fsprogs", purpose="builds templates"), "note"),
    (Tool(command="sfdisk", package="fdisk", purpose="builds templates"), "note"),
    (Tool(command="grub-mkimage", package="grub-common", purpose="builds templates"), "note"),
)
_FREE_DISKS = 6 * 2**30
_FREE_RECORDS = 2**28
_FREE_BUILD = 4 * 2**30
_MEMORY_RESERVE = 256 * 2**20


def examine(farm_file: Path, *, hosts: bool = True, repair: bool = False) -> CheckReport:
    """Check this machine and what ``farm_file`` needs of it. With ``hosts`` False no host is connected
    to, which takes seconds. ``repair``: loose modes of our files are set right."""
    farm, check = _farm(farm_file)
    kinds = _kinds(farm)
    checks: list[Check] = [_platform(), _python(farm, kinds), *_tools(farm, kinds), *_store_tools(farm)]
    checks += _permissions([kind.INFO for kind, here in kinds.items() if here or farm is None])
    for kind, here in kinds.items():
        if here or farm is None:
            checks += kind.examine(here, paths.cache_dir())
    checks += _files(farm)
    checks += [*_space(farm), *_modes(repair), _clock(), check]
    if farm is not None:
        checks += [*_memory(farm), *_keys(farm)]
        checks += _services(farm)
        checks += _repositories(farm)
        if hosts:
            checks += _hosts(farm_file, farm)
    return CheckReport(tuple(checks))


def short(farm_file: Path) -> CheckReport:
    """As ``examine``, in a fraction of a second."""
    return examine(farm_file, hosts=False)


def _kinds(farm: Farm | None) -> dict[type[DrivenHost], list[DrivenHost]]:
    """The kinds of the farm's hosts, each with those of its hosts that are this machine; the others need
    their tools over there. All kinds there are, if the farm file can't be read."""
    if farm is None:
        return {kind: [] for kind in all_drivers()}
    kinds: dict[type[DrivenHost], list[DrivenHost]] = {}
    for host in farm.hosts.values():
        assert isinstance(host, DrivenHost)
        kinds.setdefault(type(host), []).extend([] if host.far else [host])
    return kinds


def _platform() -> Check:
    release = {}
    if Path("/etc/os-release").is_file():
        release = platform.freedesktop_os_release()
    name = release.get("PRETTY_NAME", platform.platform())
    machine = platform.machine()
    if sys.platform != "linux" or machine != "x86_64":
        return Check(
            "platform", False, "needed", f"{name} on {machine}", "farmhand runs on Linux on x86-64"
        )
    debian = release.get("ID") == "debian" or "debian" in release.get("ID_LIKE", "")
    return Check(
        "platform",
        debian,
        "note",
        f"{name} on {machine}",
        "" if debian else "tried on Debian 12; elsewhere, install yourself what packages.txt names",
    )


def _python(farm: Farm | None, kinds: Mapping[type[DrivenHost], Sequence[DrivenHost]]) -> Check:
    wanted = dict.fromkeys(_MODULES)
    for kind, here in kinds.items():
        if here or farm is None:
            wanted |= dict.fromkeys(kind.INFO.modules)
    missing = [name for name in wanted if find_spec(name) is None]
    version = platform.python_version()
    if missing:
        return Check(
            "python",
            False,
            "needed",
            f"Python {version} lacks {', '.join(missing)}",
            f"call {PROGRAM} instead of invoke: it sets up an environment with all of them"
            if CHECKOUT
            else "see docs/installing.md",
        )
    return Check("python", True, "needed", f"Python {version}, all libraries found")


def _tools(farm: Farm | None, kinds: Mapping[type[DrivenHost], Sequence[DrivenHost]]) -> Iterator[Check]:
    rows = list(_TOOLS)
    if any(kind.INFO.disks and kind.INFO.guests for kind in kinds):
        rows += _IMAGE_TOOLS
    for kind, here in kinds.items():
        if here or farm is None:
            rows += [(tool, "needed") for tool in kind.INFO.tools]
    wanted = {tool.command: (tool, level) for tool, level in rows}
    missing = [row for name, row in wanted.items() if which(name) is None]
    for wanted_level in ("needed", "note"):
        tools = [tool for tool, level in missing if level == wanted_level]
        if tools:
            packages = " ".join(dict.fromkeys(tool.package for tool in tools))
            purpose = ", ".join(f"{tool.command} ({tool.purpose})" for tool in tools)
            yield Check("tools", False, wanted_level, f"not found: {purpose}", install(packages))
    if not missing:
        yield Check("tools", True, "needed", f"all {len(wanted)} commands found")


def _store_tools(farm: Farm | None) -> Iterator[Check]:
    hosts = farm.hosts.values() if farm else ()
    stores = (STORES[host.store] for host in hosts if host.store and not host.far)
    for store in dict.fromkeys(store for store in stores if store.tool):
        if which(store.tool) is None:
            text = f"not found: {store.tool} (the VMs' disks)"
            yield Check("tools", False, "needed", text, store.remark + install(store.packages))


def _wanted_files(farm: Farm, driver: DriverInfo) -> Iterator[NeededFile]:
    """Files that are needed. A boot loader is only for VMs that boot what is on their disk."""
    vms = [vm for vm in farm.vms if farm.driver_of(vm) is driver]
    all_given = all(farm.boot_of(vm) for vm in vms)
    by_efi = any(farm.firmware_of(vm) == "efi" for vm in vms)
    for file in driver.files:
        if not (file.disk_boot and all_given) and (by_efi or not file.efi):
            yield file


def _files(farm: Farm | None) -> Iterator[Check]:
    hosts = farm.hosts.values() if farm else ()
    for driver in dict.fromkeys(host.INFO for host in hosts if not host.far):
        assert farm
        missing = [file for file in _wanted_files(farm, driver) if not Path(file.path).exists()]
        if missing:
            what = ", ".join(f"{file.path} ({file.purpose})" for file in missing)
            packages = " ".join(file.package for file in missing)
            yield Check(driver.name, False, "needed", f"not found: {what}", install(packages))


def _permissions(drivers: Collection[DriverInfo]) -> Iterator[Check]:
    if os.geteuid() == 0:
        own = any(driver.own_account for driver in drivers)
        text = "root: VMs run as an account of their own" if own else "root"
        yield Check("permissions", True, "note", text)
        return

    user = account(os.geteuid())
    entry = any(line.split(":")[0] in (user, str(os.geteuid())) for line in _lines(Path("/etc/subuid")))
    yield Check(
        "subuid",
        entry and which("newuidmap") is not None,
        "note",
        "templates can be built without root" if entry else f"{user} has no range in /etc/subuid",
        f"to build templates, as root: apt-get install -y uidmap && usermod --add-subuids 100000-165535 "
        f"--add-subgids 100000-165535 {user}",
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _space(farm: Farm | None) -> Iterator[Check]:
    disks, records = "two VMs and a template", "journals, logs and first-boot data"
    state = (disks, _FREE_DISKS) if _disks_in_state(farm) else (records, _FREE_RECORDS)
    cache = ("a template's packages and image", _FREE_BUILD)
    for name, variable, path, (what, wanted) in (
        ("state space", "FARMHAND_STATE_DIR", paths.state_dir(), state),
        ("cache space", "FARMHAND_CACHE_DIR", paths.cache_dir(), cache),
    ):
        free = shutil.disk_usage(_existing(path)).free
        writable = os.access(_existing(path), os.W_OK)
        if not writable:
            remedy = f"set {variable} to a directory of yours"
            yield Check(name, False, "needed", f"{path} can't be written", remedy)
            continue
        yield Check(
            name,
            free >= wanted,
            "note",
            f"{about(free)} free for {path}",
            f"{what} take {about(wanted)}: make room, or set {variable}",
        )


def _disks_in_state(farm: Farm | None) -> bool:
    """Whether at least one host keeps disks in the state directory. True if the farm file can't be
    read."""
    return farm is None or any(host.disks_in_state for host in farm.hosts.values())


def _modes(repair: bool) -> Iterator[Check]:
    """A check of our files' modes in the state, cache and runtime directory."""
    from host.modes import loose_modes

    places = (paths.state_dir(), paths.cache_dir() / "images", paths.runtime_dir())
    loose = [each for place in places for each in loose_modes(place)]
    if repair:
        loose = [each for each in loose if not each.tighten()]
    if not loose:
        yield Check("modes", True, "note", "our files are closed to others")
        return
    some, more = ", ".join(map(str, loose[:3])), len(loose) - 3
    text = f"others may change or read: {some}" + (f" and {more} more" if more > 0 else "")
    remedy = ("if nobody meant them to: ", Call("doctor", repair=True))
    yield Check("modes", False, "note", text, remedy)


def _clock() -> Check:
    # A build host that is years off breaks TLS and packages' dates; seconds can't be judged from here.
    newest = Path(__file__).stat().st_mtime
    behind = newest - time.time()
    return Check(
        "clock",
        behind < 86400,
        "needed",
        time.strftime("%Y-%m-%d %H:%M:%S %Z")
        + (" is before this program was installed" if behind >= 86400 else ""),
        "set the clock, better: run an NTP client such as systemd-timesyncd",
    )


def _farm(farm_file: Path) -> tuple[Farm | None, Check]:
    try:
        farm = known_farm(farm_file, paths.cache_dir())
    except FarmhandError as error:
        first, *more = error.message.splitlines()
        also = f" (and {len(more)} more)" if more else ""
        return None, Check(
            "farm file", False, "needed", first + also, error.remedy or "correct the file"
        )
    vms = f"{len(farm.vms)} VMs" if len(farm.vms) != 1 else "1 VM"
    return farm, Check("farm file", True, "needed", f"{farm_file}: farm {farm.farm}, {vms}")


def _memory(farm: Farm) -> Iterator[Check]:
    """The check of memory, for VMs that take this machine's."""
    hosts = {name for name, host in farm.hosts.items() if host.INFO.shares_memory and not host.far}
    if not hosts:
        return
    available = memory_available()
    local = [vm for name, vm in farm.vms.items() if farm.host_of(name) in hosts]
    wanted = sum(vm.memory for vm in local) + (_MEMORY_RESERVE if local else 0)
    yield Check(
        "memory",
        available >= wanted,
        "note",
        f"{about(available)} available; this farm's VMs here take {about(wanted)} at most",
        "lower 'memory' in the farm file, or use idle_memory, or stop other things",
    )


def _keys(farm: Farm) -> Iterator[Check]:
    """Checks of templates whose VMs nobody could log in to."""
    from provision.guest.identity import no_key

    for error in (no_key(farm, template) for template in farm.locked_templates):
        yield Check("ssh key", False, "needed", error.message, error.remedy)


def _services(farm: Farm) -> Iterator[Check]:
    """Checks of the services' checkers, and notes on what can't be changed live."""
    used = farm.services.sections
    if not used:
        return
    from provision.network.service import services

    wanted = {tool: package for each in services(farm) for tool, package in each.TOOLS.items()}
    yield _found("network services", wanted, ", ".join(farm.services.used))
    for service in services(farm):
        for why in service.not_live():
            yield Check(f"service {service.NAME}", True, "note", why)


def _repositories(farm: Farm) -> Iterator[Check]:
    """The commands that package repositories need."""
    if not farm.repositories:
        return
    from repositories.formats import package_format
    from repositories.signing import gpg as signing
    from repositories.signing import proof

    wanted: dict[str, str] = {}
    for repository in farm.repositories.values():
        wanted |= package_format(repository.format).TOOLS
        if repository.signing:
            wanted |= {**signing.TOOLS, **proof.TOOLS}
    yield _found("package repositories", wanted, ", ".join(farm.repositories))


def _found(name: str, wanted: Mapping[str, str], told: str) -> Check:
    """That commands are there. ``wanted``: each with its Debian package."""
    missing = [tool for tool in wanted if which(tool) is None]
    packages = " ".join(dict.fromkeys(wanted[tool] for tool in missing))
    text = f"not found: {', '.join(missing)}" if missing else told
    return Check(name, not missing, "needed", text, install(packages))


def _hosts(farm_file: Path, farm: Farm) -> Iterator[Check]:
    from provision.engine.report import QuietReporter
    from provision.site import open_site

    try:
        opened = open_site(farm_file, reporter=QuietReporter(), plan=True)
    except UsageError:  # in the environment, which was examined
        return
    except FarmhandError as error:  # the state is another's, or damaged: the rest was examined
        yield Check("state", False, "needed", error.message, error.remedy)
        return
    with opened as site:
        for name, host in farm.hosts.items():
            answer = _host(site, name, host.driver)
            yield answer
            if answer.ok:
                far = site.far(name)
                if far:
                    yield from _far_tools(name, host, far, _wanted_files(farm, host.INFO))
                yield from _kernels(farm, name, far)
            if farm.network.internet and host.INFO.forwards:
                yield _loopback(site, name)
            yield from _store(site, name)
        yield from _served(site)
        yield from _subscribers(site)


def _served(site: Site) -> Iterator[Check]:
    """Checks of what network-apply is going to meet."""
    if not site.farm.services.sections:
        return
    from provision.network.apply import prospects

    title = "network services"
    try:
        found = prospects(site)
    except FarmhandError as error:
        yield Check(title, False, "needed", error.message, error.remedy)
        return
    for trouble in found.trouble:
        yield Check(title, False, "needed", trouble.message, trouble.remedy)
    for one in found.lost:
        yield Check(title, False, "needed", one.text, (Call("network-apply"), " puts it right"))
    for one in found.idle:
        yield Check(title, False, "note", one.text, (Call("network-apply"), " starts it"))
    for note in found.notes:
        yield Check(title, False, "note", note.message, note.remedy)


def _loopback(site: Site, name: str) -> Check:
    """Whether guests with internet are kept off what listens on this machine's loopback."""
    title, opened = f"loopback, host {name}", site.opened(name)
    if site.farm.network.host_loopback == "reachable":
        text = "its guests reach what listens on this machine's loopback (host_loopback: reachable)"
        return Check(title, True, "note", text)
    try:
        opened.check_loopback()
        machines = opened.hypervisor(look=True).list()
        on = [one.owner.vm for one in machines if one.owner and one.power in ON]
        if on and not opened.loopback_is_closed():
            text = f"{some(on)} may reach this machine's loopback: {opened.loopback_closed_by} are gone"
            remedy = ("a start puts them back: ", Call("stop", vm=on[0]), ", ", Call("start", vm=on[0]))
            return Check(title, False, "needed", text, remedy)
    except FarmhandError as error:
        return Check(title, False, "needed", error.message, error.remedy)
    text = f"its guests are kept off this machine's loopback, by {opened.loopback_closed_by}"
    return Check(title, True, "note", text)


def _subscribers(site: Site) -> Iterator[Check]:
    """Checks of subscribers of events. Nobody is called."""
    from provision.engine.registry import activities

    for name, section in site.farm.events.items():
        if unknown := [verb for verb in section.operations if verb not in activities()]:
            text = f"history never has {' or '.join(unknown)}, so nothing is told of it"
            remedy = f"'operations' takes what history has: {', '.join(activities())}"
            yield Check(f"events for {name}", False, "note", text, remedy)
    for name, error in site.outbox.check():
        if error is not None:
            yield Check(f"events for {name}", False, "note", error.message, error.remedy)
    try:
        for text in site.journal.troubles():
            remedy = "see to it that it answers: what waits is sent again"
            yield Check("events", False, "note", text, remedy)
    except FarmhandError as error:
        yield Check("journal", False, "needed", error.message, error.remedy)


def _host(site: Site, name: str, driver: str) -> Check:
    try:
        hypervisor = site.hypervisor(name, look=True)
        hypervisor.list()  # what it can do is known without asking it
        notes = hypervisor.capabilities().notes
        if site.far(name):  # this machine was examined
            site.opened(name).demand_accelerator()
    except FarmhandError as error:
        return Check(f"host {name}", False, "needed", error.message, error.remedy)
    return Check(f"host {name}", True, "needed", "; ".join((f"driver {driver} answers", *notes)))


def _far_tools(
    name: str, host: Host, far: FarHypervisor, files: Iterable[NeededFile]
) -> Iterator[Check]:
    """Checks of what a host's driver and store run on that machine."""
    wanted = {tool.command: tool.package for tool in host.INFO.tools if not tool.near}
    if (store := STORES.get(host.store)) and store.tool:
        wanted[store.tool] = store.packages
    wanted_files = {file.path: file.package for file in files}
    try:
        missing = far.missing(list(wanted), [Path(path) for path in wanted_files])
    except FarmhandError as error:  # the link was lost since it answered
        yield Check(f"tools of {name}", False, "needed", error.message, error.remedy)
        return
    if missing:
        packages = " ".join(dict.fromkeys({**wanted, **wanted_files}[one] for one in missing))
        text = f"not found there: {', '.join(missing)}"
        yield Check(f"tools of {name}", False, "needed", text, f"there, {install(packages)}")


def _kernels(farm: Farm, name: str, far: FarHypervisor | None) -> Iterator[Check]:
    """Checks of kernels that VMs boot and that are not on their disks."""
    boots = (farm.boot_of(vm) for vm in farm.vms if farm.host_of(vm) == name)
    wanted = (file for boot in boots if boot for file in (boot.kernel, boot.initrd) if file)
    files = [Path(file) for file in dict.fromkeys(wanted)]
    if not files:
        return
    title = f"kernel of {name}"
    try:
        missing = far.missing([], files) if far else [str(f) for f in files if not f.exists()]
    except FarmhandError as error:
        yield Check(title, False, "needed", error.message, error.remedy)
        return
    if missing:
        remedy = f"put it there, or name another in {farm.path}: 'boot' of its template"
        yield Check(title, False, "needed", f"not found: {', '.join(missing)}", remedy)
    else:
        yield Check(title, True, "needed", ", ".join(map(str, files)))


def _store(site: Site, name: str) -> Iterator[Check]:
    """Checks of what the host's disk store says of itself."""
    from hypervisors.api import WatchedDisks

    if not site.has_disks(name):
        return
    notes: tuple[str, ...] = ()
    try:
        site.opened(name).check_places()
        store = site.disks(name)
        room = store.capacity()
        if isinstance(store, WatchedDisks):
            notes = tuple(store.notes())
    except FarmhandError as error:
        yield Check(f"disks of {name}", False, "needed", error.message, error.remedy)
        return
    kind = site.farm.hosts[name].store or "storage"  # the driver's own
    text = f"{kind}: {about(room.free)} of {about(room.total)} free"
    yield Check(f"disks of {name}", True, "needed", text)
    for note in notes:
        remedy = ("make room before it is full: ", Call("gc"), ", or extend it")
        yield Check(f"disks of {name}", False, "note", note, remedy)
