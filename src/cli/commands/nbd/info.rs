//! `vmbackup nbd info URI`: everything a server says of an export.

use std::fmt::Write;

use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::Result;
use crate::job::export::info::{self, Content, Report, Scope};
use crate::units::ByteSize;

/// Show everything a server says of an export, or of all
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The export
    #[arg(value_name = "NBD-URI")]
    uri: String,
    /// Every export the server lists
    #[arg(long)]
    all: bool,
    /// Read the first 72 KiB of each export and say what they look like. Nothing else ever looks
    /// into a disk to find out what it is
    #[arg(long)]
    content: bool,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let scope = if args.all { Scope::All } else { Scope::One };
    let look = if args.content { Content::Head } else { Content::Unread };
    let uri = settings::nbd_uri(&args.uri)?;
    let report = info::run(&uri, scope, look, &context.control).await?;
    context.output.document("nbd-info", &report, describe)?;
    report.check()
}

fn describe(report: &Report) -> String {
    let handshake = report.handshake.replace('-', " ");
    let mut out = format!("handshake    {handshake}\nheaders      {}\n", report.headers);
    let tls = report.tls.as_ref().map_or("none".to_owned(), |tls| {
        let peer =
            tls.peer.as_ref().map_or("a key".to_owned(), |peer| format!("certificate {peer}"));
        format!("{} {}, {peer}", tls.version, tls.cipher)
    });
    let _ = writeln!(out, "TLS          {tls}");
    for export in &report.exports {
        let _ = writeln!(out, "\nexport       '{}'", export.name);
        if let Some(name) = &export.canonical_name {
            let _ = writeln!(out, "also called  '{name}'");
        }
        if let Some(description) = &export.description {
            let _ = writeln!(out, "description  {description}");
        }
        let size = export.size_bytes;
        let _ = writeln!(out, "size         {} ({size} bytes)", ByteSize(size));
        let _ = writeln!(
            out,
            "blocks       smallest {}, best {}, requests up to {}",
            ByteSize(export.block_bytes_min),
            ByteSize(export.block_bytes_preferred),
            ByteSize(export.payload_bytes_max)
        );
        let _ = writeln!(out, "flags        {}", export.flags.join(" "));
        if let Some(content) = export.content {
            let _ = writeln!(out, "content      {content}");
        }
        for (index, name) in export.contexts.iter().enumerate() {
            let head = if index == 0 { "contexts   " } else { "           " };
            let _ = writeln!(out, "{head}  {name}");
        }
    }
    for failed in &report.failed {
        let _ = writeln!(out, "\nexport       '{}'", failed.name);
        if let Some(description) = &failed.description {
            let _ = writeln!(out, "description  {description}");
        }
        let _ = writeln!(out, "error        {}", failed.error);
    }
    out
}
