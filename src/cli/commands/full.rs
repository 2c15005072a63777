//! `vmbackup full`: every disk read in full.

use crate::cli::context::Context;
use crate::cli::vm_args::BackupArgs;
use crate::error::Result;
use crate::job::BackupMode;

/// Back up a VM, reading every disk in full
///
/// What the repository holds already is not stored again. The next incremental builds on it.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    backup: BackupArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    super::backup::run_as(BackupMode::Full, args.backup, context).await
}
