//! The handshake of a client: from a fresh stream to an export that is ready for requests.
//!
//! ```text
//!  greet ──► oldstyle ────────────────────────────────────────────► Negotiated
//!    └─────► newstyle, not fixed ──► EXPORT_NAME ─────────────────► Negotiated
//!    └─────► fixed: STARTTLS ─► EXTENDED_HEADERS, else STRUCTURED_REPLY
//!              └─► SET_META_CONTEXT ──► GO ───────────────────────► Negotiated
//!                                        └─ not known: EXPORT_NAME ► Negotiated
//!              └─► LIST, INFO … ABORT
//! ```
//!
//! [`Handshake`] is a session in which options can be sent; [`Negotiated`] one in which they
//! cannot: the step between them consumes the former. One option is in flight at a time and each
//! multi-part reply is drained. Every length is checked before memory is taken for it; a broken
//! rule ends the session. Deadlines are the caller's. Nothing is read past what the handshake
//! needs: what a third party writes behind the answer to STARTTLS reaches TLS, which ends the session.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::error::{NbdError, lost, violation};
use super::export::{BlockSizes, ExportInfo};
use super::initial_state::{self, InitialState};
use super::stream::Stream;
use super::tls::{ClientTls, Mode, TlsSession, goes_without};
use super::wire::{self, HeaderStyle, be16, be32, be64, handshake, info, option, reply};
use crate::error::{Error, Kind, Result};

/// Longest option reply: a LIST item has two strings and a length.
const REPLY_BYTES_MAX: usize = 4 + 2 * wire::STRING_BYTES_MAX;
/// Most replies to one option; LIST is the only one that can be long.
const REPLIES_MAX: usize = 10_000;
/// Most bytes of all option replies of a session, and of those that look at the exports of a server
/// one after the other: a thousand exports with descriptions and dozens of contexts each are less.
const REPLIES_BYTES_MAX: usize = 16 << 20;

/// A session in which options can be sent, or already an export where the server has none.
pub enum Greeted {
    /// Newstyle: options follow.
    Newstyle(Handshake),
    /// Oldstyle: the server has one export and this is it.
    Oldstyle(Negotiated),
}

/// A newstyle session before transmission.
pub struct Handshake {
    stream: Box<dyn Stream>,
    peer: Arc<str>,
    /// Options have replies.
    fixed: bool,
    /// EXPORT_NAME has no padding.
    no_zeroes: bool,
    style: HeaderStyle,
    contexts: Vec<Context>,
    initial_state: Option<InitialState>,
    tls: Option<TlsSession>,
    /// Bytes of the option replies so far: what they make us keep is bounded by it.
    pub(super) heard_bytes: usize,
}

/// A meta context the server agreed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// Its id on this connection.
    pub id: u32,
    /// Its name (`base:allocation`).
    pub name: String,
}

/// A session ready for requests.
pub struct Negotiated {
    pub(super) stream: Box<dyn Stream>,
    pub(super) peer: Arc<str>,
    /// How requests and replies look.
    pub style: HeaderStyle,
    /// What is served.
    pub export: ExportInfo,
    /// What BLOCK_STATUS will tell.
    pub contexts: Vec<Context>,
    /// What the export holds, if the server is one of ours and was asked.
    pub initial_state: Option<InitialState>,
    /// TLS, if the session is inside it.
    pub tls: Option<TlsSession>,
}

/// An export of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Name.
    pub name: String,
    /// Description, often empty.
    pub description: String,
}

/// One reply to an option.
struct OptionReply {
    kind: u32,
    payload: Vec<u8>,
}

impl OptionReply {
    fn is_error(&self) -> bool {
        self.kind & reply::ERROR_BIT != 0
    }
}

/// Reads the greeting and agrees on flags. Not cancel-safe: drop the stream with it.
pub async fn greet(mut stream: Box<dyn Stream>, peer: Arc<str>) -> Result<Greeted> {
    let magic = be64(&read_array::<8>(&mut stream, &peer).await?);
    if magic != wire::GREETING {
        return Err(violation(&peer, format!("greeting {magic:#018x} is not NBDMAGIC")).into());
    }
    match be64(&read_array::<8>(&mut stream, &peer).await?) {
        wire::OLDSTYLE => oldstyle(stream, peer).await.map(Greeted::Oldstyle),
        wire::IHAVEOPT => {
            let offered = be16(&read_array::<2>(&mut stream, &peer).await?);
            let flags = offered & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
            send(&mut stream, &peer, &u32::from(flags).to_be_bytes()).await?;
            Ok(Greeted::Newstyle(Handshake {
                stream,
                peer,
                fixed: flags & handshake::FIXED_NEWSTYLE != 0,
                no_zeroes: flags & handshake::NO_ZEROES != 0,
                style: HeaderStyle::Simple,
                contexts: Vec::new(),
                initial_state: None,
                tls: None,
                heard_bytes: 0,
            }))
        }
        magic => Err(violation(&peer, format!("magic {magic:#018x} is of no NBD style")).into()),
    }
}

async fn oldstyle(mut stream: Box<dyn Stream>, peer: Arc<str>) -> Result<Negotiated> {
    let data = read_array::<{ 12 + wire::PADDING_BYTES }>(&mut stream, &peer).await?;
    // The upper half of the flags were global flags once; only the lower half is defined.
    let export = ExportInfo::new(&peer, be64(&data[..8]), be16(&data[10..12]))?;
    let style = HeaderStyle::Simple;
    Ok(Negotiated {
        stream,
        peer,
        style,
        export,
        contexts: Vec::new(),
        initial_state: None,
        tls: None,
    })
}

impl Handshake {
    /// Puts the session into TLS, before anything else is said. `host` is the name by which the
    /// server was reached.
    ///
    /// Only a server that answers STARTTLS with a refusal, and only with [`Mode::Allowed`], is
    /// spoken to without. Whatever was agreed on before is forgotten.
    pub async fn start_tls(mut self, tls: &ClientTls, host: Option<&str>) -> Result<Self> {
        let option = option::STARTTLS;
        let refusal = if self.fixed {
            self.send_option(option, &[]).await?;
            let answer = self.read_reply(option).await?;
            match answer.kind {
                reply::ACK if answer.payload.is_empty() => {
                    let secured = tls.connect(self.stream, &self.peer, host).await?;
                    return Ok(Self {
                        stream: secured.stream,
                        style: HeaderStyle::Simple,
                        contexts: Vec::new(),
                        initial_state: None,
                        tls: Some(secured.session),
                        ..self
                    });
                }
                reply::ACK => return Err(self.violation("an ACK of STARTTLS with a payload")),
                _ if answer.is_error() => Some(self.refused(option, "", &answer)),
                kind => return Err(self.unexpected(option, kind)),
            }
        } else {
            None
        };
        if tls.mode == Mode::Allowed {
            goes_without(&self.peer, refusal.as_ref());
            return Ok(self);
        }
        let error = without_tls(&self.peer);
        Err(if let Some(refusal) = refusal { error.source(refusal) } else { error })
    }

    /// Whether options have replies.
    pub(super) fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// What was agreed on for requests.
    pub(super) fn style(&self) -> HeaderStyle {
        self.style
    }

    /// TLS, if the session is inside it.
    pub(super) fn tls(&self) -> Option<&TlsSession> {
        self.tls.as_ref()
    }

    /// Asks for extended headers, else for structured replies, and takes what it gets.
    pub async fn agree_on_headers(&mut self) -> Result<HeaderStyle> {
        if !self.fixed {
            return Ok(self.style);
        }
        for (option, style) in [
            (option::EXTENDED_HEADERS, HeaderStyle::Extended),
            (option::STRUCTURED_REPLY, HeaderStyle::Structured),
        ] {
            self.send_option(option, &[]).await?;
            let answer = self.read_reply(option).await?;
            match answer.kind {
                reply::ACK if answer.payload.is_empty() => {
                    self.style = style;
                    break;
                }
                reply::TLS_REQD => return Err(self.refused(option, "", &answer)),
                kind if kind & reply::ERROR_BIT != 0 => {}
                kind => return Err(self.unexpected(option, kind)),
            }
        }
        Ok(self.style)
    }

    /// Asks for meta contexts of `export`; those the server lacks are simply missing afterwards.
    pub async fn set_contexts(&mut self, export: &str, wanted: &[String]) -> Result<&[Context]> {
        self.contexts.clear();
        if self.style == HeaderStyle::Simple || wanted.is_empty() {
            return Ok(&self.contexts);
        }
        let option = option::SET_META_CONTEXT;
        let mut payload = Vec::new();
        put_string(&mut payload, export);
        put_len(&mut payload, wanted.len());
        for name in wanted {
            put_string(&mut payload, name);
        }
        self.send_option(option, &payload).await?;
        // One reply per context asked for, then the ACK.
        for _ in 0..=wanted.len() {
            let answer = self.read_reply(option).await?;
            match answer.kind {
                reply::ACK => return Ok(&self.contexts),
                reply::META_CONTEXT => self.add_context(&answer.payload, wanted)?,
                reply::TLS_REQD | reply::UNKNOWN | reply::POLICY => {
                    return Err(self.refused(option, export, &answer));
                }
                kind if kind & reply::ERROR_BIT != 0 => {
                    // Also an error replaces what was set before (proto.md, SET_META_CONTEXT).
                    self.contexts.clear();
                    return Ok(&self.contexts);
                }
                kind => return Err(self.unexpected(option, kind)),
            }
        }
        Err(self.violation("more meta contexts than were asked for"))
    }

    /// The names of the meta contexts of `export` that match one of `queries`, all if there is none;
    /// none where the server cannot tell.
    pub async fn list_contexts(&mut self, export: &str, queries: &[&str]) -> Result<Vec<String>> {
        let option = option::LIST_META_CONTEXT;
        if self.style == HeaderStyle::Simple {
            return Ok(Vec::new());
        }
        let mut payload = Vec::new();
        put_string(&mut payload, export);
        put_len(&mut payload, queries.len());
        for query in queries {
            put_string(&mut payload, query);
        }
        self.send_option(option, &payload).await?;
        let mut names = Vec::new();
        while names.len() < REPLIES_MAX {
            let answer = self.read_reply(option).await?;
            match answer.kind {
                reply::ACK => return Ok(names),
                reply::META_CONTEXT => {
                    let Some((_, name)) = answer.payload.split_at_checked(4) else {
                        return Err(self.violation("a meta context reply without an id"));
                    };
                    names.push(wire::peer_text(self.string(name, "meta context")?));
                }
                reply::UNSUP | reply::POLICY | reply::INVALID => return Ok(Vec::new()),
                _ if answer.is_error() => return Err(self.refused(option, export, &answer)),
                kind => return Err(self.unexpected(option, kind)),
            }
        }
        Err(self.violation(format!("more than {REPLIES_MAX} meta contexts")))
    }

    /// Asks what `export` holds; only servers of ours know.
    pub async fn ask_initial_state(&mut self, export: &str) -> Result<Option<InitialState>> {
        let names = self.list_contexts(export, &[initial_state::QUERY]).await?;
        self.initial_state = names.iter().find_map(|name| InitialState::of_name(name));
        Ok(self.initial_state)
    }

    fn add_context(&mut self, payload: &[u8], wanted: &[String]) -> Result<()> {
        let Some((id, name)) = payload.split_at_checked(4) else {
            return Err(self.violation("a meta context reply without an id"));
        };
        let id = be32(id);
        let name = String::from_utf8_lossy(name).into_owned();
        if !wanted.contains(&name) {
            return Err(self.violation(format!("meta context '{name}' was not asked for")));
        }
        if self.contexts.iter().any(|c| c.id == id || c.name == name) {
            return Err(self.violation(format!("meta context '{name}' was given twice")));
        }
        self.contexts.push(Context { id, name });
        Ok(())
    }

    /// Enters transmission with `export`. Not cancel-safe, like everything here.
    pub async fn go(mut self, export: &str) -> Result<Negotiated> {
        if self.fixed {
            match self.ask(option::GO, export).await? {
                Some(info) => return Ok(self.into_negotiated(info)),
                None if self.style == HeaderStyle::Extended => {
                    return Err(self.violation("extended headers without GO"));
                }
                None => {}
            }
        }
        self.send_option(option::EXPORT_NAME, export.as_bytes()).await?;
        // A server that does not know the name can only hang up.
        let data = read_array::<10>(&mut self.stream, &self.peer).await.map_err(|e| {
            Error::new(e.kind(), format!("NBD server {} refused export '{export}'", self.peer))
                .source(e)
        })?;
        if !self.no_zeroes {
            read_array::<{ wire::PADDING_BYTES }>(&mut self.stream, &self.peer).await?;
        }
        let info = ExportInfo::new(&self.peer, be64(&data[..8]), be16(&data[8..]))?;
        Ok(self.into_negotiated(info))
    }

    /// What GO would say about `export`; `None` when the server does not know the option.
    pub async fn info(&mut self, export: &str) -> Result<Option<ExportInfo>> {
        if !self.fixed {
            return Ok(None);
        }
        self.ask(option::INFO, export).await
    }

    /// The exports the server tells of.
    pub async fn list(&mut self) -> Result<Vec<Listed>> {
        let option = option::LIST;
        if !self.fixed {
            return Err(Error::new(
                Kind::Unsupported,
                format!("NBD server {} cannot list its exports", self.peer),
            ));
        }
        self.send_option(option, &[]).await?;
        let mut exports = Vec::new();
        while exports.len() < REPLIES_MAX {
            let answer = self.read_reply(option).await?;
            match answer.kind {
                reply::ACK => return Ok(exports),
                reply::SERVER => exports.push(self.listed(&answer.payload)?),
                _ if answer.is_error() => return Err(self.refused(option, "", &answer)),
                kind => return Err(self.unexpected(option, kind)),
            }
        }
        Err(self.violation(format!("more than {REPLIES_MAX} exports")))
    }

    fn listed(&self, payload: &[u8]) -> Result<Listed> {
        let parts = payload
            .split_at_checked(4)
            .and_then(|(len, rest)| rest.split_at_checked(usize::try_from(be32(len)).ok()?));
        let Some((name, description)) = parts else {
            return Err(self.violation("an export's name passes the end of the reply"));
        };
        let name = String::from_utf8_lossy(self.string(name, "export")?).into_owned();
        let description = wire::peer_text(self.string(description, "description")?);
        Ok(Listed { name, description })
    }

    /// Refuses what is longer than any string of the protocol (proto.md, "Values").
    fn string<'a>(&self, bytes: &'a [u8], what: &str) -> Result<&'a [u8]> {
        if bytes.len() <= wire::STRING_BYTES_MAX {
            return Ok(bytes);
        }
        Err(self.violation(format!("a {what} of {} bytes, above 4096", bytes.len())))
    }

    /// Ends the session politely; the server's answer does not matter.
    pub async fn abort(mut self) {
        if self.fixed && self.send_option(option::ABORT, &[]).await.is_ok() {
            let _ = self.stream.shutdown().await;
        }
    }

    /// INFO and GO: the same question, with or without entering transmission.
    async fn ask(&mut self, option: u32, export: &str) -> Result<Option<ExportInfo>> {
        let mut payload = Vec::new();
        put_string(&mut payload, export);
        let wanted = [info::BLOCK_SIZE, info::NAME, info::DESCRIPTION];
        payload.extend_from_slice(&[0, 3]);
        for item in wanted {
            payload.extend_from_slice(&item.to_be_bytes());
        }
        self.send_option(option, &payload).await?;
        let mut found: Option<ExportInfo> = None;
        let (mut sizes, mut name, mut description) = (None, None, None);
        for _ in 0..REPLIES_MAX {
            let answer = self.read_reply(option).await?;
            match answer.kind {
                reply::INFO => {
                    let Some((item, data)) = answer.payload.split_at_checked(2) else {
                        return Err(self.violation("an INFO reply without a type"));
                    };
                    let text = |what| self.string(data, what).map(|d| Some(wire::peer_text(d)));
                    match be16(item) {
                        info::EXPORT if data.len() == 10 => {
                            let (size, flags) = (be64(&data[..8]), be16(&data[8..]));
                            found = Some(ExportInfo::new(&self.peer, size, flags)?);
                        }
                        info::BLOCK_SIZE if data.len() == 12 => {
                            sizes = Some(BlockSizes::decode(&self.peer, data)?);
                        }
                        info::EXPORT | info::BLOCK_SIZE => {
                            return Err(self.violation("an INFO reply of the wrong length"));
                        }
                        info::NAME => name = text("name")?,
                        info::DESCRIPTION => description = text("description")?,
                        // Servers may tell more than we know (proto.md, NBD_REP_INFO).
                        _ => {}
                    }
                }
                reply::ACK => {
                    let Some(mut info) = found else {
                        return Err(self.violation("ACK of GO without the export's size"));
                    };
                    info.block_sizes = sizes.unwrap_or(info.block_sizes);
                    (info.name, info.description) = (name, description);
                    return Ok(Some(info));
                }
                reply::UNSUP => return Ok(None),
                _ if answer.is_error() => return Err(self.refused(option, export, &answer)),
                kind => return Err(self.unexpected(option, kind)),
            }
        }
        Err(self.violation("INFO replies without end"))
    }

    fn into_negotiated(self, export: ExportInfo) -> Negotiated {
        let Self { stream, peer, style, contexts, initial_state, tls, .. } = self;
        Negotiated { stream, peer, style, export, contexts, initial_state, tls }
    }

    async fn send_option(&mut self, option: u32, payload: &[u8]) -> Result<()> {
        let mut out = Vec::with_capacity(16 + payload.len());
        out.extend_from_slice(&wire::IHAVEOPT.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        put_len(&mut out, payload.len());
        out.extend_from_slice(payload);
        Ok(send(&mut self.stream, &self.peer, &out).await?)
    }

    async fn read_reply(&mut self, option: u32) -> Result<OptionReply> {
        let header = read_array::<20>(&mut self.stream, &self.peer).await?;
        let magic = be64(&header[..8]);
        if magic != wire::OPTION_REPLY {
            return Err(self.violation(format!("option reply magic {magic:#x}")));
        }
        let (about, kind) = (be32(&header[8..12]), be32(&header[12..16]));
        if about != option {
            return Err(self.violation(format!("reply to option {about}, asked was {option}")));
        }
        let len = usize::try_from(be32(&header[16..20])).unwrap_or(usize::MAX);
        if len > REPLY_BYTES_MAX {
            return Err(self.violation(format!("option reply of {len} bytes")));
        }
        self.heard_bytes += header.len() + len;
        if self.heard_bytes > REPLIES_BYTES_MAX {
            return Err(self.violation(format!("more than {REPLIES_BYTES_MAX} bytes of replies")));
        }
        let mut payload = vec![0; len];
        let read = self.stream.read_exact(&mut payload).await;
        read.map_err(|e| lost(&self.peer, e))?;
        Ok(OptionReply { kind, payload })
    }

    fn violation(&self, rule: impl Into<Arc<str>>) -> Error {
        violation(&self.peer, rule).into()
    }

    fn unexpected(&self, option: u32, kind: u32) -> Error {
        self.violation(format!("reply of type {kind} to option {option}"))
    }

    /// An option answered with an error.
    fn refused(&self, option: u32, export: &str, answer: &OptionReply) -> Error {
        let peer = &self.peer;
        let said = wire::peer_text(&answer.payload);
        let said = if said.is_empty() { String::new() } else { format!(": {said}") };
        let code = answer.kind & !reply::ERROR_BIT;
        match answer.kind {
            reply::TLS_REQD => {
                Error::new(Kind::Unsupported, format!("NBD server {peer} requires TLS{said}"))
                    .hint("write nbds:// or nbds+unix:// instead of nbd:// or nbd+unix://")
            }
            reply::UNKNOWN => Error::new(
                Kind::NotFound,
                format!("NBD server {peer} has no export '{export}'{said}"),
            ),
            reply::POLICY => {
                Error::new(Kind::Permission, format!("NBD server {peer} denied access{said}"))
            }
            reply::SHUTDOWN => {
                Error::new(Kind::Connection, format!("NBD server {peer} is shutting down{said}"))
            }
            reply::UNSUP | reply::PLATFORM => Error::new(
                Kind::Unsupported,
                format!("NBD server {peer} does not know option {option}{said}"),
            ),
            _ => Error::new(
                Kind::Protocol,
                format!("NBD server {peer} answered option {option} with error {code}{said}"),
            ),
        }
    }
}

/// The error where TLS is required and the server has none.
pub(super) fn without_tls(peer: &str) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("NBD server {peer} does not offer TLS, which is required"),
    )
    .hint("set TLS up on the server; if it was there before, somebody may be in between")
}

async fn read_array<const N: usize>(
    stream: &mut Box<dyn Stream>,
    peer: &Arc<str>,
) -> Result<[u8; N], NbdError> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await.map_err(|e| lost(peer, e))?;
    Ok(bytes)
}

async fn send(stream: &mut Box<dyn Stream>, peer: &Arc<str>, bytes: &[u8]) -> Result<(), NbdError> {
    stream.write_all(bytes).await.map_err(|e| lost(peer, e))?;
    stream.flush().await.map_err(|e| lost(peer, e))
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    let len = u32::try_from(len).expect("what a client sends in an option is short");
    out.extend_from_slice(&len.to_be_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_len(out, text.len());
    out.extend_from_slice(text.as_bytes());
}
