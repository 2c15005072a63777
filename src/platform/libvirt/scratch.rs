//! Where scratch and sockets go. How much room there is: [`crate::platform::space`].

use std::path::{Path, PathBuf};

use super::connection::Host;
use super::names::domain_dir;
use super::survey::Survey;
use crate::platform::SnapshotRequest;

/// The directories of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Places {
    /// Scratch files.
    pub(super) scratch: PathBuf,
    /// The NBD socket.
    pub(super) socket: PathBuf,
}

impl Places {
    /// Chooses them: scratch as asked for or in the driver's state directory, which QEMU owns on
    /// every distribution; the socket in the domain's own directory below it, where AppArmor and
    /// SELinux let QEMU create it. A session daemon's QEMU is the user's own: `runtime_dir`.
    pub(super) fn choose(
        host: &Host,
        survey: &Survey,
        name: &str,
        request: &SnapshotRequest,
        runtime_dir: &Path,
    ) -> Self {
        let qemu_dir = host.qemu_dir();
        let scratch = request.scratch_dir.clone().or_else(|| qemu_dir.clone());
        let socket = match (&qemu_dir, survey.id) {
            (Some(dir), Some(id)) => domain_dir(dir, id, name),
            (Some(dir), None) => dir.clone(),
            (None, _) => runtime_dir.to_owned(),
        };
        Self { scratch: scratch.unwrap_or_else(|| runtime_dir.to_owned()), socket }
    }
}

impl Places {
    /// What to do when QEMU, which runs as `user` where that is known, is not let in.
    pub(super) fn access_hint(&self, user: Option<&str>) -> String {
        let (scratch, socket) = (self.scratch.display(), self.socket.display());
        let user = user.unwrap_or("the user it runs as");
        format!(
            "QEMU must be able to write to {scratch} and {socket} as {user}: let that user enter \
             every directory above and write to the last ('chown {user} {scratch}'), or name \
             another with --scratch-dir; where AppArmor or SELinux confines QEMU, allow the path \
             ('{scratch}/** rwk,' in /etc/apparmor.d/abstractions/libvirt-qemu.d/) or label it \
             ('chcon -t virt_image_t {scratch}')"
        )
    }
}

/// The name (or number) of the user a directory belongs to. Of the driver's state directory that is
/// the user QEMU runs as: libvirt gives it to them (`virQEMUDriverConfigNew`).
pub(super) fn owner(directory: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let uid = directory.metadata().ok()?.uid().to_string();
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    Some(name.unwrap_or(uid))
}
