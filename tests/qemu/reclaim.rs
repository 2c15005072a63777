//! `--guest-first` gives scratch back for what is stored: the guest may overwrite it for nothing.
//!
//! Backups are stopped (SIGSTOP) once so many packs are in the repository: what was read for all but
//! the last of them was given up by then.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qmp::block::BitmapRef;
use serde_json::{Value, json};
use vmbackup::block::{BlockSource, Buffer, ByteRange};
use vmbackup::error::Kind;
use vmbackup::platform::qemu::Qemu;
use vmbackup::platform::{SnapshotRequest, VmSnapshot};

use crate::machine::{Guest, Machine, SIZE, noise, qemu_is_since};
use crate::reading::{Points, open};
use crate::support::{Process, SmallDisk, TestEnv};

/// Of noise, a pack holds this many MiB.
const PACK_MIB: u64 = 64;

/// Packs that may be in the repository although what they hold was not given up yet: they end in
/// nearly the order in which they begin, and chunks come in nearly that of the disk.
const LATE_PACKS: u64 = 3;

/// Scratch that takes less is small.
const SMALL_MIB: u64 = 16;

/// Whether the QEMU here is asked to give scratch back; says so if it is not.
fn gives_scratch_back() -> bool {
    qemu_is_since(9, 1)
}

/// A program that backs up a machine.
struct Backup<'a> {
    env: &'a TestEnv,
    machine: &'a Machine,
    scratch: &'a Path,
    program: Process,
    packs_before: u64,
}

impl<'a> Backup<'a> {
    /// Begins; nothing is read yet.
    fn begin(
        (env, machine): (&'a TestEnv, &'a Machine),
        scratch: &'a Path,
        command: &str,
        options: &[&str],
    ) -> Self {
        let (monitor, packs_before) = (machine.path("qmp.sock"), packs(env));
        let (monitor, directory) = (monitor.to_str().unwrap(), scratch.to_str().unwrap());
        let args = [command, "--qmp", monitor, "--scratch-dir", directory, "--guest-first"];
        let args = [&args[..], &["--exclude-disk", "disk-b", "--json"], options].concat();
        let program = env.stopped_at("after:export", &args);
        Self { env, machine, scratch, program, packs_before }
    }

    /// Lets it go on until it has stored so many packs.
    fn go_on(&mut self, packs_wanted: u64) {
        self.program.signal("CONT");
        let deadline = Instant::now() + Duration::from_secs(100);
        while packs(self.env) < self.packs_before + packs_wanted {
            assert!(Instant::now() < deadline, "no pack for long");
            assert!(self.program.is_running(), "it ended early");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.program.signal("STOP");
        assert!(self.program.is_running(), "it ended early");
    }

    /// The guest overwrites so many MiB, a bit at a time.
    async fn overwrite(&self, mib: Range<u64>) {
        for at in mib.clone().step_by(8) {
            let len = (mib.end - at).min(8);
            self.machine.guest("disk-a", &format!("write -P 0x55 {at}M {len}M")).await;
        }
    }

    /// What its scratch takes, in MiB, once that is less than `bound`, or after a while. It goes on a bit
    /// at a time for that: packs take unequal times to become durable.
    fn settled_mib(&mut self, bound: u64) -> u64 {
        for _ in 0..100 {
            if self.scratch_mib() < bound {
                break;
            }
            self.program.signal("CONT");
            std::thread::sleep(Duration::from_millis(20));
            self.program.signal("STOP");
            assert!(self.program.is_running(), "it ended early");
        }
        self.scratch_mib()
    }

    /// What its scratch takes, in MiB.
    fn scratch_mib(&self) -> u64 {
        let directories = std::fs::read_dir(self.scratch).unwrap();
        let files = directories.map(|directory| directory.unwrap().path().join("0.raw"));
        files.map(|file| file.metadata().unwrap().blocks() * 512).sum::<u64>() >> 20
    }

    /// Waits for its end; the report, and the point's disk.
    fn end(self) -> (Value, PathBuf) {
        self.program.signal("CONT");
        let report = self.program.wait().json();
        let point = report["point"].as_str().unwrap();
        let to = self.env.path(point);
        self.env.vmbackup(&["restore", point, "--to", to.to_str().unwrap()]).ok();
        (report["disks"][0].clone(), to.join("disk-a.raw"))
    }
}

fn packs(env: &TestEnv) -> u64 {
    packs_of(env).len() as u64
}

fn packs_of(env: &TestEnv) -> Vec<PathBuf> {
    let Ok(folders) = std::fs::read_dir(env.repo().join("packs")) else { return Vec::new() };
    let files = folders.flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap());
    files.map(|file| file.unwrap().path()).collect()
}

/// Compares files without a message of half a GiB.
fn assert_equal(restored: &Path, oracle: &Path) {
    let same = std::fs::read(restored).unwrap() == std::fs::read(oracle).unwrap();
    assert!(same, "{} is not what {} holds", restored.display(), oracle.display());
}

/// Overwrites what is stored of a disk of 448 MiB, 191 MiB in all; the most that scratch took.
async fn overwrite_what_is_stored(backup: &mut Backup<'_>) -> u64 {
    let (mut begin, mut most) = (1, 0);
    for packs in [LATE_PACKS + 1, LATE_PACKS + 3] {
        backup.go_on(packs);
        let end = (packs - LATE_PACKS) * PACK_MIB;
        backup.overwrite(begin..end).await;
        begin = end;
        most = most.max(backup.settled_mib(SMALL_MIB));
    }
    most
}

#[tokio::test]
async fn scratch_stays_small_although_the_guest_overwrites_what_is_stored() {
    if !gives_scratch_back() {
        return;
    }
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::filled(Guest::Idle, 448).await;
    let scratch = machine.path("scratch");
    let mut backup = Backup::begin((&env, &machine), &scratch, "full", &[]);
    let most = overwrite_what_is_stored(&mut backup).await;
    assert!(most < SMALL_MIB, "scratch took {most} MiB");
    // What is not stored is kept as ever.
    backup.overwrite(440..448).await;
    assert!(backup.scratch_mib() >= most + 8);
    let (_, restored) = backup.end();
    assert_equal(&restored, &machine.path("content"));
    assert!(machine.reads("disk-a", "read -P 0x55 1M 191M").await);
    assert!(machine.scratch().is_empty());
}

#[tokio::test]
async fn a_guest_that_overwrites_more_than_scratch_holds_does_not_break_the_backup() {
    if !gives_scratch_back() {
        return;
    }
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::filled(Guest::Idle, 448).await;
    let small = SmallDisk::mount(&machine.path("."), "128m");
    let mut backup = Backup::begin((&env, &machine), &small.path, "full", &[]);
    overwrite_what_is_stored(&mut backup).await;
    let (_, restored) = backup.end();
    assert_equal(&restored, &machine.path("content"));
    assert!(small.files().is_empty());
}

#[tokio::test]
async fn what_is_read_a_second_time_is_not_given_up() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::filled(Guest::Idle, 320).await;
    let scratch = machine.path("scratch");
    let options = ["--verify-source=100%"];
    let mut backup = Backup::begin((&env, &machine), &scratch, "full", &options);
    backup.go_on(LATE_PACKS + 1);
    backup.overwrite(1..PACK_MIB).await;
    assert!(backup.scratch_mib() >= PACK_MIB - 1, "{} MiB", backup.scratch_mib());
    let (disk, restored) = backup.end();
    assert_eq!(disk["source_check"]["chunks"], 320 * 4, "{disk}");
    assert_equal(&restored, &machine.path("content"));
}

/// What the bitmap calls clean is given up once the audit is done with it.
#[tokio::test]
async fn an_incremental_is_audited_and_gives_up_what_is_clean_and_what_is_stored() {
    if !gives_scratch_back() {
        return;
    }
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::filled(Guest::Idle, 384).await;
    let scratch = machine.path("scratch");
    Backup::begin((&env, &machine), &scratch, "full", &[]).end();
    let changed = machine.path("changed");
    noise(&changed, 320);
    machine.guest("disk-a", &format!("write -s {} 64M 320M", changed.display())).await;
    let [oracle, _] = machine.oracle().await;
    let mut backup = Backup::begin((&env, &machine), &scratch, "incremental", &[]);
    backup.go_on(LATE_PACKS + 1);
    backup.overwrite(1..64 + PACK_MIB).await;
    let takes = backup.settled_mib(SMALL_MIB);
    assert!(takes < SMALL_MIB, "scratch takes {takes} MiB");
    let (disk, restored) = backup.end();
    assert_eq!(disk["read"]["mode"], "incremental", "{disk}");
    assert_eq!(
        (&disk["audit"]["chunks"], &disk["audit"]["differs_at"]),
        (&json!(64), &Value::Null)
    );
    assert!(std::fs::read(restored).unwrap() == oracle);
}

#[tokio::test]
async fn a_bitmap_that_lies_is_found_before_anything_is_given_up() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::with(Guest::Idle).await;
    machine.guest("disk-a", "write -P 1 0 16M").await;
    let scratch = machine.path("scratch");
    Backup::begin((&env, &machine), &scratch, "full", &[]).end();
    machine.guest("disk-a", "write -P 2 4M 1M").await;
    let name = machine.ours().await.into_iter().find(|name| name.ends_with("disk-a")).unwrap();
    let bitmap = BitmapRef { node: "a".into(), name };
    machine.side.execute_raw("block-dirty-bitmap-clear", json!(bitmap)).await.unwrap();
    machine.guest("disk-a", "write -P 3 8M 1M").await;
    let [oracle, _] = machine.oracle().await;
    let options = ["--audit", "100%"];
    let (disk, restored) = Backup::begin((&env, &machine), &scratch, "incremental", &options).end();
    assert_eq!(disk["read"]["reason"], "bitmap-distrusted", "{disk}");
    assert!(std::fs::read(restored).unwrap() == oracle);
}

/// Damages a repository that holds a disk of 192 MiB and builds on that: in the tree of its base, three
/// nodes for 64 MiB each, the last is needed once the first two thirds were given up.
async fn build_on_a_base(damage: impl FnOnce(&TestEnv)) {
    if !gives_scratch_back() {
        return;
    }
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::filled(Guest::Idle, 192).await;
    let scratch = machine.path("scratch");
    Backup::begin((&env, &machine), &scratch, "full", &[]).end();
    damage(&env);
    let changed = machine.path("changed");
    noise(&changed, 64);
    machine.guest("disk-a", &format!("write -s {} 64M 64M", changed.display())).await;
    machine.guest("disk-a", "write -P 3 160M 64k").await;
    let [oracle, _] = machine.oracle().await;
    let backup = Backup::begin((&env, &machine), &scratch, "incremental", &["--audit", "0"]);
    let (disk, restored) = backup.end();
    assert_eq!(disk["read"]["reason"], "base-damaged", "{disk}");
    assert_eq!(disk["read_bytes"], 192 << 20, "{disk}");
    assert!(std::fs::read(restored).unwrap() == oracle);
}

#[tokio::test]
async fn damage_of_the_base_is_met_before_anything_is_given_up() {
    let damage = |env: &TestEnv| {
        let nodes = packs_of(env).into_iter().min_by_key(|pack| pack.metadata().unwrap().len());
        let nodes = nodes.unwrap();
        let mut bytes = std::fs::read(&nodes).unwrap();
        // Nodes of 256 hashes, which nothing compresses, after a header of less than that.
        bytes[5 * 256 * 32 / 2] ^= 1;
        std::fs::write(&nodes, bytes).unwrap();
    };
    build_on_a_base(damage).await;
}

/// Nothing is recorded as damaged then, and no pack is missed.
#[tokio::test]
async fn a_base_that_the_index_lost_is_met_before_anything_is_given_up() {
    let damage = |env: &TestEnv| {
        for segment in env
            .run("find", &[env.repo().join("index").to_str().unwrap(), "-type", "f"])
            .text()
            .lines()
        {
            std::fs::remove_file(segment).unwrap();
        }
    };
    build_on_a_base(damage).await;
}

/// A snapshot that puts the guest first, of a disk-a full of ones.
async fn instant(machine: &mut Machine, scratch: &Path) -> (Box<dyn VmSnapshot>, Qemu) {
    machine.guest("disk-a", "write -P 1 0 16M").await;
    let point = machine.next_point();
    let request = Points::default().request(machine, point);
    let scratch_dir = Some(scratch.to_owned());
    let request = SnapshotRequest { guest_first: true, scratch_dir, ..request };
    let platform = machine.platform().await;
    (open(&platform, &request).await, platform)
}

async fn reads_ones(source: &dyn BlockSource, offset: u64) -> bool {
    let read = source.read(offset, Buffer::unbudgeted(vec![0; 65536])).await;
    read.is_ok_and(|read| read.iter().all(|byte| *byte == 1))
}

#[tokio::test]
async fn what_was_given_up_never_reads_again_and_the_rest_is_the_instant() {
    if !gives_scratch_back() {
        return;
    }
    let mut machine = Machine::with(Guest::Idle).await;
    let scratch = machine.path("scratch");
    let (mut snapshot, platform) = instant(&mut machine, &scratch).await;
    let source = snapshot.source(0).await.unwrap();
    let release = source.release().expect("this QEMU can trim");
    let part = ByteRange::new(1 << 20, 8 << 20);
    machine.guest("disk-a", "write -P 2 0 4M").await;
    release.release(part).await.unwrap();
    machine.guest("disk-a", "write -P 3 0 16M").await;
    let file = std::fs::read_dir(&scratch).unwrap().next().unwrap().unwrap().path().join("0.raw");
    assert_eq!(file.metadata().unwrap().blocks() * 512, SIZE - part.len());
    assert!(reads_ones(&*source, 0).await && reads_ones(&*source, part.end()).await);
    assert!(!reads_ones(&*source, part.offset()).await);
    assert!(source.read(part.end() - 65536, Buffer::unbudgeted(vec![0; 512])).await.is_err());
    assert!(source.extents(part).await.is_err());
    // The end of a run can still be told whether the instant held.
    release.release(ByteRange::new(0, SIZE)).await.unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, 65536);
    snapshot.still_valid().await.unwrap();
    snapshot.abort().await.unwrap();
    drop(platform);
    machine.holds_only(&[]).await;
}

#[tokio::test]
async fn an_instant_that_breaks_after_parts_were_given_up_is_noticed() {
    if !gives_scratch_back() {
        return;
    }
    let mut machine = Machine::with(Guest::Idle).await;
    let small = SmallDisk::mount(&machine.path("."), "8m");
    let (mut snapshot, platform) = instant(&mut machine, &small.path).await;
    let source = snapshot.source(0).await.unwrap();
    let release = source.release().expect("this QEMU can trim");
    release.release(ByteRange::new(12 << 20, 4 << 20)).await.unwrap();
    machine.guest("disk-a", "write -P 2 0 16M").await;
    let error = snapshot.still_valid().await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    assert!(!reads_ones(&*source, 0).await);
    snapshot.abort().await.unwrap();
    drop(platform);
    machine.holds_only(&[]).await;
}

#[tokio::test]
async fn without_guest_first_nothing_is_given_up() {
    let mut machine = Machine::with(Guest::Idle).await;
    let point = machine.next_point();
    let request = Points::default().request(&machine, point);
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &request).await;
    assert!(snapshot.source(0).await.unwrap().release().is_none());
    snapshot.abort().await.unwrap();
}
