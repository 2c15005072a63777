//! `vmbackup nbd flush URI`: makes durable what was written to an export.

use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::Result;
use crate::job::export::write::{self, Change};
use crate::nbd::Durable;

/// Make durable what was written to an export, by whomever
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The export
    #[arg(value_name = "NBD-URI")]
    uri: String,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let uri = settings::nbd_uri(&args.uri)?;
    let report = write::run(&uri, Change::Flush, Durable::Yes, &context.control).await?;
    context.output.document("nbd-flush", &report, |_| "flushed\n".to_owned())
}
