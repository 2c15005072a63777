#!/bin/bash
# Boots a guest from a restore point, without a restore: it runs at once, what it writes goes to an
# overlay, and the point stays as it is.
#
#   ./examples/boot-from-point.sh
#
# Needs QEMU, what tests/setup.sh fetches for the guest, and a built vmbackup (VMBACKUP names another
# than target/debug/vmbackup; ACCEL=kvm is faster where there is KVM). The guest is a small Linux that
# finds a message on its disk. Its kernel comes from the set-up of the tests: a disk with a boot loader
# needs neither -kernel nor -initrd.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
vmbackup=$(realpath "${VMBACKUP:-$root/target/debug/vmbackup}")
dir=$(mktemp -d "${TMPDIR:-/tmp}/vmbackup-example.XXXXXX")
trap 'kill "$serve" "$vm" 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
serve='' vm=''
cd "$dir"
export VMBACKUP_REPO=$dir/repo VMBACKUP_STATE_DIR=$dir VMBACKUP_RUNTIME_DIR=$dir
export VMBACKUP_CACHE_DIR=$dir/cache
guest() { "$root/tests/support/guest/tell" "$dir/control.sock" "$1"; }
expect() { # WHAT EXPECTED FOUND
  echo "$1: $3"
  [ "$3" = "$2" ] || { echo "this should be: $2" >&2; exit 1; }
}

# A point of a disk that once was a VM's.
truncate -s 64M vda.raw
printf 'hello from the past' | dd of=vda.raw conv=notrunc status=none
"$vmbackup" repo init -q --no-key >/dev/null
"$vmbackup" full -q --image vda.raw --name web1 >/dev/null
rm vda.raw

"$vmbackup" serve -q web1@latest --writable --socket "$dir/nbd.sock" >uri &
serve=$!
until [ -s uri ]; do
  kill -0 "$serve"
  sleep 0.05
done
echo "serving $(cat uri)"

"$root/tests/support/guest/build.sh" "$root/target/testbed/guest"
qemu-system-x86_64 -machine "pc,accel=${ACCEL:-tcg}" -cpu max -m 256 -nodefaults -display none \
  -kernel "$root/target/testbed/guest/vmlinuz" -initrd "$root/target/testbed/guest/initrd" \
  -append 'console=ttyS0 quiet panic=-1' -serial null \
  -serial "unix:$dir/control.sock,server=on,wait=off" \
  -drive "file=$(cat uri),format=raw,if=virtio" &
vm=$!
until [ -S control.sock ]; do
  kill -0 "$vm"
  sleep 0.1
done
guest 'echo "the guest runs $(uname -sr)"'
expect "it reads" "hello from the past" "$(guest 'echo "$(head -c 19 /dev/vda)"')"
guest 'echo "it writes"; printf changed >/dev/vda; sync'
"$vmbackup" copy -q "$(cat uri)" now.raw
expect "the export has" "changedrom the past" "$(head -c 19 now.raw)"
kill "$vm" && wait "$vm" || true
vm=
kill "$serve" && wait "$serve"
serve=
# The point holds what it always held.
"$vmbackup" copy -q point:web1@latest after.raw
expect "the point has" "hello from the past" "$(head -c 19 after.raw)"
