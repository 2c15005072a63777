//! `vmbackup list`: the points of a repository.

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::table::Table;
use crate::cli::text;
use crate::error::Result;
use crate::job::list::{self, List};
use crate::units::ByteSize;

/// List the points of a repository, oldest first
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
    let list = context.watch(list::run(&repository, args.domain.as_deref())).await?;
    context.output.document("list", &list, |list| describe(list, context))
}

fn describe(list: &List, context: &Context) -> String {
    let heads = ["point", "VM", "time", "kind", ">disks", ">size", ">read", ">stored"];
    let mut table = Table::new(&heads);
    for point in &list.points {
        table.row([
            point.id.short(),
            point.vm.name.clone(),
            text::time(point.time, &context.env.zone),
            point.kind.to_string(),
            point.disks.to_string(),
            ByteSize(point.size_bytes).to_string(),
            ByteSize(point.read_bytes).to_string(),
            ByteSize(point.stored_bytes).to_string(),
        ]);
    }
    if table.is_empty() { "no points\n".to_owned() } else { table.render() }
}
