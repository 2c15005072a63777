//! Freezing the guest's file systems around the instant, with a budget nobody can overrun.
//!
//! ```text
//!  freeze ──► frozen ──► (the transaction) ──► stand down ──► thaw ──► level, measured time
//!     │          └── budget over, or the caller gone: the guardian thaws at once
//!     └── error or no answer: thaw all the same, a late freeze may still happen
//! ```
//!
//! The guardian is a task of its own that owns the agent connection and always thaws: the two
//! ends of its wait differ only in what they report. It does not outlive the process.

use std::path::Path;
use std::time::Duration;

use qmp::{Address, Agent, AgentOptions};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::error::{Error, Kind, Result};
use crate::platform::Quiesce;
use crate::vm::{Consistency, Quiescence};

/// Longest wait for one thaw, and how often it is tried: a guest that does not answer may be
/// frozen, so it is asked again.
const THAW: Duration = Duration::from_secs(10);
const THAW_ATTEMPTS: usize = 3;

/// Guest file systems around the instant.
pub(super) enum Frozen {
    /// Not frozen, for the reason given (none: not asked for).
    No(Option<String>),
    /// Frozen; [`Frozen::thaw`] should follow, the guardian thaws in any case.
    Yes(Guardian),
}

/// Watches over a frozen guest.
pub(super) struct Guardian {
    stand_down: oneshot::Sender<()>,
    task: JoinHandle<Watched>,
    count: i64,
    since: Instant,
    budget: Duration,
}

/// How a watch ended.
struct Watched {
    expired: bool,
    thawed: Result<i64, qmp::Error>,
    at: Instant,
}

/// Freezes if asked for and possible. Fails only for [`Quiesce::Require`].
pub(super) async fn freeze(
    agent: Option<&Path>,
    quiesce: Quiesce,
    budget: Duration,
    running: bool,
) -> Result<Frozen> {
    let reason = match (quiesce, agent) {
        (Quiesce::Never, _) => return Ok(Frozen::No(None)),
        (_, None) => "no guest agent socket was given (--agent)".to_owned(),
        _ if !running => "the guest is paused, its agent cannot answer".to_owned(),
        (_, Some(socket)) => match try_freeze(socket, budget).await {
            Ok(frozen) => return Ok(frozen),
            Err(reason) => reason,
        },
    };
    if quiesce == Quiesce::Require {
        return Err(Error::new(
            Kind::Unsupported,
            format!("cannot freeze the guest's file systems: {reason}"),
        )
        .hint("install and start qemu-guest-agent in the guest, or use --quiesce auto"));
    }
    Ok(Frozen::No(Some(reason)))
}

async fn try_freeze(socket: &Path, budget: Duration) -> Result<Frozen, String> {
    let address = Address::Unix(socket.to_owned());
    let mut agent =
        Agent::connect(&address, AgentOptions::default()).await.map_err(|e| with_causes(&e))?;
    let since = Instant::now();
    match agent.freeze(budget).await {
        Ok(count) => {
            let (stand_down, stood_down) = oneshot::channel();
            let task = tokio::spawn(watch(agent, stood_down, since + budget));
            Ok(Frozen::Yes(Guardian { stand_down, task, count, since, budget }))
        }
        Err(error) => {
            if let Err(error) = thaw(&mut agent).await {
                tracing::error!(%error, "cannot thaw the guest after a failed freeze");
            }
            Err(with_causes(&error))
        }
    }
}

async fn watch(mut agent: Agent, stood_down: oneshot::Receiver<()>, until: Instant) -> Watched {
    // An error of the channel is a caller that went away: thaw at once, as for "stand down".
    let expired = tokio::time::timeout_at(until, stood_down).await.is_err();
    let thawed = thaw(&mut agent).await;
    if let Err(error) = &thawed {
        tracing::error!(%error, "cannot thaw the guest");
    }
    Watched { expired, thawed, at: Instant::now() }
}

async fn thaw(agent: &mut Agent) -> Result<i64, qmp::Error> {
    let mut result = agent.thaw(THAW).await;
    for _ in 1..THAW_ATTEMPTS {
        match result {
            Ok(_) => break,
            Err(_) => result = agent.thaw(THAW).await,
        }
    }
    result
}

impl Frozen {
    /// Thaws and says what was achieved.
    pub(super) async fn thaw(self) -> Quiescence {
        let crash = |frozen_ms, reason| Quiescence { level: Consistency::Crash, frozen_ms, reason };
        let guardian = match self {
            Self::No(reason) => return crash(None, reason),
            Self::Yes(guardian) => guardian,
        };
        let Guardian { stand_down, task, count, since, budget } = guardian;
        // Fails only if the budget ended already: then it thaws without being told.
        let _ = stand_down.send(());
        let Ok(Watched { expired, thawed, at }) = task.await else {
            return crash(None, Some("the thaw ended in a panic".into()));
        };
        let frozen = at - since;
        let reason = match thawed {
            Err(error) => Some(format!("the thaw failed: {}", with_causes(&error))),
            _ if expired || frozen > budget => Some(format!("frozen for longer than {budget:?}")),
            _ if count == 0 => Some("the guest agent found no file system to freeze".into()),
            Ok(thawed) if thawed < count => {
                Some("file systems had been thawed before the end".into())
            }
            Ok(_) => None,
        };
        let frozen_ms = Some(u64::try_from(frozen.as_millis()).unwrap_or(u64::MAX));
        match reason {
            None => Quiescence { level: Consistency::Filesystem, frozen_ms, reason },
            reason => crash(frozen_ms, reason),
        }
    }
}

/// A cause as the reason of a level, which is one line of text in the manifest.
fn with_causes(error: &qmp::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;

    /// An agent on `socket` that answers everything, and the commands it was given in the end.
    fn agent(socket: &Path) -> JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(socket).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (reader, mut writer) = stream.into_split();
            let (mut lines, mut heard, mut line) = (BufReader::new(reader), vec![], vec![]);
            while lines.read_until(b'\n', &mut line).await.unwrap() > 0 {
                let text = line.strip_prefix(&[0xff]).unwrap_or(&line);
                let command: serde_json::Value = serde_json::from_slice(text).unwrap();
                let name = command["execute"].as_str().unwrap().to_owned();
                let answer = match name.as_str() {
                    "guest-sync-delimited" => {
                        writer.write_all(&[0xff]).await.unwrap();
                        command["arguments"]["id"].clone()
                    }
                    _ => 2.into(),
                };
                let answer = format!("{}\n", serde_json::json!({ "return": answer }));
                writer.write_all(answer.as_bytes()).await.unwrap();
                heard.push(name);
                line.clear();
            }
            heard
        })
    }

    const FREEZE_THAW: [&str; 3] =
        ["guest-sync-delimited", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];

    #[tokio::test]
    async fn a_freeze_within_its_budget_is_file_system_consistent() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let heard = agent(&socket);
        let budget = Duration::from_secs(30);
        let frozen = freeze(Some(&socket), Quiesce::Require, budget, true).await.unwrap();
        let quiescence = frozen.thaw().await;
        assert_eq!(quiescence.level, Consistency::Filesystem);
        assert!(quiescence.frozen_ms.is_some() && quiescence.reason.is_none());
        assert_eq!(heard.await.unwrap(), FREEZE_THAW);
    }

    #[tokio::test]
    async fn a_budget_that_ends_thaws_by_itself_and_is_crash_consistent() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let heard = agent(&socket);
        let budget = Duration::from_millis(200);
        let frozen = freeze(Some(&socket), Quiesce::Auto, budget, true).await.unwrap();
        // Nobody thaws: the guardian does, and hangs up.
        assert_eq!(heard.await.unwrap(), FREEZE_THAW);
        let quiescence = frozen.thaw().await;
        assert_eq!(quiescence.level, Consistency::Crash);
        assert!(quiescence.reason.unwrap().contains("frozen for longer"));
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_leaves_no_frozen_guest() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let heard = agent(&socket);
        let budget = Duration::from_secs(600);
        drop(freeze(Some(&socket), Quiesce::Auto, budget, true).await.unwrap());
        assert_eq!(heard.await.unwrap(), FREEZE_THAW);
    }

    #[tokio::test]
    async fn no_agent_is_a_reason_or_an_error_as_asked() {
        let gone = Path::new("/nonexistent/agent.sock");
        let budget = Duration::from_secs(1);
        let quiescence =
            freeze(Some(gone), Quiesce::Auto, budget, true).await.unwrap().thaw().await;
        assert!(quiescence.reason.unwrap().contains("cannot connect"));
        let error = freeze(Some(gone), Quiesce::Require, budget, true).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported);
        let quiescence = freeze(None, Quiesce::Never, budget, true).await.unwrap().thaw().await;
        assert_eq!(quiescence.reason, None);
    }
}
