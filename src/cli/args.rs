//! Arguments several commands share, as they were typed.
//!
//! These structs are what clap fills: strings and paths, nothing checked beyond syntax.
//! [`super::settings`] turns them into the types of the job layer; nothing below sees them.
//! Secrets are never arguments, only the files that hold them.

use std::path::PathBuf;

use clap::Args;

/// What every command takes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Common options")]
pub(crate) struct CommonArgs {
    /// Print one JSON document on stdout; progress and errors are JSON lines on stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Say more on stderr (-v info, -vv debug, -vvv trace); VMBACKUP_LOG takes a filter
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Say nothing on stderr but warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Show no progress
    #[arg(long, global = true)]
    pub(crate) no_progress: bool,
}

/// Which repository, and what opens it.
#[derive(Args, Debug)]
#[command(next_help_heading = "Repository")]
pub(crate) struct RepositoryArgs {
    /// The repository [default: /var/lib/vmbackup/repo for root, else the XDG data directory]
    #[arg(long, env = "VMBACKUP_REPO", value_name = "DIR")]
    pub(crate) repo: Option<String>,
    // Not the parser's `env`: an option that conflicts with it has to win over the environment.
    /// File that holds the password (asked for on a terminal otherwise) [env:
    /// VMBACKUP_PASSWORD_FILE=]
    #[arg(long, value_name = "FILE")]
    pub(crate) password_file: Option<PathBuf>,
    /// File that holds a key
    #[arg(long, value_name = "FILE", conflicts_with = "password_file")]
    pub(crate) key_file: Option<PathBuf>,
}

/// What is to open a repository from now on: exactly one way, or a question on the terminal.
#[derive(Args, Debug)]
#[command(next_help_heading = "New key")]
pub(crate) struct NewKeyArgs {
    /// File that holds the new password (asked for on a terminal otherwise)
    #[arg(long, value_name = "FILE")]
    pub(crate) new_password_file: Option<PathBuf>,
    /// File that holds the new key
    #[arg(long, value_name = "FILE", conflicts_with = "new_password_file")]
    pub(crate) new_key_file: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use crate::cli::Cli;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
