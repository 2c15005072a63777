//! Ids and sealing: what turns content into objects that a store may see.
//!
//! Everything comes from one secret, the 32-byte [`MasterKey`]:
//!
//! ```text
//!  id key      = HKDF-SHA256(salt = "",   ikm = master, info = "vmbackup v1 blob id")
//!  object key  = HKDF-SHA256(salt = salt, ikm = master, info = "vmbackup v1 object" ‖ type byte)
//!  blob id     = BLAKE3 keyed(id key, kind byte ‖ content hash)
//!
//!  object      = header ‖ body
//!  header      = "VMBK" ‖ version u16 LE ‖ type u8 ‖ 0 u8 ‖ salt[32]                  40 bytes
//!  sealed part = AES-256-GCM(object key,
//!                            nonce = counter u64 LE ‖ 0[4],
//!                            aad   = header[0..8] ‖ counter u64 LE ‖ name of the object,
//!                            plaintext)                              = ciphertext ‖ tag[16]
//! ```
//!
//! The salt is random per object, so every object has a key of its own and counters may start at 0
//! in each; whoever retries an object makes a new salt by making a new [`Sealer`]. A counter is used
//! once per sealer: its caller assigns them, since parts are sealed on several threads at once. The
//! name in the associated data keeps one object from passing for another, the counter one part for
//! another. Objects of a single part ([`Keys::seal_object`]) use counter 0.
//!
//! Plain content hashes appear only inside sealed parts: a stranger who holds the store and a guess
//! at the content cannot confirm the guess. Secrets are wiped from memory when dropped as far as
//! they are ours (the expanded AES key lives inside `ring`, which does not wipe it) and never shown.

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::store::{ObjectName, hex};
use crate::content::ContentHash;
use crate::error::{Error, Kind, Result};

/// Version of the repository format that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u16 = 1;

/// Bytes before the first part of an object.
pub const HEADER_BYTES: usize = 40;

/// What sealing adds to each part.
pub const TAG_BYTES: usize = 16;

const MAGIC: [u8; 4] = *b"VMBK";
const SALT_AT: usize = 8;
const ID_KEY_INFO: &[u8] = b"vmbackup v1 blob id";
const OBJECT_KEY_INFO: &[u8] = b"vmbackup v1 object";

/// What an object is: part of its header, its key and its associated data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ObjectType {
    /// The repository's configuration.
    Config = 1,
    /// A pack of chunks.
    DataPack = 2,
    /// A pack of tree nodes.
    TreePack = 3,
    /// An index segment.
    Index = 4,
    /// A manifest.
    Point = 5,
    /// A summary of many manifests, for listing.
    Catalog = 6,
    /// A run, or its renewal.
    Run = 7,
    /// A mark that a point is forgotten.
    Tombstone = 8,
    /// A list of what the collector is about to delete.
    Condemned = 9,
    /// A master key wrapped by a password or key file.
    KeySlot = 10,
    /// A record that a pack is damaged.
    Damaged = 11,
}

impl ObjectType {
    fn from_byte(byte: u8) -> Option<Self> {
        use ObjectType as T;
        [
            T::Config,
            T::DataPack,
            T::TreePack,
            T::Index,
            T::Point,
            T::Catalog,
            T::Run,
            T::Tombstone,
            T::Condemned,
            T::KeySlot,
            T::Damaged,
        ]
        .into_iter()
        .find(|known| *known as u8 == byte)
    }
}

/// A stored piece of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlobKind {
    /// A chunk of a disk.
    Chunk,
    /// A tree node, `height` >= 1 nodes above the chunks.
    Node {
        /// Its height; a node of height 1 lists chunks.
        height: u8,
    },
}

impl BlobKind {
    /// The byte that stands for it in ids and packs.
    pub fn byte(self) -> u8 {
        match self {
            Self::Chunk => 0,
            Self::Node { height } => height,
        }
    }

    /// The kind that `byte` stands for.
    pub fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Chunk,
            height => Self::Node { height },
        }
    }
}

/// The name under which a blob is stored and found: says nothing about its content without the key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobId(pub [u8; 32]);

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Fills an array with bytes of the system's random generator.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[cfg(test)]
    if crate::dice::fill_from_seed(&mut bytes) {
        return bytes;
    }
    // It fails only where the system call is missing or forbidden: no key may be made there.
    SystemRandom::new().fill(&mut bytes).expect("the system yields random bytes");
    bytes
}

/// The secret that everything else is derived from.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct MasterKey([u8; 32]);

impl MasterKey {
    /// A new one.
    pub fn generate() -> Self {
        Self(random())
    }

    /// One that was unwrapped.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The secret itself, to wrap it.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(secret)")
    }
}

/// Everything that is derived from a master key.
pub struct Keys {
    extract: MasterKey,
    id_key: zeroize::Zeroizing<[u8; 32]>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(secret)")
    }
}

impl Keys {
    /// Derives what does not depend on an object.
    pub fn new(master: &MasterKey) -> Self {
        let id_key = zeroize::Zeroizing::new(derive(master.expose(), b"", &[ID_KEY_INFO]));
        Self { extract: master.clone(), id_key }
    }

    /// The stored id of content with this plain hash.
    pub fn blob_id(&self, kind: BlobKind, hash: &ContentHash) -> BlobId {
        let mut hasher = blake3::Hasher::new_keyed(&self.id_key);
        hasher.update(&[kind.byte()]).update(&hash.0);
        BlobId(*hasher.finalize().as_bytes())
    }

    /// Begins an object: a fresh salt, hence a fresh key.
    pub fn sealer(&self, object_type: ObjectType, name: &ObjectName) -> Sealer {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&MAGIC);
        header[4..6].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        header[6] = object_type as u8;
        header[SALT_AT..].copy_from_slice(&random::<32>());
        Sealer { part: PartKey::new(self, &header, object_type, name), header }
    }

    /// Opens the parts of the object `name`, given its first [`HEADER_BYTES`] (more do no harm).
    pub fn opener(
        &self,
        object_type: ObjectType,
        name: &ObjectName,
        object: &[u8],
    ) -> Result<Opener, SealError> {
        let header = parse_header(object_type, name, object)?;
        Ok(Opener { part: PartKey::new(self, &header, object_type, name), name: name.clone() })
    }

    /// A whole object of one part.
    pub fn seal_object(
        &self,
        object_type: ObjectType,
        name: &ObjectName,
        plaintext: &[u8],
    ) -> Vec<u8> {
        let sealer = self.sealer(object_type, name);
        let mut object = Vec::with_capacity(HEADER_BYTES + plaintext.len() + TAG_BYTES);
        object.extend_from_slice(sealer.header());
        object.extend_from_slice(plaintext);
        let tag = sealer.seal_in_place(0, &mut object[HEADER_BYTES..]);
        object.extend_from_slice(&tag);
        object
    }

    /// The plaintext of a whole object of one part.
    pub fn open_object(
        &self,
        object_type: ObjectType,
        name: &ObjectName,
        mut object: Vec<u8>,
    ) -> Result<Vec<u8>, SealError> {
        let opener = self.opener(object_type, name, &object)?;
        object.drain(..HEADER_BYTES);
        opener.open(0, &mut object)?;
        Ok(object)
    }
}

fn parse_header(
    object_type: ObjectType,
    name: &ObjectName,
    object: &[u8],
) -> Result<[u8; HEADER_BYTES], SealError> {
    let corrupt = |what| SealError::Corrupt { name: name.clone(), what };
    let header: [u8; HEADER_BYTES] = object
        .get(..HEADER_BYTES)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| corrupt("it is shorter than a header"))?;
    if header[..4] != MAGIC {
        return Err(corrupt("it does not begin with VMBK"));
    }
    let version = u16::from_le_bytes([header[4], header[5]]);
    if version > FORMAT_VERSION {
        return Err(SealError::TooNew { name: name.clone(), version });
    }
    if version != FORMAT_VERSION || header[7] != 0 {
        return Err(corrupt("its header is not one of any version"));
    }
    if ObjectType::from_byte(header[6]) != Some(object_type) {
        return Err(corrupt("it is an object of another type"));
    }
    Ok(header)
}

/// The key of one object and what its associated data begins and ends with.
struct PartKey {
    key: LessSafeKey,
    /// `header[0..8] ‖ 0[8] ‖ name`: the middle is replaced by the counter.
    aad: Vec<u8>,
}

impl PartKey {
    fn new(
        keys: &Keys,
        header: &[u8; HEADER_BYTES],
        object_type: ObjectType,
        name: &ObjectName,
    ) -> Self {
        let info: [&[u8]; 2] = [OBJECT_KEY_INFO, &[object_type as u8]];
        let secret =
            zeroize::Zeroizing::new(derive(keys.extract.expose(), &header[SALT_AT..], &info));
        let key = UnboundKey::new(&AES_256_GCM, &*secret).expect("32 bytes are an AES-256 key");
        let mut aad = header[..SALT_AT].to_vec();
        aad.extend_from_slice(&[0; 8]);
        aad.extend_from_slice(name.as_str().as_bytes());
        Self { key: LessSafeKey::new(key), aad }
    }

    fn nonce_and_aad(&self, counter: u64) -> (Nonce, Aad<Vec<u8>>) {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&counter.to_le_bytes());
        let mut aad = self.aad.clone();
        aad[SALT_AT..SALT_AT + 8].copy_from_slice(&counter.to_le_bytes());
        (Nonce::assume_unique_for_key(nonce), Aad::from(aad))
    }
}

/// Seals the parts of one object; shared by worker threads.
pub struct Sealer {
    part: PartKey,
    header: [u8; HEADER_BYTES],
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer(secret)")
    }
}

impl Sealer {
    /// What the object begins with.
    pub fn header(&self) -> &[u8; HEADER_BYTES] {
        &self.header
    }

    /// Replaces `plaintext` by ciphertext and tag. Each `counter` may be used once: a second use
    /// would give both plaintexts away.
    pub fn seal(&self, counter: u64, plaintext: &mut Vec<u8>) {
        let tag = self.seal_in_place(counter, plaintext);
        plaintext.extend_from_slice(&tag);
    }

    /// Like [`Sealer::seal`], for a caller that places the tag itself, right behind the text.
    pub fn seal_in_place(&self, counter: u64, text: &mut [u8]) -> [u8; TAG_BYTES] {
        let (nonce, aad) = self.part.nonce_and_aad(counter);
        let tag = self
            .part
            .key
            .seal_in_place_separate_tag(nonce, aad, text)
            .expect("a part is far below the 64 GiB of AES-GCM");
        tag.as_ref().try_into().expect("a tag is 16 bytes")
    }
}

/// Opens the parts of one object; shared by worker threads.
pub struct Opener {
    part: PartKey,
    name: ObjectName,
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opener({}, secret)", self.name)
    }
}

impl Opener {
    /// Replaces a sealed part by its plaintext. After an error the bytes are worthless.
    pub fn open(&self, counter: u64, part: &mut Vec<u8>) -> Result<(), SealError> {
        let len = self.open_in_place(counter, part)?.len();
        part.truncate(len);
        Ok(())
    }

    /// Like [`Opener::open`], within a larger buffer: yields the plaintext, which begins where the
    /// part began.
    pub fn open_in_place<'a>(
        &self,
        counter: u64,
        part: &'a mut [u8],
    ) -> Result<&'a mut [u8], SealError> {
        let (nonce, aad) = self.part.nonce_and_aad(counter);
        self.part
            .key
            .open_in_place(nonce, aad, part)
            .map_err(|_| SealError::Corrupt { name: self.name.clone(), what: "its seal is broken" })
    }
}

/// Why an object does not open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Not the bytes that were sealed under this name with this master key.
    #[error("object {name} is damaged: {what}")]
    Corrupt {
        /// Which.
        name: ObjectName,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Written by a newer program.
    #[error(
        "object {name} has format version {version}, this program reads up to {FORMAT_VERSION}"
    )]
    TooNew {
        /// Which.
        name: ObjectName,
        /// Its version.
        version: u16,
    },
}

impl From<SealError> for Error {
    fn from(error: SealError) -> Self {
        // Also for a newer version: whether the repository is too new says its configuration, which
        // was read before. One object that claims to be is broken, and must not keep the others
        // from being used.
        Self::new(Kind::Corrupt, error.to_string())
            .hint("run 'check' to see which points are affected")
    }
}

/// HKDF-SHA256 to 32 bytes.
pub(super) fn derive(secret: &[u8], salt: &[u8], info: &[&[u8]]) -> [u8; 32] {
    let mut out = [0; 32];
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(info, hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut out))
        .expect("32 bytes are within the bounds of HKDF");
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::repo::store::Folder;

    fn keys() -> Keys {
        Keys::new(&MasterKey::from_bytes([7; 32]))
    }

    fn name(rest: &str) -> ObjectName {
        ObjectName::new(Folder::Index, rest)
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens_and_any_flipped_bit_shows(
            text in proptest::collection::vec(any::<u8>(), 0..500),
            at in any::<prop::sample::Index>(),
            bit in 0_u8..8,
        ) {
            let keys = keys();
            let object = keys.seal_object(ObjectType::Index, &name("a"), &text);
            let opened = keys.open_object(ObjectType::Index, &name("a"), object.clone());
            prop_assert_eq!(opened.unwrap(), text);
            let mut flipped = object;
            let at = at.index(flipped.len());
            flipped[at] ^= 1 << bit;
            prop_assert!(keys.open_object(ObjectType::Index, &name("a"), flipped).is_err());
        }
    }

    #[test]
    fn an_object_opens_only_under_its_own_name_type_counter_and_key() {
        let keys = keys();
        let sealer = keys.sealer(ObjectType::DataPack, &name("a"));
        let mut part = b"content".to_vec();
        sealer.seal(5, &mut part);
        let open = |keys: &Keys, kind, name: &ObjectName, counter| {
            let mut part = part.clone();
            keys.opener(kind, name, sealer.header())?.open(counter, &mut part).map(|()| part)
        };
        assert_eq!(open(&keys, ObjectType::DataPack, &name("a"), 5).unwrap(), b"content");
        open(&keys, ObjectType::DataPack, &name("b"), 5).unwrap_err();
        open(&keys, ObjectType::TreePack, &name("a"), 5).unwrap_err();
        open(&keys, ObjectType::DataPack, &name("a"), 6).unwrap_err();
        let others = Keys::new(&MasterKey::from_bytes([8; 32]));
        open(&others, ObjectType::DataPack, &name("a"), 5).unwrap_err();
    }

    #[test]
    fn an_object_that_claims_a_newer_version_is_damaged() {
        let keys = keys();
        let mut object = keys.seal_object(ObjectType::Index, &name("a"), b"x");
        object[4] = 2;
        let error = keys.open_object(ObjectType::Index, &name("a"), object).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
        assert_eq!(Error::from(error).kind(), Kind::Corrupt);
        let error = keys.open_object(ObjectType::Index, &name("a"), vec![0; 10]).unwrap_err();
        assert_eq!(Error::from(error).kind(), Kind::Corrupt);
    }

    #[test]
    fn two_objects_of_one_name_never_share_a_key() {
        let keys = keys();
        let seal = || keys.seal_object(ObjectType::Index, &name("a"), b"same");
        assert_ne!(seal()[SALT_AT..], seal()[SALT_AT..]);
    }

    #[test]
    fn ids_differ_by_kind_and_by_key() {
        let hash = ContentHash::of_leaf(b"x");
        let id = keys().blob_id(BlobKind::Chunk, &hash);
        assert_ne!(id, keys().blob_id(BlobKind::Node { height: 1 }, &hash));
        assert_ne!(id, Keys::new(&MasterKey::from_bytes([8; 32])).blob_id(BlobKind::Chunk, &hash));
        assert_eq!(BlobKind::from_byte(BlobKind::Chunk.byte()), BlobKind::Chunk);
    }

    #[test]
    fn debug_shows_no_secret() {
        let master = MasterKey::from_bytes([0xab; 32]);
        let shown = format!("{master:?} {:?}", Keys::new(&master));
        assert!(!shown.contains("ab") && !shown.contains("171"), "{shown}");
    }
}
