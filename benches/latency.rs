//! Writes to a device at a steady pace and notes how long each write takes: what a guest feels.
//!
//! `latency DEVICE SPAN_MIB PERIOD_US STOP`; benches/guest.py runs it inside a guest. One write of 4 KiB
//! at a time, past the page cache, at random places of the first SPAN_MIB, PERIOD_US apart or as soon
//! as the one before is done, until the file STOP exists. Prints when each write began and how long it
//! took, in microseconds since the first one.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

const BLOCK_BYTES: usize = 4096;

/// `O_DIRECT` of x86-64 (asm-generic/fcntl.h).
const O_DIRECT: i32 = 0o40000;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [device, span_mib, period_us, stop] = arguments.as_slice() else { return Ok(()) };
    let blocks = span_mib.parse::<u64>()? * (1 << 20) / BLOCK_BYTES as u64;
    let period = Duration::from_micros(period_us.parse()?);
    let disk = OpenOptions::new().write(true).custom_flags(O_DIRECT).open(device)?;

    let mut memory = vec![0_u8; 2 * BLOCK_BYTES];
    let from = memory.as_ptr().align_offset(BLOCK_BYTES);
    let block = &mut memory[from..from + BLOCK_BYTES];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut taken = Vec::new();
    let first = Instant::now();
    let mut due = first;
    while !Path::new(stop).exists() {
        // Xorshift (Marsaglia 2003).
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        block[..8].copy_from_slice(&random.to_le_bytes());
        let begun = Instant::now();
        disk.write_all_at(block, random % blocks * BLOCK_BYTES as u64)?;
        taken.push(((begun - first).as_micros(), begun.elapsed().as_micros()));
        due = (due + period).max(Instant::now());
        std::thread::sleep(due - Instant::now().min(due));
    }
    let mut text = String::new();
    for (begun, took) in taken {
        writeln!(text, "{begun} {took}")?;
    }
    print!("{text}");
    Ok(())
}
