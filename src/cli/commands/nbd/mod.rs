//! `vmbackup nbd …`: NBD exports by hand.

pub(crate) mod bench;
pub(crate) mod flush;
pub(crate) mod info;
pub(crate) mod list;
pub(crate) mod map;
pub(crate) mod read;
pub(crate) mod trim;
pub(crate) mod write;
pub(crate) mod zero;

use clap::Subcommand;

use crate::block::ByteRange;
use crate::cli::context::Context;
use crate::error::Result;
use crate::job::export::write::{Report, checked};
use crate::nbd::Durable;
use crate::units::ByteSize;

/// Look at NBD exports, measure them, change some bytes
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Info(info::Args),
    List(list::Args),
    Map(map::Args),
    Read(read::Args),
    Write(write::Args),
    Zero(zero::Args),
    Trim(trim::Args),
    Flush(flush::Args),
    Bench(bench::Args),
}

/// A place in an export.
#[derive(clap::Args, Debug)]
pub(crate) struct PlaceArgs {
    /// The export
    #[arg(value_name = "NBD-URI")]
    uri: String,
    /// Where to begin
    #[arg(long, value_name = "SIZE", default_value = "0")]
    offset: ByteSize,
}

/// A range of an export.
#[derive(clap::Args, Debug)]
pub(crate) struct RangeArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// How many bytes
    #[arg(long, value_name = "SIZE")]
    length: ByteSize,
}

impl RangeArgs {
    fn checked(&self) -> Result<ByteRange> {
        checked(self.place.offset.0, self.length.0)
    }
}

/// Whether a change is to be durable.
#[derive(clap::Args, Debug)]
pub(crate) struct FuaArgs {
    /// Return when it is durable (FUA, or a flush)
    #[arg(long)]
    fua: bool,
}

impl FuaArgs {
    fn durable(&self) -> Durable {
        if self.fua { Durable::Yes } else { Durable::Later }
    }
}

/// What was done, for people.
fn changed(done: &str, report: &Report) -> String {
    let durable = if report.durable { ", durable" } else { "" };
    format!("{done} {} at {}{durable}\n", ByteSize(report.bytes), report.offset)
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    match args.command {
        Command::Info(args) => info::run(args, context).await,
        Command::List(args) => list::run(args, context).await,
        Command::Map(args) => map::run(args, context).await,
        Command::Read(args) => read::run(args, context).await,
        Command::Write(args) => write::run(args, context).await,
        Command::Zero(args) => zero::run(args, context).await,
        Command::Trim(args) => trim::run(args, context).await,
        Command::Flush(args) => flush::run(args, context).await,
        Command::Bench(args) => bench::run(args, context).await,
    }
}
