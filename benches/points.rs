//! Fills a new directory repository with manifests, to measure lists of very many points.
//!
//! `points DIRECTORY VMS POINTS`: so many VMs (named `vm-0000000` on) with so many points each, of one
//! empty disk. The manifests are written as plain files, without a catalog and without waiting for the
//! disk: a million through the front door would take an hour of `fsync`. `vmbackup gc` makes the
//! catalog.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use vmbackup::clock::Timestamp;
use vmbackup::repo::PointName;
use vmbackup::repo::config::ChunkSize;
use vmbackup::repo::keys::{Credentials, InitOptions, Kdf};
use vmbackup::repo::seal::{ObjectType, random};
use vmbackup::repo::store::directory::{DirectoryStore, Parents};
use vmbackup::repo::{Manifest, Repository};
use vmbackup::vm::{PointId, Uuid};
use vmbackup::workers::Workers;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Between two points of a VM.
const SECONDS_BETWEEN: i64 = 24 * 3600;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [directory, vms, points] = &arguments[..] else { return Ok(()) };
    let (vms, points): (u32, u32) = (vms.parse()?, points.parse()?);
    let directory = Path::new(directory);
    std::fs::create_dir(directory)?;
    let store = Arc::new(DirectoryStore::init(directory, Parents::MustExist).await?);
    let options =
        InitOptions { chunk: ChunkSize::DEFAULT, kdf: Kdf::FOR_TESTS, now: Timestamp::UNIX_EPOCH };
    let repository =
        Repository::init(store, &Credentials::None, options, Workers::per_core()?).await?;
    for vm in 0..vms {
        let domain = Uuid::from_bytes(random::<16>());
        std::fs::create_dir_all(directory.join(format!("points/{domain}")))?;
        for sequence in 1..=points {
            write(&repository, directory, (vm, domain, sequence))?;
        }
    }
    Ok(())
}

fn write(
    repository: &Repository,
    directory: &Path,
    (vm, domain, sequence): (u32, Uuid, u32),
) -> Result<()> {
    let manifest = manifest(vm, domain, sequence)?;
    let name = PointName { domain, sequence: manifest.sequence, point: manifest.point }.object();
    let keys = &repository.unlocked().keys;
    let object = keys.seal_object(ObjectType::Point, &name, &serde_json::to_vec(&manifest)?);
    std::fs::write(directory.join(name.as_str()), object)?;
    Ok(())
}

fn manifest(vm: u32, domain: Uuid, sequence: u32) -> Result<Manifest> {
    let taken = Timestamp::from_second(1_700_000_000 + i64::from(sequence) * SECONDS_BETWEEN)?;
    let zero = "0".repeat(64);
    Ok(serde_json::from_value(serde_json::json!({
        "point": PointId(random::<16>()), "sequence": sequence,
        "vm": {"uuid": domain, "name": format!("vm-{vm:07}"), "host": "kvm1", "platform": "libvirt"},
        "taken": taken, "finished": taken,
        "quiescence": {"level": "filesystem", "frozen_ms": 41}, "excluded": [], "not_captured": [],
        "disks": [{
            "description": {"name": "vda", "size_bytes": 10_u64 << 30, "format": "qcow2",
                "origin": format!("/var/lib/libvirt/images/vm-{vm:07}.qcow2"), "layer": "plain"},
            "read": {"mode": "full", "reason": "requested"},
            "stored": {"size_bytes": 10_u64 << 30, "top": zero, "root": zero}, "read_bytes": 0,
            "stats": {"written_bytes": 0, "known_bytes": 0, "new_bytes": 0, "stored_bytes": 0},
        }],
        "artifacts": [], "program": "vmbackup 0.1.0",
    }))?)
}
