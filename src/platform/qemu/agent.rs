//! The way to a plain QEMU's guest agent, as the freeze guardian uses it.
//!
//! The host's end of the channel serves one client at a time: whoever guards holds it, and a
//! second guardian gets through when the first is gone.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use qmp::{Address, Agent, AgentOptions};

use super::pause::is_gone;
use crate::error::with_causes;
use crate::freeze::{FileSystem, Freezable};

/// Longest wait for one thaw.
const THAW: Duration = Duration::from_secs(10);

/// Freezes and thaws the guest behind an agent socket.
pub struct AgentChannel {
    socket: PathBuf,
    agent: Option<Agent>,
}

impl AgentChannel {
    /// The agent behind this socket. Nothing is opened yet.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, agent: None }
    }

    async fn agent(&mut self) -> Result<&mut Agent, String> {
        if self.agent.is_none() {
            let address = Address::Unix(self.socket.clone());
            let agent = Agent::connect(&address, AgentOptions::default()).await;
            self.agent = Some(agent.map_err(|error| with_causes(&error))?);
        }
        Ok(self.agent.as_mut().expect("connected above"))
    }
}

#[async_trait]
impl Freezable for AgentChannel {
    async fn prepare(&mut self) -> Result<(), String> {
        self.agent().await.map(drop)
    }

    async fn file_systems(&mut self) -> Option<Vec<FileSystem>> {
        let systems = self.agent().await.ok()?.file_systems().await;
        let systems = systems.map_err(|error| {
            tracing::debug!(%error, "the mounted file systems are not known");
        });
        let system = |system: qmp::FileSystem| FileSystem {
            device: system.name,
            mount_point: system.mountpoint,
            kind: system.kind,
        };
        Some(systems.ok()?.into_iter().map(system).collect())
    }

    async fn freeze(&mut self, budget: Duration) -> Result<u32, String> {
        let frozen = self.agent().await?.freeze(budget).await;
        frozen.map(count).map_err(|error| with_causes(&error))
    }

    async fn thaw(&mut self) -> Result<u32, String> {
        let thawed = self.agent().await?.thaw(THAW).await;
        thawed.map(count).map_err(|error| {
            if error.refusal().is_none() && !matches!(error, qmp::Error::Timeout { .. }) {
                // The channel is out of step or gone: the next attempt begins anew.
                self.agent = None;
            }
            with_causes(&error)
        })
    }

    async fn is_gone(&mut self) -> bool {
        is_gone(&self.socket).await
    }
}

fn count(count: i64) -> u32 {
    u32::try_from(count).unwrap_or(0)
}
