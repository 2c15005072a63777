//! NBD URIs (`doc/uri.md` of the NBD project, with what libnbd adds).
//!
//! `nbd://host[:port]/export`, `nbd+unix:///export?socket=PATH`, `nbd+vsock://CID[:PORT]/export`, and
//! with TLS `nbds://[user@]host…`, `nbds+unix:`, `nbds+vsock:`. The export is the path without its
//! first slash, percent-decoded: `nbd://h//disk` names `/disk`. An unknown parameter is an error,
//! never ignored, because it may be one that was meant to make the connection safer.
//!
//! The schemes with an s require TLS. `tls=on`, a parameter of our own with the server's word for it,
//! lets `nbd` use it where the server has it and go on without where not.
//!
//! The parameters of TLS (`tls-certificates=DIR`, `tls-psk-file=FILE`, `tls-username=USER` or a user
//! before the host, `tls-hostname=NAME`, `tls-verify-peer=BOOL`, `tls-type=x509` or `psk`) name files of
//! this machine or make checks weaker: they are taken from the command line only, see [`Origin`]. ssh
//! is recognised and refused.
//!
//! A socket whose name begins with `%00` has no file (unix(7), "abstract").

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::tls::{ClientTls, Credentials, Mode, PeerCheck};
use super::wire::STRING_BYTES_MAX;
use crate::error::{Error, Kind, Result};

/// The port IANA gave to NBD.
pub const PORT_DEFAULT: u16 = 10809;

/// Where an export is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// How to get there.
    pub address: Address,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// TLS; `None` means without.
    pub tls: Option<ClientTls>,
}

/// How to reach a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP port; the host is a name or an address, IPv6 without brackets.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
    /// A socket between a virtual machine and its host.
    Vsock {
        /// Which machine; 2 is the host.
        cid: u32,
        /// Port.
        port: u32,
    },
}

/// Who wrote a URI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The person who runs this program.
    CommandLine,
    /// Somebody who must not choose files of this machine or weaken checks: a catalog, a network
    /// message, a VM's description.
    Elsewhere,
}

impl NbdUri {
    /// The export `export` at `address`, without TLS.
    pub fn at(address: Address, export: impl Into<String>) -> Self {
        Self { address, export: export.into(), tls: None }
    }

    /// The export `export` at a unix socket.
    pub fn unix(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        Self::at(Address::Unix(socket.into()), export)
    }

    /// Reads a URI; with TLS but without credentials in it, the system's authorities are trusted.
    pub fn parse(text: &str, origin: Origin) -> Result<Self> {
        let bad = |why: &str| {
            Error::new(Kind::Usage, format!("'{text}' is not an NBD URI: {why}"))
                .hint("write nbd://host:port/export or nbd+unix:///export?socket=/path")
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("it has no '://'"))?;
        let (tls, transport) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => (false, Transport::Tcp),
            "nbds" => (true, Transport::Tcp),
            "nbd+unix" => (false, Transport::Unix),
            "nbds+unix" => (true, Transport::Unix),
            "nbd+vsock" => (false, Transport::Vsock),
            "nbds+vsock" => (true, Transport::Vsock),
            "nbd+ssh" | "nbds+ssh" => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("cannot open '{text}': {scheme} is not supported"),
                )
                .hint("forward the server's socket with ssh -L and name it with nbd+unix://"));
            }
            _ => {
                return Err(bad(
                    "its scheme is not nbd, nbds, or one of them with +unix or +vsock",
                ));
            }
        };
        if rest.contains('#') {
            return Err(bad("it has a fragment"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(path).ok_or_else(|| bad("the export name is not valid"))?;
        if export.len() > STRING_BYTES_MAX {
            return Err(bad("the export name is longer than 4096 bytes"));
        }
        let (user, host) = match authority.split_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let mut parameters = Parameters::of(query).map_err(|why| bad(&why))?;
        if let Some(user) = user {
            parameters.set("tls-username", user).map_err(|why| bad(&why))?;
        }
        let address = match (transport, parameters.socket.take()) {
            (Transport::Unix, Some(socket)) if host.is_empty() => Address::Unix(socket.into()),
            (Transport::Unix, Some(_)) => return Err(bad("a unix socket has no host")),
            (Transport::Unix, None) => return Err(bad("socket=PATH is missing")),
            (_, Some(_)) => return Err(bad("socket= needs the scheme nbd+unix")),
            (Transport::Tcp, None) => tcp(host).ok_or_else(|| bad("host or port is not valid"))?,
            (Transport::Vsock, None) => {
                vsock(host).ok_or_else(|| bad("CID or port is not valid"))?
            }
        };
        if origin == Origin::Elsewhere && parameters != Parameters::default() {
            return Err(Error::new(
                Kind::Permission,
                format!(
                    "'{text}' has parameters of TLS, which are taken from the command line only"
                ),
            ));
        }
        let mode = parameters.mode(tls).map_err(bad)?;
        let tls = mode.map(|mode| parameters.tls(mode).map_err(bad)).transpose()?;
        Ok(Self { address, export, tls })
    }
}

#[derive(Clone, Copy)]
enum Transport {
    Tcp,
    Unix,
    Vsock,
}

impl FromStr for NbdUri {
    type Err = Error;

    /// Reads a URI of [`Origin::Elsewhere`].
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text, Origin::Elsewhere)
    }
}

/// What may follow the question mark; those of TLS stay together to be refused together.
#[derive(Default, PartialEq, Eq)]
struct Parameters {
    socket: Option<String>,
    certificates: Option<String>,
    psk_file: Option<String>,
    username: Option<String>,
    hostname: Option<String>,
    verify_peer: Option<String>,
    /// What the credentials are, which is checked and adds nothing.
    kind: Option<String>,
    tls: Option<String>,
}

impl Parameters {
    fn of(query: &str) -> std::result::Result<Self, String> {
        let mut parameters = Self::default();
        for parameter in query.split(['&', ';']).filter(|p| !p.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            parameters.set(name, value)?;
        }
        Ok(parameters)
    }

    fn set(&mut self, name: &str, value: &str) -> std::result::Result<(), String> {
        let place = match name {
            "socket" => &mut self.socket,
            "tls-certificates" => &mut self.certificates,
            "tls-psk-file" => &mut self.psk_file,
            "tls-username" => &mut self.username,
            "tls-hostname" => &mut self.hostname,
            "tls-verify-peer" => &mut self.verify_peer,
            "tls-type" => &mut self.kind,
            "tls" => &mut self.tls,
            _ => return Err(format!("the parameter '{name}' is not supported")),
        };
        let valid = |value: &String| {
            // A zero byte first: a socket with a name and no file (unix(7), "abstract").
            let text = value.strip_prefix('\0').filter(|_| name == "socket").unwrap_or(value);
            !text.is_empty() && !text.contains('\0')
        };
        let value = decode(value).filter(valid);
        let value = value.ok_or_else(|| format!("the value of {name} is not valid"))?;
        match place.replace(value) {
            None => Ok(()),
            Some(_) => Err(format!("{name} is given twice")),
        }
    }

    /// Whether there is to be TLS, by the scheme (`secure`) and the parameter that is taken out here.
    fn mode(&mut self, secure: bool) -> std::result::Result<Option<Mode>, &'static str> {
        match (secure, self.tls.take().as_deref()) {
            (true, None | Some("require")) => Ok(Some(Mode::Required)),
            (false, Some("on")) => Ok(Some(Mode::Allowed)),
            (false, None | Some("off")) if *self == Self::default() => Ok(None),
            (false, None | Some("off")) => {
                Err("a user or parameters of TLS need a scheme with TLS, nbds")
            }
            (true, Some("on" | "off")) => {
                Err("the scheme nbds requires TLS; tls=on and tls=off are for nbd")
            }
            (false, Some("require")) => Err("the scheme that requires TLS is nbds"),
            (_, Some(_)) => Err("tls is neither off, on nor require"),
        }
    }

    fn tls(self, mode: Mode) -> std::result::Result<ClientTls, &'static str> {
        let credentials = match (self.certificates, self.psk_file) {
            (Some(_), Some(_)) => return Err("it has both certificates and keys"),
            (Some(dir), None) => Credentials::Certificates(dir.into()),
            (None, Some(file)) => Credentials::Psk(file.into()),
            (None, None) => Credentials::SystemAuthorities,
        };
        let psk = matches!(credentials, Credentials::Psk(_));
        match self.kind.as_deref() {
            None => {}
            Some("psk") if psk => {}
            Some("x509") if !psk => {}
            Some("psk") => return Err("tls-type=psk needs tls-psk-file"),
            Some("x509") => return Err("tls-type=x509 needs certificates, not tls-psk-file"),
            Some("anon") => {
                return Err("tls-type=anon is not supported: it proves nobody's identity");
            }
            Some(_) => return Err("tls-type is neither x509 nor psk"),
        }
        if !psk && self.username.is_some() {
            return Err("a user needs tls-psk-file");
        }
        if psk && (self.hostname.is_some() || self.verify_peer.is_some()) {
            return Err("tls-hostname and tls-verify-peer are about certificates, not keys");
        }
        let peer_check = match self.verify_peer.as_deref() {
            None | Some("true" | "1" | "yes" | "on") => PeerCheck::Verify,
            Some("false" | "0" | "no" | "off") => PeerCheck::Ignore,
            Some(_) => return Err("tls-verify-peer is neither true nor false"),
        };
        let (username, hostname) = (self.username, self.hostname);
        Ok(ClientTls { mode, credentials, username, hostname, peer_check })
    }
}

fn vsock(authority: &str) -> Option<Address> {
    let (cid, port) = match authority.split_once(':') {
        None | Some((_, "")) => (authority.trim_end_matches(':'), u32::from(PORT_DEFAULT)),
        Some((cid, port)) => (cid, port.parse().ok()?),
    };
    Some(Address::Vsock { cid: cid.parse().ok()?, port })
}

fn tcp(authority: &str) -> Option<Address> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, port) = rest.split_once(']')?;
        host.parse::<std::net::Ipv6Addr>().ok()?;
        (host.to_owned(), if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (decode(host)?, Some(port)),
            None => (decode(authority)?, None),
        }
    };
    let port = match port {
        None | Some("") => PORT_DEFAULT,
        Some(port) => port.parse().ok()?,
    };
    let host = if host.is_empty() { "localhost".to_owned() } else { host };
    Some(Address::Tcp { host, port })
}

/// Percent-decodes; `None` for a malformed escape or text that is not UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
            out.push(digit(bytes.next()?)? << 4 | digit(bytes.next()?)?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

/// Percent-encodes all but what is plain in any part of a URI.
fn encode(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    text.bytes().try_for_each(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
            write!(f, "{}", char::from(byte))
        }
        _ => write!(f, "%{byte:02X}"),
    })
}

impl fmt::Display for NbdUri {
    /// The URI in full: what it has of TLS are places and names, no secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let required = self.tls.as_ref().is_some_and(|tls| tls.mode == Mode::Required);
        let s = if required { "s" } else { "" };
        let mut parameters = Vec::new();
        match &self.address {
            Address::Tcp { host, port } => {
                write!(f, "nbd{s}://")?;
                if host.contains(':') {
                    write!(f, "[{host}]")?;
                } else {
                    encode(host, f)?;
                }
                if *port != PORT_DEFAULT {
                    write!(f, ":{port}")?;
                }
            }
            Address::Unix(socket) => {
                write!(f, "nbd{s}+unix://")?;
                parameters.push(("socket", display(socket)));
            }
            Address::Vsock { cid, port } => write!(f, "nbd{s}+vsock://{cid}:{port}")?,
        }
        write!(f, "/")?;
        encode(&self.export, f)?;
        parameters.extend(self.tls.iter().flat_map(tls_parameters));
        for (separator, (name, value)) in
            std::iter::once('?').chain(std::iter::repeat('&')).zip(parameters)
        {
            write!(f, "{separator}{name}=")?;
            encode(&value, f)?;
        }
        Ok(())
    }
}

fn tls_parameters(tls: &ClientTls) -> Vec<(&'static str, String)> {
    let mut parameters = Vec::new();
    if tls.mode == Mode::Allowed {
        parameters.push(("tls", "on".to_owned()));
    }
    match &tls.credentials {
        Credentials::Certificates(dir) => parameters.push(("tls-certificates", display(dir))),
        Credentials::Psk(file) => parameters.push(("tls-psk-file", display(file))),
        Credentials::SystemAuthorities => {}
    }
    parameters.extend(tls.username.iter().map(|user| ("tls-username", user.clone())));
    parameters.extend(tls.hostname.iter().map(|name| ("tls-hostname", name.clone())));
    if tls.peer_check == PeerCheck::Ignore {
        parameters.push(("tls-verify-peer", "false".to_owned()));
    }
    parameters
}

fn display(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri::at(Address::Tcp { host: host.to_owned(), port }, export)
    }

    #[test]
    fn uris_parse_as_the_specification_reads_them() {
        for (text, expected) in [
            ("nbd://host", tcp("host", 10809, "")),
            ("nbd://host/", tcp("host", 10809, "")),
            ("nbd://host//disk", tcp("host", 10809, "/disk")),
            ("NBD://h:1/a%20b", tcp("h", 1, "a b")),
            ("nbd://[::1]:5/x", tcp("::1", 5, "x")),
            ("nbd:///x", tcp("localhost", 10809, "x")),
            ("nbd+unix:///?socket=/a%3Fb", NbdUri::unix("/a?b", "")),
            ("nbd+unix:///vda?socket=/s", NbdUri::unix("/s", "vda")),
            ("nbd+unix:///?socket=%00name", NbdUri::unix("\0name", "")),
            ("nbd+unix:///?socket=%00/run/a", NbdUri::unix("\0/run/a", "")),
        ] {
            assert_eq!(text.parse::<NbdUri>().unwrap(), expected, "{text}");
        }
    }

    /// libnbd, 2025-12: a host name that begins with a dash became an option of ssh.
    #[test]
    fn no_uri_runs_ssh() {
        for text in ["nbd+ssh://host", "nbds+ssh://host", "nbd+ssh://-oProxyCommand=id/vda"] {
            let error = text.parse::<NbdUri>().unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported, "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, kind) in [
            ("nbd+ssh://host", Kind::Unsupported),
            ("http://host", Kind::Usage),
            ("host:10809", Kind::Usage),
            ("nbd+unix:///", Kind::Usage),
            ("nbd+unix://host/?socket=/s", Kind::Usage),
            ("nbd+unix:///?socket=", Kind::Usage),
            ("nbd+unix:///?socket=%00", Kind::Usage),
            ("nbd+unix:///?socket=/a%00b", Kind::Usage),
            ("nbd+unix:///?socket=%00a%00", Kind::Usage),
            ("nbd+unix:///?socket=/s&socket=/t", Kind::Usage),
            ("nbd://host?socket=/s", Kind::Usage),
            ("nbd://host?tls-verify-peer=false", Kind::Usage),
            ("nbd://user@host", Kind::Usage),
            ("nbd://host:99999", Kind::Usage),
            ("nbd://[::1", Kind::Usage),
            ("nbd://host/%zz", Kind::Usage),
            ("nbd://host/%ff", Kind::Usage),
            ("nbd://host/x#y", Kind::Usage),
            ("nbd+vsock://", Kind::Usage),
            ("nbd+vsock://host", Kind::Usage),
            ("nbd+vsock://2:4294967296", Kind::Usage),
            ("nbds://host?tls-certificates=", Kind::Usage),
            ("nbds://host?tls-certificates=/c&tls-psk-file=/k", Kind::Usage),
            ("nbds://host?tls-certificates=/c&tls-username=u", Kind::Usage),
            ("nbds://u@host?tls-psk-file=/k&tls-username=u", Kind::Usage),
            ("nbds://host?tls-psk-file=/k&tls-verify-peer=false", Kind::Usage),
            ("nbds://host?tls-psk-file=/k&tls-hostname=h", Kind::Usage),
            ("nbds://host?tls-verify-peer=maybe", Kind::Usage),
            ("nbds://host?tls-type=anon", Kind::Usage),
            ("nbd://host?tls-certificates=/c", Kind::Usage),
        ] {
            let error = NbdUri::parse(text, Origin::CommandLine).unwrap_err();
            assert_eq!(error.kind(), kind, "{text}");
        }
    }

    #[test]
    fn tls_is_a_scheme_and_its_parameters_are_those_of_libnbd() {
        let at = |text: &str| NbdUri::parse(text, Origin::CommandLine).unwrap();
        let psk = ClientTls {
            username: Some("u@x".into()),
            ..ClientTls::required(Credentials::Psk("/k".into()))
        };
        let uri = NbdUri { tls: Some(psk), ..tcp("h", 10809, "x") };
        assert_eq!(at("nbds://u%40x@h/x?tls-psk-file=/k"), uri);
        assert_eq!(at("nbds://h/x?tls-psk-file=/k;tls-username=u@x"), uri);
        let x509 = ClientTls {
            hostname: Some("n".into()),
            peer_check: PeerCheck::Ignore,
            ..ClientTls::required(Credentials::Certificates("/c d".into()))
        };
        let uri = NbdUri { tls: Some(x509), ..NbdUri::unix("/s", "") };
        let text =
            "nbds+unix:///?socket=/s&tls-certificates=/c%20d&tls-hostname=n&tls-verify-peer=";
        assert_eq!(at(&format!("{text}false")), uri);
        assert_eq!(uri.to_string(), format!("{text}false"));
        let system = ClientTls::required(Credentials::SystemAuthorities);
        let address = Address::Vsock { cid: 2, port: 10809 };
        assert_eq!(at("NBDS+vsock://2/"), NbdUri { tls: Some(system), ..NbdUri::at(address, "") });
        let address = Address::Vsock { cid: 3, port: 1 << 31 };
        assert_eq!(at("nbd+vsock://3:2147483648/a"), NbdUri::at(address, "a"));
    }

    #[test]
    fn a_type_of_tls_must_be_that_of_the_credentials() {
        let parse = |text: &str| NbdUri::parse(text, Origin::CommandLine);
        for (typed, same) in [
            ("nbds://h?tls-type=x509", "nbds://h"),
            ("nbds://h?tls-type=x509&tls-certificates=/c", "nbds://h?tls-certificates=/c"),
            ("nbds://h?tls-type=psk&tls-psk-file=/k", "nbds://h?tls-psk-file=/k"),
        ] {
            assert_eq!(parse(typed).unwrap(), parse(same).unwrap());
        }
        for (text, why) in [
            ("nbds://h?tls-type=psk", "needs tls-psk-file"),
            ("nbds://h?tls-type=x509&tls-psk-file=/k", "needs certificates"),
            ("nbds://h?tls-type=anon", "proves nobody's identity"),
            ("nbds://h?tls-type=x", "neither x509 nor psk"),
            ("nbd://h?tls-type=x509", "need a scheme with TLS"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{text}");
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn tls_where_the_server_has_it_is_asked_for_in_the_scheme_without() {
        let parse = |text: &str| NbdUri::parse(text, Origin::CommandLine);
        let text = "nbd://h/x?tls=on&tls-certificates=/c";
        let uri = parse(text).unwrap();
        let tls = ClientTls::required(Credentials::Certificates("/c".into()));
        assert_eq!(uri.tls, Some(ClientTls { mode: Mode::Allowed, ..tls }));
        assert_eq!(uri.to_string(), text);
        assert_eq!(parse("nbd://h?tls=off").unwrap(), parse("nbd://h").unwrap());
        assert_eq!(parse("nbds://h?tls=require").unwrap(), parse("nbds://h").unwrap());
        for text in [
            "nbds://h?tls=on",
            "nbds://h?tls=off",
            "nbd://h?tls=require",
            "nbd://h?tls=maybe",
            "nbd://h?tls=off&tls-certificates=/c",
        ] {
            assert_eq!(parse(text).unwrap_err().kind(), Kind::Usage, "{text}");
        }
        assert_eq!("nbd://h?tls=on".parse::<NbdUri>().unwrap_err().kind(), Kind::Permission);
    }

    #[test]
    fn who_is_not_trusted_chooses_no_files_and_weakens_no_checks() {
        for text in [
            "nbds://h?tls-certificates=/c",
            "nbds://h?tls-psk-file=/k",
            "nbds://h?tls-hostname=x",
            "nbds://h?tls-verify-peer=false",
            "nbds+unix:///?socket=/s&tls-verify-peer=0",
            "nbds://u@h",
        ] {
            assert_eq!(text.parse::<NbdUri>().unwrap_err().kind(), Kind::Permission, "{text}");
        }
        for text in ["nbds://h/x", "nbd+unix:///?socket=/s"] {
            text.parse::<NbdUri>().unwrap();
        }
    }

    proptest! {
        #[test]
        fn any_uri_survives_its_own_text(export in ".{0,40}", socket in "/[^\0]{1,40}") {
            let uri = NbdUri::unix(socket, export);
            prop_assert_eq!(uri.to_string().parse::<NbdUri>().unwrap(), uri);
        }
    }
}
