#!/bin/bash
# The benchmarks: builds vmbackup, makes the disks, measures, prints a table in Markdown.
#
#   benches/run.sh                        everything, 5 pairs, about 30 minutes on 2 cores
#   benches/run.sh --pairs 7 full tmpfs   some cases only; --list names them
#   benches/run.sh copy --pairs 7 file    'vmbackup copy' against nbdcopy and qemu-img convert
#   benches/run.sh guest --rounds 5       what a guest feels, beside push mode and virtnbdbackup
#   benches/run.sh --dir DIR              where images, repositories and copies go (30 GiB)
#
# Root, Debian 12. Installs what the tests need (tests/setup.sh) and, for the comparison, Debian's
# virtnbdbackup. The method is in docs/benchmarks.md and at the head of benches/bench.py.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8

if [ "${1:-}" != --inner ]; then
  tests/setup.sh
  if ! command -v virtnbdbackup >/dev/null; then
    echo "set-up: installing virtnbdbackup (Debian), to compare with" >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y virtnbdbackup >/dev/null 2>&1 ||
      echo "set-up: it could not be installed; its rows will be missing" >&2
  fi
  cargo build --release --locked >&2
  cargo build --release --locked --example extents --example latency >&2
  exec tests/support/libvirtd.sh with "$0" --inner "$@"
fi
shift
if [ "${1:-}" = copy ]; then
  shift
  exec python3 benches/copy.py --vmbackup target/release/vmbackup "$@"
fi
if [ "${1:-}" = guest ]; then
  shift
  exec python3 benches/guest.py --vmbackup target/release/vmbackup "$@"
fi
exec python3 benches/bench.py --vmbackup target/release/vmbackup "$@"
