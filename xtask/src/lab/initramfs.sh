#!/bin/busybox sh
# First program of the lab: mounts the root file system and executes the lab's init, which lies on
# the writable share.
set -e
busybox=/bin/busybox
mount() { $busybox mount "$@"; }
trap 'echo "lab: the initramfs failed" >/dev/console; $busybox poweroff -f' EXIT

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do
    $busybox insmod "/modules/$module"
done </modules/order

mount -t virtiofs -o ro lab-root /lower
mount -t tmpfs -o size=60%,mode=0755 lab-upper /upper
$busybox mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work lab /newroot

# An overlay cannot be the upper layer of another overlay, so directories of container layers are a
# tmpfs.
for dir in $LAB_TMPFS; do
    $busybox mkdir -p "/newroot$dir"
    mount -t tmpfs -o "size=60%,mode=$($busybox stat -c %a "/newroot$dir")" lab-tmp "/newroot$dir"
done

# The machine's whole root file system, with the directories that a tmpfs hides.
$busybox mkdir -p /newroot/run/host
mount -o bind /lower /newroot/run/host

modules=/newroot/usr/lib/modules/$($busybox uname -r)
$busybox mkdir -p "$modules"
mount -o bind "/lower$LAB_MODULES" "$modules"
# The checkout may lie below a directory that is a tmpfs in the lab.
if ! [ -d "/newroot$LAB_CHECKOUT" ]; then
    $busybox mkdir -p "/newroot$LAB_CHECKOUT"
    mount -o bind "/lower$LAB_CHECKOUT" "/newroot$LAB_CHECKOUT"
fi
$busybox mkdir -p "/newroot$LAB_WORK"
mount -t virtiofs lab-work "/newroot$LAB_WORK"

for dir in dev proc sys; do
    mount -o move "/$dir" "/newroot/$dir"
done
trap - EXIT
exec $busybox switch_root /newroot "$LAB_INIT" lab-init
