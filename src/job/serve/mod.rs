//! Serving disks over NBD: those of points straight from the repository, images, other exports.
//!
//! ```text
//!  hold ► points ► disks: DiskReader ─► cache ─► (overlay) ─┐
//!                  image, URI ─────────────────► (in place) ┴► exports
//!  exports ► listen … stop ► flush ► end the hold
//! ```
//!
//! A point's disk tells which of its ranges differ from those of an earlier point, by content: the
//! chunks of both are compared (meta context `qemu:dirty-bitmap:…`). Disks of points also tell
//! where their bytes are (`qemu:allocation-depth`): in the overlay, in the point, or nowhere.
//!
//! The hold on the repository begins before the points are looked up, so that what is served stays
//! readable, also when the point is forgotten and garbage collected meanwhile.
//!
//! A point is never changed: writes go to an overlay that is thrown away or kept. An image is
//! written in place, raw ones only: a program that is killed while it writes another format may
//! leave an image that nobody can open.
//!
//! A disk that is written may grow while it is served: an overlay that is kept when another process
//! is asked to serve it with a larger size, an image when its file has become longer. Clients that
//! connect afterwards see the new size.
//!
//! No disk leaves this host in plain text unless [`PlainText::Anywhere`] says so, whether the
//! socket is ours or was handed to us.

mod disks;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::source::DiskSpec;
use super::{Env, Repository};
use crate::block::BlockSink;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::nbd::server::{Exports, Listener, Server};
use crate::nbd::tls::{ClientTls, Credentials, Mode, ServerTls, ServerTlsOptions};
use crate::nbd::{Address, NbdUri, Stream};
use crate::repo::Lease;
use crate::vm::PointId;

pub use crate::nbd::server::Limits;

/// The host, as its guests call it (vsock(7), `VMADDR_CID_HOST`).
const CID_HOST: u32 = 2;

/// What to serve, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// The disks.
    pub what: Vec<Served>,
    /// Only these disks of points; all when empty.
    pub disks: Vec<String>,
    /// What clients may do.
    pub access: Access,
    /// Points since which changes are told, as `qemu:dirty-bitmap:` and the first digits of the
    /// point's id, for each disk of the same name. Not for writable disks: what is written to them
    /// would not be among the changes.
    pub changes_since: Vec<String>,
    /// Memory for chunks of the repository, shared by all disks.
    pub cache_bytes: u64,
    /// What clients may make us hold.
    pub limits: Limits,
    /// TLS, if there is to be any.
    pub tls: Option<ServerTlsOptions>,
    /// Where disks may go without it.
    pub plain_text: PlainText,
}

/// Where disks may go in plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlainText {
    /// To programs on this host.
    ThisHost,
    /// To whoever reaches the socket.
    Anywhere,
}

/// Something with disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// A point, as it was named.
    Point(String),
    /// An image or an export.
    Disk(DiskSpec),
}

/// What clients may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    ReadOnly,
    /// Write: to an overlay of a point, to an image itself.
    Writable {
        /// The file in which the overlay is kept; without one it is thrown away.
        overlay: Option<PathBuf>,
        /// Where overlays that are thrown away are made.
        scratch: PathBuf,
        /// Size of the disk of a point, if it is to be larger.
        size_bytes: Option<u64>,
    },
}

/// Where clients come from.
#[derive(Debug)]
pub enum Endpoint {
    /// A unix socket to be made.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
    /// A vsock port of this machine.
    Vsock(u32),
    /// A socket that listens already.
    Inherited(OwnedFd),
}

/// What is served, and where.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The exports.
    pub exports: Vec<ExportReport>,
}

/// A served disk.
#[derive(Clone, Debug, Serialize)]
pub struct ExportReport {
    /// Its name.
    pub name: String,
    /// What it is.
    pub description: String,
    /// Where clients find it; `null` where only who handed us the socket knows.
    pub uri: Option<String>,
    /// Its size.
    pub size_bytes: u64,
    /// Since which points changes are told.
    pub changes: Vec<Changes>,
    /// Whether clients may write.
    pub writable: bool,
}

/// A point since which changes are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// The point.
    pub since: PointId,
    /// The meta context that tells.
    pub context: String,
}

/// An open server.
pub struct Serving {
    server: Server,
    listeners: Vec<Listener>,
    report: Report,
    /// Flushed at the end.
    sinks: Vec<(String, Arc<dyn BlockSink>)>,
    hold: Option<Lease>,
}

/// Opens everything; clients can connect when this returns, and are served by [`Serving::run`].
/// `repository` is needed if a point is named.
pub async fn open(
    repository: Option<&Repository>,
    request: Request,
    endpoints: Vec<Endpoint>,
    env: &Env,
) -> Result<Serving> {
    // Before anything is locked or listens.
    request.limits.check()?;
    let tls = request.tls.as_ref().map(ServerTls::load).transpose()?;
    let hold = match repository {
        Some(repository) => match repository.hold().await {
            // Served all the same: what is forgotten and collected meanwhile then fails to read.
            Err(error) if matches!(error.kind(), Kind::Permission | Kind::NoSpace) => {
                tracing::warn!(%error, "points are served without a hold against gc");
                None
            }
            held => Some(held?),
        },
        None => None,
    };
    let opened = open_disks(repository, (&request, tls), endpoints, env).await;
    match opened {
        Ok(serving) => Ok(Serving { hold, ..serving }),
        Err(error) => {
            end(hold).await;
            Err(error)
        }
    }
}

async fn open_disks(
    repository: Option<&Repository>,
    (request, tls): (&Request, Option<ServerTls>),
    endpoints: Vec<Endpoint>,
    env: &Env,
) -> Result<Serving> {
    let disks = disks::open(repository, request, env).await?;
    let mut sinks = Vec::new();
    let mut exports = Vec::new();
    let mut report = Report { exports: Vec::new() };
    for disk in disks {
        report.exports.push(disk.report());
        if let Some(sink) = &disk.sink {
            sinks.push((disk.name.clone(), Arc::clone(sink)));
        }
        exports.push(disk.into_export());
    }
    let server = Server::with_tls(Exports::new(exports)?, request.limits, tls);
    let mut listeners = Vec::new();
    for endpoint in endpoints {
        let (listener, address) = listen(endpoint, request).await?;
        for export in &mut report.exports {
            let uri = |address| request.uri(address, &export.name).to_string();
            export.uri = export.uri.take().or_else(|| address.clone().map(uri));
        }
        listeners.push(listener);
    }
    Ok(Serving { server, listeners, report, sinks, hold: None })
}

async fn listen(endpoint: Endpoint, request: &Request) -> Result<(Listener, Option<Address>)> {
    match endpoint {
        Endpoint::Unix(path) => {
            let path = std::path::absolute(&path)
                .map_err(|e| Error::io(format!("cannot resolve {}", path.display()), e))?;
            Ok((Listener::unix(&path)?, Some(Address::Unix(path))))
        }
        Endpoint::Tcp(address) => {
            request.check_address(address)?;
            let listener = Listener::tcp(address).await?;
            let address = listener.tcp_address().unwrap_or(address);
            let (host, port) = (address.ip().to_string(), address.port());
            Ok((listener, Some(Address::Tcp { host, port })))
        }
        Endpoint::Vsock(port) => {
            request.check_vsock(port)?;
            let listener = Listener::vsock(port)?;
            let port = listener.vsock_port().unwrap_or(port);
            Ok((listener, Some(Address::Vsock { cid: CID_HOST, port })))
        }
        Endpoint::Inherited(socket) => {
            let listener = Listener::inherited(socket)?;
            if let Some(address) = listener.tcp_address() {
                request.check_address(address)?;
            }
            if let Some(port) = listener.vsock_port() {
                request.check_vsock(port)?;
            }
            Ok((listener, None))
        }
    }
}

impl Request {
    /// Refuses to show disks to other hosts in plain text without having been told to.
    fn check_address(&self, address: SocketAddr) -> Result<()> {
        if address.ip().is_loopback() {
            return Ok(());
        }
        self.check_exposure(&format!("{address} can be reached by other hosts"))
    }

    /// The same for the guests of this host, of which any may connect.
    fn check_vsock(&self, port: u32) -> Result<()> {
        self.check_exposure(&format!("vsock:{port} can be reached by other guests"))
    }

    fn check_exposure(&self, reached: &str) -> Result<()> {
        let required = self.tls.as_ref().is_some_and(|tls| tls.mode == Mode::Required);
        if required || self.plain_text == PlainText::Anywhere {
            return Ok(());
        }
        let message = format!("{reached}, and clients may go without TLS");
        Err(Error::new(Kind::Usage, message).hint(
            "require TLS (--tls-certificates or --tls-psk-file), use a unix socket and ssh, or say \
             --insecure-tcp if the network is trusted",
        ))
    }

    /// How a client names an export. What it needs to have of its own for TLS is its business.
    fn uri(&self, address: Address, export: &str) -> NbdUri {
        let tls = self.tls.as_ref().map(|_| ClientTls::required(Credentials::SystemAuthorities));
        NbdUri { tls, ..NbdUri::at(address, export) }
    }
}

impl Serving {
    /// What is served, and where.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Serves until `control` is cancelled, which is how a server is meant to end: in progress
    /// requests are finished, then everything is flushed.
    pub async fn run(self, control: &Control) -> Result<()> {
        let Self { server, listeners, sinks, hold, .. } = self;
        control.set_phase("serving");
        let mut listening = tokio::task::JoinSet::new();
        for listener in listeners {
            let server = server.clone();
            listening.spawn(async move { server.listen(listener).await });
        }
        control.cancelled().await;
        control.set_phase("stopping");
        server.stop();
        while listening.join_next().await.is_some() {}
        finish(sinks, hold).await
    }

    /// Serves one client on a stream (standard input and output, say), until it leaves.
    pub async fn run_single(self, stream: Box<dyn Stream>, control: &Control) -> Result<()> {
        let Self { server, sinks, hold, .. } = self;
        control.set_phase("serving");
        let stop = async {
            control.cancelled().await;
            server.stop();
            std::future::pending::<()>().await;
        };
        let served = tokio::select! {
            served = server.session(stream, "(standard input)") => served,
            () = stop => Ok(()),
        };
        if let Err(error) = &served {
            control.notice(NoticeLevel::Warning, error.to_string());
        }
        served.and(finish(sinks, hold).await)
    }
}

/// Makes what clients wrote durable, and lets go of the repository.
async fn finish(sinks: Vec<(String, Arc<dyn BlockSink>)>, hold: Option<Lease>) -> Result<()> {
    let mut result = Ok(());
    for (name, sink) in sinks {
        let flushed = sink.flush().await;
        result = result
            .and(flushed.map_err(|e| e.context(format!("what was written to {name} may be lost"))));
    }
    end(hold).await;
    result
}

async fn end(hold: Option<Lease>) {
    if let Some(hold) = hold
        && let Err(error) = hold.end().await
    {
        tracing::warn!(%error, "cannot end the hold on the repository; it lapses by itself");
    }
}

/// A point was named without a repository: the face sees to it that this does not happen.
fn no_repository(point: &str) -> Error {
    Error::new(Kind::Internal, format!("no repository was opened for point {point}"))
}
