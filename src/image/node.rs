//! An image as QEMU is told to open it node by node, where a header names a data file.
//!
//! Left to itself, QEMU takes the data file by the name in the header, a relative one from the
//! directory it was started in (10.0, `qcow2_do_open`), while libvirt takes that from the directory of
//! the image, as we do. Told of every node it opens the very files that were checked and locked, and
//! looks at no name in a header. Images without a data file are opened by path and format.
//!
//! Who only wants a look opens them without locks (`force-share`, QEMU 2.10; every node below takes it
//! over): a VM that starts meanwhile is not in the way, and does not find the image in use.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use super::device::is_device;
use super::info::Layer;

/// The option string (`--image-opts`) of these layers, the active one first; none where the path and
/// the format say all.
pub(super) fn options(layers: &[Layer]) -> Option<OsString> {
    layers.iter().find(|layer| layer.data_file.is_some())?;
    Some(nodes(layers, Vec::new()))
}

/// The same of any layers, for reading without locks.
pub(super) fn without_locks(layers: &[Layer]) -> OsString {
    nodes(layers, vec![b"force-share=on".to_vec()])
}

fn nodes(layers: &[Layer], mut options: Vec<Vec<u8>>) -> OsString {
    for (depth, layer) in layers.iter().enumerate() {
        let node = "backing.".repeat(depth);
        options.push(format!("{node}driver={}", layer.format).into_bytes());
        let data = layer.data_file.as_deref().map(|file| ("data-file", file));
        for (child, file) in [("file", layer.path.as_path())].into_iter().chain(data) {
            let driver = if is_device(file) { "host_device" } else { "file" };
            options.push(format!("{node}{child}.driver={driver}").into_bytes());
            let name = format!("{node}{child}.filename=").into_bytes();
            options.push([name, doubled(file)].concat());
        }
    }
    OsString::from_vec(options.join(&b','))
}

/// A path in an option string: each comma twice.
pub(super) fn doubled(path: &Path) -> Vec<u8> {
    let bytes = path.as_os_str().as_bytes().iter();
    bytes.flat_map(|byte| vec![*byte; 1 + usize::from(*byte == b',')]).collect()
}
