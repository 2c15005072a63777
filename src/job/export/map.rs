//! What the contexts of an export say of it: extents, and totals.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use super::info::{self, Content, Scope};
use crate::block::ByteRange;
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::nbd::wire::{DIRTY_BITMAP_PREFIX, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
use crate::nbd::{self, ClientOptions, Inspector, NbdUri, Runs};

/// Most extents that are listed, of all contexts: a list of more is for nobody to read.
const EXTENTS_MAX: usize = 1_000_000;

/// Most different states that are counted; a server invents no more than these.
const STATES_MAX: usize = 10_000;

/// Most bytes of the names of contexts that one connection is asked for: a server of ours takes 64 KiB
/// in an option, others more.
const NAMES_BYTES_MAX: usize = 48 << 10;

/// Most contexts that one connection is asked for: what QEMU tells of each in one answer at most
/// (131072 extents, `NBD_MAX_BLOCK_STATUS_EXTENTS` in nbd/server.c) is what a client takes of all.
const NAMES_MAX: usize = 8;

/// What to map.
#[derive(Clone, Debug)]
pub struct Request {
    /// The export.
    pub uri: NbdUri,
    /// These contexts; all the export has when empty.
    pub contexts: Vec<String>,
    /// Whether the extents are listed.
    pub detail: Detail,
}

/// How much to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Every extent, and totals.
    Extents,
    /// Totals only: of any disk, however fragmented.
    Totals,
    /// The extent from this place on and no more: the server need not walk the disk.
    At(u64),
}

/// What the contexts say.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The export.
    pub uri: String,
    /// Its size.
    pub size_bytes: u64,
    /// Each context.
    pub contexts: Vec<Context>,
}

/// What a context says.
#[derive(Clone, Debug, Serialize)]
pub struct Context {
    /// Its name.
    pub name: String,
    /// Its extents; empty when only totals were asked for.
    pub extents: Vec<Extent>,
    /// Bytes in each state.
    pub totals: Vec<Total>,
}

/// A range in one state.
#[derive(Clone, Debug, Serialize)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
    /// The state as a number.
    pub flags: u64,
    /// What that means.
    pub state: String,
}

/// How much is in a state.
#[derive(Clone, Debug, Serialize)]
pub struct Total {
    /// The state as a number.
    pub flags: u64,
    /// What that means.
    pub state: String,
    /// How much.
    pub bytes: u64,
}

/// Maps an export.
pub async fn run(request: &Request, control: &Control) -> Result<Report> {
    let uri = &request.uri;
    let mut names = request.contexts.clone();
    if names.is_empty() {
        let info = info::run(uri, Scope::One, Content::Unread, control).await?;
        names = info.exports.into_iter().flat_map(|export| export.contexts).collect();
    }
    // One that is named twice is told of once: some servers refuse it, others answer twice.
    let mut seen = HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    if names.is_empty() {
        let message = format!("NBD server {uri} tells nothing of what its export holds");
        return Err(Error::new(Kind::Unsupported, message));
    }
    let timeouts = ClientOptions::default().timeouts;
    let mut contexts: Vec<Context> = Vec::new();
    let mut size_bytes = 0;
    for names in fitting(&names) {
        let opening = Inspector::open(uri, &uri.export, names, timeouts);
        let inspector = control.run(Box::pin(opening)).await?;
        size_bytes = inspector.info().size_bytes;
        contexts.extend(match request.detail {
            Detail::At(offset) => place(&inspector, offset, control).await?,
            detail => {
                let listed = contexts.iter().map(|context| context.extents.len()).sum();
                map(&inspector, (detail, listed), control).await?
            }
        });
    }
    Ok(Report { uri: uri.to_string(), size_bytes, contexts })
}

/// The names in as few parts as connections may have: a server may serve but one.
fn fitting(names: &[String]) -> impl Iterator<Item = &[String]> {
    let mut rest = names;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |name: &&String| {
            bytes += name.len() + 4;
            bytes <= NAMES_BYTES_MAX
        };
        let count = rest.iter().take(NAMES_MAX).take_while(fits).count().max(1);
        let part;
        (part, rest) = rest.split_at_checked(count)?;
        Some(part)
    })
}

/// The extent of each context that begins at `offset`.
async fn place(inspector: &Inspector, offset: u64, control: &Control) -> Result<Vec<Context>> {
    let size_bytes = inspector.info().size_bytes;
    if offset >= size_bytes {
        let message = format!("there is no byte {offset}: the export has {size_bytes}");
        return Err(Error::new(Kind::Usage, message));
    }
    let first = inspector.first(ByteRange::between(offset, size_bytes));
    let told = control.run(first).await?;
    let context = |(context, runs): (&nbd::Context, Runs)| {
        let name = context.name.clone();
        let (bytes, flags) = runs.first().copied().expect("each context tells at least one run");
        let state = state(&name, flags);
        let totals = vec![Total { flags, state: state.clone(), bytes }];
        Context { name, extents: vec![Extent { offset, bytes, flags, state }], totals }
    };
    Ok(inspector.contexts().iter().zip(told).map(context).collect())
}

/// All contexts in one walk: each answer tells of prefixes of different lengths, and the next question
/// begins where the shortest ends. So many extents are listed already.
async fn map(
    inspector: &Inspector,
    (detail, listed): (Detail, usize),
    control: &Control,
) -> Result<Vec<Context>> {
    let size_bytes = inspector.info().size_bytes;
    let of = |context: &nbd::Context| Walk::new(context.name.clone(), detail);
    let mut walks: Vec<_> = inspector.contexts().iter().map(of).collect();
    while let Some(from) = walks.iter().map(|walk| walk.at).min().filter(|at| *at < size_bytes) {
        let status = inspector.status(ByteRange::between(from, size_bytes));
        let told = control.run(status).await?;
        for (walk, runs) in walks.iter_mut().zip(told) {
            walk.told(from, runs)?;
        }
        if listed + walks.iter().map(|walk| walk.extents.len()).sum::<usize>() > EXTENTS_MAX {
            let message = format!("there are more than {EXTENTS_MAX} extents to list");
            return Err(Error::new(Kind::Unsupported, message).hint("ask for --totals"));
        }
    }
    Ok(walks.into_iter().map(Walk::ended).collect())
}

/// What one context has told so far.
struct Walk {
    name: String,
    detail: Detail,
    /// Up to here.
    at: u64,
    extents: Vec<Extent>,
    totals: BTreeMap<u64, u64>,
}

impl Walk {
    fn new(name: String, detail: Detail) -> Self {
        Self { name, detail, at: 0, extents: Vec::new(), totals: BTreeMap::new() }
    }

    /// Takes what is new of the runs from `start` on, which it has been told up to at least.
    fn told(&mut self, start: u64, runs: Runs) -> Result<()> {
        let mut end = start;
        for (bytes, flags) in runs {
            end += bytes;
            if end > self.at {
                self.push(end - self.at, flags)?;
            }
        }
        Ok(())
    }

    fn push(&mut self, bytes: u64, flags: u64) -> Result<()> {
        let name = &self.name;
        *self.totals.entry(flags).or_default() += bytes;
        if self.totals.len() > STATES_MAX {
            let message = format!("context {name} has more than {STATES_MAX} states");
            return Err(Error::new(Kind::Protocol, message));
        }
        match self.extents.last_mut() {
            _ if self.detail == Detail::Totals => {}
            Some(last) if last.flags == flags => last.bytes += bytes,
            _ => {
                let state = state(name, flags);
                self.extents.push(Extent { offset: self.at, bytes, flags, state });
            }
        }
        self.at += bytes;
        Ok(())
    }

    fn ended(self) -> Context {
        let Self { name, extents, totals, .. } = self;
        let total = |(flags, bytes)| Total { flags, state: state(&name, flags), bytes };
        Context { totals: totals.into_iter().map(total).collect(), extents, name }
    }
}

/// What the flags of a context mean (proto.md, "base:allocation"; QEMU `docs/interop/nbd.rst`).
fn state(context: &str, flags: u64) -> String {
    let known = if context == "base:allocation" {
        match flags {
            0 => "data",
            STATE_HOLE => "hole",
            STATE_ZERO => "zero",
            3 => "hole,zero",
            _ => "",
        }
    } else if context.starts_with(DIRTY_BITMAP_PREFIX) {
        match flags {
            0 => "clean",
            STATE_DIRTY => "dirty",
            _ => "",
        }
    } else if context == "qemu:allocation-depth" {
        match flags {
            0 => "unallocated",
            1 => "local",
            depth => return format!("backing depth {depth}"),
        }
    } else {
        ""
    };
    if known.is_empty() { format!("{flags:#x}") } else { known.to_owned() }
}
