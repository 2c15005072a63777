//! libvirt's errors as ours: the kind a caller decides on, and the next step for the person.
//!
//! The mapping goes by error code; message texts are translated by libvirt and differ between
//! versions, so they are read only where one code stands for several situations, and then only to
//! choose a hint or between Busy and Unsupported.

use virt::enumutil::Enum;
use virt::error::{Error as VirtError, ErrorDomain, ErrorNumber};

use super::connection::remote_host;
use crate::error::{Error, Kind};

/// The libvirt error code, where this version of the bindings knows it.
pub(super) fn code(error: &VirtError) -> Option<ErrorNumber> {
    match error.code() {
        Enum::Known(number) => Some(number),
        Enum::Unknown(_) => None,
    }
}

/// Wraps a libvirt error; `message` says what failed, on which object.
pub(super) fn wrap(message: impl Into<String>, error: VirtError) -> Error {
    let (kind, hint) = classify(&error);
    let wrapped = Error::new(kind, message).source(error);
    match hint {
        Some(hint) => wrapped.hint(hint),
        None => wrapped,
    }
}

/// The error of a connection to `uri` that could not be made. Whatever is wrong with the URI or with
/// what answers there, there is no connection.
pub(super) fn not_connected(uri: &str, error: VirtError) -> Error {
    let (kind, hint) = classify(&error);
    let kind = match kind {
        Kind::Permission | Kind::Timeout => kind,
        _ => Kind::Connection,
    };
    let transport = uri.split_once("://").and_then(|(scheme, _)| scheme.split_once('+'));
    let hint = match (remote_host(uri), transport) {
        (Some(host), Some((_, "ssh" | "libssh" | "libssh2"))) => format!(
            "see whether '{} virsh list --all' works for this user without being asked: a key, \
             known to the host, and a user who may use libvirt there",
            ssh_command(host)
        ),
        (Some(_), _) => format!("see whether 'virsh -c {uri} list' works from this host"),
        (None, _) => hint.map_or_else(
            || {
                "--connect names the libvirt: qemu:///system is the one of this host, \
                 qemu+ssh://root@HOST/system that of another"
                    .to_owned()
            },
            str::to_owned,
        ),
    };
    Error::new(kind, format!("cannot connect to libvirt at {uri}")).hint(hint).source(error)
}

/// How a person tries what libvirt does for the host part of a URI.
fn ssh_command(host: &str) -> String {
    match host.rsplit_once(':') {
        Some((host, port)) if port.chars().all(|c| c.is_ascii_digit()) => {
            format!("ssh -p {port} {host}")
        }
        _ => format!("ssh {host}"),
    }
}

/// What who is not let in can do.
const ACCESS: &str = "run as root, or as a member of the group 'libvirt' ('usermod -aG libvirt USER', \
     then log in again), which may use the daemon's socket; domains of your own are at --connect \
     qemu:///session; with polkit access control the user needs domain.read-secure, domain.write, \
     domain.checkpoint and domain.backup";

fn classify(error: &VirtError) -> (Kind, Option<&'static str>) {
    use ErrorNumber as N;
    let message = error.message();
    let Some(code) = code(error) else { return (Kind::Io, None) };
    match code {
        N::NoDomain | N::NoDomainCheckpoint | N::NoStoragePool => (Kind::NotFound, None),
        N::NoDomainBackup => (Kind::SnapshotLost, None),
        N::MultipleDomains => (Kind::Ambiguous, None),
        N::AccessDenied | N::AuthFailed | N::AuthCancelled | N::AuthUnavailable => {
            (Kind::Permission, Some(ACCESS))
        }
        N::NoSource | N::NoConnect | N::NoServer | N::NoClient | N::Rpc | N::Ssh | N::Libssh => {
            (Kind::Connection, None)
        }
        // The daemon was restarted, or the way to it was cut; before or while it is asked.
        N::InternalError | N::SystemError
            if error.domain() == Enum::Known(ErrorDomain::Rpc)
                && ["socket is closed", "Broken pipe", "reset by peer", "End of file"]
                    .iter()
                    .any(|ended| message.contains(ended)) =>
        {
            (Kind::Connection, Some("run it again when libvirt answers"))
        }
        N::OperationTimeout if message.contains("state change lock") => {
            (Kind::Busy, Some("another job runs on the domain; 'virsh domjobinfo DOMAIN' shows it"))
        }
        N::OperationTimeout | N::AgentCommandTimeout | N::AgentUnresponsive => {
            (Kind::Timeout, None)
        }
        N::ResourceBusy | N::BlockCopyActive => (Kind::Busy, None),
        N::OperationInvalid if message.contains("migrat") || message.contains("job") => {
            (Kind::Busy, Some("'virsh domjobinfo DOMAIN' shows what the domain is doing"))
        }
        N::OperationUnsupported | N::NoSupport | N::ConfigUnsupported | N::ArgumentUnsupported => {
            (Kind::Unsupported, None)
        }
        N::CheckpointInconsistent => (Kind::NoBase, None),
        N::SystemError => system(message),
        // bdrv_attach_child_common (block.c): restored or migrated here and not run since.
        N::InternalError if message.contains("Inactive '") => (
            Kind::Unsupported,
            Some(
                "QEMU takes over the images of a restored or migrated domain when it runs: resume \
                 it once ('virsh resume'), then back it up",
            ),
        ),
        // virpolkit.c: the daemon asks polkit whether this user may, and polkit is not there to ask.
        N::InternalError if message.contains("system bus") => (Kind::Permission, Some(ACCESS)),
        N::InternalError if message.contains("No space left") => (Kind::NoSpace, None),
        N::InternalError if message.contains("Permission denied") => (
            Kind::Permission,
            Some(
                "QEMU runs as its own user (libvirt-qemu or qemu) and may be confined by AppArmor or \
                 SELinux: it must be able to reach the scratch directory and the socket's directory",
            ),
        ),
        _ => (Kind::Io, None),
    }
}

/// `VIR_ERR_SYSTEM_ERROR` carries an errno as text.
fn system(message: &str) -> (Kind, Option<&'static str>) {
    if message.contains("Permission denied") {
        (Kind::Permission, Some(ACCESS))
    } else if message.contains("No space left") {
        (Kind::NoSpace, None)
    } else if message.contains("socket") || message.to_lowercase().contains("connect") {
        (Kind::Connection, Some("is the libvirt daemon running? (systemctl start libvirtd)"))
    } else {
        (Kind::Io, None)
    }
}
