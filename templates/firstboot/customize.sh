#!/bin/sh -eu
# Run inside the new root, by mmdebstrap, after all packages are there. Settings come as FARMHAND_*.

# mmdebstrap's own and the build machine's settings stay out of the template
rm -f /etc/apt/apt.conf.d/99mmdebstrap /etc/dpkg/dpkg.cfg.d/99mmdebstrap
rm -f /etc/hostname /etc/resolv.conf /etc/ssh/ssh_host_* /var/lib/dbus/machine-id
: > /etc/resolv.conf
# empty, not absent: systemd takes absence for "apply all presets", which the first boot need not do
: > /etc/machine-id
: > /etc/fstab

chmod 0755 /usr/lib/farmhand/firstboot /etc/initramfs-tools/hooks/farmhand
usermod -p '*' root

for unit in $FARMHAND_MASK; do
	# a unit that isn't there is masked just as well
	ln -sf /dev/null "/etc/systemd/system/$unit"
done
systemctl --quiet enable $FARMHAND_ENABLE
systemctl --quiet set-default multi-user.target

# named users, if the farm file has any: "NAME" lines, keys in /usr/lib/farmhand/keys/NAME
for keys in /usr/lib/farmhand/keys/*; do
	[ -f "$keys" ] || continue
	name=${keys##*/}
	getent passwd "$name" >/dev/null || useradd -m -s /bin/bash -p '*' -- "$name"
	home=$(getent passwd "$name" | cut -d: -f6)
	install -d -m 0700 -o "$name" -g "$(id -g "$name")" "$home/.ssh"
	install -m 0600 -o "$name" -g "$(id -g "$name")" "$keys" "$home/.ssh/authorized_keys"
done
rm -rf /usr/lib/farmhand/keys

kernel=$(ls /boot/vmlinuz-* | sort -V | tail -n 1)
version=${kernel#/boot/vmlinuz-}
update-initramfs -u -k "$version"
mkdir -p /boot/grub
cat > /boot/grub/grub.cfg <<EOF
linux $kernel $FARMHAND_CMDLINE
initrd /boot/initrd.img-$version
boot
EOF
# rpm's database exists, though empty: Debian's packages aren't in it
command -v rpm >/dev/null && rpm --initdb || true
# generators look for what a build VM has not, a process each at every start
mkdir -p /etc/systemd/system-generators
for generator in $FARMHAND_GENERATORS; do
	ln -sf /dev/null "/etc/systemd/system-generators/$generator"
done
