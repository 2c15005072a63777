//! Our client reads from each peer, over each transport, with each kind of credentials, in each
//! version.

use vmbackup::block::{conformance, read_all};
use vmbackup::nbd::{Access, Client, ClientOptions, InitialContent, NbdUri, Origin};

use crate::peers::{LEN, May, Peer, Program, Tls, Transport, Version, content};
use crate::pki::{Pki, Revoked, SERVER_NAME};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Certificates,
    Psk,
}

/// What a server needs for this, and the parameters of a client that comes in.
fn credentials(pki: &Pki, transport: Transport, kind: Kind) -> (Tls, String) {
    let (tls, parameters) = match kind {
        Kind::Certificates => {
            (Tls::Mutual(pki.server()), format!("tls-certificates={}", pki.client().display()))
        }
        Kind::Psk => (
            Tls::Psk(pki.psk()),
            format!("tls-psk-file={}&tls-username=vmbackup", pki.psk().display()),
        ),
    };
    let name = match (kind, transport) {
        // A unix socket has no name of its own.
        (Kind::Certificates, Transport::Unix) => format!("&tls-hostname={SERVER_NAME}"),
        _ => String::new(),
    };
    (tls, format!("{parameters}{name}"))
}

async fn reads(program: Program, transport: Transport, kind: Kind, version: Version) {
    let pki = Pki::new();
    let (tls, parameters) = credentials(&pki, transport, kind);
    let peer = Peer::start(program, transport, &tls, version);
    let client = peer.open(&parameters).await.unwrap();
    let session = client.tls().expect("the session is inside TLS");
    let expected = if version == Version::Tls12 { "TLSv1.2" } else { "TLSv1.3" };
    assert_eq!(session.version, expected);
    // ChaCha is what GnuTLS takes if it may, at a third of the speed.
    assert!(session.suite.contains("AES"), "{session:?}");
    conformance::source(&client, &content()).await;
}

/// One test per cell, named after its claim.
macro_rules! cells {
    ($($name:ident: $program:ident $transport:ident $kind:ident $version:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            reads(Program::$program, Transport::$transport, Kind::$kind, Version::$version).await;
        }
    )*};
}

cells! {
    qemu_nbd_over_unix_with_certificates_in_tls_12: QemuNbd Unix Certificates Tls12;
    qemu_nbd_over_unix_with_certificates_in_tls_13: QemuNbd Unix Certificates Tls13;
    qemu_nbd_over_unix_with_keys_in_tls_12: QemuNbd Unix Psk Tls12;
    qemu_nbd_over_unix_with_keys_in_tls_13: QemuNbd Unix Psk Tls13;
    qemu_nbd_over_tcp_with_certificates_in_tls_12: QemuNbd Tcp Certificates Tls12;
    qemu_nbd_over_tcp_with_certificates_in_tls_13: QemuNbd Tcp Certificates Tls13;
    qemu_nbd_over_tcp_with_keys_in_tls_12: QemuNbd Tcp Psk Tls12;
    qemu_nbd_over_tcp_with_keys_in_tls_13: QemuNbd Tcp Psk Tls13;
    nbdkit_over_unix_with_certificates_in_tls_12: Nbdkit Unix Certificates Tls12;
    nbdkit_over_unix_with_certificates_in_tls_13: Nbdkit Unix Certificates Tls13;
    nbdkit_over_unix_with_keys_in_tls_12: Nbdkit Unix Psk Tls12;
    nbdkit_over_unix_with_keys_in_tls_13: Nbdkit Unix Psk Tls13;
    nbdkit_over_tcp_with_certificates_in_tls_12: Nbdkit Tcp Certificates Tls12;
    nbdkit_over_tcp_with_certificates_in_tls_13: Nbdkit Tcp Certificates Tls13;
    nbdkit_over_tcp_with_keys_in_tls_12: Nbdkit Tcp Psk Tls12;
    nbdkit_over_tcp_with_keys_in_tls_13: Nbdkit Tcp Psk Tls13;
}

async fn writes(program: Program, transport: Transport, kind: Kind) {
    let pki = Pki::new();
    let (tls, parameters) = credentials(&pki, transport, kind);
    let peer = Peer::start_as(program, (transport, May::Write), &tls, Version::Tls13);
    let access = Access::Write(InitialContent::Unknown);
    let options = ClientOptions { access, ..ClientOptions::default() };
    let client = Client::open_uri(&peer.secure_uri(&parameters), options).await.unwrap();
    assert!(client.tls().is_some());
    conformance::sink(&client, || async { read_all(&client, LEN).await.unwrap() }).await;
}

macro_rules! written {
    ($($name:ident: $program:ident $transport:ident $kind:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            writes(Program::$program, Transport::$transport, Kind::$kind).await;
        }
    )*};
}

written! {
    qemu_nbd_takes_writes_over_unix_with_certificates: QemuNbd Unix Certificates;
    qemu_nbd_takes_writes_over_tcp_with_keys: QemuNbd Tcp Psk;
    nbdkit_takes_writes_over_unix_with_keys: Nbdkit Unix Psk;
    nbdkit_takes_writes_over_tcp_with_certificates: Nbdkit Tcp Certificates;
}

async fn reads_plain_tcp(program: Program) {
    let peer = Peer::start(program, Transport::Tcp, &Tls::None, Version::Tls13);
    let client = Client::open_uri(&peer.plain_uri(), ClientOptions::default()).await.unwrap();
    assert!(client.tls().is_none());
    conformance::source(&client, &content()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_nbd_over_plain_tcp_is_read_where_no_tls_is_wanted() {
    reads_plain_tcp(Program::QemuNbd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdkit_over_plain_tcp_is_read_where_no_tls_is_wanted() {
    reads_plain_tcp(Program::Nbdkit).await;
}

/// Whether a client to which TLS is welcome (`tls=on`) has it.
async fn is_upgraded(program: Program, tls: &Tls, parameters: &str) -> bool {
    let peer = Peer::start(program, Transport::Tcp, tls, Version::Tls13);
    let uri = format!("{}?tls=on&{parameters}", peer.plain_uri());
    let uri = NbdUri::parse(&uri, Origin::CommandLine).unwrap();
    let client = Client::open_uri(&uri, ClientOptions::default()).await.unwrap();
    conformance::source(&client, &content()).await;
    client.tls().is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_nbd_with_tls_is_read_in_it_where_tls_is_welcome_and_without_it_in_plain_text() {
    let pki = Pki::new();
    let (tls, parameters) = credentials(&pki, Transport::Tcp, Kind::Certificates);
    assert!(is_upgraded(Program::QemuNbd, &tls, &parameters).await);
    assert!(!is_upgraded(Program::QemuNbd, &Tls::None, &parameters).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdkit_with_tls_is_read_in_it_where_tls_is_welcome_and_without_it_in_plain_text() {
    let pki = Pki::new();
    let (tls, parameters) = credentials(&pki, Transport::Tcp, Kind::Psk);
    assert!(is_upgraded(Program::Nbdkit, &tls, &parameters).await);
    assert!(!is_upgraded(Program::Nbdkit, &Tls::None, &parameters).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_revokes_another_certificate_changes_nothing() {
    let pki = Pki::new();
    pki.revoke(Revoked::Another);
    let tls = Tls::Certificates(pki.server());
    let peer = Peer::start(Program::Nbdkit, Transport::Tcp, &tls, Version::Tls13);
    let client = peer.open(&format!("tls-certificates={}", pki.client().display())).await.unwrap();
    assert_eq!(client.export().size_bytes, LEN as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_user_of_a_key_file_needs_no_name() {
    let pki = Pki::new();
    let own = pki.psk_with(&format!("vmbackup:{}\n", crate::pki::KEY));
    let tls = Tls::Psk(pki.psk());
    let peer = Peer::start(Program::QemuNbd, Transport::Tcp, &tls, Version::Tls13);
    peer.open(&format!("tls-psk-file={}", own.display())).await.unwrap();
}
