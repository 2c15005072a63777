//! Reading every blob of every pack: it opens, decodes and has the content its id was made from.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::{CheckReport, FINDINGS_MAX, Fault, Findings, is_finding};
use crate::content::ContentHash;
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::repo::blobs::{self, Blobs};
use crate::repo::condemned::PackId;
use crate::repo::index::{Location, PackRef};
use crate::repo::pack::{self, PackedBlob};
use crate::repo::seal::{BlobKind, Opener};
use crate::repo::store::ObjectName;
use crate::repo::tree::Node;

/// Neighbouring blobs are read together up to this many bytes.
const READ_BYTES: u64 = 4 << 20;

/// Reads under way at once.
const READS_IN_FLIGHT: usize = 4;

/// Blobs that lie side by side.
#[derive(Clone)]
struct Stretch {
    blobs: Arc<Blobs>,
    chunk_levels: u32,
    pack: Arc<PackRef>,
    opener: Arc<Opener>,
    members: Vec<PackedBlob>,
}

/// What a stretch was found to be.
#[derive(Default)]
struct Seen {
    bytes: u64,
    blobs: u64,
    bad: Vec<(PackId, u32)>,
    /// Blobs that the storage failed to read, and how.
    unread: Vec<(PackId, u32, Fault)>,
}

/// What reading takes.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    pub(super) blobs: &'a Arc<Blobs>,
    pub(super) chunk_levels: u32,
    pub(super) control: &'a Control,
}

impl Reading<'_> {
    /// Reads the blobs of these packs.
    pub(super) async fn check(
        self,
        mut packs: Vec<PackId>,
        findings: &mut Findings,
        report: &mut CheckReport,
    ) -> Result<()> {
        packs.sort_unstable();
        let total_bytes = packs.iter().map(|id| findings.packs[id]).sum();
        let progress = self.control.add_disk("packs", total_bytes);
        let mut reads = JoinSet::new();
        for id in packs {
            let before = report.bytes_read;
            self.pack(id, &mut reads, findings, report).await?;
            progress.add(findings.packs[&id], report.bytes_read - before);
        }
        while !reads.is_empty() {
            take(reads.join_next().await, findings, report)?;
        }
        Ok(())
    }

    async fn pack(
        self,
        id: PackId,
        reads: &mut JoinSet<Result<Seen>>,
        findings: &mut Findings,
        report: &mut CheckReport,
    ) -> Result<()> {
        let Self { blobs, chunk_levels, control } = self;
        let name = ObjectName::pack(&id);
        let contents = match pack::read_contents(&*blobs.store, &blobs.keys, &name).await {
            Ok(contents) => contents,
            // Collected since the packs were listed.
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) if is_finding(&error) => {
                blobs.damaged.report(&id, &error).await;
                report.fault(&name, Fault::of(&error));
                findings.doubtful.insert(id);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let pack = Arc::new(PackRef { id, header: contents.header });
        let opener = blobs.opener(&pack)?;
        for members in stretches(&contents.blobs) {
            control.check()?;
            if reads.len() >= READS_IN_FLIGHT {
                take(reads.join_next().await, findings, report)?;
            }
            let (blobs, pack, opener) = (Arc::clone(blobs), Arc::clone(&pack), Arc::clone(&opener));
            reads.spawn(Stretch { blobs, chunk_levels, pack, opener, members }.read());
        }
        Ok(())
    }
}

fn take(
    done: Option<std::result::Result<Result<Seen>, tokio::task::JoinError>>,
    findings: &mut Findings,
    report: &mut CheckReport,
) -> Result<()> {
    let Some(done) = done else { return Ok(()) };
    let died = |e| Error::new(Kind::Internal, "reading a pack died").source(e);
    let seen = done.map_err(died)??;
    report.bytes_read += seen.bytes;
    report.blobs_read += seen.blobs;
    let rotten = |counter: u32| Fault::damage(format!("blob {counter} is not what it should be"));
    let bad = seen.bad.into_iter().map(|(pack, counter)| (pack, counter, rotten(counter)));
    for (pack, counter, fault) in bad.chain(seen.unread) {
        report.fault(&ObjectName::pack(&pack), fault);
        if findings.bad.len() < 100 * FINDINGS_MAX {
            findings.bad.insert((pack, counter));
        } else {
            // Too many to remember one by one: read again where they are needed.
            findings.doubtful.insert(pack);
        }
    }
    Ok(())
}

/// Cuts a pack's blobs into stretches that are read at once.
fn stretches(blobs: &[PackedBlob]) -> Vec<Vec<PackedBlob>> {
    let mut out: Vec<Vec<PackedBlob>> = Vec::new();
    let mut bytes = u64::MAX;
    for blob in blobs {
        bytes = bytes.saturating_add(blob.stored_bytes.into());
        if bytes > READ_BYTES {
            out.push(Vec::new());
            bytes = blob.stored_bytes.into();
        }
        out.last_mut().expect("one was just pushed").push(*blob);
    }
    out
}

impl Stretch {
    async fn read(self) -> Result<Seen> {
        let len = self.members.iter().map(|blob| u64::from(blob.stored_bytes)).sum();
        let sealed = match self.blobs.read_run(&self.pack, self.members[0].offset, len).await {
            Ok(Some(sealed)) => sealed,
            // Collected since its trailer was read.
            Ok(None) => return Ok(Seen::default()),
            Err(error) if is_finding(&error) => return self.read_one_by_one().await,
            Err(error) => return Err(error),
        };
        self.prove(sealed).await
    }

    /// Proves what was read, and records damage.
    async fn prove(self, sealed: Vec<u8>) -> Result<Seen> {
        let (blobs, pack) = (Arc::clone(&self.blobs), Arc::clone(&self.pack));
        let seen = blobs.workers.run(move || self.prove_all(sealed)).await?;
        if let Some((_, counter)) = seen.bad.first() {
            let message = format!("blob {counter} of {} is not what it should be", pack.name());
            blobs.damaged.report(&pack.id, &Error::new(Kind::Corrupt, message)).await;
        }
        Ok(seen)
    }

    /// A bad sector must not condemn its neighbours.
    async fn read_one_by_one(self) -> Result<Seen> {
        let mut all = Seen::default();
        for blob in self.members.clone() {
            let len = blob.stored_bytes.into();
            match self.blobs.read_run(&self.pack, blob.offset, len).await {
                Ok(Some(sealed)) => {
                    let one = Self { members: vec![blob], ..self.clone() };
                    let seen = one.prove(sealed).await?;
                    all.bytes += seen.bytes;
                    all.blobs += seen.blobs;
                    all.bad.extend(seen.bad);
                }
                Ok(None) => return Ok(all),
                Err(error) if is_finding(&error) => {
                    self.blobs.damaged.report(&self.pack.id, &error).await;
                    all.unread.push((self.pack.id, blob.counter, Fault::of(&error)));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// CPU work.
    fn prove_all(self, mut sealed: Vec<u8>) -> Seen {
        let bytes = sealed.len() as u64;
        let mut bad = Vec::new();
        let mut rest = &mut sealed[..];
        for blob in &self.members {
            let (part, after) = rest.split_at_mut(blob.stored_bytes as usize);
            rest = after;
            if !self.is_proven(blob, part) {
                bad.push((self.pack.id, blob.counter));
            }
        }
        Seen { bytes, blobs: self.members.len() as u64, bad, unread: Vec::new() }
    }

    fn is_proven(&self, blob: &PackedBlob, sealed: &mut [u8]) -> bool {
        let location = Location {
            pack: Arc::clone(&self.pack),
            counter: blob.counter,
            offset: blob.offset,
            stored_bytes: blob.stored_bytes,
            plain_bytes: blob.plain_bytes,
            encoding: blob.encoding,
        };
        let Ok(plain) = blobs::open(&self.opener, &location, sealed) else { return false };
        let hash = match blob.kind {
            BlobKind::Chunk => Some(ContentHash::of_chunk(&plain, self.chunk_levels)),
            BlobKind::Node { .. } => Node::decode(&plain).map(|node| node.hash()),
        };
        hash.is_some_and(|hash| self.blobs.keys.blob_id(blob.kind, &hash) == blob.id)
    }
}
