//! Slots over a store in memory.

use std::sync::Arc;

use super::*;
use crate::clock::SystemClock;
use crate::repo::store::memory::MemoryStore;

fn password(text: &str) -> Credentials {
    Credentials::Password(Secret::new(text.as_bytes().to_vec()))
}

fn key_file() -> Credentials {
    Credentials::KeyFile(Secret::new(vec![9; 32]))
}

fn options() -> InitOptions {
    InitOptions { chunk: ChunkSize::DEFAULT, kdf: Kdf::FOR_TESTS, now: Timestamp::UNIX_EPOCH }
}

fn labelled(label: &str) -> AddOptions<'_> {
    AddOptions { kdf: Kdf::FOR_TESTS, label, now: Timestamp::UNIX_EPOCH }
}

async fn made(credentials: &Credentials) -> (MemoryStore, Unlocked) {
    let store = MemoryStore::new(Arc::new(SystemClock));
    let unlocked = init(&store, credentials, options()).await.unwrap();
    (store, unlocked)
}

async fn open_kind(store: &MemoryStore, credentials: &Credentials) -> Option<Kind> {
    open(store, credentials).await.err().map(|error| error.kind())
}

#[tokio::test]
async fn each_kind_of_key_opens_what_it_made_and_nothing_else_does() {
    for right in [Credentials::None, password("a"), key_file()] {
        let (store, made) = made(&right).await;
        let opened = open(&store, &right).await.unwrap();
        assert_eq!(opened.config, made.config);
        assert_eq!(opened.has_key(), !matches!(right, Credentials::None));
        for wrong in [Credentials::None, password("b"), key_file()] {
            if wrong.kind() != right.kind() || right.kind() == SlotKind::Password {
                assert_eq!(open_kind(&store, &wrong).await, Some(Kind::WrongKey), "{wrong:?}");
            }
        }
    }
}

#[tokio::test]
async fn the_default_cost_opens_too() {
    let store = MemoryStore::new(Arc::new(SystemClock));
    init(&store, &password("a"), InitOptions { kdf: Kdf::RFC_9106, ..options() }).await.unwrap();
    open(&store, &password("a")).await.unwrap();
}

#[tokio::test]
async fn a_repository_is_made_once_and_a_loser_leaves_no_key() {
    let (store, first) = made(&password("a")).await;
    let error = init(&store, &password("b"), options()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists);
    assert_eq!(store.names(), [ObjectName::config(), first.slot.name]);
}

#[tokio::test]
async fn what_protects_nothing_is_refused() {
    let store = MemoryStore::new(Arc::new(SystemClock));
    for weak in [password(""), Credentials::KeyFile(Secret::new(vec![1; 15]))] {
        assert_eq!(init(&store, &weak, options()).await.unwrap_err().kind(), Kind::Usage);
    }
    assert!(store.names().is_empty());
}

#[tokio::test]
async fn a_password_changes_without_touching_anything_else() {
    let (store, opened) = made(&password("old")).await;
    let sealed = ObjectName::pack(&[1; 16]);
    let object =
        opened.keys.seal_object(crate::repo::seal::ObjectType::DataPack, &sealed, b"content");
    add(&store, &opened, &password("new"), labelled("")).await.unwrap();
    remove(&store, opened.slot.name.as_str()).await.unwrap();
    assert_eq!(open_kind(&store, &password("old")).await, Some(Kind::WrongKey));
    let keys = open(&store, &password("new")).await.unwrap().keys;
    let content = keys.open_object(crate::repo::seal::ObjectType::DataPack, &sealed, object);
    assert_eq!(content.unwrap(), b"content");
}

#[tokio::test]
async fn the_first_key_of_a_clear_repository_removes_the_clear_slot() {
    let (store, opened) = made(&Credentials::None).await;
    let added = add(&store, &opened, &key_file(), labelled("safe")).await.unwrap();
    assert_eq!(added.removed_clear, std::slice::from_ref(&opened.slot));
    assert_eq!(open_kind(&store, &Credentials::None).await, Some(Kind::WrongKey));
    assert_eq!(open(&store, &key_file()).await.unwrap().slot.label, "safe");
    let refused = add(&store, &opened, &Credentials::None, labelled("")).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Usage);
}

#[tokio::test]
async fn the_last_key_stays() {
    let (store, opened) = made(&password("a")).await;
    let refused = remove(&store, "password").await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Usage);
    add(&store, &opened, &password("b"), labelled("")).await.unwrap();
    assert_eq!(remove(&store, "password-").await.unwrap_err().kind(), Kind::Ambiguous);
    assert_eq!(remove(&store, "keyfile-").await.unwrap_err().kind(), Kind::NotFound);
    remove(&store, opened.slot.name.last()).await.unwrap();
    assert_eq!(remove(&store, "password-").await.unwrap_err().kind(), Kind::Usage);
    open(&store, &password("b")).await.unwrap();
}

#[tokio::test]
async fn a_damaged_slot_is_corrupt_and_another_one_still_opens() {
    let (store, opened) = made(&password("a")).await;
    let range = ReadRange::Whole { bytes_max: SLOT_BYTES_MAX };
    let mut bytes = store.read(&opened.slot.name, range).await.unwrap();
    bytes[30] ^= 1;
    store.overwrite(&opened.slot.name, bytes);
    assert_eq!(open_kind(&store, &password("a")).await, Some(Kind::Corrupt));
    add(&store, &opened, &password("b"), labelled("")).await.unwrap();
    open(&store, &password("b")).await.unwrap();
}

#[tokio::test]
async fn a_slot_copied_under_another_name_does_not_open() {
    let (store, opened) = made(&password("a")).await;
    let range = ReadRange::Whole { bytes_max: SLOT_BYTES_MAX };
    let bytes = store.read(&opened.slot.name, range).await.unwrap();
    store.delete(&opened.slot.name).await.unwrap();
    store.put(&ObjectName::new(Folder::Keys, "password-00"), bytes).await.unwrap();
    assert_eq!(open_kind(&store, &password("a")).await, Some(Kind::WrongKey));
}

#[tokio::test]
async fn a_foreign_configuration_is_corrupt_and_none_is_not_found() {
    let (store, _) = made(&password("a")).await;
    let (other, _) = made(&password("a")).await;
    let range = ReadRange::Whole { bytes_max: 1 << 16 };
    let bytes = store.read(&ObjectName::config(), range).await.unwrap();
    let text = String::from_utf8(bytes).unwrap().replace("262144", "524288");
    store.overwrite(&ObjectName::config(), text.into_bytes());
    assert_eq!(open_kind(&store, &password("a")).await, Some(Kind::Corrupt));
    other.delete(&ObjectName::config()).await.unwrap();
    assert_eq!(open_kind(&other, &password("a")).await, Some(Kind::NotFound));
}

#[tokio::test]
async fn a_slot_that_asks_for_too_much_memory_is_refused() {
    let (store, opened) = made(&password("a")).await;
    let range = ReadRange::Whole { bytes_max: SLOT_BYTES_MAX };
    let bytes = store.read(&opened.slot.name, range).await.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let line =
        text.lines().next().unwrap().replace("\"memory_kib\":32", "\"memory_kib\":4000000000");
    let check = blake3::hash(line.as_bytes()).to_hex();
    store.overwrite(&opened.slot.name, format!("{line}\n{check}\n").into_bytes());
    assert_eq!(open_kind(&store, &password("a")).await, Some(Kind::Corrupt));
}

#[test]
fn debug_shows_no_password() {
    let shown = format!("{:?}", password("hunter2"));
    assert!(!shown.contains("hunter2") && !shown.contains("104"), "{shown}");
}

/// It was told as a wrong password, and asked for again and again.
#[tokio::test]
async fn where_every_slot_is_gone_no_password_is_called_wrong() {
    for credentials in [Credentials::None, password("a"), key_file()] {
        let (store, made) = made(&credentials).await;
        store.delete(&made.slot.name).await.unwrap();
        let error = open(&store, &credentials).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
        assert!(error.hint_text().unwrap().contains("'keys'"), "{error:?}");
    }
}
