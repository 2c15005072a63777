//! `vmbackup gc`: frees what no point needs.

use std::fmt::Write;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::error::Result;
use crate::job::gc::{self, Report};
use crate::units::ByteSize;

/// Delete what no point needs any more; backups may run meanwhile
///
/// What a running backup might still build on is only marked and is deleted by the gc after it.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let repository = context.open(&args.repository).await?;
    let job = gc::run(&repository, &context.control);
    let report = context.watch(Box::pin(job)).await?;
    context.output.document("gc", &report, describe)
}

fn describe(report: &Report) -> String {
    let mut out = format!("freed {}\n", ByteSize(report.freed_bytes));
    if report.waiting_bytes > 0 {
        let _ = writeln!(out, "a later gc frees {} more", ByteSize(report.waiting_bytes));
    }
    for run in &report.waiting_for {
        let _ = writeln!(out, "waiting for: {run}");
    }
    out
}
