//! Whether the guest moves to another QEMU, or has moved since: the other end writes past whatever
//! keeps the instant here.
//!
//! QEMU 10.0 lets no migration of a VM end as long as our exports are there (it fails at its last
//! step and the guest goes on); that is not said anywhere, and exports may be gone. So QEMU is
//! asked before the instant and after the last read, whichever way the instant is kept. A migration
//! that begins *and* ends in between is told by what QEMU remembers of the last one, which is
//! compared.

use qmp::Monitor;
use serde_json::Value;

use super::error::failed;
use crate::error::{Error, Kind, Result};

/// States of a migration that has ended (qapi/migration.json, `MigrationStatus`).
const SETTLED: [&str; 4] = ["none", COMPLETED, "failed", "cancelled"];
const COMPLETED: &str = "completed";
/// States of a guest that runs elsewhere, or may at any moment (qapi/run-state.json).
const ELSEWHERE: [&str; 3] = ["inmigrate", "postmigrate", "finish-migrate"];

/// What QEMU told of the last migration, of a VM that was here.
#[derive(Debug)]
pub(super) struct Settled(Value);

impl Settled {
    /// [`Kind::Busy`] if the VM is being migrated, or has been.
    pub(super) async fn ask(monitor: &Monitor, vm: &str) -> Result<Self> {
        let status = monitor.query_status().await.map_err(failed("cannot ask for the state"))?;
        let last = monitor.query_migrate().await;
        let last = last.map_err(failed("cannot ask for the migration"))?;
        // Of a QEMU that was never asked to migrate there is nothing.
        let moving = last["status"].as_str().is_some_and(|status| !SETTLED.contains(&status));
        if moving || ELSEWHERE.contains(&status.status.as_str()) {
            return Err(is_migrated(format!("VM '{vm}' is being migrated")));
        }
        Ok(Self(last))
    }

    /// The same, and also if one has been completed since this was asked.
    pub(super) async fn check(&self, monitor: &Monitor, vm: &str) -> Result<()> {
        let Self(last) = Self::ask(monitor, vm).await?;
        if last["status"] == COMPLETED && last != self.0 {
            return Err(is_migrated(format!("VM '{vm}' was migrated meanwhile")));
        }
        Ok(())
    }
}

fn is_migrated(what: String) -> Error {
    Error::new(Kind::Busy, what).hint("back it up where it runs once the migration has ended")
}
