//! Freezing the guest's file systems around the instant, with a budget nobody can overrun.
//!
//! ```text
//!  freeze ──► frozen ──► (the backup job begins) ──► thaw ──► level and measured time
//!     │          └── budget over: the guardian thaws at once; the level is crash consistent
//!     └── no answer within the budget: whenever the freeze succeeds, the same thread thaws
//! ```
//!
//! The guardian is a thread of its own: it needs neither the async runtime nor the task that
//! froze. Against the death of the whole process there is the record in [`super::lock`], by which
//! the next run thaws.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::connection::DomainHandle;
use super::ffi;
use super::xml::Element;
use crate::error::{Error, Kind, Result};
use crate::platform::Quiesce;
use crate::vm::{Consistency, Quiescence};

/// The channel the guest agent listens on (libvirt formatdomain, "channel").
const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// Why an agent cannot be asked, if it cannot. Pure.
pub(super) fn agent_problem(live: &Element, paused: bool) -> Option<String> {
    if paused {
        return Some("the domain is paused, its agent cannot answer".into());
    }
    let devices = live.child("devices")?;
    let target = devices
        .all("channel")
        .filter_map(|channel| channel.child("target"))
        .find(|target| target.attr("name") == Some(AGENT_CHANNEL));
    match target {
        None => Some("the domain has no guest agent channel".into()),
        Some(target) if target.attr("state") == Some("connected") => None,
        Some(_) => Some("no guest agent is running in the guest".into()),
    }
}

/// Guest file systems around the instant: frozen, or why not.
pub(super) enum Frozen {
    /// Not frozen, for the reason given (none: not asked for).
    No(Option<String>),
    /// Frozen; [`thaw`] must follow.
    Yes {
        /// How many file systems.
        count: u32,
        /// When the freeze was asked for.
        since: Instant,
        /// Thaws when the budget is over.
        guardian: Guardian,
    },
}

/// Freezes, if asked for and possible. Fails only for [`Quiesce::Require`].
pub(super) async fn freeze(
    domain: &DomainHandle,
    quiesce: Quiesce,
    budget: Duration,
    problem: Option<String>,
) -> Result<Frozen> {
    if quiesce == Quiesce::Never {
        return Ok(Frozen::No(None));
    }
    let reason = match problem {
        Some(problem) => problem,
        None => match try_freeze(domain, budget).await {
            Ok(frozen) => return Ok(frozen),
            Err(reason) => reason,
        },
    };
    if quiesce == Quiesce::Require {
        return Err(Error::new(
            Kind::Unsupported,
            format!("cannot freeze the file systems of domain '{}': {reason}", domain.name),
        )
        .hint("install and start qemu-guest-agent in the guest, or use --quiesce auto"));
    }
    Ok(Frozen::No(Some(reason)))
}

async fn try_freeze(domain: &DomainHandle, budget: Duration) -> Result<Frozen, String> {
    let since = Instant::now();
    let late = |domain: &virt::domain::Domain| {
        if let Err(error) = ffi::thaw(domain) {
            tracing::error!(%error, "a late freeze could not be thawed");
        }
    };
    let count = match domain.call_or_undo(budget, ffi::freeze, late).await {
        Some(Ok(count)) => count,
        Some(Err(error)) => {
            // A freeze that fails half way is thawed by the agent; make sure of it.
            let thawed = domain.raw_call("thaw", ffi::thaw).await;
            tracing::debug!(?thawed, "thawed after a failed freeze");
            return Err(format!("the guest agent could not freeze: {}", error.message()));
        }
        None => return Err(format!("the guest agent did not freeze within {budget:?}")),
    };
    let guardian = Guardian::watch(domain.clone(), budget.saturating_sub(since.elapsed()));
    Ok(Frozen::Yes { count, since, guardian })
}

/// Thaws and says what was achieved. Always thaws, whatever `frozen` went through.
pub(super) async fn thaw(domain: &DomainHandle, frozen: Frozen, budget: Duration) -> Quiescence {
    let (count, since, guardian) = match frozen {
        Frozen::No(reason) => {
            return Quiescence { level: Consistency::Crash, frozen_ms: None, reason };
        }
        Frozen::Yes { count, since, guardian } => (count, since, guardian),
    };
    let expired = guardian.stand_down().await;
    let thawed = if expired { Ok(Ok(0)) } else { domain.raw_call("thaw", ffi::thaw).await };
    let frozen_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
    let over = since.elapsed() > budget;
    let reason = match thawed {
        _ if expired || over => Some(format!("frozen for longer than {budget:?}")),
        _ if count == 0 => Some("the guest agent found no file system to freeze".into()),
        Ok(Ok(0)) => Some("the file systems had been thawed by somebody else".into()),
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(format!("the thaw failed: {}", error.message())),
        Err(error) => Some(format!("the thaw failed: {error}")),
    };
    let level = if reason.is_none() { Consistency::Filesystem } else { Consistency::Crash };
    Quiescence { level, frozen_ms: Some(frozen_ms), reason }
}

/// A thread that thaws unless it is stood down in time.
pub(super) struct Guardian {
    stand_down: SyncSender<()>,
    thread: JoinHandle<bool>,
}

impl Guardian {
    fn watch(domain: DomainHandle, budget: Duration) -> Self {
        let (stand_down, stop) = sync_channel::<()>(1);
        let thread = std::thread::spawn(move || match stop.recv_timeout(budget) {
            Ok(()) => false,
            // The one who froze is gone without standing down, or late: thaw either way.
            Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout) => {
                if let Err(error) = domain.blocking(ffi::thaw) {
                    tracing::error!(%error, "cannot thaw at the end of the freeze budget");
                }
                true
            }
        });
        Self { stand_down, thread }
    }

    /// Ends the watch; whether it had to thaw.
    async fn stand_down(self) -> bool {
        // A full channel or a gone thread both mean that the thread is past listening.
        let _past_listening = self.stand_down.try_send(()).is_err();
        let thread = self.thread;
        let joined = tokio::task::spawn_blocking(move || thread.join()).await;
        // A guardian that panicked did not report a thaw: count it as late.
        matches!(joined, Ok(Ok(true) | Err(_)) | Err(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_asked_only_where_one_answers() {
        let live = |target: &str| {
            let xml = format!(
                "<domain><devices><channel type='unix'>{target}</channel></devices></domain>"
            );
            Element::parse("test", &xml).unwrap()
        };
        let connected =
            live("<target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>");
        assert_eq!(agent_problem(&connected, false), None);
        assert!(agent_problem(&connected, true).unwrap().contains("paused"));
        let silent =
            live("<target type='virtio' name='org.qemu.guest_agent.0' state='disconnected'/>");
        assert!(agent_problem(&silent, false).unwrap().contains("no guest agent"));
        assert!(agent_problem(&live("<target name='com.redhat.spice.0'/>"), false).is_some());
    }
}
