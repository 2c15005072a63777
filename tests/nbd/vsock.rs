//! Streams between a virtual machine and its host, where the kernel loops them back (module
//! `vsock_loopback`, CID 1). On a machine without that there is nobody to talk to: the test says so
//! and ends.

#![allow(clippy::print_stderr)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, getsockname, listen, socket,
};
use vmbackup::block::conformance;
use vmbackup::block::memory::MemoryDisk;
use vmbackup::error::Kind;
use vmbackup::nbd::server::{Export, Exports, Limits, Server};
use vmbackup::nbd::{Client, ClientOptions, NbdUri, Timeouts};

/// The machine itself (linux/vm_sockets.h, `VMADDR_CID_LOCAL`).
const CID_LOCAL: u32 = 1;
/// Any free port (`VMADDR_PORT_ANY`).
const PORT_ANY: u32 = u32::MAX;

fn options() -> ClientOptions {
    let second = Duration::from_secs(1);
    let timeouts = Timeouts { handshake: 5 * second, stall: 20 * second };
    ClientOptions { connections: 1, timeouts, ..ClientOptions::default() }
}

/// A listening socket of this machine only, and its port.
fn listener() -> Option<(OwnedFd, u32)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None).ok()?;
    bind(fd.as_raw_fd(), &VsockAddr::new(CID_LOCAL, PORT_ANY)).ok()?;
    listen(&fd, Backlog::new(4).unwrap()).ok()?;
    let port = getsockname::<VsockAddr>(fd.as_raw_fd()).ok()?.port();
    Some((fd, port))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_read_over_vsock() {
    let Some((fd, port)) = listener() else {
        eprintln!("not tested: the kernel has no loopback for vsock");
        return;
    };
    let content = conformance::pattern((1 << 20) + 512);
    let disk = Arc::new(MemoryDisk::with_content(content.clone()));
    let server =
        Server::new(Exports::new([Export::read_only("", disk)]).unwrap(), Limits::default());
    let serving = server.clone();
    let runtime = tokio::runtime::Handle::current();
    std::thread::spawn(move || {
        // Reading, writing and closing are those of any stream.
        let stream = std::os::unix::net::UnixStream::from(rustix::net::accept(&fd).unwrap());
        stream.set_nonblocking(true).unwrap();
        let _guard = runtime.enter();
        let stream = tokio::net::UnixStream::from_std(stream).unwrap();
        runtime.block_on(async { serving.session(Box::new(stream), "(vsock)").await }).unwrap();
    });
    let uri: NbdUri = format!("nbd+vsock://{CID_LOCAL}:{port}/").parse().unwrap();
    match Client::open_uri(&uri, options()).await {
        Ok(client) => conformance::source(&client, &content).await,
        Err(error) if error.kind() == Kind::Timeout => {
            eprintln!("not tested: the kernel does not loop vsock back");
        }
        Err(error) => panic!("{error:?}"),
    }
}
