#!/bin/bash
# Runs CMD with a libvirt of its own, for tests that restart the daemon or keep it from its work:
#
#   unshare --mount --pid --fork --kill-child --mount-proc own_libvirt.sh CMD…
#
# And, in the namespaces of that, on what is another host to libvirt, with the same files and processes:
#
#   unshare --mount --uts own_libvirt.sh --beside DIRECTORY CMD…
#
# libvirt's QEMU driver locks its directories, of which each mount namespace can have its own; the
# processes, QEMU among them, end with their PID namespace. The daemon is started by CMD
# (own_libvirt.rs). The first shell stays, to take leave of daemons whose parents have ended. What the
# other host has in /run/libvirt, its sockets among them, the first one sees in DIRECTORY.
set -euo pipefail

namespace() { readlink "/proc/$1/ns/mnt"; }
beside=
if [ "${1:-}" = --beside ]; then
  beside=$2
  shift 2
fi
# What is mounted here would be seen by all outside of namespaces of its own.
if [ -n "$beside" ]; then [ "$(namespace self)" != "$(namespace 1)" ]; else [ $$ = 1 ]; fi ||
  { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
# systemd, which libvirt registers domains with, would take process ids of here for those of outside.
if [ -d /run/dbus ]; then mount -t tmpfs vmbtest /run/dbus; fi
for directory in /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
  mkdir -p "$directory"
  if [ -n "$beside" ] && [ "$directory" = /run/libvirt ]; then
    mount --bind "$beside" "$directory"
  else
    mount -t tmpfs -o mode=755 vmbtest "$directory"
  fi
done
cp -a /etc/libvirt /run/libvirt/etc
mount --bind /run/libvirt/etc /etc/libvirt
# Nobody's domains, networks and pools, and no log daemon.
rm -rf /etc/libvirt/qemu /etc/libvirt/storage /etc/libvirt/secrets
echo 'stdio_handler = "file"' >>/etc/libvirt/qemu.conf
if [ -n "$beside" ]; then
  # libvirt migrates nothing to the host it comes from, by name and by UUID.
  hostname vmbtest-beside
  echo "host_uuid = \"$(cat /proc/sys/kernel/random/uuid)\"" >>/etc/libvirt/libvirtd.conf
  exec "$@"
fi
code=0
"$@" || code=$?
exit "$code"
