//! TLS handshakes by OpenSSL, and the stream that comes out of one.
//!
//! OpenSSL's own defaults for clients (`SslConnector`) are not used: they trust every authority of
//! the system beside those that are given.

use std::net::IpAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use openssl::bn::BigNum;
use openssl::dh::Dh;
use openssl::error::ErrorStack;
use openssl::ssl::{
    ErrorCode, Ssl, SslContext, SslContextBuilder, SslFiletype, SslMethod, SslMode, SslOptions,
    SslRef, SslSessionCacheMode, SslVerifyMode, SslVersion,
};
use openssl::x509::verify::{X509CheckFlags, X509VerifyFlags};
use openssl::x509::{X509, X509NameEntryRef, X509VerifyResult, store::X509Lookup};
use tokio::io::BufWriter;
use tokio_openssl::SslStream;

use super::credentials::{Certificates, Keys, Role};
use super::{
    ClientCertificates, ClientTls, Credentials, PeerCheck, Secured, ServerTlsOptions, TlsSession,
};
use crate::error::{Error, Kind, Result};
use crate::nbd::stream::{ReadHalf, Stream, WriteHalf};
use crate::nbd::wire;

/// Suites of TLS 1.2 for certificates.
const SUITES: &str = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE-RSA+AESGCM:!PSK";
/// Suites of TLS 1.2 for keys. There is no ECDHE-PSK with AES-GCM in OpenSSL.
const SUITES_PSK: &str =
    "DHE-PSK-AES128-GCM-SHA256:DHE-PSK-AES256-GCM-SHA384:ECDHE-PSK-CHACHA20-POLY1305";
/// Suites of TLS 1.3 for keys: OpenSSL ties a key to SHA-256, which leaves this one and ChaCha;
/// offered both, GnuTLS takes the latter, at a third of the speed (measured on a CPU with AES).
const SUITES_PSK_13: &str = "TLS_AES_128_GCM_SHA256";
/// 112 bits and more.
const SECURITY_LEVEL: u32 = 2;
/// Gathers four full records (16 KiB and what goes around it) into one system call.
const WRITE_BUFFER_BYTES: usize = 66 << 10;

/// A stream between OpenSSL and the socket's.
type Wrapped = SslStream<BufWriter<Box<dyn Stream>>>;

impl Stream for Wrapped {
    fn halves(self: Box<Self>) -> (ReadHalf, WriteHalf) {
        let (reader, writer) = tokio::io::split(*self);
        (Box::new(reader), Box::new(writer))
    }
}

/// The client's half of a handshake; `name` is whom the certificate must be for.
pub(super) async fn connect(
    tls: &ClientTls,
    stream: Box<dyn Stream>,
    peer: &str,
    name: Option<&str>,
) -> Result<Secured> {
    let ssl = match &tls.credentials {
        Credentials::Psk(place) => {
            let keys = Keys::load(place)?;
            let user = tls.username.as_deref().map(str::as_bytes).or(keys.only_user());
            let user = user.ok_or_else(|| {
                Error::new(Kind::Usage, format!("no user is named for {}", place.display()))
                    .hint("it has several: say which with tls-username=USER")
            })?;
            let Some(key) = keys.find(user) else {
                let user = String::from_utf8_lossy(user);
                let message = format!("{} has no key of user '{user}'", place.display());
                return Err(Error::new(Kind::NotFound, message));
            };
            client_psk(user, key).map_err(internal)?
        }
        Credentials::Certificates(dir) => {
            let certificates = Certificates::load(dir, Role::Client)?;
            client_x509(tls, Some((certificates, dir)), peer, name)?
        }
        Credentials::SystemAuthorities => client_x509(tls, None, peer, name)?,
    };
    let mut stream = wrap(ssl, stream)?;
    match Pin::new(&mut stream).connect().await {
        Ok(()) => Ok(secured(stream)),
        Err(error) => {
            Err(failed(&format!("NBD server {peer}"), stream.ssl(), tls.peer_check, &error))
        }
    }
}

/// What a server accepts with.
#[derive(Clone)]
pub(super) struct Acceptor(SslContext);

impl Acceptor {
    pub(super) fn load(options: &ServerTlsOptions) -> Result<Self> {
        let mut context = base(SslMethod::tls_server()).map_err(internal)?;
        match &options.credentials {
            Credentials::Psk(place) => {
                server_psk(&mut context, Keys::load(place)?).map_err(internal)?;
            }
            Credentials::Certificates(dir) => {
                let certificates = Certificates::load(dir, Role::Server)?;
                install(&mut context, certificates, dir, Role::Server)?;
                context.set_cipher_list(SUITES).map_err(internal)?;
                context.set_verify(match options.client_certificates {
                    ClientCertificates::Required => {
                        SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT
                    }
                    ClientCertificates::Optional => SslVerifyMode::PEER,
                });
            }
            Credentials::SystemAuthorities => {
                return Err(Error::new(Kind::Usage, "a TLS server needs a certificate or keys"));
            }
        }
        Ok(Self(context.build()))
    }

    pub(super) async fn accept(&self, stream: Box<dyn Stream>, peer: &str) -> Result<Secured> {
        let mut stream = wrap(Ssl::new(&self.0).map_err(internal)?, stream)?;
        match Pin::new(&mut stream).accept().await {
            Ok(()) => Ok(secured(stream)),
            Err(error) => {
                let peer = format!("NBD client {peer}");
                Err(failed(&peer, stream.ssl(), PeerCheck::Verify, &error))
            }
        }
    }
}

fn base(method: SslMethod) -> Result<SslContextBuilder, ErrorStack> {
    let mut context = SslContextBuilder::new(method)?;
    context.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    context.set_security_level(SECURITY_LEVEL);
    context.set_options(
        SslOptions::NO_COMPRESSION
            | SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_TICKET
            | SslOptions::CIPHER_SERVER_PREFERENCE,
    );
    context.set_mode(
        SslMode::AUTO_RETRY
            | SslMode::ENABLE_PARTIAL_WRITE
            // Between two attempts at a write, the future that makes them may have moved.
            | SslMode::ACCEPT_MOVING_WRITE_BUFFER,
    );
    context.set_session_cache_mode(SslSessionCacheMode::OFF);
    context.set_num_tickets(0)?;
    // Nothing but TLS follows on the stream, so a record's header and body may come in one call.
    context.set_read_ahead(true);
    Ok(context)
}

fn client_psk(user: &[u8], key: &[u8]) -> Result<Ssl, ErrorStack> {
    let mut context = base(SslMethod::tls_client())?;
    context.set_ciphersuites(SUITES_PSK_13)?;
    context.set_cipher_list(SUITES_PSK)?;
    // A server that answers with a certificate instead: no authority is trusted, so it is refused.
    context.set_verify(SslVerifyMode::PEER);
    let (user, key) = (user.to_owned(), zeroize::Zeroizing::new(key.to_owned()));
    context.set_psk_client_callback(move |_, _, user_out, key_out| {
        // The name ends with a zero. The limits of both are far above ours; nothing is no key.
        let fits = user_out.len() > user.len() && key_out.len() >= key.len();
        if !fits {
            return Ok(0);
        }
        user_out[..user.len()].copy_from_slice(&user);
        user_out[user.len()] = 0;
        key_out[..key.len()].copy_from_slice(&key);
        Ok(key.len())
    });
    Ssl::new(&context.build())
}

fn server_psk(context: &mut SslContextBuilder, keys: Keys) -> Result<(), ErrorStack> {
    context.set_ciphersuites(SUITES_PSK_13)?;
    context.set_cipher_list(SUITES_PSK)?;
    let group = Dh::from_pqg(BigNum::get_rfc3526_prime_3072()?, None, BigNum::from_u32(2)?)?;
    context.set_tmp_dh(&group)?;
    let keys = Arc::new(keys);
    context.set_psk_server_callback(move |_, user, out| {
        let key = user.and_then(|user| keys.find(user)).filter(|key| key.len() <= out.len());
        let Some(key) = key else { return Ok(0) };
        out[..key.len()].copy_from_slice(key);
        Ok(key.len())
    });
    Ok(())
}

/// A session that checks (unless it was told not to) who the server is.
fn client_x509(
    tls: &ClientTls,
    certificates: Option<(Certificates, &Path)>,
    peer: &str,
    name: Option<&str>,
) -> Result<Ssl> {
    let mut context = base(SslMethod::tls_client()).map_err(internal)?;
    context.set_cipher_list(SUITES).map_err(internal)?;
    match certificates {
        Some((certificates, dir)) => install(&mut context, certificates, dir, Role::Client)?,
        None => context.set_default_verify_paths().map_err(internal)?,
    }
    let verify = tls.peer_check == PeerCheck::Verify;
    context.set_verify(if verify { SslVerifyMode::PEER } else { SslVerifyMode::NONE });
    let mut ssl = Ssl::new(&context.build()).map_err(internal)?;
    match name {
        Some(name) => expect_name(&mut ssl, name).map_err(internal)?,
        None if verify => {
            let message = format!("nothing says which name NBD server {peer} must prove to have");
            return Err(Error::new(Kind::Usage, message)
                .hint("its address has none: add tls-hostname=NAME, as in its certificate"));
        }
        None => {}
    }
    Ok(ssl)
}

/// Accepts a certificate for `name` (or address) only.
fn expect_name(ssl: &mut SslRef, name: &str) -> Result<(), ErrorStack> {
    let parameters = ssl.param_mut();
    if let Ok(address) = name.parse::<IpAddr>() {
        return parameters.set_ip(address);
    }
    parameters.set_hostflags(X509CheckFlags::NO_PARTIAL_WILDCARDS);
    parameters.set_host(name)?;
    ssl.set_hostname(name)
}

/// Authorities, revocations, and a certificate of our own.
fn install(
    context: &mut SslContextBuilder,
    certificates: Certificates,
    dir: &Path,
    role: Role,
) -> Result<()> {
    let invalid = |e: ErrorStack| {
        let message = format!("the certificates in {} cannot be used", dir.display());
        Error::new(Kind::Usage, message).source(e)
    };
    for authority in certificates.authorities {
        if role == Role::Server {
            context.add_client_ca(&authority).map_err(invalid)?;
        }
        context.cert_store_mut().add_cert(authority).map_err(invalid)?;
    }
    if let Some(path) = certificates.revocations {
        if path.to_str().is_none_or(|text| text.contains('\0')) {
            return Err(Error::new(Kind::Usage, format!("{} is not UTF-8", path.display())));
        }
        let store = context.cert_store_mut();
        let lookup = store.add_lookup(X509Lookup::file()).map_err(invalid)?;
        lookup.load_crl_file(&path, SslFiletype::PEM).map_err(|e| {
            let message = format!("{} is not a PEM file of revocations", path.display());
            Error::new(Kind::Usage, message).source(e)
        })?;
        // Of every authority on the way there must be a list: one that is missing hides something.
        let flags = X509VerifyFlags::CRL_CHECK | X509VerifyFlags::CRL_CHECK_ALL;
        store.set_flags(flags).map_err(invalid)?;
    }
    if let Some(own) = certificates.own {
        let mut chain = own.chain.into_iter();
        let first = chain.next().expect("a file without a certificate was refused");
        context.set_certificate(&first).map_err(invalid)?;
        for next in chain {
            context.add_extra_chain_cert(next).map_err(invalid)?;
        }
        context.set_private_key(&own.key).map_err(invalid)?;
        context.check_private_key().map_err(invalid)?;
    }
    Ok(())
}

fn wrap(ssl: Ssl, stream: Box<dyn Stream>) -> Result<Wrapped> {
    let stream = BufWriter::with_capacity(WRITE_BUFFER_BYTES, stream);
    SslStream::new(ssl, stream).map_err(internal)
}

fn secured(stream: Wrapped) -> Secured {
    let suite = stream.ssl().current_cipher().map_or("none", |cipher| cipher.name());
    let (version, suite) = (stream.ssl().version_str().to_owned(), suite.to_owned());
    let peer = stream.ssl().peer_certificate().map(|certificate| subject(&certificate));
    Secured { stream: Box::new(stream), session: TlsSession { version, suite, peer } }
}

/// Whom a certificate is for, as `O=Example,CN=host`.
fn subject(certificate: &X509) -> String {
    let part = |entry: &X509NameEntryRef| {
        let key = entry.object().nid().short_name().unwrap_or("?");
        format!("{key}={}", wire::peer_text(entry.data().as_slice()))
    };
    certificate.subject_name().entries().map(part).collect::<Vec<_>>().join(",")
}

/// Why a handshake with `peer` failed: it is not who it should be, it refused us, it does not speak
/// TLS, or the connection broke.
fn failed(peer: &str, ssl: &SslRef, check: PeerCheck, error: &openssl::ssl::Error) -> Error {
    let verified = ssl.verify_result();
    if check == PeerCheck::Verify && verified != X509VerifyResult::OK {
        let why = verified.error_string();
        let message = format!("the certificate of {peer} is refused: {why}");
        return Error::new(Kind::Permission, message);
    }
    let message = format!("the TLS handshake with {peer} failed");
    if let Some(io) = error.io_error() {
        return Error::io(message, std::io::Error::new(io.kind(), io.to_string()));
    }
    if error.code() == ErrorCode::SYSCALL {
        return Error::io(message, std::io::ErrorKind::UnexpectedEof.into());
    }
    let reasons = error.ssl_error().map(ErrorStack::errors).unwrap_or_default();
    let said = |what: &str| reasons.iter().any(|e| e.reason().is_some_and(|r| r.contains(what)));
    let message = match reasons.first().and_then(openssl::error::Error::reason) {
        Some(reason) => format!("{message}: {reason}"),
        None => message,
    };
    // OpenSSL's reasons for what the other side says begin with the version and "alert".
    let kind = if said("alert") || said("peer did not return a certificate") || said("psk identity")
    {
        Kind::Permission
    } else {
        Kind::Protocol
    };
    Error::new(kind, message)
}

fn internal(error: ErrorStack) -> Error {
    Error::new(Kind::Internal, "OpenSSL cannot set up TLS").source(error)
}
