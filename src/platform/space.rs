//! The room that scratch has, and whether its file system answers: what every platform with scratch
//! files looks after.
//!
//! What the guest overwrites during a backup is kept in scratch files, and where they are full the
//! guest suffers, not the backup. So a part of their file system must stay free: where that is
//! touched the backup is given up. Asked before a backup begins and four times a second while it
//! runs; what others write there counts as well.
//!
//! Whoever asks a file system that hangs, hangs. So all that touches one is done on threads of their
//! own and waited for no longer than some time ([`aside`]), and whether it takes writes is asked by a
//! process of its own ([`Question`]).

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};
use tokio::process::Command;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::Problem;
use super::apart::Apart;
use crate::error::{Error, Kind, Result};

/// How often free space is looked at: a disk written at 1 GB/s fills the reserve in a second.
pub(super) const POLL: Duration = Duration::from_millis(250);

/// Longest wait for the file system of a scratch directory: a busy one takes seconds.
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// Longest wait for a scratch directory before there is an instant, when nothing of the guest waits:
/// write-back holds up the journal of a file system, and an idle disk spins up.
pub(super) const BEFORE: Duration = Duration::from_secs(30);

/// Longest wait for the removal of scratch files that hold what a guest overwrote, where the file
/// system has answered.
pub(super) const REMOVE: Duration = Duration::from_secs(300);

/// What helps where a scratch directory does not answer.
const ELSEWHERE: &str = "name another local directory with --scratch-dir, or run it again when this \
                         one answers";

/// Space that must stay free: a tenth of the file system, within these bounds.
const RESERVE_BYTES_MIN: u64 = 1 << 20;
const RESERVE_BYTES_MAX: u64 = 1 << 30;

/// Size and free bytes of the file system a directory is on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    pub(super) free_bytes: u64,
    size_bytes: u64,
}

impl Space {
    /// Asks the file system.
    pub(super) fn of(directory: &Path) -> Result<Self> {
        check_directory(directory)?;
        let stat = rustix::fs::statvfs(directory).map_err(|errno| {
            Error::io(format!("cannot use scratch directory {}", directory.display()), errno.into())
                .hint("name a local directory that QEMU may write to with --scratch-dir")
        })?;
        Ok(Self {
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            size_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }

    /// What may be used before the reserve is touched; none when it is.
    pub(super) fn usable_bytes(self) -> Option<u64> {
        let reserve = (self.size_bytes / 10).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX);
        self.free_bytes.checked_sub(reserve)
    }

    /// Whether the reserve is touched.
    pub(super) fn is_low(self) -> bool {
        self.usable_bytes().is_none()
    }
}

/// Fails when a directory of this machine that is to hold scratch files is none.
pub(super) fn check_directory(directory: &Path) -> Result<()> {
    let failed = |kind, why: &str| {
        let message = format!("scratch directory {} {why}", directory.display());
        Err(Error::new(kind, message)
            .hint("name a local directory that QEMU may write to with --scratch-dir"))
    };
    match directory.metadata() {
        Ok(data) if data.is_dir() => Ok(()),
        Ok(_) => failed(Kind::Usage, "is not a directory"),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            failed(Kind::Usage, "is below a file")
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            failed(Kind::NotFound, "does not exist")
        }
        // Whoever uses it says what is wrong.
        Err(_) => Ok(()),
    }
}

fn check(directory: &Path) -> Result<()> {
    let space = Space::of(directory).map_err(|error| {
        error.context("the space for scratch is not known any more; the guest comes first")
    })?;
    if space.is_low() { Err(no_room(directory)) } else { Ok(()) }
}

/// An error if scratch in `directory` is short of room, or if nobody can tell (any more), which is
/// a [`Kind::Timeout`] if its file system does not answer within `limit`. Cancel-safe.
pub(super) async fn check_aside(directory: &Path, limit: Duration) -> Result<()> {
    let asked = directory.to_owned();
    let asked = tokio::task::spawn_blocking(move || check(&asked));
    match tokio::time::timeout(limit, asked).await {
        // Not asked only where the program ends.
        Ok(checked) => checked.unwrap_or_else(|_| Ok(())),
        Err(_) => Err(silent(directory)),
    }
}

/// The room in `directory`.
pub(super) async fn space_of(directory: &Path) -> Result<Space> {
    let at = directory.to_owned();
    aside(directory, ANSWER, move || Space::of(&at)).await?
}

/// What speaks against scratch on a network file system: it holds up the guest with the network (magic
/// numbers of `linux/magic.h`: NFS, SMB2, CIFS, Ceph).
pub(super) async fn on_network(directory: &Path) -> Option<Problem> {
    const REMOTE: [i64; 4] = [0x6969, 0xfe53_4d42, 0xff53_4d42, 0x00c3_6400];
    let at = directory.to_owned();
    let stat = aside(directory, ANSWER, move || rustix::fs::statfs(&at)).await.ok()?.ok()?;
    REMOTE.contains(&stat.f_type).then(|| Problem {
        fatal: None,
        what: format!("scratch directory {} is on a network file system", directory.display()),
        fix: "name a local one with --scratch-dir: a stalled network would stall the guest".into(),
    })
}

/// Does what may hang with the file system of `directory`; fails with [`Kind::Timeout`] if it takes
/// longer than `limit`, and leaves it to itself then.
pub(super) async fn aside<T: Send + 'static>(
    directory: &Path,
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let what = || format!("scratch directory {} is not looked at", directory.display());
    match tokio::time::timeout(limit, tokio::task::spawn_blocking(work)).await {
        Ok(done) => done.map_err(|error| Error::new(Kind::Internal, what()).source(error)),
        Err(_) => Err(silent(directory)),
    }
}

/// Looks at what is in `directory`, whatever that is for; fails with [`Kind::Timeout`] if its file
/// system does not answer.
pub(crate) async fn look<T: Send + 'static>(
    directory: &Path,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    aside(directory, ANSWER, work).await.map_err(|error| plainly(directory, error))
}

/// An error of a directory, whatever that is for.
pub(super) fn plainly(directory: &Path, error: Error) -> Error {
    match error.kind() {
        Kind::Timeout => {
            let what = format!("directory {} does not answer", directory.display());
            Error::new(Kind::Timeout, what).hint("run it again when it does")
        }
        _ => error,
    }
}

/// Who asks, if anybody does.
type Asker = Arc<Mutex<Asked>>;

#[derive(Debug, Default)]
struct Asked {
    now: Option<Apart>,
    /// When the last question began that was answered: also for who came before that.
    answered: Option<Instant>,
}

/// Those who ask now, by what they touch, for all of this process.
static ASKERS: std::sync::Mutex<BTreeMap<PathBuf, Asker>> = std::sync::Mutex::new(BTreeMap::new());

/// Who asks `touched`.
fn asker(touched: &Path) -> Asker {
    let mut askers = ASKERS.lock().unwrap_or_else(PoisonError::into_inner);
    let hangs = |asker: &Asker| {
        let asking = asker.try_lock();
        asking.is_ok_and(|mut asked| asked.now.as_mut().is_some_and(|asking| !asking.is_over()))
    };
    askers.retain(|_, asker| Arc::strong_count(asker) > 1 || hangs(asker));
    Arc::clone(askers.entry(touched.to_owned()).or_default())
}

/// Whether the file system of a scratch directory takes writes now.
///
/// All of a process ask a directory through one process or thread at a time: one that hangs cannot be
/// ended, and is waited for instead of a further one, also by a run that begins long after.
#[derive(Clone, Debug)]
pub(super) struct Question {
    directory: PathBuf,
    /// What is touched.
    touched: PathBuf,
    asking: Asker,
}

impl Drop for Question {
    /// Nobody waits any more. One that cannot be killed stays with the askers.
    fn drop(&mut self) {
        // Theirs and ours.
        if Arc::strong_count(&self.asking) <= 2
            && let Ok(mut asked) = self.asking.try_lock()
            && let Some(asking) = &mut asked.now
        {
            asking.kill();
        }
    }
}

impl Question {
    /// The question; nobody asks yet. A link is asked itself.
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { touched: directory.clone(), asking: asker(&directory), directory }
    }

    /// The same, of what a link leads to.
    pub(super) fn behind(directory: PathBuf) -> Self {
        let touched = directory.join(".");
        Self { asking: asker(&touched), touched, directory }
    }

    /// Fails with [`Kind::Timeout`] if it takes none, or if nobody could ask it. Whatever else it says
    /// is an answer. Cancel-safe.
    ///
    /// Not noticed is a device that hangs below a cache which still takes them.
    pub(super) async fn answers(&self) -> Result<()> {
        match tokio::time::timeout(ANSWER, self.ask()).await {
            Ok(Ok(())) => Ok(()),
            // Nobody knows: as if it did not answer, which takes as long for those who ask again.
            Ok(Err(error)) => {
                tokio::time::sleep(ANSWER).await;
                Err(self.silent().source(error))
            }
            Err(_) => Err(self.silent()),
        }
    }

    fn silent(&self) -> Error {
        silent(&self.directory).hint(
            "QEMU is left alone until it does; then run 'vmbackup recover' or the next backup",
        )
    }

    async fn ask(&self) -> io::Result<()> {
        let came = Instant::now();
        let mut asked = self.asking.lock().await;
        // Of many who wait the next one asks for all.
        if asked.answered.is_some_and(|begun| begun >= came) {
            return Ok(());
        }
        // One that has ended since says nothing about now.
        if asked.now.as_mut().is_some_and(Apart::is_over) {
            asked.now = None;
        }
        // One that goes on was begun before any of us came.
        let begun = asked.now.is_none().then(Instant::now);
        let asks = asked.now.get_or_insert_with(|| ask(TOUCH, &self.touched));
        let answered = asks.end(touch(&self.touched)).await;
        asked.now = None;
        if answered.is_ok() {
            asked.answered = begun;
        }
        answered
    }
}

/// What asks: it sets the times of a file or directory, makes nothing, and follows no link.
const TOUCH: &str = "touch";

fn ask(program: &str, touched: &Path) -> Apart {
    let mut command = Command::new(program);
    command.args(["-c", "-h", "--"]).arg(touched);
    Apart::begin(command, touch(touched))
}

/// The same, for a thread.
fn touch(touched: &Path) -> impl FnOnce() + Send + 'static {
    let touched = touched.to_owned();
    move || {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        // Whatever it says.
        if let Err(error) = utimensat(CWD, &touched, &times, AtFlags::SYMLINK_NOFOLLOW) {
            tracing::debug!(%error, "scratch answers");
        }
    }
}

/// Fails with [`Kind::Timeout`] if `directory`, or what it is a link to, takes no writes.
pub(super) async fn answers(directory: &Path) -> Result<()> {
    let question = Question::behind(directory.to_owned());
    let until = Instant::now() + BEFORE;
    loop {
        match question.answers().await {
            Err(error) if Instant::now() >= until => {
                return Err(silent(directory).source(error));
            }
            Err(error) => tracing::warn!(%error, "waiting for the scratch directory"),
            Ok(()) => return Ok(()),
        }
    }
}

/// The same, whatever `directory` is for.
pub(crate) async fn takes_writes(directory: &Path) -> Result<()> {
    answers(directory).await.map_err(|error| plainly(directory, error))
}

/// Fails unless `directory` is one that takes writes now.
pub(super) async fn check_writes(directory: &Path) -> Result<()> {
    answers(directory).await?;
    let at = directory.to_owned();
    aside(directory, BEFORE, move || check_directory(&at)).await?
}

fn silent(directory: &Path) -> Error {
    let what = format!("scratch directory {} does not answer", directory.display());
    Error::new(Kind::Timeout, what).hint(ELSEWHERE)
}

/// The error of a scratch directory that has no room.
pub(super) fn no_room(directory: &Path) -> Error {
    Error::new(
        Kind::NoSpace,
        format!("scratch directory {} is almost full; the guest comes first", directory.display()),
    )
    .hint("free space there, or name a larger local directory with --scratch-dir")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::SystemTime;

    use super::*;

    /// A directory that was last written to long ago.
    fn old() -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a place for temporary files");
        let file = File::open(directory.path()).expect("own directory");
        file.set_modified(SystemTime::UNIX_EPOCH).expect("own directory");
        directory
    }

    fn is_touched(directory: &Path) -> bool {
        let modified = directory.metadata().and_then(|data| data.modified());
        modified.expect("own directory") > SystemTime::UNIX_EPOCH
    }

    async fn answer_of(question: &Question, asking: Apart) -> Result<()> {
        question.asking.lock().await.now = Some(asking);
        question.answers().await
    }

    #[tokio::test]
    async fn a_directory_that_takes_writes_answers() {
        let directory = old();
        Question::new(directory.path().to_owned()).answers().await.expect("it answers");
        assert!(is_touched(directory.path()));
    }

    /// Scratch was taken to answer where nobody had asked it, and a job could be ended while it hung.
    #[tokio::test]
    async fn scratch_is_asked_where_no_process_can_be_started() {
        let directory = old();
        let mut asking = ask("no-such-touch", directory.path());
        assert!(matches!(asking, Apart::Thread(_)), "{asking:?}");
        asking.over().await.expect("it asks");
        assert!(is_touched(directory.path()));
    }

    #[tokio::test]
    async fn scratch_is_asked_where_the_process_did_not_get_to_it() {
        let directory = old();
        let question = Question::new(directory.path().to_owned());
        // As the loader does where it can open nothing more.
        let failing = Command::new("sh").args(["-c", "sleep 0.3; exit 127"]).spawn();
        let failing = Apart::Process(failing.expect("sh runs"));
        answer_of(&question, failing).await.expect("a thread asked");
        assert!(is_touched(directory.path()));
    }

    #[tokio::test(start_paused = true)]
    async fn scratch_that_nobody_could_ask_does_not_answer() {
        let directory = old();
        let question = Question::new(directory.path().to_owned());
        let broken = tokio::spawn(std::future::pending());
        broken.abort();
        let error = answer_of(&question, Apart::Thread(broken)).await.expect_err("unknown");
        assert_eq!(error.kind(), Kind::Timeout);
        // The one that hangs is waited for, and no other begun.
        let hanging = tokio::spawn(std::future::pending());
        let error = answer_of(&question, Apart::Thread(hanging)).await.expect_err("it hangs");
        assert_eq!(error.kind(), Kind::Timeout);
        question.answers().await.expect_err("it still hangs");
        assert!(!is_touched(directory.path()));
    }

    /// Found in review: each attempt of a daemon left another process or thread that hung.
    #[tokio::test(start_paused = true)]
    async fn one_that_hangs_is_waited_for_by_whoever_asks_later() {
        let directory = old();
        let question = Question::new(directory.path().to_owned());
        let (answer, hanging) = tokio::sync::oneshot::channel();
        let hanging = tokio::spawn(async { hanging.await.expect("it is answered") });
        answer_of(&question, Apart::Thread(hanging)).await.expect_err("it hangs");
        drop(question);
        let later = Question::new(directory.path().to_owned());
        later.answers().await.expect_err("it still hangs");
        assert!(matches!(later.asking.lock().await.now, Some(Apart::Thread(_))), "another began");
        answer.send(()).expect("somebody waits");
        later.answers().await.expect("it answers");
        drop(later);
        drop(Question::new(directory.path().join("other")));
        assert!(!ASKERS.lock().expect("whole").contains_key(directory.path()), "it is forgotten");
    }

    /// Found in review: each of many that waited for a slow one asked it once more, one after the other.
    #[tokio::test]
    async fn one_answer_is_for_all_who_came_before_the_question() {
        let directory = old();
        let question = Question::new(directory.path().to_owned());
        question.asking.lock().await.answered = Some(Instant::now() + Duration::from_secs(1));
        question.answers().await.expect("it has answered");
        assert!(!is_touched(directory.path()));
        question.asking.lock().await.answered = Some(Instant::now());
        tokio::time::sleep(Duration::from_millis(2)).await;
        question.answers().await.expect("it answers");
        assert!(is_touched(directory.path()), "an answer of before says nothing about now");
    }

    #[tokio::test]
    async fn an_error_is_an_answer() {
        let directory = old();
        let gone = directory.path().join("gone");
        Question::new(gone.clone()).answers().await.expect("it answers");
        let question = Question::new(gone.clone());
        answer_of(&question, Apart::on_thread(touch(&gone))).await.expect("it answers");
    }
}
