#!/bin/bash
# Builds the program without libvirt and TLS, and backs up an image with it, restores and verifies it.
set -euo pipefail
cd "$(dirname "$0")/../.."

cargo build -q --locked --no-default-features --bin vmbackup
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
# The next build replaces it.
cp "${CARGO_TARGET_DIR:-target}/debug/vmbackup" "$dir/vmbackup"
linked=$(ldd "$dir/vmbackup")
if grep -E 'libvirt|libssl' <<<"$linked"; then
  echo "it is linked with what it was built without" >&2
  exit 1
fi

export VMBACKUP_REPO=$dir/repo VMBACKUP_STATE_DIR=$dir/state VMBACKUP_RUNTIME_DIR=$dir/run
export VMBACKUP_CACHE_DIR=$dir/cache
head -c 3000000 /dev/urandom >"$dir/disk.raw"
truncate -s 8M "$dir/disk.raw"
vmbackup() { "$dir/vmbackup" --quiet "$@"; }
vmbackup repo init --no-key
vmbackup full --image "$dir/disk.raw,format=raw" --name bare
vmbackup restore bare@latest --to "$dir/to"
cmp "$dir/disk.raw" "$dir"/to/*.raw
vmbackup verify bare@latest
# A VM of libvirt is refused, and it is said why.
if said=$(vmbackup full --domain bare 2>&1); then exit 1; fi
grep -q "without libvirt" <<<"$said"
