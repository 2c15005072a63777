//! Paths in documents: what is not UTF-8 in one shows as `U+FFFD`. A path that JSON cannot hold must
//! not fail a command that has done its work.
//!
//! For `#[serde(serialize_with = …)]` in reports.

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

/// A path.
pub(super) fn path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    path.to_string_lossy().serialize(serializer)
}

/// A path, or `null`.
#[expect(clippy::ref_option, reason = "the signature that serde asks for")]
pub(super) fn optional<S: Serializer>(
    path: &Option<PathBuf>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.to_string_lossy()).serialize(serializer)
}

/// A list of paths.
pub(super) fn list<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}
