//! The block graph as QEMU has it now: which nodes there are and which is below which.
//!
//! The command that tells is not stable by its name (`x-debug-query-block-graph`, since 4.0), and
//! the only one that names the nodes below a node (before QEMU 10.1) or answers at all when an
//! image of somebody else has broken (`query-named-block-nodes` fails as a whole then, seen on
//! 10.0). Who asks can do without.

use qmp::Monitor;
use serde_json::{Value, json};

use super::error::failed;
use crate::error::Result;

/// The graph.
pub(super) struct Graph(Value);

impl Graph {
    /// Asks for it; none where this QEMU does not tell. No answer is an error, not none.
    pub(super) async fn ask(monitor: &Monitor) -> Result<Option<Self>> {
        match monitor.execute_raw("x-debug-query-block-graph", json!({})).await {
            Err(error) if matches!(error.kind(), qmp::Kind::Unsupported | qmp::Kind::Refused) => {
                tracing::warn!(%error, "QEMU does not tell which node is below which");
                Ok(None)
            }
            graph => {
                graph.map(|graph| Some(Self(graph))).map_err(failed("cannot ask for the graph"))
            }
        }
    }

    /// Whether there is a node of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.list("nodes").any(|node| node["name"] == name)
    }

    /// The name of the node that a filter has below it.
    pub(super) fn below(&self, filter: &str) -> Option<&str> {
        let id = &self.list("nodes").find(|node| node["name"] == filter)?["id"];
        let edge =
            self.list("edges").find(|edge| edge["parent"] == *id && edge["name"] == "file")?;
        let child = &edge["child"];
        self.list("nodes").find(|node| node["id"] == *child)?["name"].as_str()
    }

    fn list(&self, key: &str) -> impl Iterator<Item = &Value> {
        self.0[key].as_array().into_iter().flatten()
    }
}
