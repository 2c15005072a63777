//! Packs: many sealed blobs in one object, with a trailer that says what is in it.
//!
//! ```text
//!  header[40] ‖ blob 0 ‖ blob 1 ‖ … ‖ trailer ‖ footer[12]
//!
//!  blob i     sealed with counter i; plaintext is zstd or raw
//!  trailer    sealed with counter n (the number of blobs); plaintext is n entries of 42 bytes:
//!             id[32] ‖ kind u8 ‖ encoding u8 ‖ stored length u32 LE ‖ plain length u32 LE
//!  footer     length of the sealed trailer u32 LE ‖ n u32 LE ‖ "VMBP"
//! ```
//!
//! Offsets follow from the stored lengths, which include the seal. The trailer repeats what the
//! index says, so that the index can be rebuilt from packs alone. Chunks and tree nodes never share
//! a pack: reading a tree touches little.

use super::seal::{BlobId, BlobKind, HEADER_BYTES, Keys, ObjectType, SealError, TAG_BYTES};
use super::store::{ObjectName, ObjectStore, ReadRange};
use crate::error::{Error, Kind, Result};

/// A pack is closed when it has reached this size.
pub const PACK_BYTES: u64 = 64 << 20;

/// A pack is closed when it holds this many blobs: bounds its trailer to under 3 MiB.
pub const PACK_BLOBS_MAX: u32 = 65_536;

/// Length of the footer.
pub const FOOTER_BYTES: usize = 12;

const ENTRY_BYTES: usize = 42;
const MAGIC: [u8; 4] = *b"VMBP";

/// How a blob's plaintext is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As it is.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Encoding {
    /// The encoding that `byte` stands for.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A blob of a pack, as the trailer lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedBlob {
    /// Its id.
    pub id: BlobId,
    /// What it is.
    pub kind: BlobKind,
    /// How it is encoded.
    pub encoding: Encoding,
    /// Its place among the blobs of the pack: the counter of its seal.
    pub counter: u32,
    /// Where its sealed form begins.
    pub offset: u32,
    /// Length of its sealed form.
    pub stored_bytes: u32,
    /// Length of its plaintext once decoded.
    pub plain_bytes: u32,
}

/// The trailer's plaintext.
pub fn encode_trailer(blobs: &[PackedBlob]) -> Vec<u8> {
    let mut out = Vec::with_capacity(blobs.len() * ENTRY_BYTES + TAG_BYTES);
    for blob in blobs {
        out.extend_from_slice(&blob.id.0);
        out.extend_from_slice(&[blob.kind.byte(), blob.encoding as u8]);
        out.extend_from_slice(&blob.stored_bytes.to_le_bytes());
        out.extend_from_slice(&blob.plain_bytes.to_le_bytes());
    }
    out
}

/// Reads a trailer's plaintext; `None` when it is not one.
pub fn decode_trailer(bytes: &[u8]) -> Option<Vec<PackedBlob>> {
    let (entries, rest) = bytes.as_chunks::<ENTRY_BYTES>();
    if !rest.is_empty() {
        return None;
    }
    let mut offset = u32::try_from(HEADER_BYTES).ok()?;
    let mut blobs = Vec::with_capacity(entries.len());
    for (counter, entry) in entries.iter().enumerate() {
        let stored_bytes = u32_at(entry, 34);
        blobs.push(PackedBlob {
            id: BlobId(entry[..32].try_into().ok()?),
            kind: BlobKind::from_byte(entry[32]),
            encoding: Encoding::from_byte(entry[33])?,
            counter: u32::try_from(counter).ok()?,
            offset,
            stored_bytes,
            plain_bytes: u32_at(entry, 38),
        });
        offset = offset.checked_add(stored_bytes)?;
    }
    Some(blobs)
}

/// The footer of a pack.
pub fn encode_footer(trailer_bytes: u32, blobs: u32) -> [u8; FOOTER_BYTES] {
    let mut footer = [0; FOOTER_BYTES];
    footer[..4].copy_from_slice(&trailer_bytes.to_le_bytes());
    footer[4..8].copy_from_slice(&blobs.to_le_bytes());
    footer[8..].copy_from_slice(&MAGIC);
    footer
}

/// The least size of a whole pack in which blob `counter` ends at `end`.
pub fn whole_bytes_min(counter: u32, end: u64) -> u64 {
    let trailer = (u64::from(counter) + 1) * ENTRY_BYTES as u64 + TAG_BYTES as u64;
    end + trailer + FOOTER_BYTES as u64
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// A pack as its own trailer describes it.
#[derive(Clone, Debug)]
pub struct PackContents {
    /// The object's header, which opens its blobs.
    pub header: [u8; HEADER_BYTES],
    /// Whether it holds chunks or tree nodes.
    pub object_type: ObjectType,
    /// Its blobs in order.
    pub blobs: Vec<PackedBlob>,
}

/// Reads the trailer of pack `name` from the store: what it takes to rebuild the index.
///
/// Fails with [`Kind::Corrupt`] when the object is not a whole pack.
pub async fn read_contents(
    store: &dyn ObjectStore,
    keys: &Keys,
    name: &ObjectName,
) -> Result<PackContents> {
    let corrupt = |what: &str| {
        Error::new(Kind::Corrupt, format!("pack {name} is damaged: {what}"))
            .hint("run 'check --read-data' to see which points are affected")
    };
    let size = store.stat(name).await?.size_bytes;
    let header = store.read(name, ReadRange::Exact { offset: 0, len: HEADER_BYTES as u64 }).await?;
    let header: [u8; HEADER_BYTES] = header.try_into().map_err(|_| corrupt("short header"))?;
    let object_type = match header[6] {
        t if t == ObjectType::DataPack as u8 => ObjectType::DataPack,
        _ => ObjectType::TreePack,
    };
    // The repository is of a version we know: a header that claims a newer one is damaged.
    let opener = keys.opener(object_type, name, &header).map_err(|error| match error {
        SealError::TooNew { .. } => corrupt("its header is not one of this version"),
        error @ SealError::Corrupt { .. } => error.into(),
    })?;
    let footer = store.read(name, ReadRange::Suffix { len: FOOTER_BYTES as u64 }).await?;
    if footer.len() != FOOTER_BYTES || footer[8..] != MAGIC {
        return Err(corrupt("it has no footer"));
    }
    let (trailer_bytes, count) = (u32_at(&footer, 0), u32_at(&footer, 4));
    let expected = count as usize * ENTRY_BYTES + TAG_BYTES;
    let end = size.checked_sub(FOOTER_BYTES as u64 + u64::from(trailer_bytes));
    let Some(offset) =
        end.filter(|_| count <= PACK_BLOBS_MAX && trailer_bytes as usize == expected)
    else {
        return Err(corrupt("its footer does not fit it"));
    };
    let range = ReadRange::Exact { offset, len: u64::from(trailer_bytes) };
    let mut trailer = store.read(name, range).await?;
    opener.open(u64::from(count), &mut trailer)?;
    let blobs = decode_trailer(&trailer).ok_or_else(|| corrupt("its trailer is malformed"))?;
    let end = blobs
        .last()
        .map_or(HEADER_BYTES as u64, |b| u64::from(b.offset) + u64::from(b.stored_bytes));
    if end != offset {
        return Err(corrupt("its blobs do not fill it"));
    }
    Ok(PackContents { header, object_type, blobs })
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn trailers_survive_and_truncated_ones_are_refused(
            entries in proptest::collection::vec((any::<[u8; 32]>(), any::<u8>(), 0_u8..2, 0_u32..5000, any::<u32>()), 1..50),
            cut in 1_usize..ENTRY_BYTES,
        ) {
            let mut offset = HEADER_BYTES as u32;
            let mut blobs = Vec::new();
            for (counter, (id, kind, encoding, stored_bytes, plain_bytes)) in (0..).zip(entries) {
                let encoding = Encoding::from_byte(encoding).unwrap();
                let kind = BlobKind::from_byte(kind);
                blobs.push(PackedBlob { id: BlobId(id), kind, encoding, counter, offset, stored_bytes, plain_bytes });
                offset += stored_bytes;
            }
            let bytes = encode_trailer(&blobs);
            prop_assert_eq!(decode_trailer(&bytes).unwrap(), blobs);
            prop_assert!(decode_trailer(&bytes[..bytes.len() - cut]).is_none());
        }
    }
}
