//! `vmbackup show POINT`: everything known of one point.

use std::fmt::Write;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::table::Table;
use crate::cli::text;
use crate::error::Result;
use crate::job::show::{self, Point};
use crate::units::ByteSize;

/// Show a point: its disks, how each was read and why, and what else it holds
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The point: digits of its id, VM@latest, or VM@TIME
    #[arg(value_name = "POINT")]
    point: String,
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let repository = context.open(&args.repository).await?;
    let point = show::run(&repository, &args.point, &context.env);
    let point = context.watch(point).await?;
    context.output.document("show", &point, |point| describe(point, context))
}

fn describe(point: &Point, context: &Context) -> String {
    let mut out = format!(
        "point        {}\nVM           {} ({})\nhost         {} ({})\ntime         {}\nconsistency  {}\n\n",
        point.id,
        text::shown(&point.vm.name),
        point.vm.uuid,
        point.vm.host,
        point.vm.platform,
        text::time(point.time, &context.env.zone),
        text::quiescence(&point.quiescence),
    );
    let mut table = Table::new(&["disk", ">size", "how", ">read", ">stored", "origin"]);
    for disk in &point.disks {
        table.row([
            disk.name.clone(),
            ByteSize(disk.size_bytes).to_string(),
            text::read_mode(&disk.read),
            ByteSize(disk.read_bytes).to_string(),
            ByteSize(disk.stored_bytes).to_string(),
            format!("{} ({})", disk.origin, disk.format),
        ]);
    }
    out.push_str(&table.render());
    let mut roots = Table::new(&["disk", "content root"]);
    for disk in &point.disks {
        roots.row([disk.name.clone(), disk.content_root.to_string()]);
    }
    let _ = write!(out, "\n{}", roots.render());
    for artifact in &point.artifacts {
        let origin = artifact.origin.as_deref().unwrap_or("-");
        let size = ByteSize(artifact.size_bytes);
        let _ = writeln!(out, "also holds: {} ({size}, {origin})", artifact.name());
    }
    for disk in &point.excluded {
        let _ = writeln!(out, "not included: {} ({})", disk.name, disk.reason);
    }
    for thing in &point.not_captured {
        let _ = writeln!(out, "not captured: {}: {}", thing.what, thing.reason);
    }
    out
}
