//! Our client in TLS against nbd-server, which checks the certificates of its clients by itself.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use vmbackup::block::conformance;
use vmbackup::error::Result;
use vmbackup::nbd::{Client, ClientOptions, NbdUri, Origin};

use crate::peers::content;
use crate::pki::Pki;
use crate::support::wait_until;

/// A server, which goes into the background; ended with this.
struct NbdServer {
    dir: TempDir,
    port: u16,
}

impl NbdServer {
    fn start(pki: &Pki) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("raw"), content()).unwrap();
        // Free now; it cannot be handed over.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (raw, server) = (dir.path().join("raw"), pki.server());
        let config = format!(
            "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\nforce_tls = true\n\
             certfile = {server}/server-cert.pem\nkeyfile = {server}/server-key.pem\n\
             cacertfile = {server}/ca-cert.pem\n\
             [disk]\nexportname = {raw}\nreadonly = true\n",
            server = server.display(),
            raw = raw.display(),
        );
        let path = dir.path().join("config");
        std::fs::write(&path, config).unwrap();
        // What tests/setup.sh unpacked, so that no service of the distribution is started.
        let unpacked =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("target/testbed/nbd-server/bin/nbd-server");
        let program = if unpacked.exists() { unpacked } else { "nbd-server".into() };
        let status = Command::new(program)
            .arg("-C")
            .arg(path)
            .arg("-p")
            .arg(dir.path().join("pid"))
            .status()
            .unwrap_or_else(|e| panic!("nbd-server is needed (tests/setup.sh): {e}"));
        assert!(status.success());
        let server = Self { dir, port };
        wait_until("nbd-server", 20, || TcpStream::connect(("127.0.0.1", port)).is_ok());
        server
    }

    async fn open(&self, scheme: &str, parameters: &str) -> Result<Client> {
        let text = format!("{scheme}://127.0.0.1:{}/disk{parameters}", self.port);
        let uri = NbdUri::parse(&text, Origin::CommandLine).unwrap();
        tokio::time::timeout(
            Duration::from_secs(30),
            Client::open_uri(&uri, ClientOptions::default()),
        )
        .await
        .expect("an answer")
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        if let Ok(id) = std::fs::read_to_string(self.dir.path().join("pid")) {
            let _ = Command::new("kill").arg(id.trim()).status();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nbd_server_over_tcp_is_read_with_certificates_and_not_without() {
    let pki = Pki::new();
    let server = NbdServer::start(&pki);
    let with = |dir: &Path| format!("?tls-certificates={}", dir.display());
    let client = server.open("nbds", &with(&pki.client())).await.unwrap();
    assert!(client.tls().is_some());
    conformance::source(&client, &content()).await;
    assert!(server.open("nbds", &with(&pki.bare_client())).await.is_err(), "no certificate");
    assert!(server.open("nbds", &with(&pki.foreign_client())).await.is_err(), "another's");
    assert!(server.open("nbds", &with(&pki.misled_client())).await.is_err(), "trusts another");
    assert!(server.open("nbd", "").await.is_err(), "plain text");
}
