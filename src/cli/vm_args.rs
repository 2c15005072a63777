//! Arguments that name a VM and say how its point in time is taken, as they were typed.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::args::RepositoryArgs;

/// Which VM.
#[derive(Args, Debug)]
#[command(next_help_heading = "Which VM (one of --domain, --qmp, --image)")]
#[group(required = true, multiple = true, args = ["domain", "qmp", "image"])]
pub(crate) struct SourceArgs {
    /// Domain of libvirt, by name or UUID
    #[arg(long, value_name = "NAME|UUID", conflicts_with_all = ["qmp", "image"])]
    pub(crate) domain: Option<String>,
    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
    /// Monitor socket of a QEMU that runs without libvirt
    #[arg(long, value_name = "SOCKET", conflicts_with = "image")]
    pub(crate) qmp: Option<PathBuf>,
    /// Guest agent socket of that QEMU
    #[arg(long, value_name = "SOCKET", requires = "qmp")]
    pub(crate) agent: Option<PathBuf>,
    /// Image of a stopped VM; may be given more than once. A comma in PATH is written twice. The
    /// format is never guessed from content; an extension such as .qcow2 or .raw says it as well
    #[arg(long, value_name = "PATH[,format=F]", requires = "name")]
    pub(crate) image: Vec<String>,
    /// Name the VM is stored under (with --image, or --qmp)
    #[arg(long, value_name = "NAME", conflicts_with = "domain")]
    pub(crate) name: Option<String>,
}

/// Which libvirt.
#[derive(Args, Debug)]
pub(crate) struct ConnectArgs {
    /// Connection URI of libvirt [default: qemu:///system]
    #[arg(long, env = "LIBVIRT_DEFAULT_URI", value_name = "URI")]
    pub(crate) connect: Option<String>,
}

/// What to do while another run works on the VM.
#[derive(Args, Debug)]
pub(crate) struct WaitArgs {
    /// If another run works on the VM, wait for its end, at most so long (seconds, or with a unit),
    /// instead of failing at once
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "1h")]
    pub(crate) wait: Option<String>,
}

/// How the point in time is taken.
#[derive(Args, Debug)]
#[command(next_help_heading = "Snapshot")]
pub(crate) struct SnapshotArgs {
    /// Freeze the guest's file systems around the instant?
    #[arg(long, value_enum, default_value_t = QuiesceArg::Auto)]
    pub(crate) quiesce: QuiesceArg,
    /// Longest time guest file systems stay frozen, in seconds or with a unit (500ms)
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub(crate) freeze_budget: String,
    /// Leave out this disk (vdb); may be given more than once
    #[arg(long, value_name = "DISK")]
    pub(crate) exclude_disk: Vec<String>,
    /// Directory for scratch files: local, and writable by QEMU
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch_dir: Option<PathBuf>,
    /// Let the backup break rather than a write of the guest fail or wait when scratch is full
    /// (with --qmp; otherwise the backup is given up while there is room); scratch is given back for
    /// what is stored (QEMU 9.1 or newer)
    #[arg(long)]
    pub(crate) guest_first: bool,
    /// Allow disks to cross the network unencrypted where nothing else reaches the host
    #[arg(long)]
    pub(crate) insecure_tcp: bool,
}

/// `--quiesce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum QuiesceArg {
    /// Where a guest agent answers
    Auto,
    /// Fail without it
    Require,
    /// Crash consistent
    Never,
}

/// All a backup takes; shared by `full`, `incremental` and `backup`.
#[derive(Args, Debug)]
pub(crate) struct BackupArgs {
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    #[command(flatten)]
    pub(crate) snapshot: SnapshotArgs,
    /// Share of the blocks called clean by a dirty bitmap that is read and compared all the same,
    /// at least 64 blocks of each disk; 0 for none
    #[arg(long, value_name = "PERCENT", default_value = "0.1%", help_heading = "Snapshot")]
    pub(crate) audit: String,
    /// Read a share of what was stored a second time from the same snapshot, at least 64 blocks of each
    /// disk, and make no point if anything differs; --guest-first gives no scratch back then
    /// [without PERCENT: 1%]
    #[arg(long, value_name = "PERCENT", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "1%", help_heading = "Snapshot")]
    pub(crate) verify_source: Option<String>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
    #[command(flatten)]
    pub(crate) repository: RepositoryArgs,
}

#[cfg(test)]
mod tests {
    use crate::cli::Cli;
    use clap::Parser;

    #[test]
    fn exactly_one_kind_of_vm_is_named() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["vmbackup", "full"], args].concat());
        assert!(parse(&["--domain", "foo"]).is_ok());
        assert!(parse(&["--image", "a.raw", "--image", "b.qcow2", "--name", "foo"]).is_ok());
        for wrong in [
            &[][..],
            &["--domain", "foo", "--qmp", "s"],
            &["--image", "a.raw"],
            &["--name", "foo"],
            &["--agent", "s"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
