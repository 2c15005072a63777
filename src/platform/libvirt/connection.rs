//! A connection to a libvirt daemon, and how its blocking calls are made from async code.
//!
//! Every call of libvirt can block for as long as the daemon, the network or QEMU likes. So each
//! runs on a blocking thread with a deadline; past it the caller gets a time-out and the thread is
//! left to finish alone (keep-alive ends it on a dead network). A call whose late success would
//! leave something behind is given an undo, which the same thread runs.
//!
//! Not here: what is asked of a domain (`snapshot`, `checkpoint`, ...).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;

use super::error::{code, not_connected, wrap};
use super::ffi::{self, Events, VirtResult};
use crate::error::{Error, Kind, Result};
use crate::vm::Uuid;

/// Longest wait for an ordinary call. libvirt itself waits 30 s for the domain's job lock
/// (`QEMU_JOB_WAIT_TIME`), and its own error is better than ours.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest wait for a connection: SSH may have to resolve and authenticate.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a daemon whose connection ended may take to answer again: a restart takes a few seconds.
const REVIVAL: Duration = Duration::from_secs(15);

/// Keep-alive of connections, libvirt's own client defaults (5 s, 5 times): a dead daemon or network is noticed
/// after half a minute.
const KEEPALIVE_SECONDS: i32 = 5;
const KEEPALIVE_COUNT: u32 = 5;

/// Domain names listed in an error at most.
const NAMES_LISTED_MAX: usize = 30;

/// The URI that stands for "the hypervisor of this machine".
pub(super) const DEFAULT_URI: &str = "qemu:///system";

/// An open connection. Clones share it.
#[derive(Clone)]
pub(super) struct Host {
    connection: Arc<Connect>,
    uri: Arc<str>,
    hostname: Arc<str>,
}

impl Host {
    /// Connects. Changes nothing.
    pub(super) async fn open(uri: Option<&str>) -> Result<Self> {
        let uri = uri.unwrap_or(DEFAULT_URI).to_owned();
        let asked = uri.clone();
        let opened = blocking(CONNECT_TIMEOUT, move || {
            ffi::initialise()?;
            let connection = Connect::open(Some(&asked))?;
            // Local drivers and old daemons have none: no reason to fail.
            if let Err(error) = connection.set_keep_alive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT) {
                tracing::debug!(%error, "no keep-alive on this connection");
            }
            let hostname = connection.hostname()?;
            Ok((connection, hostname))
        })
        .await;
        let (connection, hostname) = match opened {
            Some(Ok(opened)) => opened,
            Some(Err(error)) => {
                return Err(not_connected(&uri, error));
            }
            None => {
                let message = format!("libvirt at {uri} did not answer in {CONNECT_TIMEOUT:?}");
                return Err(Error::new(Kind::Timeout, message)
                    .hint("check that the host is reachable and 'virsh -c URI list' works"));
            }
        };
        Ok(Self { connection: Arc::new(connection), uri: uri.into(), hostname: hostname.into() })
    }

    /// The URI it was opened with.
    pub(super) fn uri(&self) -> &str {
        &self.uri
    }

    /// Whether the connection has not ended. Asks nobody: a dead network is noticed by keep-alive.
    pub(super) fn is_alive(&self) -> bool {
        // An error means that there is no socket to ask.
        self.connection.is_alive().unwrap_or(false)
    }

    /// The host the daemon runs on.
    pub(super) fn hostname(&self) -> &str {
        &self.hostname
    }

    /// Whether the files the daemon names are files of this machine: a URI without a host part.
    pub(super) fn is_local(&self) -> bool {
        remote_host(&self.uri).is_none()
    }

    /// Where QEMU driver state lies on the host: the parent of the per-domain directories, which
    /// QEMU may write to and security drivers let it. `None` for a session daemon, whose QEMU is
    /// the user's own and unconfined.
    pub(super) fn qemu_dir(&self) -> Option<PathBuf> {
        qemu_dir(&self.uri)
    }

    /// Runs a blocking call with the connection and gives libvirt's own result; `what` completes
    /// "cannot ...". Dropping the future does not stop the call.
    pub(super) async fn raw_call<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Connect) -> VirtResult<T> + Send + 'static,
    ) -> Result<VirtResult<T>> {
        let connection = Arc::clone(&self.connection);
        blocking(CALL_TIMEOUT, move || work(&connection)).await.ok_or_else(|| {
            Error::new(Kind::Timeout, format!("cannot {what}: no answer in {CALL_TIMEOUT:?}"))
                .hint(format!("see whether 'virsh -c {} list' answers", self.uri))
        })
    }

    /// Finds a domain by UUID or name. An unknown name is an error that lists the names there are.
    pub(super) async fn domain(&self, wanted: &str) -> Result<DomainHandle> {
        let name = wanted.to_owned();
        let found = self
            .raw_call(&format!("look up domain '{wanted}'"), move |connection| {
                let by_name = match connection.lookup_domain_by_name(&name) {
                    Ok(domain) => Some(domain),
                    Err(error) if code(&error) == Some(ErrorNumber::NoDomain) => None,
                    Err(error) => return Err(error),
                };
                let by_uuid = match Uuid::try_parse(&name) {
                    Ok(uuid) => match connection.lookup_domain_by_uuid_string(&uuid.to_string()) {
                        Ok(domain) => Some(domain),
                        Err(error) if code(&error) == Some(ErrorNumber::NoDomain) => None,
                        Err(error) => return Err(error),
                    },
                    Err(_) => None,
                };
                let names = if by_name.is_none() && by_uuid.is_none() {
                    let domains = connection.list_all_domains(0)?;
                    domains.iter().filter_map(|domain| domain.name().ok()).collect()
                } else {
                    Vec::new()
                };
                let identity = |domain: Domain| -> VirtResult<_> {
                    Ok((domain.name()?, domain.uuid_string()?, domain))
                };
                Ok((by_name.map(identity).transpose()?, by_uuid.map(identity).transpose()?, names))
            })
            .await?
            .map_err(|error| wrap(format!("cannot look up domain '{wanted}'"), error))?;
        let (name, uuid, domain) = match found {
            (Some(by_name), Some(by_uuid), _) if by_name.1 != by_uuid.1 => {
                return Err(Error::new(
                    Kind::Ambiguous,
                    format!(
                        "'{wanted}' is the name of domain {} and the UUID of domain '{}'",
                        by_name.1, by_uuid.0
                    ),
                )
                .hint("name the domain by the other of its two"));
            }
            (Some(found), _, _) | (None, Some(found), _) => found,
            (None, None, names) => return Err(self.unknown(wanted, names)),
        };
        let uuid = Uuid::try_parse(&uuid).map_err(|error| {
            Error::new(Kind::Protocol, format!("libvirt gave '{uuid}' as a UUID")).source(error)
        })?;
        Ok(DomainHandle { host: self.clone(), domain: Arc::new(domain), name: name.into(), uuid })
    }

    fn unknown(&self, wanted: &str, mut names: Vec<String>) -> Error {
        names.sort();
        let total = names.len();
        names.truncate(NAMES_LISTED_MAX);
        let list = match total {
            0 => {
                "there is none; as another user, or with another --connect URI, there may be".into()
            }
            n if n > names.len() => format!("there are {n}, among them {}", names.join(", ")),
            _ => format!("there are: {}", names.join(", ")),
        };
        Error::new(Kind::NotFound, format!("no domain '{wanted}' at {}", self.uri)).hint(list)
    }
}

/// A domain on a host. Clones share it.
#[derive(Clone)]
pub(super) struct DomainHandle {
    pub(super) host: Host,
    domain: Arc<Domain>,
    pub(super) name: Arc<str>,
    pub(super) uuid: Uuid,
}

impl DomainHandle {
    /// Runs a blocking call on the domain; `what` completes "cannot ... domain 'foo'".
    pub(super) async fn call<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Domain) -> VirtResult<T> + Send + 'static,
    ) -> Result<T> {
        match self.raw_call(what, work).await? {
            Ok(value) => Ok(value),
            Err(error) => Err(self.wrap(what, error)),
        }
    }

    /// As [`DomainHandle::call`], with libvirt's own error inside.
    pub(super) async fn raw_call<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Domain) -> VirtResult<T> + Send + 'static,
    ) -> Result<VirtResult<T>> {
        let domain = Arc::clone(&self.domain);
        self.host.raw_call(&format!("{what} domain '{}'", self.name), move |_| work(&domain)).await
    }

    /// Runs `work` for at most `limit`. When it has not returned by then, the result is `None`, and
    /// when it returns later the same thread runs `undo` with what it returned. A process that
    /// ends before leaves it undone: the caller's record must say so.
    pub(super) async fn call_or_undo<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(&Domain) -> VirtResult<T> + Send + 'static,
        undo: impl FnOnce(&Domain, &VirtResult<T>) + Send + 'static,
    ) -> Option<VirtResult<T>> {
        let domain = Arc::clone(&self.domain);
        let race = Race::default();
        let abandon = race.clone();
        let mut task = tokio::task::spawn_blocking(move || {
            let result = work(&domain);
            if !race.finish() {
                undo(&domain, &result);
            }
            result
        });
        let joined = match tokio::time::timeout(limit, &mut task).await {
            Ok(joined) => joined,
            Err(_) if abandon.abandon() => return None,
            // It returned at this very moment: the result is there.
            Err(_) => task.await,
        };
        Some(joined.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())))
    }

    /// This handle, or one on a new connection where that of this one has ended: libvirt never
    /// mends a connection. A daemon that restarts gets [`REVIVAL`] to answer again.
    pub(super) async fn revived(&self) -> Result<Self> {
        if self.host.is_alive() {
            return Ok(self.clone());
        }
        let deadline = tokio::time::Instant::now() + REVIVAL;
        loop {
            match Host::open(Some(self.host.uri())).await {
                Ok(host) => return host.domain(&self.uuid.to_string()).await,
                Err(error) if tokio::time::Instant::now() >= deadline => return Err(error),
                Err(error) => tracing::debug!(%error, "libvirt does not answer yet"),
            }
            tokio::time::sleep(REVIVAL / 20).await;
        }
    }

    /// Subscribes to the domain's events.
    pub(super) async fn subscribe(&self, what: &str) -> Result<Events> {
        let connection = Arc::clone(&self.host.connection);
        self.call(what, move |domain| Events::subscribe(&connection, domain)).await
    }

    /// Makes a call on this very thread, which must be one made for blocking.
    pub(super) fn blocking<T>(&self, work: impl FnOnce(&Domain) -> VirtResult<T>) -> VirtResult<T> {
        work(&self.domain)
    }

    /// The error of a call on this domain.
    pub(super) fn wrap(&self, what: &str, error: virt::error::Error) -> Error {
        wrap(format!("cannot {what} domain '{}'", self.name), error)
    }
}

/// Who comes first: the call, or the one who waits for it.
#[derive(Clone, Default)]
struct Race(Arc<AtomicU8>);

impl Race {
    /// The call returned; false when nobody waits any more.
    fn finish(&self) -> bool {
        self.0.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The wait is over; false when the call has returned already.
    fn abandon(&self) -> bool {
        self.0.compare_exchange(0, 2, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// Runs `work` on a thread for blocking calls; `None` past the limit.
async fn blocking<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let task = tokio::task::spawn_blocking(work);
    match tokio::time::timeout(limit, task).await {
        Ok(Ok(value)) => Some(value),
        Ok(Err(error)) => std::panic::resume_unwind(error.into_panic()),
        Err(_) => None,
    }
}

/// The host part of a URI (`qemu+ssh://root@host:22/system` gives `root@host:22`), if it has one.
pub(crate) fn remote_host(uri: &str) -> Option<&str> {
    let rest = uri.split_once("://")?.1;
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    (!authority.is_empty()).then_some(authority)
}

fn qemu_dir(uri: &str) -> Option<PathBuf> {
    let rest = uri.split_once("://")?.1;
    let path = rest.get(rest.find('/')?..)?;
    if let Some(query) = path.strip_prefix("/embed?") {
        // Layout of an embedded driver: qemu_conf.c, virQEMUDriverConfigNew with a root.
        let root = query.split('&').find_map(|pair| pair.strip_prefix("root="))?;
        return Some(Path::new(root).join("lib/qemu"));
    }
    path.starts_with("/system").then(|| PathBuf::from("/var/lib/libvirt/qemu"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_local_without_a_host() {
        for uri in ["qemu:///system", "qemu+unix:///system?socket=/x", "qemu:///embed?root=/a"] {
            assert_eq!(remote_host(uri), None, "{uri}");
        }
        assert_eq!(remote_host("qemu+ssh://root@kvm1:22/system"), Some("root@kvm1:22"));
        assert_eq!(remote_host("qemu+tls://kvm1/system?x=/y"), Some("kvm1"));
    }

    #[test]
    fn qemu_state_lies_where_the_driver_puts_it() {
        assert_eq!(qemu_dir("qemu:///system"), Some("/var/lib/libvirt/qemu".into()));
        assert_eq!(qemu_dir("qemu+ssh://h/system"), Some("/var/lib/libvirt/qemu".into()));
        assert_eq!(qemu_dir("qemu:///embed?root=/a/b"), Some("/a/b/lib/qemu".into()));
        assert_eq!(qemu_dir("qemu:///session"), None);
    }
}
