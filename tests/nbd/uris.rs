//! Any text as a URI: shared by the bounded run of `written.rs` and by the coverage-guided one in `fuzz/`.

use vmbackup::nbd::tls::Credentials;
use vmbackup::nbd::{Address, NbdUri, Origin};

/// The text is refused, or is a URI that its own text names again; how it ended, without what differs
/// from text to text.
pub fn ended(text: &str) -> String {
    let uri = match NbdUri::parse(text, Origin::CommandLine) {
        Ok(uri) => uri,
        Err(error) => {
            assert!(error.hint_text().is_some_and(|hint| !hint.is_empty()), "{error:?}");
            // What it says of the text comes last; what is quoted there is the text's.
            let why = error.to_string();
            let why = why.rsplit(": ").next().unwrap_or_default();
            return why.split('\'').next().unwrap_or_default().trim_end().to_owned();
        }
    };
    let again = NbdUri::parse(&uri.to_string(), Origin::CommandLine);
    assert_eq!(again.expect("it was said by us"), uri);
    let elsewhere = NbdUri::parse(text, Origin::Elsewhere);
    // From elsewhere it is the same or refused: it never means something else.
    assert!(elsewhere.as_ref().is_ok_and(|same| *same == uri) || elsewhere.is_err(), "{text}");
    let place = match &uri.address {
        Address::Tcp { host, .. } if host.contains(':') => "an IPv6 address",
        Address::Tcp { .. } => "a host",
        Address::Unix(path) if path.as_os_str().as_encoded_bytes().starts_with(b"\0") => {
            "a socket without a file"
        }
        Address::Unix(_) => "a socket",
        Address::Vsock { .. } => "a machine",
    };
    let export = if uri.export.is_empty() { "" } else { ", an export" };
    let tls = uri.tls.as_ref().map_or(String::new(), |tls| {
        let credentials = match tls.credentials {
            Credentials::Certificates(_) => "certificates",
            Credentials::SystemAuthorities => "authorities",
            Credentials::Psk(_) => "keys",
        };
        format!(", {:?} TLS of {credentials}, {:?}", tls.mode, tls.peer_check)
    });
    let trusted = if elsewhere.is_ok() { "" } else { ", from the command line only" };
    format!("{place}{export}{tls}{trusted}")
}
