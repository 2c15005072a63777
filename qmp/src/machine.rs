//! The machine: identity, run state, QOM properties, the human monitor.

use qapi::qmp;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::connection::Monitor;
use crate::error::Result;

/// Whether the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RunStatus {
    /// Whether its processors run.
    pub running: bool,
    /// QEMU's word for the state (`running`, `paused`, `io-error`, `prelaunch`).
    pub status: String,
}

/// A property of a QOM object.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Property {
    /// Its name.
    pub name: String,
    /// Its type as QEMU writes it (`child<virtio-blk-pci>`).
    #[serde(rename = "type")]
    pub sort: String,
}

/// Each is cancel-safe as [`Monitor::execute`] is.
impl Monitor {
    /// The run state.
    pub async fn query_status(&self) -> Result<RunStatus> {
        self.query("query-status", json!({})).await
    }

    /// The VM's UUID as QEMU has it; all zero if it was given none.
    pub async fn query_uuid(&self) -> Result<String> {
        Ok(self.execute(qmp::query_uuid {}).await?.UUID)
    }

    /// The VM's name, if it was given one.
    pub async fn query_name(&self) -> Result<Option<String>> {
        Ok(self.execute(qmp::query_name {}).await?.name)
    }

    /// What is known of the last migration (`status`, its times and amounts); an empty object if
    /// there never was one. As QEMU writes it: what is in it differs by version and state.
    pub async fn query_migrate(&self) -> Result<Value> {
        self.query("query-migrate", json!({})).await
    }

    /// Pauses the guest.
    pub async fn stop(&self) -> Result<()> {
        self.execute(qmp::stop {}).await.map(drop)
    }

    /// Lets the guest go on.
    pub async fn cont(&self) -> Result<()> {
        self.execute(qmp::cont {}).await.map(drop)
    }

    /// Sets a property of a QOM object.
    pub async fn qom_set(&self, path: &str, property: &str, value: Value) -> Result<()> {
        let (path, property) = (path.to_owned(), property.to_owned());
        self.execute(qmp::qom_set { path, property, value }).await.map(drop)
    }

    /// A property of a QOM object.
    pub async fn qom_get(&self, path: &str, property: &str) -> Result<Value> {
        let (path, property) = (path.to_owned(), property.to_owned());
        self.execute(qmp::qom_get { path, property }).await
    }

    /// The properties of a QOM object.
    pub async fn qom_list(&self, path: &str) -> Result<Vec<Property>> {
        self.query("qom-list", json!({ "path": path })).await
    }

    /// Runs a command line of the human monitor and returns what it prints: for people, it has no
    /// stable form, and a failure is text as well.
    pub async fn human(&self, command_line: &str) -> Result<String> {
        let command_line = command_line.to_owned();
        self.execute(qmp::human_monitor_command { cpu_index: None, command_line }).await
    }
}
