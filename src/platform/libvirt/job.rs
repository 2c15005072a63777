//! The backup job of a running domain: its XML, whose it is, and its end.
//!
//! A domain has at most one backup job. Ours is told from others by the socket it serves on, which
//! carries the point; a job survives the death of whoever began it, so ownership is also recorded
//! in the journal of the machine that runs us.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use virt::domain::{Domain, DomainPausedReason, DomainStateReason};
use virt::enumutil::Enum;
use virt::error::ErrorNumber;

use super::connection::DomainHandle;
use super::error::code;
use super::ffi::{self, JobStatus, VirtResult};
use super::names::socket_point;
use super::xml::{Element, escaped};
use crate::error::{Error, Kind, Result};
use crate::journal::Journal;
use crate::vm::PointId;

/// Longest wait for a job to be gone after it was told to end: measured 20 ms, more when QEMU has
/// requests of a slow disk in flight. And one thread of libvirt handles the events of all domains:
/// one whose event waits for a job lock (30 s, `QEMU_JOB_WAIT_TIME`) delays those of all. A guest whose
/// agent leaves or comes while it is backed up, as in a reboot, is such a one: that event wants a lock
/// which a backup does not share (libvirt 11.3: two minutes for each reboot).
const END_TIMEOUT: Duration = Duration::from_secs(300);

/// How often the job is told to end. libvirt 11.3 does not count a disk that was unplugged beside the job
/// among those that have ended, and ends the job when it is told once more.
const ABORT_AGAIN: Duration = Duration::from_secs(5);

/// Longest wait for libvirt to know again what a domain does.
const STATUS_TIMEOUT: Duration = Duration::from_secs(90);

/// How often a job that libvirt cannot describe is asked for again.
const STATUS_POLL: Duration = Duration::from_millis(500);

/// How long somebody else's job may be there before the domain counts as busy: 'virsh domjobabort'
/// returns before libvirt has noticed that QEMU ended the job.
const FOREIGN_GRACE: Duration = Duration::from_secs(2);

/// How often the end is looked for.
const END_POLL: Duration = Duration::from_millis(20);

/// Where the exports are offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Server {
    /// A unix socket on the host.
    Unix(PathBuf),
    /// A plaintext TCP port of the host: only with the option that says so.
    Tcp {
        /// Address QEMU listens on.
        host: String,
        /// Port; libvirt picks none itself.
        port: u16,
    },
}

/// One disk of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JobDisk {
    /// Target name: also the name of its export.
    pub(super) name: String,
    /// The checkpoint to export the changes since.
    pub(super) base: Option<String>,
    /// Scratch file; must not exist.
    pub(super) scratch: PathBuf,
}

impl JobDisk {
    /// The dirty bitmap's name in the export, without QEMU's prefix.
    pub(super) fn bitmap(&self) -> Option<String> {
        self.base.as_ref().map(|_| format!("backup-{}", self.name))
    }
}

/// The XML of a pull-mode job. Disks not in it are not part of it (formatbackup.rst): all are
/// named explicitly.
pub(super) fn backup_xml(server: &Server, disks: &[JobDisk]) -> String {
    let mut xml = "<domainbackup mode='pull'>".to_owned();
    match server {
        Server::Unix(path) => {
            write!(xml, "<server transport='unix' socket='{}'/>", escaped(&path.to_string_lossy()))
        }
        Server::Tcp { host, port } => {
            write!(xml, "<server transport='tcp' name='{}' port='{port}'/>", escaped(host))
        }
    }
    .expect("a string takes text");
    xml.push_str("<disks>");
    for disk in disks {
        let name = escaped(&disk.name);
        let mode = match (&disk.base, disk.bitmap()) {
            (Some(base), Some(bitmap)) => format!(
                "backupmode='incremental' incremental='{}' exportbitmap='{}'",
                escaped(base),
                escaped(&bitmap)
            ),
            _ => "backupmode='full'".to_owned(),
        };
        let scratch = escaped(&disk.scratch.to_string_lossy());
        write!(
            xml,
            "<disk name='{name}' backup='yes' type='file' {mode} exportname='{name}'>\
             <driver type='qcow2'/><scratch file='{scratch}'/></disk>"
        )
        .expect("a string takes text");
    }
    xml.push_str("</disks></domainbackup>");
    xml
}

/// A backup job that is active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ActiveJob {
    /// The point of the run of ours that began it, if it looks like one of ours.
    pub(super) point: Option<PointId>,
    /// Whose it looks like, for people.
    pub(super) owner: String,
    /// Its disks, with the number of the scratch image where libvirt tells: `vda[7]` is what
    /// thresholds call it.
    pub(super) scratch: Vec<(String, Option<u32>)>,
}

/// The active backup job, if there is one.
///
/// Asks for the job's XML and not for its statistics: libvirt before 10.8 may crash when
/// statistics are read during a backup job (libvirt NEWS 10.8.0), and the XML needs no monitor.
pub(super) async fn active(domain: &DomainHandle) -> Result<Option<ActiveJob>> {
    let what = "ask for the backup job of";
    match domain.raw_call(what, ffi::backup_xml).await? {
        Ok(xml) => parse(&xml).map(Some),
        Err(error) if code(&error) == Some(ErrorNumber::NoDomainBackup) => Ok(None),
        // A domain that has stopped has no job.
        Err(error) if code(&error) == Some(ErrorNumber::OperationInvalid) => Ok(None),
        Err(error) => Err(domain.wrap(what, error)),
    }
}

fn parse(xml: &str) -> Result<ActiveJob> {
    let root = Element::parse("the backup job XML", xml)?;
    let socket = root.attr_at(&["server"], "socket");
    let scratch = root.attr_at(&["disks", "disk", "scratch"], "file");
    let by_scratch = |path: &str| {
        let file = Path::new(path).file_name()?.to_str()?;
        file.strip_prefix("vmb-")?.get(..32)?.parse().ok()
    };
    let point = socket.and_then(socket_point).or_else(|| scratch.and_then(by_scratch));
    let owner = socket.or(scratch).unwrap_or("an unknown program").to_owned();
    let disks = root.child("disks").map(|disks| {
        let disk = |disk: &Element| {
            let index = disk.attr("index").and_then(|index| index.parse().ok());
            Some((disk.attr("name")?.to_owned(), index))
        };
        disks.all("disk").filter_map(disk).collect()
    });
    Ok(ActiveJob { point, owner, scratch: disks.unwrap_or_default() })
}

/// What job the domain is doing, once it is known.
///
/// libvirt 11.3 was seen to say "internal error: backup job data missing" for seconds after a job
/// had been aborted: the backup is gone (`NoDomainBackup`) and the domain's job is not. It passes,
/// or libvirt never lets another job begin; so it is waited for, and then the domain is busy.
pub(super) async fn status(domain: &DomainHandle) -> Result<JobStatus> {
    let what = "ask for the job of";
    let deadline = tokio::time::Instant::now() + STATUS_TIMEOUT;
    loop {
        let error = match domain.raw_call(what, ffi::job_status).await? {
            Ok(status) => return Ok(status),
            Err(error) => error,
        };
        if code(&error) != Some(ErrorNumber::InternalError) {
            return Err(domain.wrap(what, error));
        }
        if tokio::time::Instant::now() >= deadline {
            let name = &domain.name;
            let message = format!("libvirt has not finished an earlier job of domain '{name}'");
            return Err(Error::new(Kind::Busy, message)
                .hint(format!(
                    "try again later; if 'virsh domjobinfo {name}' goes on failing, restart the \
                     libvirt daemon (domains run on)"
                ))
                .source(error));
        }
        tokio::time::sleep(STATUS_POLL).await;
    }
}

/// [`Kind::Busy`] if the domain does something a backup cannot begin beside; the backup job of an
/// earlier run of ours, which is in the journal, is for the caller to end: its point.
pub(super) async fn check_idle(
    domain: &DomainHandle,
    journal: &Journal,
) -> Result<Option<PointId>> {
    let name = &domain.name;
    let give_up = tokio::time::Instant::now() + FOREIGN_GRACE;
    while let Some(active) = active(domain).await? {
        if let Some(point) = active.point.filter(|point| journal.owns(*point)) {
            return Ok(Some(point));
        }
        if tokio::time::Instant::now() < give_up {
            tokio::time::sleep(END_POLL).await;
            continue;
        }
        let message = format!("domain '{name}' has a backup job already, of {}", active.owner);
        return Err(Error::new(Kind::Busy, message).hint(format!(
            "wait for it to end; if whoever began it is gone, end it with 'virsh domjobabort {name}'"
        )));
    }
    let status = status(domain).await?;
    if status.active { Err(busy(domain, &status)) } else { Ok(None) }
}

/// [`Kind::Busy`] while the domain is on its way here: until it has come libvirt answers nothing about its
/// disks, and says so after half a minute.
pub(super) async fn check_arrived(domain: &DomainHandle) -> Result<()> {
    let asked = domain.call("ask for the state of", Domain::is_active).await?;
    let status = if asked { status(domain).await? } else { JobStatus::default() };
    if status.is_arriving() { Err(busy(domain, &status)) } else { Ok(()) }
}

fn busy(domain: &DomainHandle, status: &JobStatus) -> Error {
    let name = &domain.name;
    let message = format!("domain '{name}' is busy with {}", status.describe());
    let hint = if status.is_arriving() {
        "try again when it has come".to_owned()
    } else {
        format!("'virsh domjobinfo {name}' shows it; try again when it has ended")
    };
    Error::new(Kind::Busy, message).hint(hint)
}

/// The error of a backup that could not begin: by what the domain does instead, if that is the cause,
/// as it was looked at a moment before. libvirt has no code for it ("cannot perform disk backup for
/// inactive domain" is not supported, "domain is not running" invalid, by 11.3).
pub(super) async fn instead(domain: &DomainHandle, error: Error) -> Error {
    if !matches!(error.kind(), Kind::Io | Kind::Unsupported) {
        return error;
    }
    let asked = domain.raw_call("ask for the state of", |domain| {
        Ok(if domain.is_active()? { Some(ffi::job_status(domain)?) } else { None })
    });
    let what = match asked.await {
        Ok(Ok(None)) => "was shut off, saved or migrated away while the backup began".to_owned(),
        Ok(Ok(Some(status))) if status.active => format!("is busy with {}", status.describe()),
        // Nothing else is known: what failed says it best.
        _ => return error,
    };
    Error::new(Kind::Busy, format!("domain '{}' {what}", domain.name))
        .hint("run the backup again when that is over; a domain that is shut off is read from its images")
        .source(error)
}

/// Ends the job of `point` and waits until it is gone; a guest that stands still because scratch ran full
/// runs on. No job is success, and so is one of anybody else, which may have taken its place. A guest whose
/// scratch hangs stands still until it answers: it is asked first ([`super::teardown`]).
pub(super) async fn end(domain: &DomainHandle, point: PointId) -> Result<()> {
    let begun = tokio::time::Instant::now();
    let mut told = None;
    loop {
        let is_time = told.is_none_or(|told: tokio::time::Instant| told.elapsed() >= ABORT_AGAIN);
        let is_there = if is_time {
            told = Some(tokio::time::Instant::now());
            abort(domain, point).await?
        } else {
            active(domain).await?.is_some_and(|job| job.point == Some(point))
        };
        if !is_there {
            break;
        }
        if begun.elapsed() >= END_TIMEOUT {
            return Err(Error::new(
                Kind::Timeout,
                format!(
                    "the backup job of domain '{}' did not end in {END_TIMEOUT:?}",
                    domain.name
                ),
            )
            .hint(format!("'virsh domjobabort {}' ends it by hand", domain.name)));
        }
        tokio::time::sleep(END_POLL).await;
    }
    // The backup is gone a moment before the domain's job is, and whoever asks in between gets an
    // internal error: leave the domain free. A domain that has stopped has nothing to tell.
    if let Err(error) = status(domain).await {
        tracing::debug!(?error, "the domain's job cannot be asked for");
    }
    let name = &domain.name;
    match domain.call("let the guest run on of", run_on).await {
        Ok(false) => {}
        Ok(true) => tracing::warn!("domain '{name}' stood still for want of space; it runs on"),
        // The job is gone, which is what was asked for.
        Err(error) => tracing::warn!(?error, "domain '{name}' may stand still for want of space"),
    }
    Ok(())
}

/// Has libvirt end the job if it is that of `point`; whether it is there. libvirt ends whatever the domain is
/// doing, a migration as well: so it is looked at right before, in the same call.
async fn abort(domain: &DomainHandle, point: PointId) -> Result<bool> {
    let what = "end the backup job of";
    let told = domain.raw_call(what, move |domain| {
        let job = match parse(&ffi::backup_xml(domain)?) {
            Ok(job) => job,
            Err(error) => return Ok(Err(error)),
        };
        if job.point != Some(point) {
            return Ok(Ok(false));
        }
        match ffi::abort_job(domain) {
            // It ends by itself, or the domain does: seen by who looks again.
            Err(error) if code(&error) == Some(ErrorNumber::OperationInvalid) => {}
            told => told?,
        }
        Ok(Ok(true))
    });
    match told.await? {
        Ok(is_there) => is_there,
        // No job, or no running domain any more.
        Err(error)
            if matches!(
                code(&error),
                Some(ErrorNumber::NoDomainBackup | ErrorNumber::OperationInvalid)
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(domain.wrap(what, error)),
    }
}

/// Resumes a domain that QEMU stopped because a write found no space (`error_policy='enospace'`, the
/// default); whether it did. The write is not lost: QEMU does it again when the domain runs on, and
/// now without scratch. Where it was the disk's own storage that is full, QEMU stops it again.
///
/// libvirt knows by now if that is so: QEMU says it before it answers the calls by which libvirt
/// takes the job down.
fn run_on(domain: &Domain) -> VirtResult<bool> {
    if !is_stopped(domain)? || !ffi::has_disk_without_space(domain)? {
        return Ok(false);
    }
    domain.resume()?;
    Ok(true)
}

/// Whether QEMU stopped the domain because a write failed.
fn is_stopped(domain: &Domain) -> VirtResult<bool> {
    let stopped = Enum::Known(DomainStateReason::Paused(Enum::Known(DomainPausedReason::IOError)));
    Ok(domain.state()?.1 == stopped)
}

/// The same.
pub(super) async fn stands_still(domain: &DomainHandle) -> Result<bool> {
    domain.call("ask for the state of", is_stopped).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::libvirt::names::{scratch_path, socket_path};

    #[test]
    fn a_job_of_ours_carries_its_point() {
        let point = PointId([0xab; 16]);
        let disks = [
            JobDisk {
                name: "vda".into(),
                base: Some("vmb-1".into()),
                scratch: scratch_path(Path::new("/s"), point, "vda"),
            },
            JobDisk { name: "vdb".into(), base: None, scratch: "/s/b".into() },
        ];
        let unix = backup_xml(&Server::Unix(socket_path(Path::new("/q"), point).unwrap()), &disks);
        assert!(unix.contains("name='vda' backup='yes' type='file' backupmode='incremental'"));
        assert!(unix.contains("incremental='vmb-1' exportbitmap='backup-vda' exportname='vda'"));
        assert!(unix.contains("name='vdb' backup='yes' type='file' backupmode='full'"));
        assert_eq!(parse(&unix).unwrap().point, Some(point));
        let tcp = backup_xml(&Server::Tcp { host: "h".into(), port: 10809 }, &disks);
        assert_eq!(parse(&tcp).unwrap().point, Some(point));
        let foreign = "<domainbackup mode='push'><disks><disk name='vda'/></disks></domainbackup>";
        assert_eq!(parse(foreign).unwrap().point, None);
    }
}
