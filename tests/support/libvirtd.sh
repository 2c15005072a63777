#!/bin/bash
# libvirtd for the tests on machines without a service manager.
#
#   libvirtd.sh start      starts virtlogd and libvirtd if qemu:///system does not answer
#   libvirtd.sh stop       stops what `start` started, unless domains run
#   libvirtd.sh with CMD…  start, remove what killed tests left, run CMD, stop when nobody else
#                          uses it
#
# One daemon serves all test runs of a machine: libvirt's QEMU driver locks its state directory,
# a second private one is not possible. Tests keep out of each other's way by unique names.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

state=/run/vmbackup-testbed
uri=qemu:///system

answers() { timeout 10 virsh -q -c "$uri" uri >/dev/null 2>&1; }

# Whether a daemon runs, answering or not. One that was killed leaves its number behind, which another
# process may have by now.
runs() { # DAEMON
  [ "$(cat "/proc/$(cat "/run/$1.pid" 2>/dev/null)/comm" 2>/dev/null)" = "$1" ]
}

# Whether a name is that of something of a test process that is gone.
is_left() { [[ $1 =~ ^vmbtest-([0-9]+)- && ! -d /proc/${BASH_REMATCH[1]} ]]; }

# What test processes left that were killed before they could clean up (a run that hung, say).
sweep() {
  local uuid name
  for uuid in $(virsh -q -c "$uri" list --all --uuid); do
    # A test whose domain needs another name says its own in the title.
    for name in $(virsh -q -c "$uri" domname "$uuid" 2>/dev/null) \
      $(virsh -q -c "$uri" desc --title "$uuid" 2>/dev/null); do
      is_left "$name" || continue
      virsh -q -c "$uri" destroy "$uuid" >/dev/null 2>&1 || true
      virsh -q -c "$uri" undefine --checkpoints-metadata --snapshots-metadata \
        --managed-save --nvram "$uuid" >/dev/null 2>&1 || true
      break
    done
  done
  for name in $(virsh -q -c "$uri" pool-list --all --name); do
    is_left "$name" || continue
    virsh -q -c "$uri" pool-destroy "$name" >/dev/null 2>&1 || true
    virsh -q -c "$uri" pool-undefine "$name" >/dev/null 2>&1 || true
  done
  for name in /sys/fs/cgroup/{,unified/,systemd/}vmbtest-*; do
    is_left "${name##*/}" || continue
    rmdir "$name" 2>/dev/null || true
  done
  # Those of domains whose libvirt was killed as well.
  for name in /sys/fs/cgroup/{,*/}machine/qemu-*-vmbtest-*; do
    is_left "vmbtest-${name##*-vmbtest-}" || continue
    find "$name" -type d -delete 2>/dev/null || true
  done
}

start() {
  mkdir -p "$state"
  (
    flock 8
    local daemon end=$((SECONDS + 60))
    if answers; then exit 0; fi
    # One that is ending answers nobody any more.
    while runs libvirtd && [ "$SECONDS" -lt "$end" ]; do
      sleep 0.2
      if answers; then exit 0; fi
    done
    for daemon in virtlogd libvirtd; do
      if runs "$daemon"; then continue; fi
      "$daemon" -d 8>&- 9>&-
      echo "$daemon" >>"$state/started"
    done
    for _ in $(seq 100); do
      if answers; then exit 0; fi
      sleep 0.2
    done
    echo "libvirtd runs but $uri does not answer" >&2
    exit 1
  ) 8>"$state/start.lock"
}

stop() {
  [ -e "$state/started" ] || return 0
  (
    # Who starts it meanwhile does so when both have ended.
    flock 8
    if [ -n "$(virsh -q -c "$uri" list --name 2>/dev/null)" ]; then exit 0; fi
    local daemon
    for daemon in libvirtd virtlogd; do
      if grep -qx "$daemon" "$state/started" && runs "$daemon"; then
        kill "$(cat "/run/$daemon.pid")" 2>/dev/null || true
        for _ in $(seq 300); do runs "$daemon" || break; sleep 0.1; done
      fi
    done
    rm -f "$state/started"
  ) 8>"$state/start.lock"
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  with)
    shift
    mkdir -p "$state"
    exec 9>"$state/users.lock"
    flock -s 9
    start
    sweep
    code=0
    "$@" 9>&- || code=$?
    flock -u 9
    # Only the last user stops it.
    if flock -n -x 9; then stop; fi
    exit "$code"
    ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
