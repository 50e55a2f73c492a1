#!/bin/busybox sh
# Process 1 of the machine that completes a Debian image: the system on the disk configures itself, then all is off.
# The image is thrown away if this fails in any way, so nothing here waits for the disk.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module.ko"; done < /modules/order

complete() {
    mount -t ext4 -o barrier=0,data=writeback,noatime /dev/vda /disk || return
    mount -t proc proc /disk/proc
    mount -t sysfs sysfs /disk/sys
    mount --bind /dev /disk/dev
    mkdir -p /disk/dev/pts
    mount -t devpts devpts /disk/dev/pts
    mount -t tmpfs tmpfs /disk/run
    mount -t tmpfs tmpfs /disk/tmp
    cp /configure /disk/run/
    chroot /disk /usr/bin/env -i PATH=/usr/sbin:/usr/bin LC_ALL=C.UTF-8 HOME=/root \
        DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true sh /run/configure || return
    umount /disk/tmp && umount /disk/run && umount /disk/dev/pts && umount /disk/dev || return
    umount /disk/sys && umount /disk/proc || return
    fstrim /disk && umount /disk
}

complete && echo "@complete@"
poweroff -f
