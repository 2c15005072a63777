//! `vmbackup repo init`: a new repository.

use std::path::PathBuf;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::{self, Context, Purpose};
use crate::cli::{prompt, settings};
use crate::error::{Error, Kind, Result};
use crate::job::Credentials;
use crate::job::keys::{self, Info};

/// Make a repository
///
/// A password is asked for on a terminal unless one of the options says otherwise. A repository
/// without a key is sealed with a key that lies beside it in the clear: anyone who can read the
/// directory can read the backups. A key can be added later without rewriting any data.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Where [default: /var/lib/vmbackup/repo for root, else the XDG data directory]
    #[arg(long, env = "VMBACKUP_REPO", value_name = "DIR")]
    repo: Option<String>,
    /// File that holds the password [env: VMBACKUP_PASSWORD_FILE=]
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// File that holds the key
    #[arg(long, value_name = "FILE", conflicts_with = "password_file")]
    key_file: Option<PathBuf>,
    /// Anyone who can read the directory may read the backups
    #[arg(long, conflicts_with = "key_file")]
    no_key: bool,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let source = settings::repository_key(args.password_file.as_ref(), args.key_file.as_ref());
    let choice = RepositoryArgs { repo: args.repo, password_file: None, key_file: None };
    let location = settings::repository(&choice, &context.paths)?.path().to_owned();
    // `--no-key` also wins over a password file that the environment names.
    let credentials = if args.no_key {
        Credentials::None
    } else if let Some(given) = context::secret(&source, Purpose::Opens, &context.control).await? {
        given
    } else {
        let what = location.display().to_string();
        let password = prompt::ask_new(&what, &context.control).await?;
        Credentials::Password(password.ok_or_else(no_terminal)?)
    };
    keys::init(&location, &credentials, &context.env).await?;
    let info = keys::info(&location, &credentials, &context.env).await?;
    context.output.document("repo-init", &info, describe)
}

fn describe(info: &Info) -> String {
    let key = if info.has_key { "" } else { ", without a key" };
    format!("made repository {} at {}{key}\n", info.id, info.location.display())
}

/// There is nobody to ask for a password.
pub(super) fn no_terminal() -> Error {
    Error::new(Kind::Usage, "no password is given and there is no terminal to ask on")
        .hint("give --password-file, --key-file or, for a new repository, --no-key")
}
