//! `vmbackup nbd zero URI`: zeroes onto an export.

use super::{FuaArgs, changed};
use crate::block::ZeroMode;
use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::Result;
use crate::job::export::write::{self, Change, checked};
use crate::units::ByteSize;

/// Make a range of an export zero
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The export
    #[arg(value_name = "NBD-URI")]
    uri: String,
    /// Where to begin
    #[arg(long, value_name = "SIZE", default_value = "0")]
    offset: ByteSize,
    /// How many bytes
    #[arg(long, value_name = "SIZE")]
    length: ByteSize,
    /// Keep the space allocated
    #[arg(long)]
    allocated: bool,
    /// Fail, and change nothing, unless it is faster than writing zeroes
    #[arg(long, conflicts_with = "allocated")]
    fast: bool,
    #[command(flatten)]
    fua: FuaArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let uri = settings::nbd_uri(&args.uri)?;
    let mode = match (args.allocated, args.fast) {
        (true, _) => ZeroMode::Allocated,
        (false, true) => ZeroMode::FastOnly,
        (false, false) => ZeroMode::Sparse,
    };
    let change = Change::Zero(checked(args.offset.0, args.length.0)?, mode);
    let report = write::run(&uri, change, args.fua.durable(), &context.control).await?;
    context.output.document("nbd-zero", &report, |report| changed("zeroed", report))
}
