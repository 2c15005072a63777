//! The command line: what the user types in, what the user sees out.
//!
//! ```text
//!  argv ─► clap ─► args (strings) ─► settings (types) ─► commands::* ─► job::* ─► output / exit code
//!                                                        progress ◄── Control ──┘
//! ```
//!
//! One command is one file in `commands/`: its arguments and a `run` that resolves them, calls one
//! job and prints one document. stdout carries data, stderr talk; `--json` gives the same facts as
//! one JSON document. Everything that touches the process (environment, terminal, signals, exit
//! code) is in this folder and nowhere below.

mod activation;
mod args;
mod commands;
mod context;
mod copy_settings;
mod exit;
mod leave;
mod names;
mod open;
mod output;
mod progress;
mod prompt;
mod settings;
mod stop;
mod stream;
mod table;
mod text;
mod tls_settings;
mod vm_args;
mod vm_settings;

/// Ways in for the fuzz targets.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing {
    /// Takes a command line of `vmbackup copy` apart; how that ended.
    pub fn copy(line: &[String]) -> String {
        super::copy_settings::entry::ended(line)
    }
}

use std::ffi::OsString;
use std::io::IsTerminal;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Kind, Result};
use crate::workers::Workers;
use args::CommonArgs;
use context::Context;
use output::Output;

pub use leave::leave;

/// Backs up and restores virtual machines of libvirt and plain QEMU
///
/// A point is a complete picture of a VM at one instant; incrementals read and store only what
/// changed, and any point can be deleted without touching another. Points are named by the first
/// digits of their id, VM@latest, or VM@2026-11-20T22:00 (the newest not later).
#[derive(Debug, Parser)]
#[command(name = "vmbackup", version, max_term_width = 100)]
#[command(after_long_help = exit::HELP, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
enum Command {
    Full(commands::full::Args),
    Incremental(commands::incremental::Args),
    Backup(commands::backup::Args),
    Plan(commands::plan::Args),
    List(commands::list::Args),
    Show(commands::show::Args),
    Restore(commands::restore::Args),
    Verify(commands::verify::Args),
    Serve(commands::serve::Args),
    Hash(commands::hash::Args),
    Copy(commands::copy::Args),
    Check(commands::check::Args),
    Forget(commands::forget::Args),
    Gc(commands::gc::Args),
    Recover(commands::recover::Args),
    Nbd(commands::nbd::Args),
    Repo(commands::repo::Args),
    /// Thaws a guest when the backup that froze it is gone; started by backups, not by people
    #[command(hide = true, name = crate::job::guardian::COMMAND)]
    Guardian,
}

impl Command {
    /// Threads for what it computes. Those of what runs every night give way to the guests.
    fn workers(&self) -> Result<Workers> {
        match self {
            Self::Full(_)
            | Self::Incremental(_)
            | Self::Backup(_)
            | Self::Gc(_)
            | Self::Check(_) => Workers::that_give_way(),
            _ => Workers::per_core(),
        }
    }

    async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Full(args) => commands::full::run(args, context).await,
            Self::Incremental(args) => commands::incremental::run(args, context).await,
            Self::Backup(args) => commands::backup::run(args, context).await,
            Self::Plan(args) => commands::plan::run(args, context).await,
            Self::List(args) => commands::list::run(args, context).await,
            Self::Show(args) => commands::show::run(args, context).await,
            Self::Restore(args) => commands::restore::run(args, context).await,
            Self::Serve(args) => commands::serve::run(args, context).await,
            Self::Verify(args) => commands::verify::run(args, context).await,
            Self::Hash(args) => commands::hash::run(args, context).await,
            Self::Copy(args) => commands::copy::run(args, context).await,
            Self::Check(args) => commands::check::run(args, context).await,
            Self::Forget(args) => commands::forget::run(args, context).await,
            Self::Gc(args) => commands::gc::run(args, context).await,
            Self::Recover(args) => commands::recover::run(args, context).await,
            Self::Nbd(args) => commands::nbd::run(args, context).await,
            Self::Repo(args) => commands::repo::run(args, context).await,
            Self::Guardian => unreachable!("runs before there is a context"),
        }
    }
}

/// Runs the program with these arguments (the first is its name) and yields its exit status, for
/// [`leave()`].
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    let json = args.iter().any(|arg| arg == "--json");
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, json),
    };
    let output = Output { json: cli.common.json, quiet: cli.common.quiet };
    match start(cli, output) {
        Ok(()) => exit::SUCCESS,
        Err(error) => {
            output.error(&error);
            exit::code(error.kind())
        }
    }
}

/// What the parser could not take, or the help and version it printed instead.
fn refuse(error: &clap::Error, json: bool) -> u8 {
    let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if json && !asked_for {
        let text = error.render().to_string();
        let error = Error::new(Kind::Usage, first_paragraph(&text)).hint("see vmbackup --help");
        Output { json, quiet: false }.error(&error);
    } else {
        // Help goes to stdout, everything else to stderr; a closed pipe needs no answer.
        let _ = error.print();
    }
    if asked_for { exit::SUCCESS } else { exit::code(Kind::Usage) }
}

/// What the parser says before it explains, on one line: the missing arguments are on lines of their
/// own.
fn first_paragraph(text: &str) -> String {
    let lines = text.lines().take_while(|line| !line.trim().is_empty());
    let joined = lines.map(str::trim).collect::<Vec<_>>().join(" ");
    joined.strip_prefix("error: ").map_or(joined.clone(), str::to_owned)
}

fn start(cli: Cli, output: Output) -> Result<()> {
    log(&cli.common)?;
    if matches!(cli.command, Command::Guardian) {
        return commands::guardian::run();
    }
    // Half of the cores: the reactor moves bytes and keeps the books, hashing and compressing have
    // threads of their own. More would only wake each other (two on two cores: twice the context
    // switches and a tenth more processor time for a full backup).
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.div_ceil(2))
        .enable_all()
        .build()
        .map_err(|e| Error::io("cannot start the runtime", e))?;
    let result = runtime.block_on(async {
        let context = Context::new(&cli.common, output, cli.command.workers()?)?;
        // Boxed: a command's future is large, and there is one.
        context.until_stopped(Box::pin(cli.command.run(&context))).await
    });
    // Whatever still runs after a second Ctrl-C (a read of a dead NFS, say) does not hold us.
    runtime.shutdown_background();
    result
}

/// Sends the program's own log to stderr, as loud as asked.
fn log(common: &CommonArgs) -> Result<()> {
    let filter = match (std::env::var("VMBACKUP_LOG"), common.verbose) {
        (Ok(filter), _) => filter,
        // Whoever serves disks wants to know of clients that break the rules and of what gc may take
        // away, and everybody of points that are missing from a list, of rights that are not kept and of
        // scratch that a run waits for.
        (Err(_), 0) => "error,vmbackup::nbd::server=warn,vmbackup::nbd::tls=warn,\
                        vmbackup::job::serve=warn,vmbackup::repo::points=warn,\
                        vmbackup::block::file=warn,vmbackup::platform::written=warn"
            .to_owned(),
        (Err(_), 1) => "vmbackup=info,warn".to_owned(),
        (Err(_), 2) => "vmbackup=debug,vmbackup_qmp=debug,info".to_owned(),
        (Err(_), _) => "trace".to_owned(),
    };
    let filter = EnvFilter::try_new(&filter)
        .map_err(|e| Error::new(Kind::Usage, "VMBACKUP_LOG is not a log filter").source(e))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(std::io::stderr().is_terminal());
    if common.json {
        log.json().init();
    } else {
        log.with_target(false).init();
    }
    Ok(())
}
