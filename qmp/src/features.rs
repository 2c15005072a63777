//! What a QEMU can do, read from its schema.
//!
//! `query-qmp-schema` lists every command, type and member under opaque numbers that change from
//! build to build (qapi/introspect.json), so everything is found by walking from a command's name.
//! The version says nothing: distributions backport features and compile drivers out.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::connection::Monitor;
use crate::error::Result;

/// The schema of one QEMU.
#[derive(Clone, Debug)]
pub struct Schema {
    entries: HashMap<String, Value>,
}

/// What a controller of backups asks of a QEMU. Each field is one look into the schema.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is one independent fact of the schema")]
pub struct Features {
    /// `block-export-add` exists (5.2).
    pub block_export_add: bool,
    /// `nbd-server-add` exists (deprecated since 5.2).
    pub nbd_server_add: bool,
    /// Exports take bitmaps as `{node, name}` (7.1).
    pub export_bitmap_by_node: bool,
    /// The `snapshot-access` driver (7.0).
    pub snapshot_access: bool,
    /// The `copy-before-write` driver (6.2).
    pub copy_before_write: bool,
    /// `copy-before-write` takes `on-cbw-error` (7.1).
    pub cbw_on_error: bool,
    /// `copy-before-write` takes `cbw-timeout` (7.1).
    pub cbw_timeout: bool,
    /// `copy-before-write` takes `min-cluster-size` (9.2).
    pub cbw_min_cluster_size: bool,
    /// `blockdev-backup` takes `on-cbw-error` (10.1).
    pub backup_on_cbw_error: bool,
    /// `blockdev-backup` takes `discard-source` (9.1).
    pub backup_discard_source: bool,
    /// `blockdev-backup` takes `filter-node-name` (4.2).
    pub backup_filter_node_name: bool,
    /// `transaction` knows `block-dirty-bitmap-merge` (4.0).
    pub transaction_bitmap_merge: bool,
    /// `nbd-server-start` takes `handshake-max-seconds` (10.0, backported).
    pub nbd_handshake_limit: bool,
}

impl Schema {
    /// Reads the reply of `query-qmp-schema`. Entries without a name are ignored.
    pub fn parse(reply: Value) -> Self {
        let Value::Array(list) = reply else { return Self { entries: HashMap::new() } };
        let named = |entry: Value| Some((entry.get("name")?.as_str()?.to_owned(), entry));
        Self { entries: list.into_iter().filter_map(named).collect() }
    }

    /// Whether a command exists.
    pub fn has_command(&self, command: &str) -> bool {
        self.command(command).is_some()
    }

    /// Whether a path of members, variants (`?name`) and element types leads from a command's
    /// arguments to something: `["?snapshot-access"]` of `blockdev-add`, say.
    pub fn reaches(&self, command: &str, path: &[&str]) -> bool {
        self.resolve(command, path).is_some()
    }

    fn command(&self, name: &str) -> Option<&Value> {
        self.entries.get(name).filter(|entry| entry["meta-type"] == "command")
    }

    fn resolve(&self, command: &str, path: &[&str]) -> Option<&Value> {
        let mut entry = self.entries.get(self.command(command)?["arg-type"].as_str()?)?;
        for step in path {
            let (list, key, name) = match step.strip_prefix('?') {
                Some(variant) => ("variants", "case", variant),
                None => ("members", "name", *step),
            };
            let found = entry[list].as_array()?.iter().find(|item| item[key] == name)?;
            entry = self.entries.get(found["type"].as_str()?)?;
            if entry["meta-type"] == "array" {
                entry = self.entries.get(entry["element-type"].as_str()?)?;
            }
        }
        Some(entry)
    }

    /// The facts a controller decides on.
    pub fn features(&self) -> Features {
        let cbw = |member| self.reaches("blockdev-add", &["?copy-before-write", member]);
        let backup = |member| self.reaches("blockdev-backup", &[member]);
        let bitmap_item = self.resolve("block-export-add", &["?nbd", "bitmaps"]);
        Features {
            block_export_add: self.has_command("block-export-add"),
            nbd_server_add: self.has_command("nbd-server-add"),
            export_bitmap_by_node: bitmap_item.is_some_and(|t| t["meta-type"] == "alternate"),
            snapshot_access: self.reaches("blockdev-add", &["?snapshot-access"]),
            copy_before_write: self.reaches("blockdev-add", &["?copy-before-write"]),
            cbw_on_error: cbw("on-cbw-error"),
            cbw_timeout: cbw("cbw-timeout"),
            cbw_min_cluster_size: cbw("min-cluster-size"),
            backup_on_cbw_error: backup("on-cbw-error"),
            backup_discard_source: backup("discard-source"),
            backup_filter_node_name: backup("filter-node-name"),
            transaction_bitmap_merge: self
                .reaches("transaction", &["actions", "?block-dirty-bitmap-merge"]),
            nbd_handshake_limit: self.reaches("nbd-server-start", &["handshake-max-seconds"]),
        }
    }
}

impl Monitor {
    /// The schema of this QEMU. Cancel-safe as [`Monitor::execute`].
    pub async fn query_schema(&self) -> Result<Schema> {
        Ok(Schema::parse(self.execute_raw("query-qmp-schema", json!({})).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_type_that_is_missing_or_refers_to_nothing_is_just_not_there() {
        let schema = Schema::parse(json!([
            { "name": "blockdev-add", "meta-type": "command", "arg-type": "1" },
            { "name": "1", "meta-type": "object", "variants": [
                { "case": "snapshot-access", "type": "2" },
                { "case": "copy-before-write", "type": "gone" } ] },
            { "name": "2", "meta-type": "object", "members": [] },
            { "meta-type": "object" },
            7,
        ]));
        let features = schema.features();
        assert!(features.snapshot_access);
        assert!(!features.copy_before_write && !features.block_export_add);
        assert_eq!(Schema::parse(json!("no list")).features(), Features::default());
    }

    proptest! {
        #[test]
        fn any_reply_is_read_without_a_panic(
            names in prop::collection::vec("[a-c]", 1..8), kinds in prop::collection::vec(0..4, 8),
        ) {
            let kinds_of = ["command", "object", "array", "alternate"];
            let list: Vec<_> = names.iter().zip(kinds).map(|(name, kind)| json!({
                "name": if kind == 0 { "blockdev-add" } else { name.as_str() },
                "meta-type": kinds_of[usize::try_from(kind).unwrap()], "arg-type": name,
                "element-type": name, "members": [{ "name": "x", "type": name }],
                "variants": [{ "case": "copy-before-write", "type": name }],
            })).collect();
            let _ = Schema::parse(Value::Array(list)).features();
        }
    }
}
