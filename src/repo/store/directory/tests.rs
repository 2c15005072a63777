//! The conformance suite over each way of naming, and what only a directory can get wrong.

use std::sync::atomic::Ordering;

use super::writer::Way;
use super::*;
use crate::error::Kind;
use crate::repo::store::{StoreError, conformance};

fn open(way: Way) -> (Arc<dyn ObjectStore>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("repo");
    let root = Root::init(&path, Parents::MustExist, patience(&path, ANSWER)).unwrap();
    root.way.store(way as u8, Ordering::Relaxed);
    (Arc::new(DirectoryStore::of(root)), dir)
}

async fn conforms(way: Way) {
    let kept = std::sync::Mutex::new(Vec::new());
    conformance::run(&|| {
        let (store, dir) = open(way);
        kept.lock().unwrap().push(dir);
        store
    })
    .await;
    for dir in kept.into_inner().unwrap() {
        let left: Vec<_> = std::fs::read_dir(dir.path().join("repo/tmp"))
            .map(|entries| entries.map(|e| e.unwrap().file_name()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "left in tmp: {left:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn keeps_the_promises_of_a_store_with_renames() {
    conforms(Way::Rename).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn keeps_the_promises_of_a_store_with_links() {
    conforms(Way::Link).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn keeps_the_promises_of_a_store_with_claims() {
    conforms(Way::Claim).await;
}

#[tokio::test]
async fn a_missing_directory_is_an_error_and_stays_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("not-mounted/repo");
    let error = DirectoryStore::open(&path).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    let error = DirectoryStore::init(&path, Parents::MustExist).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.hint_text().is_some());
    assert!(!dir.path().join("not-mounted").exists());
    DirectoryStore::init(&path, Parents::Create).await.unwrap();
}

#[tokio::test]
async fn a_directory_with_other_things_in_it_does_not_become_a_repository() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("letter.txt"), "dear").unwrap();
    let error = DirectoryStore::init(dir.path(), Parents::MustExist).await.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists);
}

#[tokio::test]
async fn a_root_removed_under_us_is_unavailable_and_never_made_again() {
    let (store, dir) = open(Way::Rename);
    let name = ObjectName::config();
    std::fs::remove_dir_all(dir.path().join("repo")).unwrap();
    for error in [
        store.put(&name, vec![1]).await.unwrap_err(),
        store.stat(&name).await.unwrap_err(),
        store.list("keys/", None, 1).await.unwrap_err(),
        store.now().await.unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
    }
    assert!(!dir.path().join("repo").exists());
}

#[tokio::test]
async fn what_a_killed_writer_left_is_swept_once_it_is_old() {
    let (store, dir) = open(Way::Rename);
    store.put(&ObjectName::config(), vec![1]).await.unwrap();
    let left = dir.path().join("repo/tmp/new-left");
    std::fs::write(&left, "torn").unwrap();
    let early = Timestamp::UNIX_EPOCH;
    assert_eq!(store.sweep(early).await.unwrap(), 0);
    let late = store.now().await.unwrap() + std::time::Duration::from_secs(1);
    assert_eq!(store.sweep(late).await.unwrap(), 1);
    assert!(!left.exists());
    assert_eq!(store.read(&ObjectName::config(), ReadRange::Suffix { len: 9 }).await.unwrap(), [1]);
}

/// Room that a killed collector had held was under a name, and kept every later one from freeing
/// anything.
#[tokio::test]
async fn room_that_is_taken_has_no_name_that_could_outlive_the_process() {
    let (store, dir) = open(Way::Rename);
    let left = || std::fs::read_dir(dir.path().join("repo/tmp")).unwrap().count();
    let room = store.reserve(1 << 20).await.unwrap();
    assert_eq!(left(), 0);
    room.release().await.unwrap();
    drop(store.reserve(4096).await.unwrap());
    assert_eq!(left(), 0);
}

/// NFS clients rename what is removed while it is open; what a host that went down left of that is
/// swept, too, and what is not a file stays.
#[tokio::test]
async fn what_was_removed_while_it_was_open_is_swept_once_it_is_old() {
    let (store, dir) = open(Way::Rename);
    store.put(&ObjectName::config(), vec![1]).await.unwrap();
    let tmp = dir.path().join("repo/tmp");
    std::fs::write(tmp.join(".nfs0000000000a1b2c300000001"), "room").unwrap();
    std::fs::create_dir(tmp.join("directory")).unwrap();
    assert_eq!(store.sweep(Timestamp::UNIX_EPOCH).await.unwrap(), 0);
    let late = store.now().await.unwrap() + std::time::Duration::from_secs(1);
    assert_eq!(store.sweep(late).await.unwrap(), 1);
    let left: Vec<_> = std::fs::read_dir(&tmp).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["directory"]);
}

/// A file that nobody may remove: a foreign one, or one of a damaged file system.
struct Immutable(File);

impl Immutable {
    /// Nothing where the user or the file system does not have it.
    fn create(path: &Path) -> Option<Self> {
        let file = File::create(path).unwrap();
        rustix::fs::ioctl_setflags(&file, rustix::fs::IFlags::IMMUTABLE).ok()?;
        Some(Self(file))
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        let _ = rustix::fs::ioctl_setflags(&self.0, rustix::fs::IFlags::empty());
    }
}

/// The first of them ended the sweep, and all that came after it stayed for ever.
#[tokio::test]
#[allow(clippy::print_stderr)]
async fn what_cannot_be_removed_keeps_nothing_else_from_being_swept() {
    let (store, dir) = open(Way::Rename);
    store.put(&ObjectName::config(), vec![1]).await.unwrap();
    let tmp = dir.path().join("repo/tmp");
    // Whatever the order of the directory, some of what is ours comes later.
    for index in 0..20 {
        std::fs::write(tmp.join(format!("new-{index}")), "torn").unwrap();
    }
    let Some(_foreign) = Immutable::create(&tmp.join("foreign")) else {
        eprintln!("skipped: no file can be made immutable here");
        return;
    };
    let late = store.now().await.unwrap() + std::time::Duration::from_secs(1);
    let error = store.sweep(late).await.unwrap_err();
    assert!(matches!(error, StoreError::Permission { .. }), "{error:?}");
    assert!(error.to_string().contains("tmp/foreign"), "{error}");
    let left: Vec<_> = std::fs::read_dir(&tmp).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["foreign"]);
}

/// Keeps the only blocking thread of a runtime until it is dropped, as a file system that hangs keeps all
/// of them.
fn hang() -> std::sync::mpsc::Sender<()> {
    let (end, ended) = std::sync::mpsc::channel();
    tokio::task::spawn_blocking(move || ended.recv());
    end
}

fn runtime_of_one_blocking_thread() -> tokio::runtime::Runtime {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().max_blocking_threads(1).build().unwrap()
}

/// How many files without a name as an object there are.
fn unfinished(dir: &tempfile::TempDir) -> usize {
    std::fs::read_dir(dir.path().join("repo/tmp")).unwrap().count()
}

/// A pack that was open when a run was given up was once removed by a thread of the runtime: on two
/// cores that was the only one, and hung with the file system before the VM was let go.
#[test]
fn what_is_dropped_asks_the_file_system_on_no_thread_of_the_runtime() {
    runtime_of_one_blocking_thread().block_on(async {
        let (store, dir) = open(Way::Rename);
        let mut writer = store.create(&ObjectName::pack(&[1; 16])).await.unwrap();
        writer.write(b"part").await.unwrap();
        let held = store.reserve(1 << 20).await.unwrap();
        let files = || {
            std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter(|fd| {
                    let fd = std::fs::read_link(fd.as_ref().unwrap().path()).unwrap_or_default();
                    fd.starts_with(dir.path().join("repo/tmp"))
                })
                .count()
        };
        assert_eq!((unfinished(&dir), files()), (1, 2));
        let hang = hang();
        drop((writer, held));
        assert_eq!((unfinished(&dir), files()), (1, 2), "they were closed or removed here");
        drop(hang);
        while (unfinished(&dir), files()) != (0, 0) {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    });
}

/// A manifest that was given up could appear when nothing held the chunks of the point any more.
#[test]
fn what_is_given_up_before_it_is_durable_never_gets_its_name() {
    runtime_of_one_blocking_thread().block_on(async {
        let (_, dir) = open(Way::Rename);
        let answer = std::time::Duration::from_millis(50);
        let store = DirectoryStore::open_with(&dir.path().join("repo"), answer).await.unwrap();
        let name = ObjectName::pack(&[1; 16]);
        let mut writer = store.create(&name).await.unwrap();
        writer.write(b"late").await.unwrap();
        let hang = hang();
        let error = writer.finish().await.unwrap_err();
        assert!(matches!(error, StoreError::Silent { .. }), "{error:?}");
        drop(hang);
        while unfinished(&dir) > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert!(store.stat(&name).await.unwrap_err().is_not_found());
    });
}

#[tokio::test]
async fn stray_files_are_not_objects() {
    let (store, dir) = open(Way::Rename);
    store.put(&ObjectName::pack(&[1; 16]), vec![1]).await.unwrap();
    let packs = dir.path().join("repo/packs");
    std::fs::write(packs.join("README"), "x").unwrap();
    std::fs::write(packs.join("01/.nfs0001"), "x").unwrap();
    std::fs::write(packs.join("01/Upper"), "x").unwrap();
    assert_eq!(store.list("packs/", None, 10).await.unwrap().len(), 1);
}
