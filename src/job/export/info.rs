//! What a server says of its exports.

use serde::Serialize;

use super::content;
use crate::block::{BlockSource, Buffer};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::nbd::wire::{HeaderStyle, export};
use crate::nbd::{Client, ClientOptions, Greeting, Listed, NbdUri, Told, Which, describe};

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
    /// Exports that are listed and of which the server does not tell.
    pub failed: Vec<Failed>,
}

/// An export that cannot be looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Failed {
    /// Its name.
    pub name: String,
    /// What the server says it is.
    pub description: Option<String>,
    /// Why not.
    pub error: String,
    /// What sort of failure that is.
    #[serde(skip)]
    pub kind: Kind,
}

impl Failed {
    fn of(Listed { name, description }: Listed, error: &Error) -> Self {
        let description = Some(description).filter(|text| !text.is_empty());
        Self { name, description, error: error.in_one_line(), kind: error.kind() }
    }
}

impl Report {
    /// Fails if an export could not be looked at.
    pub fn check(&self) -> Result<()> {
        let Some(first) = self.failed.first() else { return Ok(()) };
        let (failed, all) = (self.failed.len(), self.failed.len() + self.exports.len());
        let message = format!("{failed} of {all} exports cannot be looked at");
        Err(Error::new(first.kind, message).hint("the report says why, for each of them"))
    }
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
    /// The same, without their meta contexts.
    AllWithoutContexts,
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
        Scope::AllWithoutContexts => Which::AllWithoutContexts,
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
    let (mut exports, mut failed) = (Vec::new(), Vec::new());
    for described in told.exports {
        let listed = described.listed;
        let looked = async {
            let told = described.told?;
            let content = match content {
                Content::Unread => None,
                Content::Head => Some(Box::pin(look_into(uri, &listed.name)).await?),
            };
            Ok(Export { content, ..export(listed.clone(), told) })
        };
        match control.run(looked).await {
            Ok(export) => exports.push(export),
            // Of the only one there is nothing else to say.
            Err(error) if scope == Scope::One || error.kind() == Kind::Cancelled => {
                return Err(error);
            }
            Err(error) => failed.push(Failed::of(listed, &error)),
        }
    }
    Ok(Report { uri: uri.to_string(), handshake, headers, tls, exports, failed })
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

fn export(Listed { name, description }: Listed, Told { info, contexts }: Told) -> Export {
    let listed = Some(description).filter(|text| !text.is_empty());
    let flags = FLAGS.iter().filter(|(flag, _)| info.has(*flag)).map(|(_, name)| *name).collect();
    Export {
        canonical_name: info.name.filter(|canonical| *canonical != name),
        name,
        description: info.description.or(listed),
        size_bytes: info.size_bytes,
        flags,
        block_bytes_min: info.block_sizes.min_bytes,
        block_bytes_preferred: info.block_sizes.preferred_bytes,
        payload_bytes_max: info.block_sizes.payload_bytes_max,
        contexts,
        content: None,
    }
}
