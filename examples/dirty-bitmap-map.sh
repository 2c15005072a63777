#!/bin/bash
# Shows what a guest wrote since a bitmap was made, as ranges and as a total.
#
#   ./examples/dirty-bitmap-map.sh
#
# Needs qemu-utils, jq and a built vmbackup (VMBACKUP names another than target/debug/vmbackup).
set -euo pipefail
vmbackup=$(realpath "${VMBACKUP:-$(dirname "$0")/../target/debug/vmbackup}")
dir=$(mktemp -d "${TMPDIR:-/tmp}/vmbackup-example.XXXXXX")
trap 'kill "$server" 2>/dev/null || true; rm -rf "$dir"' EXIT
server=
cd "$dir"

qemu-img create -q -f qcow2 disk.qcow2 1G
qemu-io -f qcow2 -c 'write -q 0 16M' disk.qcow2
qemu-img bitmap --add disk.qcow2 since-monday
# What a guest does on Tuesday.
qemu-io -f qcow2 -c 'write -q 1M 192k' -c 'write -q 700M 64k' -c 'discard -q 4M 1M' disk.qcow2

qemu-nbd -r -t -f qcow2 -B since-monday -k "$dir/sock" disk.qcow2 &
server=$!
until [ -S sock ]; do
  kill -0 "$server"
  sleep 0.05
done
uri=nbd+unix:///?socket=$dir/sock
"$vmbackup" nbd map --context qemu:dirty-bitmap:since-monday "$uri"

# What a program makes of it: offset and length of each range that was written, and of no other.
"$vmbackup" nbd map --context qemu:dirty-bitmap:since-monday --json "$uri" |
  jq -r '.contexts[].extents[] | select(.state == "dirty") | "\(.offset) \(.bytes)"' >written
diff - written <<'RANGES'
1048576 196608
4194304 1048576
734003200 65536
RANGES
