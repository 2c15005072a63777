//! One disk of a backup: opened, copied onto its base or in full, looked at a second time.
//!
//! ```text
//!  base? ── yes ─► copy onto it ─► audit ─► second read ─► stored
//!    │                 │ damaged      │ the bitmap lied
//!    └── no ───────────┴──────────────┴─► copy in full ─► second read ─► stored
//!
//!  with what is stored given up (`release`): base? ── yes ─► its nodes ─► audit ─► copy onto it ─► stored
//! ```

use std::sync::{Arc, PoisonError};

use super::audit::{Sampled, SourceCheck};
use super::heal::Reread;
use super::release::{Releaser, Releasing};
use super::{Backup, DiskReport, Sample};
use crate::block::{BlockSink, BlockSource, ByteRange};
use crate::control::{DiskProgress, NoticeLevel};
use crate::copy;
use crate::error::{Error, Kind, Result};
use crate::job::points;
use crate::platform::VmSnapshot;
use crate::repo::seal::random;
use crate::repo::{
    DiskReader, DiskWriter, ManifestDisk, Repository, StoredDisk, WriteStats, is_of_index,
};
use crate::units::ByteSize;
use crate::vm::{Audit, FullReason, ReadMode};

/// A disk that was stored, and what became of its chunks.
type Stored = (StoredDisk, WriteStats);

/// What a copy onto a base came to.
struct Onto {
    copied: copy::Report,
    /// None where the bitmap lied.
    stored: Option<Stored>,
    audit: Option<Audit>,
    source_check: Option<SourceCheck>,
}

impl Backup<'_> {
    /// Copies disk `index` into the run.
    pub(super) async fn copy_disk(
        &self,
        repository: &Repository,
        snapshot: &mut dyn VmSnapshot,
        index: usize,
    ) -> Result<(ManifestDisk, DiskReport)> {
        let started = self.env.clock.now();
        let mut disk = snapshot.disks()[index].clone();
        let (name, size_bytes) = (disk.description.name.clone(), disk.description.size_bytes);
        self.tell_why(&name, &disk.read);
        let source = snapshot.source(index).await?;
        let mut releaser = self.releaser(&source, &name);
        self.control.set_phase(format!("copying {name}"));
        let progress = self.control.add_disk(&name, size_bytes);
        let base = self.bases.of(&disk)?;
        let (mut copied, mut stored) = (copy::Report::default(), None);
        let (mut audit, mut source_check) = (None, None);
        if let Some(base) = base {
            let instant = (&source, releaser.as_ref());
            match self.copy_onto(repository, base, instant, &progress).await {
                Ok(done) => Onto { copied, stored, audit, source_check } = done,
                // Only the repository is ever damaged; what is read in full stores it anew.
                Err(error) if error.kind() == Kind::Corrupt => {
                    releaser = self.again(&source, releaser, error, &name).await?;
                    disk.read = ReadMode::Full { reason: FullReason::BaseDamaged };
                }
                Err(error) => return Err(error),
            }
            if let Some(offset) = audit.and_then(|audit| audit.differs_at) {
                self.tell_of_lie(&name, offset);
                disk.read = ReadMode::Full { reason: FullReason::BitmapDistrusted };
            }
        }
        let stored = if let Some(stored) = stored {
            stored
        } else {
            let progress = match base {
                Some(_) => self.control.add_disk(&format!("{name}, all of it"), size_bytes),
                None => progress,
            };
            let whole = self.copy_all(&name, (source, releaser), &progress).await?;
            copied.read_bytes += whole.0.read_bytes;
            source_check = whole.2;
            whole.1
        };
        let report = DiskReport {
            name,
            size_bytes,
            read: disk.read.clone(),
            audit,
            source_check,
            read_bytes: copied.read_bytes,
            stored_bytes: stored.1.stored_bytes,
            content_root: stored.0.root,
            elapsed_ms: self.env.elapsed_ms(started),
        };
        Ok((points::point_disk(disk, stored, &report), report))
    }

    /// Copies the disk, whatever a bitmap says.
    async fn copy_all(
        &self,
        name: &str,
        (source, releaser): (Arc<dyn BlockSource>, Option<Arc<Releaser>>),
        progress: &Arc<DiskProgress>,
    ) -> Result<(copy::Report, Stored, Option<SourceCheck>)> {
        let writer = self.run.disk_writer(source.geometry().size_bytes, None);
        let options = copy::Options { unchanged: copy::Unchanged::Read, ..self.options(name) };
        let sampled = self.sampled(&writer, &source);
        let sink = sink((&writer, &sampled), releaser.as_ref());
        let copied = copy::copy(source, sink, &options, self.control, progress).await?;
        releaser.inspect(|releaser| releaser.no_more());
        let check = self.recheck(name, &sampled).await?;
        Ok((copied, writer.finish().await?, check))
    }

    /// What gives up parts of the disk, if that is of use and nobody reads them again.
    fn releaser(&self, source: &Arc<dyn BlockSource>, name: &str) -> Option<Arc<Releaser>> {
        if self.samples.1 != Sample::None {
            return None;
        }
        let durable = self.run.durable_packs();
        let named = (name.to_owned(), self.control.clone());
        let releaser = Releaser::start(source.release()?, named, durable);
        let mut all = self.releasers.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Arc::clone(&releaser));
        Some(releaser)
    }

    /// Ends all giving up.
    pub(super) async fn end_release(&self) {
        let all = {
            let mut all = self.releasers.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *all)
        };
        for releaser in all {
            releaser.end().await;
        }
    }

    /// Makes sure that all of a disk can be read although a part of it was, whose base turned out to be
    /// damaged: what gives up parts of it from now on.
    async fn again(
        &self,
        source: &Arc<dyn BlockSource>,
        releaser: Option<Arc<Releaser>>,
        error: Error,
        name: &str,
    ) -> Result<Option<Arc<Releaser>>> {
        if let Some(releaser) = releaser {
            releaser.end().await;
            if releaser.has_begun() {
                return Err(too_late(error, name));
            }
        }
        self.tell_of_damaged_base(name, &error);
        Ok(self.releaser(source, name))
    }

    fn sampled(&self, writer: &Arc<DiskWriter>, source: &Arc<dyn BlockSource>) -> Arc<Sampled> {
        let (writer, source) = (Arc::clone(writer), Arc::clone(source));
        let seed = u32::from_le_bytes(random());
        Arc::new(Sampled::new(writer, source, self.samples, seed, self.control.clone()))
    }

    /// Reads a sample of what was stored a second time. A difference fails the backup: what the
    /// rest of the point holds nobody knows then.
    async fn recheck(&self, disk: &str, sampled: &Sampled) -> Result<Option<SourceCheck>> {
        if self.samples.1 != Sample::None {
            self.control.set_phase(format!("reading a sample of {disk} again"));
        }
        let Some(recheck) = sampled.recheck().await? else { return Ok(None) };
        recheck.into_result(disk, &self.vm.name).map(Some)
    }

    /// Copies what a bitmap calls changed, and what the base has lost, onto `base`, and looks at a
    /// sample of the rest: nothing is stored where the bitmap lied. It looks before the copy, and at the
    /// base, too, where what was stored can be read no second time.
    async fn copy_onto(
        &self,
        repository: &Repository,
        base: &StoredDisk,
        (source, releaser): (&Arc<dyn BlockSource>, Option<&Arc<Releaser>>),
        progress: &Arc<DiskProgress>,
    ) -> Result<Onto> {
        let (name, control) = (&progress.name, self.control);
        let lost = match &self.damage {
            Some(damage) => damage.of(base, control).await?,
            None => self.run.base_damage().await?.of(base, control).await?,
        };
        let source: Arc<dyn BlockSource> = if lost.is_empty() {
            Arc::clone(source)
        } else {
            self.tell_of_healing(name, &lost);
            Arc::new(Reread::new(Arc::clone(source), lost))
        };
        let options = self.options(name);
        let writer = self.run.disk_writer(base.size_bytes, Some(base));
        // Opened before hours of copying: it may be damaged.
        let base = match self.samples.0 {
            Sample::None => None,
            Sample::Share(_) => Some(Arc::new(repository.open_disk(base).await?)),
        };
        let sampled = self.sampled(&writer, &source);
        let mut audit = None;
        let mut copied = copy::Report::default();
        let mut late = base;
        if releaser.is_some() {
            self.foresee((&writer, &sampled), &source, name).await?;
            if let Some(base) = late.take() {
                audit = self.audit(&sampled, &base, name).await?;
            }
            control.set_phase(format!("copying {name}"));
        }
        if !audit.is_some_and(has_lied) {
            let sink = sink((&writer, &sampled), releaser);
            copied = copy::copy(source, sink, &options, control, progress).await?;
            releaser.inspect(|releaser| releaser.no_more());
        }
        if let Some(base) = late {
            audit = self.audit(&sampled, &base, name).await?;
        }
        if audit.is_some_and(has_lied) {
            return Ok(Onto { copied, stored: None, audit, source_check: None });
        }
        let source_check = self.recheck(name, &sampled).await?;
        Ok(Onto { copied, stored: Some(writer.finish().await?), audit, source_check })
    }

    /// Finds out what a copy onto the base will keep, and whether that can be done: of a base that is
    /// damaged there, nothing is to be given up.
    async fn foresee(
        &self,
        (writer, sampled): (&DiskWriter, &Sampled),
        source: &Arc<dyn BlockSource>,
        name: &str,
    ) -> Result<()> {
        self.control.set_phase(format!("reading what {name} builds on"));
        let (whole, chunk_bytes) = (Arc::clone(source), writer.geometry().align_bytes);
        let mut seams = writer.seams();
        let kept = |range| {
            sampled.kept(range);
            seams.keep(range);
        };
        copy::kept(whole, chunk_bytes, name, self.control, kept).await?;
        self.control.run(writer.foresee(seams)).await
    }

    async fn audit(
        &self,
        sampled: &Sampled,
        base: &Arc<DiskReader>,
        disk: &str,
    ) -> Result<Option<Audit>> {
        self.control.set_phase(format!("auditing the dirty bitmap of {disk}"));
        sampled.audit(base).await
    }

    fn options(&self, disk: &str) -> copy::Options {
        copy::Options {
            flush: copy::Flush::Never,
            zeroes: copy::Zeroes::Sparse { detect_bytes: None },
            ..copy::Options::new(format!("{disk} of {}", self.vm.name), "the repository")
        }
    }

    fn tell_of_damaged_base(&self, disk: &str, error: &Error) {
        let text = format!(
            "the point that {disk} builds on is damaged; all of {disk} is read now: {}",
            error.in_one_line()
        );
        self.control.notice(NoticeLevel::Warning, text);
    }

    fn tell_of_lie(&self, disk: &str, offset: u64) {
        let text = format!(
            "the dirty bitmap of {disk} is wrong: it calls the block at offset {offset} unchanged, \
             and it is not as at the last point. All of {disk} is read now. Find out who wrote to \
             the image without QEMU; 'vmbackup show' of earlier points tells which were incremental"
        );
        self.control.notice(NoticeLevel::Warning, text);
    }

    fn tell_of_healing(&self, disk: &str, lost: &[ByteRange]) {
        let bytes = lost.iter().map(|range| range.len()).sum();
        let text = format!(
            "{} that {disk} shares with its base are damaged in the repository: they are read from \
             the VM again and stored anew",
            ByteSize(bytes)
        );
        self.control.notice(NoticeLevel::Warning, text);
    }

    /// A disk read in full although the VM has points here is worth a word: it costs time.
    fn tell_why(&self, disk: &str, read: &ReadMode) {
        let ReadMode::Full { reason } = read else { return };
        if !matches!(reason, FullReason::Requested | FullReason::FirstBackup) {
            let text = format!("{disk} is read in full: {}", reason.describe());
            self.control.notice(NoticeLevel::Info, text);
        }
    }
}

/// Where the chunks of a disk go.
fn sink(
    (writer, sampled): (&Arc<DiskWriter>, &Arc<Sampled>),
    releaser: Option<&Arc<Releaser>>,
) -> Arc<dyn BlockSink> {
    match releaser {
        None => Arc::clone(sampled) as Arc<dyn BlockSink>,
        Some(releaser) => Arc::new(Releasing::new(Arc::clone(writer), Arc::clone(releaser))),
    }
}

/// The error where damage was met after parts of the disk were given up.
fn too_late(error: Error, name: &str) -> Error {
    let way_out = "run the backup again, without --guest-first or as 'full': all of the disk can be \
                   read then";
    let hint = match error.hint_text() {
        // What it says mends the cause.
        Some(own) if is_of_index(&error) => format!("{own}; or {way_out}"),
        _ => way_out.to_owned(),
    };
    let what = format!(
        "the repository is damaged where {name} builds on it, which was seen too late to read all of \
         {name} instead: with --guest-first what is stored is read once only"
    );
    error.context(what).hint(hint)
}

fn has_lied(audit: Audit) -> bool {
    audit.differs_at.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::index::missing;
    use crate::repo::seal::BlobId;

    #[test]
    fn damage_that_is_met_too_late_has_a_way_out_and_that_of_the_index_its_own_mend() {
        let error = too_late(missing(&BlobId([7; 32])), "vda");
        let hint = error.hint_text().unwrap();
        assert!(
            hint.contains("--rebuild-index") && hint.contains("without --guest-first"),
            "{hint}"
        );
        let error = too_late(Error::new(Kind::Corrupt, "torn").hint("buy a disk"), "vda");
        let hint = error.hint_text().unwrap();
        assert!(hint.starts_with("run the backup again") && hint.contains("'full'"), "{hint}");
    }
}
