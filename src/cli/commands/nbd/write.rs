//! `vmbackup nbd write URI`: some bytes onto an export.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use super::{FuaArgs, PlaceArgs, changed};
use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::{Error, Kind, Result};
use crate::job::export::write::{self, BYTES_MAX, Change};

/// Write some bytes onto an export
///
/// At most 64 MiB: 'vmbackup copy' is for more.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    place: PlaceArgs,
    /// The bytes, as hexadecimal digits
    #[arg(long, value_name = "DIGITS", conflicts_with = "file")]
    hex: Option<String>,
    /// The bytes of this file [default: of standard input]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    fua: FuaArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let uri = settings::nbd_uri(&args.place.uri)?;
    let bytes = match (&args.hex, &args.file) {
        (Some(digits), _) => unhex(digits).ok_or_else(|| {
            Error::new(Kind::Usage, "--hex: not pairs of hexadecimal digits")
                .hint("write --hex 00ff, or name a file with --file")
        })?,
        (None, Some(path)) => {
            let failed = |e| Error::io(format!("cannot read {}", path.display()), e);
            read(File::open(path).map_err(failed)?)?
        }
        (None, None) => read(std::io::stdin())?,
    };
    let change = Change::Write(args.place.offset.0, bytes);
    let report = write::run(&uri, change, args.fua.durable(), &context.control).await?;
    context.output.document("nbd-write", &report, |report| changed("wrote", report))
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let (pairs, []) = digits.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

fn read(from: impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = from.take(BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|e| Error::io("cannot read what is to be written", e))?;
    if bytes.len() as u64 > BYTES_MAX {
        let message = format!("more than {BYTES_MAX} bytes are not written by hand");
        return Err(Error::new(Kind::Usage, message).hint("use 'vmbackup copy'"));
    }
    Ok(bytes)
}
