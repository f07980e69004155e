"""What a host needs, checked by trying: each check with what to do about it.

A check is ``needed`` (broken: nothing works without it) or a ``note`` (something works less well, or is
simply worth knowing). Nothing here changes the host.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from host import paths
from host.run import Runner, which
from hypervisors.far.address import is_far
from inventory.errors import FarmhandError, UsageError
from inventory.model import Farm, Host
from inventory.sizes import about
from provision.checkup import Check, Level, Report
from provision.known import known_farm

if TYPE_CHECKING:
    from hypervisors.far.drivers import FarHypervisor
    from provision.site import Site

_LIBVIRT = frozenset(("kvm", "xen"))
_FAR = "far"  # in place of the driver, for a host of libvirt's on another machine
_CLONES = _LIBVIRT | {"xenapi", _FAR}
_ALL = _CLONES | {"ssh", "fake"}

# Command: (Debian package, what it is for, needed, by farms with hosts of these drivers)
_TOOLS: Mapping[str, tuple[str, str, Level, frozenset[str]]] = {
    "qemu-system-x86_64": ("qemu-system-x86", "runs the VMs", "needed", frozenset(("kvm",))),
    "qemu-img": ("qemu-utils", "makes disks", "needed", _CLONES),
    "libvirtd": ("libvirt-daemon", "manages the VMs", "needed", _LIBVIRT),
    "virsh": ("libvirt-clients", "consoles", "needed", _LIBVIRT),
    "genisoimage": ("genisoimage", "writes first-boot data", "needed", _CLONES),
    "ssh": ("openssh-client", "the ssh task", "needed", _ALL),
    "git": ("git", "fetches what is built", "needed", _ALL),
    "mmdebstrap": ("mmdebstrap", "builds templates", "note", _CLONES),
    "mke2fs": ("e2fsprogs", "builds templates", "note", _CLONES),
    "sfdisk": ("fdisk", "builds templates", "note", _CLONES),
    "grub-mkimage": ("grub-common", "builds templates", "note", _CLONES),
    "unshare": ("util-linux", "the private libvirtd", "needed", frozenset(("kvm",))),
}
# By disk store, where it is the host's own: command and Debian package
_STORE_TOOLS: Mapping[str, tuple[str, str]] = {
    "zfs": ("zfs", "zfsutils-linux"),
    "zfs-files": ("zfs", "zfsutils-linux"),
    "lvm-thin": ("lvm", "lvm2 thin-provisioning-tools"),
    "lvm": ("lvm", "lvm2"),
}
# What Xen needs that is no command: file, package, what it is for
_XEN_FILES: tuple[tuple[str, str, str], ...] = (
    ("/usr/lib/grub-xen/grub-x86_64-xen.bin", "grub-xen-host", "starts the VMs"),
    ("/usr/libexec/xen-qemu-system-i386", "qemu-system-xen", "disks that are files, as first-boot data"),
)
_FREE_DISKS = 6 * 2**30
_FREE_RECORDS = 2**28
_FREE_BUILD = 4 * 2**30
_MEMORY_RESERVE = 256 * 2**20


def examine(farm_file: Path, *, hosts: bool = True) -> Report:
    """Check this machine and what ``farm_file`` needs of it. ``hosts`` False leaves out what takes
    seconds: connecting to each host."""
    farm, check = _farm(farm_file)
    drivers = {_where(host) for host in farm.hosts.values()} if farm else _ALL
    checks: list[Check] = [_platform(), _python(), *_tools(drivers), *_store_tools(farm)]
    checks += _permissions(drivers)
    if "kvm" in drivers:
        checks.append(_kvm(farm))
    if farm and "xen" in drivers:
        checks += _xen_files(farm)
    checks += [*_space(farm), _clock(), check]
    if farm is not None:
        if "kvm" in drivers:
            checks.append(_memory(farm))
        checks += _services(farm)
        if hosts:
            checks += _hosts(farm_file, farm)
    return Report(tuple(checks))


def short(farm_file: Path) -> Report:
    """As ``examine``, in a fraction of a second."""
    return examine(farm_file, hosts=False)


def _where(host: Host) -> str:
    """Its driver, or ``_FAR``: then what that needs, it needs over there."""
    return _FAR if host.driver in _LIBVIRT and is_far(host.uri) else host.driver


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


def _python() -> Check:
    wanted = ("pydantic", "yaml", "asyncssh", "jinja2", "cryptography", "libvirt")
    missing = [name for name in wanted if find_spec(name) is None]
    version = platform.python_version()
    if missing:
        return Check(
            "python",
            False,
            "needed",
            f"Python {version} lacks {', '.join(missing)}",
            "call ./invoke instead of invoke: it sets up an environment with all of them",
        )
    return Check("python", True, "needed", f"Python {version}, all libraries found")


def _tools(drivers: Collection[str]) -> Iterator[Check]:
    wanted = [name for name, (*_, whose) in _TOOLS.items() if whose & {*drivers}]
    missing = [name for name in wanted if which(name) is None]
    for level in ("needed", "note"):
        names = [name for name in missing if _TOOLS[name][2] == level]
        if names:
            packages = " ".join(dict.fromkeys(_TOOLS[name][0] for name in names))
            purpose = ", ".join(f"{name} ({_TOOLS[name][1]})" for name in names)
            yield Check(
                "tools",
                False,
                level,
                f"not found: {purpose}",
                _install(packages),
            )
    if not missing:
        yield Check("tools", True, "needed", f"all {len(wanted)} commands found")


def _install(packages: str) -> str:
    return f"as root: apt-get install -y --no-install-recommends {packages}"


def _store_tools(farm: Farm | None) -> Iterator[Check]:
    hosts = farm.hosts.values() if farm else ()
    stores = {host.disks.store for host in hosts if _where(host) in _LIBVIRT}
    for tool, packages in sorted({_STORE_TOOLS[s] for s in stores if s in _STORE_TOOLS}):
        if which(tool) is None:
            where = "with Debian's contrib, " if tool == "zfs" else ""
            yield Check(
                "tools",
                False,
                "needed",
                f"not found: {tool} (the VMs' disks)",
                where + _install(packages),
            )


def _xen_wants(farm: Farm) -> Iterator[tuple[str, str, str]]:
    """Of _XEN_FILES; GRUB is for VMs that boot what is on their disk."""
    on_xen = [vm for vm in farm.vms if farm.hosts[farm.host_of(vm)].driver == "xen"]
    for row in _XEN_FILES:
        if row[1] != "grub-xen-host" or not all(farm.boot_of(vm) for vm in on_xen):
            yield row


def _xen_files(farm: Farm) -> Iterator[Check]:
    missing = [row for row in _xen_wants(farm) if not Path(row[0]).exists()]
    if missing:
        yield Check(
            "xen",
            False,
            "needed",
            f"not found: {', '.join(f'{path} ({what})' for path, _, what in missing)}",
            _install(" ".join(row[1] for row in missing)),
        )


def _permissions(drivers: Collection[str]) -> Iterator[Check]:
    if os.geteuid() == 0:
        own = ": VMs run as an account of their own" if "kvm" in drivers else ""
        yield Check("permissions", True, "note", f"root{own}")
        return
    import grp
    import pwd

    user = pwd.getpwuid(os.geteuid()).pw_name
    held = {grp.getgrgid(gid).gr_name for gid in os.getgroups() if _known_group(gid)}
    if "kvm" in drivers:
        yield Check(
            "permissions",
            "kvm" in held,
            "note",
            f"{user}: {'in' if 'kvm' in held else 'not in'} the group kvm",
            f"for KVM, as root: adduser {user} kvm, then log in again (for qemu:///system also libvirt)",
        )
    entry = any(line.split(":")[0] in (user, str(os.geteuid())) for line in _lines(Path("/etc/subuid")))
    yield Check(
        "subuid",
        entry and which("newuidmap") is not None,
        "note",
        "templates can be built without root" if entry else f"{user} has no range in /etc/subuid",
        f"to build templates, as root: apt-get install -y uidmap && usermod --add-subuids 100000-165535 "
        f"--add-subgids 100000-165535 {user}",
    )


def _known_group(gid: int) -> bool:
    import grp

    try:
        grp.getgrgid(gid)
    except KeyError:
        return False
    return True


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _kvm(farm: Farm | None) -> Check:
    """Of this machine, for the farm's hosts that are this one."""
    from hypervisors.libvirt.kvm import DO_WITHOUT, asked_for, judge

    hosts = [host for host in farm.hosts.values() if _where(host) == "kvm"] if farm else [Host()]
    try:
        asked = {asked_for(host.accelerator) for host in hosts}
    except FarmhandError as error:
        return Check("kvm", False, "needed", error.message, error.remedy)
    if asked == {"tcg"}:
        text = "KVM is not asked for (accelerator: tcg); QEMU's emulation is used (slower)"
        return Check("kvm", True, "note", text)
    verdict = judge("auto", Runner(), paths.cache_dir())
    if verdict.usable:
        return Check("kvm", True, "note", f"KVM works: {verdict.why}")
    if "kvm" in asked:
        text = f"KVM is asked for (accelerator: kvm), but doesn't work ({verdict.why})"
        return Check("kvm", False, "needed", text, verdict.remedy or DO_WITHOUT)
    return Check(
        "kvm",
        False,
        "note",
        f"KVM doesn't work ({verdict.why}); QEMU's emulation is used (slower)",
        verdict.remedy
        or "for speed: enable virtualization in the firmware, or nested KVM on the outer host",
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _space(farm: Farm | None) -> Iterator[Check]:
    disks, records = "two VMs and a template", "journals, logs and first-boot data"
    state = (disks, _FREE_DISKS) if _disks_in_state(farm) else (records, _FREE_RECORDS)
    for name, path, (what, wanted) in (
        ("state space", paths.state_dir(), state),
        ("cache space", paths.cache_dir(), ("a template's packages and image", _FREE_BUILD)),
    ):
        free = shutil.disk_usage(_existing(path)).free
        writable = os.access(_existing(path), os.W_OK)
        if not writable:
            variable = "FARMHAND_STATE_DIR" if name.startswith("state") else "FARMHAND_CACHE_DIR"
            remedy = f"set {variable} to a directory of yours"
            yield Check(name, False, "needed", f"{path} can't be written", remedy)
            continue
        yield Check(
            name,
            free >= wanted,
            "note",
            f"{about(free)} free for {path}",
            f"{what} take {about(wanted)}: make room, or set FARMHAND_{name.split()[0].upper()}_DIR",
        )


def _disks_in_state(farm: Farm | None) -> bool:
    """Of one host at least; of a file that can't be read it may be so."""
    return farm is None or any(
        host.driver in _LIBVIRT and host.disks.store == "qcow2" and host.disks.path is None
        for host in farm.hosts.values()
    )


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


def _memory(farm: Farm) -> Check:
    facts = dict(line.split(":", 1) for line in _lines(Path("/proc/meminfo")) if ":" in line)
    available = int(facts.get("MemAvailable", "0 kB").split()[0]) * 1024
    hosts = {name for name, host in farm.hosts.items() if _where(host) == "kvm"}
    local = [vm for name, vm in farm.vms.items() if farm.host_of(name) in hosts]
    wanted = sum(vm.memory for vm in local) + (_MEMORY_RESERVE if local else 0)
    return Check(
        "memory",
        available >= wanted,
        "note",
        f"{about(available)} available; this farm's VMs here take {about(wanted)} at most",
        "lower 'memory' in the farm file, or use idle_memory, or stop other things",
    )


# Service: commands that check it or tell it, each with its Debian package
_SERVICE_TOOLS: Mapping[str, Mapping[str, str]] = {
    "bind": {"named-checkconf": "bind9-utils", "named-checkzone": "bind9-utils"},
    "dhcpd": {"dhcpd": "isc-dhcp-server"},
    "kea": {"kea-dhcp4": "kea-dhcp4-server"},
    "dnsmasq": {"dnsmasq": "dnsmasq-base", "dhcp_release": "dnsmasq-utils"},
    "ssh_config": {"ssh": "openssh-client"},
    "nginx": {"nginx": "nginx-light"},
    "haproxy": {"haproxy": "haproxy"},
    "nftables": {"nft": "nftables"},
    "shorewall": {"shorewall": "shorewall"},
    "libvirt": {"virt-xml-validate": "libvirt-clients", "xmllint": "libxml2-utils"},
}


def _services(farm: Farm) -> Iterator[Check]:
    """Their checkers, and what can't be changed live."""
    used = farm.services.used
    if not used:
        return
    wanted = {tool: package for name in used for tool, package in _SERVICE_TOOLS.get(name, {}).items()}
    missing = [tool for tool in wanted if which(tool) is None]
    packages = " ".join(dict.fromkeys(wanted[tool] for tool in missing))
    yield Check(
        "network services",
        not missing,
        "needed",
        f"not found: {', '.join(missing)}" if missing else ", ".join(used),
        _install(packages),
    )
    from provision.network.daemons import not_live

    for name, why in not_live(farm):
        yield Check(f"service {name}", True, "note", why)


def _hosts(farm_file: Path, farm: Farm) -> Iterator[Check]:
    from provision.engine.report import QuietReporter
    from provision.site import open_site

    try:
        opened = open_site(farm_file, reporter=QuietReporter(), plan=True)
    except UsageError:  # FARMHAND_ACCELERATOR, of which _kvm tells
        return
    with opened as site:
        for name, host in farm.hosts.items():
            answer = _host(site, name, host.driver)
            yield answer
            if answer.ok:
                far = site.far(name)
                if far:
                    yield from _far_tools(name, host, far, _xen_wants(farm))
                yield from _kernels(farm, name, far)
            yield from _store(site, name)
        yield from _subscribers(site)


def _subscribers(site: Site) -> Iterator[Check]:
    """Of events. Nobody is called."""
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
        if site.far(name):  # of this machine, _kvm tells
            site.demand_kvm(name)
    except FarmhandError as error:
        return Check(f"host {name}", False, "needed", error.message, error.remedy)
    return Check(f"host {name}", True, "needed", "; ".join((f"driver {driver} answers", *notes)))


def _far_tools(
    name: str, host: Host, far: FarHypervisor, xen: Iterable[tuple[str, str, str]]
) -> Iterator[Check]:
    """What its driver and its store run on that machine; ``xen``: where that is the driver."""
    wanted = {tool: _TOOLS[tool][0] for tool in ("qemu-img", "libvirtd", "virsh")}
    if host.driver == "kvm":
        wanted["qemu-system-x86_64"] = _TOOLS["qemu-system-x86_64"][0]
    if host.disks.store in _STORE_TOOLS:
        tool, package = _STORE_TOOLS[host.disks.store]
        wanted[tool] = package
    files = {path: package for path, package, _ in xen} if host.driver == "xen" else {}
    try:
        missing = far.missing(list(wanted), [Path(path) for path in files])
    except FarmhandError as error:  # the link was lost since it answered
        yield Check(f"tools of {name}", False, "needed", error.message, error.remedy)
        return
    if missing:
        packages = " ".join(dict.fromkeys({**wanted, **files}[one] for one in missing))
        text = f"not found there: {', '.join(missing)}"
        yield Check(f"tools of {name}", False, "needed", text, f"there, {_install(packages)}")


def _kernels(farm: Farm, name: str, far: FarHypervisor | None) -> Iterator[Check]:
    """What its VMs boot that is not on their disks."""
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
    """What the host's disk store says of itself."""
    from hypervisors.api import WatchedDisks

    if not site.has_disks(name):
        return
    notes: tuple[str, ...] = ()
    try:
        site.check_places(name)
        store = site.disks(name)
        room = store.capacity()
        if isinstance(store, WatchedDisks):
            notes = tuple(store.notes())
    except FarmhandError as error:
        yield Check(f"disks of {name}", False, "needed", error.message, error.remedy)
        return
    host = site.farm.hosts[name]
    kind = host.disks.store if host.driver in _LIBVIRT else "storage"  # of the server's own
    text = f"{kind}: {about(room.free)} of {about(room.total)} free"
    yield Check(f"disks of {name}", True, "needed", text)
    for note in notes:
        remedy = "make room before it is full: ./invoke gc, or extend it"
        yield Check(f"disks of {name}", False, "note", note, remedy)
