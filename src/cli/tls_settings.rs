//! What a server is told about TLS. Clients are told in their URIs ([`super::settings::nbd_uri`]).
//!
//! The words are those of nbdkit (`--tls`, `--tls-certificates`) and of NBD URIs (`tls-psk-file`,
//! `tls-verify-peer`). Unlike nbdkit's, our server checks clients unless it is told not to: what it
//! serves are whole disks.

use std::path::PathBuf;

use crate::error::{Error, Kind, Result};
use crate::nbd::tls::{ClientCertificates, Credentials, Mode, ServerTlsOptions};

/// TLS of a server.
#[derive(clap::Args, Debug, Default)]
#[command(next_help_heading = "TLS")]
pub(crate) struct TlsArgs {
    /// Whether clients must use TLS [default: require with certificates or keys, else off]
    #[arg(long, value_name = "MODE")]
    tls: Option<TlsMode>,
    /// Directory with ca-cert.pem, server-cert.pem, server-key.pem, and maybe ca-crl.pem
    #[arg(long, value_name = "DIR", conflicts_with = "tls_psk_file")]
    tls_certificates: Option<PathBuf>,
    /// File with a line USER:HEXKEY for each client
    #[arg(long, value_name = "FILE")]
    tls_psk_file: Option<PathBuf>,
    /// With certificates: whether clients must have one, too [default: true]
    #[arg(long, value_name = "BOOL")]
    tls_verify_peer: Option<bool>,
}

/// nbdkit's three modes.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum TlsMode {
    /// No TLS
    Off,
    /// For clients that ask for it
    On,
    /// For all; others are told nothing
    Require,
}

impl TlsArgs {
    /// What was meant.
    pub(crate) fn options(&self) -> Result<Option<ServerTlsOptions>> {
        if self.tls_verify_peer.is_some() && self.tls_certificates.is_none() {
            let message = "--tls-verify-peer is about certificates, and there are none";
            return Err(Error::new(Kind::Usage, message).hint("name them with --tls-certificates"));
        }
        let credentials = match (&self.tls_certificates, &self.tls_psk_file) {
            (Some(dir), _) => Some(Credentials::Certificates(dir.clone())),
            (None, Some(file)) => Some(Credentials::Psk(file.clone())),
            (None, None) => None,
        };
        let mode = match (self.tls, credentials.is_some()) {
            (Some(TlsMode::Off), _) | (None, false) => return Ok(None),
            (Some(TlsMode::On), _) => Mode::Allowed,
            (Some(TlsMode::Require), _) | (None, true) => Mode::Required,
        };
        let credentials = credentials.ok_or_else(|| {
            Error::new(Kind::Usage, "a TLS server needs a certificate or keys")
                .hint("name them with --tls-certificates or --tls-psk-file")
        })?;
        let client_certificates = match self.tls_verify_peer {
            Some(false) => ClientCertificates::Optional,
            _ => ClientCertificates::Required,
        };
        Ok(Some(ServerTlsOptions { mode, credentials, client_certificates }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_alone_mean_that_tls_is_required() {
        let given = |tls| TlsArgs { tls, tls_psk_file: Some("/k".into()), ..TlsArgs::default() };
        let mode = |tls| given(tls).options().unwrap().map(|options| options.mode);
        assert_eq!(mode(None), Some(Mode::Required));
        assert_eq!(mode(Some(TlsMode::Require)), Some(Mode::Required));
        assert_eq!(mode(Some(TlsMode::On)), Some(Mode::Allowed));
        assert_eq!(mode(Some(TlsMode::Off)), None);
    }

    #[test]
    fn tls_without_credentials_is_refused_not_left_out() {
        assert_eq!(TlsArgs::default().options().unwrap(), None);
        for tls in [TlsMode::On, TlsMode::Require] {
            let args = TlsArgs { tls: Some(tls), ..TlsArgs::default() };
            assert_eq!(args.options().unwrap_err().kind(), Kind::Usage);
        }
    }

    #[test]
    fn clients_need_certificates_unless_they_are_told_that_they_do_not() {
        let of = |tls_verify_peer| {
            let tls_certificates = Some("/c".into());
            let args = TlsArgs { tls_certificates, tls_verify_peer, ..TlsArgs::default() };
            args.options().unwrap().unwrap().client_certificates
        };
        assert_eq!(of(None), ClientCertificates::Required);
        assert_eq!(of(Some(true)), ClientCertificates::Required);
        assert_eq!(of(Some(false)), ClientCertificates::Optional);
    }
}
