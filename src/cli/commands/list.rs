//! `vmbackup list`: the points of a repository.

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::names::Names;
use crate::cli::stream::Stream;
use crate::cli::table::Columns;
use crate::cli::text;
use crate::error::Result;
use crate::job::list::{self, Line, List};
use crate::units::ByteSize;

/// List the points of a repository by VM, oldest first
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Only points of this VM (name, UUID, or the first eight digits of it)
    #[arg(long, value_name = "NAME|UUID")]
    domain: Option<String>,
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let repository = context.open(&args.repository).await?;
    let work = async {
        let list = list::run(&repository, args.domain.as_deref()).await?;
        if context.output.json { document(list).await } else { lines(list, context).await }
    };
    context.watch(work).await
}

/// A million points never are in memory at once.
async fn document(mut list: List) -> Result<()> {
    let mut out = Stream::new();
    out.begin("list", "points");
    while let Some(points) = list.next().await? {
        for point in &points {
            out.item(point)?;
        }
        if !out.is_wanted() {
            return Ok(());
        }
    }
    out.end()
}

/// The same for a person: once to see how wide the columns are, once to print them.
async fn lines(mut list: List, context: &Context) -> Result<()> {
    let heads =
        ["point", "VM", "time", "kind", ">disks", ">size", ">read", ">stored", "read in full"];
    let mut columns = Columns::new(&heads);
    let mut is_empty = true;
    let mut names = Names::default();
    while let Some(points) = list.next().await? {
        is_empty &= points.is_empty();
        for point in &points {
            names.add(&point.vm.name, point.vm.uuid);
            columns.measure(&row(point, point.vm.name.clone(), context));
        }
    }
    for name in names.told_apart() {
        let mut row: Row = Default::default();
        row[1] = name;
        columns.measure(&row);
    }
    let mut out = Stream::new();
    let head = if is_empty { "no points\n".to_owned() } else { columns.head() };
    out.text(&head)?;
    list.rewind();
    while let Some(points) = list.next().await? {
        for point in &points {
            out.text(&columns.line(&row(point, names.of(&point.vm.name, point.vm.uuid), context)))?;
        }
        if !out.is_wanted() {
            return Ok(());
        }
    }
    out.flush()
}

type Row = [String; 9];

fn row(point: &Line, vm: String, context: &Context) -> Row {
    let reasons: Vec<_> = point.reasons.iter().map(|reason| reason.describe()).collect();
    [
        point.id.short(),
        vm,
        text::time(point.time, &context.env.zone),
        point.kind.to_string(),
        point.disks.to_string(),
        ByteSize(point.size_bytes).to_string(),
        ByteSize(point.read_bytes).to_string(),
        ByteSize(point.stored_bytes).to_string(),
        reasons.join("; "),
    ]
}
