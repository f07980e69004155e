#!/bin/sh -eu
# Run inside the new root by mmdebstrap once all packages are there. What it is told lies beside it.
here=/usr/lib/farmhand/build
. "$here/settings"

# the build machine's own apt settings stay out of the template
rm -f /etc/apt/apt.conf.d/99mmdebstrap /etc/dpkg/dpkg.cfg.d/99mmdebstrap
rm -f /etc/hostname /etc/ssh/ssh_host_* /var/lib/dbus/machine-id
rm -f /etc/resolv.conf
: > /etc/resolv.conf
# empty, not absent: systemd takes absence for "apply all presets", which a first boot need not do
: > /etc/machine-id
: > /etc/fstab
usermod -p '*' root

for unit in $FARMHAND_MASK; do
	# a unit that isn't there is masked just as well
	ln -sf /dev/null "/etc/systemd/system/$unit"
done
mkdir -p /etc/systemd/system-generators
for generator in $FARMHAND_GENERATORS; do
	ln -sf /dev/null "/etc/systemd/system-generators/$generator"
done
systemctl --quiet enable $FARMHAND_ENABLE
systemctl --quiet set-default multi-user.target
# DHCP alone needs it: the first-boot script switches it on
systemctl --quiet disable systemd-networkd.service

# the farm file's users: one file of keys for each
for keys in "$here"/keys/*; do
	[ -f "$keys" ] || continue
	name=${keys##*/}
	getent passwd "$name" >/dev/null || useradd -m -s /bin/bash -p '*' -- "$name"
	home=$(getent passwd "$name" | cut -d: -f6)
	install -d -m 0700 -o "$name" -g "$(id -g "$name")" "$home/.ssh"
	install -m 0600 -o "$name" -g "$(id -g "$name")" "$keys" "$home/.ssh/authorized_keys"
done

# Debian keeps these two links at the newest kernel; the boot loader follows them
printf 'do_symlinks=yes\nlink_in_boot=no\n' > /etc/kernel-img.conf
kernel=$(ls /boot/vmlinuz-* | sort -V | tail -n 1)
version=${kernel#/boot/vmlinuz-}
ln -sf "boot/vmlinuz-$version" /vmlinuz
ln -sf "boot/initrd.img-$version" /initrd.img
update-initramfs -u -k "$version"

if command -v rpm >/dev/null; then
	rpm --initdb
fi
dpkg-query -W -f '${binary:Package} ${Version} ${Architecture}\n' > /usr/lib/farmhand/packages
rm -rf "$here"
