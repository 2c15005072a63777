//! `vmbackup nbd read URI`: some bytes of an export.

use std::fmt::Write;

use super::PlaceArgs;
use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::Result;
use crate::job::export::read::{self, Report};
use crate::units::ByteSize;

/// Bytes of a line.
const LINE_BYTES: usize = 16;

/// Show some bytes of an export
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    place: PlaceArgs,
    /// How many bytes
    #[arg(long, value_name = "SIZE", default_value = "512")]
    length: ByteSize,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let uri = settings::nbd_uri(&args.place.uri)?;
    let report = read::run(&uri, args.place.offset.0, args.length.0, &context.control).await?;
    context.output.document("nbd-read", &report, dump)
}

/// Offset, hexadecimal digits, text; lines that repeat the one before are left out, as hexdump does.
fn dump(report: &Report) -> String {
    let mut out = String::new();
    let mut before: Option<&[u8]> = None;
    let mut skipping = false;
    let mut offset = report.offset;
    for line in report.data.chunks(LINE_BYTES) {
        let repeats = before == Some(line);
        if !repeats {
            let hex: String = line.iter().fold(String::new(), |mut text, byte| {
                let _ = write!(text, "{byte:02x} ");
                text
            });
            let shown = |byte: &u8| if (32..127).contains(byte) { char::from(*byte) } else { '.' };
            let text: String = line.iter().map(shown).collect();
            let _ = writeln!(out, "{offset:010x}  {hex:48} |{text}|");
        } else if !skipping {
            out.push_str("*\n");
        }
        (before, skipping) = (Some(line), repeats);
        offset += line.len() as u64;
    }
    let _ = writeln!(out, "{offset:010x}");
    out
}
