#!/bin/bash
# Runs CMD with a libvirt of its own, for tests that restart the daemon or keep it from its work:
#
#   unshare --mount --pid --fork --kill-child --mount-proc own_libvirt.sh CMD…
#
# libvirt's QEMU driver locks its directories, of which each mount namespace can have its own; the
# processes, QEMU among them, end with their PID namespace. The daemon is started by CMD
# (own_libvirt.rs). This shell stays, to take leave of daemons whose parents have ended.
set -euo pipefail

# What is mounted here would be seen by all outside of namespaces of its own.
[ $$ = 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
# systemd, which libvirt registers domains with, would take process ids of here for those of outside.
if [ -d /run/dbus ]; then mount -t tmpfs vmbtest /run/dbus; fi
for directory in /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
  mkdir -p "$directory"
  mount -t tmpfs -o mode=755 vmbtest "$directory"
done
cp -a /etc/libvirt /run/libvirt/etc
mount --bind /run/libvirt/etc /etc/libvirt
# Nobody's domains, networks and pools, and no log daemon.
rm -rf /etc/libvirt/qemu /etc/libvirt/storage /etc/libvirt/secrets
echo 'stdio_handler = "file"' >>/etc/libvirt/qemu.conf
code=0
"$@" || code=$?
exit "$code"
