"""Hosts of driver kvm: their section and its opening."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from host.processes import account
from host.run import Runner
from hypervisors.api import Directories
from hypervisors.host import Surroundings
from hypervisors.libvirt.firmware import OVMF
from hypervisors.libvirt.host import TOOLS, LibvirtHost, OpenLibvirt
from inventory.base import at_key, quote
from inventory.errors import FarmhandError, Unsupported
from inventory.hosts import DriverInfo, NeededFile, Tool

if TYPE_CHECKING:  # the last, for the annotations, which inventory has evaluated
    from host.check import Check
    from hypervisors.far.drivers import FarKvmTrust
    from hypervisors.libvirt.kvm import KvmVerdict
    from hypervisors.libvirt.kvm_trust import KvmTrust
    from hypervisors.libvirt.opening import Place
    from hypervisors.libvirt.private import PrivateLibvirt
    from inventory.fields import Line


@dataclass(frozen=True, kw_only=True)
class KvmHost(LibvirtHost):
    """QEMU with KVM, through libvirt; it falls back to QEMU's own emulation, saying so, where KVM
    doesn't work (see `accelerator`)."""

    INFO: ClassVar = DriverInfo(
        name="kvm", called="a kvm host", shares_memory=True, forwards=True, own_account=True,
        firmware=("bios", "efi"),
        modules=("libvirt",),
        tools=(
            Tool(command="qemu-system-x86_64", package="qemu-system-x86", purpose="runs the VMs"),
            *TOOLS,
            Tool(command="virtlogd", package="libvirt-daemon", purpose="bounds console logs", near=True),
            Tool(command="unshare", package="util-linux", purpose="the private libvirtd", near=True),
        ),
        files=(NeededFile(path=OVMF, package="ovmf", purpose="starts VMs by EFI", efi=True),),
    )  # fmt: skip

    driver: Literal["kvm"] = "kvm"
    uri: Line = "private"
    """`private`: farmhand's own libvirtd, needing nothing from the host; or a libvirt URI such as
    qemu:///system, or another machine's, qemu+ssh://root@HOST/system."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    """`auto` is KVM where it works, else QEMU's emulation; with `kvm` no VM is started where it doesn't
    work; `tcg` is always emulation, and KVM is not even tried. The environment variable
    FARMHAND_ACCELERATOR, with one of these, goes before it."""

    def __post_init__(self) -> None:
        if not self.private and ":" not in self.uri:
            raise at_key("uri", f"{quote(self.uri)} is neither 'private' nor a libvirt URI", "driver")

    @property
    def private(self) -> bool:
        """Whether it is served by farmhand's own libvirtd."""
        return self.uri == "private"

    def opened(self, around: Surroundings) -> OpenKvm:
        return OpenKvm(self, around)

    @classmethod
    def check_environment(cls) -> None:
        from hypervisors.libvirt.kvm import asked_for

        asked_for()

    @classmethod
    def daemon_left(cls, directories: Directories) -> PrivateLibvirt | None:
        from hypervisors.libvirt.private import private_libvirt

        left = private_libvirt(directories)
        return left if left.directory.exists() else None

    @classmethod
    def examine(cls, hosts: Sequence[Self], cache: Path) -> Iterator[Check]:
        if os.geteuid() != 0:
            yield _group()
        yield _kvm([host.accelerator for host in hosts] or ["auto"], cache)


def _group() -> Check:
    import grp

    from host.check import Check

    user = account(os.geteuid())
    held = any(group.gr_gid in os.getgroups() for group in grp.getgrall() if group.gr_name == "kvm")
    return Check(
        "permissions",
        held,
        "note",
        f"{user}: {'in' if held else 'not in'} the group kvm",
        f"for KVM, as root: adduser {user} kvm, then log in again (for qemu:///system also libvirt)",
    )


def _kvm(declared: Sequence[Literal["auto", "kvm", "tcg"]], cache: Path) -> Check:
    from host.check import Check
    from hypervisors.libvirt.kvm import DO_WITHOUT, asked_for, judge

    try:
        asked = {asked_for(each) for each in declared}
    except FarmhandError as error:
        return Check("kvm", False, "needed", error.message, error.remedy)
    if asked == {"tcg"}:
        text = "KVM is not asked for (accelerator: tcg); QEMU's emulation is used (slower)"
        return Check("kvm", True, "note", text)
    verdict = judge("auto", Runner(), cache)
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


class OpenKvm(OpenLibvirt):
    """A host with QEMU: by the farm's own libvirtd, the system's, the session's, or another
    machine's."""

    declared: KvmHost
    loopback_closed_by = "farmhand's nftables rules"

    def __init__(self, declared: KvmHost, around: Surroundings) -> None:
        super().__init__(declared, around)
        self._private: PrivateLibvirt | None = None

    def place(self) -> Place:
        from hypervisors.libvirt.kvm import asked_for
        from hypervisors.libvirt.opening import Place

        return Place(
            disks=self.store_place(), driver="kvm", uri=self.declared.uri,
            accelerator=asked_for(self.declared.accelerator),
        )  # fmt: skip

    def daemon(self) -> PrivateLibvirt | None:
        if not self.declared.private:
            return None
        with self._guard:
            if self._private is None:
                from hypervisors.libvirt.private import private_libvirt

                around = self.around.directories
                self._private = private_libvirt(around, hide_kvm=self._nowhere_usable)
            return self._private

    @property
    def _directory(self) -> Path:
        """The private daemon's directory. It is there once something was made."""
        return self.around.directories.farm / "libvirt"

    def _nowhere_usable(self) -> bool:
        """Whether KVM works for none of the farm's hosts that have the private daemon."""
        sharing = (h for h in self.around.hosts.values() if isinstance(h, KvmHost) and h.private)
        return not any(_verdict(host, self.around.directories.cache).usable for host in sharing)

    def _uri(self) -> str | Callable[[], str]:
        """See ``OpenLibvirt._uri``. A private daemon that was killed is started again at the next
        connecting."""
        private = self.daemon()
        return private.uri if private else self.declared.uri

    def _untouched(self) -> bool:
        """See ``OpenHost._untouched``. Of a private daemon its directory tells: there is none, or no
        definition and no disk in it; and no guest of it runs, for the directory may be lost."""
        if not self.declared.private:
            return False
        if self._directory.exists() or self.around.directories.runtime.exists():
            daemon = self.daemon()
            if daemon and (daemon.defined() or daemon.machines_running()):
                return False
        return not self.disks().list()

    def reader_uid(self) -> int | None:
        if self.declared.private and os.geteuid() == 0:
            from hypervisors.libvirt.private import qemu_user

            return qemu_user()
        return super().reader_uid()

    def forwards_as(self) -> int | None:
        if not self.declared.private:
            return None
        reader = self.reader_uid()
        return os.geteuid() if reader is None else reader

    def check_places(self) -> None:
        if self.declared.private:
            from hypervisors.libvirt.private import check_runtime

            check_runtime(self.around.directories.runtime)
        super().check_places()

    def demand_accelerator(self) -> None:
        from hypervisors.libvirt.kvm import DO_WITHOUT, KvmVerdict, asked_for

        if asked_for(self.declared.accelerator) != "kvm":
            return
        if self.declared.far:
            able = self.hypervisor().capabilities()
            verdict = KvmVerdict(able.accelerated, able.why_accelerated)
        else:
            verdict = _verdict(self.declared, self.around.directories.cache)
        if not verdict.usable:
            raise Unsupported(
                f"{self.around.farm_file}: host {self.around.host} is to use KVM (accelerator: kvm): "
                f"{verdict.why}",
                remedy=verdict.remedy or DO_WITHOUT,
            )

    def check_loopback(self) -> None:
        from hypervisors.libvirt.host_loopback import check_able

        where = f"{self.around.farm_file}: host {self.around.host}"
        if not self.declared.private:
            raise Unsupported(
                f"{where}: guests with 'internet' can't be kept off this machine's loopback "
                f"where QEMU is run by {self.declared.uri}",
                remedy=f"'uri: private' as root, or a bridge, or {_REACHABLE}",
            )
        if os.geteuid() != 0:
            raise Unsupported(
                f"{where}: only root can keep guests with 'internet' off this machine's loopback",
                remedy=f"as root, or {_REACHABLE}",
            )
        check_able()

    def close_loopback(self) -> None:
        from hypervisors.libvirt.host_loopback import close
        from hypervisors.libvirt.private import qemu_user

        self.check_loopback()
        close(self.around.runner, qemu_user())

    def loopback_is_closed(self) -> bool:
        from hypervisors.libvirt.host_loopback import is_closed

        return is_closed(self.around.runner)

    def on_trial(self) -> bool:
        from hypervisors.libvirt.kvm import asked_for

        return asked_for(self.declared.accelerator) == "auto" and not self._trust().proven()

    def prove(self) -> None:
        self._trust().prove()

    def distrust(self, why: str) -> None:
        self._trust().distrust(why)

    def _trust(self) -> KvmTrust | FarKvmTrust:
        """What guests have shown of the KVM of that host's machine."""
        if far := self.far():
            return far.kvm_trust()
        from hypervisors.libvirt.kvm_trust import KvmTrust

        return KvmTrust(self.around.directories.cache)


_REACHABLE = "accept that they reach it: network: {host_loopback: reachable}"


def _verdict(host: KvmHost, cache: Path) -> KvmVerdict:
    """Whether KVM works for a host that is this machine."""
    from hypervisors.libvirt.kvm import asked_for, judge

    return judge(asked_for(host.accelerator), Runner(), cache)
