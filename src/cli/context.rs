//! What every command gets: streams, directories, the handle to stop it, the way to a repository.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::{CommonArgs, RepositoryArgs};
use super::output::{Output, say};
use super::progress::{self, Style};
use super::prompt;
use super::settings::{self, KeySource, Paths};
use super::stop;
use crate::clock::SystemClock;
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::job::{self, Credentials};
use crate::workers::Workers;

/// Signals this close together are one request to stop.
const ONE_REQUEST: Duration = Duration::from_secs(1);

/// The surroundings of a command.
#[derive(Debug)]
pub(crate) struct Context {
    /// Where results and talk go.
    pub(crate) output: Output,
    /// Stops the job and shows its progress.
    pub(crate) control: Control,
    /// Directories of this user.
    pub(crate) paths: Paths,
    /// What jobs borrow: clock, worker threads, directories.
    pub(crate) env: job::Env,
    style: Style,
}

impl Context {
    /// The surroundings that options, environment and terminal make.
    pub(crate) fn new(common: &CommonArgs, output: Output, workers: Workers) -> Result<Self> {
        let paths = Paths::from_environment()?;
        let style = match common {
            CommonArgs { no_progress: true, .. } | CommonArgs { quiet: true, .. } => Style::Off,
            CommonArgs { json: true, .. } => Style::Json,
            // Log lines and bars do not mix.
            CommonArgs { verbose: 0, .. } if std::io::stderr().is_terminal() => Style::Bars,
            _ => Style::Lines,
        };
        let env = job::Env {
            clock: Arc::new(SystemClock),
            workers,
            zone: zone(),
            state_dir: paths.state.clone(),
            runtime_dir: paths.runtime.clone(),
            cache_dir: paths.cache.clone(),
            guardian: std::env::current_exe().ok(),
            repository_answer: settings::repository_answer()?,
            probe: stop::probe()?,
        };
        Ok(Self { output, control: Control::new(), paths, env, style })
    }

    /// Runs a job and shows its progress and notices.
    pub(crate) async fn watch<T>(&self, work: impl Future<Output = T>) -> T {
        progress::watch(&self.control, (self.output, self.style), work).await
    }

    /// Runs a command until it ends. The first Ctrl-C (or SIGTERM, SIGHUP) asks it to abort
    /// cleanly, the second leaves at once.
    pub(crate) async fn until_stopped(&self, work: impl Future<Output = Result<()>>) -> Result<()> {
        let mut signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
            .into_iter()
            .map(signal)
            .collect::<std::io::Result<Vec<Signal>>>()
            .map_err(|e| Error::io("cannot watch for signals", e))?;
        let mut work = std::pin::pin!(work);
        tokio::select! {
            biased;
            result = &mut work => return result,
            () = any(&mut signals) => {}
        }
        self.control.cancel();
        if !self.output.json {
            say("stopping; once more leaves without cleaning up");
        }
        let asked = Instant::now();
        let again = async {
            // `timeout` signals the process and then its group: one request, two signals.
            any(&mut signals).await;
            while asked.elapsed() < ONE_REQUEST {
                any(&mut signals).await;
            }
        };
        tokio::select! {
            biased;
            result = &mut work => result,
            () = again => Err(Error::new(Kind::Cancelled, "left without cleaning up")
                .hint("'vmbackup recover', or the next backup of the VM, removes what is left; \
                       'vmbackup list' has the point if it was stored already")),
        }
    }

    /// Does `work` with the repository that is named and what opens it: the file that an option
    /// names, or nothing, and a password asked for on the terminal if that does not do.
    pub(crate) async fn unlock<T>(
        &self,
        args: &RepositoryArgs,
        work: impl AsyncFn(&Path, &Credentials) -> Result<T>,
    ) -> Result<T> {
        let choice = settings::repository(args, &self.paths)?;
        let location = choice.path();
        let keys = settings::repository_key(args.password_file.as_ref(), args.key_file.as_ref());
        if let Some(given) = secret(&keys, Purpose::Opens, &self.control).await? {
            return work(location, &given).await;
        }
        let error = match work(location, &Credentials::None).await {
            Err(error) if error.kind() == Kind::WrongKey => error,
            result => return result,
        };
        let question = format!("Password for {}: ", location.display());
        match prompt::ask(&question, &self.control).await? {
            Some(password) => work(location, &Credentials::Password(password)).await,
            None => Err(error),
        }
    }
}

/// What a secret is for: which options name its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// It opens a repository, or is to open the one being made.
    Opens,
    /// It is to open the repository from now on, too.
    Added,
}

/// The secret in a file; `None` when it is to be asked for.
pub(crate) async fn secret(
    source: &KeySource,
    purpose: Purpose,
    control: &Control,
) -> Result<Option<Credentials>> {
    let named = |option: &'static str| {
        move |error: Error| match error.kind() {
            Kind::NotFound | Kind::Permission => {
                error.hint(format!("{option} names it: name one this user can read"))
            }
            _ => error,
        }
    };
    Ok(match (source, purpose) {
        (KeySource::Ask, _) => None,
        (KeySource::PasswordFile(file), purpose) => {
            let option = match purpose {
                Purpose::Opens => "--password-file or VMBACKUP_PASSWORD_FILE",
                Purpose::Added => "--new-password-file",
            };
            let password = prompt::password_file(file, control).await;
            Some(Credentials::Password(password.map_err(named(option))?))
        }
        (KeySource::KeyFile(file), purpose) => {
            let option = match purpose {
                Purpose::Opens => "--key-file",
                Purpose::Added => "--new-key-file",
            };
            Some(Credentials::KeyFile(
                prompt::key_file(file, control).await.map_err(named(option))?,
            ))
        }
    })
}

/// Waits for any of the signals.
async fn any(signals: &mut [Signal]) {
    std::future::poll_fn(|context| {
        let one = signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
        if one { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// The time zone of this machine, or the one that `TZ` names. The system's own is read from its file:
/// looked up by name, it would cost each start a walk through the whole database.
fn zone() -> jiff::tz::TimeZone {
    let own = match std::env::var_os("TZ") {
        Some(_) => None,
        None => std::fs::read("/etc/localtime").ok(),
    };
    let parsed = own.and_then(|file| jiff::tz::TimeZone::tzif("/etc/localtime", &file).ok());
    parsed.unwrap_or_else(jiff::tz::TimeZone::system)
}
