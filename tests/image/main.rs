//! Images of stopped VMs: locks QEMU honours, bitmaps inside, snapshots, new images.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod files;
mod snapshot;
mod support;
