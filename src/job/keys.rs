//! Making a repository, and what opens it. No point is looked at.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Credentials, Env, Surroundings, open_store};
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::Result;
use crate::repo::config::ChunkSize;
use crate::repo::keys::{
    self, AddOptions, COPIES_MAY_REMAIN, InitOptions, Kdf, SlotInfo, SlotKind,
};
use crate::repo::store::directory::{DirectoryStore, Parents};

/// What a repository is.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// Its id.
    pub id: String,
    /// Where it is.
    #[serde(serialize_with = "crate::job::lossy::path")]
    pub location: PathBuf,
    /// When it was made.
    pub created: Timestamp,
    /// Size of the chunks its disks are cut into.
    pub chunk_bytes: u64,
    /// Whether a password or key is needed to read it.
    pub has_key: bool,
    /// What opens it.
    pub keys: Vec<Key>,
}

/// Something that opens a repository.
#[derive(Clone, Debug, Serialize)]
pub struct Key {
    /// Its id, by which it is removed.
    pub id: String,
    /// What it is.
    pub kind: SlotKind,
    /// When it was added.
    pub created: Timestamp,
}

impl Key {
    /// What a person calls its kind.
    pub fn kind_name(&self) -> &'static str {
        match self.kind {
            SlotKind::Clear => "none needed",
            SlotKind::Password => "password",
            SlotKind::KeyFile => "key file",
        }
    }

    fn of(slot: &SlotInfo) -> Self {
        Self { id: slot.name.last().to_owned(), kind: slot.kind, created: slot.created }
    }
}

/// Makes a repository at `location`; the directory it is in must be there.
pub async fn init(location: &Path, credentials: &Credentials, env: &Env) -> Result<()> {
    make(location, Parents::MustExist, credentials, env).await
}

/// Makes the default repository if nothing is there, and says whether it has a key. Whether it did.
pub async fn make_default(
    location: &Path,
    credentials: &Credentials,
    (env, control): Surroundings<'_>,
) -> Result<bool> {
    if location.exists() {
        return Ok(false);
    }
    make(location, Parents::Create, credentials, env).await?;
    let (level, text) = match credentials {
        Credentials::None => (
            NoticeLevel::Warning,
            format!(
                "made the repository {}; it has no key: whoever can read the directory can read \
                 the backups ('vmbackup repo key add' gives it one)",
                location.display()
            ),
        ),
        _ => (NoticeLevel::Info, format!("made the repository {}", location.display())),
    };
    control.notice(level, text);
    Ok(true)
}

async fn make(
    location: &Path,
    parents: Parents,
    credentials: &Credentials,
    env: &Env,
) -> Result<()> {
    let store = DirectoryStore::init_with(location, parents, env.repository_answer).await?;
    let options =
        InitOptions { chunk: ChunkSize::DEFAULT, kdf: Kdf::RFC_9106, now: env.clock.now() };
    keys::init(&store, credentials, options).await?;
    Ok(())
}

/// What the repository at `location` is.
pub async fn info(location: &Path, credentials: &Credentials, env: &Env) -> Result<Info> {
    let store = open_store(location, env).await?;
    let unlocked = keys::open(&store, credentials).await?;
    Ok(Info {
        id: unlocked.config.id.to_string(),
        location: location.to_owned(),
        created: unlocked.config.created,
        chunk_bytes: unlocked.config.chunk.bytes(),
        has_key: unlocked.has_key(),
        keys: keys::list(&store).await?.iter().map(Key::of).collect(),
    })
}

/// Adds a password or key. What opened the repository before still does, unless that was nothing.
pub async fn add(
    location: &Path,
    credentials: &Credentials,
    new: &Credentials,
    (env, control): Surroundings<'_>,
) -> Result<Key> {
    let store = open_store(location, env).await?;
    let unlocked = keys::open(&store, credentials).await?;
    let options = AddOptions { kdf: Kdf::RFC_9106, label: "", now: env.clock.now() };
    let added = keys::add(&store, &unlocked, new, options).await?;
    if !added.removed_clear.is_empty() {
        tell_of_copies(control);
    }
    Ok(Key::of(&added.slot))
}

/// Removes a password or key by its id; somebody who can open the repository has to ask for it.
pub async fn remove(
    location: &Path,
    credentials: &Credentials,
    id: &str,
    (env, control): Surroundings<'_>,
) -> Result<Key> {
    let store = open_store(location, env).await?;
    keys::open(&store, credentials).await?;
    let slot = keys::remove(&store, id).await?;
    tell_of_copies(control);
    Ok(Key::of(&slot))
}

/// Removing a key is a deletion, and honest about it.
fn tell_of_copies(control: &Control) {
    control.notice(NoticeLevel::Warning, COPIES_MAY_REMAIN);
}
