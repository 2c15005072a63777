//! `vmbackup recover`: undoes what killed runs left.

use std::fmt::Write;
use std::path::PathBuf;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::vm_args::{ConnectArgs, WaitArgs};
use crate::cli::vm_settings;
use crate::control::NoticeLevel;
use crate::error::Result;
use crate::job::recover::{self, Action, Mode, Report, Request};
use crate::job::source::SourceSpec;

/// Undo what backups and restores that were killed have left, on one VM or on all
///
/// Thaws guests, ends jobs and exports, removes scratch files, and removes bitmaps and checkpoints
/// whose point does not exist. Images that a restore had replaced get their names back, unless it was
/// complete. The next backup of a VM does the same before it begins. Nothing of
/// anybody else's is touched; bitmaps stay when the repository cannot be asked.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Only this domain of libvirt, by name or UUID
    #[arg(long, value_name = "NAME|UUID", conflicts_with = "qmp")]
    domain: Option<String>,
    #[command(flatten)]
    connect: ConnectArgs,
    /// Only the QEMU behind this monitor socket
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// Guest agent socket of that QEMU
    #[arg(long, value_name = "SOCKET", requires = "qmp")]
    agent: Option<PathBuf>,
    /// Name that QEMU was backed up under, if it was given one
    #[arg(long, value_name = "NAME", requires = "qmp")]
    name: Option<String>,
    /// Only show what would be undone
    #[arg(long, conflicts_with = "wait")]
    dry_run: bool,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let source = match (args.domain, args.qmp) {
        (Some(domain), _) => {
            let uri = vm_settings::libvirt_uri(&args.connect);
            Some(SourceSpec::Libvirt { uri, domain })
        }
        (None, Some(qmp)) => Some(SourceSpec::Qemu { qmp, agent: args.agent, name: args.name }),
        (None, None) => None,
    };
    let wait = vm_settings::wait(&args.wait)?;
    let mode = if args.dry_run { Mode::Look } else { Mode::Undo };
    let request = Request { source, mode, wait };
    let surroundings = (&context.env, &context.control);
    let begun = context.watch(Box::pin(recover::begin(&request, surroundings))).await?;
    let repository = match context.open_if_made(&args.repository).await {
        Ok(repository) => repository,
        Err(error) => {
            let text = format!("bitmaps and checkpoints stay: {error}");
            context.control.notice(NoticeLevel::Warning, text);
            None
        }
    };
    let job = begun.finish(repository.as_ref(), surroundings);
    let report = context.watch(Box::pin(job)).await?;
    context.output.document("recover", &report, describe)?;
    report.problem().map_or(Ok(()), Err)
}

fn describe(report: &Report) -> String {
    let mut out = String::new();
    for vm in &report.vms {
        for item in &vm.items {
            let action = match (item.action, report.dry_run) {
                (Action::Undone, false) => "undone",
                (Action::Undone, true) => "would undo",
                (Action::Adopted, _) => "taken over",
                (Action::Kept, _) => "stays",
            };
            let _ = writeln!(out, "{action}: {}", item.what);
        }
        if let Some(problem) = &vm.problem {
            let _ = writeln!(out, "not recovered: {}: {problem}", vm.name);
        }
    }
    if out.is_empty() {
        out.push_str("nothing is left to undo\n");
    }
    out
}
