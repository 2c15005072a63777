//! What `qemu-img info` tells about an image that is in use: whether it can hold bitmaps, and which
//! it held when it was last closed.
//!
//! Only a help: bitmaps made since the VM started are not in the file yet, so "absent here" proves
//! nothing, and remote images are not asked at all. Decisions rest on libvirt's own validation.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use crate::error::{Error, Kind, Result};

/// Longest wait for `qemu-img info`: it reads the header and the bitmap directory.
const INFO_TIMEOUT: Duration = Duration::from_secs(30);

/// An image header, as far as it matters here.
#[derive(Clone, Debug, Default)]
pub(super) struct ImageInfo {
    /// qcow2 version 2 cannot hold bitmaps.
    pub(super) holds_bitmaps: bool,
    /// The bitmaps in the file.
    pub(super) bitmaps: Vec<ImageBitmap>,
}

/// A bitmap in an image file.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct ImageBitmap {
    /// Its name.
    pub(super) name: String,
    /// `in-use` (normal while a VM has the image open, else not closed properly), `auto` (recording).
    #[serde(default)]
    pub(super) flags: Vec<String>,
}

#[derive(Deserialize)]
struct Info {
    #[serde(rename = "format-specific")]
    specific: Option<Specific>,
}

#[derive(Deserialize)]
struct Specific {
    data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    compat: Option<String>,
    #[serde(default)]
    bitmaps: Vec<ImageBitmap>,
}

/// Reads the header of a qcow2 image without taking locks. The format is given, never probed.
pub(super) async fn qcow2_info(path: &Path) -> Result<ImageInfo> {
    let failed = |reason: String| {
        Error::new(Kind::Io, format!("cannot read the header of {}: {reason}", path.display()))
    };
    let mut command = Command::new("qemu-img");
    command.args(["info", "--force-share", "--output=json", "--format=qcow2", "--"]).arg(path);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(INFO_TIMEOUT, command.output())
        .await
        .map_err(|_| failed(format!("no answer in {INFO_TIMEOUT:?}")))?
        .map_err(|error| Error::io("cannot run qemu-img", error).hint("install qemu-utils"))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    parse(&output.stdout).map_err(|error| failed(error.to_string()))
}

fn parse(json: &[u8]) -> serde_json::Result<ImageInfo> {
    let info: Info = serde_json::from_slice(json)?;
    let data = info.specific.and_then(|specific| specific.data);
    Ok(data.map_or_else(ImageInfo::default, |data| ImageInfo {
        holds_bitmaps: data.compat.as_deref() != Some("0.10"),
        bitmaps: data.bitmaps,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_and_bitmaps_are_read_from_the_header() {
        let json = br#"{"format":"qcow2","format-specific":{"type":"qcow2","data":{"compat":"1.1",
            "bitmaps":[{"flags":["in-use","auto"],"name":"vmb-x","granularity":65536}]}}}"#;
        let info = parse(json).unwrap();
        assert!(info.holds_bitmaps);
        assert_eq!(info.bitmaps[0].name, "vmb-x");
        assert_eq!(info.bitmaps[0].flags, ["in-use", "auto"]);
        let old = br#"{"format-specific":{"data":{"compat":"0.10"}}}"#;
        assert!(!parse(old).unwrap().holds_bitmaps);
    }
}
