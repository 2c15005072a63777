//! The way to the VM of a journal, and whether it is gone: what the journal noted of its place,
//! read against what is there now; and how many ways are gone at a time. For the recovery of all VMs.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Kind, Result};
use crate::job::directories::Directories;
use crate::job::source::{self, ImageSpec, SourceSpec};
use crate::journal::{Mode, Place};
use crate::platform::look;
use crate::vm::Uuid;

/// Whether an error of looking for the VM means that it is not there any more. A QEMU by itself is
/// gone when nobody listens on its monitor; a libvirt that does not answer says nothing, nor does a
/// path that means another file in each directory.
pub(super) fn is_gone(place: &Place, error: &Error) -> bool {
    match place {
        Place::Qemu { monitor, .. } if monitor.is_absolute() => {
            let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
            while let Some(error) = cause {
                if let Some(qmp::Error::Connect { source, .. }) = error.downcast_ref() {
                    let kind = source.kind();
                    return matches!(kind, ErrorKind::NotFound | ErrorKind::ConnectionRefused);
                }
                cause = error.source();
            }
            false
        }
        Place::Libvirt { .. } => error.kind() == Kind::NotFound,
        Place::Qemu { .. } | Place::Images { .. } => false,
    }
}

/// Whether the VM was images and none of them is there any more; an error if their file systems do
/// not answer. Cancel-safe.
pub(super) async fn are_gone(place: &Place, directories: &Directories) -> Result<bool> {
    let Place::Images { images } = place else { return Ok(false) };
    let mut all_gone = true;
    for (path, _) in images {
        let (path, directory) = (path.clone(), path.parent().unwrap_or(path));
        directories.answers(directory, Mode::Look).await?;
        let there = look(directory, move || path.symlink_metadata()).await?;
        all_gone &= there.is_err_and(|error| error.kind() == ErrorKind::NotFound);
    }
    Ok(all_gone)
}

/// Connections to each remote host.
#[derive(Default)]
pub(super) struct Hosts(Mutex<BTreeMap<String, Arc<Semaphore>>>);

/// Connections to a remote host that are made at a time: fewer than OpenSSH's server begins to refuse
/// (`MaxStartups`, sshd_config(5)), which counts them until they are let in.
const CONNECTIONS_AT_ONCE: usize = 8;

impl Hosts {
    /// A permit to connect to the host of a VM, held until that is done; none is needed on this one.
    /// Cancel-safe.
    pub(super) async fn permit(&self, source: &SourceSpec) -> Option<OwnedSemaphorePermit> {
        let host = source::remote_host(source)?.to_owned();
        let permits = {
            let mut hosts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let permits = hosts.entry(host);
            Arc::clone(permits.or_insert_with(|| Arc::new(Semaphore::new(CONNECTIONS_AT_ONCE))))
        };
        permits.acquire_owned().await.ok()
    }
}

/// How the VM of a journal is reached.
pub(super) fn way_to(place: &Place, name: &str, uuid: Uuid) -> SourceSpec {
    match place {
        Place::Libvirt { uri } => {
            SourceSpec::Libvirt { uri: uri.clone(), domain: uuid.to_string() }
        }
        Place::Qemu { monitor, agent, name } => {
            let (qmp, agent, name) = (monitor.clone(), agent.clone(), name.clone());
            SourceSpec::Qemu { qmp, agent, name }
        }
        Place::Images { images } => {
            let image = |(path, format): &(PathBuf, String)| ImageSpec {
                path: path.clone(),
                format: format.clone(),
            };
            let images = images.iter().map(image).collect();
            SourceSpec::Images { name: name.to_owned(), images }
        }
    }
}

#[cfg(all(test, feature = "libvirt"))]
mod tests {
    use super::*;

    fn domain(uri: &str) -> SourceSpec {
        SourceSpec::Libvirt { uri: uri.to_owned(), domain: "foo".to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn only_connections_to_one_and_the_same_remote_host_wait_for_each_other() {
        let hosts = Hosts::default();
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS_AT_ONCE {
            held.push(hosts.permit(&domain("qemu+ssh://a/system")).await.expect("there is one"));
        }
        let limit = std::time::Duration::from_secs(60);
        let (further, elsewhere) = (domain("qemu+ssh://a/session"), domain("qemu+ssh://b/system"));
        tokio::time::timeout(limit, hosts.permit(&further)).await.expect_err("it waits");
        let other = tokio::time::timeout(limit, hosts.permit(&elsewhere));
        assert!(other.await.expect("at once").is_some());
        assert!(hosts.permit(&domain("qemu:///system")).await.is_none());
        held.pop();
        assert!(hosts.permit(&further).await.is_some());
    }
}
