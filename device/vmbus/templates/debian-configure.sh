# Run in a Debian that was only unpacked: its packages configure themselves, and what is to be one machine's own goes.
set -e

# Nothing is started here.
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
ldconfig

# What dpkg would have run before it unpacked a package. The first ones make the users and folders that others expect.
info=/var/lib/dpkg/info
preinst() {
    [ -x "$info/$1.preinst" ] || return 0
    echo "Preparing $1"
    DPKG_MAINTSCRIPT_PACKAGE=${1%:*} DPKG_MAINTSCRIPT_ARCH=$(cat /var/lib/dpkg/arch) DPKG_MAINTSCRIPT_NAME=preinst \
        DPKG_ROOT='' DPKG_ADMINDIR=/var/lib/dpkg "$info/$1.preinst" install < /dev/null
}
preinst base-passwd
preinst base-files
for script in "$info"/*.preinst; do
    name=${script##*/}
    case $name in
        base-passwd.preinst | base-files.preinst) ;;
        *) preinst "${name%.preinst}" ;;
    esac
done

# A host key is a machine's own, and slow to make here: with these in place none is made.
for kind in rsa ecdsa ed25519; do : > /etc/ssh/ssh_host_${kind}_key; done
dpkg --force-unsafe-io --force-depends --configure base-passwd base-files < /dev/null
dpkg --force-unsafe-io --configure --pending < /dev/null
[ -z "$(dpkg --audit)" ]

[ ! -d /usr/lib/modules ] || for version in /usr/lib/modules/*; do depmod "${version##*/}"; done
systemctl set-default multi-user.target
systemctl enable systemd-networkd.service
# An emulated machine has no time for these, and its disk is small.
systemctl disable systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer \
    e2scrub_reap.service getty@tty1.service

rm -f /usr/sbin/policy-rc.d /etc/ssh/ssh_host_* /var/lib/systemd/random-seed /var/lib/dbus/machine-id
rm -f /var/log/*.log /var/log/apt/* /var/cache/debconf/*-old /var/lib/dpkg/*-old
: > /etc/machine-id
# All that systemd does after an update of /usr has been done just now.
touch /etc/.updated /var/.updated
