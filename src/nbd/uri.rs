//! NBD URIs (`doc/uri.md` of the NBD project, with what libnbd adds).
//!
//! `nbd://host[:port]/export` and `nbd+unix:///export?socket=PATH`. The export is the path without
//! its first slash, percent-decoded: `nbd://h//disk` names `/disk`. Schemes with TLS, vsock or ssh
//! are recognised and refused; an unknown parameter is an error, never ignored, because it may be
//! one that was meant to make the connection safer.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

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
}

impl NbdUri {
    /// The export `export` at a unix socket.
    pub fn unix(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        Self { address: Address::Unix(socket.into()), export: export.into() }
    }
}

impl FromStr for NbdUri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::new(Kind::Usage, format!("'{text}' is not an NBD URI: {why}"))
                .hint("write nbd://host:port/export or nbd+unix:///export?socket=/path")
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("it has no '://'"))?;
        let unix = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => false,
            "nbd+unix" => true,
            "nbds" | "nbds+unix" | "nbd+vsock" | "nbds+vsock" | "nbd+ssh" | "nbds+ssh" => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("cannot open '{text}': {scheme} is not supported yet"),
                )
                .hint("use nbd:// or nbd+unix://"));
            }
            _ => return Err(bad("its scheme is not nbd or nbd+unix")),
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
        if authority.contains('@') {
            return Err(bad("a user name has a meaning with TLS only"));
        }
        let socket = socket_of(query).map_err(|why| bad(&why))?;
        let address = match (unix, socket) {
            (true, Some(socket)) if authority.is_empty() => Address::Unix(socket),
            (true, Some(_)) => return Err(bad("a unix socket has no host")),
            (true, None) => return Err(bad("socket=PATH is missing")),
            (false, Some(_)) => return Err(bad("socket= needs the scheme nbd+unix")),
            (false, None) => tcp(authority).ok_or_else(|| bad("host or port is not valid"))?,
        };
        Ok(Self { address, export })
    }
}

/// The `socket` parameter; any other is refused.
fn socket_of(query: &str) -> std::result::Result<Option<PathBuf>, String> {
    let mut socket = None;
    for parameter in query.split(['&', ';']).filter(|p| !p.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if name != "socket" {
            return Err(format!("the parameter '{name}' is not supported"));
        }
        let value = decode(value).filter(|v| !v.is_empty() && !v.contains('\0'));
        let value = value.ok_or("the socket path is not valid")?;
        if socket.replace(PathBuf::from(value)).is_some() {
            return Err("socket= is given twice".to_owned());
        }
    }
    Ok(socket)
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
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp { host, port } => {
                write!(f, "nbd://")?;
                if host.contains(':') {
                    write!(f, "[{host}]")?;
                } else {
                    encode(host, f)?;
                }
                if *port != PORT_DEFAULT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/")?;
                encode(&self.export, f)
            }
            Address::Unix(socket) => {
                write!(f, "nbd+unix:///")?;
                encode(&self.export, f)?;
                write!(f, "?socket=")?;
                encode(&display(socket), f)
            }
        }
    }
}

fn display(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri { address: Address::Tcp { host: host.to_owned(), port }, export: export.to_owned() }
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
        ] {
            assert_eq!(text.parse::<NbdUri>().unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, kind) in [
            ("nbds://host", Kind::Unsupported),
            ("nbd+vsock://2", Kind::Unsupported),
            ("nbd+ssh://host", Kind::Unsupported),
            ("http://host", Kind::Usage),
            ("host:10809", Kind::Usage),
            ("nbd+unix:///", Kind::Usage),
            ("nbd+unix://host/?socket=/s", Kind::Usage),
            ("nbd+unix:///?socket=", Kind::Usage),
            ("nbd+unix:///?socket=/s&socket=/t", Kind::Usage),
            ("nbd://host?socket=/s", Kind::Usage),
            ("nbd://host?tls-verify-peer=false", Kind::Usage),
            ("nbd://user@host", Kind::Usage),
            ("nbd://host:99999", Kind::Usage),
            ("nbd://[::1", Kind::Usage),
            ("nbd://host/%zz", Kind::Usage),
            ("nbd://host/%ff", Kind::Usage),
            ("nbd://host/x#y", Kind::Usage),
        ] {
            assert_eq!(text.parse::<NbdUri>().unwrap_err().kind(), kind, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_uri_survives_its_own_text(export in ".{0,40}", socket in "/[^\0]{1,40}") {
            let uri = NbdUri::unix(socket, export);
            prop_assert_eq!(uri.to_string().parse::<NbdUri>().unwrap(), uri);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "(nbd(\\+unix)?://)?.{0,60}") {
            let _ = text.parse::<NbdUri>();
        }
    }
}
