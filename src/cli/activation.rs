//! Sockets and streams this process was started with: systemd's socket activation, and a client on
//! standard input and output.
#![allow(unsafe_code)] // An inherited descriptor is a number; each block says why it is ours.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use tokio::net::UnixStream;
use tokio::net::unix::pipe;

use crate::error::{Error, Kind, Result};
use crate::nbd::Stream;

/// The first descriptor that is passed (sd_listen_fds(3)).
const FIRST_FD: RawFd = 3;
/// More are not expected of anybody.
const FDS_MAX: RawFd = 64;

/// The listening sockets that were passed to this process, by `LISTEN_PID` and `LISTEN_FDS`. To be
/// called once, before anything else opens a descriptor by chance in their place.
pub(crate) fn sockets() -> Result<Vec<OwnedFd>> {
    let variable = |name: &str| std::env::var(name).ok();
    let pid = std::process::id().to_string();
    if variable("LISTEN_PID") != Some(pid) {
        return Ok(Vec::new());
    }
    let count = variable("LISTEN_FDS").and_then(|count| count.parse::<RawFd>().ok());
    let Some(count) = count.filter(|count| (1..=FDS_MAX).contains(count)) else {
        return Err(Error::new(Kind::Usage, "LISTEN_FDS is not a number of sockets"));
    };
    let socket = |number| {
        // SAFETY: it is not used but for the call that finds out whether it is open.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        // Children of ours must not inherit them.
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)
            .map_err(|e| Error::io("a socket of LISTEN_FDS is not open", e.into()))?;
        // SAFETY: whoever set LISTEN_PID to our id gave us these descriptors (sd_listen_fds(3)); they
        // were open before this program began, and nothing else here takes them.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    (FIRST_FD..FIRST_FD + count).map(socket).collect()
}

/// Fails when a standard stream is a terminal, a file or a device: no client is at its other end.
fn connected(fd: BorrowedFd<'_>, name: &str) -> Result<()> {
    use rustix::fs::FileType;
    let stat = rustix::fs::fstat(fd)
        .map_err(|e| Error::io(format!("cannot serve on {name}"), std::io::Error::from(e)))?;
    let is = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo | FileType::Socket => return Ok(()),
        FileType::RegularFile => "a file",
        FileType::CharacterDevice if rustix::termios::isatty(fd) => "a terminal",
        _ => "a device",
    };
    let message =
        format!("{name} is {is}: --stdio serves a client at the other end of a pipe or socket");
    Err(Error::new(Kind::Usage, message)
        .hint("let a client start it (connect_command of libnbd, ssh), or serve on --socket"))
}

/// Standard input and output as one stream: a socket that is both, or two pipes.
pub(crate) fn standard_streams() -> Result<Box<dyn Stream>> {
    let failed = |e: std::io::Error| Error::io("cannot serve on standard input and output", e);
    let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(failed);
    let (input, output) = (std::io::stdin(), std::io::stdout());
    connected(input.as_fd(), "standard input")?;
    connected(output.as_fd(), "standard output")?;
    let input = copy(input.as_fd())?;
    if rustix::net::sockopt::socket_type(&input).is_ok() {
        let stream = std::os::unix::net::UnixStream::from(input);
        stream.set_nonblocking(true).map_err(failed)?;
        return Ok(Box::new(UnixStream::from_std(stream).map_err(failed)?));
    }
    let reader = pipe::Receiver::from_file(File::from(input)).map_err(failed)?;
    let output = copy(output.as_fd())?;
    let writer = pipe::Sender::from_file(File::from(output)).map_err(failed)?;
    Ok(Box::new(tokio::io::join(reader, writer)))
}
