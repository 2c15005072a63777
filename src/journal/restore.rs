//! The journal of a restore: which files it makes and what they take the place of.
//!
//! ```text
//!  state directory/journal/restore-<random>.jsonl       locked (flock) as long as the restore lives
//!    the restore (point, VM, boot)
//!    step                                               durable ► taken
//!    step …
//! ```
//!
//! - *One file per restore*, to which steps are added; two restores of one VM into different places may
//!   run at once. The lock tells a restore that runs from one that was killed.
//! - *A step is durable before it is taken.* The last line may be torn: its step was not taken.
//! - *What was put in place is known by its stamp* ([`FileStamp`]): whoever undoes a restore can tell
//!   whether a file is the one that was left, and whether it was used since.
//! - [`Step::Discard`] *decides*: before it the restore is undone, from it on what it replaced goes.
//!   Between a definition and that step only libvirt knows; [`Step::Define`] has what it said before.
//!
//! Who undoes it is [`crate::job`]'s business. A journal is removed when none of the temporary names is
//! in use any more.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Journals, Moment, Phase, Probe, any_path, call, file};
use crate::block::file::{FileStamp, Placed};
use crate::error::{Error, Result};
use crate::vm::{PointId, Uuid, VmIdentity};

/// Version of the file. A newer one is not understood, and counts as unreadable.
const VERSION: u32 = 1;
/// Largest file read: a restore of hundreds of disks takes some hundred KiB.
const FILE_BYTES_MAX: u64 = 4 << 20;
const PREFIX: &str = "restore-";
const SUFFIX: &str = ".jsonl";
/// Attempts to make a file that nobody takes for abandoned in the moment before it is locked.
const ATTEMPTS: u32 = 8;

/// A restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRun {
    version: u32,
    /// What it restores.
    pub point: PointId,
    /// Whose point that is.
    pub vm: VmIdentity,
}

impl RestoreRun {
    /// One that has done nothing yet.
    pub fn new(point: PointId, vm: VmIdentity) -> Self {
        Self { version: VERSION, point, vm }
    }
}

/// Something that a restore did, or was about to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// A directory is made for it.
    Directory {
        /// Its name.
        #[serde(with = "any_path")]
        path: PathBuf,
    },
    /// A file or directory is made.
    Temporary {
        /// Its name until it is complete, which nothing else has.
        #[serde(with = "any_path")]
        temporary: PathBuf,
    },
    /// A device is written.
    Overwrite {
        /// The device.
        #[serde(with = "any_path")]
        path: PathBuf,
    },
    /// Something complete gets its name.
    Place(Placing),
    /// A domain is defined.
    Define {
        /// At which libvirt.
        uri: String,
        /// Its UUID.
        uuid: Uuid,
        /// A hash of the description it had; `None` if there was no such domain.
        before: Option<String>,
    },
    /// All is in place: what was replaced goes.
    Discard,
    /// Somebody began to undo it.
    Undo,
}

/// Something complete that gets its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placing {
    /// The name it had; what it replaces gets it.
    #[serde(with = "any_path")]
    pub temporary: PathBuf,
    /// The name it gets.
    #[serde(with = "any_path")]
    pub path: PathBuf,
    /// What it is.
    pub new: FileStamp,
    /// What it replaces.
    pub old: Option<FileStamp>,
}

/// The journal of one restore. All writes block as long as a sync takes.
pub struct RestoreJournal {
    /// `None` if nothing is written down.
    file: Option<(File, PathBuf)>,
    run: RestoreRun,
    steps: Vec<Step>,
    /// In the temporary names.
    id: String,
    probe: Option<Probe>,
}

impl Journals {
    /// Begins the journal of a restore; `id` is random.
    pub fn begin_restore(&self, run: RestoreRun, id: u64) -> Result<RestoreJournal> {
        let id = format!("{id:016x}");
        let path = self.directory.join(format!("{PREFIX}{id}{SUFFIX}"));
        let failed = |e| Error::io(format!("cannot write {}", path.display()), e);
        file::make(&self.directory).map_err(failed)?;
        for _ in 0..ATTEMPTS {
            let mut options = OpenOptions::new();
            let file = options.read(true).append(true).create(true).mode(0o600).open(&path);
            let file = file.map_err(failed)?;
            // Whoever looks for abandoned ones may be faster, and removes it: it is empty.
            flock(&file, FlockOperation::LockExclusive).map_err(|e| failed(e.into()))?;
            if file::is_at(&file, &path).map_err(failed)? {
                let probe = self.probe.clone();
                let file = Some((file, path.clone()));
                let mut journal = RestoreJournal { file, run, steps: Vec::new(), id, probe };
                let begun = journal.write(&journal.run.clone());
                begun.and_then(|()| file::sync(&self.directory).map_err(failed))?;
                return Ok(journal);
            }
        }
        Err(failed(ErrorKind::AlreadyExists.into()))
    }

    /// The journal of a restore that cannot write one: it names files, and calls the probe.
    pub fn unkept_restore(&self, run: RestoreRun, id: u64) -> RestoreJournal {
        let (id, probe) = (format!("{id:016x}"), self.probe.clone());
        RestoreJournal { file: None, run, steps: Vec::new(), id, probe }
    }

    /// The journals of restores that were killed, locked: nobody else works on them meanwhile.
    pub fn abandoned_restores(&self) -> Result<Vec<Abandoned>> {
        let failed = |e| Error::io(format!("cannot look into {}", self.directory.display()), e);
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            let Some(name) = name.to_str() else { continue };
            let id = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
            if let Some(id) = id {
                found.extend(self.abandoned(id)?);
            }
        }
        found.sort_by(|a, b| a.path().cmp(b.path()));
        Ok(found)
    }

    fn abandoned(&self, id: &str) -> Result<Option<Abandoned>> {
        let path = self.directory.join(format!("{PREFIX}{id}{SUFFIX}"));
        let failed = |e| Error::io(format!("cannot read {}", path.display()), e);
        let mut file = match OpenOptions::new().read(true).append(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        if !lock(&file, &path).map_err(failed)? {
            return Ok(None);
        }
        let mut text = Vec::new();
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        (&file).take(FILE_BYTES_MAX).read_to_end(&mut text).map_err(failed)?;
        // A torn line is that of a step that was not taken.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if whole < text.len() {
            file.set_len(whole as u64).map_err(failed)?;
        }
        let mut lines = text[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let run = match lines.next().map(serde_json::from_slice::<RestoreRun>) {
            // Nothing was done before the first line was there.
            None => {
                fs::remove_file(&path).map_err(failed)?;
                return Ok(None);
            }
            Some(run) => run.ok().filter(|run| run.version == VERSION),
        };
        let steps = lines.map(serde_json::from_slice).collect::<Result<Vec<Step>, _>>();
        let (Some(run), Ok(steps)) = (run, steps) else {
            tracing::warn!(path = %path.display(), "a journal makes no sense");
            return Ok(Some(Abandoned::Unreadable(path)));
        };
        let (id, probe) = (id.to_owned(), self.probe.clone());
        let file = Some((file, path));
        Ok(Some(Abandoned::Restore(RestoreJournal { file, run, steps, id, probe })))
    }
}

/// A journal whose restore was killed.
pub enum Abandoned {
    /// What it did.
    Restore(RestoreJournal),
    /// It makes no sense: nobody knows what is to be undone.
    Unreadable(PathBuf),
}

impl Abandoned {
    fn path(&self) -> &Path {
        match self {
            Self::Restore(journal) => journal.path(),
            Self::Unreadable(path) => path,
        }
    }
}

impl RestoreJournal {
    /// Where it is; empty if nothing is written down.
    pub fn path(&self) -> &Path {
        self.file.as_ref().map_or(Path::new(""), |(_, path)| path)
    }

    /// The restore.
    pub fn run(&self) -> &RestoreRun {
        &self.run
    }

    /// What it did, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Writes down, for good, what is about to be done.
    pub fn note(&mut self, step: Step) -> Result<()> {
        self.write(&step)?;
        self.steps.push(step);
        Ok(())
    }

    /// A name for what will be `path`, written down; nothing else has it.
    pub fn temporary(&mut self, path: &Path) -> Result<PathBuf> {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}.part", self.id));
        let temporary = absolute(path)?.with_file_name(name);
        self.note(Step::Temporary { temporary: temporary.clone() })?;
        Ok(temporary)
    }

    /// Writes down that `temporary`, which is complete and durable, is about to be `path`.
    pub fn place(&mut self, temporary: &Path, path: &Path) -> Result<()> {
        let (temporary, path) = (absolute(temporary)?, absolute(path)?);
        let failed = |e| Error::io(format!("cannot examine {}", path.display()), e);
        let new = FileStamp::of(&temporary).map_err(failed)?;
        let new = new.ok_or_else(|| failed(ErrorKind::NotFound.into()))?;
        let old = FileStamp::of(&path).map_err(failed)?;
        self.note(Step::Place(Placing { temporary, path, new, old }))
    }

    /// [`Journals::before`].
    pub fn before(&self, phase: Phase) {
        call(self.probe.as_ref(), phase, Moment::Before);
    }

    /// [`Journals::after`].
    pub fn after(&self, phase: Phase) {
        call(self.probe.as_ref(), phase, Moment::After);
    }

    /// Ends it. It stays, to be found by whoever comes next, while one of its temporary names is in
    /// use.
    pub fn close(self) -> Result<()> {
        let in_use = |path: &Path| path.symlink_metadata().is_ok();
        let left = self.steps.iter().any(|step| match step {
            Step::Temporary { temporary } => in_use(temporary) || in_use(&Placed::aside(temporary)),
            _ => false,
        });
        if left { Ok(()) } else { self.remove() }
    }

    /// Removes it: nothing is left to undo.
    pub fn remove(self) -> Result<()> {
        let Some((_lock, path)) = &self.file else { return Ok(()) };
        let failed = |e| Error::io(format!("cannot remove {}", path.display()), e);
        fs::remove_file(path).map_err(failed)
    }

    fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let Some((file, path)) = &mut self.file else { return Ok(()) };
        let failed = |e| Error::io(format!("cannot write {}", path.display()), e);
        let mut text = serde_json::to_vec(line).expect("a step is plain data");
        text.push(b'\n');
        let before = file.metadata().map_err(failed)?.len();
        file.write_all(&text).and_then(|()| file.sync_data()).map_err(|error| {
            // Whatever comes next must not follow on half a line.
            let _ = file.set_len(before);
            failed(error)
        })
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Error::io(format!("cannot make {} absolute", path.display()), e))
}

/// Takes the lock; `false` if somebody has it, or the file has lost its name.
fn lock(file: &File, path: &Path) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    file::is_at(file, path)
}
