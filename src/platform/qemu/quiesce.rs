//! Freezing the guest's file systems around the instant.
//!
//! ```text
//!  guardian ──► freeze ──► (the transaction) ──► thaw ──► level, measured time
//! ```
//!
//! Freezing and thawing is the guardian's ([`crate::freeze`]). Here is decided whether it is asked.

use std::path::Path;

use super::agent::AgentChannel;
use crate::error::{Error, Kind, Result};
use crate::freeze::{self, Guardian, NotFrozen, Subject, Thaw};
use crate::platform::{Quiesce, SnapshotRequest};
use crate::vm::{Consistency, Quiescence};

/// Guest file systems around the instant.
pub(super) enum Frozen {
    /// Not frozen, for the reason given (none: not asked for); a freeze that was asked for may come
    /// yet, unless it is thawed for certain.
    No(Option<String>, Thaw),
    /// Frozen; [`Frozen::thaw`] should follow, the guardian thaws in any case.
    Yes(freeze::Frozen),
}

/// Freezes if asked for and possible. Fails only for [`Quiesce::Require`], and says then whether
/// the guest is thawed for certain.
pub(super) async fn freeze(
    agent: Option<&Path>,
    request: &SnapshotRequest,
    running: bool,
) -> Result<Frozen, (Error, Thaw)> {
    let (reason, thaw) = match (request.quiesce, agent) {
        (Quiesce::Never, _) => return Ok(Frozen::No(None, Thaw::Done)),
        (_, None) => ("no guest agent socket was given (--agent)".to_owned(), Thaw::Done),
        _ if !running => ("the guest is paused, its agent cannot answer".to_owned(), Thaw::Done),
        (_, Some(socket)) => match try_freeze(socket, request).await {
            Ok(frozen) => return Ok(Frozen::Yes(frozen)),
            Err(NotFrozen { reason, thaw }) => (reason, thaw),
        },
    };
    warn_if_pending(&thaw);
    if request.quiesce == Quiesce::Require {
        let message = format!("cannot freeze the guest's file systems: {reason}");
        let error = Error::new(Kind::Unsupported, message)
            .hint("install and start qemu-guest-agent in the guest, or use --quiesce auto");
        return Err((error, thaw));
    }
    Ok(Frozen::No(Some(reason), thaw))
}

async fn try_freeze(socket: &Path, request: &SnapshotRequest) -> Result<freeze::Frozen, NotFrozen> {
    let subject = Subject::Agent { socket: socket.to_owned() };
    let own = Box::new(AgentChannel::new(socket.to_owned()));
    let guardian = Guardian::start(request.guardian.as_deref(), subject, own).await;
    let guardian = guardian.map_err(|reason| NotFrozen { reason, thaw: Thaw::Done })?;
    guardian.freeze(request.freeze_budget).await
}

impl Frozen {
    /// Thaws and says what was achieved, and whether the guest is thawed for certain.
    pub(super) async fn thaw(self) -> (Quiescence, Thaw) {
        match self {
            Self::No(reason, thaw) => {
                (Quiescence { level: Consistency::Crash, frozen_ms: None, reason }, thaw)
            }
            Self::Yes(frozen) => {
                let thawed = frozen.thaw().await;
                warn_if_pending(&thawed.thaw);
                (thawed.quiescence, thawed.thaw)
            }
        }
    }
}

/// Thaws what an earlier run may have left frozen; the reason if that is not certain.
pub(super) async fn thaw_left(socket: &Path, guardian: Option<&Path>) -> Result<(), String> {
    let subject = Subject::Agent { socket: socket.to_owned() };
    let own = Box::new(AgentChannel::new(socket.to_owned()));
    match Guardian::start(guardian, subject, own).await?.thaw().await {
        Thaw::Done => Ok(()),
        Thaw::Pending(_) => Err("the guest's agent does not answer; thawing goes on".into()),
    }
}

fn warn_if_pending(thaw: &Thaw) {
    if let Thaw::Pending(_) = thaw {
        tracing::warn!("the guest may be frozen; thawing it goes on");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::task::JoinHandle;

    fn wanted(quiesce: Quiesce, budget: Duration) -> SnapshotRequest {
        let request = crate::platform::qemu::disks::tests::request();
        SnapshotRequest { quiesce, freeze_budget: budget, ..request }
    }

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
                    "guest-get-fsinfo" => serde_json::json!([]),
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

    const FREEZE_THAW: [&str; 4] = [
        "guest-sync-delimited",
        "guest-get-fsinfo",
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-thaw",
    ];

    #[tokio::test]
    async fn a_freeze_within_its_budget_is_file_system_consistent() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let heard = agent(&socket);
        let budget = Duration::from_secs(30);
        let frozen = freeze(Some(&socket), &wanted(Quiesce::Require, budget), true).await.unwrap();
        let (quiescence, _) = frozen.thaw().await;
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
        let frozen = freeze(Some(&socket), &wanted(Quiesce::Auto, budget), true).await.unwrap();
        // Nobody thaws: the guardian does, and hangs up.
        assert_eq!(heard.await.unwrap(), FREEZE_THAW);
        let (quiescence, _) = frozen.thaw().await;
        assert_eq!(quiescence.level, Consistency::Crash);
        assert!(quiescence.reason.unwrap().contains("frozen for longer"));
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_leaves_no_frozen_guest() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let heard = agent(&socket);
        let budget = Duration::from_secs(600);
        drop(freeze(Some(&socket), &wanted(Quiesce::Auto, budget), true).await.unwrap());
        assert_eq!(heard.await.unwrap(), FREEZE_THAW);
    }

    /// An agent that takes what it is sent and never answers a freeze.
    fn silent(socket: &Path) -> JoinHandle<()> {
        let listener = UnixListener::bind(socket).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (reader, mut writer) = stream.into_split();
            let (mut lines, mut line) = (BufReader::new(reader), vec![]);
            while lines.read_until(b'\n', &mut line).await.unwrap() > 0 {
                let text = line.strip_prefix(&[0xff]).unwrap_or(&line);
                let command: serde_json::Value = serde_json::from_slice(text).unwrap();
                let answer = match command["execute"].as_str().unwrap() {
                    "guest-sync-delimited" => command["arguments"]["id"].clone(),
                    "guest-get-fsinfo" => serde_json::json!([]),
                    _ => std::future::pending().await,
                };
                let answer = format!("\u{ff}{}\n", serde_json::json!({ "return": answer }));
                let bytes: Vec<u8> = answer.chars().map(|c| c as u8).collect();
                writer.write_all(&bytes).await.unwrap();
                line.clear();
            }
        })
    }

    #[tokio::test]
    async fn a_freeze_that_was_not_answered_is_not_called_thawed() {
        for quiesce in [Quiesce::Auto, Quiesce::Require] {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("a.sock");
            let agent = silent(&socket);
            let wanted = wanted(quiesce, Duration::from_millis(100));
            let thaw = match freeze(Some(&socket), &wanted, true).await {
                Ok(frozen) => frozen.thaw().await.1,
                Err((_, thaw)) => thaw,
            };
            assert!(matches!(thaw, Thaw::Pending(_)), "{quiesce:?}");
            agent.abort();
        }
    }

    #[tokio::test]
    async fn no_agent_is_a_reason_or_an_error_as_asked() {
        let gone = Path::new("/nonexistent/agent.sock");
        let budget = Duration::from_secs(1);
        let (quiescence, _) =
            freeze(Some(gone), &wanted(Quiesce::Auto, budget), true).await.unwrap().thaw().await;
        assert!(quiescence.reason.unwrap().contains("cannot connect"));
        let (error, _) =
            freeze(Some(gone), &wanted(Quiesce::Require, budget), true).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported);
        let (quiescence, _) =
            freeze(None, &wanted(Quiesce::Never, budget), true).await.unwrap().thaw().await;
        assert_eq!(quiescence.reason, None);
    }
}
