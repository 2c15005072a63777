//! `vmbackup copy SRC DST`: any disk to any place.

use std::fmt::Write as _;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::copy_settings::{self, SourceEnd};
use crate::cli::text::duration_ms;
use crate::error::Result;
use crate::job::copy::{self, Report, Request, Source};
use crate::units::ByteSize;

/// Copy any disk to any place, sparse, as fast as both ends allow
///
/// SRC and DST are each one of
///
///   FORMAT:FILE, FILE,format=F    an image, or FILE alone with a known extension (.raw, .qcow2, …)
///   /dev/NAME                     a block device
///   nbd[s]://…, nbd[s]+unix://…   an NBD export (s: in TLS)
///   '[ nbdkit curl URL ]'         an NBD server started and ended by vmbackup
///   '-'                           a pipe
///   point:web1@latest/vda         a disk of a restore point (SRC only)
///   null:                         nowhere (DST only)
///
/// A format is never guessed from content. A new file has a temporary name until it is complete and
/// durable; an existing one stays unless --force or --in-place is given. A device, an export and a
/// file written in place may be longer than the source: what is behind its end stays as it was.
/// A raw file of any size keeps it; other formats have whole sectors of 512 bytes, and the exports of
/// some servers whole blocks, the last filled with zeroes. The copy of an image that is changed
/// meanwhile fails. An option that would change nothing for this SRC and DST is refused.
#[derive(clap::Args, Debug)]
#[expect(rustdoc::broken_intra_doc_links, reason = "a help text: [s] is no link")]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Where the bytes come from
    #[arg(value_name = "SRC", allow_hyphen_values = true)]
    pub(crate) source: String,
    /// Where they go
    #[arg(value_name = "DST", allow_hyphen_values = true)]
    pub(crate) target: String,
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
    #[command(flatten)]
    pub(crate) zeroes: ZeroArgs,
    #[command(flatten)]
    pub(crate) speed: SpeedArgs,
    #[command(flatten)]
    pub(crate) repository: RepositoryArgs,
}

/// What becomes of the target.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Target")]
pub(crate) struct PlaceArgs {
    /// Replace an existing file, once the new one is complete; links are followed, owner and rights
    /// stay (not where others make files, as in /tmp)
    #[arg(long, conflicts_with = "in_place")]
    pub(crate) force: bool,
    /// Write over an existing file where it lies. What else shows the same bytes changes with it:
    /// a device or server of that file, an image that has it as its backing file
    #[arg(long)]
    pub(crate) in_place: bool,
    /// Size of a new target [default: that of the source]
    #[arg(long, value_name = "SIZE")]
    pub(crate) target_size: Option<String>,
    /// Compress a new qcow2 image
    #[arg(long, conflicts_with = "allocated")]
    pub(crate) compressed: bool,
    #[command(flatten)]
    pub(crate) end: EndArgs,
}

/// How the copy ends.
#[derive(clap::Args, Debug)]
pub(crate) struct EndArgs {
    /// Read the target back and compare content roots (the source is read once all the same)
    #[arg(long)]
    pub(crate) verify: bool,
    /// Fail if the target cannot be made durable [default: make it durable if it can be]
    #[arg(long, conflicts_with = "no_flush")]
    pub(crate) flush: bool,
    /// Leave it to the system when the target becomes durable
    #[arg(long)]
    pub(crate) no_flush: bool,
}

/// What becomes of zeroes.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Zeroes")]
pub(crate) struct ZeroArgs {
    /// Shortest run of zeroes in data that is not written as data, up to the size of a request; 0:
    /// none is looked for [default: 4k]
    #[arg(long, value_name = "SIZE", conflicts_with = "allocated")]
    pub(crate) sparse: Option<String>,
    /// Allocate space for zeroes, too
    #[arg(long)]
    pub(crate) allocated: bool,
    /// The target reads as zeroes now: leave zeroes out (a new file does, and needs no such word)
    #[arg(long, alias = "target-is-zero", conflicts_with = "allocated")]
    pub(crate) destination_is_zero: bool,
}

/// How much at once.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Speed")]
pub(crate) struct SpeedArgs {
    /// Connections to an NBD server that allows several [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) connections: Option<u16>,
    /// Requests in flight on each connection [default: what the ends make use of]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) requests: Option<u16>,
    /// Bytes of one request, a power of two up to 32M [default: 1M, 256k between files, or what
    /// --sparse takes]
    #[arg(long, value_name = "SIZE")]
    pub(crate) request_size: Option<String>,
    /// Bytes in flight [default: 64M]
    #[arg(long, value_name = "SIZE")]
    pub(crate) queue_size: Option<String>,
    /// One request at a time
    #[arg(long, conflicts_with_all = ["connections", "requests"])]
    pub(crate) synchronous: bool,
    /// Bytes a second at most
    #[arg(long, value_name = "SIZE")]
    pub(crate) rate_limit: Option<String>,
    #[command(flatten)]
    pub(crate) retry: RetryArgs,
}

/// What becomes of a lost connection.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Lost connections")]
pub(crate) struct RetryArgs {
    /// Open an NBD URI again so often for a request that fails with its connection. SRC must not
    /// change meanwhile; what DST had not made durable is written again, for which up to 64 MiB of
    /// it are kept and DST is flushed whenever that is full
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=100))]
    pub(crate) retries: u32,
    /// Wait before the first time; each further wait is twice as long, up to a minute
    #[arg(long, value_name = "SECONDS", default_value_t = 2, requires = "retries", value_parser = clap::value_parser!(u32).range(..=60))]
    pub(crate) retry_delay: u32,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let (source, target) = (copy_settings::source(&args.source)?, copy_settings::target(&args)?);
    let to_pipe = matches!(target, copy::Target::Pipe(_));
    copy_settings::refuse_without_effect(&args, &source, &target)?;
    let options = copy_settings::options(&args)?;
    copy_settings::refuse_mixed_output(to_pipe, context.output.json)?;
    let source = match source {
        SourceEnd::Ready(source) => source,
        SourceEnd::Point { point, disk } => {
            let repository = std::sync::Arc::new(context.open(&args.repository).await?);
            Source::Point { repository, point, disk }
        }
    };
    let (source_name, target_name) = (args.source, args.target);
    let request = Request { source, source_name, target, target_name, options };
    let job = copy::run(request, (&context.env, &context.control));
    let report = context.watch(Box::pin(job)).await?;
    // Standard output is the target's.
    if to_pipe { Ok(()) } else { context.output.document("copy", &report, describe) }
}

fn describe(report: &Report) -> String {
    let Report { size_bytes, written_bytes, zero_bytes, .. } = *report;
    let size = |bytes| ByteSize(bytes).to_string();
    let mut text = format!(
        "copied {} of {} to {}: {} written, {} zero, in {}",
        size(size_bytes),
        report.source,
        report.target,
        size(written_bytes),
        size(zero_bytes),
        duration_ms(report.elapsed_ms)
    );
    if let Some(root) = report.content_root {
        let _ = write!(text, "\nboth have the content root {root}");
    }
    text.push('\n');
    text
}
