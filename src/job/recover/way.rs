//! The way to the VM of a journal, and whether it is gone: what the journal noted of its place,
//! read against what is there now. For the recovery of all VMs.

use std::error::Error as StdError;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind};
use crate::job::source::{ImageSpec, SourceSpec};
use crate::journal::Place;
use crate::vm::Uuid;

/// Whether an error of looking for the VM means that it is not there any more. A QEMU by itself is
/// gone when nobody listens on its monitor; a libvirt that does not answer says nothing, nor does a
/// path that means another file in each directory.
pub(super) fn is_gone(place: &Place, error: &Error) -> bool {
    match place {
        Place::Qemu { monitor, .. } if monitor.is_absolute() => {
            let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
            while let Some(error) = cause {
                if let Some(qmp::Error::Connect { source, .. }) = error.downcast_ref() {
                    let kind = source.kind();
                    return matches!(kind, ErrorKind::NotFound | ErrorKind::ConnectionRefused);
                }
                cause = error.source();
            }
            false
        }
        Place::Libvirt { .. } => error.kind() == Kind::NotFound,
        Place::Qemu { .. } | Place::Images { .. } => false,
    }
}

/// Whether the VM was images and none of them is there any more.
pub(super) fn are_gone(place: &Place) -> bool {
    let is_gone = |path: &Path| {
        path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound)
    };
    matches!(place, Place::Images { images } if images.iter().all(|(path, _)| is_gone(path)))
}

/// How the VM of a journal is reached.
pub(super) fn way_to(place: &Place, name: &str, uuid: Uuid) -> SourceSpec {
    match place {
        Place::Libvirt { uri } => {
            SourceSpec::Libvirt { uri: uri.clone(), domain: uuid.to_string() }
        }
        Place::Qemu { monitor, agent, name } => {
            let (qmp, agent, name) = (monitor.clone(), agent.clone(), name.clone());
            SourceSpec::Qemu { qmp, agent, name }
        }
        Place::Images { images } => {
            let image = |(path, format): &(PathBuf, String)| ImageSpec {
                path: path.clone(),
                format: format.clone(),
            };
            let images = images.iter().map(image).collect();
            SourceSpec::Images { name: name.to_owned(), images }
        }
    }
}
