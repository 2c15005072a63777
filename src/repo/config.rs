//! The repository's configuration: the object that makes a store a repository.
//!
//! ```text
//!  config = JSON on one line ‖ "\n" ‖ MAC in hex ‖ "\n"
//!  MAC    = BLAKE3 keyed(HKDF-SHA256("", master, "vmbackup v1 config"), the line without "\n")
//! ```
//!
//! Readable without a key, so that a stranger's newer format or a wrong store is told before a
//! password is asked for; trusted only once the MAC was checked with the master key. It is written
//! last when a repository is made ([`super::keys::init`]) and never again.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::seal::{FORMAT_VERSION, MasterKey, derive, random};
use super::store::{ObjectName, ObjectStore, ReadRange, StoreError, from_hex, hex};
use crate::clock::Timestamp;
use crate::content::LEAF_BYTES;
use crate::error::{Error, Kind, Result};
use crate::units::{ByteSize, MIB};

/// Largest chunk: a request of 4 MiB is where no source gets faster.
const CHUNK_BYTES_MAX: u64 = 4 * MIB;

/// Largest configuration that is read.
const CONFIG_BYTES_MAX: u64 = 64 * 1024;

/// What tells our configuration from anybody else's.
const FORMAT_NAME: &str = "vmbackup repository";

const MAC_INFO: &[u8] = b"vmbackup v1 config";

/// Tells one repository from another: random.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepositoryId(pub [u8; 16]);

impl fmt::Display for RepositoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for RepositoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for RepositoryId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::new(Kind::Usage, format!("'{text}' is not a repository id"));
        from_hex(text).map(Self).ok_or_else(bad)
    }
}

/// Size of the repository's chunks: 256 KiB times a power of two, at most 4 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSize(u32);

impl ChunkSize {
    /// One leaf of the content tree: daily changes are small and scattered.
    pub const DEFAULT: Self = Self(0);

    /// A chunk size, or what is wrong with it.
    pub fn new(bytes: u64) -> Result<Self> {
        let levels = (bytes / LEAF_BYTES).checked_ilog2().unwrap_or(0);
        if bytes > CHUNK_BYTES_MAX || LEAF_BYTES << levels != bytes {
            let message = format!("{} is not a chunk size", ByteSize(bytes));
            return Err(Error::new(Kind::Usage, message)
                .hint("choose 256 KiB, 512 KiB, 1 MiB, 2 MiB or 4 MiB"));
        }
        Ok(Self(levels))
    }

    /// Bytes of a chunk.
    pub fn bytes(self) -> u64 {
        LEAF_BYTES << self.0
    }

    /// Levels of the content tree below a chunk: it has `2^levels` leaves.
    pub fn levels(self) -> u32 {
        self.0
    }
}

/// What a repository is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Its identity.
    pub id: RepositoryId,
    /// How disks are cut.
    pub chunk: ChunkSize,
    /// When it was made, by the maker's clock.
    pub created: Timestamp,
}

/// The JSON of version 1.
#[derive(Serialize, Deserialize)]
struct Wire {
    format: String,
    version: u16,
    id: String,
    chunk_bytes: u64,
    created: String,
}

/// What every version's JSON has.
#[derive(Deserialize)]
struct AnyVersion {
    format: String,
    version: u16,
}

impl Config {
    /// The configuration of a new repository.
    pub fn generate(chunk: ChunkSize, created: Timestamp) -> Self {
        Self { id: RepositoryId(random()), chunk, created }
    }

    /// The object, authenticated by the master key.
    pub(super) fn encode(&self, master: &MasterKey) -> Vec<u8> {
        let wire = Wire {
            format: FORMAT_NAME.to_owned(),
            version: FORMAT_VERSION,
            id: self.id.to_string(),
            chunk_bytes: self.chunk.bytes(),
            created: self.created.to_string(),
        };
        let line = serde_json::to_string(&wire).expect("plain fields serialise");
        format!("{line}\n{}\n", mac(master, &line)).into_bytes()
    }
}

/// A configuration that was read but not checked yet.
pub(super) struct Unchecked {
    config: Config,
    line: String,
    mac: String,
}

impl Unchecked {
    /// Reads the configuration in `store`.
    pub(super) async fn read(store: &dyn ObjectStore) -> Result<Self> {
        let range = ReadRange::Whole { bytes_max: CONFIG_BYTES_MAX };
        let bytes = match store.read(&ObjectName::config(), range).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => {
                let message = format!("no repository in {}", store.describe());
                return Err(Error::new(Kind::NotFound, message)
                    .hint("check the path, or make one with 'vmbackup repo init'"));
            }
            Err(error) => return Err(error.into()),
        };
        Self::parse(&bytes).map_err(|e| {
            let error = e.context(format!(
                "cannot read the configuration of the repository in {}",
                store.describe()
            ));
            match error.kind() {
                Kind::Corrupt => error.hint(
                    "put the file back from a copy of the repository (it is never changed, so any \
                     copy of it is right); without it nothing opens the others",
                ),
                _ => error,
            }
        })
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let corrupt = |what: &str| Error::new(Kind::Corrupt, format!("object config {what}"));
        let text = std::str::from_utf8(bytes).map_err(|_| corrupt("is not text"))?;
        let (line, mac) = text.split_once('\n').ok_or_else(|| corrupt("has no second line"))?;
        let any: AnyVersion =
            serde_json::from_str(line).map_err(|e| corrupt("is not JSON").source(e))?;
        if any.format != FORMAT_NAME {
            return Err(corrupt("is not that of a repository"));
        }
        if any.version > FORMAT_VERSION {
            let message = format!(
                "the repository has format version {}, this program reads up to {FORMAT_VERSION}",
                any.version
            );
            return Err(
                Error::new(Kind::TooNew, message).hint("use a newer version of this program")
            );
        }
        let wire: Wire =
            serde_json::from_str(line).map_err(|e| corrupt("lacks a field").source(e))?;
        let config = Config {
            id: wire.id.parse().map_err(|_| corrupt("has no valid id"))?,
            chunk: ChunkSize::new(wire.chunk_bytes)
                .map_err(|_| corrupt("has no valid chunk size"))?,
            created: wire.created.parse().map_err(|_| corrupt("has no valid time"))?,
        };
        Ok(Self { config, line: line.to_owned(), mac: mac.trim_end().to_owned() })
    }

    /// The repository's id, not yet to be trusted.
    pub(super) fn id(&self) -> RepositoryId {
        self.config.id
    }

    /// The configuration, if `master` authenticates it.
    pub(super) fn check(&self, master: &MasterKey) -> Option<Config> {
        // The MAC is no secret: comparing it in variable time tells nothing that is not in the store.
        (mac(master, &self.line) == self.mac).then(|| self.config.clone())
    }
}

fn mac(master: &MasterKey, line: &str) -> String {
    let key = zeroize::Zeroizing::new(derive(master.expose(), b"", &[MAC_INFO]));
    blake3::keyed_hash(&key, line.as_bytes()).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded() -> (Config, MasterKey, Vec<u8>) {
        let master = MasterKey::from_bytes([1; 32]);
        let config = Config::generate(ChunkSize::new(MIB).unwrap(), Timestamp::UNIX_EPOCH);
        let bytes = config.encode(&master);
        (config, master, bytes)
    }

    #[test]
    fn a_configuration_reads_back_and_any_change_shows() {
        let (config, master, bytes) = encoded();
        assert_eq!(Unchecked::parse(&bytes).unwrap().check(&master), Some(config));
        for at in 0..bytes.len() - 1 {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let checked = Unchecked::parse(&changed).map(|unchecked| unchecked.check(&master));
            assert!(!matches!(checked, Ok(Some(_))), "byte {at} changed");
        }
        let other = MasterKey::from_bytes([2; 32]);
        assert_eq!(Unchecked::parse(&bytes).unwrap().check(&other), None);
    }

    #[test]
    fn a_newer_version_is_too_new_whatever_else_it_holds() {
        let newer = br#"{"format":"vmbackup repository","version":2,"cut":"content"}"#;
        let mut bytes = newer.to_vec();
        bytes.extend_from_slice(b"\n00\n");
        assert_eq!(Unchecked::parse(&bytes).err().unwrap().kind(), Kind::TooNew);
    }

    #[test]
    fn chunk_sizes_are_powers_of_two_leaves() {
        for (bytes, levels) in [(LEAF_BYTES, 0), (2 * LEAF_BYTES, 1), (4 * MIB, 4)] {
            let chunk = ChunkSize::new(bytes).unwrap();
            assert_eq!((chunk.levels(), chunk.bytes()), (levels, bytes));
        }
        for bytes in [0, 4096, LEAF_BYTES - 1, 3 * LEAF_BYTES, 8 * MIB, u64::MAX] {
            assert_eq!(ChunkSize::new(bytes).unwrap_err().kind(), Kind::Usage, "{bytes}");
        }
    }
}
