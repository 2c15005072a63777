//! What an image file says about itself, read under the format it was given.
//!
//! Formats are given, never probed: a guest can write a header into its raw disk that names host
//! files. For the same reason a backing file must come with its format, all the way down, and
//! headers that name other places (network protocols) are refused. A data file has no format; it is
//! followed where it is a file of this host: its name is in a header, which no guest writes.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::tool::{absolute, qemu_img};
use crate::block::BlockSource;
use crate::block::file::{Access, FileSource};
use crate::error::{Error, Kind, Result};

/// Longest backing chain followed; libvirt stops at 200, too.
const CHAIN_MAX: usize = 200;

/// What QEMU cuts disks into, and stat(2) counts in.
pub(super) const SECTOR_BYTES: u64 = 512;

/// What `qemu-img info` tells, as far as it matters here.
#[derive(Clone, Debug)]
pub struct ImageInfo {
    /// Size the guest sees.
    pub size_bytes: u64,
    /// Space the file takes.
    pub allocated_bytes: Option<u64>,
    /// Persistent bitmaps; `None` when the format (or its version) cannot hold any.
    pub bitmaps: Option<Vec<BitmapInfo>>,
    backing: Option<Backing>,
    encrypted: bool,
    corrupt: bool,
    data_file: Option<String>,
}

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Name.
    pub name: String,
    /// Whether it records writes from the moment the image is opened.
    pub recording: bool,
    /// Whether it was left open: by a crash, as no one has the image open.
    pub inconsistent: bool,
}

#[derive(Clone, Debug)]
struct Backing {
    path: String,
    format: Option<String>,
}

/// One layer of a disk, the active one first.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Absolute path.
    pub path: PathBuf,
    /// Format, given by the user or by the layer above.
    pub format: String,
    /// Absolute path of the file its data is in, where the header names another one.
    pub data_file: Option<PathBuf>,
    /// What it says; a raw layer says only its size.
    pub info: ImageInfo,
}

impl Layer {
    /// Its files, the image first.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.path.as_path()).chain(self.data_file.as_deref())
    }
}

/// The layers of the image at `path` in `format`, each one checked. Changes nothing.
pub async fn layers(path: &Path, format: &str) -> Result<Vec<Layer>> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut next = Some((absolute(path)?, format.to_owned()));
    while let Some((path, format)) = next.take() {
        if layers.len() == CHAIN_MAX || layers.iter().any(|layer| layer.path == path) {
            let message = format!("the backing chain of {} has no end", layers[0].path.display());
            return Err(Error::new(Kind::Unsupported, message));
        }
        let mut info = inspect(&path, &format).await?;
        next = below(&path, &info)?;
        let data_file = data_file(&path, &info)?;
        if let Some(file) = &data_file {
            let data_bytes = allocated(file);
            info.allocated_bytes = info.allocated_bytes.zip(data_bytes).map(|(a, b)| a + b);
        }
        layers.push(Layer { path, format, data_file, info });
    }
    Ok(layers)
}

/// What the header of one image says. Takes no lock; bitmaps that a VM has made since it opened the
/// image are not in it yet, and those it has open are marked inconsistent.
pub async fn inspect(path: &Path, format: &str) -> Result<ImageInfo> {
    check_format(format)?;
    if format == "raw" {
        return inspect_raw(path);
    }
    let what = format!("read the header of {} as {format}", path.display());
    // -U: looking at an image a VM uses is harmless; reading its disk is what needs the lock.
    let mut args: Vec<&OsStr> =
        ["info", "-U", "--output=json", "-f", format].map(OsStr::new).into();
    args.push(path.as_os_str());
    let output = qemu_img(args, &what).await?;
    parse(&output).map_err(|e| {
        Error::new(Kind::Unsupported, format!("cannot {what}: qemu-img's answer is not understood"))
            .source(e)
    })
}

/// A raw image has no header: what qemu-img says of it is its length, which a process of its own
/// would take longer to tell than a small copy takes.
fn inspect_raw(path: &Path) -> Result<ImageInfo> {
    let size_bytes = FileSource::open(path, Access::Repeated)?.geometry().size_bytes;
    Ok(ImageInfo {
        // Disks are made of sectors: QEMU rounds up (block/file-posix.c).
        size_bytes: size_bytes.next_multiple_of(SECTOR_BYTES),
        allocated_bytes: allocated(path),
        bitmaps: None,
        backing: None,
        encrypted: false,
        corrupt: false,
        data_file: None,
    })
}

fn allocated(path: &Path) -> Option<u64> {
    path.metadata().ok().map(|data| data.blocks() * SECTOR_BYTES)
}

/// The file the data of the image is in, if that is another one. Its name begins in the directory of
/// the image, as libvirt takes it.
fn data_file(path: &Path, info: &ImageInfo) -> Result<Option<PathBuf>> {
    let Some(name) = &info.data_file else { return Ok(None) };
    // As long as there is a colon before the first slash, QEMU may see a protocol (`json:`, `nbd:`).
    let is_local = name.starts_with('/') || !(name.is_empty() || name.contains(':'));
    let directory = path.parent().filter(|_| is_local);
    let Some(directory) = directory else {
        let path = path.display();
        let message = format!("{path} keeps its data in {name}, which is not a local file");
        return Err(Error::new(Kind::Unsupported, message)
            .hint("start the VM and back it up while it runs"));
    };
    Ok(Some(directory.join(name)))
}

/// The layer below, if there is one that may be followed.
fn below(path: &Path, info: &ImageInfo) -> Result<Option<(PathBuf, String)>> {
    let refuse = |kind, why: &str, hint: &str| {
        Err(Error::new(kind, format!("{} {why}", path.display())).hint(hint))
    };
    if info.encrypted {
        return refuse(
            Kind::Unsupported,
            "is encrypted",
            "start the VM and back it up while it runs",
        );
    }
    if info.corrupt {
        return refuse(Kind::Corrupt, "is marked corrupt", "look at it with qemu-img check");
    }
    let Some(backing) = &info.backing else { return Ok(None) };
    let Some(format) = &backing.format else {
        return refuse(
            Kind::Unsupported,
            &format!("names the backing file {} without its format", backing.path),
            "record it: qemu-img rebase -u -b FILE -F FORMAT IMAGE",
        );
    };
    check_format(format)?;
    if !backing.path.starts_with('/') {
        return refuse(
            Kind::Unsupported,
            &format!("has the backing file {}, which is not a local file", backing.path),
            "start the VM and back it up while it runs",
        );
    }
    Ok(Some((PathBuf::from(&backing.path), format.clone())))
}

/// A format is a driver name, not an option string.
pub(super) fn check_format(format: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if format.is_empty() || format.len() > 32 || !format.chars().all(plain) {
        return Err(Error::new(Kind::Usage, format!("'{format}' is not an image format"))
            .hint("write qcow2, raw, vmdk or another format qemu-img knows"));
    }
    Ok(())
}

fn parse(output: &[u8]) -> serde_json::Result<ImageInfo> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Info {
        virtual_size: u64,
        actual_size: Option<u64>,
        #[serde(default)]
        encrypted: bool,
        full_backing_filename: Option<String>,
        backing_filename: Option<String>,
        backing_filename_format: Option<String>,
        format_specific: Option<Specific>,
    }
    #[derive(Deserialize)]
    struct Specific {
        r#type: String,
        data: serde_json::Value,
    }
    #[derive(Deserialize)]
    struct Bitmap {
        name: String,
        flags: Vec<String>,
    }
    let info: Info = serde_json::from_slice(output)?;
    let qcow2 = info.format_specific.filter(|s| s.r#type == "qcow2").map(|s| s.data);
    let qcow2 = qcow2.unwrap_or_default();
    // "Cannot store dirty bitmaps in qcow2 v2 files": compat 0.10.
    let bitmaps = if qcow2["compat"].as_str().is_some_and(|compat| compat != "0.10") {
        let listed = match &qcow2["bitmaps"] {
            serde_json::Value::Null => Vec::new(),
            list => Vec::<Bitmap>::deserialize(list)?,
        };
        let bitmap = |b: Bitmap| BitmapInfo {
            recording: b.flags.iter().any(|flag| flag == "auto"),
            inconsistent: b.flags.iter().any(|flag| flag == "in-use"),
            name: b.name,
        };
        Some(listed.into_iter().map(bitmap).collect())
    } else {
        None
    };
    let backing = info.full_backing_filename.or(info.backing_filename);
    Ok(ImageInfo {
        size_bytes: info.virtual_size,
        allocated_bytes: info.actual_size,
        bitmaps,
        backing: backing.map(|path| Backing { path, format: info.backing_filename_format }),
        encrypted: info.encrypted,
        corrupt: qcow2["corrupt"].as_bool().unwrap_or(false),
        data_file: qcow2["data-file"].as_str().map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_a_plain_driver_name() {
        for format in ["qcow2", "raw", "vmdk", "vhdx"] {
            check_format(format).unwrap();
        }
        for format in ["", "raw,file.filename=x", "QCOW2", "a b"] {
            assert_eq!(check_format(format).unwrap_err().kind(), Kind::Usage);
        }
    }
}
