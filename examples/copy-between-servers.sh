#!/bin/bash
# Copies a disk from one NBD server to another, sparse, and proves that both hold the same.
#
#   ./examples/copy-between-servers.sh
#
# Needs nbdkit and a built vmbackup (VMBACKUP names another than target/debug/vmbackup).
set -euo pipefail
vmbackup=$(realpath "${VMBACKUP:-$(dirname "$0")/../target/debug/vmbackup}")
dir=$(mktemp -d "${TMPDIR:-/tmp}/vmbackup-example.XXXXXX")
servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"

# A disk of 1 GiB with data in two places, and an empty one behind a filter that counts requests.
nbdkit -f -U source.sock data size=1G data='@0x400000 (1 2 3 4)*2000000 @0x20000000 "the end"*1000' &
servers+=($!)
nbdkit -f -U target.sock --filter=stats memory 1G statsfile=stats &
servers+=($!)
until [ -S source.sock ] && [ -S target.sock ]; do
  kill -0 "${servers[@]}" # ends this if one of them has ended
  sleep 0.05
done

"$vmbackup" copy -q "nbd+unix:///?socket=$dir/source.sock" \
  "nbd+unix:///?socket=$dir/target.sock" --verify
"$vmbackup" nbd map --totals "nbd+unix:///?socket=$dir/target.sock"

kill "${servers[1]}" && wait "${servers[1]}" || true
grep -E '^(read|write|zero)' stats
