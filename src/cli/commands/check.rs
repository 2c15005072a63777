//! `vmbackup check`: is everything there that the points need?

use std::fmt::Write;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::names::Names;
use crate::cli::table::Table;
use crate::error::{Error, Kind, Result};
use crate::job::check::{self, CheckOptions, CheckReport, Damage, Depth, Repair};
use crate::units::ByteSize;

/// Lines of a sort that a person gets; all are in the JSON document.
const LINES_MAX: usize = 20;

/// Look for damage, and say which ranges of which disks of which points do not restore
///
/// Without options every manifest, every tree and the index are read, and for every chunk it is seen
/// that its pack is there and long enough. Ends with exit code 10 when something is damaged. What is
/// not listed restores.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Read all data too, and prove that each chunk is what it was
    #[arg(long, conflicts_with = "read_data_subset")]
    read_data: bool,
    /// Read the Nth of M parts of the data: a different one each day makes a whole in M days
    #[arg(long, value_name = "N/M")]
    read_data_subset: Option<String>,
    /// Put back what the index lost, from the packs themselves; backups may run meanwhile
    #[arg(long)]
    rebuild_index: bool,
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let depth = match args.read_data_subset.as_deref() {
        Some(text) => part(text)?,
        None if args.read_data => Depth::Data,
        None => Depth::Structure,
    };
    let repair = if args.rebuild_index { Repair::RebuildIndex } else { Repair::Nothing };
    let repository = context.open(&args.repository).await?;
    let job = check::run(&repository, CheckOptions { depth, repair }, &context.control);
    let report = context.watch(Box::pin(job)).await?;
    context.output.document("check", &report, describe)?;
    if report.is_fine() {
        return Ok(());
    }
    if report.damages.is_empty() && report.unlisted == 0 && !report.unreadable.is_empty() {
        return Err(Error::new(Kind::Io, "parts of the repository cannot be read")
            .hint("look at the kernel log for the device of the repository, then check again"));
    }
    let of_index = |damage: &Damage| damage.object.starts_with("index");
    let hint = if !args.rebuild_index && report.damages.iter().any(of_index) {
        "'vmbackup check --rebuild-index' puts back what the index lost; then check again"
    } else {
        "see 'Damaged data' in docs/troubleshooting.md: what is not listed restores"
    };
    Err(Error::new(Kind::Corrupt, "the repository is damaged").hint(hint))
}

fn part(text: &str) -> Result<Depth> {
    let numbers = text.split_once('/').and_then(|(n, m)| Some((n.parse().ok()?, m.parse().ok()?)));
    match numbers {
        Some((number, of)) if 1 <= number && number <= of => Ok(Depth::Part { number, of }),
        _ => Err(Error::new(Kind::Usage, format!("'{text}' is not a part of the data"))
            .hint("give it as 1/7, 2/7, and so on")),
    }
}

fn describe(report: &CheckReport) -> String {
    let mut out = format!("{} points, {} packs", report.points, report.packs);
    if report.blobs_read > 0 {
        let _ = write!(out, ", {} read", ByteSize(report.bytes_read));
    }
    out.push('\n');
    if report.entries_rebuilt > 0 {
        let _ = writeln!(out, "{} entries put back into the index", report.entries_rebuilt);
    }
    if report.packs_unindexed > 0 {
        let packs = report.packs_unindexed;
        let _ = writeln!(
            out,
            "{packs} packs are not in the index: harmless unless the index is damaged"
        );
    }
    if report.is_fine() {
        out.push_str("no damage found\n");
        return out;
    }
    describe_objects(&mut out, "damaged", &report.damages);
    describe_objects(&mut out, "not readable now, an error of the storage", &report.unreadable);
    describe_affected(&mut out, report);
    if report.unlisted > 0 {
        let _ = writeln!(out, "{} further findings are not listed", report.unlisted);
    }
    out
}

fn describe_objects(out: &mut String, head: &str, objects: &[Damage]) {
    if objects.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{head}:");
    for object in objects.iter().take(LINES_MAX) {
        let _ = writeln!(out, "  {}: {}", object.object, object.what);
    }
    more(out, objects.len());
}

fn describe_affected(out: &mut String, report: &CheckReport) {
    out.push_str("\ndoes not restore:\n");
    for point in &report.unreadable_points {
        let _ = writeln!(out, "  point {point}: its manifest is damaged");
    }
    let names = Names::among(report.affected.iter().map(|disk| (&*disk.vm, disk.vm_uuid)));
    let mut table = Table::new(&["point", "vm", "disk", ">offset", ">bytes"]);
    let mut ranges = 0;
    for disk in &report.affected {
        for range in &disk.ranges {
            ranges += 1;
            if ranges <= LINES_MAX {
                let (offset, bytes) = (range.offset.to_string(), range.bytes.to_string());
                let (vm, name) = (names.of(&disk.vm, disk.vm_uuid), disk.disk.clone());
                table.row([disk.point.short(), vm, name, offset, bytes]);
            }
        }
    }
    if ranges > 0 {
        out.push_str(&table.render());
        more(out, ranges);
    } else if report.unreadable_points.is_empty() {
        out.push_str("  nothing: no point needs what is damaged\n");
    }
}

fn more(out: &mut String, lines: usize) {
    if lines > LINES_MAX {
        let _ = writeln!(out, "  and {} more; --json lists them", lines - LINES_MAX);
    }
}
