//! `vmbackup restore POINT`: to image files, devices, or a domain.

use std::fmt::Write;
use std::path::PathBuf;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::table::Table;
use crate::cli::text;
use crate::cli::vm_args::{ConnectArgs, WaitArgs};
use crate::cli::vm_settings;
use crate::error::{Error, Kind, Result};
use crate::job::restore::preview::{self, Preview};
use crate::job::restore::salvage::Salvage;
use crate::job::restore::{self, Report};
use crate::units::ByteSize;

/// Damaged ranges that a person gets; all are in the list and the JSON document.
const LINES_MAX: usize = 20;

/// Restore a point to image files, to devices, or as a domain
///
/// Images are written under a temporary name and take their own name when they are complete and
/// durable. A running domain's disks are never overwritten.
#[derive(clap::Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
#[group(id = "target", required = true, multiple = true, args = ["to", "to_device", "define", "as_name"])]
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
    /// Write a disk to a block device, all of it, zeroes included; may be given more than once. What a
    /// larger device has beyond stays as it is
    #[arg(long, value_name = "DISK=DEVICE")]
    pub(crate) to_device: Vec<String>,
    /// Define the domain in libvirt, under its own name, UUID and MAC addresses
    ///
    /// Without --to its images go where they were.
    #[arg(long)]
    pub(crate) define: bool,
    /// Start the domain once it is defined
    #[arg(long)]
    pub(crate) start: bool,
    /// Define it as a new domain of this name: new UUID, MAC addresses, disk and NVRAM paths
    ///
    /// Without --to its images go beside the original's, as NAME-DISK.FORMAT.
    #[arg(long = "as", value_name = "NAME")]
    pub(crate) as_name: Option<String>,
    /// Replace images and domain definitions that exist, once the new are complete; links are
    /// followed, owner and rights of files stay (not where others make files, as in /tmp)
    #[arg(long)]
    pub(crate) force: bool,
    /// Show what would be written and replaced, and everything that is in the way; change nothing
    ///
    /// When the restore would fail, exits with the code it would fail with; each problem comes with
    /// the exact fix.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Restore what can be read of a damaged point: zeroes are written where data is damaged
    ///
    /// DIR/damaged.json lists where that is and why (without --to a file that is named). Ends with exit
    /// code 10 if anything was damaged. Look at the disks before you start a VM on them.
    #[arg(long, conflicts_with = "start")]
    pub(crate) salvage: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
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
    let dry_run = args.dry_run;
    let (repository_args, request) = vm_settings::restore(args)?;
    let repository = context.open(&repository_args).await?;
    let surroundings = (&context.env, &context.control);
    if dry_run {
        let job = preview::run(&repository, request, surroundings);
        return show(&Box::pin(context.watch(job)).await?, context);
    }
    let report = context.watch(restore::run(&repository, request, surroundings)).await?;
    context.output.document("restore", &report, describe)?;
    match &report.salvage {
        Some(salvage) if !salvage.is_whole() => {
            let point = report.point.short();
            let message = format!("point {point} is damaged: only a part of it was restored");
            let list = salvage.list.display();
            Err(Error::new(Kind::Corrupt, message).hint(format!(
                "{list} lists what is zero or left out; other points may have it, or 'full' may \
                 store it again if the VM still has it"
            )))
        }
        _ => Ok(()),
    }
}

fn show(preview: &Preview, context: &Context) -> Result<()> {
    context.output.document("restore-plan", preview, describe_preview)?;
    let problems = &preview.problems;
    // As the restore would: it fails at the first.
    let Some(kind) = problems.iter().find_map(|problem| problem.kind) else { return Ok(()) };
    let message = format!("a restore of point {} would fail", preview.point.short());
    let hint = format!("fix {} above", text::count(problems.len(), "problem"));
    Err(Error::new(kind, message).hint(hint))
}

fn describe_preview(preview: &Preview) -> String {
    let lost = |replaces: bool| if replaces { " (replaces what is there)" } else { "" };
    let mut table = Table::new(&["disk", ">size", "to", ">to read"]);
    for disk in &preview.disks {
        let place =
            disk.path.as_ref().zip(disk.format).map_or("unknown".into(), |(path, format)| {
                format!("{} ({format}){}", path.display(), lost(disk.replaces))
            });
        let expected = disk.expected_bytes.map(|n| ByteSize(n).to_string());
        let expected = expected.unwrap_or_else(|| "unknown".into());
        table.row([disk.name.clone(), ByteSize(disk.size_bytes).to_string(), place, expected]);
    }
    let (point, vm) = (preview.point.short(), &preview.vm.name);
    let mut out = format!("point {point} of {vm} would be restored\n{}", table.render());
    for file in &preview.files {
        let _ = writeln!(out, "also: {}{}", file.path.display(), lost(file.replaces));
    }
    if let Some(domain) = &preview.domain {
        let state = if domain.start { "defined and started" } else { "defined" };
        let uuid = domain.uuid.map_or("a new UUID".to_owned(), |uuid| uuid.to_string());
        let _ = writeln!(out, "{state}: {} ({uuid}){}", domain.name, lost(domain.replaces));
        for change in &domain.changes {
            let _ = writeln!(out, "changed: {change}");
        }
    }
    for problem in &preview.problems {
        let _ = writeln!(out, "problem: {}\n  fix: {}", problem.what, problem.fix);
    }
    out
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
        text::shown(&report.vm.name),
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
    if let Some(salvage) = &report.salvage {
        describe_salvage(&mut out, salvage);
    }
    out
}

fn describe_salvage(out: &mut String, salvage: &Salvage) {
    let list = salvage.list.display();
    if salvage.is_whole() {
        let _ = writeln!(out, "nothing was damaged ({list} says so)");
        return;
    }
    let _ = writeln!(out, "damaged: {} are zeroes", ByteSize(salvage.damaged_bytes));
    for range in salvage.ranges.iter().take(LINES_MAX) {
        let (disk, offset, bytes) = (text::shown(&range.disk), range.offset, range.bytes);
        let _ = writeln!(out, "  {disk} at {offset}, {bytes} bytes: {}", range.reason);
    }
    if salvage.ranges.len() > LINES_MAX {
        let _ = writeln!(out, "  and {} more", salvage.ranges.len() - LINES_MAX);
    }
    for artifact in &salvage.artifacts {
        let _ = writeln!(out, "  {} left out: {}", artifact.kind, artifact.reason);
    }
    let _ = writeln!(out, "all of it is in {list}");
}
