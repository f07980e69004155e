#!/bin/sh -eu
# usage: make-disk.sh ROOT.tar DISK.raw SIZE-IN-MiB CORE.img BOOT.img GRUB.cfg
# A bootable disk from a root file system, with no loop device and no mount. Run by root, or inside one
# fakeroot(1) session: tar's ownership then lives just long enough for mke2fs to read it.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
tree=$(mktemp -d "$2.XXXXXX")
tar -C "$tree" --numeric-owner -xf "$1"
rm -f "$1"
install -D -m 644 "$6" "$tree/boot/grub/grub.cfg"
truncate -s "$3M" "$2"
# sectors 1 to 2047 are the boot loader's
printf 'label: dos\nstart=2048,type=83,bootable\n' | sfdisk -q "$2"
mke2fs -q -F -t ext4 -L root -m 1 -E offset=1048576,lazy_itable_init=1,lazy_journal_init=1 \
    -d "$tree" "$2" "$((($3 - 1) * 1024))k"
dd if="$5" of="$2" bs=440 count=1 conv=notrunc status=none
dd if="$4" of="$2" bs=512 seek=1 conv=notrunc status=none
rm -rf "$tree"
