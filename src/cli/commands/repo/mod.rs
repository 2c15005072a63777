//! `vmbackup repo …`: making repositories and managing what opens them.

pub(crate) mod info;
pub(crate) mod init;
pub(crate) mod key;

use clap::Subcommand;

use crate::cli::context::Context;
use crate::error::Result;

/// Make a repository, show what it is, manage its keys
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Args),
    Info(info::Args),
    Key(key::Args),
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    match args.command {
        Command::Init(args) => init::run(args, context).await,
        Command::Info(args) => info::run(args, context).await,
        Command::Key(args) => key::run(args, context).await,
    }
}
