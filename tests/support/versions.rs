//! Versions of installed tools: what they can do depends on them.

use std::process::Command;

/// Major and minor of qemu-nbd.
pub(crate) fn qemu_nbd_version() -> (u32, u32) {
    let output = Command::new("qemu-nbd").arg("--version").output();
    let output = output.unwrap_or_else(|e| panic!("qemu-nbd is needed: {e}"));
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().nth(1).expect("qemu-nbd VERSION …");
    let mut numbers = version.split('.').map(|number| number.parse().expect("a version"));
    let mut next = || numbers.next().expect("major.minor");
    (next(), next())
}
