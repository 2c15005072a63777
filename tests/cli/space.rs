//! A repository whose file system is full: what cannot be done says what to do, and the way out
//! works.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use vmbackup::repo::store::ObjectStore as _;
use vmbackup::repo::store::directory::{DirectoryStore, Parents};

use crate::fixture::Fixture;
use crate::support::{Outcome, SmallDisk, TestEnv};

/// Fills a file system up to so many free bytes.
fn fill(small: &SmallDisk, name: &str, free: u64) {
    let space = rustix::fs::statvfs(&small.path).unwrap();
    let bytes = (space.f_bavail * space.f_frsize).checked_sub(free).unwrap();
    fs::write(small.path.join(name), vec![1; usize::try_from(bytes).unwrap()]).unwrap();
}

/// A repository on a file system of 10 MiB.
struct Small {
    // Before what it is mounted in.
    disk: SmallDisk,
    repo: String,
    fixture: Fixture,
}

impl Small {
    fn new() -> Self {
        let fixture = Fixture::new();
        let disk = SmallDisk::mount(fixture.env.dir(), "10M");
        let repo = disk.path.join("repo").display().to_string();
        let small = Self { disk, repo, fixture };
        small.run(&["repo", "init", "--no-key"]).ok();
        small
    }

    fn run(&self, args: &[&str]) -> Outcome {
        self.fixture.env.vmbackup(&[args, &["--repo", &self.repo]].concat())
    }

    /// A point with so many bytes of noise.
    fn point(&self, seed: &[u8], len: usize) -> String {
        self.fixture.write(0, seed, len);
        let report = self.fixture.back_up(&["full", "--json", "--repo", &self.repo]).json();
        report["point"].as_str().unwrap().to_owned()
    }
}

#[test]
fn a_full_repository_is_emptied_by_forget_and_gc_once_there_is_a_little_room() {
    let small = Small::new();
    // The first point's data is its own; a third of the second's is the third's, too.
    let first = small.point(b"first", 2_500_000);
    let second = small.point(b"second", 2_500_000);
    let third = small.point(b"third", 1_700_000);
    fill(&small.disk, "some", 256 << 10);
    fill(&small.disk, "rest", 0);
    for args in [&["forget", &first][..], &["gc"]] {
        let outcome =
            small.run(args).fails_with(&[&small.repo, "make room", "'forget' and 'gc' free more"]);
        assert_eq!(outcome.code, Some(9), "{outcome:?}");
    }
    small.run(&["verify", &first]).ok();
    fs::remove_file(small.disk.path.join("rest")).unwrap();
    small.run(&["forget", &first, &second]).ok();
    // What is left of the second fits nowhere until the first is gone.
    let report = small.run(&["gc", "--json"]).json();
    assert_eq!(report["forgotten"], 2, "{report}");
    assert!(report["freed_bytes"].as_u64().unwrap() > 4_800_000, "{report}");
    assert!(report["repacked_bytes"].as_u64().unwrap() > 500_000, "{report}");
    let again = small.run(&["gc", "--json"]).json();
    assert_eq!(again["repacked_bytes"], 0, "{again}");
    small.run(&["verify", &third]).ok();
    small.run(&["check", "--read-data"]).ok();
}

/// A file that nobody may remove.
struct Immutable<'a>(&'a TestEnv, PathBuf);

impl Drop for Immutable<'_> {
    fn drop(&mut self) {
        self.0.run("chattr", &["-i", self.1.to_str().unwrap()]);
    }
}

/// It made every gc an error.
#[test]
#[allow(clippy::print_stderr, reason = "says why nothing was tested")]
fn a_foreign_file_that_cannot_be_removed_is_named_by_gc_and_costs_nothing_else() {
    let env = TestEnv::new();
    env.init_repo();
    let foreign = env.repo().join("tmp/foreign");
    fs::create_dir_all(foreign.parent().unwrap()).unwrap();
    let file = fs::File::create(&foreign).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_hours(1)).unwrap();
    drop(file);
    let foreign = Immutable(&env, foreign);
    if env.run("chattr", &["+i", foreign.1.to_str().unwrap()]).code != Some(0) {
        eprintln!("not tested: no file can be made immutable here");
        return;
    }
    let outcome = env.vmbackup(&["gc"]).ok();
    for word in ["warning", "tmp/foreign", "remove it by hand"] {
        assert!(outcome.stderr.contains(word), "{outcome:?}");
    }
}

/// What a killed run left in `tmp/` was removed only at the end of a collection, which did not get
/// there for want of just that room, night after night.
#[test]
fn what_a_killed_run_left_is_out_of_the_way_before_gc_needs_room() {
    let small = Small::new();
    let kept = small.point(b"kept", 1_000_000);
    // Not a byte is left, and as much as a lease takes and no more.
    for free in [0, 4 << 10] {
        small.run(&["forget", &small.point(b"goes", 1_000_000)]).ok();
        let left = small.disk.path.join("repo/tmp/new-left");
        fill(&small.disk, "repo/tmp/new-left", free);
        let old = SystemTime::now() - Duration::from_secs(3600);
        fs::File::options().write(true).open(&left).unwrap().set_modified(old).unwrap();
        let report = small.run(&["gc", "--json"]).json();
        assert!(report["freed_bytes"].as_u64().unwrap() > 900_000, "{free}: {report}");
        assert!(!left.exists(), "{free}");
    }
    small.run(&["verify", &kept]).ok();
}

/// Takes room in a repository on `small`.
async fn take(small: &SmallDisk, bytes: u64) -> vmbackup::error::Result<u64> {
    let path = small.path.join("store");
    let store = match DirectoryStore::open(&path).await {
        Ok(store) => store,
        Err(_) => DirectoryStore::init(&path, Parents::MustExist).await?,
    };
    let before = store.room_bytes().await?;
    let room = store.reserve(bytes).await?;
    let taken = before.unwrap_or(0) - store.room_bytes().await?.unwrap_or(0);
    room.release().await?;
    assert_eq!(store.room_bytes().await?, before, "all of it is given back");
    Ok(taken)
}

#[tokio::test]
async fn room_that_is_not_there_is_refused_and_no_room_is_held_where_none_can_be() {
    let env = TestEnv::new();
    let small = SmallDisk::mount(env.dir(), "4M");
    assert_eq!(take(&small, 1 << 20).await.unwrap(), 1 << 20);
    let refused = take(&small, 8 << 20).await.unwrap_err();
    assert_eq!(refused.kind(), vmbackup::error::Kind::NoSpace, "{refused:?}");
    assert_eq!(take(&small, 3 << 20).await.unwrap(), 3 << 20, "nothing stayed of the refused");
    drop(small);
    fs::remove_dir(env.path("small")).unwrap();
    // It allocates nothing in advance, and does not tell its room.
    let small = SmallDisk::mount_ramfs(env.dir());
    assert_eq!(take(&small, 1 << 40).await.unwrap(), 0);
}
