//! Walks the extents of an NBD export as a backup does, and reads nothing: the extent phase alone.
//!
//! `extents URI [BITMAP]`; benches/bench.py times it. Prints how many extents of each kind there are.
#![allow(clippy::print_stdout)]

use std::error::Error;

use vmbackup::block::{BlockSource, ByteRange, ExtentKind};
use vmbackup::nbd::{Client, ClientOptions};

/// The engine's window.
const WINDOW_BYTES: u64 = 1 << 30;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(uri) = arguments.next() else { return Ok(()) };
    let options = ClientOptions { changes: arguments.next(), ..ClientOptions::default() };
    let client = Client::open_uri(&uri.parse()?, options).await?;
    let size_bytes = client.geometry().size_bytes;
    let mut counts = [0_usize; 3];
    let mut at = 0;
    while at < size_bytes {
        let end = (at + WINDOW_BYTES).min(size_bytes);
        let map = client.extents(ByteRange::between(at, end)).await?;
        at = map.end();
        for extent in map.iter() {
            counts[match extent.kind {
                ExtentKind::Data => 0,
                ExtentKind::Zero => 1,
                ExtentKind::Unchanged => 2,
            }] += 1;
        }
    }
    println!("{} data, {} zero, {} unchanged", counts[0], counts[1], counts[2]);
    Ok(())
}
