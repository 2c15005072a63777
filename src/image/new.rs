//! Making an image file of a format QEMU writes: it appears under its name when it is complete.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::export::{Compression, ImageExport};
use super::info::check_format;
use super::tool::{STDIN_FILE, absolute, qemu_img_on};
use crate::block::file::{Durability, Existing, NewFile};
use crate::block::{BlockSink, BlockSource};
use crate::error::{Error, Kind, Result};
use crate::nbd::{Access, ClientOptions, InitialContent};

/// Formats whose clusters QEMU compresses through a filter node (`compress`).
const COMPRESSING: [&str; 1] = ["qcow2"];

/// What the filter takes is whole clusters, also at the end of the disk (QEMU 10.0: "Image size is
/// not a multiple of request alignment"); this is their default size. An image of another size is
/// made larger and cut when it is complete.
const CLUSTER_BYTES: u64 = 64 << 10;

/// How an image is made.
#[derive(Clone, Debug)]
pub struct NewImageOptions {
    /// What becomes of a file that has the name.
    pub existing: Existing,
    /// Whether it is compressed.
    pub compression: Compression,
    /// Its name until it is complete, beside the one it gets; one that is free if not given.
    pub temporary: Option<PathBuf>,
    /// How the server of the format is spoken to.
    pub client: ClientOptions,
}

/// An image in the making. Dropped, nothing of it remains.
pub struct NewImage {
    file: NewFile,
    sink: NewImageSink,
}

/// Raw files are written directly, anything else through qemu-nbd.
enum NewImageSink {
    Raw,
    Served {
        export: Arc<ImageExport>,
        /// What it is to be cut to at the end.
        cut: Option<Cut>,
    },
}

/// The size of an image that is larger while it is written.
struct Cut {
    format: String,
    size_bytes: u64,
    /// Its name in errors.
    path: PathBuf,
}

impl NewImage {
    /// Begins an image of `size_bytes` in `format` that will be `path`, for what is not read soon.
    /// Not cancel-safe.
    pub async fn create(
        path: &Path,
        format: &str,
        size_bytes: u64,
        existing: Existing,
    ) -> Result<Self> {
        let options = NewImageOptions {
            existing,
            compression: Compression::None,
            temporary: None,
            client: ClientOptions::default(),
        };
        Self::create_with(path, format, size_bytes, options).await
    }

    /// The same with all options.
    pub async fn create_with(
        path: &Path,
        format: &str,
        size_bytes: u64,
        NewImageOptions { existing, compression, temporary, client }: NewImageOptions,
    ) -> Result<Self> {
        check_format(format)?;
        let path = absolute(path)?;
        if compression != Compression::None && !COMPRESSING.contains(&format) {
            return Err(Error::new(Kind::Usage, format!("{format} images are not compressed"))
                .hint(format!("formats that can be: {}", COMPRESSING.join(", "))));
        }
        if format == "raw" {
            let file = NewFile::create_as(&path, size_bytes, existing, temporary.as_deref())?;
            return Ok(Self { file, sink: NewImageSink::Raw });
        }
        let file = NewFile::create_as(&path, 0, existing, temporary.as_deref())?;
        let made_bytes = match compression {
            Compression::None => size_bytes,
            Compression::Clusters => size_bytes.next_multiple_of(CLUSTER_BYTES),
        };
        let export = make(&file, (&path, format, made_bytes), compression, client).await?;
        let cut = Cut { format: format.to_owned(), size_bytes, path };
        let cut = (made_bytes != size_bytes).then_some(cut);
        Ok(Self { file, sink: NewImageSink::Served { export: Arc::new(export), cut } })
    }

    /// Where the bytes go; let go of it before the commit. That of a compressed image has whole
    /// clusters and may be longer than the image will be: what is behind its end must stay zero.
    pub fn sink(&self) -> Arc<dyn BlockSink> {
        match &self.sink {
            NewImageSink::Raw => self.file.sink(),
            NewImageSink::Served { export, .. } => Arc::<ImageExport>::clone(export),
        }
    }

    /// What was written, read back, as long as the sink; nothing else is to write meanwhile.
    pub fn reader(&self) -> Result<Arc<dyn BlockSource>> {
        Ok(match &self.sink {
            NewImageSink::Raw => Arc::new(self.file.sink().reader()?),
            NewImageSink::Served { export, .. } => Arc::<ImageExport>::clone(export),
        })
    }

    /// Makes the image durable and gives it its name. A sink of it that is still held is an
    /// [`Kind::Internal`] error: what it wrote last might be missing. Not cancel-safe.
    pub async fn commit(self) -> Result<()> {
        self.close(Durability::Synced).await?.commit().await
    }

    /// Makes the image complete and durable under its temporary name: what is left is to
    /// [`NewFile::place`] it. Not cancel-safe.
    pub async fn complete(self) -> Result<NewFile> {
        let file = self.close(Durability::Synced).await?;
        file.sync().await?;
        Ok(file)
    }

    /// Ends writing, which may take as long as a flush: what is left is to publish the file, or to sync
    /// and [`NewFile::place`] it. Dropped meanwhile, it removes what was written.
    pub async fn close(self, durability: Durability) -> Result<NewFile> {
        if let NewImageSink::Served { export, cut } = self.sink {
            if durability == Durability::Synced {
                export.flush().await?;
            }
            let export = Arc::into_inner(export)
                .ok_or_else(|| Error::new(Kind::Internal, "a finished image is still written"))?;
            // Closing writes what is left of the format's own tables.
            export.close().await?;
            if let Some(cut) = cut {
                cut.apply(&self.file).await?;
            }
        }
        Ok(self.file)
    }

    /// Removes what was written.
    pub fn abort(self) -> Result<()> {
        drop(self.sink);
        self.file.abort()
    }
}

impl Cut {
    /// Takes the zeroes off the end, less than a cluster of them: no cluster moves, and a cluster
    /// that is compressed stays as it is.
    async fn apply(&self, file: &NewFile) -> Result<()> {
        let Self { format, size_bytes, path } = self;
        let what = format!("cut {} to {size_bytes} bytes", path.display());
        let open = file.descriptor().map_err(|e| Error::io(format!("cannot {what}"), e))?;
        let size = size_bytes.to_string();
        let args = ["resize", "-q", "--shrink", "-f", format, STDIN_FILE, &size].map(OsStr::new);
        qemu_img_on(open.into(), args.into(), &what).await.map(|_| ())
    }
}

/// Makes an empty image of `file` and serves it. The tools get the file and not its name: whoever
/// owns the directory may have put a link to something else there.
async fn make(
    file: &NewFile,
    (path, format, size_bytes): (&Path, &str, u64),
    compression: Compression,
    client: ClientOptions,
) -> Result<ImageExport> {
    let open = || {
        let failed = |e| Error::io(format!("cannot open {}", path.display()), e);
        file.descriptor().map_err(failed)
    };
    let what = format!("create {} as {format}", path.display());
    let size = size_bytes.to_string();
    let mut args = ["create", "-q", "-f", format].map(OsStr::new).to_vec();
    if format == "vpc" {
        // Whole cylinders otherwise, which is more (QEMU, block/vpc.c).
        args.extend(["-o", "force_size=on"].map(OsStr::new));
    }
    args.extend([STDIN_FILE, &size].map(OsStr::new));
    qemu_img_on(open()?.into(), args, &what).await?;
    let client =
        ClientOptions { access: Access::Write(InitialContent::Zero), changes: None, ..client };
    let export = ImageExport::write((path, format, Some(open()?)), compression, client).await?;
    let made_bytes = BlockSink::geometry(&export).size_bytes;
    if made_bytes != size_bytes {
        // The guest would see another disk.
        let message = format!("cannot {what}: {size_bytes} bytes become {made_bytes}");
        return Err(Error::new(Kind::Unsupported, message).hint("choose qcow2 or raw"));
    }
    Ok(export)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_takes_the_temporary_name_is_not_written() {
        let base = tempfile::tempdir().unwrap();
        let (path, secret) = (base.path().join("a.qcow2"), base.path().join("secret"));
        for compression in [Compression::None, Compression::Clusters] {
            std::fs::write(&secret, "secret").unwrap();
            let file = NewFile::create(&path, 0, Existing::Refuse).unwrap();
            std::fs::remove_file(file.temporary_path()).unwrap();
            std::os::unix::fs::symlink(&secret, file.temporary_path()).unwrap();
            let image = (path.as_path(), "qcow2", 1 << 20);
            let export = make(&file, image, compression, ClientOptions::default()).await.unwrap();
            export.close().await.unwrap();
            assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
            let mut magic = [0; 4];
            std::os::unix::fs::FileExt::read_exact_at(
                &std::fs::File::from(file.descriptor().unwrap()),
                &mut magic,
                0,
            )
            .unwrap();
            assert_eq!(&magic, b"QFI\xfb");
            assert!(file.commit().await.is_err(), "something else has the name");
            assert!(!path.exists());
        }
    }
}
