//! How the exports of a job are reached: directly, through SSH, or (only when asked for) plain TCP.
//!
//! On this machine QEMU's unix socket is connected to. On a remote host the same socket is
//! forwarded by `ssh -L`, with the host part of the libvirt URI: who may drive libvirt there over
//! SSH may read the socket, nothing is opened on the network, and no option is needed. The ssh
//! process lives as long as the snapshot.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

use super::connection::{Host, remote_host};
use super::job::Server;
use super::names::socket_path;
use crate::error::{Error, Kind, Result};
use crate::nbd::{Address, NbdUri};
use crate::vm::PointId;

/// Longest wait for SSH to connect, authenticate and listen.
const SSH_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the forwarded socket is looked for.
const SSH_POLL: Duration = Duration::from_millis(20);

/// Most of ssh's messages kept for the error.
const SSH_MESSAGE_BYTES_MAX: u64 = 4096;

/// Lowest port of the range TCP exports use, and how many there are: where QEMU migrations take
/// theirs (qemu.conf, `migration_port_min`) ends at 49215.
const TCP_PORT_MIN: u16 = 49_216;
const TCP_PORTS: u16 = 4096;

/// Where the job of a run is to offer its exports.
pub(super) fn server(
    host: &Host,
    socket_dir: &Path,
    point: PointId,
    insecure_tcp: bool,
) -> Result<Server> {
    let Some(target) = remote_host(host.uri()) else {
        return Ok(Server::Unix(socket_path(socket_dir, point)?));
    };
    if insecure_tcp {
        let name = target.rsplit('@').next().unwrap_or(target);
        let (name, _) = split_port(name);
        // Two runs on one host rarely meet: the port follows from the random point id, and a port
        // in use fails the begin, not the guest.
        let port = u16::from_be_bytes([point.0[0], point.0[1]]) % TCP_PORTS + TCP_PORT_MIN;
        return Ok(Server::Tcp { host: name.trim_matches(['[', ']']).to_owned(), port });
    }
    if host.uri().starts_with("qemu+ssh") || host.uri().starts_with("qemu+libssh") {
        return Ok(Server::Unix(socket_path(socket_dir, point)?));
    }
    Err(Error::new(
        Kind::Unsupported,
        format!("the disks of a domain at {} cannot be read from here", host.uri()),
    )
    .hint(
        "connect with qemu+ssh://, which carries the data too, or accept an unencrypted export on \
         the host's network with --insecure-tcp",
    ))
}

/// An open way to the exports; closed when dropped.
pub(super) struct Reach {
    address: Address,
    /// The forwarding ssh (killed on drop) and the directory of its socket.
    _forward: Option<(Child, tempfile::TempDir)>,
}

impl Reach {
    /// Opens the way to a server that listens now.
    pub(super) async fn open(host: &Host, server: &Server) -> Result<Self> {
        let (socket, target) = match (server, remote_host(host.uri())) {
            (Server::Tcp { host, port }, _) => {
                let address = Address::Tcp { host: host.clone(), port: *port };
                return Ok(Self { address, _forward: None });
            }
            (Server::Unix(socket), None) => {
                return Ok(Self { address: Address::Unix(socket.clone()), _forward: None });
            }
            (Server::Unix(socket), Some(target)) => (socket, target),
        };
        let directory = tempfile::Builder::new().prefix("vmbackup-").tempdir();
        let directory = directory.map_err(|e| Error::io("cannot make a temporary directory", e))?;
        let local = directory.path().join("nbd.sock");
        let child = forward(target, &local, socket).await?;
        Ok(Self { address: Address::Unix(local), _forward: Some((child, directory)) })
    }

    /// The URI of an export.
    pub(super) fn uri(&self, export: &str) -> NbdUri {
        NbdUri { address: self.address.clone(), export: export.to_owned() }
    }
}

/// `user@host:port` as ssh takes it.
fn ssh_args(target: &str, local: &Path, remote: &Path) -> Vec<String> {
    let (host, port) = split_port(target);
    let mut args: Vec<String> =
        ["-N", "-T", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"]
            .map(str::to_owned)
            .into();
    // A connection that dies is noticed as one of libvirt's would be.
    args.extend(["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=5"].map(str::to_owned));
    args.extend(["-o".to_owned(), "ControlPath=none".to_owned()]);
    args.extend(["-L".to_owned(), format!("{}:{}", local.display(), remote.display())]);
    if let Some(port) = port {
        args.extend(["-p".to_owned(), port.to_owned()]);
    }
    // After `--` no host name can be an option.
    args.extend(["--".to_owned(), host.replace(['[', ']'], "")]);
    args
}

fn split_port(target: &str) -> (&str, Option<&str>) {
    match target.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            // A colon inside brackets belongs to the address.
            if host.contains('[') && !host.ends_with(']') {
                (target, None)
            } else {
                (host, Some(port))
            }
        }
        _ => (target, None),
    }
}

async fn forward(target: &str, local: &Path, remote: &Path) -> Result<Child> {
    let mut command = Command::new("ssh");
    command.args(ssh_args(target, local, remote));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command
        .spawn()
        .map_err(|error| Error::io("cannot run ssh", error).hint("install openssh-client"))?;
    let listening = async {
        loop {
            if local.exists() {
                return Ok(());
            }
            if let Some(status) = child.try_wait().map_err(|e| Error::io("ssh was lost", e))? {
                let mut said = String::new();
                if let Some(stderr) = child.stderr.take() {
                    // What cannot be read is not said; the status is.
                    drop(stderr.take(SSH_MESSAGE_BYTES_MAX).read_to_string(&mut said).await);
                }
                return Err(Error::new(
                    Kind::Connection,
                    format!(
                        "cannot forward the disks' socket from {target}: ssh ended ({status}): {}",
                        said.trim()
                    ),
                )
                .hint(format!(
                    "'ssh -o BatchMode=yes {target} true' must work without a password"
                )));
            }
            tokio::time::sleep(SSH_POLL).await;
        }
    };
    match tokio::time::timeout(SSH_TIMEOUT, listening).await {
        Ok(result) => result.map(|()| child),
        Err(_) => Err(Error::new(
            Kind::Timeout,
            format!("ssh to {target} did not forward the disks' socket in {SSH_TIMEOUT:?}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_split_as_ssh_wants_it() {
        assert_eq!(split_port("root@kvm1:22"), ("root@kvm1", Some("22")));
        assert_eq!(split_port("kvm1"), ("kvm1", None));
        assert_eq!(split_port("root@[fe80::1]:2222"), ("root@[fe80::1]", Some("2222")));
        assert_eq!(split_port("[fe80::1]"), ("[fe80::1]", None));
        let args = ssh_args("root@[fe80::1]:2222", Path::new("/l"), Path::new("/r"));
        assert_eq!(args[args.len() - 6..], ["-L", "/l:/r", "-p", "2222", "--", "root@fe80::1"]);
    }
}
