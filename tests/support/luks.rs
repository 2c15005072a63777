//! The passphrase of encrypted images: in a file for QEMU's tools, and as a secret of libvirt's.

use std::path::{Path, PathBuf};

use super::env::TestEnv;
use super::libvirt::virsh;
use super::outcome::Outcome;

const PASSPHRASE: &str = "open sesame";

/// A secret of libvirt's, gone with its guard, and the file with the same passphrase.
pub(crate) struct Secret<'env> {
    env: &'env TestEnv,
    uuid: String,
    file: PathBuf,
}

impl<'env> Secret<'env> {
    /// Defines it.
    pub(crate) fn define(env: &'env TestEnv, suffix: &str) -> Self {
        let uuid = uuid::Uuid::new_v4().to_string();
        let file = env.path(&format!("passphrase{suffix}"));
        std::fs::write(&file, PASSPHRASE).expect("own directory");
        let xml = env.path(&format!("secret{suffix}.xml"));
        let text = format!("<secret ephemeral='yes' private='no'><uuid>{uuid}</uuid></secret>");
        std::fs::write(&xml, text).expect("own directory");
        virsh(env, &["secret-define", &xml.to_string_lossy()]).ok();
        let path = file.to_string_lossy().into_owned();
        virsh(env, &["secret-set-value", &uuid, "--plain", "--file", &path]).ok();
        Self { env, uuid, file }
    }

    /// The element of a disk's source that names it.
    pub(crate) fn xml(&self) -> String {
        let uuid = &self.uuid;
        format!("<encryption format='luks'><secret type='passphrase' uuid='{uuid}'/></encryption>")
    }

    /// The `--object` of QEMU's tools, as `s`.
    pub(crate) fn object(&self) -> String {
        format!("secret,id=s,file={}", self.file.display())
    }

    /// Makes an image: a qcow2 that is encrypted inside, or a raw one in a LUKS container.
    pub(crate) fn make_image(&self, format: &str, path: &Path, size: &str) {
        let (format, options) = if format == "qcow2" {
            ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")
        } else {
            ("luks", "key-secret=s,iter-time=10")
        };
        let mut command = self.env.command("qemu-img");
        command.args(["create", "-q", "-f", format, "--object", &self.object(), "-o", options]);
        command.arg(path).arg(size);
        // Versions with c72cab5ad9 ("run qcrypto_pbkdf2_count_iters in a new thread", in Debian 12's 7.2.22) take
        // the first measurement of a fast machine, of 0 ms, for an error.
        let is_too_fast =
            |outcome: &Outcome| outcome.stderr.contains("Unable to get accurate CPU usage");
        let mut made = (0..20).map(|_| Outcome::of(&mut command));
        made.find(|outcome| !is_too_fast(outcome)).expect("the machine's speed is measured").ok();
    }

    /// What QEMU's tools open instead of such an image, with `--image-opts`.
    pub(crate) fn image_options(format: &str, path: &Path) -> String {
        let driver = if format == "qcow2" { "qcow2,encrypt.key-secret" } else { "luks,key-secret" };
        format!("driver={driver}=s,file.filename={}", path.display())
    }
}

impl Drop for Secret<'_> {
    fn drop(&mut self) {
        virsh(self.env, &["secret-undefine", &self.uuid]);
    }
}
