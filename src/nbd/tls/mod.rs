//! TLS for NBD sessions, started inside the session by the option STARTTLS.
//!
//! ```text
//!  client: greet ─► STARTTLS ─► ACK ─► ClientTls::connect ─► options, all of them, from the start
//!  server:              ACK ─► ServerTls::accept ──────────► options, all of them, from the start
//! ```
//!
//! X.509 certificates or pre-shared keys (PSK), in the file layout of GnuTLS that qemu, nbdkit and
//! libnbd share, TLS 1.2 and 1.3. Rules:
//!
//! - Whoever asks for TLS names its [`Mode`]; "off" is not to have a [`ClientTls`] or [`ServerTls`].
//!   A client with [`Mode::Required`] never sends an export's name in the clear, and never goes on
//!   without TLS. With [`Mode::Allowed`] somebody between client and server can remove TLS: the log
//!   says when a session goes on without.
//! - A server's certificate must lead to one of the authorities in `ca-cert.pem` (not to any the
//!   system trusts), be for this server's name or address, and be in date and not revoked.
//! - Suites have forward secrecy and authenticated encryption. Sessions are not resumed.
//! - Keys are in no log, error or `Debug` output, and are wiped from our memory.
//!
//! `credentials` reads files, `session` speaks to OpenSSL. Without the cargo feature `tls` the types
//! are there and each use of them is an error. Not done: renewed certificates are read when a server
//! starts, not while it runs.

#[cfg(feature = "tls")]
mod credentials;
#[cfg_attr(not(feature = "tls"), path = "absent.rs")]
mod session;

use std::path::{Path, PathBuf};

use super::stream::Stream;
use crate::error::{Error, Result, with_causes};

/// Certificates of the authorities a peer's certificate must come from.
pub const CA_CERTIFICATES: &str = "ca-cert.pem";
/// Certificates that these authorities have revoked.
pub const CA_REVOCATIONS: &str = "ca-crl.pem";
/// `USER:HEXKEY` lines.
pub const PSK_FILE: &str = "keys.psk";
/// Where libnbd looks for certificates (nbd_set_tls_certificates(3)), below a user's home …
const CERTIFICATES_OF_USER: [&str; 2] = [".pki/libnbd", ".config/pki/libnbd"];
/// … and of the machine.
const CERTIFICATES_OF_SYSTEM: &str = "/etc/pki/libnbd";

/// Whether a session may go on without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// If the peer cannot or does not want TLS.
    Allowed,
    /// Never.
    Required,
}

/// What proves who is who: places of files, not their content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// X.509: a directory with `ca-cert.pem`, maybe `ca-crl.pem`, and `client-cert.pem` with
    /// `client-key.pem` or `server-cert.pem` with `server-key.pem` (a client may go without).
    Certificates(PathBuf),
    /// X.509: the authorities the system trusts, and no certificate of our own. For clients.
    SystemAuthorities,
    /// Pre-shared keys: a file of `USER:HEXKEY` lines, or a directory with `keys.psk`.
    Psk(PathBuf),
}

impl Credentials {
    /// Certificates from where libnbd's programs look for them, below the `home` of a user if there
    /// is one, else below /etc; else the authorities of the system.
    pub fn search(home: Option<&Path>) -> Self {
        let of_user = home.iter().flat_map(|home| CERTIFICATES_OF_USER.map(|dir| home.join(dir)));
        of_user
            .chain([PathBuf::from(CERTIFICATES_OF_SYSTEM)])
            .find(|dir| dir.join(CA_CERTIFICATES).exists())
            .map_or(Self::SystemAuthorities, Self::Certificates)
    }
}

/// Whether a client checks who the server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerCheck {
    /// Yes.
    Verify,
    /// No: the session is encrypted, to whoever answers.
    Ignore,
}

/// What a client wants of TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    /// Whether to go on without.
    pub mode: Mode,
    /// Files.
    pub credentials: Credentials,
    /// Which key of a PSK file; the only one if not given.
    pub username: Option<String>,
    /// Whom the server's certificate must name, if not the host of its address.
    pub hostname: Option<String>,
    /// Whether to check the server's certificate.
    pub peer_check: PeerCheck,
}

impl ClientTls {
    /// TLS or nothing, with the server checked by the name in its address.
    pub fn required(credentials: Credentials) -> Self {
        Self {
            mode: Mode::Required,
            credentials,
            username: None,
            hostname: None,
            peer_check: PeerCheck::Verify,
        }
    }

    /// The client's half of the TLS handshake with `peer`, which errors name; `host` is the name or
    /// address it was reached by. Not cancel-safe: drop the stream with it.
    pub async fn connect(
        &self,
        stream: Box<dyn Stream>,
        peer: &str,
        host: Option<&str>,
    ) -> Result<Secured> {
        session::connect(self, stream, peer, self.hostname.as_deref().or(host)).await
    }
}

/// Whether clients must have certificates (those with a PSK always prove who they are).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCertificates {
    /// A client without one is refused.
    Required,
    /// Whoever reaches the server may come in; a certificate that is shown must be good.
    Optional,
}

/// What a server offers as TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTlsOptions {
    /// Whether clients may go without.
    pub mode: Mode,
    /// Files.
    pub credentials: Credentials,
    /// Whom to let in.
    pub client_certificates: ClientCertificates,
}

/// A server's TLS, its files read and checked. Cloning is cheap.
#[derive(Clone)]
pub struct ServerTls {
    mode: Mode,
    acceptor: session::Acceptor,
}

impl ServerTls {
    /// Reads the files.
    pub fn load(options: &ServerTlsOptions) -> Result<Self> {
        Ok(Self { mode: options.mode, acceptor: session::Acceptor::load(options)? })
    }

    /// Whether clients may go without.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The server's half of the TLS handshake with `peer`, which errors name. The caller bounds the
    /// wait. Not cancel-safe: drop the stream with it.
    pub async fn accept(&self, stream: Box<dyn Stream>, peer: &str) -> Result<Secured> {
        self.acceptor.accept(stream, peer).await
    }
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls").field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// Says, where a user sees it, that a session goes on without the TLS that is allowed and not required;
/// `refusal` is what the server said of it.
pub(super) fn goes_without(peer: &str, refusal: Option<&Error>) {
    let refusal = refusal.map(|error| with_causes(error));
    tracing::warn!(peer, refusal, "the server has no TLS: going on without");
}

/// A stream inside TLS.
pub struct Secured {
    /// Plain text on our side of it.
    pub stream: Box<dyn Stream>,
    /// What was agreed.
    pub session: TlsSession,
}

/// What two peers agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSession {
    /// `TLSv1.3`, say.
    pub version: String,
    /// The suite, as OpenSSL calls it.
    pub suite: String,
    /// The subject of the peer's certificate, if it showed one.
    pub peer: Option<String>,
}
