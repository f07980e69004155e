#!/bin/sh -eu
# usage: make-image.sh FILES WORK KERNEL MiB
# In WORK: root.tar, modules.tar, key.pub, hostkey, load, modules, initrd-modules -> lab.img and initrd.
# No loop device, no mount. Run by root, or inside one fakeroot(1) session: tar's ownership then lives
# just long enough for mke2fs to read it.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
files=$1
kernel=$3
cd "$2"
mkdir tree modules.d
tar -C tree --numeric-owner -xf root.tar
rm root.tar
tar -C modules.d -xf modules.tar
from=modules.d/$kernel
to=tree/lib/modules/$kernel
mkdir -p "$to/kernel"
cp -a "$from"/modules.order "$from"/modules.builtin "$from"/modules.builtin.modinfo "$from"/updates "$to"
(cd "$from/kernel" && xargs -a ../../../modules tar -c) | tar -C "$to/kernel" -x
depmod -b tree "$kernel"

install -d -m 700 tree/root/.ssh tree/etc/lab
install -m 600 key.pub tree/root/.ssh/authorized_keys
rm -f tree/etc/ssh/ssh_host_*
install -m 600 hostkey tree/etc/ssh/ssh_host_ed25519_key
printf 'HostKey /etc/ssh/ssh_host_ed25519_key\nUseDNS no\nUsePAM no\nMaxStartups 100\nAcceptEnv *\n' \
    >tree/etc/ssh/sshd_config.d/lab.conf
install -m 755 "$files/init" tree/usr/local/sbin/lab-init
install -m 755 "$files/wake" tree/usr/local/sbin/lab-wake
install -m 755 "$files/kvm-hold" tree/usr/local/sbin/lab-kvm-hold
install -m 755 "$files/died" tree/usr/local/sbin/lab-died
install -m 644 load tree/etc/lab/load
echo lab >tree/etc/hostname
printf '127.0.0.1 localhost lab\n::1 localhost\n' >tree/etc/hosts
: >tree/etc/resolv.conf
install -d tree/var/lib/farmhand tree/var/cache/farmhand

mkdir -p initrd.d/bin initrd.d/modules initrd.d/root initrd.d/dev
cp tree/bin/busybox initrd.d/bin/
install -m 755 "$files/initrd" initrd.d/init
while read -r module; do
    cp "$from/kernel/$module" initrd.d/modules/
    basename "$module" >>initrd.d/modules/order
done <initrd-modules
(cd initrd.d && find . | cpio -o -H newc -R 0:0 --quiet | gzip -1) >initrd

mke2fs -q -F -t ext4 -L lab -m 1 -E lazy_itable_init=1,lazy_journal_init=1 -d tree lab.img "$4M"
rm -rf tree modules.d initrd.d modules.tar
