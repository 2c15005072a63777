//! Any disk to any place, through the engine that backups use: `vmbackup copy`.
//!
//! ```text
//!  open source ► open target (refuse what does not fit) ► copy ► [read back, compare]
//!                 ► source still as it was opened? ► commit
//!                     any failure ─────────────────► abort
//! ```
//!
//! A new file has a temporary name until it is complete; an existing one is replaced or written in
//! place only when asked to. Proof (`verify`) costs no second read of the source: its content root
//! is computed from what passes, that of the target from what it gives back.

mod source;
mod target;

use std::fs::File;
use std::sync::Arc;

use serde::Serialize;

use super::source::{DiskSpec, ImageSpec};
use super::{Repository, Surroundings};
use crate::block::file::{Durability, PipeReader};
use crate::block::layer::throttle::{Rate, ThrottledSource};
use crate::block::{BlockSource, Budget};
use crate::content::ContentRoot;
use crate::control::{DiskProgress, NoticeLevel};
use crate::copy as engine;
use crate::error::{Error, Kind, Result};
use crate::nbd::{ClientOptions, NbdUri};

pub use crate::nbd::Retries;
use target::Opened;

pub use crate::image::Compression;
pub use engine::{REQUEST_BYTES_MAX, Zeroes};

/// Bytes in flight where nothing is said: room for requests that latency made large. Without
/// latency the usual number of usual requests is 8 MiB, which stays in the processor's cache.
const QUEUE_BYTES: usize = 64 << 20;

/// What to copy, where to, how.
#[derive(Debug)]
pub struct Request {
    /// Where the bytes come from.
    pub source: Source,
    /// What it is called in reports and errors.
    pub source_name: String,
    /// Where they go.
    pub target: Target,
    /// What it is called in reports and errors.
    pub target_name: String,
    /// How.
    pub options: Options,
}

/// Where bytes come from.
pub enum Source {
    /// The disk in an image or behind an NBD export.
    Disk(DiskSpec),
    /// A disk of a restore point.
    Point {
        /// The repository that holds the point.
        repository: Arc<Repository>,
        /// The point, as it was named.
        point: String,
        /// The disk; may be left out where the point has one.
        disk: Option<String>,
    },
    /// The default export of an NBD server that this command line starts.
    Command(Vec<String>),
    /// A pipe, read to its end.
    Pipe(File),
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Disk(disk) => f.debug_tuple("Disk").field(disk).finish(),
            Self::Point { point, disk, .. } => {
                f.debug_tuple("Point").field(point).field(disk).finish()
            }
            Self::Command(line) => f.debug_tuple("Command").field(line).finish(),
            Self::Pipe(_) => f.write_str("Pipe"),
        }
    }
}

/// Where bytes go.
#[derive(Debug)]
pub enum Target {
    /// An image file or a block device.
    Image {
        /// Which, in which format.
        image: ImageSpec,
        /// What becomes of a file that is there; a device is always written in place.
        existing: OnExisting,
        /// Whether a new image is compressed.
        compression: Compression,
    },
    /// An NBD export.
    Nbd(NbdUri),
    /// The default export of an NBD server that this command line starts.
    Command(Vec<String>),
    /// Nowhere.
    Null,
    /// A pipe.
    Pipe(File),
}

/// What becomes of a file that has the target's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExisting {
    /// It stays, and the copy fails.
    Refuse,
    /// The new one takes its place when it is complete.
    Replace,
    /// It is written over where it lies; what is behind the end of the source stays.
    WriteInPlace,
}

/// How to copy.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections to each NBD server.
    pub connections: Option<usize>,
    /// Requests in flight on each connection.
    pub requests: Option<u16>,
    /// Bytes of one request.
    pub request_bytes: Option<u64>,
    /// Bytes in flight.
    pub queue_bytes: Option<usize>,
    /// What becomes of zeroes.
    pub zeroes: Zeroes,
    /// What an existing target holds.
    pub before: Before,
    /// Size of a new target, if not the source's.
    pub target_bytes: Option<u64>,
    /// Whether the copy ends durable.
    pub flush: Flush,
    /// Bytes per second at most.
    pub rate_bytes: Option<u64>,
    /// Whether the target is read back and proven equal.
    pub verify: Verify,
    /// How often an end behind an NBD URI is opened again when it is lost.
    pub retries: Retries,
}

/// What an existing target holds before the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// Anything; it is asked.
    Unknown,
    /// Zeroes: the user knows.
    Zero,
}

/// Whether a copy ends durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// If the target can.
    Try,
    /// Or it fails.
    Require,
    /// No.
    Never,
}

/// Whether a copy is read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// No.
    No,
    /// Its content root is compared with that of the source.
    ReadBack,
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The source, as it was named.
    pub source: String,
    /// The target, as it was named.
    pub target: String,
    /// Size of the source.
    pub size_bytes: u64,
    /// Bytes read from the source.
    pub read_bytes: u64,
    /// Bytes written as data.
    pub written_bytes: u64,
    /// Bytes that are zero: left out, or made by the target.
    pub zero_bytes: u64,
    /// Whether all of it survives a power cut.
    pub durable: bool,
    /// The root of both ends, where they were proven equal.
    pub content_root: Option<ContentRoot>,
    /// Time it took.
    pub elapsed_ms: u64,
}

/// Copies. On an error nothing new has a name; a target written in place holds parts of both.
pub async fn run(request: Request, surroundings: Surroundings<'_>) -> Result<Report> {
    let Source::Point { repository, .. } = &request.source else {
        return copy_once(request, surroundings).await;
    };
    let repository = Arc::clone(repository);
    let work = Box::pin(copy_once(request, surroundings));
    repository.while_held(surroundings.1, work).await
}

async fn copy_once(request: Request, surroundings: Surroundings<'_>) -> Result<Report> {
    let started = surroundings.0.clock.now();
    check(&request)?;
    let Request { source, source_name, target, target_name, options } = request;
    let copying = Copying { names: (source_name, target_name), options, surroundings };
    let (copied, durable) = match source {
        Source::Pipe(pipe) => copying.copy_from_pipe(pipe, target).await?,
        source => copying.copy_from_disk(source, target).await?,
    };
    let Done { report, size_bytes, content_root } = copied;
    Ok(Report {
        source: copying.names.0,
        target: copying.names.1,
        size_bytes,
        read_bytes: report.read_bytes,
        written_bytes: report.written_bytes,
        zero_bytes: report.zero_bytes,
        durable,
        content_root,
        elapsed_ms: surroundings.0.elapsed_ms(started),
    })
}

/// Refuses what cannot be done before anything is opened.
fn check(request: &Request) -> Result<()> {
    let refuse = |message: String, hint: &str| Err(Error::new(Kind::Usage, message).hint(hint));
    let (source, target) = (&request.source_name, &request.target_name);
    if request.options.verify == Verify::ReadBack {
        if matches!(request.target, Target::Null | Target::Pipe(_)) {
            let message = format!("{target} cannot be read back");
            return refuse(message, "leave out --verify, or copy to a file");
        }
        if matches!(request.source, Source::Pipe(_)) {
            let message =
                format!("{source} has no size before its end, which its root begins with");
            return refuse(message, "leave out --verify, and compare 'vmbackup hash' of both ends");
        }
    }
    let is_new = |existing| existing != OnExisting::WriteInPlace;
    let made = matches!(&request.target, Target::Image { image, existing, .. }
        if is_new(*existing) && !crate::image::is_device(&image.path));
    if request.options.target_bytes.is_some() && !made {
        let message = format!("{target} is not made by this copy and keeps its size");
        return refuse(message, "leave out --target-size");
    }
    Ok(())
}

struct Copying<'a> {
    /// Of source and target.
    names: (String, String),
    options: Options,
    surroundings: Surroundings<'a>,
}

struct Done {
    report: engine::Report,
    size_bytes: u64,
    content_root: Option<ContentRoot>,
}

impl Copying<'_> {
    async fn copy_from_disk(&self, source: Source, target: Target) -> Result<(Done, bool)> {
        let control = self.surroundings.1;
        let source = (source, source::odd_end(&target));
        let opened =
            source::open(source, (self.client(), self.options.retries), self.surroundings).await?;
        source::refuse_itself(&opened, &target)?;
        let disk = Arc::clone(&opened.disk);
        let size_bytes = disk.geometry().size_bytes;
        let target_bytes = self.options.target_bytes.unwrap_or(size_bytes);
        let target = Opened::open(target, Some(target_bytes), self).await?;
        let options = self.engine_options(&target, engine::Destination::Overwritten)?;
        control.set_phase("copying");
        let progress = control.add_disk(&self.names.1, size_bytes);
        let copied = async {
            let copied = self.copy_disk(disk, (&target, &options), &progress).await?;
            opened.still_valid().await?;
            Ok(copied)
        };
        let (report, content_root) = match copied.await {
            Ok(copied) => copied,
            Err(error) => {
                return Err(reached(target.abort(error, control), &progress));
            }
        };
        let durable = target.commit(self.durability(), control).await?;
        opened.close().await?;
        Ok((Done { report, size_bytes, content_root }, durable))
    }

    async fn copy_disk(
        &self,
        disk: Arc<dyn BlockSource>,
        (target, options): (&Opened, &engine::Options),
        progress: &Arc<DiskProgress>,
    ) -> Result<(engine::Report, Option<ContentRoot>)> {
        let (env, control) = self.surroundings;
        let disk: Arc<dyn BlockSource> = match self.options.rate_bytes {
            Some(rate) => Arc::new(ThrottledSource::new(disk, Rate::new(rate))),
            None => disk,
        };
        let size_bytes = disk.geometry().size_bytes;
        if self.options.verify == Verify::No {
            let copied = engine::copy(disk, target.sink(), options, control, progress).await?;
            return Ok((copied, None));
        }
        let shown = (control, progress);
        let (report, root) =
            engine::copy_hashed(disk, target.sink(), &env.workers, options, shown).await?;
        control.set_phase("reading back");
        let found = self.read_back(target, size_bytes).await?;
        if found != root {
            let message = format!("{} does not give back what was written to it", self.names.1);
            return Err(Error::new(Kind::Mismatch, message)
                .hint(format!("content root of {}: {root}, read back: {found}", self.names.0)));
        }
        Ok((report, Some(root)))
    }

    async fn read_back(&self, target: &Opened, size_bytes: u64) -> Result<ContentRoot> {
        let (env, control) = self.surroundings;
        let name = format!("{} read back", self.names.1);
        let reader = source::front(target.reader()?, size_bytes);
        let progress = control.add_disk(&name, size_bytes);
        let options = engine::Options::new(name, "its content root");
        engine::content_root(reader, &options, &env.workers, control, &progress).await
    }

    async fn copy_from_pipe(&self, pipe: File, target: Target) -> Result<(Done, bool)> {
        let control = self.surroundings.1;
        let pipe = PipeReader::new(pipe, self.names.0.clone());
        let target = Opened::open(target, self.options.target_bytes, self).await?;
        control.set_phase("copying");
        let progress = control.add_disk(&self.names.1, 0);
        // Nothing is cleared in advance: what is behind the pipe's end stays.
        let options = self.engine_options(&target, engine::Destination::AsItSays)?;
        let copied = engine::copy_pipe(&pipe, target.sink(), &options, control, &progress).await;
        let report = match copied.and_then(|report| {
            self.refuse_surplus(report.read_bytes)?;
            target.set_len(report.read_bytes)?;
            Ok(report)
        }) {
            Ok(report) => report,
            Err(error) => {
                return Err(reached(target.abort(error, control), &progress));
            }
        };
        let durable = target.commit(self.durability(), control).await?;
        Ok((Done { report, size_bytes: report.read_bytes, content_root: None }, durable))
    }

    /// Fails when a pipe gave more than the target is to hold: an image may have more room while it
    /// is written.
    fn refuse_surplus(&self, read_bytes: u64) -> Result<()> {
        match self.options.target_bytes {
            Some(target_bytes) if read_bytes > target_bytes => {
                let (source, target) = &self.names;
                let message =
                    format!("{source} goes on after the {target_bytes} bytes of {target}");
                Err(Error::new(Kind::NoSpace, message).hint("make the target larger"))
            }
            _ => Ok(()),
        }
    }

    /// How NBD servers are spoken to.
    fn client(&self) -> ClientOptions {
        let default = ClientOptions::default();
        ClientOptions {
            connections: self.options.connections.unwrap_or(default.connections),
            in_flight: self.options.requests.unwrap_or(default.in_flight),
            ..default
        }
    }

    fn durability(&self) -> Durability {
        match self.options.flush {
            Flush::Never => Durability::Cached,
            Flush::Try | Flush::Require => Durability::Synced,
        }
    }

    fn engine_options(
        &self,
        target: &Opened,
        destination: engine::Destination,
    ) -> Result<engine::Options> {
        let options = &self.options;
        let names = (self.names.0.clone(), self.names.1.clone());
        let default = engine::Options::new(names.0, names.1);
        let connections = self.client().connections.max(1);
        let requests = options.requests.map(|requests| usize::from(requests) * connections);
        Ok(engine::Options {
            requests,
            request_bytes: options.request_bytes,
            budget: Budget::new(options.queue_bytes.unwrap_or(QUEUE_BYTES)),
            zeroes: match target {
                // Nobody reads what is not kept.
                Opened::Null(_) => Zeroes::Sparse { detect_bytes: None },
                _ => options.zeroes,
            },
            destination: match options.before {
                Before::Zero => engine::Destination::Zero,
                Before::Unknown => destination,
            },
            // What has blocks is an image or an export, where a shorter disk has nothing in them; what is
            // behind the end in files and devices stays, whose bytes can be written one by one.
            tail: engine::Tail::Zero,
            unchanged: engine::Unchanged::Read,
            flush: self.flush(target)?,
            source_name: default.source_name,
            sink_name: default.sink_name,
        })
    }

    /// What is flushed by the engine: what may take long, and where the user may stop it. New files are
    /// made durable once more when they get their names.
    fn flush(&self, target: &Opened) -> Result<engine::Flush> {
        if self.options.flush == Flush::Never {
            return Ok(engine::Flush::Never);
        }
        if target.can_flush() {
            return Ok(engine::Flush::AtEnd);
        }
        let message = format!("{} cannot be flushed", self.names.1);
        if self.options.flush == Flush::Require {
            return Err(Error::new(Kind::Unsupported, message).hint("leave out --flush"));
        }
        let text = format!("{message}: what was written may be lost in a power cut");
        self.surroundings.1.notice(NoticeLevel::Warning, text);
        Ok(engine::Flush::Never)
    }
}

/// An error with how far the copy had come.
fn reached(error: Error, progress: &DiskProgress) -> Error {
    match error.kind() {
        Kind::Cancelled | Kind::Usage | Kind::Mismatch => error,
        kind => {
            let done = progress.done_bytes();
            let room = kind == Kind::NoSpace && error.hint_text().is_none();
            let error = error.context(format!("the copy failed after {done} bytes"));
            if room {
                error.hint("free space at the target, or choose another place")
            } else {
                error
            }
        }
    }
}
