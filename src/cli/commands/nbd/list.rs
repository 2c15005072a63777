//! `vmbackup nbd list URI`: the exports of a server.

use crate::cli::context::Context;
use crate::cli::settings;
use crate::cli::table::Table;
use crate::error::Result;
use crate::job::export::info::{self, Content, Report, Scope};
use crate::units::ByteSize;

/// List the exports of a server
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The server; the name of an export in it does not matter
    #[arg(value_name = "NBD-URI")]
    uri: String,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let uri = settings::nbd_uri(&args.uri)?;
    let report = info::run(&uri, Scope::All, Content::Unread, &context.control).await?;
    context.output.document("nbd-list", &report, describe)
}

fn describe(report: &Report) -> String {
    let mut table = Table::new(&["export", ">size", "access", "description"]);
    for export in &report.exports {
        let access = if export.flags.contains(&"read-only") { "read" } else { "read, write" };
        table.row([
            format!("'{}'", export.name),
            ByteSize(export.size_bytes).to_string(),
            access.to_owned(),
            export.description.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}
