//! `vmbackup nbd trim URI`: gives a range of an export up.

use super::{FuaArgs, changed};
use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::Result;
use crate::job::export::write::{self, Change, checked};
use crate::units::ByteSize;

/// Give a range of an export up: what it holds afterwards is undefined
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
    #[command(flatten)]
    fua: FuaArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let uri = settings::nbd_uri(&args.uri)?;
    let change = Change::Trim(checked(args.offset.0, args.length.0)?);
    let report = write::run(&uri, change, args.fua.durable(), &context.control).await?;
    context.output.document("nbd-trim", &report, |report| changed("trimmed", report))
}
