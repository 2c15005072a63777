#!/bin/bash
# Installs what the tests and the quick start need on Debian 12 (root), and says what it installs.
#
# Does nothing, in well under a second, when all is there. QEMU and libvirt come from
# bookworm-backports (QEMU 10, libvirt 11) on a machine that has neither; where one is installed
# already, its suite is kept: installing qemu-system-x86 from the stable suite beside a qemu-utils
# from backports makes apt remove the latter. Prints the apt source it adds, if it adds one.
#
# Callers: tests/run.sh, examples/quickstart.sh. It starts no service (tests/support/libvirtd.sh
# does) and needs a Rust toolchain to be there.
set -euo pipefail
# Nothing ends this script without a word.
trap 'echo "set-up: error: line $LINENO failed: $BASH_COMMAND" >&2' ERR

# What comes from the distribution's own suite.
base_packages=(
  b3sum build-essential busybox-static cpio fio jq kmod libnbd-bin libssl-dev nbdkit
  openssh-client openssh-server openssl ovmf pkg-config python3 python3-argon2 python3-cryptography
  python3-libnbd swtpm swtpm-tools xz-utils zstd
)
# One suite each, see above.
qemu_packages=(qemu-system-x86 qemu-utils)
libvirt_packages=(
  libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-system libvirt-dev
)

say() { echo "set-up: $*"; }
die() { echo "set-up: error: $*" >&2; exit 1; }

version_of() { # prints the installed version of a package, nothing if it is not installed
  { dpkg-query -W -f '${db:Status-Abbrev} ${Version}\n' "$1" 2>/dev/null || true; } |
    awk '$1 == "ii" {print $2}'
}

missing_of() { # prints those of the named packages that are not installed
  local package
  for package in "$@"; do
    [ -n "$(version_of "$package")" ] || printf '%s ' "$package"
  done
}

apt_get() {
  DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@"
}

# The lists may be absent (container images come without) or older than the archive.
update_lists() {
  say "reading the package lists (apt-get update)"
  apt_get update >/dev/null || die "apt-get update failed: are the package sources reachable?"
}

add_backports() {
  if apt-cache policy 2>/dev/null | grep -q 'n=bookworm-backports'; then return; fi
  local mirror file=/etc/apt/sources.list.d/vmbackup-backports.sources
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 2>/dev/null |
    sed 's,/$,,' | sort -u | head -n 1)
  say "adding the apt source bookworm-backports ($file) for QEMU 10 and libvirt 11"
  cat >"$file" <<SOURCE
Types: deb
URIs: ${mirror:-http://deb.debian.org/debian}
Suites: bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCE
  update_lists
}

# install_suite PACKAGE_THAT_DECIDES NAME...: installs the names from the suite the deciding
# package comes from, or from backports on a bookworm that does not have it.
install_suite() {
  local decider=$1 version options=()
  shift
  [ -n "$(missing_of "$@")" ] || return 0
  version=$(version_of "$decider")
  if [ "$codename" = bookworm ] && [[ -z $version || $version == *~bpo12* ]]; then
    add_backports
    options=(-t bookworm-backports)
  fi
  say "installing $* ${options[*]}"
  apt_get install -y --no-install-recommends "${options[@]}" "$@" >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; die "apt-get install failed for: $*"; }
}

# A kernel for the guest is taken out of its package, not installed: installing one builds an
# initramfs for this machine and changes its boot menu.
fetch_packages() {
  local kernel download package
  mkdir -p "$cache/download"
  if [ ! -e "$cache/kernel/done" ]; then
    kernel=$({ ls /boot/vmlinuz-*-cloud-amd64 2>/dev/null || true; } | sort -V | tail -n 1)
    if [ -n "$kernel" ] && [ -d "/lib/modules/${kernel#/boot/vmlinuz-}" ]; then
      say "taking the guest's kernel from $kernel"
      mkdir -p "$cache/kernel/boot" "$cache/kernel/lib/modules"
      cp "$kernel" "$cache/kernel/boot/"
      cp -r "/lib/modules/${kernel#/boot/vmlinuz-}" "$cache/kernel/lib/modules/"
    else
      [ -n "$(apt-cache madison linux-image-cloud-amd64 2>/dev/null)" ] || update_lists
      package=$(apt-cache depends linux-image-cloud-amd64 |
        awk '/Depends: linux-image-/ {print $2; exit}')
      unpack "${package:-linux-image-cloud-amd64}" "$cache/kernel"
    fi
    touch "$cache/kernel/done"
  fi
  # Its installation would start a service.
  if ! command -v nbd-server >/dev/null && [ ! -e "$cache/nbd-server/done" ]; then
    [ -n "$(apt-cache madison nbd-server 2>/dev/null)" ] || update_lists
    unpack nbd-server "$cache/nbd-server"
    touch "$cache/nbd-server/done"
  fi
  if [ ! -e "$cache/agent/done" ]; then
    [ -n "$(apt-cache madison qemu-guest-agent 2>/dev/null)" ] || update_lists
    unpack qemu-guest-agent "$cache/agent"
    touch "$cache/agent/done"
  fi
}

unpack() { # PACKAGE DIR: downloads a package and unpacks it into DIR without installing it
  say "downloading $1 for the guest (unpacked below $cache, not installed)"
  rm -f "$cache/download/$1"_*.deb
  (cd "$cache/download" && apt_get download "$1" >"$log" 2>&1) ||
    { update_lists; (cd "$cache/download" && apt_get download "$1" >"$log" 2>&1); } ||
    { cat "$log" >&2; die "cannot download $1"; }
  mkdir -p "$2"
  dpkg-deb -x "$cache/download/$1"_*.deb "$2"
  rm -f "$cache/download/$1"_*.deb
}

root=$(cd "$(dirname "$0")/.." && pwd)
cache=$root/target/testbed
mkdir -p "$cache"
log=$cache/apt.log
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")

command -v cargo >/dev/null || die "no Rust toolchain: install one first (https://rustup.rs)"
command -v dpkg-query >/dev/null || die "this set-up knows Debian only; see docs/ for what is needed"

if [ -n "$(missing_of "${base_packages[@]}" "${qemu_packages[@]}" "${libvirt_packages[@]}")" ]; then
  [ "$(id -u)" = 0 ] || die "packages are missing, run as root once: $(
    missing_of "${base_packages[@]}" "${qemu_packages[@]}" "${libvirt_packages[@]}")"
  missing=$(missing_of "${base_packages[@]}")
  update_lists
  if [ -n "$missing" ]; then
    say "installing $missing"
    # shellcheck disable=SC2086  # a list of names
    apt_get install -y --no-install-recommends $missing >"$log" 2>&1 ||
      { tail -n 20 "$log" >&2; die "apt-get install failed for: $missing"; }
  fi
  install_suite "$([ -n "$(version_of qemu-utils)" ] && echo qemu-utils || echo qemu-system-x86)" \
    "${qemu_packages[@]}"
  install_suite "$([ -n "$(version_of libvirt0)" ] && echo libvirt0 || echo libvirt-daemon)" \
    "${libvirt_packages[@]}"
  # A package of its own since libvirt 10; before, virtlogd is part of libvirt-daemon.
  command -v virtlogd >/dev/null || [ -x /usr/sbin/virtlogd ] ||
    install_suite libvirt0 libvirt-daemon-log
fi
fetch_packages

# A mixture of suites shows here, not in the middle of a test.
for program in qemu-img qemu-nbd qemu-system-x86_64 nbdkit nbdcopy virsh libvirtd; do
  command -v "$program" >/dev/null || [ -x "/usr/sbin/$program" ] || die "$program is not there"
done
qemu-img --version >/dev/null || die "qemu-img does not run"
qemu-system-x86_64 --version >/dev/null || die "qemu-system-x86_64 does not run"

# libvirtd asks QEMU, as libvirt-qemu, what it can do. Where the device is there and that user may not
# open it (no udev gave it to its group), it asks again at every call: calls of 40 s were seen.
if [ -c /dev/kvm ] && [ "$(id -u)" = 0 ] && getent group kvm >/dev/null &&
  ! setpriv --reuid=libvirt-qemu --regid=kvm --init-groups test -w /dev/kvm 2>/dev/null; then
  say "giving /dev/kvm to the group kvm, as Debian's udev does"
  chgrp kvm /dev/kvm && chmod 0660 /dev/kvm
fi
