#!/bin/bash
# The one test command: sets the machine up, builds, checks and runs everything.
#
#   tests/run.sh           what CI runs: half an hour on 2 cores from a clean clone (28 minutes measured,
#                          45 are the bound)
#   tests/run.sh --soak    the long loops as well (tests marked #[ignore = "soak: …"]), and whether the
#                          fuzz targets still build
#
# Needs a Rust toolchain, and root the first time to install packages (tests/setup.sh says what).
# Every step runs even if one before it failed; the exit code is 0 only if all passed. Ends with
# the test runner's own summary.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8 CARGO_TERM_COLOR=never

soak=no
inner=no
for argument in "$@"; do
  case $argument in
    --soak) soak=yes ;;
    --inner) inner=yes ;; # set-up done, libvirtd running
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
if [ "$inner" = no ]; then
  tests/setup.sh || exit 1
  # For one test, and not in the set-up, which the quick start has too: it brings ninety packages.
  if ! command -v guestfish >/dev/null; then
    echo "set-up: installing guestfish"
    install=(apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends guestfish)
    export DEBIAN_FRONTEND=noninteractive
    "${install[@]}" >/dev/null 2>&1 || { apt-get -q update && "${install[@]}"; } >/dev/null || exit 1
  fi
  # What its appliance is built with looks there.
  mkdir -p /lib/modules
  exec tests/support/libvirtd.sh with "$0" --inner "$@"
fi

failed=()
skipped=()
not_here=77 # what a step ends with that cannot be done on this machine, as in automake
step() { # NAME CMD…
  local name=$1 start=$SECONDS code=0
  shift
  echo
  echo "=== $name"
  "$@" || code=$?
  case $code in
    0) echo "=== $name: passed in $((SECONDS - start)) s" ;;
    "$not_here")
      echo "=== $name: skipped"
      skipped+=("$name")
      ;;
    *)
      echo "=== $name: FAILED after $((SECONDS - start)) s"
      failed+=("$name")
      ;;
  esac
}

deny() {
  if ! cargo deny --version >/dev/null 2>&1; then
    echo "cargo-deny is not installed: licences, bans and sources are not checked here"
    return "$not_here"
  fi
  cargo deny --offline check licenses bans sources
}

summary=target/testbed/summary.txt
run_tests() {
  if cargo nextest --version >/dev/null 2>&1; then
    local options=(--workspace --no-fail-fast)
    if [ "$soak" = yes ]; then options+=(--run-ignored all --profile soak); fi
    cargo nextest run "${options[@]}" 2>&1 | tee target/testbed/tests.log
    local code=${PIPESTATUS[0]}
    # From the "Summary" line on; a build that failed has none.
    sed -n '/^ *Summary \[/,$p' target/testbed/tests.log >"$summary"
    return "$code"
  fi
  local options=()
  if [ "$soak" = yes ]; then options+=(-- --include-ignored); fi
  cargo test --workspace --no-fail-fast "${options[@]}" 2>&1 | tee target/testbed/tests.log
  local code=${PIPESTATUS[0]}
  awk '/^test result:/ {passed += $4; failed += $6; ignored += $8}
    END {printf "%d passed, %d failed, %d ignored\n", passed, failed, ignored}' \
    target/testbed/tests.log >"$summary"
  return "$code"
}

: >"$summary"
step "format" cargo fmt --all --check
step "lints" cargo clippy --workspace --all-targets -q -- -D warnings
step "without libvirt and TLS" cargo clippy --workspace --all-targets --no-default-features -q -- -D warnings
step "a program without libvirt and TLS" tests/support/without_libvirt.sh
step "licences and sources" deny
step "scripts" bash -n tests/setup.sh tests/run.sh tests/support/*.sh \
  tests/support/guest/build.sh examples/*.sh benches/*.sh
step "build" cargo build --workspace --all-targets -q
if [ "$soak" = yes ]; then
  # A workspace of its own, so that nothing above sees it. As it is, without coverage, on any compiler.
  step "fuzz targets" cargo clippy --manifest-path fuzz/Cargo.toml --locked --all-targets -q -- -D warnings
fi
step "quick start" examples/quickstart.sh
for example in examples/*.sh; do
  # With a set-up of its own.
  [ "$example" = examples/quickstart.sh ] || step "$example" "$example"
done
step "documentation tests" cargo test --workspace --doc -q
step "tests" run_tests

echo
for name in "${skipped[@]}"; do echo "skipped: $name"; done
for name in "${failed[@]}"; do echo "FAILED: $name"; done
if [ ${#failed[@]} = 0 ]; then
  if [ ${#skipped[@]} = 0 ]; then all="every step"; else all="every step that was not skipped"; fi
  echo "$all passed ($SECONDS s)"
fi
if [ -s "$summary" ]; then cat "$summary"; else echo "0 passed, ${#failed[@]} failed"; fi
[ ${#failed[@]} = 0 ]
