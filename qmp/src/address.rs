//! Where a monitor or agent listens: a unix socket or a TCP port, and the stream to it.
//!
//! A monitor gives whoever reaches it full power over the VM and its host process; a TCP monitor
//! has neither encryption nor authentication. Which one to trust is the caller's decision.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::error::{Error, Result};

/// The address of a monitor or agent socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A unix socket in the file system (`-qmp unix:PATH,server=on,wait=off`).
    Unix(PathBuf),
    /// `HOST:PORT` (`-qmp tcp:HOST:PORT,server=on,wait=off`).
    Tcp(String),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

impl From<PathBuf> for Address {
    fn from(path: PathBuf) -> Self {
        Self::Unix(path)
    }
}

/// Both directions of a connection, whatever it runs over.
pub(crate) struct Stream {
    pub(crate) reader: Box<dyn AsyncRead + Send + Unpin>,
    pub(crate) writer: Box<dyn AsyncWrite + Send + Unpin>,
}

impl Stream {
    fn new(
        reader: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Self {
        Self { reader: Box::new(reader), writer: Box::new(writer) }
    }
}

impl Address {
    /// Connects within `deadline`.
    pub(crate) async fn connect(&self, deadline: Duration) -> Result<Stream> {
        let connected = tokio::time::timeout(deadline, async {
            Ok::<Stream, std::io::Error>(match self {
                Self::Unix(path) => {
                    let (reader, writer) = UnixStream::connect(path).await?.into_split();
                    Stream::new(reader, writer)
                }
                Self::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    // Commands are small and waited for: never hold them back.
                    stream.set_nodelay(true)?;
                    let (reader, writer) = stream.into_split();
                    Stream::new(reader, writer)
                }
            })
        });
        match connected.await {
            Ok(Ok(stream)) => Ok(stream),
            // A unix socket whose backlog is full: QEMU serves one client and lets few queue.
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Err(Error::Occupied { peer: self.to_string(), waited: Duration::ZERO })
            }
            Ok(Err(source)) => Err(Error::Connect { peer: self.to_string(), source }),
            Err(_) => Err(Error::Connect {
                peer: self.to_string(),
                source: std::io::ErrorKind::TimedOut.into(),
            }),
        }
    }
}
