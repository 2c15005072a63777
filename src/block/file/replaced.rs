//! What a file takes over from the one whose place it takes: the place itself where a link leads to
//! it, owner, mode, access list and security label. A QEMU that could open the old image opens the new one.
//!
//! All is taken over while the new file is empty: what cannot be kept is told before hours of copying.
//! Nothing is where somebody else may have made the old one to be given what is written.

use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, XattrFlags, fremovexattr, fsetxattr, getxattr, openat};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::parent;
use crate::error::{Error, Kind, Result};

/// Links followed, as many as Linux does (`MAXSYMLINKS`).
const LINKS_MAX: usize = 40;

/// The rights of a mode. Never those of a program, to be somebody else.
const ALL: u32 = 0o777;
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
        let us = geteuid();
        if link != 0 && link != us.as_raw() {
            let message =
                format!("{} leads to {} and is somebody else's", path.display(), to.display());
            return Err(Error::new(Kind::Permission, message).hint("name the file itself"));
        }
        path = to;
    }
    Err(Error::new(Kind::Usage, format!("{} leads nowhere: too many links", path.display())))
}

/// Gives `new` what `old` has, if there is one: a file that nobody can have made to be given what is
/// written; a log line says where that is not known. `new` is yours alone then.
pub fn take_over(old: &Path, new: &File) -> Result<()> {
    let Some(was) = Old::open(old)? else { return Ok(()) };
    let Some(kept) = was.kept() else {
        let rights = |data: &Metadata| (data.uid(), data.gid(), data.mode() & 0o777);
        if new.metadata().is_ok_and(|now| rights(&now) != rights(&was.data)) {
            tracing::warn!(
                path = %old.display(),
                "owner and mode are not kept: others make files in its directory"
            );
        }
        return Ok(());
    };
    if was.data.mode() & ALL & !kept != 0 {
        tracing::warn!(
            path = %old.display(),
            "only its owner's rights are kept: a group may give its name to other files"
        );
    }
    was.give(new, kept).map_err(|e| not_kept(old, e))
}

/// Fails where [`take_over`] would: tries it with a file that has no name and is gone at once. Where no
/// file can be made, whoever makes the new one says so.
pub fn check_take_over(old: &Path) -> Result<()> {
    let Some(was) = Old::open(old)? else { return Ok(()) };
    let Some(kept) = was.kept() else { return Ok(()) };
    let Ok(new) = tempfile::tempfile_in(parent(old)) else { return Ok(()) };
    was.give(&new, kept).map_err(|e| not_kept(old, e))
}

fn not_kept(old: &Path, error: io::Error) -> Error {
    let message = format!("cannot keep owner and mode of {}", old.display());
    Error::io(message, error).hint("run as root, or move it away first")
}

/// A file whose place is to be taken. It is held: whoever may write its directory cannot exchange it
/// between a look at it and what follows.
struct Old {
    file: File,
    data: Metadata,
    directory: Metadata,
}

impl Old {
    /// The file of this name; none if nothing has it, or something else.
    fn open(path: &Path) -> Result<Option<Self>> {
        let fail = |e| Error::open(path, e);
        let held = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Some(name) = path.file_name() else { return Ok(None) };
        // The directory may be reached by a link.
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = openat(CWD, parent(path), directory, Mode::empty()).and_then(|directory| {
            let file = openat(&directory, name, held, Mode::empty())?;
            Ok((File::from(directory), File::from(file)))
        });
        let (directory, file) = match opened {
            Ok(opened) => opened,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(fail(error.into())),
        };
        let data = file.metadata().map_err(fail)?;
        let directory = directory.metadata().map_err(fail)?;
        Ok(data.is_file().then_some(Self { file, data, directory }))
    }

    /// The rights that are kept, of [`ALL`], beside the owner: of a file whose maker is known. Nothing in a
    /// directory in which everybody makes files; where a group does, only of somebody who can do more
    /// anyway, and of the owner's alone if the group may also give the name to another file of theirs.
    fn kept(&self) -> Option<u32> {
        let (us, owner) = (geteuid().as_raw(), self.data.uid());
        let is_known = owner == us || owner == 0 || owner == self.directory.uid();
        match self.directory.mode() & 0o1022 {
            0 | 0o1000 => Some(ALL),
            0o1020 if is_known => Some(ALL),
            0o020 if is_known => Some(0o700),
            _ => None,
        }
    }

    fn give(&self, new: &File, kept: u32) -> io::Result<()> {
        let (was, now) = (&self.data, new.metadata()?);
        if (was.uid(), was.gid()) != (now.uid(), now.gid()) {
            fchown(new, Some(was.uid()), Some(was.gid()))?;
        }
        let mode = was.mode() & kept;
        if mode != now.mode() & 0o777 {
            new.set_permissions(Permissions::from_mode(mode))?;
        }
        // After the mode, whose bits of the group are those of its mask.
        if kept == ALL {
            self.attribute(ACCESS_LIST, new)?;
        }
        if let Err(error) = self.attribute(LABEL, new) {
            // Whoever enforces labels sets those of images, too (libvirt, when it starts a domain).
            tracing::debug!(%error, "label not kept");
        }
        Ok(())
    }

    /// The same attribute, or none.
    fn attribute(&self, name: &str, new: &File) -> io::Result<()> {
        // fgetxattr(2) takes no descriptor that is only a place (open(2), O_PATH).
        let held = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
        let result = match getxattr(held, name, &mut value[..]) {
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
        if !geteuid().is_root() {
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

    /// Whether a new file gets the mode of an old one that is of `owner`, in a directory of root with
    /// this mode.
    fn is_taken_over(directory: u32, owner: Option<u32>) -> bool {
        let base = tempfile::tempdir().unwrap();
        let (old, new) = (base.path().join("old"), tempfile::tempfile().unwrap());
        fs::write(&old, "").unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o666)).unwrap();
        std::os::unix::fs::chown(&old, owner, None).unwrap();
        fs::set_permissions(base.path(), Permissions::from_mode(directory)).unwrap();
        take_over(&old, &new).unwrap();
        let now = new.metadata().unwrap();
        let is_kept = owner.is_none_or(|owner| now.uid() == owner);
        is_kept && now.mode() & 0o777 == 0o666
    }

    #[test]
    fn a_file_where_everybody_makes_files_gives_no_rights_away() {
        assert!(!is_taken_over(0o1777, None));
        assert!(is_taken_over(0o755, None));
        assert!(is_taken_over(0o3775, None), "our own");
        assert!(!is_taken_over(0o2775, None), "another of our own may have got its name");
    }

    /// Found in review: a member of the group made a file that everybody reads, and root wrote the
    /// firmware's variables into it.
    #[test]
    fn a_file_that_a_member_of_a_group_made_gives_no_rights_away() {
        if geteuid().is_root() {
            assert!(!is_taken_over(0o2775, Some(65534)));
            assert!(!is_taken_over(0o3775, Some(65534)));
            assert!(!is_taken_over(0o1777, Some(65534)));
            assert!(is_taken_over(0o755, Some(65534)), "nobody else makes files there");
        }
    }

    /// Of a file that its directory's group may give another name to, only the owner stays, and what it may do.
    #[test]
    fn where_a_group_renames_only_the_owners_rights_are_kept() {
        if !geteuid().is_root() {
            return;
        }
        let base = tempfile::tempdir_in("/var/tmp").unwrap();
        let (old, new) = (base.path().join("old"), tempfile::tempfile_in("/var/tmp").unwrap());
        fs::write(&old, "").unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o666)).unwrap();
        let has_lists = rustix::fs::setxattr(&old, ACCESS_LIST, &list(), XattrFlags::empty());
        for path in [base.path(), &old] {
            std::os::unix::fs::chown(path, Some(65534), None).unwrap();
        }
        fs::set_permissions(base.path(), Permissions::from_mode(0o2775)).unwrap();
        take_over(&old, &new).unwrap();
        let now = new.metadata().unwrap();
        assert_eq!((now.uid(), now.mode() & 0o777), (65534, 0o600));
        if has_lists.is_ok() {
            let listed = rustix::fs::fgetxattr(&new, ACCESS_LIST, &mut vec![0; 1024][..]);
            assert_eq!(listed.unwrap_err(), Errno::NODATA);
        }
    }

    /// Found in review: its name was looked at again and again, and may have been of another file by
    /// then.
    #[test]
    fn a_file_that_gets_another_name_meanwhile_is_the_one_whose_rights_are_kept() {
        let base = tempfile::tempdir_in("/var/tmp").unwrap();
        let (old, new) = (base.path().join("old"), tempfile::tempfile_in("/var/tmp").unwrap());
        fs::write(&old, "").unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o640)).unwrap();
        let has_lists = rustix::fs::setxattr(&old, ACCESS_LIST, &list(), XattrFlags::empty());
        let was = Old::open(&old).unwrap().unwrap();
        fs::rename(&old, base.path().join("moved")).unwrap();
        fs::write(&old, "").unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o666)).unwrap();
        was.give(&new, ALL).unwrap();
        if has_lists.is_ok() {
            let mut value = vec![0; 1024];
            let len = rustix::fs::fgetxattr(&new, ACCESS_LIST, &mut value[..]).unwrap();
            assert_eq!(value[..len], list()[..]);
        } else {
            assert_eq!(new.metadata().unwrap().mode() & 0o777, 0o640);
        }
    }

    /// user::rw- user:65534:r-- group::rw- mask::rw- other::r-- (linux/posix_acl_xattr.h)
    fn list() -> Vec<u8> {
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
        list
    }

    #[test]
    fn owner_mode_and_access_list_are_kept() {
        let base = tempfile::tempdir_in("/var/tmp").unwrap();
        let (old, new) = (base.path().join("old"), base.path().join("new"));
        for name in [&old, &new] {
            fs::write(name, "").unwrap();
        }
        let file = File::open(&new).unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o4664)).unwrap();
        if geteuid().is_root() {
            std::os::unix::fs::chown(&old, Some(65534), Some(12)).unwrap();
        }
        let has_lists =
            rustix::fs::setxattr(&old, ACCESS_LIST, &list(), XattrFlags::empty()).is_ok();
        take_over(&old, &file).unwrap();
        let (was, now) = (old.metadata().unwrap(), new.metadata().unwrap());
        assert_eq!((was.uid(), was.gid()), (now.uid(), now.gid()));
        assert_eq!(now.mode() & 0o7777, 0o664, "and no rights of a program");
        if has_lists {
            let mut value = vec![0; 1024];
            let len = getxattr(&new, ACCESS_LIST, &mut value[..]).unwrap();
            assert_eq!(value[..len], list()[..]);
        }
        take_over(&base.path().join("none"), &file).unwrap();
    }
}
