//! `vmbackup nbd trim URI`: gives a range of an export up.

use super::{FuaArgs, RangeArgs, changed};
use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::Result;
use crate::job::export::write::{self, Change};

/// Give a range of an export up: what it holds afterwards is undefined
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    range: RangeArgs,
    #[command(flatten)]
    fua: FuaArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let uri = settings::nbd_uri(&args.range.place.uri)?;
    let change = Change::Trim(args.range.checked()?);
    let report = write::run(&uri, change, args.fua.durable(), &context.control).await?;
    context.output.document("nbd-trim", &report, |report| changed("trimmed", report))
}
