//! Streams between a virtual machine and its host, where the kernel loops them back (module
//! `vsock_loopback`, CID 1). On a machine without that there is nobody to talk to: a test says so and
//! ends; what can be seen of a port that listens is seen all the same.

#![allow(clippy::print_stderr)]

use std::sync::Arc;
use std::time::Duration;

use vmbackup::block::conformance;
use vmbackup::block::memory::MemoryDisk;
use vmbackup::error::Kind;
use vmbackup::nbd::server::{Export, Exports, Limits, Listener, Server};
use vmbackup::nbd::{Client, ClientOptions, NbdUri, Timeouts};

/// The machine itself (linux/vm_sockets.h, `VMADDR_CID_LOCAL`).
const CID_LOCAL: u32 = 1;
fn options() -> ClientOptions {
    let second = Duration::from_secs(1);
    let timeouts = Timeouts { handshake: 5 * second, stall: 20 * second, slow: 20 * second };
    ClientOptions { connections: 1, timeouts, ..ClientOptions::default() }
}

/// A listening port; none on a kernel without the family.
fn listener(port: u32) -> Option<Listener> {
    match Listener::vsock(port) {
        Ok(listener) => Some(listener),
        Err(error) if format!("{error:?}").contains("not supported") => {
            eprintln!("not tested: the kernel has no vsock");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_served_and_read_over_vsock() {
    let Some(listener) = listener(0) else { return };
    let port = listener.vsock_port().unwrap();
    let content = conformance::pattern((1 << 20) + 512);
    let disk = Arc::new(MemoryDisk::with_content(content.clone()));
    let server =
        Server::new(Exports::new([Export::read_only("", disk)]).unwrap(), Limits::default());
    let serving = server.clone();
    let listening = tokio::spawn(async move { serving.listen(listener).await });
    let uri: NbdUri = format!("nbd+vsock://{CID_LOCAL}:{port}/").parse().unwrap();
    match Client::open_uri(&uri, options()).await {
        Ok(client) => conformance::source(&client, &content).await,
        Err(error) if error.kind() == Kind::Timeout => {
            eprintln!("not tested: the kernel does not loop vsock back");
        }
        Err(error) => panic!("{error:?}"),
    }
    server.stop();
    tokio::time::timeout(Duration::from_secs(20), listening).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_port_of_vsock_that_is_taken_is_an_error_that_names_it() {
    let Some(first) = listener(0) else { return };
    let port = first.vsock_port().unwrap();
    let error = Listener::vsock(port).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains(&format!("vsock:{port}")), "{error:?}");
    drop(first);
    assert!(Listener::vsock(port).is_ok(), "it is free again");
}
