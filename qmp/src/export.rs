//! The NBD server in QEMU and its exports.
//!
//! A QEMU has one NBD server at most, whoever started it, and stopping it ends everybody's
//! exports: who starts it must be the one to stop it, and must know that no other uses it.

use std::path::Path;

use qapi::qmp;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::block::BitmapRef;
use crate::connection::Monitor;
use crate::error::Result;
use crate::features::Features;

/// An export, whatever its type.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Export {
    /// Its id.
    pub id: String,
    /// Its type (`nbd`, `vhost-user-blk`), known to this crate or not.
    #[serde(rename = "type")]
    pub sort: String,
    /// The node exported.
    pub node_name: String,
    /// Whether it is being removed.
    #[serde(default)]
    pub shutting_down: bool,
}

/// An NBD export to be added.
#[derive(Clone, Debug)]
pub struct NewExport {
    /// Its id.
    pub id: String,
    /// The node exported.
    pub node: String,
    /// The name clients ask for.
    pub name: String,
    /// A bitmap to offer as `qemu:dirty-bitmap:NAME`, by the node it lives on.
    pub bitmap: Option<BitmapRef>,
    /// What clients may do.
    pub access: ExportAccess,
}

/// What clients of an export may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportAccess {
    /// Read.
    ReadOnly,
    /// Write and discard as well, as far as the node lets them.
    Writable,
}

/// How to end an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportEnd {
    /// Fails while clients are connected.
    Safe,
    /// Disconnects clients.
    Hard,
}

/// Each is cancel-safe as [`Monitor::execute`] is.
impl Monitor {
    /// Starts the NBD server on a unix socket that QEMU creates.
    pub async fn nbd_server_start(&self, socket: &Path, connections_max: u32) -> Result<()> {
        // By hand: a path need not be UTF-8 in general, but JSON is; the caller gives one that is.
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let arguments = json!({ "addr": address, "max-connections": connections_max });
        self.execute_raw("nbd-server-start", arguments).await.map(drop)
    }

    /// Stops the NBD server and all its exports.
    pub async fn nbd_server_stop(&self) -> Result<()> {
        self.execute(qmp::nbd_server_stop {}).await.map(drop)
    }

    /// Adds an export, in the form this QEMU has: `block-export-add`, with the bitmap as
    /// `{node, name}` or, where the schema knows no such alternate (before QEMU 7.1), as a name on
    /// the exported node's chain; else `nbd-server-add` (before QEMU 5.2).
    pub async fn export_add(&self, export: &NewExport, features: &Features) -> Result<()> {
        let (command, arguments) = export_command(export, features);
        self.execute_raw(command, arguments).await.map(drop)
    }

    /// All exports.
    pub async fn query_block_exports(&self) -> Result<Vec<Export>> {
        self.query("query-block-exports", json!({})).await
    }

    /// Begins to end an export; its id, node and bitmap stay in use until `BLOCK_EXPORT_DELETED`.
    pub async fn export_del(&self, id: &str, end: ExportEnd) -> Result<()> {
        let mode = match end {
            ExportEnd::Safe => qmp::BlockExportRemoveMode::safe,
            ExportEnd::Hard => qmp::BlockExportRemoveMode::hard,
        };
        self.execute(qmp::block_export_del { id: id.to_owned(), mode: Some(mode) }).await.map(drop)
    }
}

fn export_command(export: &NewExport, features: &Features) -> (&'static str, Value) {
    let writable = export.access == ExportAccess::Writable;
    let mut arguments = json!({ "name": export.name, "writable": writable });
    if !features.block_export_add {
        arguments["device"] = json!(export.node);
        if let Some(bitmap) = &export.bitmap {
            arguments["bitmap"] = json!(bitmap.name);
        }
        return ("nbd-server-add", arguments);
    }
    arguments["type"] = json!("nbd");
    arguments["id"] = json!(export.id);
    arguments["node-name"] = json!(export.node);
    if let Some(bitmap) = &export.bitmap {
        arguments["bitmaps"] =
            if features.export_bitmap_by_node { json!([bitmap]) } else { json!([bitmap.name]) };
    }
    ("block-export-add", arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_takes_the_form_the_schema_has() {
        let bitmap = BitmapRef { node: "src".into(), name: "b".into() };
        let export = NewExport {
            id: "e".into(),
            node: "n".into(),
            name: "vda".into(),
            bitmap: Some(bitmap),
            access: ExportAccess::ReadOnly,
        };
        let features = |block_export_add, export_bitmap_by_node| Features {
            block_export_add,
            export_bitmap_by_node,
            ..Features::default()
        };
        let (command, arguments) = export_command(&export, &features(true, true));
        assert_eq!(command, "block-export-add");
        assert_eq!(arguments["bitmaps"], json!([{ "node": "src", "name": "b" }]));
        let (_, arguments) = export_command(&export, &features(true, false));
        assert_eq!(arguments["bitmaps"], json!(["b"]));
        let (command, arguments) = export_command(&export, &features(false, false));
        assert_eq!((command, &arguments["bitmap"]), ("nbd-server-add", &json!("b")));
        assert_eq!(arguments["writable"], false);
        let export = NewExport { access: ExportAccess::Writable, ..export };
        let (_, arguments) = export_command(&export, &features(true, true));
        assert_eq!(arguments["writable"], true);
    }
}
