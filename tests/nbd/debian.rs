//! The client against nbd-server, the protocol's first implementation (Debian's package `nbd-server`).
//!
//! It goes into the background and forks for each client; its own errors are in the system's log.
//! Version 3.24 with a unix socket listens on nothing else, and ends when somebody connects and leaves.
//! TLS is in `tests/nbd_tls`.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmbackup::block::conformance;
use vmbackup::error::Kind;
use vmbackup::nbd::{Client, ClientOptions, NbdUri, Timeouts, list};

use crate::support::{pattern_dir, tempdir, writing};

const LEN: usize = (6 << 20) + 512;

/// Where a server listens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Tcp,
    Unix,
}

/// A server of the file `raw` in its directory, as the export "disk"; ended with this.
struct NbdServer {
    dir: TempDir,
    /// None on a unix socket, which is `s`.
    port: Option<u16>,
}

impl NbdServer {
    fn start(dir: TempDir, place: Place, options: &str) -> Self {
        // Free now; it cannot be handed over.
        let port = (place == Place::Tcp)
            .then(|| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
        let raw = dir.path().join("raw");
        let listen = match port {
            Some(port) => format!("listenaddr = 127.0.0.1\nport = {port}"),
            None => format!("unixsock = {}", dir.path().join("s").display()),
        };
        let config = format!(
            "[generic]\n{listen}\nallowlist = true\n\
             [disk]\nexportname = {}\n{options}\n",
            raw.display()
        );
        std::fs::write(dir.path().join("config"), config).unwrap();
        // What tests/setup.sh unpacked, so that no service of the distribution is started.
        let unpacked =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("target/testbed/nbd-server/bin/nbd-server");
        let program = if unpacked.exists() { unpacked } else { "nbd-server".into() };
        let status = Command::new(&program)
            .args(["-C", "config", "-p"])
            .arg(dir.path().join("pid"))
            .current_dir(dir.path())
            .status()
            .unwrap_or_else(|e| panic!("nbd-server is needed (tests/setup.sh): {e}"));
        assert!(status.success());
        let server = Self { dir, port };
        let begun = Instant::now();
        let listens = || match port {
            Some(port) => TcpStream::connect(("127.0.0.1", port)).is_ok(),
            None => server.dir.path().join("s").exists(),
        };
        while !listens() {
            assert!(begun.elapsed() < Duration::from_secs(20), "nbd-server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn uri(&self, export: &str) -> NbdUri {
        match self.port {
            Some(port) => format!("nbd://127.0.0.1:{port}/{export}").parse().unwrap(),
            None => NbdUri::unix(self.dir.path().join("s"), export),
        }
    }

    async fn open(&self, options: ClientOptions) -> Client {
        Client::open_uri(&self.uri("disk"), options).await.unwrap()
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
async fn nbd_server_is_read() {
    let (dir, content) = pattern_dir(LEN);
    let server = NbdServer::start(dir, Place::Tcp, "readonly = true\nmulticonn = true");
    let client = server.open(ClientOptions::default()).await;
    assert_eq!(client.connection_count(), 2);
    conformance::source(&client, &content).await;
    let listed = list(&server.uri(""), Timeouts::default()).await.unwrap();
    assert_eq!(listed.iter().map(|export| &export.name).collect::<Vec<_>>(), ["disk"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nbd_server_is_read_over_a_unix_socket() {
    let (dir, content) = pattern_dir(LEN);
    let server = NbdServer::start(dir, Place::Unix, "readonly = true");
    conformance::source(&server.open(ClientOptions::default()).await, &content).await;
}

async fn takes_all(place: Place) {
    let dir = tempdir();
    std::fs::write(dir.path().join("raw"), vec![0; 6 << 20]).unwrap();
    let server = NbdServer::start(dir, place, "flush = true\nfua = true\ntrim = true");
    let client = server.open(writing()).await;
    let raw = server.dir.path().join("raw");
    conformance::sink(&client, || async { std::fs::read(&raw).unwrap() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nbd_server_takes_writes_zeroes_and_flushes() {
    takes_all(Place::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nbd_server_takes_them_over_a_unix_socket() {
    takes_all(Place::Unix).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nbd_server_without_the_export_is_an_error_that_names_it() {
    let (dir, _) = pattern_dir(4096);
    let server = NbdServer::start(dir, Place::Tcp, "");
    let opened = Client::open_uri(&server.uri("nosuch"), ClientOptions::default()).await;
    let error = opened.map(|_| ()).unwrap_err();
    // It may hang up instead of saying so.
    assert!([Kind::NotFound, Kind::Connection].contains(&error.kind()), "{error:?}");
    assert!(format!("{error:?}").contains("127.0.0.1"), "{error:?}");
}
