//! What the contexts of an export say of it: extents, and totals.

use std::collections::BTreeMap;

use serde::Serialize;

use super::info::{self, Content, Scope};
use crate::block::ByteRange;
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::nbd::wire::{DIRTY_BITMAP_PREFIX, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
use crate::nbd::{ClientOptions, Inspector, NbdUri};

/// Most extents that are listed: a list of more is for nobody to read.
const EXTENTS_MAX: usize = 1_000_000;

/// Most different states that are counted; a server invents no more than these.
const STATES_MAX: usize = 10_000;

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
    if names.is_empty() {
        let message = format!("NBD server {uri} tells nothing of what its export holds");
        return Err(Error::new(Kind::Unsupported, message));
    }
    let timeouts = ClientOptions::default().timeouts;
    let mut contexts = Vec::new();
    let mut size_bytes = 0;
    for name in names {
        // One at a time: a context that is slow to walk is asked for no longer than it takes.
        let opening = Inspector::open(uri, &uri.export, std::slice::from_ref(&name), timeouts);
        let inspector = control.run(Box::pin(opening)).await?;
        size_bytes = inspector.info().size_bytes;
        contexts.push(match request.detail {
            Detail::At(offset) => place(&inspector, name, offset, control).await?,
            detail => map(&inspector, name, detail, control).await?,
        });
    }
    Ok(Report { uri: uri.to_string(), size_bytes, contexts })
}

/// The extent that begins at `offset`.
async fn place(
    inspector: &Inspector,
    name: String,
    offset: u64,
    control: &Control,
) -> Result<Context> {
    let size_bytes = inspector.info().size_bytes;
    if offset >= size_bytes {
        let message = format!("there is no byte {offset}: the export has {size_bytes}");
        return Err(Error::new(Kind::Usage, message));
    }
    let first = inspector.first(ByteRange::between(offset, size_bytes));
    let told = control.run(first).await?.swap_remove(0);
    let (bytes, flags) = told.first().copied().expect("each context tells at least one run");
    let state = state(&name, flags);
    let totals = vec![Total { flags, state: state.clone(), bytes }];
    Ok(Context { name, extents: vec![Extent { offset, bytes, flags, state }], totals })
}

async fn map(
    inspector: &Inspector,
    name: String,
    detail: Detail,
    control: &Control,
) -> Result<Context> {
    let size_bytes = inspector.info().size_bytes;
    let mut extents: Vec<Extent> = Vec::new();
    let mut totals: BTreeMap<u64, u64> = BTreeMap::new();
    let mut at = 0;
    while at < size_bytes {
        let status = inspector.status(ByteRange::between(at, size_bytes));
        let told = control.run(status).await?.swap_remove(0);
        for (bytes, flags) in told {
            *totals.entry(flags).or_default() += bytes;
            if totals.len() > STATES_MAX {
                let message = format!("context {name} has more than {STATES_MAX} states");
                return Err(Error::new(Kind::Protocol, message));
            }
            let full = extents.len() == EXTENTS_MAX;
            match extents.last_mut() {
                _ if detail == Detail::Totals => {}
                Some(last) if last.flags == flags => last.bytes += bytes,
                _ if full => {
                    let message = format!("context {name} has more than {EXTENTS_MAX} extents");
                    return Err(Error::new(Kind::Unsupported, message).hint("ask for --totals"));
                }
                _ => extents.push(Extent { offset: at, bytes, flags, state: state(&name, flags) }),
            }
            at += bytes;
        }
    }
    let total = |(flags, bytes)| Total { flags, state: state(&name, flags), bytes };
    Ok(Context { totals: totals.into_iter().map(total).collect(), extents, name })
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
