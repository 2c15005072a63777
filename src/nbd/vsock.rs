//! Streams between a virtual machine and its host (AF_VSOCK, vsock(7)).
//!
//! The runtime has no type for this family. Reading, writing, closing and waiting are those of any
//! stream, so sockets of this family pass for unix streams.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect as begin, getpeername,
    getsockname, listen, socket,
};
use rustix::net::SocketFlags;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Any address of this machine (linux/vm_sockets.h, `VMADDR_CID_ANY`).
const CID_ANY: u32 = u32::MAX;
/// Any free port (`VMADDR_PORT_ANY`).
const PORT_ANY: u32 = u32::MAX;

/// A stream to `port` of the machine `cid`. Cancel-safe.
pub(super) async fn connect(cid: u32, port: u32) -> io::Result<UnixStream> {
    let fd = new_socket()?;
    match begin(fd.as_raw_fd(), &VsockAddr::new(cid, port)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let stream = UnixStream::from_std(fd.into())?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// A socket that listens.
#[derive(Debug)]
pub(super) struct VsockListener {
    /// Never read or written: what it is waited for is a client.
    socket: UnixStream,
}

impl VsockListener {
    /// Listens on `port` for guests of this host, or for the host of this guest; 0: the system
    /// chooses.
    pub(super) fn bind(port: u32, backlog: u32) -> io::Result<Self> {
        let fd = new_socket()?;
        let port = if port == 0 { PORT_ANY } else { port };
        bind(fd.as_raw_fd(), &VsockAddr::new(CID_ANY, port))?;
        listen(&fd, Backlog::new(backlog.cast_signed())?)?;
        Self::of(fd)
    }

    /// Takes a socket that listens already and does not block.
    pub(super) fn of(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: UnixStream::from_std(fd.into())? })
    }

    /// The port, which the system may have chosen.
    pub(super) fn port(&self) -> io::Result<u32> {
        Ok(getsockname::<VsockAddr>(self.socket.as_raw_fd())?.port())
    }

    /// The next client, and what the log calls it. Cancel-safe.
    pub(super) async fn accept(&self) -> io::Result<(UnixStream, String)> {
        let accept = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            Ok(rustix::net::accept_with(self.socket.as_fd(), flags)?)
        };
        let fd = self.socket.async_io(Interest::READABLE, accept).await?;
        let name = match getpeername::<VsockAddr>(fd.as_raw_fd()) {
            Ok(peer) => format!("(vsock {}:{})", peer.cid(), peer.port()),
            Err(_) => "(vsock)".to_owned(),
        };
        Ok((UnixStream::from_std(fd.into())?, name))
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Vsock, SockType::Stream, flags, None)?)
}
