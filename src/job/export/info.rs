//! What a server says of its exports.

use serde::Serialize;

use super::content;
use crate::block::{BlockSource, Buffer};
use crate::control::Control;
use crate::error::Result;
use crate::nbd::wire::{HeaderStyle, export};
use crate::nbd::{Client, ClientOptions, Described, Greeting, NbdUri, Which, describe};

/// What a server says.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The server and the export it was asked for.
    pub uri: String,
    /// How sessions begin: `oldstyle`, `newstyle`, `fixed-newstyle`.
    pub handshake: &'static str,
    /// How requests look: `simple`, `structured`, `extended`.
    pub headers: &'static str,
    /// TLS of the session.
    pub tls: Option<Tls>,
    /// The exports.
    pub exports: Vec<Export>,
}

/// TLS of a session.
#[derive(Clone, Debug, Serialize)]
pub struct Tls {
    /// `TLSv1.3`, say.
    pub version: String,
    /// The suite, as OpenSSL calls it.
    pub cipher: String,
    /// The subject of the server's certificate; `null` with a key.
    pub peer: Option<String>,
}

/// What a server says of an export.
#[derive(Clone, Debug, Serialize)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// What the server calls it, if that is something else.
    pub canonical_name: Option<String>,
    /// What the server says it is.
    pub description: Option<String>,
    /// Its size.
    pub size_bytes: u64,
    /// What it can do, by the names of the protocol.
    pub flags: Vec<&'static str>,
    /// Smallest block.
    pub block_bytes_min: u64,
    /// Best block.
    pub block_bytes_preferred: u64,
    /// Largest payload of a request.
    pub payload_bytes_max: u64,
    /// Meta contexts.
    pub contexts: Vec<String>,
    /// What its first bytes look like, if that was asked for.
    pub content: Option<&'static str>,
}

/// Whether the exports are looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// No.
    Unread,
    /// The first bytes are read, to say what they look like.
    Head,
}

/// Which exports to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The one the URI names.
    One,
    /// All the server lists.
    All,
}

/// Transmission flags and their names in the protocol, in its order.
const FLAGS: [(u16, &str); 11] = [
    (export::READ_ONLY, "read-only"),
    (export::SEND_FLUSH, "flush"),
    (export::SEND_FUA, "fua"),
    (export::ROTATIONAL, "rotational"),
    (export::SEND_TRIM, "trim"),
    (export::SEND_WRITE_ZEROES, "write-zeroes"),
    (export::SEND_DF, "df"),
    (export::CAN_MULTI_CONN, "multi-conn"),
    (export::SEND_CACHE, "cache"),
    (export::SEND_FAST_ZERO, "fast-zero"),
    (export::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
];

/// Asks the server.
pub async fn run(
    uri: &NbdUri,
    scope: Scope,
    content: Content,
    control: &Control,
) -> Result<Report> {
    let which = match scope {
        Scope::One => Which::One(&uri.export),
        Scope::All => Which::All,
    };
    let timeouts = ClientOptions::default().timeouts;
    let told = control.run(Box::pin(describe(uri, which, timeouts))).await?;
    let headers = match told.style {
        HeaderStyle::Simple => "simple",
        HeaderStyle::Structured => "structured",
        HeaderStyle::Extended => "extended",
    };
    let handshake = match told.greeting {
        Greeting::Oldstyle => "oldstyle",
        Greeting::Newstyle => "newstyle",
        Greeting::FixedNewstyle => "fixed-newstyle",
    };
    let tls = told.tls.map(|tls| Tls { version: tls.version, cipher: tls.suite, peer: tls.peer });
    let mut exports: Vec<_> = told.exports.into_iter().map(export).collect();
    if content == Content::Head {
        for export in &mut exports {
            export.content = Some(control.run(Box::pin(look_into(uri, &export.name))).await?);
        }
    }
    Ok(Report { uri: uri.to_string(), handshake, headers, tls, exports })
}

/// What the first bytes of an export look like.
async fn look_into(uri: &NbdUri, export: &str) -> Result<&'static str> {
    let options = ClientOptions { connections: 1, ..ClientOptions::default() };
    let client = Box::pin(Client::open(uri, export, options)).await?;
    let size_bytes = client.geometry().size_bytes;
    let len = usize::try_from(size_bytes.min(content::HEAD_BYTES)).expect("72 KiB");
    if len == 0 {
        return Ok(content::of_head(&[]));
    }
    let head = client.read(0, Buffer::unbudgeted(vec![0; len])).await?;
    Ok(content::of_head(&head))
}

fn export(described: Described) -> Export {
    let Described { name, info, contexts } = described;
    let flags = FLAGS.iter().filter(|(flag, _)| info.has(*flag)).map(|(_, name)| *name).collect();
    Export {
        canonical_name: info.name.filter(|canonical| *canonical != name),
        name,
        description: info.description,
        size_bytes: info.size_bytes,
        flags,
        block_bytes_min: info.block_sizes.min_bytes,
        block_bytes_preferred: info.block_sizes.preferred_bytes,
        payload_bytes_max: info.block_sizes.payload_bytes_max,
        contexts,
        content: None,
    }
}
