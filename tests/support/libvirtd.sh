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

# Domains and storage pools of test processes that were killed before they could clean up (a run that hung, say).
sweep() {
  local name pid
  for name in $(virsh -q -c "$uri" list --all --name); do
    pid=${name#vmbtest-}
    pid=${pid%%-*}
    if [[ $name == vmbtest-* && $pid =~ ^[0-9]+$ && ! -d /proc/$pid ]]; then
      virsh -q -c "$uri" destroy "$name" >/dev/null 2>&1 || true
      virsh -q -c "$uri" undefine --checkpoints-metadata --managed-save --nvram "$name" \
        >/dev/null 2>&1 || true
    fi
  done
  for name in $(virsh -q -c "$uri" pool-list --all --name); do
    pid=${name#vmbtest-}
    pid=${pid%%-*}
    if [[ $name == vmbtest-* && $pid =~ ^[0-9]+$ && ! -d /proc/$pid ]]; then
      virsh -q -c "$uri" pool-destroy "$name" >/dev/null 2>&1 || true
      virsh -q -c "$uri" pool-undefine "$name" >/dev/null 2>&1 || true
    fi
  done
}

start() {
  mkdir -p "$state"
  (
    flock 8
    if answers; then exit 0; fi
    local daemon
    for daemon in virtlogd libvirtd; do
      # A daemon that was killed leaves its number behind, which another process may have by now.
      if [ -e "/run/$daemon.pid" ] \
        && [ "$(cat "/proc/$(cat "/run/$daemon.pid")/comm" 2>/dev/null)" = "$daemon" ]; then
        continue
      fi
      "$daemon" -d 8>&- 9>&-
      echo "$daemon" >>"$state/started"
    done
    for _ in $(seq 100); do
      if answers; then exit 0; fi
      sleep 0.2
    done
    echo "libvirtd was started but $uri does not answer" >&2
    exit 1
  ) 8>"$state/start.lock"
}

stop() {
  [ -e "$state/started" ] || return 0
  if [ -n "$(virsh -q -c "$uri" list --name 2>/dev/null)" ]; then return 0; fi
  local daemon pid
  for daemon in libvirtd virtlogd; do
    if grep -qx "$daemon" "$state/started" && pid=$(cat "/run/$daemon.pid" 2>/dev/null); then
      kill "$pid" 2>/dev/null || true
      for _ in $(seq 300); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    fi
  done
  rm -f "$state/started"
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
