//! Making and opening a repository, and its key slots.
//!
//! The master key never changes; what changes is who can unwrap it. Each object under `keys/` is a
//! slot (`slot.rs`): a password, a key file, or nothing (*clear*, for a repository without a key:
//! everything is sealed all the same, but whoever holds the store holds the key). So a password is
//! added, changed or removed without rewriting data, and there can be several.
//!
//! Removing a slot is a deletion of a small object and no more than that: a copy of the store made
//! earlier (a mirror, a file system snapshot, a versioned bucket) still opens with it, and if the
//! master key has become known nothing but a new repository helps. [`COPIES_MAY_REMAIN`] says so.
//!
//! Three failures are told apart: the credentials open no slot ([`Kind::WrongKey`]), a slot or the
//! configuration is damaged ([`Kind::Corrupt`]), a newer program wrote it ([`Kind::TooNew`]).
//! Credentials that were given are never ignored: with a password, clear slots do not count, so
//! nobody who can write to the store can slip a key of his own under a repository with a password.

mod slot;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::config::{ChunkSize, Config, RepositoryId, Unchecked};
use super::seal::{Keys, MasterKey};
use super::store::{Folder, ObjectName, ObjectStore, ReadRange, StoreError};
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};
use slot::{NewSlot, Slot};

/// What to tell whoever removes a slot.
pub const COPIES_MAY_REMAIN: &str = "the slot is deleted from this repository; copies of the \
    repository made before (mirrors, snapshots, versioned buckets) still open with it, and data \
    stays sealed with the same master key";

/// Shortest key file: 128 bits.
pub const KEY_FILE_BYTES_MIN: usize = 16;

/// Most slots a repository may have: each may cost an Argon2id to try.
const SLOTS_MAX: usize = 64;

/// Largest slot that is read.
const SLOT_BYTES_MAX: u64 = 16 * 1024;

/// Bytes that are wiped when dropped and never shown.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Takes over the bytes of a secret.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The secret itself.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("secret")
    }
}

/// What somebody has to open a repository with.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// Nothing: for repositories without a key.
    None,
    /// A password, without a line end.
    Password(Secret),
    /// The content of a key file, all of it.
    KeyFile(Secret),
}

impl Credentials {
    fn kind(&self) -> SlotKind {
        match self {
            Self::None => SlotKind::Clear,
            Self::Password(_) => SlotKind::Password,
            Self::KeyFile(_) => SlotKind::KeyFile,
        }
    }

    /// Refuses what protects nothing.
    fn check_strength(&self) -> Result<()> {
        match self {
            Self::Password(password) if password.expose().is_empty() => {
                Err(Error::new(Kind::Usage, "the password is empty")
                    .hint("choose one, or make a repository without a key"))
            }
            Self::KeyFile(bytes) if bytes.expose().len() < KEY_FILE_BYTES_MIN => {
                Err(Error::new(Kind::Usage, "the key file is shorter than 16 bytes")
                    .hint("make one with 'head -c 32 /dev/urandom > FILE'"))
            }
            _ => Ok(()),
        }
    }
}

/// What opens a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotKind {
    /// Nothing is needed.
    Clear,
    /// A password.
    Password,
    /// A key file.
    KeyFile,
}

impl SlotKind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Password => "password",
            Self::KeyFile => "keyfile",
        }
    }
}

/// Cost of guessing a password: parameters of Argon2id, kept in each slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kdf {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Kdf {
    /// RFC 9106 section 4, second recommended option: 64 MiB, 3 passes, 4 lanes.
    pub const RFC_9106: Self = Self { memory_kib: 64 * 1024, passes: 3, lanes: 4 };

    /// Costs nothing and protects nothing: for tests.
    pub const FOR_TESTS: Self = Self { memory_kib: 32, passes: 1, lanes: 1 };
}

/// What is known of a slot without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// The object.
    pub name: ObjectName,
    /// What opens it.
    pub kind: SlotKind,
    /// What the person who made it called it.
    pub label: String,
    /// When it was made, by the maker's clock.
    pub created: Timestamp,
}

/// How a repository is made.
#[derive(Clone, Copy, Debug)]
pub struct InitOptions {
    /// How disks are cut.
    pub chunk: ChunkSize,
    /// Cost of guessing the password.
    pub kdf: Kdf,
    /// The maker's clock.
    pub now: Timestamp,
}

/// A repository that was opened.
#[derive(Debug)]
pub struct Unlocked {
    /// Its configuration, authenticated.
    pub config: Config,
    /// Everything derived from its master key.
    pub keys: Arc<Keys>,
    /// The slot that opened.
    pub slot: SlotInfo,
    master: MasterKey,
}

impl Unlocked {
    /// Whether a password or key file protects the repository.
    pub fn has_key(&self) -> bool {
        self.slot.kind != SlotKind::Clear
    }
}

/// Makes a repository in an empty store. The configuration is written last: until it is there,
/// there is no repository.
pub async fn init(
    store: &dyn ObjectStore,
    credentials: &Credentials,
    options: InitOptions,
) -> Result<Unlocked> {
    let exists = || {
        Error::new(Kind::AlreadyExists, format!("a repository exists in {}", store.describe()))
            .hint("use it, or name another place")
    };
    match store.stat(&ObjectName::config()).await {
        Err(StoreError::NotFound { .. }) => {}
        Ok(_) => return Err(exists()),
        Err(error) => return Err(error.into()),
    }
    let master = MasterKey::generate();
    let config = Config::generate(options.chunk, options.now);
    let new = Request { repository: config.id, kdf: options.kdf, label: "", now: options.now };
    let slot = put_slot(store, &master, credentials, new).await?;
    match store.put(&ObjectName::config(), config.encode(&master)).await {
        Ok(_) => Ok(Unlocked { keys: Arc::new(Keys::new(&master)), config, slot, master }),
        Err(error) => {
            // Nobody but us knows of the slot.
            store.delete(&slot.name).await?;
            Err(if error.is_already_exists() { exists() } else { error.into() })
        }
    }
}

/// Opens the repository in `store`.
pub async fn open(store: &dyn ObjectStore, credentials: &Credentials) -> Result<Unlocked> {
    let unchecked = Unchecked::read(store).await?;
    let mut damaged = None;
    let mut kinds = Vec::new();
    for slot in read_slots(store).await? {
        let slot = match slot {
            Ok(slot) => slot,
            Err(error) => {
                damaged = Some(error);
                continue;
            }
        };
        kinds.push(slot.info.kind);
        let Some((slot, master)) = unwrap(slot, unchecked.id(), credentials).await? else {
            continue;
        };
        if let Some(config) = unchecked.check(&master) {
            let keys = Arc::new(Keys::new(&master));
            return Ok(Unlocked { config, keys, slot: slot.info, master });
        }
        let message = format!(
            "the configuration of the repository in {} was changed or damaged",
            store.describe()
        );
        damaged =
            Some(Error::new(Kind::Corrupt, message).hint("put back a copy of the object 'config'"));
    }
    Err(match damaged {
        Some(error) => error,
        None if kinds.is_empty() => no_key_left(store),
        None => wrong_key(store, credentials, &kinds),
    })
}

/// No password is wrong where there is nothing that a right one could open.
fn no_key_left(store: &dyn ObjectStore) -> Error {
    let place = store.describe();
    Error::new(Kind::Corrupt, format!("every key of the repository in {place} is missing")).hint(
        "put back a copy of its folder 'keys': without one of them nobody can read the repository",
    )
}

fn wrong_key(store: &dyn ObjectStore, credentials: &Credentials, kinds: &[SlotKind]) -> Error {
    let place = store.describe();
    let has = |kind| kinds.contains(&kind);
    let (message, hint) = match credentials.kind() {
        SlotKind::Clear => (
            format!("the repository in {place} has a key and none was given"),
            "give --password-file or --key-file",
        ),
        SlotKind::Password if has(SlotKind::Password) => {
            (format!("the password does not open the repository in {place}"), "check the password")
        }
        SlotKind::KeyFile if has(SlotKind::KeyFile) => {
            (format!("the key file does not open the repository in {place}"), "check the key file")
        }
        _ if has(SlotKind::Clear) => (
            format!("the repository in {place} has no key, but one was given"),
            "leave the key out, or add it with 'vmbackup repo key add'",
        ),
        _ => (
            format!("no key of this kind was added to the repository in {place}"),
            "see 'vmbackup repo info' for the kinds of keys it has",
        ),
    };
    Error::new(Kind::WrongKey, message).hint(hint)
}

/// The slots there are; damaged ones are left out (opening tells about them).
pub async fn list(store: &dyn ObjectStore) -> Result<Vec<SlotInfo>> {
    Ok(read_slots(store).await?.into_iter().flatten().map(|slot| slot.info).collect())
}

/// What [`add`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    /// The new slot.
    pub slot: SlotInfo,
    /// Clear slots that were removed because there is a key now; if there were any, say
    /// [`COPIES_MAY_REMAIN`].
    pub removed_clear: Vec<SlotInfo>,
}

/// Adds a slot. With the first key, clear slots are removed.
pub async fn add(
    store: &dyn ObjectStore,
    unlocked: &Unlocked,
    credentials: &Credentials,
    request: AddOptions<'_>,
) -> Result<Added> {
    if credentials.kind() == SlotKind::Clear {
        return Err(Error::new(Kind::Usage, "a repository with a key cannot lose it")
            .hint("make a new repository without a key"));
    }
    let before = list(store).await?;
    if before.len() >= SLOTS_MAX {
        return Err(Error::new(Kind::Usage, format!("there are {SLOTS_MAX} keys already"))
            .hint("remove one first"));
    }
    let AddOptions { kdf, label, now } = request;
    let new = Request { repository: unlocked.config.id, kdf, label, now };
    let slot = put_slot(store, &unlocked.master, credentials, new).await?;
    let mut removed_clear = Vec::new();
    for clear in before.into_iter().filter(|slot| slot.kind == SlotKind::Clear) {
        store.delete(&clear.name).await.map_err(|e| {
            Error::from(e).context("the key was added, but the repository still opens without it")
        })?;
        removed_clear.push(clear);
    }
    Ok(Added { slot, removed_clear })
}

/// How a slot is added.
#[derive(Clone, Copy, Debug)]
pub struct AddOptions<'a> {
    /// Cost of guessing a password.
    pub kdf: Kdf,
    /// What to call it; may be empty.
    pub label: &'a str,
    /// The maker's clock.
    pub now: Timestamp,
}

/// Removes the slot that `name` names (its object's name, or a prefix of the part after `keys/`).
/// Refuses to remove the last. Say [`COPIES_MAY_REMAIN`] afterwards.
pub async fn remove(store: &dyn ObjectStore, name: &str) -> Result<SlotInfo> {
    let slots = list(store).await?;
    let short = name.strip_prefix(Folder::Keys.prefix()).unwrap_or(name);
    let mut found = slots.iter().filter(|slot| slot.name.last().starts_with(short));
    let Some(slot) = found.next() else {
        return Err(Error::new(Kind::NotFound, format!("there is no key '{name}'"))
            .hint("'vmbackup repo info' lists the keys"));
    };
    if found.next().is_some() {
        return Err(Error::new(Kind::Ambiguous, format!("'{name}' names more than one key"))
            .hint("write more of its name; 'vmbackup repo info' lists the keys"));
    }
    let last = || {
        Error::new(
            Kind::Usage,
            format!("{} is the last key: nothing would open any more", slot.name),
        )
        .hint("add another one first")
    };
    if slots.len() == 1 {
        return Err(last());
    }
    let range = ReadRange::Whole { bytes_max: SLOT_BYTES_MAX };
    let bytes = store.read(&slot.name, range).await?;
    store.delete(&slot.name).await?;
    // Somebody may have removed the other one at the same time.
    if list(store).await?.is_empty() {
        store.put(&slot.name, bytes).await?;
        return Err(last());
    }
    Ok(slot.clone())
}

/// Every slot, or what is wrong with it, in the order of their names.
async fn read_slots(store: &dyn ObjectStore) -> Result<Vec<Result<Slot>>> {
    let mut slots = Vec::new();
    for info in store.list(Folder::Keys.prefix(), None, SLOTS_MAX).await? {
        let range = ReadRange::Whole { bytes_max: SLOT_BYTES_MAX };
        match store.read(&info.name, range).await {
            Ok(bytes) => slots.push(Slot::parse(&info.name, &bytes)),
            // Removed meanwhile.
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => slots.push(Err(error.into())),
        }
    }
    Ok(slots)
}

/// Tries `credentials` on a slot, off the reactor.
async fn unwrap(
    slot: Slot,
    repository: RepositoryId,
    credentials: &Credentials,
) -> Result<Option<(Slot, MasterKey)>> {
    let credentials = credentials.clone();
    on_blocking_thread(move || {
        Ok(slot.unwrap(repository, &credentials)?.map(|master| (slot, master)))
    })
    .await
}

/// What a new slot is made of, besides secrets.
struct Request<'a> {
    repository: RepositoryId,
    kdf: Kdf,
    label: &'a str,
    now: Timestamp,
}

async fn put_slot(
    store: &dyn ObjectStore,
    master: &MasterKey,
    credentials: &Credentials,
    request: Request<'_>,
) -> Result<SlotInfo> {
    let (master, credentials) = (master.clone(), credentials.clone());
    let (repository, kdf, created) = (request.repository, request.kdf, request.now);
    let label = request.label.to_owned();
    let (info, bytes) = on_blocking_thread(move || {
        NewSlot { repository, credentials: &credentials, kdf, label: &label, created }
            .encode(&master)
    })
    .await?;
    store.put(&info.name, bytes).await?;
    Ok(info)
}

async fn on_blocking_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Error::new(Kind::Internal, "deriving a key died").source(e)))
}
