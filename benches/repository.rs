//! Stores a raw file in a new directory repository, stores it again, and restores it: the data path
//! alone, without QEMU or NBD.
//!
//! `repository FILE DIRECTORY`: the directory (which must not exist) holds the repository and the
//! restored file. Prints one line per step: seconds, processor time, bytes stored; and the peak memory
//! of the process.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use vmbackup::block::file::{Access, Existing, FileSource, NewFile};
use vmbackup::block::{BlockSink, BlockSource};
use vmbackup::clock::Timestamp;
use vmbackup::control::Control;
use vmbackup::copy;
use vmbackup::repo::config::ChunkSize;
use vmbackup::repo::keys::{Credentials, InitOptions, Kdf};
use vmbackup::repo::store::directory::{DirectoryStore, Parents};
use vmbackup::repo::{ManifestDraft, Repository, StoredDisk};
use vmbackup::vm::PointId;
use vmbackup::workers::Workers;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let (Some(file), Some(directory)) = (arguments.next(), arguments.next()) else { return Ok(()) };
    let (file, directory) = (PathBuf::from(file), PathBuf::from(directory));
    std::fs::create_dir(&directory)?;
    let place = directory.join("repository");
    std::fs::create_dir(&place)?;
    let store = Arc::new(DirectoryStore::init(&place, Parents::MustExist).await?);
    let options =
        InitOptions { chunk: ChunkSize::DEFAULT, kdf: Kdf::FOR_TESTS, now: Timestamp::UNIX_EPOCH };
    let repository =
        Repository::init(store, &Credentials::None, options, Workers::per_core()?).await?;
    let (disk, stored) = timed("store", backup(&repository, &file, 1)).await?;
    println!("{:>8} bytes stored: {stored}", "");
    let (_, stored) = timed("again", backup(&repository, &file, 2)).await?;
    println!("{:>8} bytes stored: {stored}", "");
    timed("restore", restore(&repository, &disk, &directory.join("restored.raw"))).await?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default());
    Ok(())
}

async fn timed<T>(what: &str, work: impl Future<Output = Result<(T, u64)>>) -> Result<(T, u64)> {
    let (started, cpu) = (Instant::now(), cpu_seconds()?);
    let (value, count) = work.await?;
    let (wall, cpu_after) = (started.elapsed().as_secs_f64(), cpu_seconds()?);
    let (user, system) = (cpu_after.0 - cpu.0, cpu_after.1 - cpu.1);
    println!("{what:>8} {wall:.3} s, processor {user:.2} s user {system:.2} s system");
    Ok((value, count))
}

/// User and system time of this process. The unit is USER_HZ, 100 on every Linux (proc(5)).
fn cpu_seconds() -> Result<(f64, f64)> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let seconds = |at: usize| Ok::<f64, Box<dyn Error>>(fields[at].parse::<f64>()? / 100.0);
    Ok((seconds(11)?, seconds(12)?))
}

async fn backup(repository: &Repository, file: &Path, number: u8) -> Result<(StoredDisk, u64)> {
    let source = Arc::new(FileSource::open(file, Access::Once)?);
    let size_bytes = source.geometry().size_bytes;
    let run = repository.begin_run().await?;
    let writer = run.disk_writer(size_bytes, None);
    let options = copy::Options {
        zeroes: copy::Zeroes::Sparse { detect_bytes: None },
        flush: copy::Flush::Never,
        ..copy::Options::new("file", "repository")
    };
    let control = Control::new();
    let progress = control.add_disk("vda", size_bytes);
    let sink = Arc::clone(&writer) as Arc<dyn BlockSink>;
    copy::copy(source, sink, &options, &control, &progress).await?;
    let (stored, stats) = writer.finish().await?;
    run.commit(PointId([number; 16]), draft()?).await?;
    Ok((stored, stats.stored_bytes))
}

async fn restore(repository: &Repository, disk: &StoredDisk, to: &Path) -> Result<((), u64)> {
    let source = Arc::new(repository.open_disk(disk).await?);
    let file = NewFile::create(to, disk.size_bytes, Existing::Refuse)?;
    let control = Control::new();
    let progress = control.add_disk("vda", disk.size_bytes);
    let options = copy::Options::new("repository", "file");
    copy::copy(source, file.sink(), &options, &control, &progress).await?;
    file.commit().await?;
    Ok(((), disk.size_bytes))
}

fn draft() -> Result<ManifestDraft> {
    let uuid = "b2b8a3a0-0000-4000-8000-000000000001";
    let draft = serde_json::json!({
        "vm": {"uuid": uuid, "name": "foo", "host": "h", "platform": "image"},
        "taken": "2026-11-21T00:00:00Z", "finished": "2026-11-21T00:00:01Z",
        "quiescence": {"level": "stopped"}, "disks": [], "excluded": [], "not_captured": [],
        "artifacts": [], "program": "bench",
    });
    Ok(serde_json::from_value(draft)?)
}
