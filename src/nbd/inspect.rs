//! Looking at exports: everything a server says, and what each of its contexts says of a range.
//!
//! For people and scripts who ask "what is this". A disk to copy is a [`Client`](super::Client).

use std::sync::Arc;

use super::client::{Asked, meet, negotiate};
use super::connection::{Connection, Query};
use super::export::ExportInfo;
use super::negotiate::{Context, Greeted, Handshake, Listed};
use super::patience::{Patience, Timeouts};
use super::request::Extents;
use super::stream::{Connector, within};
use super::tls::TlsSession;
use super::wire::HeaderStyle;
use crate::block::ByteRange;
use crate::error::{Error, Kind, Result};

/// Exports looked at in one go.
const EXPORTS_MAX: usize = 1000;

/// Exports about which a server may say nothing, in a row and in all, before it is asked about no more.
const SILENT_MAX: usize = 3;
const SILENCES_MAX: usize = 10;

/// Longest range asked for at once: what the 32-bit lengths of simple headers take, in whole MiB.
const STATUS_BYTES_MAX: u64 = 2 << 30;

/// What a server says.
#[derive(Debug)]
pub struct Description {
    /// How sessions begin.
    pub greeting: Greeting,
    /// How requests would look.
    pub style: HeaderStyle,
    /// TLS, if the session was inside it.
    pub tls: Option<TlsSession>,
    /// Its exports, or the one that was asked for.
    pub exports: Vec<Described>,
}

/// How the sessions of a server begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// With its one export.
    Oldstyle,
    /// With the name of the export, to which there is no refusal.
    Newstyle,
    /// With options, each of which is answered.
    FixedNewstyle,
}

/// What a server says of an export.
#[derive(Debug)]
pub struct Described {
    /// The name it was asked for, and what the list of exports says of it.
    pub listed: Listed,
    /// The rest, or why it does not tell.
    pub told: Result<Told>,
}

/// What a server says of an export it was asked about.
#[derive(Clone, Debug)]
pub struct Told {
    /// Size, abilities, limits, description.
    pub info: ExportInfo,
    /// The names of its meta contexts.
    pub contexts: Vec<String>,
}

/// Which exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which<'a> {
    /// This one.
    One(&'a str),
    /// All that are listed.
    All,
    /// The same, without their meta contexts.
    AllWithoutContexts,
}

/// Asks a server all it tells before data flows. Each export has its own time (that of the handshake)
/// and its own failure, but for the only one; after [`SILENT_MAX`] in a row without an answer, or
/// [`SILENCES_MAX`] in all, no more are asked about. Cancel-safe.
pub async fn describe(
    connector: &dyn Connector,
    which: Which<'_>,
    timeouts: Timeouts,
) -> Result<Description> {
    let peer = connector.peer();
    let limit = timeouts.handshake;
    let asking = || format!("asking NBD server {peer}");
    let mut handshake = match within(limit, asking, begin(connector)).await? {
        Greeted::Oldstyle(negotiated) => return Ok(of_oldstyle(negotiated.export)),
        Greeted::Newstyle(handshake) => handshake,
    };
    let greeting = if handshake.is_fixed() { Greeting::FixedNewstyle } else { Greeting::Newstyle };
    let (style, tls) = (handshake.style(), handshake.tls().cloned());
    let all = match which {
        Which::One(name) => vec![Listed { name: name.to_owned(), description: String::new() }],
        Which::All | Which::AllWithoutContexts => within(limit, asking, handshake.list()).await?,
    };
    if all.len() > EXPORTS_MAX {
        let message = format!("NBD server {peer} has {} exports", all.len());
        return Err(Error::new(Kind::Unsupported, message).hint("name the one to look at"));
    }
    let mut heard_bytes = handshake.heard_bytes;
    let mut session = Some(handshake);
    // Why nothing more is asked: what there is one reason for is not waited for again and again.
    let mut lost = None::<Error>;
    let (mut exports, mut silent, mut silences) = (Vec::new(), 0, 0);
    for listed in all {
        if session.is_none() && lost.is_none() {
            match within(limit, asking, begin_again(connector, heard_bytes)).await {
                Ok(handshake) => session = Some(handshake),
                Err(error) => lost = Some(error),
            }
        }
        let export = || format!("asking NBD server {peer} about export '{}'", listed.name);
        let told = match (&mut session, &lost) {
            (_, Some(error)) => Err(error.again()),
            (None, None) => unreachable!("there is a session or a reason why not"),
            (Some(handshake), None) => {
                let asked = told(handshake, connector, (&listed.name, which), timeouts);
                let told = within(limit, export, asked).await;
                heard_bytes = handshake.heard_bytes;
                told
            }
        };
        let told = match told {
            Err(error) if matches!(which, Which::One(_)) => return Err(error),
            told => told,
        };
        let failed = told.as_ref().err().map(Error::kind);
        // A refusal leaves the session in step.
        if matches!(failed, Some(Kind::Timeout | Kind::Connection | Kind::Protocol)) {
            session = None;
        }
        if failed == Some(Kind::Timeout) {
            (silent, silences) = (silent + 1, silences + 1);
        } else {
            silent = 0;
        }
        if lost.is_none() && (silent == SILENT_MAX || silences == SILENCES_MAX) {
            let message = format!("NBD server {peer} does not answer about its exports");
            lost = Some(Error::new(Kind::Timeout, message).hint("name the one to look at"));
        }
        exports.push(Described { listed, told });
    }
    if let Some(handshake) = session {
        handshake.abort().await;
    }
    Ok(Description { greeting, style, tls, exports })
}

/// A session up to the first question.
async fn begin(connector: &dyn Connector) -> Result<Greeted> {
    let mut greeted = meet(connector).await?;
    if let Greeted::Newstyle(handshake) = &mut greeted {
        handshake.agree_on_headers().await?;
    }
    Ok(greeted)
}

fn of_oldstyle(info: ExportInfo) -> Description {
    let listed = Listed { name: String::new(), description: String::new() };
    let told = Ok(Told { info, contexts: Vec::new() });
    let (greeting, style) = (Greeting::Oldstyle, HeaderStyle::Simple);
    Description { greeting, style, tls: None, exports: vec![Described { listed, told }] }
}

/// Another session, in which what was heard before counts.
async fn begin_again(connector: &dyn Connector, heard_bytes: usize) -> Result<Handshake> {
    match begin(connector).await? {
        Greeted::Newstyle(mut handshake) => {
            handshake.heard_bytes = heard_bytes;
            Ok(handshake)
        }
        Greeted::Oldstyle(_) => {
            let message = format!("NBD server {} has become another", connector.peer());
            Err(Error::new(Kind::Protocol, message))
        }
    }
}

/// Asks about an export.
async fn told(
    handshake: &mut Handshake,
    connector: &dyn Connector,
    (name, which): (&str, Which<'_>),
    timeouts: Timeouts,
) -> Result<Told> {
    let info = match handshake.info(name).await? {
        Some(info) => info,
        // Old servers tell only those who enter transmission.
        None => negotiate(connector, name, (&[], Asked::Nothing), timeouts.handshake).await?.export,
    };
    let contexts = match which {
        Which::AllWithoutContexts => Vec::new(),
        Which::One(_) | Which::All => handshake.list_contexts(name, &[]).await?,
    };
    Ok(Told { info, contexts })
}

/// A connection that asks for the status of ranges and nothing else.
pub struct Inspector {
    connection: Connection,
    info: ExportInfo,
    peer: Arc<str>,
}

/// What one context says from some offset on: lengths and flags.
pub type Runs = Vec<(u64, u64)>;

impl Inspector {
    /// Opens `export` with these contexts; one that the server lacks is [`Kind::NotFound`].
    pub async fn open(
        connector: &dyn Connector,
        export: &str,
        contexts: &[String],
        timeouts: Timeouts,
    ) -> Result<Self> {
        let peer = connector.peer();
        let negotiated =
            negotiate(connector, export, (contexts, Asked::Nothing), timeouts.handshake).await?;
        let has = |name: &&String| negotiated.contexts.iter().any(|found| found.name == **name);
        if let Some(missing) = contexts.iter().find(|name| !has(name)) {
            let message = format!("NBD server {peer} does not offer the context {missing}");
            return Err(Error::new(Kind::NotFound, message)
                .hint("'vmbackup nbd info' shows the contexts of an export"));
        }
        let info = negotiated.export.clone();
        Ok(Self {
            connection: Connection::start(negotiated, 1, Patience::new(timeouts)),
            info,
            peer,
        })
    }

    /// What the server says about the export.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// The contexts, in the order of [`Inspector::status`].
    pub fn contexts(&self) -> &[Context] {
        self.connection.contexts()
    }

    /// What each context says of a prefix of `range`, which is not empty: at least one run each, none
    /// past the range's end. Prefixes differ in length. Cancel-safe.
    pub async fn status(&self, range: ByteRange) -> Result<Vec<Runs>> {
        self.ask(range, Extents::Any).await
    }

    /// The same, the first run only: the server looks no further than that takes.
    pub async fn first(&self, range: ByteRange) -> Result<Vec<Runs>> {
        self.ask(range, Extents::One).await
    }

    async fn ask(&self, range: ByteRange, extents: Extents) -> Result<Vec<Runs>> {
        let align_bytes = self.info.block_sizes.min_bytes;
        if !range.offset().is_multiple_of(align_bytes) {
            let message = format!("{} has blocks of {align_bytes} bytes", self.peer);
            return Err(Error::new(Kind::Usage, message));
        }
        let range = ByteRange::new(range.offset(), range.len().min(STATUS_BYTES_MAX));
        let mut told = self.connection.status(Query { range, context: None, extents }).await?;
        let runs = |context: &Context| {
            let told = told.iter_mut().find(|status| status.id == context.id);
            let told = told.expect("a complete reply tells of every context");
            let mut runs = std::mem::take(&mut told.runs);
            // Only the last run may overshoot: the request parser has seen to it.
            let sum: u64 = runs.iter().map(|run| run.0).sum();
            if let Some(last) = runs.last_mut() {
                last.0 -= sum.saturating_sub(range.len());
            }
            runs
        };
        Ok(self.contexts().iter().map(runs).collect())
    }
}
