//! `vmbackup repo key …`: what opens a repository.

use std::path::Path;

use clap::Subcommand;

use super::init::no_terminal;
use crate::cli::args::{NewKeyArgs, RepositoryArgs};
use crate::cli::context::{self, Context, Purpose};
use crate::cli::{prompt, settings};
use crate::error::Result;
use crate::job::{Credentials, keys};

/// Add and remove what opens a repository; no data is rewritten
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Add a password or a key; those that are there stay. To change a password, add the new one
    /// and remove the old one
    Add(AddArgs),
    /// Remove a password or a key, by its id as `repo info` shows it. Whoever kept a copy of the
    /// repository from before still opens that copy with it
    Remove(RemoveArgs),
}

#[derive(clap::Args, Debug)]
struct AddArgs {
    #[command(flatten)]
    new: NewKeyArgs,
    #[command(flatten)]
    repository: RepositoryArgs,
}

#[derive(clap::Args, Debug)]
struct RemoveArgs {
    /// Id of the key
    #[arg(value_name = "KEY")]
    key: String,
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    match args.command {
        Command::Add(args) => add(args, context).await,
        Command::Remove(args) => remove(args, context).await,
    }
}

async fn add(args: AddArgs, context: &Context) -> Result<()> {
    let new = &args.new;
    let source = settings::key_source(new.new_password_file.as_ref(), new.new_key_file.as_ref());
    // Opened first: nobody should think of a password for a repository that does not open, nor be
    // asked for the old one a second time.
    let (location, given) = context
        .unlock(&args.repository, async |location, given| {
            keys::info(location, given, &context.env).await?;
            Ok((location.to_owned(), given.clone()))
        })
        .await?;
    let new =
        if let Some(given) = context::secret(&source, Purpose::Added, &context.control).await? {
            given
        } else {
            let password = prompt::ask_new("the repository", &context.control).await?;
            Credentials::Password(password.ok_or_else(no_terminal)?)
        };
    let surroundings = (&context.env, &context.control);
    let key = context.watch(keys::add(&location, &given, &new, surroundings)).await?;
    context.output.document("repo-key-add", &key, |key| format!("added key {}\n", key.id))
}

async fn remove(args: RemoveArgs, context: &Context) -> Result<()> {
    let remove = async |location: &Path, given: &Credentials| {
        keys::remove(location, given, &args.key, (&context.env, &context.control)).await
    };
    let key = context.watch(context.unlock(&args.repository, remove)).await?;
    context.output.document("repo-key-remove", &key, |key| format!("removed key {}\n", key.id))
}
