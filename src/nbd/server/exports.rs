//! What a server offers: disks with names, and what it says about each.

use std::sync::Arc;

use super::limits::{EXPORTS_MAX, PAYLOAD_BYTES_MAX};
use crate::block::{BlockSink, BlockSource, Geometry};
use crate::error::{Error, Kind, Result};
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
    one_connection: bool,
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
    list: Vec<Arc<Export>>,
    default: Option<usize>,
}

impl Exports {
    /// These; names must differ. A single one is the default export, too.
    pub fn new(list: impl IntoIterator<Item = Export>) -> Result<Self> {
        let list: Vec<_> = list.into_iter().map(Arc::new).collect();
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
        Ok(Self { list, default })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Export>> {
        self.list.iter()
    }

    /// The export a client means by `name`; the empty name is the default export.
    pub(super) fn find(&self, name: &[u8]) -> Option<&Arc<Export>> {
        let named = self.list.iter().find(|export| export.name.as_bytes() == name);
        named.or_else(|| self.list.get(self.default.filter(|_| name.is_empty())?))
    }
}

impl std::fmt::Debug for Exports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.list.iter().map(|export| &export.name)).finish()
    }
}
