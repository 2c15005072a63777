//! Freezing the guest's file systems around the instant: who may, and what the record says.
//!
//! ```text
//!  journal ─► guardian ─► freeze ─► (the backup job begins) ─► thaw ─► level
//!                                                                └► entry taken back, if it is
//!                                                                   certain
//! ```
//!
//! Freezing and thawing is the guardian's ([`crate::freeze`]). What is kept here is whether the
//! guest *may* still be frozen ([`Frost`]): as long as it may, the journal says so, whatever becomes
//! of the backup, and the next run on this domain thaws.

use std::path::Path;
use std::time::Duration;

use super::agent::DomainAgent;
use super::connection::DomainHandle;
use super::xml::Element;
use crate::error::{Error, Kind, Result};
use crate::freeze::{self, Guardian, NotFrozen, Pending, Subject, Thaw, Thawed};
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

/// How a freeze is to be done.
pub(super) struct Wish<'a> {
    /// Whether.
    pub(super) quiesce: Quiesce,
    /// How long.
    pub(super) budget: Duration,
    /// The program that becomes a guardian.
    pub(super) guardian: Option<&'a Path>,
}

/// Guest file systems around the instant: frozen, or why not.
pub(super) enum Frozen {
    /// Not frozen, for the reason given (none: not asked for).
    No(Option<String>),
    /// Frozen; [`thaw`] must follow.
    Yes(freeze::Frozen),
}

/// Whether the guest may be frozen by us.
#[derive(Default)]
pub(super) struct Frost(Option<Pending>);

impl Frost {
    fn after(thaw: Thaw) -> Self {
        match thaw {
            Thaw::Done => Self(None),
            Thaw::Pending(pending) => Self(Some(pending)),
        }
    }

    /// Whether it may be frozen now. Does not wait.
    pub(super) async fn is_there(&mut self) -> bool {
        let Some(pending) = &mut self.0 else { return false };
        let done = pending.is_done().await;
        if done {
            self.0 = None;
        }
        !done
    }
}

/// Freezes, if asked for and possible. Fails only for [`Quiesce::Require`]. `frost` is what was
/// known before; what is known after comes back.
pub(super) async fn freeze(
    domain: &DomainHandle,
    wish: &Wish<'_>,
    problem: Option<String>,
    frost: Frost,
) -> (Result<Frozen>, Frost) {
    let (reason, frost) = match (wish.quiesce, problem) {
        (Quiesce::Never, _) => return (Ok(Frozen::No(None)), frost),
        (_, Some(problem)) => (problem, frost),
        (_, None) => match guardian(domain, wish.guardian).await {
            // Nothing was asked of the guest: what was known of it holds.
            Err(reason) => (reason, frost),
            Ok(guardian) => match guardian.freeze(wish.budget).await {
                Ok(frozen) => return (Ok(Frozen::Yes(frozen)), Frost::default()),
                Err(NotFrozen { reason, thaw }) => (reason, Frost::after(thaw)),
            },
        },
    };
    if wish.quiesce == Quiesce::Require {
        let message =
            format!("cannot freeze the file systems of domain '{}': {reason}", domain.name);
        let error = Error::new(Kind::Unsupported, message)
            .hint("install and start qemu-guest-agent in the guest, or use --quiesce auto");
        return (Err(error), frost);
    }
    (Ok(Frozen::No(Some(reason))), frost)
}

/// A guardian with a connection of its own to the domain.
async fn guardian(domain: &DomainHandle, program: Option<&Path>) -> Result<Guardian, String> {
    let uri = domain.host.uri().to_owned();
    let subject = Subject::Libvirt { uri: uri.clone(), domain: domain.uuid };
    Guardian::start(program, subject, Box::new(DomainAgent::new(uri, domain.uuid))).await
}

/// Thaws and says what was achieved. Always thaws, whatever `frozen` went through.
pub(super) async fn thaw(frozen: Frozen, frost: Frost) -> (Quiescence, Frost) {
    match frozen {
        Frozen::No(reason) => {
            (Quiescence { level: Consistency::Crash, frozen_ms: None, reason }, frost)
        }
        Frozen::Yes(frozen) => {
            let Thawed { quiescence, thaw } = frozen.thaw().await;
            (quiescence, Frost::after(thaw))
        }
    }
}

/// Thaws what an earlier run, by its record, may have left frozen.
pub(super) async fn thaw_left(domain: &DomainHandle, program: Option<&Path>) -> Frost {
    match guardian(domain, program).await {
        Ok(guardian) => Frost::after(guardian.thaw().await),
        Err(reason) => {
            tracing::warn!(reason, "no way to thaw the guest");
            Frost(Some(Pending::lost()))
        }
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
