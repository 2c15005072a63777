//! qemu-nbd and nbdkit with TLS, each on a socket of its own that is open before they start, so that
//! no test waits for a port or takes one that is taken.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use vmbackup::block::conformance;
use vmbackup::error::Result;
use vmbackup::nbd::{Client, ClientOptions, NbdUri, Origin};

/// Size of the disks.
pub const LEN: usize = (1 << 20) + 512;

/// Programs that serve.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Program {
    QemuNbd,
    Nbdkit,
}

/// How to reach them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Unix,
    Tcp,
}

/// Highest version a peer that uses GnuTLS speaks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Version {
    Tls12,
    Tls13,
}

/// What clients of a server may do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum May {
    Read,
    Write,
}

/// TLS of a server.
pub enum Tls {
    None,
    /// Certificates in this directory; clients need none.
    Certificates(PathBuf),
    /// Clients need one.
    Mutual(PathBuf),
    /// Keys in this file.
    Psk(PathBuf),
}

/// A server process with the conformance pattern, killed with this.
pub struct Peer {
    child: Child,
    _dir: TempDir,
    /// `//127.0.0.1:PORT/` or `+unix:///?socket=…`, to be put behind `nbd` or `nbds`.
    place: String,
}

impl Peer {
    pub fn start(program: Program, transport: Transport, tls: &Tls, version: Version) -> Self {
        Self::start_as(program, (transport, May::Read), tls, version)
    }

    /// The same for who writes, too.
    pub fn start_as(
        program: Program,
        (transport, may): (Transport, May),
        tls: &Tls,
        version: Version,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("raw"), content()).unwrap();
        let (listener, place): (OwnedFd, _) = match transport {
            Transport::Tcp => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let port = listener.local_addr().unwrap().port();
                (listener.into(), format!("://127.0.0.1:{port}/"))
            }
            Transport::Unix => {
                let socket = dir.path().join("s");
                let listener = UnixListener::bind(&socket).unwrap();
                (listener.into(), format!("+unix:///?socket={}", socket.display()))
            }
        };
        // Socket activation (sd_listen_fds(3)): the socket is descriptor 3, and LISTEN_PID is that
        // of the program, which therefore a shell has to set.
        let activate = "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", activate, "sh"]);
        match program {
            Program::QemuNbd => qemu_nbd(&mut command, may, tls, version),
            Program::Nbdkit => nbdkit(&mut command, may, tls),
        }
        limit_version(&mut command, dir.path(), version);
        let child = command.current_dir(dir.path()).stdin(Stdio::from(listener)).spawn().unwrap();
        Self { child, _dir: dir, place }
    }

    /// `nbds` at this server, with parameters.
    pub fn secure_uri(&self, parameters: &str) -> NbdUri {
        let separator = if self.place.contains('?') { '&' } else { '?' };
        let text = format!("nbds{}{separator}{parameters}", self.place);
        NbdUri::parse(&text, Origin::CommandLine).unwrap()
    }

    /// Without TLS.
    pub fn plain_uri(&self) -> NbdUri {
        format!("nbd{}", self.place).parse().unwrap()
    }

    pub async fn open(&self, parameters: &str) -> Result<Client> {
        Client::open_uri(&self.secure_uri(parameters), ClientOptions::default()).await
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What every server serves.
pub fn content() -> Vec<u8> {
    conformance::pattern(LEN)
}

fn qemu_nbd(command: &mut Command, may: May, tls: &Tls, version: Version) {
    // Several clients, because the connection cap of one would queue our second connection.
    command.args(["qemu-nbd", "-t", "-e", "8", "-f", "raw"]);
    if may == May::Read {
        command.arg("-r");
    }
    let only_12 = if version == Version::Tls12 { ",priority=NORMAL:-VERS-TLS1.3" } else { "" };
    let object = match tls {
        Tls::None => None,
        Tls::Certificates(dir) => Some(format!("x509,dir={},verify-peer=off", dir.display())),
        Tls::Mutual(dir) => Some(format!("x509,dir={},verify-peer=on", dir.display())),
        Tls::Psk(file) => Some(format!("psk,dir={}", file.parent().unwrap().display())),
    };
    if let Some(object) = object {
        let object = format!("tls-creds-{object},id=t,endpoint=server{only_12}");
        command.args(["--object", &object, "--tls-creds", "t"]);
    }
    command.arg("raw");
}

fn nbdkit(command: &mut Command, may: May, tls: &Tls) {
    command.args(["nbdkit", "-f", "--exit-with-parent"]);
    if may == May::Read {
        command.arg("-r");
    }
    match tls {
        Tls::None => command.arg("--tls=off"),
        Tls::Certificates(dir) => {
            command.arg("--tls=require").arg(format!("--tls-certificates={}", dir.display()))
        }
        Tls::Mutual(dir) => command
            .args(["--tls=require", "--tls-verify-peer"])
            .arg(format!("--tls-certificates={}", dir.display())),
        Tls::Psk(file) => command.arg("--tls=require").arg(format!("--tls-psk={}", file.display())),
    };
    command.args(["file", "raw"]);
}

/// Makes a program that uses GnuTLS speak no more than `version`.
pub fn limit_version(command: &mut Command, dir: &Path, version: Version) {
    if version == Version::Tls12 {
        let config = dir.join("gnutls");
        std::fs::write(&config, "[overrides]\ndisabled-version = tls1.3\n").unwrap();
        command.env("GNUTLS_SYSTEM_PRIORITY_FILE", config);
    }
}
