//! `vmbackup forget`: lets points go, by name or by rule.

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::names::Names;
use crate::cli::table::Table;
use crate::cli::text;
use crate::error::Result;
use crate::job::KeepRules;
use crate::job::forget::{self, Report, Request};

/// Forget points, by name or by keep rules; gc frees their space
///
/// Rules work on each VM for itself and keep the newest point of each of the N newest periods
/// that have one. The newest point of a VM is always kept.
#[derive(clap::Args, Debug)]
#[group(id = "what", required = true, multiple = true, args = [
    "points", "keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly",
])]
pub(crate) struct Args {
    /// Points to forget: digits of the id, VM@latest, or VM@TIME
    #[arg(value_name = "POINT")]
    points: Vec<String>,
    /// Keep the newest N points
    #[arg(long, value_name = "N", conflicts_with = "points")]
    keep_last: Option<u32>,
    /// Keep the newest point of N hours
    #[arg(long, value_name = "N", conflicts_with = "points")]
    keep_hourly: Option<u32>,
    /// Keep the newest point of N days
    #[arg(long, value_name = "N", conflicts_with = "points")]
    keep_daily: Option<u32>,
    /// Keep the newest point of N weeks
    #[arg(long, value_name = "N", conflicts_with = "points")]
    keep_weekly: Option<u32>,
    /// Keep the newest point of N months
    #[arg(long, value_name = "N", conflicts_with = "points")]
    keep_monthly: Option<u32>,
    /// Keep the newest point of N years
    #[arg(long, value_name = "N", conflicts_with = "points")]
    keep_yearly: Option<u32>,
    /// Apply the rules to this VM only
    #[arg(long, value_name = "NAME|UUID", conflicts_with = "points")]
    domain: Option<String>,
    /// Only show what would be forgotten
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let what = if args.points.is_empty() {
        forget::What::Rules {
            vm: args.domain,
            rules: KeepRules {
                last: args.keep_last.unwrap_or(0),
                hourly: args.keep_hourly.unwrap_or(0),
                daily: args.keep_daily.unwrap_or(0),
                weekly: args.keep_weekly.unwrap_or(0),
                monthly: args.keep_monthly.unwrap_or(0),
                yearly: args.keep_yearly.unwrap_or(0),
            },
        }
    } else {
        forget::What::Points(args.points)
    };
    let effect = if args.dry_run { forget::Effect::DryRun } else { forget::Effect::Forget };
    let repository = context.open(&args.repository).await?;
    let job = forget::run(&repository, Request { what, effect }, (&context.env, &context.control));
    let report = context.watch(job).await?;
    context.output.document("forget", &report, |report| describe(report, context))
}

fn describe(report: &Report, context: &Context) -> String {
    let names = Names::among(report.points.iter().map(|point| (&*point.vm, point.vm_uuid)));
    let mut table = Table::new(&["point", "VM", "time", "verdict", "why"]);
    for point in &report.points {
        table.row([
            point.id.short(),
            names.of(&point.vm, point.vm_uuid),
            text::time(point.time, &context.env.zone),
            if point.forgotten { "forget" } else { "keep" }.to_owned(),
            point.reasons.join(", "),
        ]);
    }
    let forgotten = report.points.iter().filter(|point| point.forgotten).count();
    let done = if report.dry_run { "would be forgotten" } else { "forgotten" };
    format!("{}{} {done}\n", table.render(), text::count(forgotten, "point"))
}
