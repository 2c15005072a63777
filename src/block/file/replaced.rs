//! What a file takes over from the one whose place it takes: the place itself where a link leads to
//! it, owner, mode, access list and security label. A QEMU that could open the old image opens the new one.
//!
//! All is taken over while the new file is empty: what cannot be kept is told before hours of copying.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{XattrFlags, fremovexattr, fsetxattr, getxattr};
use rustix::io::Errno;

use super::parent;
use crate::error::{Error, Kind, Result};

/// Links followed, as many as Linux does (`MAXSYMLINKS`).
const LINKS_MAX: usize = 40;

/// Access rights beyond the mode (acl(5)).
const ACCESS_LIST: &str = "system.posix_acl_access";
/// SELinux's label.
const LABEL: &str = "security.selinux";
/// Most bytes of either that are kept.
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;

/// Where `path` leads to: what replaces a file takes the place of that, and links stay. A link is
/// followed if it is of root or of who runs this: anybody else could have files replaced that are not
/// theirs, or have the new one put among their own.
pub fn followed(path: &Path) -> Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        let to = match fs::read_link(&path) {
            Ok(to) => parent(&path).join(to),
            // Nothing is there, or no link.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => {
                return Ok(path);
            }
            Err(error) => return Err(Error::open(&path, error)),
        };
        let link = path.symlink_metadata().map_err(|e| Error::open(&path, e))?.uid();
        let us = rustix::process::geteuid();
        if link != 0 && link != us.as_raw() {
            let message =
                format!("{} leads to {} and is somebody else's", path.display(), to.display());
            return Err(Error::new(Kind::Permission, message).hint("name the file itself"));
        }
        path = to;
    }
    Err(Error::new(Kind::Usage, format!("{} leads nowhere: too many links", path.display())))
}

/// Gives `new` what `old` has, if there is one: a file, in a directory in which not everybody makes
/// files. There somebody could have made it to be given what is written.
pub fn take_over(old: &Path, new: &File) -> Result<()> {
    let fail = |e| {
        let message = format!("cannot keep owner and mode of {}", old.display());
        Error::io(message, e).hint("run as root, or move it away first")
    };
    let was = match old.symlink_metadata() {
        Ok(was) => was,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::open(old, error)),
    };
    let directory = fs::metadata(parent(old)).map_err(|e| Error::open(parent(old), e))?;
    if !was.is_file() || directory.mode() & 0o002 != 0 {
        return Ok(());
    }
    let now = new.metadata().map_err(fail)?;
    if (was.uid(), was.gid()) != (now.uid(), now.gid()) {
        fchown(new, Some(was.uid()), Some(was.gid())).map_err(fail)?;
    }
    let mode = was.mode() & 0o777;
    if mode != now.mode() & 0o777 {
        new.set_permissions(fs::Permissions::from_mode(mode)).map_err(fail)?;
    }
    // After the mode, whose bits of the group are those of its mask.
    attribute(ACCESS_LIST, old, new).map_err(fail)?;
    if let Err(error) = attribute(LABEL, old, new) {
        // Whoever enforces labels sets those of images, too (libvirt, when it starts a domain).
        tracing::debug!(%error, old = %old.display(), "label not kept");
    }
    Ok(())
}

/// The same attribute, or none.
fn attribute(name: &str, old: &Path, new: &File) -> io::Result<()> {
    let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
    let result = match getxattr(old, name, &mut value[..]) {
        Ok(len) => fsetxattr(new, name, &value[..len], XattrFlags::empty()),
        // A directory's default may have given it one.
        Err(Errno::NODATA) => fremovexattr(new, name),
        Err(error) => Err(error),
    };
    match result {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_followed_to_their_end_also_where_nothing_is() {
        let base = tempfile::tempdir().unwrap();
        let at = |name: &str| base.path().join(name);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("dir/file"), "").unwrap();
        symlink("dir/middle", at("first")).unwrap();
        symlink(at("dir/file"), at("dir/middle")).unwrap();
        symlink("dir/none", at("dangling")).unwrap();
        symlink("loop", at("loop")).unwrap();
        for (name, end) in
            [("first", "dir/file"), ("dir/file", "dir/file"), ("dangling", "dir/none")]
        {
            assert_eq!(followed(&at(name)).unwrap(), at(end), "{name}");
        }
        assert_eq!(followed(Path::new("not-there")).unwrap(), Path::new("not-there"));
        assert_eq!(followed(&at("loop")).unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn a_link_of_somebody_else_is_not_followed() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let (file, link) = (base.path().join("file"), base.path().join("link"));
        fs::write(&file, "").unwrap();
        symlink(&file, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
        assert_eq!(followed(&link).unwrap_err().kind(), Kind::Permission);
        std::os::unix::fs::lchown(&file, Some(65534), None).unwrap();
        assert_eq!(followed(&link).unwrap_err().kind(), Kind::Permission);
    }

    #[test]
    fn a_file_where_everybody_makes_files_gives_no_rights_away() {
        let base = tempfile::tempdir().unwrap();
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let (old, new) = (base.path().join("old"), tempfile::tempfile().unwrap());
        fs::write(&old, "").unwrap();
        fs::set_permissions(&old, fs::Permissions::from_mode(0o666)).unwrap();
        let mode = new.metadata().unwrap().mode();
        take_over(&old, &new).unwrap();
        assert_eq!(new.metadata().unwrap().mode(), mode);
    }

    #[test]
    fn owner_mode_and_access_list_are_kept() {
        let base = tempfile::tempdir_in("/var/tmp").unwrap();
        let (old, new) = (base.path().join("old"), base.path().join("new"));
        for name in [&old, &new] {
            fs::write(name, "").unwrap();
        }
        let file = File::open(&new).unwrap();
        fs::set_permissions(&old, fs::Permissions::from_mode(0o4664)).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&old, Some(65534), Some(12)).unwrap();
        }
        // user::rw- user:65534:r-- group::rw- mask::rw- other::r-- (linux/posix_acl_xattr.h)
        let entries: [(u16, u16, u32); 5] = [
            (1, 6, u32::MAX),
            (2, 4, 65534),
            (4, 6, u32::MAX),
            (16, 6, u32::MAX),
            (32, 4, u32::MAX),
        ];
        let mut list = 2u32.to_le_bytes().to_vec();
        for (tag, rights, id) in entries {
            list.extend(tag.to_le_bytes());
            list.extend(rights.to_le_bytes());
            list.extend(id.to_le_bytes());
        }
        let has_lists = rustix::fs::setxattr(&old, ACCESS_LIST, &list, XattrFlags::empty()).is_ok();
        take_over(&old, &file).unwrap();
        let (was, now) = (old.metadata().unwrap(), new.metadata().unwrap());
        assert_eq!((was.uid(), was.gid()), (now.uid(), now.gid()));
        assert_eq!(now.mode() & 0o7777, 0o664, "and no rights of a program");
        if has_lists {
            let mut value = vec![0; 1024];
            let len = getxattr(&new, ACCESS_LIST, &mut value[..]).unwrap();
            assert_eq!(value[..len], list[..]);
        }
        take_over(&base.path().join("none"), &file).unwrap();
    }
}
