//! The handshake of a server: from a fresh stream to an export that a client asked for.
//!
//! ```text
//!  greeting ─► client flags ─► option ─► … ─► GO or EXPORT_NAME ─► Ready
//!             ▲                  ├── STARTTLS ─► TLS handshake ─► option, from the start
//!             └──────────────────┘
//!                                └── ABORT, hang-up, time-out, a broken rule ─► End
//! ```
//!
//! No option costs more than the reading of it: lengths are checked before memory is taken, the
//! number of options is bounded, the caller bounds the time. An unknown or malformed option is read
//! to its end and refused, so that both sides stay in step. Nothing is read past what the handshake
//! needs: what somebody writes behind a STARTTLS goes to TLS, which ends the session. What was
//! agreed before TLS is forgotten. Where TLS is required, nothing else is answered before it.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use super::contexts::{self, Asked, Context};
use super::end::{End, violation};
use super::exports::{Export, Exports};
use super::limits::{OPTION_BYTES_MAX, OPTION_BYTES_SKIPPED_MAX, OPTIONS_MAX, STATE_WAIT};
use super::options::{self, Malformed};
use super::places::{Place, Places};
use crate::nbd::initial_state::{self, InitialState};
use crate::nbd::stream::Stream;
use crate::nbd::tls::{Mode, ServerTls};
use crate::nbd::wire::{self, HeaderStyle, be32, be64, handshake, info, option, reply};

/// A session ready for requests.
pub(super) struct Ready {
    pub(super) stream: Box<dyn Stream>,
    pub(super) export: Arc<Export>,
    pub(super) style: HeaderStyle,
    pub(super) contexts: Vec<Context>,
    pub(super) place: Place,
}

/// A session in which options are being answered.
struct Haggling<'a> {
    stream: Box<dyn Stream>,
    offer: Offer<'a>,
    /// Inside TLS.
    secured: bool,
    no_zeroes: bool,
    style: HeaderStyle,
    /// The contexts that were chosen, and the export they were chosen for.
    chosen: Option<(Arc<Export>, Vec<Context>)>,
}

/// What a client is told of, and whom errors name.
#[derive(Clone, Copy)]
pub(super) struct Offer<'a> {
    pub(super) exports: &'a Exports,
    pub(super) tls: Option<&'a ServerTls>,
    pub(super) places: &'a Places,
    pub(super) peer: &'a str,
}

/// What follows an option.
enum Next {
    Option,
    Tls(ServerTls),
    Transmission(Arc<Export>, Place),
}

/// Replies before the ACK: type and payload.
type Items = Vec<(u32, Vec<u8>)>;
/// An error reply: type and text.
type Refused = (u32, String);
/// An answer to an option.
type Answer = Result<Items, Refused>;

/// Greets the client and answers its options. Not cancel-safe: drop the stream with it.
pub(super) async fn negotiate(
    mut stream: Box<dyn Stream>,
    offer: Offer<'_>,
    stop: &CancellationToken,
) -> Result<Ready, End> {
    let mut greeting = wire::GREETING.to_be_bytes().to_vec();
    greeting.extend(wire::IHAVEOPT.to_be_bytes());
    let offered = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    greeting.extend(offered.to_be_bytes());
    stream.write_all(&greeting).await?;
    stream.flush().await?;
    let mut flags = [0; 4];
    if stream.read(&mut flags[..1]).await? == 0 {
        return Err(End::Left);
    }
    stream.read_exact(&mut flags[1..]).await?;
    let flags = be32(&flags);
    if flags & !u32::from(offered) != 0 {
        return Err(violation(format!("client flags {flags:#x} were not offered")));
    }
    let fixed = flags & u32::from(handshake::FIXED_NEWSTYLE) != 0;
    let no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
    let haggling = Haggling {
        stream,
        offer,
        secured: false,
        no_zeroes,
        style: HeaderStyle::Simple,
        chosen: None,
    };
    haggling.run(fixed, stop).await
}

impl Haggling<'_> {
    async fn run(mut self, fixed: bool, stop: &CancellationToken) -> Result<Ready, End> {
        for _ in 0..OPTIONS_MAX {
            let (option, len) = self.read_header().await?;
            if !fixed && option != option::EXPORT_NAME {
                // Nothing else has a reply such a client could understand.
                return Err(violation(format!("option {option} without fixed newstyle")));
            }
            if len > OPTION_BYTES_MAX {
                self.skip(option, len).await?;
                continue;
            }
            let mut payload = vec![0; len];
            self.stream.read_exact(&mut payload).await?;
            if stop.is_cancelled() && option != option::EXPORT_NAME {
                let answer = Err((reply::SHUTDOWN, "the server stops".to_owned()));
                self.answer(option, answer).await?;
                return Err(End::Stopped);
            }
            match self.handle(option, &payload).await? {
                Next::Option => {}
                Next::Tls(tls) => self = self.into_tls(&tls).await?,
                Next::Transmission(export, place) => {
                    // What was chosen for another export does not hold for this one. The same one
                    // may have grown since: its contexts are the same.
                    let chosen = self.chosen.take().filter(|(of, _)| of.name == export.name);
                    let contexts = chosen.map(|(_, contexts)| contexts).unwrap_or_default();
                    let Self { stream, style, .. } = self;
                    return Ok(Ready { stream, export, style, contexts, place });
                }
            }
        }
        Err(violation(format!("more than {OPTIONS_MAX} options")))
    }

    /// The session inside TLS, with nothing agreed (CVE-2021-3716: nbdkit kept what somebody in
    /// between had agreed on before it).
    async fn into_tls(self, tls: &ServerTls) -> Result<Self, End> {
        let secured = tls.accept(self.stream, self.offer.peer).await.map_err(End::Tls)?;
        tracing::debug!(peer = self.offer.peer, session = ?secured.session, "inside TLS");
        Ok(Self {
            stream: secured.stream,
            secured: true,
            style: HeaderStyle::Simple,
            chosen: None,
            ..self
        })
    }

    /// The next option's number and length.
    async fn read_header(&mut self) -> Result<(u32, usize), End> {
        let mut header = [0; 16];
        if self.stream.read(&mut header[..1]).await? == 0 {
            return Err(End::Left);
        }
        self.stream.read_exact(&mut header[1..]).await?;
        let magic = be64(&header[..8]);
        if magic != wire::IHAVEOPT {
            return Err(violation(format!("{magic:#018x} is not the magic of an option")));
        }
        let len = usize::try_from(be32(&header[12..])).unwrap_or(usize::MAX);
        Ok((be32(&header[8..12]), len))
    }

    /// Reads an option that is too long to be looked at, and says so.
    async fn skip(&mut self, option: u32, len: usize) -> Result<(), End> {
        if len > OPTION_BYTES_SKIPPED_MAX || option == option::EXPORT_NAME {
            return Err(violation(format!("option {option} of {len} bytes")));
        }
        let mut piece = [0; 4096];
        let mut rest = len;
        while rest > 0 {
            let take = rest.min(piece.len());
            self.stream.read_exact(&mut piece[..take]).await?;
            rest -= take;
        }
        let text = format!("{len} bytes are too long for an option");
        self.answer(option, Err((reply::TOO_BIG, text))).await
    }

    async fn handle(&mut self, option: u32, payload: &[u8]) -> Result<Next, End> {
        let locked = !self.secured && self.offer.tls.is_some_and(|t| t.mode() == Mode::Required);
        let answer = match option {
            option::EXPORT_NAME if locked => {
                return Err(violation("EXPORT_NAME before TLS, which is required"));
            }
            option::STARTTLS => match self.start_tls(payload) {
                Ok(tls) => {
                    self.answer(option, Ok(Vec::new())).await?;
                    return Ok(Next::Tls(tls));
                }
                Err(error) => Err(error),
            },
            _ if locked && option != option::ABORT => {
                Err((reply::TLS_REQD, "this server requires TLS".to_owned()))
            }
            option::EXPORT_NAME => {
                let (export, place) = self.export_name(payload).await?;
                return Ok(Next::Transmission(export, place));
            }
            option::ABORT => {
                // The client may be gone already: it need not wait for the answer.
                let _ = self.answer(option, Ok(Vec::new())).await;
                return Err(End::Left);
            }
            option::GO => match self.go(payload).await {
                Ok((export, items, place)) => {
                    self.answer(option, Ok(items)).await?;
                    return Ok(Next::Transmission(export, place));
                }
                Err(error) => Err(error),
            },
            option::INFO => self.info(payload).await.map(|(_, items)| items),
            option::LIST => self.list(payload),
            option::STRUCTURED_REPLY => self.agree(HeaderStyle::Structured, payload),
            option::EXTENDED_HEADERS => self.agree(HeaderStyle::Extended, payload),
            option::LIST_META_CONTEXT => self.meta_contexts(Asked::List, payload).await,
            option::SET_META_CONTEXT => self.meta_contexts(Asked::Set, payload).await,
            _ => Err((reply::UNSUP, format!("option {option} is not known"))),
        };
        self.answer(option, answer).await?;
        Ok(Next::Option)
    }

    /// The TLS to start, once.
    fn start_tls(&self, payload: &[u8]) -> Result<ServerTls, Refused> {
        let refuse = |kind, text: &str| Err((kind, text.to_owned()));
        match self.offer.tls {
            _ if !payload.is_empty() => refuse(reply::INVALID, "STARTTLS has no payload"),
            _ if self.secured => refuse(reply::INVALID, "TLS has been started"),
            None => refuse(reply::POLICY, "TLS is not set up here"),
            Some(tls) => Ok(tls.clone()),
        }
    }

    /// EXPORT_NAME has no way to refuse but to hang up.
    async fn export_name(&mut self, name: &[u8]) -> Result<(Arc<Export>, Place), End> {
        if self.style == HeaderStyle::Extended {
            return Err(violation("EXPORT_NAME after EXTENDED_HEADERS"));
        }
        let export = self.offer.exports.look(name).await;
        let Some(export) = export.filter(|_| name.len() <= wire::STRING_BYTES_MAX) else {
            return Err(violation(format!("no export '{}'", wire::peer_text(cut(name)))));
        };
        if export.geometry().align_bytes > 512 {
            // Who asks this way is told no block sizes, and may send blocks of 512 bytes.
            return Err(violation("EXPORT_NAME of an export with blocks above 512 bytes"));
        }
        let places = self.offer.places;
        let place = places.take().await.ok_or_else(|| End::Full(places.count()))?;
        let mut data = export.geometry().size_bytes.to_be_bytes().to_vec();
        data.extend(self.flags(&export).to_be_bytes());
        if !self.no_zeroes {
            data.resize(data.len() + wire::PADDING_BYTES, 0);
        }
        self.stream.write_all(&data).await?;
        self.stream.flush().await?;
        Ok((export, place))
    }

    /// What GO tells, and a place for the client.
    async fn go(&mut self, payload: &[u8]) -> Result<(Arc<Export>, Items, Place), Refused> {
        let (export, items) = self.info(payload).await?;
        let Offer { places, peer, .. } = self.offer;
        let Some(place) = places.take().await else {
            let full = End::Full(places.count());
            tracing::warn!(peer, "a client was refused: {full} (--max-connections)");
            return Err((reply::POLICY, full.to_string()));
        };
        Ok((export, items, place))
    }

    /// The transmission flags. Where one client is served at a time, none is told that it may come
    /// several times over: nbdcopy, say, fails when it then cannot.
    fn flags(&self, export: &Export) -> u16 {
        let alone = self.offer.places.count() == 1;
        let hidden = if alone { wire::export::CAN_MULTI_CONN } else { 0 };
        export.flags(self.style) & !hidden
    }

    /// What INFO and GO tell of an export. Alone with the stream, which is not to be shared, while
    /// it looks for growth.
    async fn info(&mut self, payload: &[u8]) -> Result<(Arc<Export>, Items), Refused> {
        let (name, wanted) = options::info(payload).map_err(invalid)?;
        let export = self.offer.exports.look(name).await.ok_or_else(|| unknown(name))?;
        let asked = |item: u16| wanted.contains(&item);
        if export.geometry().align_bytes > 512 && !asked(info::BLOCK_SIZE) {
            let text = "its blocks are above 512 bytes: ask for block sizes".to_owned();
            return Err((reply::BLOCK_SIZE_REQD, text));
        }
        let item = |kind: u16, data: &[u8]| {
            let payload = [&kind.to_be_bytes(), data].concat();
            (reply::INFO, payload)
        };
        let mut items = Vec::new();
        if asked(info::NAME) {
            items.push(item(info::NAME, export.name.as_bytes()));
        }
        if asked(info::DESCRIPTION) && !export.description.is_empty() {
            items.push(item(info::DESCRIPTION, export.description.as_bytes()));
        }
        let sizes: Vec<u8> = export.block_sizes().iter().flat_map(|n| n.to_be_bytes()).collect();
        items.push(item(info::BLOCK_SIZE, &sizes));
        let mut data = export.geometry().size_bytes.to_be_bytes().to_vec();
        data.extend(self.flags(&export).to_be_bytes());
        items.push(item(info::EXPORT, &data));
        Ok((export, items))
    }

    fn list(&self, payload: &[u8]) -> Answer {
        if !payload.is_empty() {
            return Err(invalid(Malformed("LIST has no payload")));
        }
        let server = |export: Arc<Export>| {
            let mut out = Vec::new();
            put_string(&mut out, &export.name);
            out.extend(export.description.as_bytes());
            (reply::SERVER, out)
        };
        Ok(self.offer.exports.iter().map(server).collect())
    }

    fn agree(&mut self, style: HeaderStyle, payload: &[u8]) -> Answer {
        if !payload.is_empty() {
            return Err(invalid(Malformed("this option has no payload")));
        }
        match (self.style, style) {
            (HeaderStyle::Extended, HeaderStyle::Structured) => {
                Err((reply::EXT_HEADER_REQD, "extended headers are agreed on".to_owned()))
            }
            (now, wanted) if now == wanted => Err(invalid(Malformed("this is agreed on already"))),
            _ => {
                self.style = style;
                Ok(Vec::new())
            }
        }
    }

    async fn meta_contexts(&mut self, asked: Asked, payload: &[u8]) -> Answer {
        if asked == Asked::Set {
            // Whatever comes of it, it replaces what was set before (proto.md, SET_META_CONTEXT).
            self.chosen = None;
        }
        if self.style == HeaderStyle::Simple {
            return Err(invalid(Malformed("meta contexts need structured replies")));
        }
        let (name, queries) = options::meta_contexts(payload).map_err(invalid)?;
        let export = self.offer.exports.find(name).ok_or_else(|| unknown(name))?;
        let found = contexts::matching(contexts::all(&export), &queries, asked);
        let told = |context: &Context| {
            // A list has no ids to give (proto.md: reserved, the client ignores them).
            let id = if asked == Asked::Set { context.id } else { 0 };
            let payload = [&id.to_be_bytes(), context.name.as_bytes()].concat();
            (reply::META_CONTEXT, payload)
        };
        let mut items: Items = found.iter().map(told).collect();
        if asked == Asked::List
            && queries.contains(&initial_state::QUERY.as_bytes())
            && let Some(state) = initial_state(&export).await
        {
            items.push((reply::META_CONTEXT, [&[0; 4], state.name().as_bytes()].concat()));
        }
        if asked == Asked::Set {
            self.chosen = Some((export, found));
        }
        Ok(items)
    }

    /// Sends the replies to an option.
    async fn answer(&mut self, option: u32, answer: Answer) -> Result<(), End> {
        let mut out = Vec::new();
        let mut put = |kind: u32, payload: &[u8]| {
            out.extend(wire::OPTION_REPLY.to_be_bytes());
            out.extend(option.to_be_bytes());
            out.extend(kind.to_be_bytes());
            let len = u32::try_from(payload.len()).expect("a reply is a few KiB");
            out.extend(len.to_be_bytes());
            out.extend(payload);
        };
        match answer {
            Ok(items) => {
                for (kind, payload) in &items {
                    put(*kind, payload);
                }
                put(reply::ACK, &[]);
            }
            Err((kind, text)) => put(kind, cut(text.as_bytes())),
        }
        self.stream.write_all(&out).await?;
        self.stream.flush().await?;
        Ok(())
    }
}

/// What the export holds, if one answer says it soon.
async fn initial_state(export: &Export) -> Option<InitialState> {
    let whole = export.geometry().range();
    if whole.is_empty() {
        return None;
    }
    let told = tokio::time::timeout(STATE_WAIT, export.source.extents(whole)).await;
    InitialState::of_map(&told.ok()?.ok()?, whole.end())
}

fn invalid(Malformed(rule): Malformed) -> Refused {
    (reply::INVALID, rule.to_owned())
}

fn unknown(name: &[u8]) -> Refused {
    (reply::UNKNOWN, format!("no export '{}'", wire::peer_text(cut(name))))
}

/// What of a text may be repeated in an error: CVE-2020-10761 was an error text that became longer
/// than 4096 bytes because it quoted the client.
fn cut(text: &[u8]) -> &[u8] {
    &text[..text.len().min(256)]
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    let len = u32::try_from(text.len()).expect("names are checked when an export is made");
    out.extend(len.to_be_bytes());
    out.extend(text.as_bytes());
}
