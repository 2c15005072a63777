//! Where clients come from: a unix socket, a TCP or vsock port, a socket somebody else opened.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::net::{TcpListener, UnixListener};

use crate::error::{Error, Kind, Result};
use crate::nbd::stream::{Stream, prepare};
use crate::nbd::vsock::VsockListener;

/// Connections that wait in the kernel.
const BACKLOG: u32 = 128;

/// A socket that listens.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    /// Removed when the listener is dropped.
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
    Vsock(VsockListener),
}

impl Listener {
    /// Listens on a new unix socket that only this user can connect to. What a server that was
    /// killed left at `path` is replaced; [`Kind::Busy`] if a server listens there. Must be called
    /// within a runtime, as the others.
    pub fn unix(path: &Path) -> Result<Self> {
        remove_stale(path)?;
        let failed = |e: io::Error| Error::io(format!("cannot listen on {}", path.display()), e);
        let listener = bind_private(path).map_err(failed)?;
        let file = SocketFile::at(path).map_err(failed)?;
        let socket = UnixListener::from_std(listener).map_err(failed)?;
        Ok(Self { socket: Socket::Unix(socket), _file: Some(file) })
    }

    /// Listens on a TCP address. The plain text of a disk then goes over the network: whether that
    /// is wanted is the caller's decision.
    pub async fn tcp(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|e| Error::io(format!("cannot listen on {address}"), e))?;
        Ok(Self { socket: Socket::Tcp(listener), _file: None })
    }

    /// Listens on a vsock port, for guests of this host or for the host of this guest; 0: the
    /// system chooses. Plain text as over TCP: every guest that has a vsock device can connect.
    pub fn vsock(port: u32) -> Result<Self> {
        let listener = VsockListener::bind(port, BACKLOG);
        let listener =
            listener.map_err(|e| Error::io(format!("cannot listen on vsock:{port}"), e))?;
        Ok(Self { socket: Socket::Vsock(listener), _file: None })
    }

    /// Takes a socket that listens already (socket activation).
    pub fn inherited(fd: OwnedFd) -> Result<Self> {
        let failed = |e: io::Error| Error::io("cannot use the inherited socket", e);
        // What was handed over is believed as little as a client (the kernel's own NBD client took
        // sockets of any type, CVE-2025-40080).
        let kind = rustix::net::sockopt::socket_type(&fd).map_err(|e| failed(e.into()))?;
        let listens = rustix::net::sockopt::socket_acceptconn(&fd).map_err(|e| failed(e.into()))?;
        if kind != SocketType::STREAM || !listens {
            let message = "the inherited socket is not one that listens for streams";
            return Err(Error::new(Kind::Unsupported, message));
        }
        let domain = rustix::net::sockopt::socket_domain(&fd).map_err(|e| failed(e.into()))?;
        let socket = match domain {
            AddressFamily::UNIX => {
                let listener = std::os::unix::net::UnixListener::from(fd);
                listener.set_nonblocking(true).map_err(failed)?;
                Socket::Unix(UnixListener::from_std(listener).map_err(failed)?)
            }
            AddressFamily::INET | AddressFamily::INET6 => {
                let listener = std::net::TcpListener::from(fd);
                listener.set_nonblocking(true).map_err(failed)?;
                Socket::Tcp(TcpListener::from_std(listener).map_err(failed)?)
            }
            AddressFamily::VSOCK => {
                rustix::io::ioctl_fionbio(&fd, true).map_err(|e| failed(e.into()))?;
                Socket::Vsock(VsockListener::of(fd).map_err(failed)?)
            }
            _ => {
                let message = "the inherited socket is not a unix, TCP or vsock socket";
                return Err(Error::new(Kind::Unsupported, message));
            }
        };
        Ok(Self { socket, _file: None })
    }

    /// The address of a TCP socket, with the port the system chose.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Unix(_) | Socket::Vsock(_) => None,
            Socket::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    /// The port of a vsock socket, which the system may have chosen.
    pub fn vsock_port(&self) -> Option<u32> {
        match &self.socket {
            Socket::Unix(_) | Socket::Tcp(_) => None,
            Socket::Vsock(listener) => listener.port().ok(),
        }
    }

    /// The next client: its stream, and what the log calls it. Cancel-safe.
    pub(super) async fn accept(&self) -> io::Result<(Box<dyn Stream>, String)> {
        match &self.socket {
            Socket::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
                let name = pid.map_or_else(|| "(unix)".to_owned(), |pid| format!("(pid {pid})"));
                Ok((Box::new(stream), name))
            }
            Socket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                prepare(&stream)?;
                Ok((Box::new(stream), peer.to_string()))
            }
            Socket::Vsock(listener) => {
                let (stream, name) = listener.accept().await?;
                Ok((Box::new(stream), name))
            }
        }
    }
}

/// Makes the socket and its permissions before anybody can connect: until `listen` a connection is
/// refused, so there is no instant with a mode the umask chose.
fn bind_private(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&fd, &rustix::net::SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&fd, BACKLOG.cast_signed())?;
    Ok(fd.into())
}

/// Removes a socket nobody listens on any more; anything else at `path` is an error.
fn remove_stale(path: &Path) -> Result<()> {
    let shown = path.display();
    let failed = |e| Error::io(format!("cannot listen on {shown}"), e);
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => {
            let message = format!("{shown} exists and is no socket");
            return Err(Error::new(Kind::AlreadyExists, message));
        }
    }
    // Not waiting: a server whose backlog is full (EAGAIN) is one as well.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let tried = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .and_then(|fd| rustix::net::connect(&fd, &rustix::net::SocketAddrUnix::new(path)?));
    match tried {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed),
        Err(error) if error != Errno::AGAIN => Err(failed(error.into())),
        _ => Err(Error::new(Kind::Busy, format!("another server listens on {shown}"))),
    }
}

/// The file of a unix socket; removed with this, unless another has taken its name.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), inode: inode(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            // Left behind it would be found stale by the next server.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_takes_no_more_clients_is_not_waited_for() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("s");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = || {
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
        };
        let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
        let server = socket();
        rustix::net::bind(&server, &address).unwrap();
        rustix::net::listen(&server, 0).unwrap();
        let mut waiting = Vec::new();
        loop {
            let client = socket();
            if rustix::net::connect(&client, &address).is_err() {
                break;
            }
            waiting.push(client);
        }
        assert_eq!(remove_stale(&path).unwrap_err().kind(), Kind::Busy);
        drop((server, waiting));
        remove_stale(&path).unwrap();
        assert!(!path.exists());
    }
}
