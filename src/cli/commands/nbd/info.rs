//! `vmbackup nbd info URI`: everything a server says of an export.

use std::fmt::Write;

use crate::cli::context::Context;
use crate::cli::settings;
use crate::error::Result;
use crate::job::export::info::{self, Report, Scope};
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
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let scope = if args.all { Scope::All } else { Scope::One };
    let report = info::run(&settings::nbd_uri(&args.uri)?, scope, &context.control).await?;
    context.output.document("nbd-info", &report, describe)
}

fn describe(report: &Report) -> String {
    let mut out = format!("headers      {}\n", report.headers);
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
        for (index, name) in export.contexts.iter().enumerate() {
            let head = if index == 0 { "contexts   " } else { "           " };
            let _ = writeln!(out, "{head}  {name}");
        }
    }
    out
}
