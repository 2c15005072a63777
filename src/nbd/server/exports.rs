//! What a server offers: disks with names, and what it says about each.
//!
//! A disk may grow while it is served ([`Growth`]): each client that chooses an export, or asks
//! what it is, gets the disk as it is then, and keeps it. Looking is bounded: one look at a time
//! for each export, and a client that would wait too long for it gets what the last look found.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::time::timeout;

use super::limits::{EXPORTS_MAX, GROWTH_WAIT, PAYLOAD_BYTES_MAX};
use crate::block::{BlockSink, BlockSource, Geometry};
use crate::error::{Error, Kind, Result, with_causes};
use crate::nbd::wire::{self, HeaderStyle, export};

/// A disk under a name.
#[derive(Clone)]
pub struct Export {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) source: Arc<dyn BlockSource>,
    pub(super) sink: Option<Arc<dyn BlockSink>>,
    pub(super) changes: Vec<ChangeMap>,
    /// For the context `qemu:allocation-depth`; empty if it is not offered.
    pub(super) layers: Vec<Arc<dyn BlockSource>>,
    growth: Option<Arc<dyn Growth>>,
    one_connection: bool,
}

/// A disk that may become larger while it is served.
#[async_trait]
pub trait Growth: Send + Sync {
    /// The disk as it is now, if it has more than `size_bytes`; both it and what was served before
    /// are the same disk. Let to its end, also when nobody waits for it any more.
    async fn grown(&self, size_bytes: u64) -> Result<Option<Grown>>;
}

/// A disk that has grown, to be served in place of the smaller one.
pub struct Grown {
    /// To read it.
    pub source: Arc<dyn BlockSource>,
    /// To write it.
    pub sink: Arc<dyn BlockSink>,
    /// Its layers, as in [`Export::with_layers`].
    pub layers: Vec<Arc<dyn BlockSource>>,
}

/// Changes since some earlier time, told as the context `qemu:dirty-bitmap:NAME`.
#[derive(Clone)]
pub(super) struct ChangeMap {
    pub(super) name: String,
    /// Only its extents are asked for: what is not Unchanged is dirty.
    pub(super) map: Arc<dyn BlockSource>,
}

impl Export {
    /// A disk that can only be read.
    pub fn read_only(name: impl Into<String>, source: Arc<dyn BlockSource>) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            source,
            sink: None,
            changes: Vec::new(),
            layers: Vec::new(),
            growth: None,
            one_connection: false,
        }
    }

    /// A disk that can be read and written: both are the same disk. Unlike a copy, clients write to
    /// a range as often as they like, and read it in between.
    pub fn writable(
        name: impl Into<String>,
        source: Arc<dyn BlockSource>,
        sink: Arc<dyn BlockSink>,
    ) -> Self {
        Self { sink: Some(sink), ..Self::read_only(name, source) }
    }

    /// Says what it is, for people who list the exports.
    #[must_use]
    pub fn described(mut self, text: impl Into<String>) -> Self {
        self.description = text.into();
        self
    }

    /// Offers the context `qemu:dirty-bitmap:NAME`: what `map` does not call Unchanged is dirty.
    /// Only the extents of `map` are asked for.
    #[must_use]
    pub fn with_changes(mut self, name: impl Into<String>, map: Arc<dyn BlockSource>) -> Self {
        self.changes.push(ChangeMap { name: name.into(), map });
        self
    }

    /// Offers the context `qemu:allocation-depth` for a disk that lies in these layers, the topmost
    /// first: what a layer calls Unchanged is in one further down, what the lowest calls Zero is in
    /// none. Only their extents are asked for.
    #[must_use]
    pub fn with_layers(mut self, layers: Vec<Arc<dyn BlockSource>>) -> Self {
        self.layers = layers;
        self
    }

    /// Looks whether the disk has grown whenever a client chooses it: clients that come later see
    /// the new size, those that are there keep theirs.
    #[must_use]
    pub fn growing(mut self, growth: Arc<dyn Growth>) -> Self {
        self.growth = Some(growth);
        self
    }

    /// The same export of the disk as it has become.
    fn grown(&self, disk: Grown) -> Self {
        let Grown { source, sink, layers } = disk;
        Self { source, sink: Some(sink), layers, ..self.clone() }
    }

    /// Does not tell clients that they may use several connections. By default they may: a source
    /// does not change, and [`BlockSink::flush`] covers every completed write, whichever connection
    /// it came from. For sinks on which that does not hold.
    #[must_use]
    pub fn one_connection(mut self) -> Self {
        self.one_connection = true;
        self
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.source.geometry()
    }

    /// The transmission flags.
    pub(super) fn flags(&self, style: HeaderStyle) -> u16 {
        let mut flags =
            export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_FUA | export::SEND_CACHE;
        flags |= if self.sink.is_some() {
            export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO
        } else {
            export::READ_ONLY
        };
        if !self.one_connection {
            flags |= export::CAN_MULTI_CONN;
        }
        if style != HeaderStyle::Simple {
            flags |= export::SEND_DF;
        }
        if style == HeaderStyle::Extended {
            flags |= export::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }

    /// Smallest, preferred and largest block: powers of two but for the last.
    pub(super) fn block_sizes(&self) -> [u32; 3] {
        let Geometry { align_bytes, preferred_bytes, .. } = self.geometry();
        let small = |n: u64| u32::try_from(n).expect("at most 32 MiB");
        let preferred = preferred_bytes.clamp(align_bytes.max(512), PAYLOAD_BYTES_MAX);
        let preferred = preferred.checked_next_power_of_two().unwrap_or(PAYLOAD_BYTES_MAX);
        [small(align_bytes), small(preferred), small(PAYLOAD_BYTES_MAX)]
    }

    fn check(&self) -> Result<()> {
        let Geometry { size_bytes, align_bytes, .. } = self.geometry();
        let refuse = |why: String| {
            Err(Error::new(Kind::Unsupported, format!("cannot serve '{}': {why}", self.name)))
        };
        let names = self.changes.iter().map(|map| &map.name).chain([&self.name, &self.description]);
        if names.map(String::len).max() > Some(wire::STRING_BYTES_MAX / 2) {
            return refuse("a name or description of it is longer than 2048 bytes".into());
        }
        if i64::try_from(size_bytes).is_err() {
            return refuse(format!("{size_bytes} bytes are more than NBD can offer"));
        }
        if !align_bytes.is_power_of_two() || align_bytes > wire::BLOCK_BYTES_MIN_MAX.into() {
            return refuse(format!("its blocks of {align_bytes} bytes are too large for NBD"));
        }
        Ok(())
    }
}

/// All that a server offers.
#[derive(Clone)]
pub struct Exports {
    list: Vec<Arc<Slot>>,
    default: Option<usize>,
}

/// The place of an export.
struct Slot {
    name: String,
    // Held for a clone, never across an await.
    now: Mutex<Arc<Export>>,
    looking: Arc<tokio::sync::Mutex<()>>,
}

impl Slot {
    fn new(export: Export) -> Self {
        let (name, looking) = (export.name.clone(), Arc::default());
        Self { name, now: Mutex::new(Arc::new(export)), looking }
    }

    fn now(&self) -> Arc<Export> {
        Arc::clone(&self.now.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks whether the disk has grown, and changes to that. In a task of its own: growing a disk
    /// is nothing to be dropped half way because a client hangs up.
    async fn look(self: &Arc<Self>, growth: Arc<dyn Growth>) {
        let looking = Arc::clone(&self.looking);
        let slot = Arc::clone(self);
        let look = async {
            let alone = looking.lock_owned().await;
            tokio::spawn(async move {
                let _alone = alone;
                let now = slot.now();
                match growth.grown(now.geometry().size_bytes).await {
                    Ok(Some(disk)) => slot.change(now.grown(disk)),
                    Ok(None) => {}
                    Err(error) => {
                        let (export, reason) = (&slot.name, with_causes(&error));
                        tracing::warn!(export, reason, "an export keeps its size");
                    }
                }
            })
            .await
        };
        match timeout(GROWTH_WAIT, look).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(export = self.name, %error, "cannot look for growth"),
            Err(_) => {
                tracing::warn!(export = self.name, "it takes long to see whether it has grown");
            }
        }
    }

    fn change(&self, export: Export) {
        let (name, size_bytes) = (&self.name, export.geometry().size_bytes);
        match export.check() {
            Ok(()) => {
                tracing::info!(export = name, size_bytes, "an export has grown");
                *self.now.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(export);
            }
            Err(error) => tracing::warn!(export = name, %error, "an export keeps its size"),
        }
    }
}

impl Exports {
    /// These; names must differ. A single one is the default export, too.
    pub fn new(list: impl IntoIterator<Item = Export>) -> Result<Self> {
        let list: Vec<_> = list.into_iter().collect();
        if list.len() > EXPORTS_MAX {
            let message = format!("{} exports are more than {EXPORTS_MAX}", list.len());
            return Err(Error::new(Kind::Usage, message));
        }
        for (index, export) in list.iter().enumerate() {
            export.check()?;
            if list[..index].iter().any(|other| other.name == export.name) {
                let message = format!("two exports are named '{}'", export.name);
                return Err(Error::new(Kind::Usage, message));
            }
        }
        let default = (list.len() == 1).then_some(0);
        let list = list.into_iter().map(|export| Arc::new(Slot::new(export))).collect();
        Ok(Self { list, default })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Arc<Export>> {
        self.list.iter().map(|slot| slot.now())
    }

    fn slot(&self, name: &[u8]) -> Option<&Arc<Slot>> {
        let named = self.list.iter().find(|slot| slot.name.as_bytes() == name);
        named.or_else(|| self.list.get(self.default.filter(|_| name.is_empty())?))
    }

    /// The export a client means by `name`; the empty name is the default export.
    pub(super) fn find(&self, name: &[u8]) -> Option<Arc<Export>> {
        self.slot(name).map(|slot| slot.now())
    }

    /// The same for a client that wants to know its size.
    pub(super) async fn look(&self, name: &[u8]) -> Option<Arc<Export>> {
        let slot = self.slot(name)?;
        if let Some(growth) = slot.now().growth.clone() {
            slot.look(growth).await;
        }
        Some(slot.now())
    }
}

impl std::fmt::Debug for Exports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.list.iter().map(|slot| &slot.name)).finish()
    }
}
