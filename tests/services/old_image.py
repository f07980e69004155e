"""An image that was installed long ago by hand: it boots from its own disk, asks DHCP, has an ssh server
with keys of its own and a web server, and knows nothing of who clones it. Debian's cloud kernel, busybox
and dropbear: up in seconds under emulation."""

from __future__ import annotations

import gzip
import subprocess
import tarfile
from pathlib import Path

from host.paths import cache_dir
from host.run import which
from provision.guest.debian import TEMPLATES
from tests.contract import small_guest

_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /var/run /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
for m in MODULES; do insmod /lib/$m.ko 2>/dev/null; done
hostname gallifrey
ip link set lo up
ip link set eth0 up
udhcpc -i eth0 -s /udhcpc -t 60 -T 1 -A 1
dropbear -r /host -E
mkdir /www
echo "the web server of $(cat /sys/class/net/eth0/address)" >/www/index.html
httpd -h /www
echo READY
while true; do sleep 3600; done
"""
_UDHCPC = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router"
"""
_GRUB = Path("/usr/lib/grub/i386-pc")


def build(work: Path, public: str) -> Path:
    """A raw image of 64 MiB in ``work`` that lets this public key in as root. Needs root."""
    dropbear = which("dropbear")
    assert dropbear, "these tests need dropbear-bin"
    host = work / "host"
    subprocess.run(["dropbearkey", "-t", "ed25519", "-f", host], check=True, capture_output=True)
    kept = small_guest.build(cache_dir())
    files = [(name, 0o040755, b"") for name in ("lib64", "usr", "usr/lib", "usr/lib/x86_64-linux-gnu")]
    files += [("root", 0o040700, b""), ("root/.ssh", 0o040700, b"")]
    files += [
        ("init", 0o100755, _INIT.replace("MODULES", " ".join(small_guest.MODULES)).encode()),
        ("udhcpc", 0o100755, _UDHCPC.encode()),
        ("host", 0o100600, host.read_bytes()),
        ("bin/dropbear", 0o100755, Path(dropbear).read_bytes()),
        ("etc/passwd", 0o100644, b"root:x:0:0:root:/root:/bin/sh\n"),
        ("etc/group", 0o100644, b"root:x:0:\n"),
        ("root/.ssh/authorized_keys", 0o100600, f"{public}\n".encode()),
        *((f"usr/lib/x86_64-linux-gnu/{path.name}", 0o100755, path.read_bytes())
          for path in _libraries(dropbear) if "ld-linux" not in path.name),
        *((f"lib64/{path.name}", 0o100755, path.read_bytes())
          for path in _libraries(dropbear) if "ld-linux" in path.name),
    ]  # fmt: skip
    (work / "initrd").write_bytes(kept.initrd.read_bytes() + gzip.compress(small_guest.newc(files), 1))
    with tarfile.open(work / "tree.tar", "w") as tar:
        tar.add(kept.kernel, "vmlinuz")
        tar.add(work / "initrd", "initrd.img")
    linux = "linux (hd0,msdos1)/vmlinuz console=ttyS0 quiet panic=-1"
    boots = f"{linux}\ninitrd (hd0,msdos1)/initrd.img\nboot\n"
    (work / "grub.cfg").write_text(boots)
    core, image = work / "core.img", work / "gallifrey.img"
    subprocess.run(
        ["grub-mkimage", "-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-c", work / "grub.cfg",
         "-o", core, "biosdisk", "part_msdos", "ext2", "linux"], check=True,
    )  # fmt: skip
    maker = TEMPLATES / "firstboot" / "make-disk.sh"
    argv = ["sh", "-eu", maker, work / "tree.tar", image, "64", core, _GRUB / "boot.img"]
    subprocess.run([*argv, work / "grub.cfg"], check=True)
    return image


def _libraries(program: str) -> list[Path]:
    """The shared libraries that it is linked with."""
    lines = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    words = [word for line in lines.splitlines() for word in line.split() if word.startswith("/")]
    return [Path(word) for word in words]
