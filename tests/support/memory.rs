//! How much memory a program took at most.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::outcome::Outcome;

/// Runs `command` to its end; also the highest resident memory it had, in MiB.
///
/// The kernel keeps the high-water mark (`VmHWM`, proc(5)) as long as the process is there, so asking
/// every few milliseconds misses only what is new in the last of them. Its output must fit a pipe.
pub(crate) fn with_peak_mib(command: &mut Command) -> (Outcome, u64) {
    let line = format!("{command:?}");
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{line}: {error}"));
    let mut peak_kib = 0;
    while child.try_wait().expect("own child").is_none() {
        peak_kib = peak_kib.max(high_water_kib(child.id()).unwrap_or(0));
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().expect("own child");
    assert!(peak_kib > 0, "{line}: ended before it was looked at");
    (Outcome::from_output(line, &output), peak_kib.div_ceil(1024))
}

/// The highest resident memory that the process `id` had until now, in MiB.
pub(crate) fn peak_mib(id: u32) -> u64 {
    high_water_kib(id).expect("a process that runs").div_ceil(1024)
}

fn high_water_kib(id: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}
