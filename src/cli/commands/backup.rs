//! `vmbackup backup`: incremental if it can, full otherwise; and what the three backups share.

use std::fmt::Write;

use crate::cli::context::Context;
use crate::cli::table::Table;
use crate::cli::text;
use crate::cli::vm_args::BackupArgs;
use crate::cli::vm_settings;
use crate::error::{Error, Kind, Result};
use crate::job::BackupMode;
use crate::job::backup::{self, Report, Request, Sample};
use crate::units::ByteSize;

/// Back up a VM: incremental where possible, each disk in full where not
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    backup: BackupArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    run_as(BackupMode::Auto, args.backup, context).await
}

/// Runs a backup of the given kind and prints what it did.
pub(super) async fn run_as(mode: BackupMode, args: BackupArgs, context: &Context) -> Result<()> {
    let request = Request {
        source: vm_settings::source(args.source)?,
        mode,
        options: vm_settings::snapshot(args.snapshot)?,
        audit: vm_settings::sample("--audit", &args.audit)?,
        verify_source: match &args.verify_source {
            Some(percent) => vm_settings::sample("--verify-source", percent)?,
            None => Sample::None,
        },
        wait: vm_settings::wait(&args.wait)?,
    };
    let repository = context.open_for_backup(&args.repository).await?;
    let job = backup::run(&repository, request, (&context.env, &context.control));
    // Boxed: the future of a backup is large.
    let report = context.watch(Box::pin(job)).await?;
    context.output.document("backup", &report, describe)?;
    report.unfinished.as_deref().map_or(Ok(()), |what| Err(unfinished(&report, what)))
}

/// The point is there; that must not hide what else there is.
fn unfinished(report: &Report, what: &str) -> Error {
    let point = report.point.short();
    Error::new(Kind::Unfinished, format!("point {point} is complete, but then: {what}"))
        .hint("'vmbackup recover' puts it right, or the next backup; it may read disks in full")
}

fn describe(report: &Report) -> String {
    let mut table = Table::new(&["disk", ">size", "how", ">read", ">stored", ">time"]);
    for disk in &report.disks {
        table.row([
            disk.name.clone(),
            ByteSize(disk.size_bytes).to_string(),
            text::read_mode(&disk.read),
            ByteSize(disk.read_bytes).to_string(),
            ByteSize(disk.stored_bytes).to_string(),
            text::duration_ms(disk.elapsed_ms),
        ]);
    }
    let mut out = format!(
        "point {} of {}, {}, in {}\n{}",
        report.point.short(),
        report.vm.name,
        text::quiescence(&report.quiescence),
        text::duration_ms(report.elapsed_ms),
        table.render(),
    );
    for disk in &report.excluded {
        let _ = writeln!(out, "not included: {} ({})", disk.name, disk.reason);
    }
    for thing in &report.not_captured {
        let _ = writeln!(out, "not captured: {}: {}", thing.what, thing.reason);
    }
    out
}
