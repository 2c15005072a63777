//! How the exports of a job are reached: directly, through SSH, or (only when asked for) plain TCP.
//!
//! On this machine QEMU's unix socket is connected to. On a remote host the same socket is
//! forwarded by `ssh -L`, with the host part of the libvirt URI: who may drive libvirt there over
//! SSH may read the socket, nothing is opened on the network, and no option is needed. The ssh
//! process lives as long as the snapshot, and no longer than we do.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use super::connection::{Host, remote_host};
use super::job::Server;
use super::names::socket_path;
use crate::error::{Error, Kind, Result};
use crate::image::{OwnChild, Passed, PrivateDir};
use crate::nbd::{Address, NbdUri};
use crate::vm::PointId;

/// Longest wait for SSH to connect, authenticate and listen.
const SSH_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the forwarded socket is looked for.
const SSH_POLL: Duration = Duration::from_millis(20);

/// Lowest port of the range TCP exports use, and how many there are: where QEMU migrations take
/// theirs (qemu.conf, `migration_port_min`) ends at 49215.
const TCP_PORT_MIN: u16 = 49_216;
const TCP_PORTS: u16 = 4096;

/// Where the job of a run on the libvirt at `uri` is to offer its exports. `insecure_tcp` only allows
/// what nothing better can do: where SSH carries the data, no port is opened.
pub(super) fn server(
    uri: &str,
    socket_dir: &Path,
    point: PointId,
    insecure_tcp: bool,
) -> Result<Server> {
    let Some(target) = remote_host(uri) else {
        return Ok(Server::Unix(socket_path(socket_dir, point)?));
    };
    if uri.starts_with("qemu+ssh") || uri.starts_with("qemu+libssh") {
        return Ok(Server::Unix(socket_path(socket_dir, point)?));
    }
    if insecure_tcp {
        let name = target.rsplit('@').next().unwrap_or(target);
        let (name, _) = split_port(name);
        // Two runs on one host rarely meet: the port follows from the random point id, and a port
        // in use fails the begin, not the guest.
        let port = u16::from_be_bytes([point.0[0], point.0[1]]) % TCP_PORTS + TCP_PORT_MIN;
        return Ok(Server::Tcp { host: name.trim_matches(['[', ']']).to_owned(), port });
    }
    Err(Error::new(
        Kind::Unsupported,
        format!("the disks of a domain at {uri} cannot be read from here"),
    )
    .hint(
        "connect with qemu+ssh://, which carries the data too, or accept an unencrypted export on \
         the host's network with --insecure-tcp",
    ))
}

/// An open way to the exports; closed when dropped.
pub(super) struct Reach {
    address: Address,
    /// The forwarding ssh (ends with its handle) and the directory of its socket.
    _forward: Option<(OwnChild, PrivateDir)>,
}

impl Reach {
    /// Opens the way to a server that listens now.
    pub(super) async fn open(host: &Host, server: &Server) -> Result<Self> {
        let socket = match (server, remote_host(host.uri())) {
            (Server::Tcp { host, port }, _) => {
                let address = Address::Tcp { host: host.clone(), port: *port };
                return Ok(Self { address, _forward: None });
            }
            (Server::Unix(socket), None) => {
                return Ok(Self { address: Address::Unix(socket.clone()), _forward: None });
            }
            (Server::Unix(socket), Some(_)) => socket,
        };
        let directory = PrivateDir::create()?;
        let local = directory.path().join("nbd.sock");
        let child = forward(host.uri(), &local, socket).await?;
        Ok(Self { address: Address::Unix(local), _forward: Some((child, directory)) })
    }

    /// The URI of an export.
    pub(super) fn uri(&self, export: &str) -> NbdUri {
        NbdUri::at(self.address.clone(), export)
    }
}

/// What ssh is told: the target of the libvirt URI, and the same parameters libvirt's own ssh gets
/// from it (`keyfile`, `no_verify`; libvirt.org/uri.html, "ssh transport").
fn ssh_args(uri: &str, local: &Path, remote: &Path) -> Vec<String> {
    let (host, port) = split_port(remote_host(uri).unwrap_or_default());
    let mut args: Vec<String> =
        ["-N", "-T", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"]
            .map(str::to_owned)
            .into();
    // A connection that dies is noticed as one of libvirt's would be.
    args.extend(["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=5"].map(str::to_owned));
    args.extend(["-o".to_owned(), "ControlPath=none".to_owned()]);
    if let Some(keyfile) = parameter(uri, "keyfile") {
        args.extend(["-i".to_owned(), keyfile]);
    }
    if parameter(uri, "no_verify").is_some_and(|value| value != "0") {
        args.extend(["-o".to_owned(), "StrictHostKeyChecking=no".to_owned()]);
    }
    args.extend(["-L".to_owned(), format!("{}:{}", local.display(), remote.display())]);
    if let Some(port) = port {
        args.extend(["-p".to_owned(), port.to_owned()]);
    }
    // After `--` no host name can be an option.
    args.extend(["--".to_owned(), host.replace(['[', ']'], "")]);
    args
}

/// A parameter of a URI, with its percent escapes undone.
fn parameter(uri: &str, name: &str) -> Option<String> {
    let (_, query) = uri.split_once('?')?;
    let value = query.split(['&', ';']).find_map(|pair| {
        pair.split_once('=').filter(|(key, _)| *key == name).map(|(_, value)| value)
    })?;
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let [first, tail @ ..] = rest {
        let escape = tail.get(..2).filter(|_| *first == b'%');
        let decoded = escape
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        bytes.push(decoded.unwrap_or(*first));
        rest = if decoded.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8(bytes).ok()
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

async fn forward(uri: &str, local: &Path, remote: &Path) -> Result<OwnChild> {
    let target = remote_host(uri).unwrap_or_default();
    let line = ["ssh".to_owned()].into_iter().chain(ssh_args(uri, local, remote));
    let mut ssh = OwnChild::spawn(line.map(OsString::from).collect(), Passed::Nothing)
        .await
        .map_err(|error| Error::io("cannot run ssh", error))?;
    let listening = async {
        loop {
            if local.exists() {
                return Ok(());
            }
            if let Some(status) = ssh.child.try_wait().map_err(|e| Error::io("ssh was lost", e))? {
                let said = ssh.last_words().await;
                let what = format!(
                    "cannot forward the disks' socket from {target}: ssh ended ({status}): {said}"
                );
                // What a child ends with whose program is not there.
                let hint = if status.code() == Some(127) {
                    "install openssh-client".to_owned()
                } else {
                    format!("'ssh -o BatchMode=yes {target} true' must work without a password")
                };
                return Err(Error::new(Kind::Connection, what).hint(hint));
            }
            tokio::time::sleep(SSH_POLL).await;
        }
    };
    match tokio::time::timeout(SSH_TIMEOUT, listening).await {
        Ok(result) => result.map(|()| ssh),
        Err(_) => Err(Error::new(
            Kind::Timeout,
            format!("ssh to {target} did not forward the disks' socket in {SSH_TIMEOUT:?}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The option opened a port also where SSH would have carried the data.
    #[test]
    fn a_port_is_opened_only_where_asked_for_and_nothing_else_reaches_the_host() {
        let point = PointId([1; 16]);
        let at = |uri: &str, insecure_tcp| server(uri, Path::new("/s"), point, insecure_tcp);
        let unix = Server::Unix(socket_path(Path::new("/s"), point).unwrap());
        let unix_anyway =
            ["qemu:///system", "qemu+ssh://root@kvm1:22/system", "qemu+libssh2://kvm1/system"];
        for uri in unix_anyway {
            assert_eq!(at(uri, false).unwrap(), unix, "{uri}");
            assert_eq!(at(uri, true).unwrap(), unix, "{uri}");
        }
        let others =
            [("qemu+tls://kvm1:99/system", "kvm1"), ("qemu+tcp://[fe80::1]/system", "fe80::1")];
        for (uri, name) in others {
            let refused = at(uri, false).unwrap_err();
            assert_eq!(refused.kind(), Kind::Unsupported, "{uri}");
            let asked = at(uri, true).unwrap();
            assert!(matches!(asked, Server::Tcp { host, .. } if host == name), "{uri}");
        }
    }

    #[test]
    fn a_target_is_split_as_ssh_wants_it() {
        assert_eq!(split_port("root@kvm1:22"), ("root@kvm1", Some("22")));
        assert_eq!(split_port("kvm1"), ("kvm1", None));
        assert_eq!(split_port("root@[fe80::1]:2222"), ("root@[fe80::1]", Some("2222")));
        assert_eq!(split_port("[fe80::1]"), ("[fe80::1]", None));
        let uri = "qemu+ssh://root@[fe80::1]:2222/system?no_verify=1&keyfile=/a%20b/id%zz";
        let args = ssh_args(uri, Path::new("/l"), Path::new("/r"));
        assert_eq!(args[args.len() - 6..], ["-L", "/l:/r", "-p", "2222", "--", "root@fe80::1"]);
        assert!(args.windows(2).any(|pair| pair == ["-i", "/a b/id%zz"]));
        assert!(args.contains(&"StrictHostKeyChecking=no".to_owned()));
        let plain = ssh_args("qemu+ssh://kvm1/system", Path::new("/l"), Path::new("/r"));
        assert!(!plain.iter().any(|arg| arg == "-i" || arg.starts_with("StrictHost")));
    }
}
