#!/bin/bash
# Builds a target with coverage and runs it: run.sh TARGET [libFuzzer's options]. For machines without
# cargo-fuzz, which adds the address sanitizer; safe code has little use for it.
set -euo pipefail
cd "$(dirname "$0")"
target=${1:?TARGET}
shift
host=$(rustc -vV | sed -n 's/^host: //p')
# What cargo-fuzz passes (its src/project.rs), but for the sanitizer.
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions=on"
# With --target the flags are not for build scripts.
cargo build --bin "$target" --target "$host"
mkdir -p "corpus/$target" "artifacts/$target"
exec "target/$host/debug/$target" -artifact_prefix="artifacts/$target/" "corpus/$target" "$@"
