//! The freeze guardian: guest file systems are frozen and thawed by somebody who outlives us.
//!
//! A guest that stays frozen stands still for good, so the freeze is not done by the run that
//! wants it but by a guardian, which owns the way to the guest agent and thaws when it is told to,
//! when the budget ends, or when whoever asked is gone, whichever is first; and which tries again
//! until the thaw has succeeded.
//!
//! ```text
//!  run                                guardian (own process, session, cgroup, connection)
//!   │ start ───── Watch(subject) ────► connects
//!   │ ◄────────── Ready ───────────────┤
//!   │ freeze ──── Freeze{budget} ─────► freezes; the budget runs
//!   │ ◄────────── Frozen{count} ───────┤           ┌ told to, budget over, or run gone
//!   │ (instant)                        │           ▼
//!   │ thaw ────── Thaw ───────────────► thaws, again and again until it succeeds
//!   │ ◄────────── Thawed{…} | Stuck ───┘
//! ```
//!
//! The guardian is the program itself, started anew (`process`), where the face names it; else, or
//! when that fails, a thread of this process (`guardian`), which ends with it. Both run [`serve()`]
//! over a socket pair: one state machine, two seats. What neither can do (the machine dies, or the
//! guardian is killed too) is done by the next run, from the platform's own record: a platform
//! records "frozen" before it asks for the freeze and takes that back only on [`Thaw::Done`].
//!
//! A pause of the guest is guarded in the same way, but made and ended by the run, which alone has
//! the monitor; the guardian acts only when the run is gone ([`Subject::Paused`], [`Frozen::release`]).
//!
//! Who freezes what is the platforms' business ([`Freezable`]); what a level is worth is decided
//! here (`outcome`), the same for all.

mod guardian;
mod line;
mod outcome;
mod serve;

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

pub use guardian::{Frozen, Guardian, NotFrozen, Pending, Thaw, Thawed};
pub use line::Line;
pub use outcome::FileSystem;
pub use serve::serve;

use crate::vm::Uuid;

/// The argument with which a program becomes a guardian.
pub const COMMAND: &str = "guardian";

/// Whose file systems are frozen: what a guardian of its own process is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// Through libvirt.
    Libvirt {
        /// Connection URI.
        uri: String,
        /// The domain.
        domain: Uuid,
    },
    /// Through the host's end of the agent's channel.
    Agent {
        /// The socket.
        socket: PathBuf,
    },
    /// A plain QEMU that its run stops and lets go on by itself: guarded is that it goes on.
    Paused {
        /// The monitor's socket, which the run holds as long as it lives.
        monitor: PathBuf,
        /// The node that is there as long as the run's pause lasts.
        marker: String,
    },
}

/// The way to a guest's agent, as a guardian uses it. Reasons are one line of text: they go over a
/// pipe and into the manifest.
///
/// No call is cancelled: each has a limit of its own.
#[async_trait]
pub trait Freezable: Send {
    /// Opens the way. The first call.
    async fn prepare(&mut self) -> Result<(), String>;

    /// The mounted file systems a freeze should reach, where the agent tells.
    async fn file_systems(&mut self) -> Option<Vec<FileSystem>>;

    /// Freezes; how many file systems. A freeze may happen although this fails: a thaw is owed.
    async fn freeze(&mut self, budget: std::time::Duration) -> Result<u32, String>;

    /// Thaws; how many were frozen. `Ok` only if no freeze asked for before can happen any more.
    async fn thaw(&mut self) -> Result<u32, String>;

    /// Whether the guest that was frozen is gone for certain: nothing is left to thaw.
    async fn is_gone(&mut self) -> bool;
}

#[cfg(test)]
mod tests;
