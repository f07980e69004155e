"""A Debian 13 image as clouds have them, made of Debian's packages, with cloud-init and netplan: one
that farmhand knows nothing of."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from host.run import Runner
from hypervisors.disks.images import convert
from provision.guest.debian import TEMPLATES, apt_settings, write_sources

_PACKAGES = (
    "systemd-sysv", "systemd-resolved", "udev", "dbus", "kmod", "initramfs-tools",
    "linux-image-cloud-amd64", "openssh-server", "cloud-init", "cloud-guest-utils", "dhcpcd-base",
    "netplan.io", "iproute2", "iputils-ping", "sudo", "procps", "e2fsprogs", "fdisk", "locales",
)  # fmt: skip
_CUSTOMIZE = (
    'rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/hostname "$1"/etc/resolv.conf; : >"$1"/etc/machine-id; '
    'ln -s ../run/systemd/resolve/stub-resolv.conf "$1"/etc/resolv.conf; '
    'chroot "$1" systemctl -q enable systemd-networkd systemd-resolved ssh'
)
# What clouds' images do without, and each costs an emulated guest seconds
_MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service")
_CMDLINE = "root=/dev/vda1 rw console=ttyS0,115200 quiet mitigations=off audit=0"
_GRUB = Path("/usr/lib/grub/i386-pc")
_SIZE = 2048  # MiB
_DROPPED = ("man", "doc", "locale", "info")


def image(cache: Path) -> Path:
    """The image, a qcow2 file; made if the cache doesn't have it: 2 minutes and 100 MB to download."""
    recipe = hashlib.sha256(repr((_PACKAGES, _CUSTOMIZE, _MASKED, _CMDLINE, _SIZE)).encode())
    out = cache / f"test-debian-13-{recipe.hexdigest()[:16]}.qcow2"
    if out.exists():
        return out
    assert os.geteuid() == 0, "the image of Debian 13 is made by root"
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".debian-13-", dir=cache))
    try:
        tree, disk, core = work / "root.tar", work / "disk.raw", work / "core.img"
        (work / "apt.conf").write_text(apt_settings(Runner()))
        mask = f'chroot "$1" systemctl -q mask {" ".join(_MASKED)}'
        _run(
            "mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar",
            f"--include={','.join(_PACKAGES)}", f"--aptopt={work / 'apt.conf'}",
            '--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"',
            "--dpkgopt=force-unsafe-io", *(f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in _DROPPED),
            f"--customize-hook={_CUSTOMIZE}", f"--customize-hook={mask}", "trixie", tree,
            *write_sources("trixie", work), work=work,
        )  # fmt: skip
        boots = f"linux (hd0,msdos1)/vmlinuz {_CMDLINE}\ninitrd (hd0,msdos1)/initrd.img\nboot\n"
        (work / "grub.cfg").write_text(boots)
        _run(
            "grub-mkimage", "-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-c", work / "grub.cfg",
            "-o", core, "biosdisk", "part_msdos", "ext2", "linux", work=work,
        )  # fmt: skip
        maker = TEMPLATES / "firstboot" / "make-disk.sh"
        _run("sh", "-eu", maker, tree, disk, str(_SIZE), core, _GRUB / "boot.img", work / "grub.cfg",
             work=work)  # fmt: skip
        convert(Runner(), disk, work / "image.qcow2", format="raw")
        (work / "image.qcow2").rename(out)
    finally:
        shutil.rmtree(work)
    return out


def _run(*argv: str | Path, work: Path) -> None:
    settings = {**os.environ, "TMPDIR": str(work), "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        argv, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{argv[0]}: {done.stderr[-3000:]}"
