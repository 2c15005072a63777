//! Which file a path leads to: so that an image is known again after a restart, and another one in
//! its place is not taken for it. What counts as the same is [`crate::vm::ImageId::is`]'s decision.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use crate::vm::FileId;

/// The regular file at `path`; `None` for everything else (the node of a block device is made anew
/// at each boot and says nothing of the device) and for what cannot be looked at.
pub async fn file_id(path: &Path) -> Option<FileId> {
    let owned = path.to_owned();
    // Not on the reactor: a dead NFS server lets it wait.
    let data = tokio::task::spawn_blocking(move || owned.metadata()).await;
    let data = match data.map_err(std::io::Error::from).flatten() {
        Ok(data) => data,
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "image not identified");
            return None;
        }
    };
    let created = data.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    data.is_file().then(|| FileId {
        device: data.dev(),
        inode: data.ino(),
        created_ns: created.and_then(|since| u64::try_from(since.as_nanos()).ok()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::ImageId;

    async fn image(path: &Path) -> ImageId {
        ImageId { origin: path.display().to_string(), file: file_id(path).await }
    }

    #[tokio::test]
    async fn a_file_is_itself_wherever_it_is_moved_and_whatever_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&here, "1").unwrap();
        let before = image(&here).await;
        std::fs::write(&here, "22").unwrap();
        assert!(image(&here).await.is(&before));
        std::fs::rename(&here, &there).unwrap();
        assert!(image(&there).await.is(&before));
    }

    /// ext4 gives the inode of the removed file to the copy.
    #[tokio::test]
    async fn a_copy_in_the_place_of_a_file_is_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let (here, other) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&here, "1").unwrap();
        std::fs::write(&other, "2").unwrap();
        let before = image(&here).await;
        // Time stamps of files follow the kernel's clock tick.
        std::thread::sleep(std::time::Duration::from_millis(50));
        std::fs::remove_file(&here).unwrap();
        std::fs::copy(&other, &here).unwrap();
        assert!(!image(&here).await.is(&before));
        assert_eq!(file_id(dir.path()).await, None, "a directory is no image");
    }
}
