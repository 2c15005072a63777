//! A simulated VM: what it does by itself, what happens to it, and what a backup leaves on it.
//!
//! What backups take from it is remembered here as well: [`Guest::instants`] is the oracle, a copy of
//! every instant by the point it was taken for.

use std::collections::{BTreeMap, BTreeSet};

use super::image::{BLOCK_BYTES, BitmapName, BitmapState, Content, Ending, Image};
use super::life::Happening;
use crate::dice::Dice;
use crate::vm::{DiskDescription, DiskLayer, FileId, PointId, Uuid, VmIdentity};

/// Largest disk, in blocks: four chunks.
const BLOCKS_MAX: usize = 16;

/// A chunk of a repository, in blocks.
const CHUNK_BLOCKS: usize = 4;

const DISKS_MAX: usize = 3;

/// What tells a bitmap's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// Its name, as with a plain QEMU.
    ByName,
    /// The file it is in: all disks of a checkpoint have one name, as with libvirt.
    ByFile,
}

/// A disk of the VM.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) name: String,
    pub(crate) image: Image,
}

/// A freeze of file systems.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Freeze {
    pub(crate) since_ms: i64,
    /// When the guardian thaws, whatever happened.
    pub(crate) until_ms: i64,
    /// Whether there is one still.
    pub(crate) guarded: bool,
}

/// Whether it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    Runs,
    PausedByUs,
    PausedByOthers,
}

/// What reads of a snapshot yield.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobState {
    /// The instant.
    Holds,
    /// The live disk: the job ended, and the export did not.
    Live,
    /// Errors.
    Gone,
}

/// The backup job of a point.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) state: JobState,
    /// Content at the instant, and what changed since the base.
    pub(crate) disks: Vec<(String, Content, Option<Vec<bool>>)>,
    /// Blocks that were given up, by the disk's number: they never read again.
    pub(crate) given_up: BTreeSet<(usize, u64)>,
}

/// What the disks held when a point was taken.
#[derive(Clone, Debug)]
pub(crate) struct Instant {
    pub(crate) repository: String,
    pub(crate) disks: Vec<(String, Content)>,
}

/// What a run has open in QEMU and beside it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Open {
    pub(crate) jobs: BTreeMap<PointId, Job>,
    pub(crate) exports: BTreeSet<PointId>,
    pub(crate) scratch: BTreeSet<PointId>,
    pub(crate) server: Option<PointId>,
}

/// The VM.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) vm: VmIdentity,
    pub(crate) naming: Naming,
    pub(crate) has_agent: bool,
    pub(crate) disks: Vec<Disk>,
    pub(crate) freeze: Option<Freeze>,
    pub(crate) pace: Pace,
    pub(crate) open: Open,
    /// Counts its QEMUs.
    pub(crate) boot: u64,
    pub(crate) instants: BTreeMap<PointId, Instant>,
    /// Decides what it does.
    pub(crate) dice: Dice,
    next_file: u64,
    next_value: u32,
    /// Whether any bitmap may lie, for all that happened so far.
    pub(crate) has_lied: bool,
    /// An image as it was when the VM was stopped at some time.
    copy: Option<(String, Image)>,
}

/// What happens to a VM between two backups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Change {
    Restarted,
    Killed,
    Resized,
    ShrunkAndGrown,
    DiskAdded,
    DiskRemoved,
    ImageReplaced,
    ImageCloned,
    ImagesSwapped,
    CopyMade,
    CopyPutBack,
    BitmapStopped,
    BitmapLost,
    WrittenUnseen,
}

impl Change {
    pub(crate) const ALL: [Self; 14] = [
        Self::Restarted,
        Self::Killed,
        Self::Resized,
        Self::ShrunkAndGrown,
        Self::DiskAdded,
        Self::DiskRemoved,
        Self::ImageReplaced,
        Self::ImageCloned,
        Self::ImagesSwapped,
        Self::CopyMade,
        Self::CopyPutBack,
        Self::BitmapStopped,
        Self::BitmapLost,
        Self::WrittenUnseen,
    ];
}

impl Guest {
    pub(crate) fn new(mut dice: Dice) -> Self {
        let vm = VmIdentity {
            uuid: Uuid::from_u128(u128::from(dice.any())),
            name: "foo".to_owned(),
            host: "host".to_owned(),
            platform: "simulated".to_owned(),
        };
        let mut guest = Self {
            vm,
            naming: dice.one_of(&[Naming::ByName, Naming::ByFile]),
            has_agent: !dice.once_in(4),
            disks: Vec::new(),
            freeze: None,
            pace: Pace::Runs,
            open: Open::default(),
            boot: 0,
            instants: BTreeMap::new(),
            dice,
            next_file: 0,
            next_value: 100,
            has_lied: false,
            copy: None,
        };
        for _ in 0..=guest.dice.below(2) {
            guest.add_disk();
        }
        for _ in 0..8 {
            guest.write();
        }
        if guest.dice.once_in(16) {
            guest.pace = Pace::PausedByOthers;
        }
        guest
    }

    pub(crate) fn describe(&self, disk: &Disk) -> DiskDescription {
        let file = FileId { device: 1, inode: disk.image.file, created_ns: Some(7) };
        DiskDescription {
            name: disk.name.clone(),
            size_bytes: disk.image.content.size_bytes(),
            format: disk.image.format.to_owned(),
            origin: format!("/images/{}", disk.image.file),
            layer: DiskLayer::Plain,
            file: (self.naming == Naming::ByFile).then_some(file),
        }
    }

    pub(super) fn bitmap_name(&self, repository: &str, disk: &str, point: PointId) -> BitmapName {
        let disk = (self.naming == Naming::ByName).then(|| disk.to_owned());
        BitmapName { repository: repository.to_owned(), disk, point }
    }

    /// Whether its file systems are frozen now.
    pub(crate) fn is_frozen(&self, now_ms: i64) -> bool {
        self.freeze.is_some_and(|freeze| !freeze.guarded || now_ms < freeze.until_ms)
    }

    /// It goes on, as whoever had it stand still says.
    pub(super) fn resume(&mut self) {
        assert_ne!(self.pace, Pace::PausedByOthers, "who knows why it stands still");
        self.pace = Pace::Runs;
    }

    /// It goes on with what it does.
    pub(crate) fn write(&mut self) {
        if self.disks.is_empty() || self.pace != Pace::Runs {
            return;
        }
        let disk = self.dice.below(self.disks.len());
        let value = self.value();
        let blocks = self.disks[disk].image.content.blocks().len();
        let first = self.dice.below(blocks);
        let range = match self.dice.below(3) {
            0 => first - first % CHUNK_BLOCKS..(first - first % CHUNK_BLOCKS + CHUNK_BLOCKS),
            _ => first..first + 1,
        };
        for block in range.start..range.end.min(blocks) {
            self.disks[disk].image.write(block, value);
        }
    }

    /// Zeroes, something that is elsewhere as well, or something new.
    fn value(&mut self) -> u32 {
        match self.dice.below(4) {
            0 => 0,
            1 => 1 + u32::try_from(self.dice.below(5)).expect("a few"),
            _ => {
                self.next_value += 1;
                self.next_value
            }
        }
    }

    /// Something happens to it; `false` if it cannot.
    pub(crate) fn change(&mut self, change: Change) -> bool {
        match change {
            Change::Restarted => self.restart(Ending::Orderly),
            Change::Killed => self.restart(Ending::Killed),
            Change::DiskAdded => return self.disks.len() < DISKS_MAX && self.add_disk(),
            Change::DiskRemoved if self.disks.len() < 2 => return false,
            Change::DiskRemoved => {
                let disk = self.dice.below(self.disks.len());
                self.disks.remove(disk);
            }
            Change::ImagesSwapped => return self.swap_images(),
            Change::CopyPutBack => return self.put_copy_back(),
            _ => {
                let disk = self.dice.below(self.disks.len());
                return self.change_disk(disk, change);
            }
        }
        true
    }

    fn change_disk(&mut self, at: usize, change: Change) -> bool {
        let (size_bytes, file, value) = (self.size(), self.file(), self.value());
        let block = self.dice.below(self.disks[at].image.content.blocks().len());
        let image = &mut self.disks[at].image;
        match change {
            Change::Resized => image.resize(size_bytes),
            Change::ShrunkAndGrown => {
                let was = image.content.size_bytes();
                image.resize(BLOCK_BYTES.min(was));
                image.resize(was);
                self.has_lied = true;
            }
            Change::ImageReplaced => {
                image.file = file;
                image.bitmaps.clear();
                image.content.resize(size_bytes);
                image.content.set(0, value);
            }
            // Bitmaps and content come along.
            Change::ImageCloned => image.file = file,
            Change::CopyMade => {
                self.restart(Ending::Orderly);
                let Disk { name, image } = &self.disks[at];
                self.copy = Some((name.clone(), image.clone()));
            }
            Change::BitmapStopped | Change::BitmapLost => {
                let Some(name) = image.bitmaps.keys().next_back().cloned() else { return false };
                if change == Change::BitmapLost {
                    image.bitmaps.remove(&name);
                } else {
                    image.bitmaps.get_mut(&name).expect("it is there").state = BitmapState::Stopped;
                }
            }
            Change::WrittenUnseen => {
                let lies = image.write_unseen(block, value);
                self.has_lied |= lies;
                return lies;
            }
            _ => unreachable!("not of one disk"),
        }
        true
    }

    fn swap_images(&mut self) -> bool {
        if self.disks.len() < 2 {
            return false;
        }
        self.restart(Ending::Orderly);
        let (first, rest) = self.disks.split_at_mut(1);
        std::mem::swap(&mut first[0].image, &mut rest[0].image);
        true
    }

    /// The VM is stopped, and an image rolled back to what it was, bitmaps and all.
    fn put_copy_back(&mut self) -> bool {
        let Some((name, copy)) = self.copy.clone() else { return false };
        self.restart(Ending::Orderly);
        let Some(disk) = self.disks.iter_mut().find(|disk| disk.name == name) else { return false };
        disk.image = copy;
        true
    }

    fn add_disk(&mut self) -> bool {
        let mut free = ["vda", "vdb", "vdc", "vdd"].into_iter();
        let name = free.find(|name| self.disks.iter().all(|disk| disk.name != *name));
        let content = Content::zeroes(self.size());
        let format = if self.dice.once_in(4) { "raw" } else { "qcow2" };
        let image = Image { file: self.file(), format, content, bitmaps: BTreeMap::new() };
        self.disks.push(Disk { name: name.expect("one is free").to_owned(), image });
        true
    }

    /// A size that need not be made of whole chunks or blocks.
    fn size(&mut self) -> u64 {
        // Often the same as another's.
        let blocks = match self.dice.below(2) {
            0 => BLOCKS_MAX / 2,
            _ => 1 + self.dice.below(BLOCKS_MAX),
        };
        let odd = if self.dice.once_in(3) { 512 } else { 0 };
        blocks as u64 * BLOCK_BYTES - odd
    }

    fn file(&mut self) -> u64 {
        self.next_file += 1;
        self.next_file
    }

    /// Its QEMU ends, and another one begins.
    pub(crate) fn restart(&mut self, ending: Ending) {
        self.boot += 1;
        self.freeze = None;
        self.pace = Pace::Runs;
        self.open.jobs.clear();
        self.open.exports.clear();
        self.open.server = None;
        self.disks.iter_mut().for_each(|disk| disk.image.close(ending));
    }

    /// Something happens to it while a process runs.
    pub(crate) fn meet(&mut self, happening: Happening) {
        let state = match happening {
            Happening::QemuDies => return self.restart(Ending::Killed),
            Happening::JobEndsUnseen => JobState::Live,
            Happening::JobEnds | Happening::ScratchFills => JobState::Gone,
            Happening::TornWrite | Happening::LostObject | Happening::TornIndex => return,
        };
        self.open.jobs.values_mut().for_each(|job| job.state = state);
    }

    /// Whether an export shows what it writes.
    pub(super) fn shows_live_data(&self) -> bool {
        self.open.jobs.values().any(|job| job.state == JobState::Live)
    }

    /// The process that asked for a freeze is gone, and perhaps the guardian with it.
    pub(crate) fn lose_process(&mut self) {
        if let Some(freeze) = &mut self.freeze {
            if self.dice.once_in(3) {
                freeze.guarded = false;
            } else {
                self.freeze = None;
            }
        }
        if self.pace == Pace::PausedByUs && !self.dice.once_in(3) {
            self.resume();
        }
    }
}
