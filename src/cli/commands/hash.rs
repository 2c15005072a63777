//! `vmbackup hash`: the content root of a disk.

use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::Result;
use crate::job::hash;

/// Print the content root of the disk inside an image, or of an NBD export
///
/// Two disks with the same root have the same size and content, whatever their formats; `show`
/// prints the roots of a point's disks. A raw file is hashed as the disk a guest sees, in whole sectors
/// of 512 bytes.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The image (a format is never guessed from content), or an NBD URI
    #[arg(value_name = "FILE[,format=F]|NBD-URI")]
    disk: String,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let disk = settings::disk(&args.disk)?;
    let report = context.watch(hash::run(&disk, (&context.env, &context.control))).await?;
    context.output.document("hash", &report, |report| format!("{}\n", report.content_root))
}
