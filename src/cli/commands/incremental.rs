//! `vmbackup incremental`: only what changed, or a refusal.

use crate::cli::context::Context;
use crate::cli::vm_args::BackupArgs;
use crate::error::Result;
use crate::job::BackupMode;

/// Back up what changed since the last point; fails when there is nothing to build on
///
/// Each disk that cannot be read incrementally is read in full, with the reason recorded; when
/// that is every disk, the command fails and says why.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    backup: BackupArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    super::backup::run_as(BackupMode::Incremental, args.backup, context).await
}
