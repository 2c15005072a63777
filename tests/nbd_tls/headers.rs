//! Every style of headers over every transport, in plain text and in TLS: against our own server, with
//! which all three can be had, and against peers that have two or three.

use vmbackup::block::conformance;
use vmbackup::nbd::wire::HeaderStyle;
use vmbackup::nbd::{Client, ClientOptions, NbdUri, Origin};

use crate::client::{credentials, writing};
use crate::peers::{How, Peer, Program, Transport, content};
use crate::pki::{Kind, Pki};
use crate::server::Rig;
use crate::versions::qemu_nbd_version;

/// Our client writes to our server and reads what it wrote.
async fn ours(headers: HeaderStyle, transport: Transport, kind: Kind) {
    let pki = Pki::new();
    let (rig, disk) = Rig::of_blank(&pki, transport, kind);
    let (_, parameters) = credentials(&pki, transport, kind);
    let scheme = if kind == Kind::Plain { "nbd" } else { "nbds" };
    let uri = NbdUri::parse(&rig.uri(scheme, "", &parameters), Origin::CommandLine).unwrap();
    let client = Client::open_uri(&uri, ClientOptions { headers, ..writing() }).await.unwrap();
    assert_eq!((client.header_style(), client.connection_count()), (headers, 2));
    assert_eq!(client.tls().is_some(), kind != Kind::Plain);
    conformance::sink(&client, || async { disk.content() }).await;
    conformance::source(&client, &disk.content()).await;
}

/// One test per cell, named after its claim.
macro_rules! ours {
    ($($name:ident: $style:ident $transport:ident $kind:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            ours(HeaderStyle::$style, Transport::$transport, Kind::$kind).await;
        }
    )*};
}

ours! {
    our_server_with_simple_headers_over_unix: Simple Unix Plain;
    our_server_with_simple_headers_over_unix_with_certificates: Simple Unix Certificates;
    our_server_with_simple_headers_over_unix_with_keys: Simple Unix Psk;
    our_server_with_simple_headers_over_tcp: Simple Tcp Plain;
    our_server_with_simple_headers_over_tcp_with_certificates: Simple Tcp Certificates;
    our_server_with_simple_headers_over_tcp_with_keys: Simple Tcp Psk;
    our_server_with_structured_headers_over_unix: Structured Unix Plain;
    our_server_with_structured_headers_over_unix_with_certificates: Structured Unix Certificates;
    our_server_with_structured_headers_over_unix_with_keys: Structured Unix Psk;
    our_server_with_structured_headers_over_tcp: Structured Tcp Plain;
    our_server_with_structured_headers_over_tcp_with_certificates: Structured Tcp Certificates;
    our_server_with_structured_headers_over_tcp_with_keys: Structured Tcp Psk;
    our_server_with_extended_headers_over_unix: Extended Unix Plain;
    our_server_with_extended_headers_over_unix_with_certificates: Extended Unix Certificates;
    our_server_with_extended_headers_over_unix_with_keys: Extended Unix Psk;
    our_server_with_extended_headers_over_tcp: Extended Tcp Plain;
    our_server_with_extended_headers_over_tcp_with_certificates: Extended Tcp Certificates;
    our_server_with_extended_headers_over_tcp_with_keys: Extended Tcp Psk;
}

/// Our client, which may ask for these at best, reads from a peer.
async fn theirs(
    program: Program,
    (headers, expected): (HeaderStyle, HeaderStyle),
    how: How,
    kind: Kind,
) {
    let pki = Pki::new();
    let (tls, parameters) = credentials(&pki, how.transport, kind);
    let peer = Peer::start_as(program, &tls, how);
    let options = ClientOptions { headers, ..ClientOptions::default() };
    let client = Client::open_uri(&peer.uri(kind, &parameters), options).await.unwrap();
    assert_eq!(client.header_style(), expected);
    conformance::source(&client, &content()).await;
}

macro_rules! theirs {
    ($($name:ident: $program:ident $style:ident $transport:ident $kind:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            let style = HeaderStyle::$style;
            let how = How::over(Transport::$transport);
            theirs(Program::$program, (style, style), how, Kind::$kind).await;
        }
    )*};
}

theirs! {
    qemu_nbd_with_simple_headers_over_tcp: QemuNbd Simple Tcp Plain;
    qemu_nbd_with_simple_headers_over_tcp_with_certificates: QemuNbd Simple Tcp Certificates;
    qemu_nbd_with_simple_headers_over_unix_with_keys: QemuNbd Simple Unix Psk;
    qemu_nbd_with_structured_headers_over_tcp: QemuNbd Structured Tcp Plain;
    qemu_nbd_with_structured_headers_over_tcp_with_certificates: QemuNbd Structured Tcp Certificates;
    qemu_nbd_with_structured_headers_over_unix_with_keys: QemuNbd Structured Unix Psk;
    qemu_storage_daemon_with_structured_headers_over_tcp_with_keys: StorageDaemon Structured Tcp Psk;
    nbdkit_with_simple_headers_over_tcp: Nbdkit Simple Tcp Plain;
    nbdkit_with_simple_headers_over_unix_with_certificates: Nbdkit Simple Unix Certificates;
    nbdkit_with_structured_headers_over_tcp: Nbdkit Structured Tcp Plain;
    nbdkit_with_structured_headers_over_tcp_with_keys: Nbdkit Structured Tcp Psk;
    nbdkit_with_structured_headers_over_unix_with_certificates: Nbdkit Structured Unix Certificates;
}

/// The best there is, over TCP.
async fn best(program: Program, args: &'static [&'static str], expected: HeaderStyle, kind: Kind) {
    let how = How { args, ..How::over(Transport::Tcp) };
    theirs(program, (HeaderStyle::Extended, expected), how, kind).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_with_extended_headers_over_tcp_with_and_without_tls() {
    // They came with QEMU 8.2 (docs/interop/nbd.txt).
    let extended = qemu_nbd_version() >= (8, 2);
    let expected = if extended { HeaderStyle::Extended } else { HeaderStyle::Structured };
    for program in [Program::QemuNbd, Program::StorageDaemon] {
        for kind in [Kind::Plain, Kind::Certificates, Kind::Psk] {
            best(program, &[], expected, kind).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdkit_that_lacks_structured_replies_over_tcp_with_and_without_tls() {
    for kind in [Kind::Plain, Kind::Certificates, Kind::Psk] {
        best(Program::Nbdkit, &["--no-sr"], HeaderStyle::Simple, kind).await;
    }
}
