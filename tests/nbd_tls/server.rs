//! libnbd, QEMU and nbdkit's plugin read from our server, over each transport, with each kind of
//! credentials, in each version; and whom it does not let in.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use vmbackup::block::memory::MemoryDisk;
use vmbackup::nbd::server::{Export, Exports, Limits, Listener, Server};
use vmbackup::nbd::tls::{ClientCertificates, Credentials, Mode, ServerTls, ServerTlsOptions};

use crate::peers::{Transport, Version, content, limit_version};
use crate::pki::{KEY, Pki, Revoked, SERVER_NAME};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tool {
    Nbdcopy,
    QemuImg,
    NbdkitPlugin,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Certificates,
    Psk,
}

/// The name of the export.
pub const EXPORT: &str = "secret-name";

/// One export, the default one, with the conformance pattern.
pub fn exports() -> Exports {
    let disk = Arc::new(MemoryDisk::with_content(content()));
    Exports::new([Export::read_only(EXPORT, disk)]).unwrap()
}

pub fn options(
    mode: Mode,
    credentials: Credentials,
    client_certificates: ClientCertificates,
) -> ServerTlsOptions {
    ServerTlsOptions { mode, credentials, client_certificates }
}

/// Our server on a socket of its own; stops when dropped.
struct Rig {
    server: Server,
    dir: TempDir,
    port: Option<u16>,
}

impl Rig {
    fn new(transport: Transport, tls: &ServerTlsOptions) -> Self {
        Self::of(exports(), transport, tls)
    }

    fn of(exports: Exports, transport: Transport, tls: &ServerTlsOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tls = ServerTls::load(tls).unwrap();
        let server = Server::with_tls(exports, Limits::default(), Some(tls));
        let (listener, port) = match transport {
            Transport::Unix => (Listener::unix(&dir.path().join("s")).unwrap(), None),
            Transport::Tcp => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let port = listener.local_addr().unwrap().port();
                (Listener::inherited(listener.into()).unwrap(), Some(port))
            }
        };
        let listening = server.clone();
        tokio::spawn(async move { listening.listen(listener).await });
        Self { server, dir, port }
    }

    /// A URI as libnbd's tools take it.
    fn uri(&self, scheme: &str, user: &str, parameters: &str) -> String {
        if let Some(port) = self.port {
            return format!("{scheme}://{user}127.0.0.1:{port}/?{parameters}");
        }
        let socket = self.dir.path().join("s");
        format!("{scheme}+unix://{user}/?socket={}&{parameters}", socket.display())
    }

    /// Runs a tool: whether it succeeded, and what it said.
    fn run(&self, command: &[&str], version: Version) -> (bool, String) {
        let mut tool = Command::new(command[0]);
        tool.args(&command[1..]).current_dir(self.dir.path());
        limit_version(&mut tool, self.dir.path(), version);
        let output = tool.output().unwrap_or_else(|e| panic!("{} is needed: {e}", command[0]));
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// `nbdinfo` with these certificates: whether it was let in.
    fn lets_in(&self, parameters: &str, version: Version) -> bool {
        self.run(&["nbdinfo", &self.uri("nbds", "", parameters)], version).0
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.server.stop();
    }
}

fn nbdcopy(rig: &Rig, pki: &Pki, kind: Kind) -> Vec<String> {
    let uri = match kind {
        Kind::Certificates => {
            rig.uri("nbds", "", &format!("tls-certificates={}", pki.client().display()))
        }
        Kind::Psk => rig.uri("nbds", "vmbackup@", &format!("tls-psk-file={}", pki.psk().display())),
    };
    ["nbdcopy", &uri, "out"].map(str::to_owned).to_vec()
}

fn qemu_img(rig: &Rig, pki: &Pki, kind: Kind) -> Vec<String> {
    let object = match kind {
        Kind::Certificates => format!("tls-creds-x509,dir={}", pki.client().display()),
        Kind::Psk => {
            let dir = pki.psk();
            let dir = dir.parent().unwrap().display();
            format!("tls-creds-psk,dir={dir},username=vmbackup")
        }
    };
    let object = format!("{object},id=t,endpoint=client");
    let name = if kind == Kind::Certificates {
        format!(",tls-hostname={SERVER_NAME}")
    } else {
        String::new()
    };
    let place = match rig.port {
        Some(port) => format!("server.type=inet,server.host=127.0.0.1,server.port={port}"),
        None => format!("server.type=unix,server.path={}", rig.dir.path().join("s").display()),
    };
    let disk = format!("driver=nbd,{place},tls-creds=t{name}");
    ["qemu-img", "convert", "--object", &object, "--image-opts", &disk, "-O", "raw", "out"]
        .map(str::to_owned)
        .to_vec()
}

fn nbdkit_plugin(rig: &Rig, pki: &Pki, kind: Kind) -> Vec<String> {
    let mut command = ["nbdkit", "-U", "-", "-r", "nbd", "tls=require"].map(str::to_owned).to_vec();
    match rig.port {
        Some(port) => command.extend(["hostname=127.0.0.1".into(), format!("port={port}")]),
        None => command.push(format!("socket={}", rig.dir.path().join("s").display())),
    }
    match kind {
        Kind::Certificates => {
            command.push(format!("tls-certificates={}", pki.client().display()));
        }
        Kind::Psk => command
            .extend([format!("tls-psk={}", pki.psk().display()), "tls-username=vmbackup".into()]),
    }
    command.extend(["--run", "nbdcopy \"$uri\" out"].map(str::to_owned));
    command
}

fn copy(rig: &Rig, pki: &Pki, tool: Tool, kind: Kind) -> Vec<String> {
    match tool {
        Tool::Nbdcopy => nbdcopy(rig, pki, kind),
        Tool::QemuImg => qemu_img(rig, pki, kind),
        Tool::NbdkitPlugin => nbdkit_plugin(rig, pki, kind),
    }
}

fn read(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("out")).unwrap()
}

fn serves(tool: Tool, transport: Transport, kind: Kind, version: Version) {
    let pki = Pki::new();
    let credentials = match kind {
        Kind::Certificates => Credentials::Certificates(pki.server()),
        Kind::Psk => Credentials::Psk(pki.psk()),
    };
    let rig =
        Rig::new(transport, &options(Mode::Required, credentials, ClientCertificates::Required));
    let command = copy(&rig, &pki, tool, kind);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let (success, said) = rig.run(&command, version);
    assert!(success, "{command:?}: {said}");
    // nbdkit rounds a size up to whole sectors; ours is whole.
    assert!(read(rig.dir.path()) == content(), "what was copied differs");
}

/// One test per cell, named after its claim.
macro_rules! cells {
    ($($name:ident: $tool:ident $transport:ident $kind:ident $version:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            serves(Tool::$tool, Transport::$transport, Kind::$kind, Version::$version);
        }
    )*};
}

cells! {
    libnbd_reads_over_unix_with_certificates_in_tls_12: Nbdcopy Unix Certificates Tls12;
    libnbd_reads_over_unix_with_certificates_in_tls_13: Nbdcopy Unix Certificates Tls13;
    libnbd_reads_over_unix_with_keys_in_tls_12: Nbdcopy Unix Psk Tls12;
    libnbd_reads_over_unix_with_keys_in_tls_13: Nbdcopy Unix Psk Tls13;
    libnbd_reads_over_tcp_with_certificates_in_tls_12: Nbdcopy Tcp Certificates Tls12;
    libnbd_reads_over_tcp_with_certificates_in_tls_13: Nbdcopy Tcp Certificates Tls13;
    libnbd_reads_over_tcp_with_keys_in_tls_12: Nbdcopy Tcp Psk Tls12;
    libnbd_reads_over_tcp_with_keys_in_tls_13: Nbdcopy Tcp Psk Tls13;
    qemu_reads_over_unix_with_certificates_in_tls_12: QemuImg Unix Certificates Tls12;
    qemu_reads_over_unix_with_certificates_in_tls_13: QemuImg Unix Certificates Tls13;
    qemu_reads_over_unix_with_keys_in_tls_12: QemuImg Unix Psk Tls12;
    qemu_reads_over_unix_with_keys_in_tls_13: QemuImg Unix Psk Tls13;
    qemu_reads_over_tcp_with_certificates_in_tls_12: QemuImg Tcp Certificates Tls12;
    qemu_reads_over_tcp_with_certificates_in_tls_13: QemuImg Tcp Certificates Tls13;
    qemu_reads_over_tcp_with_keys_in_tls_12: QemuImg Tcp Psk Tls12;
    qemu_reads_over_tcp_with_keys_in_tls_13: QemuImg Tcp Psk Tls13;
    nbdkit_reads_over_unix_with_certificates_in_tls_12: NbdkitPlugin Unix Certificates Tls12;
    nbdkit_reads_over_unix_with_certificates_in_tls_13: NbdkitPlugin Unix Certificates Tls13;
    nbdkit_reads_over_unix_with_keys_in_tls_12: NbdkitPlugin Unix Psk Tls12;
    nbdkit_reads_over_unix_with_keys_in_tls_13: NbdkitPlugin Unix Psk Tls13;
    nbdkit_reads_over_tcp_with_certificates_in_tls_12: NbdkitPlugin Tcp Certificates Tls12;
    nbdkit_reads_over_tcp_with_certificates_in_tls_13: NbdkitPlugin Tcp Certificates Tls13;
    nbdkit_reads_over_tcp_with_keys_in_tls_12: NbdkitPlugin Tcp Psk Tls12;
    nbdkit_reads_over_tcp_with_keys_in_tls_13: NbdkitPlugin Tcp Psk Tls13;
}

/// The command that reads, turned round: it writes `in`.
fn turned(mut command: Vec<String>) -> Vec<String> {
    if command[0] == "nbdcopy" {
        return vec!["nbdcopy".to_owned(), "in".to_owned(), command.swap_remove(1)];
    }
    let [_, _, object, value, _, disk, ..] = &command[..] else { panic!("{command:?}") };
    ["qemu-img", "convert", object, value, "-n", "-f", "raw", "in", "--target-image-opts", disk]
        .map(str::to_owned)
        .to_vec()
}

fn takes_writes(tool: Tool, transport: Transport, kind: Kind) {
    let pki = Pki::new();
    let credentials = match kind {
        Kind::Certificates => Credentials::Certificates(pki.server()),
        Kind::Psk => Credentials::Psk(pki.psk()),
    };
    let disk = Arc::new(MemoryDisk::with_content(vec![0x5a; content().len()]));
    let export = Export::writable(EXPORT, Arc::clone(&disk) as _, Arc::clone(&disk) as _);
    let tls = options(Mode::Required, credentials, ClientCertificates::Required);
    let rig = Rig::of(Exports::new([export]).unwrap(), transport, &tls);
    std::fs::write(rig.dir.path().join("in"), content()).unwrap();
    let command = turned(copy(&rig, &pki, tool, kind));
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let (success, said) = rig.run(&command, Version::Tls13);
    assert!(success, "{command:?}: {said}");
    assert!(disk.content() == content(), "what was written differs");
}

macro_rules! written {
    ($($name:ident: $tool:ident $transport:ident $kind:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            takes_writes(Tool::$tool, Transport::$transport, Kind::$kind);
        }
    )*};
}

written! {
    libnbd_writes_over_unix_with_keys: Nbdcopy Unix Psk;
    libnbd_writes_over_tcp_with_certificates: Nbdcopy Tcp Certificates;
    qemu_writes_over_unix_with_certificates: QemuImg Unix Certificates;
    qemu_writes_over_tcp_with_keys: QemuImg Tcp Psk;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_our_certificate_is_let_in_only_where_it_is_optional() {
    let pki = Pki::new();
    let x509 = || Credentials::Certificates(pki.server());
    let strict =
        Rig::new(Transport::Tcp, &options(Mode::Required, x509(), ClientCertificates::Required));
    let open =
        Rig::new(Transport::Tcp, &options(Mode::Required, x509(), ClientCertificates::Optional));
    let dir = |dir: std::path::PathBuf| format!("tls-certificates={}", dir.display());
    for version in [Version::Tls12, Version::Tls13] {
        assert!(strict.lets_in(&dir(pki.client()), version));
        assert!(!strict.lets_in(&dir(pki.bare_client()), version), "none");
        assert!(!strict.lets_in(&dir(pki.foreign_client()), version), "of another authority");
        assert!(open.lets_in(&dir(pki.client()), version));
        assert!(open.lets_in(&dir(pki.bare_client()), version));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_keys_and_unknown_users_are_not_let_in() {
    let pki = Pki::new();
    let psk = Credentials::Psk(pki.psk());
    let rig = Rig::new(Transport::Tcp, &options(Mode::Required, psk, ClientCertificates::Required));
    for version in [Version::Tls12, Version::Tls13] {
        let asks = |user: &str, line: String| {
            let file = pki.psk_with(&line);
            let uri = rig.uri("nbds", user, &format!("tls-psk-file={}", file.display()));
            rig.run(&["nbdinfo", &uri], version).0
        };
        assert!(asks("vmbackup@", format!("vmbackup:{KEY}\n")));
        assert!(!asks("vmbackup@", format!("vmbackup:{}\n", KEY.replace('9', "8"))), "wrong key");
        assert!(!asks("nobody@", format!("nobody:{KEY}\n")), "unknown user");
        assert!(!rig.lets_in(&format!("tls-certificates={}", pki.client().display()), version));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_text_is_served_only_where_tls_is_not_required() {
    let pki = Pki::new();
    for (mode, expected) in [(Mode::Required, false), (Mode::Allowed, true)] {
        let psk = Credentials::Psk(pki.psk());
        let rig = Rig::new(Transport::Unix, &options(mode, psk, ClientCertificates::Required));
        let (success, _) = rig.run(&["nbdinfo", &rig.uri("nbd", "", "")], Version::Tls13);
        assert_eq!(success, expected);
        let parameters = format!("tls-psk-file={}", pki.psk().display());
        let secure = rig.uri("nbds", "vmbackup@", &parameters);
        assert!(rig.run(&["nbdinfo", &secure], Version::Tls13).0);
    }
}

#[tokio::test]
async fn a_server_does_not_start_without_its_certificate() {
    let pki = Pki::new();
    for credentials in [
        Credentials::Certificates(pki.client()),
        Credentials::Certificates("/nonexistent".into()),
        Credentials::Psk("/nonexistent".into()),
        Credentials::SystemAuthorities,
    ] {
        let options = options(Mode::Required, credentials, ClientCertificates::Required);
        ServerTls::load(&options).map(|_| ()).unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_certificate_is_revoked_is_not_let_in() {
    for (whose, expected) in [(Revoked::Client, false), (Revoked::Another, true)] {
        let pki = Pki::new();
        pki.revoke_client(whose);
        let dir = format!("tls-certificates={}", pki.client().display());
        for clients in [ClientCertificates::Required, ClientCertificates::Optional] {
            let x509 = Credentials::Certificates(pki.server());
            let rig = Rig::new(Transport::Tcp, &options(Mode::Required, x509, clients));
            for version in [Version::Tls12, Version::Tls13] {
                assert_eq!(rig.lets_in(&dir, version), expected, "{clients:?}");
            }
        }
    }
}
