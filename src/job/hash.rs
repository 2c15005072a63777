//! The content root of a single disk: in an image, or behind an NBD export.

use std::sync::Arc;

use serde::Serialize;

use super::Surroundings;
use super::source::{self, DiskSpec};
use crate::content::ContentRoot;
use crate::copy;
use crate::error::Result;
use crate::image::OddEnd;

/// What a disk holds.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The disk, as it was named.
    pub disk: String,
    /// Its virtual size.
    pub size_bytes: u64,
    /// The hash over its content.
    pub content_root: ContentRoot,
}

/// Reads all of a disk and computes its root.
pub async fn run(disk: &DiskSpec, (env, control): Surroundings<'_>) -> Result<Report> {
    let name = disk.to_string();
    let opened = source::open_disk(disk, OddEnd::Padded).await?;
    let source = Arc::clone(&opened.source);
    let size_bytes = source.geometry().size_bytes;
    control.set_phase(format!("reading {name}"));
    let progress = control.add_disk(&name, size_bytes);
    let options = copy::Options::new(name.clone(), "its content root");
    let content_root =
        copy::content_root(source, &options, &env.workers, control, &progress).await?;
    opened.still_valid().await?;
    Ok(Report { disk: name, size_bytes, content_root })
}
