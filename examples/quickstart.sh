#!/bin/bash
# Quick start: back up a running VM that writes, restore every point, prove each one.
#
#   ./examples/quickstart.sh
#
# Starts a throw-away libvirt domain with a small real Linux guest, takes a full backup and two
# incrementals while the guest writes on, restores each point and proves it equal to what the disk
# held at that instant. Needs root on Debian 12 and a Rust toolchain; installs what else it needs
# and says so. Leaves nothing behind.
#
# The proof does not rely on vmbackup: the domain is paused, qemu-img copies its disk, the backup
# begins, and as soon as libvirt reports the backup job the guest runs and writes on. The restored
# image must equal that copy byte for byte (cmp), and both must have the content root that was
# recorded when the backup was made.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8

if [ "${1:-}" != --inner ]; then
  [ "$(id -u)" = 0 ] || { echo "run this as root: it talks to libvirt's system daemon" >&2; exit 1; }
  tests/setup.sh
  # VMBACKUP names another build, for instance target/release/vmbackup.
  if [ -z "${VMBACKUP:-}" ]; then
    echo "building vmbackup"
    cargo build -q --bin vmbackup
  fi
  exec tests/support/libvirtd.sh with "$0" --inner
fi

started=$SECONDS
vmbackup=$(realpath "${VMBACKUP:-${CARGO_TARGET_DIR:-target}/debug/vmbackup}")
name=vmbackup-quickstart-$$
dir=$(mktemp -d "${TMPDIR:-/tmp}/vmbackup-quickstart.XXXXXX")
# libvirt's QEMU runs as a user of its own and has to get at its disk.
chmod 711 "$dir"
export LIBVIRT_DEFAULT_URI=qemu:///system VMBACKUP_REPO=$dir/repo
# Root's own directories stay as they are.
export VMBACKUP_STATE_DIR=$dir/state VMBACKUP_RUNTIME_DIR=$dir/run VMBACKUP_CACHE_DIR=$dir/cache

domain_is_gone() {
  virsh -q destroy "$name" >/dev/null 2>&1 || true
  virsh -q undefine --checkpoints-metadata --nvram "$name" >/dev/null 2>&1 || true
}
cleanup() {
  local code=$?
  if [ -n "${backup_pid:-}" ]; then kill "$backup_pid" 2>/dev/null || true; fi
  domain_is_gone
  if [ "$code" != 0 ]; then
    echo "quick start FAILED (exit code $code)" >&2
    [ ! -s "$dir/backup.err" ] || cat "$dir/backup.err" >&2
  fi
  rm -rf "$dir"
  exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

say() { printf '%4d s  %s\n' "$((SECONDS - started))" "$*"; }
human() { numfmt --to=iec-i --suffix=B --format=%.1f "$1"; }
guest() { "$root/tests/support/guest/tell" "$dir/control.sock" "$1"; }

start_guest() {
  "$root/tests/support/guest/build.sh" "$root/target/testbed/guest"
  cp "$root"/target/testbed/guest/{vmlinuz,initrd} "$dir/"
  qemu-img create -q -f qcow2 "$dir/vda.qcow2" 1G
  cat >"$dir/domain.xml" <<XML
<domain type='qemu'>
  <name>$name</name>
  <memory unit='MiB'>256</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>$dir/vmlinuz</kernel>
    <initrd>$dir/initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=-1</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='$dir/vda.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='$dir/console.log'/></serial>
    <serial type='unix'><source mode='bind' path='$dir/control.sock'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
XML
  virsh -q define "$dir/domain.xml"
  virsh -q start "$name"
  guest 'echo "the guest is up: $(uname -sr)"'
}

# backup KIND: a backup of this very instant, with an independent copy of the disk to compare with.
backup() {
  local kind=$1 number=${#points[@]} point
  guest 'busy vda 1000000' # random 64 KiB writes all over the disk until told to be quiet
  sleep 1
  virsh -q suspend "$name"
  qemu-img convert -U -f qcow2 -O raw "$dir/vda.qcow2" "$dir/oracle.$number.raw"
  # A paused guest cannot answer the request to freeze its file systems.
  "$vmbackup" "$kind" --domain "$name" --quiesce never --json \
    >"$dir/backup.json" 2>"$dir/backup.err" &
  backup_pid=$!
  until virsh -q domjobinfo "$name" 2>/dev/null | grep -q 'Backup'; do
    kill -0 "$backup_pid" 2>/dev/null || break # over already, or failed: `wait` tells
    sleep 0.02
  done
  virsh -q resume "$name"
  wait "$backup_pid"
  backup_pid=
  local writes
  writes=$(guest 'quiet vda')
  point=$(jq -r .point "$dir/backup.json")
  cp "$dir/backup.json" "$dir/point.$number.json"
  points+=("$point")
  kinds+=("$kind")
  say "$kind backup is point ${point:0:8}; the guest wrote $writes blocks around it"
}

# prove NUMBER: restores the point and compares it with the copy of its instant.
prove() {
  local number=$1 target=$dir/restored.$1 recorded
  local oracle=$dir/oracle.$1.raw
  "$vmbackup" restore "${points[number]}" --to "$target" --format raw --json -q >"$dir/restore.json"
  recorded=$(jq -r '.disks[0].content_root' "$dir/point.$number.json")
  proofs[number]="equal"
  cmp "$oracle" "$target/vda.raw" || proofs[number]="BYTES DIFFER"
  [ "$("$vmbackup" hash -q "$oracle,format=raw")" = "$recorded" ] &&
    [ "$("$vmbackup" hash -q "$target/vda.raw,format=raw")" = "$recorded" ] ||
    proofs[number]="CONTENT ROOT DIFFERS"
  say "point ${points[number]:0:8} restored and compared: ${proofs[number]}"
  rm -rf "$target" "$oracle"
}

points=() kinds=() proofs=()
say "starting a throw-away domain, $name, in $dir"
start_guest
"$vmbackup" repo init --no-key -q >/dev/null
guest 'fill vda 0 96; fill vda 600 32; pat vda 777777777 123457'
say "the guest has filled a part of its 1 GiB disk"
backup full
guest 'fill vda 10 4; zero vda 40960 8192; discard vda 65536 8192; pat vda 300000001 54321'
backup incremental
guest 'rnd vda 900000 300; pat vda 1073741000 824'
backup incremental
for number in "${!points[@]}"; do prove "$number"; done

echo
printf '%-10s %-12s %10s %12s %12s   %s\n' point kind time read stored proof
for number in "${!points[@]}"; do
  read -r elapsed bytes_read bytes_stored < <(jq -r '[.elapsed_ms,
    ([.disks[].read_bytes] | add), ([.disks[].stored_bytes] | add)] | @tsv' \
    "$dir/point.$number.json")
  printf '%-10s %-12s %10s %12s %12s   %s\n' "${points[number]:0:8}" "${kinds[number]}" \
    "$((elapsed / 1000)).$(printf %03d $((elapsed % 1000))) s" "$(human "$bytes_read")" \
    "$(human "$bytes_stored")" "bytes and content root ${proofs[number]}"
done
echo
for proof in "${proofs[@]}"; do [ "$proof" = equal ] || exit 1; done
echo "Every restored point equals what the disk held at that instant ($((SECONDS - started)) s)."
