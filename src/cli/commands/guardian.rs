//! `vmbackup guardian`: the process that thaws a guest whatever becomes of the backup that froze it.
//!
//! Started by backups with the line to them as standard input; hidden from the help. It leaves all
//! that could end it together with the backup: the session and process group (Ctrl-C, a closed
//! terminal), the control group (a service manager that stops a unit kills everything in it), and
//! the signals with which those announce it.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use tokio::signal::unix::{SignalKind, signal};

use crate::error::{Error, Result};
use crate::job::guardian;

/// Where a process moves itself to the top of the hierarchies by which systemd ends units: cgroup v2
/// alone, v2 beside v1 (systemd's "hybrid"), and the named one of v1
/// (Documentation/admin-guide/cgroup-v2.rst, systemd's `docs/CGROUP_DELEGATION.md`). What is not there is
/// passed over: where v1 is mounted, the first would be a file in a tmpfs.
///
/// Only root may. For others there is no way out: `systemd-run --user --scope` would need the
/// user's bus, which a backup from cron does not have. There a stop of the unit sends SIGTERM
/// first, which is not heeded here, and the backup's end makes the guardian thaw at once.
const TOP_GROUPS: [&str; 3] = [
    "/sys/fs/cgroup/cgroup.procs",
    "/sys/fs/cgroup/unified/cgroup.procs",
    "/sys/fs/cgroup/systemd/cgroup.procs",
];

/// Guards the guest that the backup at the other end of standard input names.
pub(crate) fn run() -> Result<()> {
    detach();
    let stdin = std::io::stdin().as_fd().try_clone_to_owned();
    let stream = UnixStream::from(stdin.map_err(|e| Error::io("cannot use standard input", e))?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::io("cannot start the runtime", e))?;
    let result = runtime.block_on(async {
        // Held until the end: a signal that somebody listens for ends nothing.
        let _heard_and_ignored = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
        ]
        .map(signal);
        guardian::run(stream).await
    });
    // A call that libvirt never answers does not keep the process.
    runtime.shutdown_background();
    result
}

/// Leaves what would end with the backup. What cannot be left is no reason to guard less.
fn detach() {
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "stays in its session");
    }
    for group in TOP_GROUPS {
        // Never made here. 0 is the one that writes.
        let opened = std::fs::OpenOptions::new().write(true).open(group);
        if let Err(error) = opened.and_then(|mut group| group.write_all(b"0")) {
            tracing::debug!(group, %error, "stays in its control group");
        }
    }
}
