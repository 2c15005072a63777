//! Repositories outlive this program: what it stores is read by a reader of two pages of Python that
//! knows only docs/repository-format.md, and what earlier versions stored is read by this one.
//!
//! `golden/` holds a repository of each format version with the content that [`golden_disk`] says.
//! It is made once per version, by the ignored test, and never again.
#![allow(clippy::cast_possible_truncation)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vmbackup::block::memory::MemoryDisk;
use vmbackup::block::{BlockSink, BlockSource, ByteRange, read_all};
use vmbackup::clock::Timestamp;
use vmbackup::content::LEAF_BYTES;
use vmbackup::control::Control;
use vmbackup::copy;
use vmbackup::repo::config::ChunkSize;
use vmbackup::repo::keys::{Credentials, InitOptions, Kdf, Secret};
use vmbackup::repo::store::directory::{DirectoryStore, Parents};
use vmbackup::repo::{CheckOptions, Depth, ManifestDraft, Repair, Repository, StoredDisk};
use vmbackup::vm::PointId;
use vmbackup::workers::Workers;

const XML: &[u8] = b"<domain type='kvm'><name>foo</name></domain>\n";

/// A disk of two tree levels: noise, text, holes, and a tail that is no whole chunk.
fn disk(generation: u8) -> Vec<u8> {
    let mut bytes = vec![0; (70 << 20) + 1000];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for (number, leaf) in bytes.chunks_mut(LEAF_BYTES as usize).enumerate() {
        match number % 40 {
            0 => leaf.fill_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as u8
            }),
            7 => leaf.chunks_mut(21).for_each(|words| {
                words.copy_from_slice(&b"all work and no play "[..words.len()]);
            }),
            _ => {}
        }
    }
    stamp(&mut bytes, generation);
    bytes
}

/// What changes between two points: one byte in the middle, one at the end.
fn stamp(bytes: &mut [u8], generation: u8) {
    let last = bytes.len() - 1;
    bytes[last] = generation;
    bytes[10 << 20] = generation;
}

/// What the golden repositories hold: less, since they are kept for good.
fn golden_disk(generation: u8) -> Vec<u8> {
    let mut bytes = disk(generation);
    for (number, leaf) in bytes.chunks_mut(LEAF_BYTES as usize).enumerate() {
        if number % 40 == 0 && number > 0 {
            leaf.fill(0);
        }
    }
    stamp(&mut bytes, generation);
    bytes
}

fn draft(disks: &[(StoredDisk, &str)], artifact: &StoredDisk) -> ManifestDraft {
    let disks: Vec<_> = disks
        .iter()
        .map(|(stored, name)| {
            serde_json::json!({
                "description": {"name": name, "size_bytes": stored.size_bytes, "format": "raw",
                                "origin": "/a.raw", "layer": "plain"},
                "read": {"mode": "full", "reason": "requested"}, "stored": stored, "read_bytes": 0,
                "stats": {"written_bytes": 0, "known_bytes": 0, "new_bytes": 0, "stored_bytes": 0},
            })
        })
        .collect();
    let draft = serde_json::json!({
        "vm": {"uuid": "b2b8a3a0-0000-4000-8000-000000000001", "name": "foo", "host": "h",
               "platform": "image"},
        "taken": "2026-11-21T00:00:00Z", "finished": "2026-11-21T00:00:01Z",
        "quiescence": {"level": "stopped"}, "disks": disks, "excluded": [], "not_captured": [],
        "artifacts": [{"kind": "domain-xml-live", "stored": artifact}], "program": "test",
    });
    serde_json::from_value(draft).expect("a draft")
}

async fn store(
    repository: &Repository,
    generation: u8,
    content: Vec<u8>,
    base: &[StoredDisk],
) -> StoredDisk {
    let size = content.len() as u64;
    let changed = vec![ByteRange::new(10 << 20, 1), ByteRange::new(size - 1, 1)];
    let source = match base {
        [] => MemoryDisk::with_content(content),
        _ => MemoryDisk::changed_since_base(content, changed),
    };
    let run = repository.begin_run().await.expect("begins");
    let writer = run.disk_writer(size, base.first());
    let control = Control::new();
    let options =
        copy::Options { flush: copy::Flush::Never, ..copy::Options::new("disk", "repository") };
    let progress = control.add_disk("vda", size);
    let sink = Arc::clone(&writer) as Arc<dyn BlockSink>;
    copy::copy(Arc::new(source), sink, &options, &control, &progress).await.expect("copies");
    let (stored, _) = writer.finish().await.expect("finishes");
    let artifact = run.store_bytes(XML).await.expect("stores");
    let draft = draft(&[(stored.clone(), "vda")], &artifact);
    run.commit(PointId([generation; 16]), draft).await.expect("commits");
    stored
}

/// Two points, the second incremental.
async fn make(place: &Path, credentials: &Credentials, chunk_bytes: u64, disk: fn(u8) -> Vec<u8>) {
    let store_dir = DirectoryStore::init(place, Parents::MustExist).await.expect("an empty place");
    let chunk = ChunkSize::new(chunk_bytes).expect("a chunk size");
    let options = InitOptions { chunk, kdf: Kdf::FOR_TESTS, now: Timestamp::UNIX_EPOCH };
    let workers = Workers::new(2).expect("starts");
    let repository =
        Repository::init(Arc::new(store_dir), credentials, options, workers).await.expect("inits");
    let first = store(&repository, 1, disk(1), &[]).await;
    let second = store(&repository, 2, disk(2), std::slice::from_ref(&first)).await;
    assert_ne!(first, second);
}

fn reader(place: &Path, credentials: &[&str], arguments: &[&str]) -> (bool, String) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader/vmbackup_reader.py");
    let output = Command::new("/usr/bin/python3")
        .arg(script)
        .args(credentials)
        .arg(place)
        .args(arguments)
        .output()
        .expect("Debian's python3 runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Restores both points with the Python reader and compares.
fn check_with_reader(place: &Path, scratch: &Path, credentials: &[&str], disk: fn(u8) -> Vec<u8>) {
    let (fine, listed) = reader(place, credentials, &[]);
    assert!(fine && listed.lines().count() == 2 && listed.contains(" 1 foo "), "{listed}");
    let target = scratch.join("restored");
    let target_text = target.to_str().expect("a plain path");
    for generation in [1, 2] {
        let point = PointId([generation; 16]).to_string();
        let (fine, said) = reader(place, credentials, &[&point[..8], "vda", target_text]);
        assert!(fine, "{said}");
        assert!(std::fs::read(&target).expect("restored") == disk(generation), "{generation}");
        let (fine, said) = reader(place, credentials, &[&point, "domain-xml-live", target_text]);
        assert!(fine, "{said}");
        assert_eq!(std::fs::read(&target).expect("restored"), XML);
    }
}

fn new_place(scratch: &Path) -> PathBuf {
    let place = scratch.join("repository");
    std::fs::create_dir(&place).expect("makes it");
    place
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_reads_a_repository_without_a_key() {
    let scratch = tempfile::tempdir().expect("a directory");
    let place = new_place(scratch.path());
    make(&place, &Credentials::None, LEAF_BYTES, disk).await;
    check_with_reader(&place, scratch.path(), &[], disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_reads_a_repository_with_a_password_and_large_chunks_only_with_it() {
    let scratch = tempfile::tempdir().expect("a directory");
    let place = new_place(scratch.path());
    let password = Credentials::Password(Secret::new(b"open sesame".to_vec()));
    make(&place, &password, 4 * LEAF_BYTES, disk).await;
    let file = scratch.path().join("password");
    let file_text = file.to_str().expect("a plain path");
    std::fs::write(&file, "open sesame\n").expect("writes");
    check_with_reader(&place, scratch.path(), &["--password-file", file_text], disk);
    std::fs::write(&file, "open barley\n").expect("writes");
    let (opened, said) = reader(&place, &["--password-file", file_text], &[]);
    assert!(!opened && said.contains("nothing given opens"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_reads_a_repository_with_a_key_file() {
    let scratch = tempfile::tempdir().expect("a directory");
    let place = new_place(scratch.path());
    let key = Credentials::KeyFile(Secret::new(vec![7; 32]));
    make(&place, &key, LEAF_BYTES, disk).await;
    let file = scratch.path().join("key");
    std::fs::write(&file, [7; 32]).expect("writes");
    let credentials = ["--key-file", file.to_str().expect("a plain path")];
    check_with_reader(&place, scratch.path(), &credentials, disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_finds_the_sound_one_of_two_copies() {
    let scratch = tempfile::tempdir().expect("a directory");
    let place = new_place(scratch.path());
    make(&place, &Credentials::None, LEAF_BYTES, golden_disk).await;
    let folders = std::fs::read_dir(place.join("packs")).expect("lists").flatten();
    let packs = folders.flat_map(|folder| std::fs::read_dir(folder.path()).expect("lists"));
    let packs: Vec<PathBuf> = packs.map(|pack| pack.expect("lists").path()).collect();
    for path in packs {
        let mut pack = std::fs::read(&path).expect("reads");
        pack[60] ^= 1;
        std::fs::write(&path, pack).expect("writes");
    }
    let point = PointId([1; 16]).to_string();
    let target = scratch.path().join("restored");
    let target = target.to_str().expect("a plain path");
    let (fine, said) = reader(&place, &[], &[&point, "vda", target]);
    assert!(!fine && said.contains("InvalidTag"), "{said}");

    let store_dir = Arc::new(DirectoryStore::open(&place).await.expect("opens"));
    let workers = Workers::new(2).expect("starts");
    let repository = Repository::open(store_dir, &Credentials::None, workers).await.expect("opens");
    let options = CheckOptions { depth: Depth::Data, repair: Repair::Nothing };
    let report = repository.check(options, &Control::new()).await.expect("checks");
    assert!(!report.is_fine());
    store(&repository, 3, golden_disk(1), &[]).await;
    let (fine, said) = reader(&place, &[], &[&point, "vda", target]);
    assert!(fine, "{said}");
    assert!(std::fs::read(target).expect("restored") == golden_disk(1));
}

fn golden(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader/golden").join(version)
}

/// A copy, because opening a repository may write to it.
fn copy_of(version: &str, scratch: &Path) -> PathBuf {
    let place = scratch.join(version);
    let status = Command::new("cp").arg("-r").arg(golden(version)).arg(&place).status();
    assert!(status.expect("cp runs").success());
    place
}

#[tokio::test(flavor = "multi_thread")]
async fn the_golden_repository_of_version_1_still_reads() {
    let scratch = tempfile::tempdir().expect("a directory");
    let place = copy_of("v1", scratch.path());
    let file = scratch.path().join("password");
    std::fs::write(&file, "golden\n").expect("writes");
    let credentials = ["--password-file", file.to_str().expect("a plain path")];
    check_with_reader(&place, scratch.path(), &credentials, golden_disk);
    let password = Credentials::Password(Secret::new(b"golden".to_vec()));
    let store_dir = Arc::new(DirectoryStore::open(&place).await.expect("opens"));
    let workers = Workers::new(2).expect("starts");
    let repository = Repository::open(store_dir, &password, workers).await.expect("opens");
    let manifests = repository.manifests(None).await.expect("lists");
    assert_eq!(manifests.len(), 2);
    for (generation, manifest) in (1..).zip(manifests) {
        let reader = repository.open_disk(&manifest.body.disks[0].stored).await.expect("opens");
        let size = reader.geometry().size_bytes as usize;
        assert!(read_all(&reader, size).await.expect("reads") == golden_disk(generation));
        let xml = repository.read_bytes(&manifest.body.artifacts[0].stored).await.expect("reads");
        assert_eq!(xml, XML);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes the golden repository of a new format version"]
async fn make_golden() {
    let place = golden("v1");
    std::fs::create_dir_all(&place).expect("makes it");
    let password = Credentials::Password(Secret::new(b"golden".to_vec()));
    make(&place, &password, LEAF_BYTES, golden_disk).await;
}
