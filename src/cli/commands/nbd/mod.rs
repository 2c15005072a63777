//! `vmbackup nbd …`: looking at NBD exports.

pub(crate) mod info;
pub(crate) mod list;
pub(crate) mod map;
pub(crate) mod read;

use clap::Subcommand;

use crate::cli::context::Context;
use crate::error::Result;

/// Look at NBD exports: what they are, what they hold
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
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    match args.command {
        Command::Info(args) => info::run(args, context).await,
        Command::List(args) => list::run(args, context).await,
        Command::Map(args) => map::run(args, context).await,
        Command::Read(args) => read::run(args, context).await,
    }
}
