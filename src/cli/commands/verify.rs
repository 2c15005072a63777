//! `vmbackup verify POINT`: proof that a point is what it was.

use std::fmt::Write;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::settings;
use crate::cli::table::Table;
use crate::error::{Error, Kind, Result};
use crate::job::verify::{self, Report, Request};
use crate::units::ByteSize;

/// Read all of a point and recompute its content roots, or compare it with an image or export
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The point: digits of its id, VM@latest, or VM@TIME
    #[arg(value_name = "POINT")]
    point: String,
    /// Compare with the disk in this image or NBD export instead
    #[arg(long, value_name = "FILE[,format=F]|NBD-URI")]
    against: Option<String>,
    /// Only this disk (vda); needed with --against where the point has more than one
    #[arg(long, value_name = "DISK")]
    disk: Option<String>,
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let request = Request {
        point: args.point,
        disk: args.disk,
        against: args.against.as_deref().map(settings::disk).transpose()?,
    };
    let repository = context.open(&args.repository).await?;
    let job = verify::run(&repository, request, (&context.env, &context.control));
    let report = context.watch(job).await?;
    context.output.document("verify", &report, describe)?;
    match report.disks.iter().find(|disk| !disk.equal) {
        None => Ok(()),
        Some(disk) => {
            let (point, vm) = (report.point.short(), &report.vm.name);
            let message = format!("{} of point {point} of {vm} differs", disk.name);
            Err(Error::new(Kind::Mismatch, message))
        }
    }
}

fn describe(report: &Report) -> String {
    let mut table = Table::new(&["disk", ">size", "verdict", "content root"]);
    for disk in &report.disks {
        table.row([
            disk.name.clone(),
            ByteSize(disk.size_bytes).to_string(),
            if disk.equal { "equal" } else { "DIFFERS" }.to_owned(),
            disk.found_root.map_or_else(|| "-".into(), |root| root.to_string()),
        ]);
    }
    let mut out = table.render();
    for disk in &report.disks {
        if let Some(other) = disk.against_size_bytes.filter(|other| *other != disk.size_bytes) {
            let (name, size) = (&disk.name, disk.size_bytes);
            let _ = writeln!(out, "{name} has {size} bytes, the other disk has {other}");
        }
        for range in &disk.differences {
            let _ =
                writeln!(out, "{} differs at {}, {} bytes", disk.name, range.offset, range.bytes);
        }
    }
    out
}
