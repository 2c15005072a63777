//! Streams between a virtual machine and its host (AF_VSOCK, vsock(7)).

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect as begin, socket};
use tokio::net::UnixStream;

/// A stream to `port` of the machine `cid`. Cancel-safe.
pub(super) async fn connect(cid: u32, port: u32) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    match begin(fd.as_raw_fd(), &VsockAddr::new(cid, port)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    // The runtime has no type for this family; reading, writing and closing are those of any stream.
    let stream = UnixStream::from_std(fd.into())?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}
