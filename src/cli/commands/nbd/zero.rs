//! `vmbackup nbd zero URI`: zeroes onto an export.

use super::{FuaArgs, RangeArgs, changed};
use crate::block::ZeroMode;
use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::Result;
use crate::job::export::write::{self, Change};

/// Make a range of an export zero
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    range: RangeArgs,
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
    let uri = settings::nbd_uri(&args.range.place.uri)?;
    let mode = match (args.allocated, args.fast) {
        (true, _) => ZeroMode::Allocated,
        (false, true) => ZeroMode::FastOnly,
        (false, false) => ZeroMode::Sparse,
    };
    let change = Change::Zero(args.range.checked()?, mode);
    let report = write::run(&uri, change, args.fua.durable(), &context.control).await?;
    context.output.document("nbd-zero", &report, |report| changed("zeroed", report))
}
