//! What every store must do, as tests that any implementation runs.
//!
//! Called from the tests of each store with a maker of empty stores. A violated promise panics with
//! the promise in the message.

use std::sync::Arc;

use super::{Folder, ObjectName, ObjectStore, ReadRange, StoreError};

/// Makes an empty store of the kind under test.
pub type Maker<'a> = &'a (dyn Fn() -> Arc<dyn ObjectStore> + Sync);

/// More than any bound the suite reads with.
const WHOLE: ReadRange = ReadRange::Whole { bytes_max: 1 << 24 };

/// Runs the whole suite.
///
/// # Panics
/// When the store breaks a promise.
pub async fn run(maker: Maker<'_>) {
    what_was_put_reads_back(&*maker()).await;
    an_object_is_never_rewritten(&*maker()).await;
    exactly_one_of_concurrent_creators_wins(maker()).await;
    nothing_shows_before_finish_or_after_abort(&*maker()).await;
    ranges_are_exact_and_bounded(&*maker()).await;
    listing_is_sorted_paged_and_complete(&*maker()).await;
    missing_objects_are_not_found(&*maker()).await;
    time_stamps_follow_the_clock_of_the_store(&*maker()).await;
    room_that_is_taken_is_no_object(&*maker()).await;
}

fn name(rest: &str) -> ObjectName {
    ObjectName::new(Folder::Index, rest)
}

/// Streams of several writes, empty objects and parts that end nowhere special.
async fn what_was_put_reads_back(store: &dyn ObjectStore) {
    let (streamed, empty) = (ObjectName::pack(&[0xab; 16]), name("empty"));
    let mut writer = store.create(&streamed).await.expect("begins");
    let mut expected = Vec::new();
    for part in 0..50_u8 {
        let bytes = vec![part; usize::from(part) * 997];
        expected.extend_from_slice(&bytes);
        writer.write(&bytes).await.expect("takes a part");
    }
    let info = writer.finish().await.expect("finishes");
    assert_eq!(info.size_bytes, expected.len() as u64, "finish reports the size");
    assert_eq!(store.read(&streamed, WHOLE).await.expect("reads"), expected, "read == written");
    assert_eq!(store.stat(&streamed).await.expect("stats"), info, "stat == finish");
    store.put(&empty, Vec::new()).await.expect("an empty object is an object");
    assert!(store.read(&empty, WHOLE).await.expect("reads").is_empty());
    store.delete(&streamed).await.expect("deletes");
    assert!(store.stat(&streamed).await.expect_err("is gone").is_not_found());
    store.put(&streamed, vec![1]).await.expect("a deleted name is free");
}

async fn an_object_is_never_rewritten(store: &dyn ObjectStore) {
    store.put(&name("a"), vec![1]).await.expect("stores");
    let again = store.put(&name("a"), vec![2]).await.expect_err("the name is taken");
    assert!(again.is_already_exists(), "a taken name is AlreadyExists, not {again}");
    assert_eq!(store.read(&name("a"), WHOLE).await.expect("reads"), [1], "the first stays");
}

async fn exactly_one_of_concurrent_creators_wins(store: Arc<dyn ObjectStore>) {
    for round in 0..8 {
        let target = name(&format!("race-{round}"));
        let mut creators = tokio::task::JoinSet::new();
        for creator in 0..16_u8 {
            let (store, target) = (Arc::clone(&store), target.clone());
            creators.spawn(async move {
                match store.put(&target, vec![creator; 5000]).await {
                    Ok(_) => Some(creator),
                    Err(error) => {
                        assert!(error.is_already_exists(), "a loser sees AlreadyExists: {error}");
                        None
                    }
                }
            });
        }
        let winners: Vec<u8> = creators.join_all().await.into_iter().flatten().collect();
        assert_eq!(winners.len(), 1, "winners of {target}: {winners:?}");
        let bytes = store.read(&target, WHOLE).await.expect("reads");
        assert_eq!(bytes, vec![winners[0]; 5000], "the winner's bytes, whole");
    }
}

async fn nothing_shows_before_finish_or_after_abort(store: &dyn ObjectStore) {
    let (aborted, dropped) = (name("aborted"), name("dropped"));
    let mut writer = store.create(&aborted).await.expect("begins");
    writer.write(&vec![7; 100_000]).await.expect("takes a part");
    assert!(store.stat(&aborted).await.expect_err("not yet there").is_not_found());
    assert!(store.list("index/", None, 10).await.expect("lists").is_empty(), "not yet listed");
    writer.abort().await.expect("aborts");
    let mut writer = store.create(&dropped).await.expect("begins");
    writer.write(&[7; 10]).await.expect("takes a part");
    drop(writer);
    for gone in [&aborted, &dropped] {
        assert!(store.stat(gone).await.expect_err("never there").is_not_found());
        store.put(gone, vec![1]).await.expect("the name is free");
    }
}

async fn ranges_are_exact_and_bounded(store: &dyn ObjectStore) {
    let target = name("ranges");
    store.put(&target, (0..100).collect()).await.expect("stores");
    let read = |range| store.read(&target, range);
    let exact = read(ReadRange::Exact { offset: 10, len: 5 }).await.expect("reads");
    assert_eq!(exact, [10, 11, 12, 13, 14]);
    assert_eq!(
        read(ReadRange::Exact { offset: 100, len: 0 }).await.expect("reads"),
        Vec::<u8>::new()
    );
    assert_eq!(read(ReadRange::Suffix { len: 2 }).await.expect("reads"), [98, 99]);
    assert_eq!(read(ReadRange::Suffix { len: 1000 }).await.expect("reads").len(), 100);
    for (offset, len) in [(99, 2), (101, 0), (u64::MAX, 2)] {
        let error = read(ReadRange::Exact { offset, len }).await.expect_err("past the end");
        assert!(matches!(error, StoreError::Short { .. }), "past the end is Short: {error}");
    }
    let error = read(ReadRange::Whole { bytes_max: 99 }).await.expect_err("too large");
    assert!(matches!(error, StoreError::TooLarge { .. }), "past the bound is TooLarge: {error}");
}

async fn listing_is_sorted_paged_and_complete(store: &dyn ObjectStore) {
    let mut expected = Vec::new();
    for n in 0..40_u8 {
        // Spread over sub-folders, and made out of order.
        let id = [n.wrapping_mul(97), n, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        store.put(&ObjectName::pack(&id), vec![n; usize::from(n)]).await.expect("stores");
        expected.push(ObjectName::pack(&id));
    }
    store.put(&name("other"), vec![1]).await.expect("stores");
    store.put(&ObjectName::config(), vec![1]).await.expect("stores");
    expected.sort();
    for page_max in [1, 7, 1000] {
        let mut found = Vec::new();
        loop {
            let page = store.list("packs/", found.last(), page_max).await.expect("lists");
            assert!(page.len() <= page_max, "a page is at most what was asked for");
            if page.is_empty() {
                break;
            }
            found.extend(page.into_iter().map(|info| info.name));
        }
        assert_eq!(found, expected, "pages of {page_max} hold every object once, in order");
    }
    for page_max in [1, 7, 1000] {
        let mut found = Vec::new();
        loop {
            let page = store.names("packs/", found.last(), page_max).await.expect("names");
            assert!(page.len() <= page_max, "a page is at most what was asked for");
            if page.is_empty() {
                break;
            }
            found.extend(page);
        }
        assert_eq!(found, expected, "pages of {page_max} names are those of a listing");
    }
    let mut parts: Vec<_> = expected.iter().map(|name| name.as_str()[6..8].to_owned()).collect();
    parts.dedup();
    assert_eq!(store.parts(Folder::Packs).await.expect("parts"), parts, "each part once");
    let part = expected[3].as_str().rsplit_once('/').expect("has a folder").0.to_owned() + "/";
    let page = store.list(&part, None, 1000).await.expect("lists");
    assert!(page.iter().all(|info| info.name.as_str().starts_with(&part)) && !page.is_empty());
    assert!(store.list("runs/", None, 10).await.expect("an empty folder lists").is_empty());
}

async fn missing_objects_are_not_found(store: &dyn ObjectStore) {
    let missing = ObjectName::pack(&[1; 16]);
    assert!(store.stat(&missing).await.expect_err("missing").is_not_found());
    assert!(store.read(&missing, WHOLE).await.expect_err("missing").is_not_found());
    assert!(store.delete(&missing).await.expect_err("missing").is_not_found());
}

async fn time_stamps_follow_the_clock_of_the_store(store: &dyn ObjectStore) {
    let before = store.now().await.expect("has a clock");
    let stored = store.put(&name("timed"), vec![1]).await.expect("stores").stored;
    let after = store.now().await.expect("has a clock");
    assert!(before <= stored && stored <= after, "{before} <= {stored} <= {after}");
    let listed = store.list("index/", None, 1).await.expect("lists");
    assert_eq!(listed[0].stored, stored, "lists tell the same time");
}

async fn room_that_is_taken_is_no_object(store: &dyn ObjectStore) {
    store.room_bytes().await.expect("tells its room, or that it cannot");
    let first = store.reserve(100_000).await.expect("takes room");
    let second = store.reserve(0).await.expect("takes no room");
    for folder in Folder::ALL {
        let listed = store.list(folder.prefix(), None, 10).await.expect("lists");
        assert!(listed.is_empty(), "room shows as an object: {listed:?}");
    }
    store.put(&name("beside"), vec![1]).await.expect("stores beside it");
    first.release().await.expect("gives it back");
    drop(second);
}
