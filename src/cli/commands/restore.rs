//! `vmbackup restore POINT`: to image files, devices, or a domain.

use std::fmt::Write;
use std::path::PathBuf;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::table::Table;
use crate::cli::text;
use crate::cli::vm_args::ConnectArgs;
use crate::cli::vm_settings;
use crate::error::Result;
use crate::job::restore::{self, Report};
use crate::units::ByteSize;

/// Restore a point to image files, to devices, or as a domain
///
/// Images are written under a temporary name and take their own name when they are complete and
/// durable. A running domain's disks are never overwritten.
#[derive(clap::Args, Debug)]
#[group(id = "target", required = true, multiple = true, args = ["to", "to_device", "define", "as_name"])]
#[group(id = "defining", multiple = true, args = ["define", "as_name"])]
pub(crate) struct Args {
    /// The point: digits of its id, VM@latest, or VM@TIME
    #[arg(value_name = "POINT")]
    pub(crate) point: String,
    /// Write images DIR/DISK.FORMAT, and the domain XML beside them
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
    /// Format of the images: sparse raw, or qcow2 [default: raw; with --define what the disk had]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) format: Option<FormatArg>,
    /// Only this disk (vda); may be given more than once
    #[arg(long, value_name = "DISK")]
    pub(crate) disk: Vec<String>,
    /// Write a disk to a block device, all of it, zeroes included; may be given more than once
    #[arg(long, value_name = "DISK=DEVICE")]
    pub(crate) to_device: Vec<String>,
    /// Define the domain in libvirt, under its own name, UUID and MAC addresses
    ///
    /// Without --to its images go where they were.
    #[arg(long)]
    pub(crate) define: bool,
    /// Start the domain once it is defined
    #[arg(long, requires = "defining")]
    pub(crate) start: bool,
    /// Define it as a new domain of this name: new UUID, MAC addresses, disk and NVRAM paths
    ///
    /// Without --to its images go beside the original's, as NAME-DISK.FORMAT.
    #[arg(long = "as", value_name = "NAME")]
    pub(crate) as_name: Option<String>,
    /// Replace images and domain definitions that exist, once the new are complete
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
    #[command(flatten)]
    pub(crate) repository: RepositoryArgs,
}

/// `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum FormatArg {
    /// A sparse file
    Raw,
    /// qcow2
    Qcow2,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let (repository_args, request) = vm_settings::restore(args)?;
    let repository = context.open(&repository_args).await?;
    let job = restore::run(&repository, request, (&context.env, &context.control));
    let report = context.watch(job).await?;
    context.output.document("restore", &report, describe)
}

fn describe(report: &Report) -> String {
    let mut table = Table::new(&["disk", ">size", "restored to", ">written", ">time"]);
    for disk in &report.disks {
        table.row([
            disk.name.clone(),
            ByteSize(disk.size_bytes).to_string(),
            format!("{} ({})", disk.path.display(), disk.format),
            ByteSize(disk.written_bytes).to_string(),
            text::duration_ms(disk.elapsed_ms),
        ]);
    }
    let mut out = format!(
        "point {} of {}, in {}\n{}",
        report.point.short(),
        report.vm.name,
        text::duration_ms(report.elapsed_ms),
        table.render(),
    );
    for file in &report.files {
        let _ = writeln!(out, "also wrote: {}", file.display());
    }
    if let Some(domain) = &report.domain {
        let state = if domain.started { "defined and started" } else { "defined" };
        let _ = writeln!(out, "{state}: {} ({})", domain.name, domain.uuid);
        for change in &domain.changes {
            let _ = writeln!(out, "changed: {change}");
        }
    }
    out
}
