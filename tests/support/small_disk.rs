//! A file system that is soon full.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system in memory, unmounted with its guard.
pub(crate) struct SmallDisk {
    /// Where it is.
    pub(crate) path: PathBuf,
}

impl SmallDisk {
    /// Mounts one of `size` (`4M`) on `small` in `directory`; everybody may write to it.
    pub(crate) fn mount(directory: &Path, size: &str) -> Self {
        let small = Self { path: directory.join("small") };
        std::fs::create_dir(&small.path).expect("own directory");
        let options = ["-t", "tmpfs", "-o", &format!("size={size},mode=777"), "vmbtest"];
        let mounted = Command::new("mount").args(options).arg(&small.path).status();
        assert!(mounted.expect("mount runs").success(), "tmpfs is not mounted");
        small
    }

    /// What is in it.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.path).expect("mounted");
        entries.map(|entry| entry.expect("readable").path()).collect()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Nothing is left to tell it to; a program that still uses it ends with its own guard.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
