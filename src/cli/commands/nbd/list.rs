//! `vmbackup nbd list URI`: the exports of a server.

use std::fmt::Write;

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
    let scope = Scope::AllWithoutContexts;
    let report = info::run(&uri, scope, Content::Unread, &context.control).await?;
    context.output.document("nbd-list", &report, describe)?;
    report.check()
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
    for failed in &report.failed {
        let (none, description) = ("-".to_owned(), failed.description.clone().unwrap_or_default());
        table.row([format!("'{}'", failed.name), none.clone(), none, description]);
    }
    let mut out = table.render();
    for failed in &report.failed {
        let _ = writeln!(out, "'{}' cannot be looked at: {}", failed.name, failed.error);
    }
    out
}
