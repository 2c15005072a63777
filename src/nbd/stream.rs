//! Byte streams an NBD session can run over, and how to get one.
//!
//! A session needs a reader and a writer that work independently once requests fly; before that
//! it is one stream, so that TLS can be wrapped around it in the middle of the negotiation. A new
//! transport is one more implementation of [`Stream`] and, if it has an address of its own, of
//! [`Connector`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, Join};
use tokio::net::{TcpStream, UnixStream};

use super::tls::ClientTls;
use super::uri::{Address, NbdUri};
use super::vsock;
use crate::error::{Error, Kind, Result};

/// When a connection on which nothing moves is probed, how often, and how many answers may be missing:
/// a host that is gone is known to be after two minutes if all that was sent to it had been acknowledged,
/// and a connection between requests, or a long flush, survives a minute without a network. TCP_USER_TIMEOUT is not set: it would end a connection
/// to a server that is there and for so long reads nothing (tcp(7)).
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// The reading half of a [`Stream`].
pub type ReadHalf = Box<dyn AsyncRead + Send + Unpin>;
/// The writing half of a [`Stream`].
pub type WriteHalf = Box<dyn AsyncWrite + Send + Unpin>;

/// A byte stream in both directions.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {
    /// Takes it apart into halves that do not wait for each other.
    fn halves(self: Box<Self>) -> (ReadHalf, WriteHalf);
}

impl Stream for UnixStream {
    fn halves(self: Box<Self>) -> (ReadHalf, WriteHalf) {
        let (reader, writer) = self.into_split();
        (Box::new(reader), Box::new(writer))
    }
}

impl Stream for TcpStream {
    fn halves(self: Box<Self>) -> (ReadHalf, WriteHalf) {
        let (reader, writer) = self.into_split();
        (Box::new(reader), Box::new(writer))
    }
}

/// Both directions of a pipe in memory: tests.
impl Stream for DuplexStream {
    fn halves(self: Box<Self>) -> (ReadHalf, WriteHalf) {
        let (reader, writer) = tokio::io::split(*self);
        (Box::new(reader), Box::new(writer))
    }
}

/// A child's output and input, or any other pair.
impl<R, W> Stream for Join<R, W>
where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    fn halves(self: Box<Self>) -> (ReadHalf, WriteHalf) {
        let (reader, writer) = self.into_inner();
        (Box::new(reader), Box::new(writer))
    }
}

/// Makes streams to one server, as many as a client wants.
#[async_trait]
pub trait Connector: Send + Sync {
    /// The server as errors name it.
    fn peer(&self) -> Arc<str>;

    /// A new stream. The caller bounds the wait; cancel-safe.
    async fn connect(&self) -> Result<Box<dyn Stream>>;

    /// The TLS a session is to have; none by default.
    fn tls(&self) -> Option<&ClientTls> {
        None
    }

    /// The host name or address that the server's certificate must be for.
    fn host(&self) -> Option<&str> {
        None
    }
}

#[async_trait]
impl Connector for NbdUri {
    fn peer(&self) -> Arc<str> {
        self.to_string().into()
    }

    async fn connect(&self) -> Result<Box<dyn Stream>> {
        let failed = |e| not_reached(self, e);
        match &self.address {
            Address::Unix(path) => Ok(Box::new(UnixStream::connect(path).await.map_err(failed)?)),
            Address::Vsock { cid, port } => {
                Ok(Box::new(vsock::connect(*cid, *port).await.map_err(failed)?))
            }
            Address::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
                prepare(&stream).map_err(failed)?;
                Ok(Box::new(stream))
            }
        }
    }

    fn tls(&self) -> Option<&ClientTls> {
        self.tls.as_ref()
    }

    fn host(&self) -> Option<&str> {
        match &self.address {
            Address::Tcp { host, .. } => Some(host),
            Address::Unix(_) | Address::Vsock { .. } => None,
        }
    }
}

/// Makes a new connection fit for NBD, at either end of it.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Requests and replies are small and wanted at once (proto.md asks for it of both sides).
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    Ok(sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?)
}

/// Whatever the reason is, also a socket that is not there or a name that is unknown: nobody serves
/// there, and somebody may later.
fn not_reached(uri: &NbdUri, error: io::Error) -> Error {
    let message = format!("cannot connect to NBD server {uri}");
    match Error::io("", io::Error::from(error.kind())).kind() {
        Kind::Permission => Error::new(Kind::Permission, message)
            .hint("run as a user who may use the server's socket")
            .source(error),
        Kind::Timeout => Error::new(Kind::Timeout, message)
            .hint("check that the server runs and that no firewall is between")
            .source(error),
        _ => Error::new(Kind::Connection, message)
            .hint("check that the server runs, and the host, port or socket of its URI")
            .source(error),
    }
}

/// Runs `work`, at most for `limit`.
pub(super) async fn within<T>(
    limit: Duration,
    what: impl Fn() -> String,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(
            Kind::Timeout,
            format!("{} took longer than {} s", what(), limit.as_secs()),
        )),
    }
}
