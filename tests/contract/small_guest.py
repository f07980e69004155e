"""A small real guest for KVM and Xen: Debian's cloud kernel with a busybox initramfs, booted directly.
Up in 2 s under emulation; made once and kept in the cache directory, by the hash of all that goes into
it.

On its console it says READY; ``balloon=off`` on the kernel's command line leaves the driver out,
``balloon=SECONDS`` removes it after so long, and ``down=SECONDS`` is how long its shutdown takes, a word
each second. With ``agent=qemu`` it answers as qemu-ga(8) does, and says what it was asked; with
``full=MIB`` it has a file system of that size, /data, without room. It writes a pattern to its disk when
told ``stamp=WORD`` and always prints what it finds there. With ``pulse=SECONDS`` it counts, in memory
and on its disk, and says both each time. Under Xen it says MEM=KIB whenever its memory has changed, and
tells its free memory in xenstore, as guest agents do: each second, or every ``period=SECONDS``.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
    "virtio_blk", "virtio_balloon", "failover", "net_failover", "virtio_net", "button", "evdev",
    "virtio_console", "xen-blkfront", "xen-netfront", "pvpanic", "pvpanic-mmio",
)  # fmt: skip

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
option() { sed -n "s/.*\\b$1=\\([^ ]*\\).*/\\1/p" /proc/cmdline; }
for m in MODULES; do
    [ "$m$(option balloon)" = virtio_balloonoff ] || insmod /lib/$m.ko 2>/dev/null
done
disk=/dev/vda
[ -d /proc/xen ] && disk=/dev/xvda
for try in 1 2 3 4 5 6 7 8 9 10; do
    [ -b $disk ] && break
    sleep 0.2
done
if [ -b $disk ]; then
    echo "FOUND=$(dd if=$disk bs=1M skip=8 count=1 2>/dev/null | head -c 16 | tr -d '\\0')"
    stamp=$(option stamp)
    if [ -n "$stamp" ]; then
        printf %s "$stamp" | dd of=$disk bs=1M seek=8 conv=notrunc,fsync 2>/dev/null
        echo "STAMPED=$stamp"
    fi
fi
hog=$(option hog)
if [ -n "$hog" ]; then
    mount -t tmpfs -o size=90% hog /tmp
    dd if=/dev/zero of=/tmp/hog bs=1M count=$hog 2>/dev/null
fi
mkdir -p /etc/acpi/PWRF /var/log
down=$(option down)
cat > /etc/acpi/PWRF/00000080 <<END
#!/bin/sh
echo POWER BUTTON
for n in \\$(seq ${down:-0}); do sleep 1; echo DOWN \\$n >/dev/console; done
poweroff -f
END
chmod 755 /etc/acpi/PWRF/00000080
if [ "$(option acpi)" != ignore ]; then
    acpid -d >/dev/null 2>&1 &
    mkdir -p /sbin  # Xen's kernel asks for a shutdown by running this
    printf '#!/bin/sh\\necho POWER BUTTON\\npoweroff -f\\n' > /sbin/poweroff
    chmod 755 /sbin/poweroff
fi
case "$(option then)" in
    poweroff) poweroff -f ;;
    crash) echo c > /proc/sysrq-trigger ;;
esac
memory() { sed -n "s/^$1: *\\([0-9]*\\) kB/\\1/p" /proc/meminfo; }
tell() {  # XS_WRITE of Xen's io/xs_wire.h: type, request, transaction, length; then path, 0, value
    length=$((${#1} + 1 + ${#2}))
    printf "\\013\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\\\$(printf %o $length)\\0\\0\\0$1\\000$2" >&3
}
if [ -c /dev/xen/xenbus ]; then
    exec 3<>/dev/xen/xenbus
    (cat <&3 >/dev/null) &
fi
if [ "$(option seed)" = yes ]; then
    echo "SEED=$(dd if=/dev/xvdb bs=16 count=1 2>/dev/null)"
    echo lost 2>/dev/null >/dev/xvdb && echo "SEED WRITTEN"
fi
if [ "$(option obey)" = yes ]; then  # what it is told on its console: a number, a verb, a word
    (word=
    while read -r number verb said; do
        case $verb in
            remember) word=$said ;;
            write) printf %-512s "$said" | dd of=$disk bs=512 seek=16384 oflag=direct 2>/dev/null ;;
            read) word_there=$(dd if=$disk bs=512 skip=16384 count=1 iflag=direct 2>/dev/null) ;;
        esac
        [ "$verb" = read ] && echo "SAID$number=$word_there." || echo "SAID$number=$word."
    done </dev/console) &
fi
pulse=$(option pulse)
if [ -n "$pulse" ]; then  # what it knows and what its disk has: the same, if both are of one moment
    (n=0
    while true; do
        printf %016d $n | dd of=$disk bs=512 seek=32768 conv=sync oflag=direct 2>/dev/null
        on=$(dd if=$disk bs=512 skip=32768 count=1 iflag=direct 2>/dev/null | head -c 16)
        random=$(head -c 8 /dev/urandom | od -An -tx1 | tr -d ' ')
        echo "PULSE=$n DISK=$((1$on - 10000000000000000)) RANDOM=$random"
        sleep $pulse
        n=$((n + 1))
    done) &
fi
full=$(option full)
if [ -n "$full" ]; then
    mkdir /data
    mount -t tmpfs -o size=${full}m data /data
    dd if=/dev/zero of=/data/log bs=1M 2>/dev/null
fi
fsinfo() {  # of /data: guest-get-fsinfo(7)'s answer
    set -- $(df -kP /data | tail -n 1)
    echo "{\\"return\\": [{\\"name\\": \\"data\\", \\"mountpoint\\": \\"$6\\", \\"type\\": \\"tmpfs\\","
    echo "\\"disk\\": [], \\"total-bytes\\": $(($2 * 1024)), \\"used-bytes\\": $(($3 * 1024))}]}"
}
if [ "$(option agent)" = qemu ]; then
    exec 3<>$(echo /dev/vport*p1)
    while true; do
        read -r line <&3 || { sleep 0.1; continue; }  # nobody has opened the other end
        id=$(echo "$line" | sed -n 's/.*"id": *\\([0-9]*\\).*/\\1/p')
        [ -n "$id" ] || echo "ASKED=$line"
        case $line in *guest-get-fsinfo*) echo $(fsinfo) >&3; continue ;; esac
        echo "{\\"return\\": ${id:-1}}" >&3
    done &
fi
period=$(option period)
case "$(option balloon)" in
    [0-9]*) (sleep $(option balloon); rmmod virtio_balloon; echo UNLOADED) & ;;
esac
echo READY
while true; do
    [ -c /dev/xen/xenbus ] || sleep 3600
    if [ "$(option agent)" != off ]; then
        tell data/meminfo_free "$(memory MemAvailable)"
        now=$(memory MemTotal)
        [ "$now" = "$last" ] || echo "MEM=$now"
        last=$now
    fi
    sleep ${period:-1}
done
"""


@dataclass(frozen=True, slots=True)
class Guest:
    kernel: Path
    initrd: Path


def newc(files: list[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive, format "newc": what the kernel unpacks (its initramfs buffer format document)."""
    out = bytearray()
    for number, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        title = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(title), 0)
        out += b"070701" + "".join(f"{f:08x}" for f in fields).encode() + title
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def _kernel_package() -> str:
    text = subprocess.run(
        ["apt-cache", "depends", "linux-image-cloud-amd64"], check=True, capture_output=True, text=True
    ).stdout
    match = re.search(r"Depends: (linux-image-\S+)", text)
    assert match, "apt knows no linux-image-cloud-amd64: apt-get update"
    return match[1]


def build(cache: Path) -> Guest:
    """Downloads 27 MB the first time. In the lab, which has no network, it is given."""
    if given := os.environ.get("FARMHAND_TEST_GUEST"):
        return Guest(Path(given, "vmlinuz"), Path(given, "initrd.gz"))
    busybox = Path("/bin/busybox")
    assert busybox.exists(), "the test guest needs busybox: apt-get install busybox-static"
    recipe = hashlib.sha256(repr((MODULES, INIT, busybox.stat().st_size)).encode()).hexdigest()[:16]
    place = cache / f"test-guest-{recipe}"
    guest = Guest(place / "vmlinuz", place / "initrd.gz")
    if guest.initrd.exists() and guest.kernel.exists():
        return guest
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work = Path(name)
        work.chmod(0o755)
        fetch = ["apt-get", "-o", "APT::Sandbox::User=root", "download", _kernel_package()]
        subprocess.run(fetch, cwd=work, check=True, capture_output=True)
        (package,) = work.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, work / "root"], check=True)
        (kernel,) = (work / "root/boot").glob("vmlinuz-*")
        files = [(d, 0o040755, b"") for d in ("bin", "lib", "etc")]
        files.append(("bin/busybox", 0o100755, busybox.read_bytes()))
        files.append(("init", 0o100755, INIT.replace("MODULES", " ".join(MODULES)).encode()))
        for module in MODULES:
            (found,) = (work / "root/lib/modules").rglob(f"{module}.ko")
            files.append((f"lib/{module}.ko", 0o100644, found.read_bytes()))
        ready = work / "ready"
        ready.mkdir(mode=0o755)
        (ready / "vmlinuz").write_bytes(kernel.read_bytes())
        (ready / "initrd.gz").write_bytes(gzip.compress(newc(files), 1))
        for path in ready.iterdir():
            path.chmod(0o644)  # QEMU's user reads them
        try:
            ready.rename(place)
        except OSError:
            assert guest.initrd.exists()  # another run was first
    return guest
