//! `vmbackup plan`: what a backup would do.

use std::fmt::Write;

use crate::cli::context::Context;
use crate::cli::table::Table;
use crate::cli::text;
use crate::cli::vm_args::BackupArgs;
use crate::cli::vm_settings;
use crate::error::{Error, Kind, Result};
use crate::job::plan::{self, Plan, Request};
use crate::units::ByteSize;

/// Show what a backup would do to each disk and why, without changing anything
///
/// When a backup would fail, exits with the code it would fail with; each problem comes with the
/// exact fix.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    backup: BackupArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let args = args.backup;
    let request = Request {
        source: vm_settings::source(args.source)?,
        options: vm_settings::snapshot(args.snapshot)?,
    };
    let repository = context.open_if_made(&args.repository).await?;
    let job = plan::run(repository.as_ref(), request, (&context.env, &context.control));
    let plan = context.watch(job).await?;
    context.output.document("plan", &plan, describe)?;
    let fatal: Vec<Kind> = plan.problems.iter().filter_map(|problem| problem.kind).collect();
    // As the backup would: it fails at the first.
    let Some(kind) = fatal.first() else { return Ok(()) };
    let message = format!("a backup of {} would fail", plan.vm.name);
    Err(Error::new(*kind, message)
        .hint(format!("fix {} above", text::count(fatal.len(), "problem"))))
}

fn describe(plan: &Plan) -> String {
    let mut table = Table::new(&["disk", ">size", "how", ">to read"]);
    for disk in &plan.disks {
        let expected = disk.expected_bytes.map(|n| ByteSize(n).to_string());
        table.row([
            disk.name.clone(),
            ByteSize(disk.size_bytes).to_string(),
            disk.read.as_ref().map_or_else(|| "unknown now".into(), text::read_mode),
            expected.unwrap_or_else(|| "unknown".into()),
        ]);
    }
    let state = if plan.running { "running" } else { "stopped" };
    let mut out = format!("{} ({state})\n{}", plan.vm.name, table.render());
    for disk in &plan.excluded {
        let _ = writeln!(out, "not included: {} ({})", disk.name, disk.reason);
    }
    for thing in &plan.not_captured {
        let _ = writeln!(out, "not captured: {}: {}", thing.what, thing.reason);
    }
    if let Some(scratch) = &plan.scratch {
        let free = scratch.bytes_free.map_or("unknown".into(), |n| ByteSize(n).to_string());
        let most = ByteSize(scratch.bytes_max);
        let _ =
            writeln!(out, "scratch: {}, at most {most}, free {free}", scratch.directory.display());
    }
    for problem in &plan.problems {
        let weight = if problem.fatal { "problem" } else { "weakness" };
        let _ = writeln!(out, "{weight}: {}\n  fix: {}", problem.what, problem.fix);
    }
    out
}
