//! What must not lead to a session, and what the error says.

use vmbackup::error::{Error, Kind};
use vmbackup::nbd::tls::Mode;
use vmbackup::nbd::{Client, ClientOptions, NbdUri, Origin, Timeouts, Which, describe, list};

use crate::peers::{Peer, Program, Tls, Transport, Version};
use crate::pki::{KEY, Pki, Revoked};
use crate::support::{NbdServer, TestEnv};

/// All versions and programs must refuse alike.
const PEERS: [(Program, Version); 4] = [
    (Program::QemuNbd, Version::Tls12),
    (Program::QemuNbd, Version::Tls13),
    (Program::Nbdkit, Version::Tls12),
    (Program::Nbdkit, Version::Tls13),
];

async fn error_of(peer: &Peer, parameters: &str) -> Error {
    peer.open(parameters).await.map(|_| ()).expect_err(parameters)
}

/// The server's certificate is refused with this reason.
async fn certificate_refused(pki: &Pki, parameters: &str, reason: &str) {
    let tls = Tls::Certificates(pki.server());
    for (program, version) in PEERS {
        let peer = Peer::start(program, Transport::Tcp, &tls, version);
        let error = error_of(&peer, parameters).await;
        assert_eq!(error.kind(), Kind::Permission, "{error:?}");
        assert!(error.to_string().contains(reason), "{error}");
        assert!(list(&peer.secure_uri(parameters), Timeouts::default()).await.is_err());
    }
}

/// CVE-2024-7383 (libnbd): certificates were not checked in every case.
#[tokio::test(flavor = "multi_thread")]
async fn cve_2024_7383_a_certificate_of_an_authority_that_is_not_ours_is_refused() {
    let pki = Pki::new();
    let dir = format!("tls-certificates={}", pki.misled_client().display());
    certificate_refused(&pki, &dir, "certificate").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_authorities_of_the_system_do_not_include_ours() {
    let pki = Pki::new();
    certificate_refused(&pki, "", "issuer").await;
}

/// CVE-2024-7383 again: nor were the names in them.
#[tokio::test(flavor = "multi_thread")]
async fn cve_2024_7383_a_certificate_for_another_name_is_refused() {
    let pki = Pki::new();
    for name in ["other.example", "10.0.0.1", "sub.disks.example"] {
        let parameters = format!("tls-certificates={}&tls-hostname={name}", pki.client().display());
        certificate_refused(&pki, &parameters, "mismatch").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_out_of_date_is_refused() {
    for (days, reason) in [((-3, -1), "expired"), ((1, 3), "not yet valid")] {
        let pki = Pki::with_server_days(days);
        let peer_dir = format!("tls-certificates={}", pki.client().display());
        let tls = Tls::Certificates(pki.server());
        // qemu-nbd would not start with it.
        let peer = Peer::start(Program::Nbdkit, Transport::Tcp, &tls, Version::Tls13);
        let error = error_of(&peer, &peer_dir).await;
        assert_eq!(error.kind(), Kind::Permission, "{error:?}");
        assert!(error.to_string().contains(reason), "{error}");
        // The check is what refused it, nothing else.
        peer.open(&format!("{peer_dir}&tls-verify-peer=false")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_certificate_is_refused() {
    let pki = Pki::new();
    pki.revoke(Revoked::Server);
    let dir = format!("tls-certificates={}", pki.client().display());
    certificate_refused(&pki, &dir, "revoked").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_does_not_say_who_the_server_is() {
    let pki = Pki::new();
    let tls = Tls::Certificates(pki.server());
    let peer = Peer::start(Program::QemuNbd, Transport::Unix, &tls, Version::Tls13);
    let error = error_of(&peer, &format!("tls-certificates={}", pki.client().display())).await;
    assert_eq!(error.kind(), Kind::Usage, "{error:?}");
    assert!(error.hint_text().unwrap().contains("tls-hostname"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_wants_a_certificate_of_ours_refuses_us_without() {
    let pki = Pki::new();
    for (program, version) in PEERS {
        let peer = Peer::start(program, Transport::Tcp, &Tls::Mutual(pki.server()), version);
        for dir in [pki.bare_client(), pki.foreign_client()] {
            let error = error_of(&peer, &format!("tls-certificates={}", dir.display())).await;
            // In TLS 1.3 a server checks the client when the client is through with it, and some
            // servers just hang up.
            assert!([Kind::Permission, Kind::Connection].contains(&error.kind()), "{error:?}");
        }
        peer.open(&format!("tls-certificates={}", pki.client().display())).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_keys_and_unknown_users_are_refused() {
    let pki = Pki::new();
    for (program, version) in PEERS {
        let peer = Peer::start(program, Transport::Tcp, &Tls::Psk(pki.psk()), version);
        for line in [format!("vmbackup:{}", KEY.replace('9', "8")), format!("nobody:{KEY}")] {
            let file = pki.psk_with(&line);
            let error = error_of(&peer, &format!("tls-psk-file={}", file.display())).await;
            assert!([Kind::Permission, Kind::Connection].contains(&error.kind()), "{error:?}");
            assert!(!format!("{error:?}").contains(&KEY[8..16]), "{error:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_certificates_do_not_mix() {
    let pki = Pki::new();
    let keys = format!("tls-psk-file={}&tls-username=vmbackup", pki.psk().display());
    let certificates = format!("tls-certificates={}", pki.client().display());
    for program in [Program::QemuNbd, Program::Nbdkit] {
        let tls = Tls::Certificates(pki.server());
        let peer = Peer::start(program, Transport::Tcp, &tls, Version::Tls13);
        error_of(&peer, &keys).await;
        let peer = Peer::start(program, Transport::Tcp, &Tls::Psk(pki.psk()), Version::Tls13);
        error_of(&peer, &certificates).await;
        error_of(&peer, &format!("{certificates}&tls-verify-peer=false")).await;
    }
}

/// CVE-2019-14842 (libnbd): a client that required TLS went on without.
#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_14842_a_server_without_tls_is_refused() {
    let pki = Pki::new();
    let parameters = format!("tls-certificates={}", pki.client().display());
    for program in [Program::QemuNbd, Program::Nbdkit] {
        let peer = Peer::start(program, Transport::Tcp, &Tls::None, Version::Tls13);
        let error = error_of(&peer, &parameters).await;
        assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
        assert!(error.to_string().contains("does not offer TLS"), "{error}");
        // Nor is it asked anything else.
        let uri = peer.secure_uri(&parameters);
        let asked = describe(&uri, Which::One(""), Timeouts::default()).await.map(|_| ());
        assert_eq!(asked.unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(list(&uri, Timeouts::default()).await.unwrap_err().kind(), Kind::Unsupported);
        let mut allowed = peer.secure_uri(&parameters);
        allowed.tls.as_mut().unwrap().mode = Mode::Allowed;
        let client = Client::open_uri(&allowed, ClientOptions::default()).await.unwrap();
        assert_eq!(client.tls(), None, "it was allowed to");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oldstyle_server_is_refused_where_tls_is_required() {
    let env = TestEnv::new();
    let server = NbdServer::nbdkit(&env, &["-o", "null", "1M"]);
    let text = format!("nbds+unix:///?socket={}&tls-hostname=x", server.socket().display());
    let uri = NbdUri::parse(&text, Origin::CommandLine).unwrap();
    let result = Client::open_uri(&uri, ClientOptions::default()).await.map(|_| ());
    assert_eq!(result.unwrap_err().kind(), Kind::Unsupported);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_insists_on_tls_is_named_with_the_scheme_to_use() {
    let pki = Pki::new();
    for program in [Program::QemuNbd, Program::Nbdkit] {
        let peer = Peer::start(program, Transport::Tcp, &Tls::Psk(pki.psk()), Version::Tls13);
        let result = Client::open_uri(&peer.plain_uri(), ClientOptions::default()).await;
        let error = result.map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
        assert!(error.hint_text().unwrap().contains("nbds://"), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_not_what_they_should_be_are_named() {
    let pki = Pki::new();
    let tls = Tls::Certificates(pki.server());
    let peer = Peer::start(Program::Nbdkit, Transport::Tcp, &tls, Version::Tls13);
    let open = format!("tls-certificates={}", pki.client().display());
    let error = error_of(&peer, "tls-certificates=/nonexistent").await;
    assert!(error.to_string().contains("/nonexistent/ca-cert.pem"), "{error}");
    for file in ["client-key.pem", "client-cert.pem", "ca-cert.pem", "ca-crl.pem"] {
        let path = pki.client().join(file);
        let before = std::fs::read(&path).ok();
        std::fs::write(&path, "-----BEGIN").unwrap();
        let error = error_of(&peer, &open).await;
        assert_eq!(error.kind(), Kind::Usage, "{error:?}");
        assert!(error.to_string().contains(file), "{error}");
        match before {
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
    }
    peer.open(&open).await.unwrap();
}
