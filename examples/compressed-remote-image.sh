#!/bin/bash
# Copies a compressed image from a web server into a local qcow2, without a copy of it on the way.
#
#   ./examples/compressed-remote-image.sh [URL of a raw image in xz]
#
# nbdkit fetches the parts that are asked for, and unpacks them. Without a URL a small web server is
# started here. Needs nbdkit, xz, python3 and a built vmbackup (VMBACKUP names another than
# target/debug/vmbackup). Images in xz should have blocks (xz --block-size): with a single one, all of
# it has to be unpacked, and held in memory, for the first byte.
set -euo pipefail
vmbackup=$(realpath "${VMBACKUP:-$(dirname "$0")/../target/debug/vmbackup}")
dir=$(mktemp -d "${TMPDIR:-/tmp}/vmbackup-example.XXXXXX")
trap 'kill "$web" 2>/dev/null || true; rm -rf "$dir"' EXIT
web=
cd "$dir"

url=${1:-}
if [ -z "$url" ]; then
  mkdir www
  truncate -s 64M disk.raw
  seq 1000000 | dd of=disk.raw bs=1M seek=8 conv=notrunc status=none
  xz -1 --block-size=4MiB -c disk.raw >www/disk.raw.xz
  # One that answers requests for ranges: python3 -m http.server does not.
  cat >web.py <<'PYTHON'
import http.server, os, re
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def log_message(self, *args): pass
    def answer(self, body):
        with open("www" + self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end = map(int, found.groups()) if found else (0, size - 1)
            end = min(end, size - 1)
            self.send_response(206 if found else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", end - start + 1)
            if found: self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            self.end_headers()
            file.seek(start)
            if body: self.wfile.write(file.read(end - start + 1))
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
PYTHON
  python3 web.py >port &
  web=$!
  until [ -s port ]; do sleep 0.05; done
  url=http://127.0.0.1:$(cat port)/disk.raw.xz
fi

"$vmbackup" copy -q "[ nbdkit --filter=xz curl $url ]" disk.qcow2 --compressed --verify
qemu-img info disk.qcow2 | grep size
if [ -f disk.raw ]; then qemu-img compare -q -f raw -F qcow2 disk.raw disk.qcow2; fi
