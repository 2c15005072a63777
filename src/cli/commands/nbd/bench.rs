//! `vmbackup nbd bench URI`: how fast an export answers.

use std::time::Duration;

use crate::cli::context::Context;
use crate::cli::settings;
use crate::cli::table::Table;
use crate::error::Result;
use crate::job::export::bench::{self, Direction, Latency, Order, Report, Request};
use crate::units::ByteSize;

/// Measure throughput and latency of an export
///
/// So many requests of one size are in flight all the time; each is sent as soon as another is
/// answered.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The export
    #[arg(value_name = "NBD-URI")]
    uri: String,
    /// Bytes of a request
    #[arg(long, value_name = "SIZE", default_value = "256k")]
    request_size: ByteSize,
    /// Requests in flight on each connection
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    requests: u16,
    /// Connections, where the server allows several
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    connections: u16,
    /// For how long
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    time: u32,
    /// Ask anywhere, not from the start to the end
    #[arg(long)]
    random: bool,
    /// Write instead of read: what the export holds is lost
    #[arg(long)]
    overwrite: bool,
    /// Write, too, where so many requests of a hundred are reads: what the export holds is lost
    #[arg(long, value_name = "PERCENT", conflicts_with = "overwrite", value_parser = clap::value_parser!(u8).range(..=100))]
    mix_reads: Option<u8>,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let request = Request {
        uri: settings::nbd_uri(&args.uri)?,
        direction: match args.mix_reads {
            Some(reads_percent) => Direction::Mixed { reads_percent },
            None if args.overwrite => Direction::Overwrite,
            None => Direction::Read,
        },
        order: if args.random { Order::Random } else { Order::Sequential },
        request_bytes: args.request_size.0,
        requests: args.requests,
        connections: args.connections.into(),
        duration: Duration::from_secs(args.time.into()),
    };
    let report = bench::run(&request, &context.control).await?;
    context.output.document("nbd-bench", &report, describe)
}

fn describe(report: &Report) -> String {
    let mut table = Table::new(&[">requests/s", ">per second", ">in flight", ">connections"]);
    table.row([
        report.requests_per_second.to_string(),
        ByteSize(report.bytes_per_second).to_string(),
        report.in_flight.to_string(),
        report.connections.to_string(),
    ]);
    let columns = ["", ">min", ">mean", ">50 %", ">90 %", ">99 %", ">99.9 %", ">max"];
    let mut latency = Table::new(&columns);
    let mut row = |name: &str, times: &Latency| {
        let all = [times.min, times.mean, times.p50, times.p90, times.p99, times.p999, times.max];
        let all = all.map(|us| format!("{}.{:03} ms", us / 1000, us % 1000));
        latency.row(std::iter::once(name.to_owned()).chain(all));
    };
    match (&report.read_latency_us, &report.write_latency_us) {
        (Some(reads), Some(writes)) => {
            row("all", &report.latency_us);
            row(&format!("{} reads", report.reads), reads);
            row(&format!("{} writes", report.writes), writes);
        }
        (None, Some(writes)) => row("writes", writes),
        (reads, None) => row("reads", reads.as_ref().unwrap_or(&report.latency_us)),
    }
    format!("{}\n{}", table.render(), latency.render())
}
