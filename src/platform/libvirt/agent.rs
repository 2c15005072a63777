//! The way to a domain's guest agent, as the freeze guardian uses it: a connection of its own.
//!
//! libvirt runs one agent command of a domain at a time. A freeze that the agent does not answer
//! keeps that slot, and a thaw cannot pass it, on whatever connection: so a freeze that ran into
//! its limit is kept ([`DomainAgent::late`]), and every thaw first waits for its end. (The channel
//! is a stream: an agent that comes back works off the freeze and then the thaw.)
//! `virDomainAgentSetResponseTimeout` would free the slot sooner, but it is a setting of the domain
//! that stays and is everybody's.

use std::time::Duration;

use async_trait::async_trait;
use tokio::task::JoinHandle;
use virt::domain::Domain;

use super::connection::{DomainHandle, Host};
use super::ffi::{self, VirtResult};
use crate::error::{Error, Kind, with_causes};
use crate::freeze::{FileSystem, Freezable};
use crate::vm::Uuid;

/// How long one thaw waits for a freeze that has not returned.
const LATE: Duration = Duration::from_secs(10);
/// Longest wait for the list of mounts: libvirt gives an agent 5 s to answer a handshake
/// (`VIR_DOMAIN_QEMU_AGENT_COMMAND_DEFAULT`, qemu_agent.c).
const MOUNTS: Duration = Duration::from_secs(6);

/// Freezes and thaws a domain's guest.
pub struct DomainAgent {
    uri: String,
    uuid: Uuid,
    domain: Option<DomainHandle>,
    /// Which run of the domain it was at first, once that is known.
    run: Option<u32>,
    /// A freeze that has not returned.
    late: Option<JoinHandle<VirtResult<u32>>>,
}

impl DomainAgent {
    /// The agent of the domain with this UUID. Nothing is opened yet.
    pub fn new(uri: String, domain: Uuid) -> Self {
        Self { uri, uuid: domain, domain: None, run: None, late: None }
    }

    async fn connect(&mut self) -> Result<DomainHandle, String> {
        if self.domain.is_none() {
            let opened = self.find().await.map_err(|error| with_causes(&error))?;
            let id = run_of(&opened).await.map_err(|error| with_causes(&error))?;
            self.run = self.run.or(id);
            self.domain = Some(opened);
        }
        Ok(self.domain.clone().expect("connected above"))
    }

    async fn find(&self) -> Result<DomainHandle, Error> {
        Host::open(Some(&self.uri)).await?.domain(&self.uuid.to_string()).await
    }

    /// Waits for a freeze that had not returned; `Err` while it still has not.
    async fn settle(&mut self) -> Result<(), String> {
        let Some(late) = &mut self.late else { return Ok(()) };
        match tokio::time::timeout(LATE, late).await {
            Ok(ended) => {
                tracing::info!(?ended, "a late freeze ended");
                self.late = None;
                Ok(())
            }
            Err(_) => Err("the freeze has not returned".into()),
        }
    }
}

#[async_trait]
impl Freezable for DomainAgent {
    async fn prepare(&mut self) -> Result<(), String> {
        self.connect().await.map(drop)
    }

    async fn file_systems(&mut self) -> Option<Vec<FileSystem>> {
        let domain = self.connect().await.ok()?;
        let asked = domain.raw_call("list the file systems of", ffi::file_systems);
        match tokio::time::timeout(MOUNTS, asked).await {
            Ok(Ok(Ok(systems))) => Some(systems),
            other => {
                tracing::debug!(?other, "the mounted file systems are not known");
                None
            }
        }
    }

    async fn freeze(&mut self, budget: Duration) -> Result<u32, String> {
        let domain = self.connect().await?;
        let mut call = tokio::task::spawn_blocking(move || domain.blocking(ffi::freeze));
        match tokio::time::timeout(budget, &mut call).await {
            Ok(Ok(Ok(count))) => Ok(count),
            Ok(Ok(Err(error))) => {
                Err(format!("the guest agent could not freeze: {}", error.message()))
            }
            Ok(Err(panic)) => Err(format!("the freeze ended in a panic: {panic}")),
            Err(_) => {
                self.late = Some(call);
                Err(format!("the guest agent did not freeze within {budget:?}"))
            }
        }
    }

    async fn thaw(&mut self) -> Result<u32, String> {
        self.settle().await?;
        let domain = self.connect().await?;
        let thawed = domain.call("thaw", ffi::thaw).await;
        thawed.map_err(|error| {
            // The daemon may have been restarted: the next attempt connects anew.
            self.domain = None;
            with_causes(&error)
        })
    }

    async fn is_gone(&mut self) -> bool {
        let now = match self.find().await {
            Ok(domain) => run_of(&domain).await,
            Err(error) => Err(error),
        };
        match now {
            Ok(now) => now.is_none() || (self.run.is_some() && now != self.run),
            // A transient domain is forgotten when it ends.
            Err(error) => error.kind() == Kind::NotFound,
        }
    }
}

/// The number of the domain's present run; none if it is off. Of a handle that was just looked up:
/// the number is part of it.
async fn run_of(domain: &DomainHandle) -> Result<Option<u32>, Error> {
    let ask = |domain: &Domain| Ok(if domain.is_active()? { domain.id() } else { None });
    domain.call("ask for the state of", ask).await
}
