//! `vmbackup nbd map URI`: which ranges of an export hold data, are zero, or changed.

use std::fmt::Write;

use crate::cli::context::Context;
use crate::cli::settings;
use crate::cli::table::Table;
use crate::error::Result;
use crate::job::export::map::{self, Detail, Report, Request};
use crate::units::ByteSize;

/// Show which ranges of an export hold data, are zero, or changed
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The export
    #[arg(value_name = "NBD-URI")]
    uri: String,
    /// Only this meta context; may be given more than once [default: all the export has]
    #[arg(long, value_name = "NAME")]
    context: Vec<String>,
    /// Only the totals
    #[arg(long)]
    totals: bool,
    /// Only the extent that is found there, from there on
    #[arg(long, value_name = "SIZE", conflicts_with = "totals")]
    offset: Option<ByteSize>,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let detail = match args.offset {
        Some(offset) => Detail::At(offset.0),
        None if args.totals => Detail::Totals,
        None => Detail::Extents,
    };
    let request = Request { uri: settings::nbd_uri(&args.uri)?, contexts: args.context, detail };
    let report = map::run(&request, &context.control).await?;
    context.output.document("nbd-map", &report, describe)
}

fn describe(report: &Report) -> String {
    let mut out = String::new();
    for (index, context) in report.contexts.iter().enumerate() {
        let _ = writeln!(out, "{}{}", if index > 0 { "\n" } else { "" }, context.name);
        if !context.extents.is_empty() {
            let mut table = Table::new(&[">offset", ">bytes", "state"]);
            for extent in &context.extents {
                let (offset, bytes) = (extent.offset.to_string(), extent.bytes.to_string());
                table.row([offset, bytes, extent.state.clone()]);
            }
            let _ = writeln!(out, "{}", table.render());
        }
        let mut table = Table::new(&["state", ">bytes", ">size", ">share"]);
        for total in &context.totals {
            // In tenths of a percent, exact at any size.
            let share = u128::from(total.bytes) * 1000 / u128::from(report.size_bytes.max(1));
            table.row([
                total.state.clone(),
                total.bytes.to_string(),
                ByteSize(total.bytes).to_string(),
                format!("{}.{} %", share / 10, share % 10),
            ]);
        }
        out.push_str(&table.render());
    }
    out
}
