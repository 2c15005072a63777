//! What a point holds of a domain besides its disks: description, firmware variables, boot files,
//! TPM state.
//!
//! Everything is bounded. What should be there and cannot be read (remote, too large, no
//! permission) is recorded as not captured with the next step, and never fails the backup: the
//! disks matter more.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::connection::DomainHandle;
use super::xml::Element;
use crate::vm::{Artifact, ArtifactKind, NotCaptured, Uuid};

/// Largest file stored as an artefact; NVRAM files are below 1 MiB on x86 and 64 MiB on Arm,
/// kernels and initrds tens of MiB.
const ARTIFACT_BYTES_MAX: u64 = 64 << 20;

/// Most files in a TPM state directory: swtpm keeps two to four.
const TPM_FILES_MAX: usize = 64;

/// Where libvirt keeps TPM state when the XML does not say (`qemu_tpm.c`, `swtpmStorageDir`).
pub(super) const SWTPM_DIR: &str = "/var/lib/libvirt/swtpm";

/// What is to be read, from the XML. Pure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    files: Vec<(ArtifactKind, PathBuf)>,
    tpm: Option<PathBuf>,
    /// Not files of the host, or nothing that can be read.
    beyond: Vec<NotCaptured>,
}

impl Wanted {
    fn from_xml(live: &Element, uuid: Uuid) -> Self {
        let mut wanted = Self::default();
        if let Some(nvram) = live.at(&["os", "nvram"]) {
            let path = nvram.attr_at(&["source"], "file").unwrap_or(&nvram.text);
            match nvram.attr("type") {
                None | Some("file") if path.starts_with('/') => {
                    wanted.files.push((ArtifactKind::Nvram, path.into()));
                }
                // Nothing is named before the first start.
                None if path.is_empty() => {}
                other => wanted.beyond.push(NotCaptured {
                    what: format!("NVRAM of type {}", other.unwrap_or("unknown")),
                    reason: "only NVRAM in a file of the host is read; copy it by hand".into(),
                }),
            }
        }
        for (name, kind) in [("kernel", ArtifactKind::Kernel), ("initrd", ArtifactKind::Initrd)] {
            if let Some(path) = live.text_at(&["os", name]) {
                wanted.files.push((kind, path.into()));
            }
        }
        let tpm = live.at(&["devices", "tpm", "backend"]);
        match tpm.and_then(|backend| backend.attr("type")) {
            Some("emulator") => {
                let given = live.attr_at(&["devices", "tpm", "backend", "source"], "path");
                let version = tpm.and_then(|b| b.attr("version")).unwrap_or("2.0");
                let part = if version == "1.2" { "tpm1.2" } else { "tpm2" };
                let standard = || Path::new(SWTPM_DIR).join(uuid.to_string()).join(part);
                wanted.tpm = Some(given.map_or_else(standard, PathBuf::from));
            }
            Some(other) => wanted.beyond.push(NotCaptured {
                what: format!("TPM of type {other}"),
                reason: "its state is in the host's device and cannot be copied".into(),
            }),
            None => {}
        }
        wanted.devices_beyond(live);
        wanted
    }

    /// Devices whose content is not in any disk of the domain.
    fn devices_beyond(&mut self, live: &Element) {
        let Some(devices) = live.child("devices") else { return };
        for (index, hostdev) in devices.all("hostdev").enumerate() {
            let kind = hostdev.attr("type").unwrap_or("unknown");
            self.beyond.push(NotCaptured {
                what: format!("host device {index} of type {kind}"),
                reason: "a device of the host; whatever it stores is not part of the point".into(),
            });
        }
        for filesystem in devices.all("filesystem") {
            let source = filesystem.child("source");
            let source = source.and_then(|s| s.attr("dir").or(s.attr("socket")).or(s.attr("file")));
            self.beyond.push(NotCaptured {
                what: format!("shared directory {}", source.unwrap_or("of the host")),
                reason: "it is a directory of the host; back it up as files".into(),
            });
        }
        for nvdimm in devices.all("memory").filter(|memory| memory.attr("model") == Some("nvdimm"))
        {
            let path = nvdimm.text_at(&["source", "path"]).unwrap_or("of the host");
            self.beyond.push(NotCaptured {
                what: format!("NVDIMM {path}"),
                reason: "memory kept in a host file is not read; copy it with the domain stopped"
                    .into(),
            });
        }
    }
}

/// The XML and everything it names, as of now.
pub(super) async fn capture(
    domain: &DomainHandle,
    live: &str,
    inactive: Option<String>,
    repository_has_key: bool,
) -> crate::error::Result<(Vec<Artifact>, Vec<NotCaptured>)> {
    let root = Element::parse("the domain XML", live)?;
    let wanted = Wanted::from_xml(&root, domain.uuid);
    let mut artifacts = vec![document(ArtifactKind::DomainXmlLive, live.to_owned())];
    artifacts.extend(inactive.map(|xml| document(ArtifactKind::DomainXmlInactive, xml)));
    let local = domain.host.is_local();
    let host = domain.host.hostname().to_owned();
    let read = tokio::task::spawn_blocking(move || {
        let mut missing = wanted.beyond;
        for (kind, path) in wanted.files {
            match if local { read_file(&path) } else { Err(on_other_host(&host)) } {
                Ok(bytes) => {
                    let origin = Some(path.to_string_lossy().into_owned());
                    artifacts.push(Artifact { kind, origin, bytes });
                }
                Err(reason) => missing.push(not_captured(&kind.to_string(), &path, reason)),
            }
        }
        if let Some(path) = wanted.tpm {
            let state = if !repository_has_key {
                Err("TPM state is stored only in a repository with a key: 'vmbackup repo key add'"
                    .to_owned())
            } else if local {
                tar_directory(&path)
            } else {
                Err(on_other_host(&host))
            };
            match state {
                Ok(bytes) => {
                    let origin = Some(path.to_string_lossy().into_owned());
                    artifacts.push(Artifact { kind: ArtifactKind::TpmState, origin, bytes });
                }
                Err(reason) => missing.push(not_captured("TPM state", &path, reason)),
            }
        }
        (artifacts, missing)
    });
    Ok(read.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())))
}

fn document(kind: ArtifactKind, xml: String) -> Artifact {
    Artifact { kind, origin: None, bytes: xml.into_bytes() }
}

fn not_captured(what: &str, path: &Path, reason: String) -> NotCaptured {
    NotCaptured { what: format!("{what} {}", path.display()), reason }
}

fn on_other_host(host: &str) -> String {
    format!("it is a file of host {host}: run vmbackup there, or copy it by hand")
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    if !file.metadata().map_err(|error| error.to_string())?.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    file.take(ARTIFACT_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > ARTIFACT_BYTES_MAX) {
        return Err(format!("it is larger than {ARTIFACT_BYTES_MAX} bytes"));
    }
    Ok(bytes)
}

/// The regular files of a directory as a POSIX ustar archive, sorted by name.
pub(super) fn tar_directory(path: &Path) -> Result<Vec<u8>, String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|error| error.to_string())? {
        let entry = entry.map_err(|error| error.to_string())?;
        let name = entry.file_name().into_string().map_err(|_| "a file name is no text")?;
        // The lock of a running swtpm is no state.
        if entry.file_type().is_ok_and(|kind| kind.is_file()) && name != ".lock" {
            names.push(name);
        }
        if names.len() > TPM_FILES_MAX {
            return Err(format!("more than {TPM_FILES_MAX} files"));
        }
    }
    names.sort();
    let mut tar = Vec::new();
    for name in names {
        let bytes = read_file(&path.join(&name))?;
        tar.extend_from_slice(&tar_header(&name, bytes.len()).ok_or("a file name is too long")?);
        tar.extend_from_slice(&bytes);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    Ok(tar)
}

/// The files of an archive that [`tar_directory`] made, with their names: plain names only, whatever
/// the archive says.
pub(super) fn untar(mut archive: &[u8]) -> Result<Vec<(&str, &[u8])>, String> {
    let mut files = Vec::new();
    loop {
        let Some((header, rest)) = archive.split_at_checked(512) else {
            return Err("it ends before its end mark".to_owned());
        };
        if header.iter().all(|byte| *byte == 0) {
            return Ok(files);
        }
        let text = |range: std::ops::Range<usize>| {
            let field = &header[range];
            let len = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
            std::str::from_utf8(&field[..len]).map_err(|_| "a header is damaged".to_owned())
        };
        let name = text(0..100)?;
        let sizes = u64::from_str_radix(text(124..136)?, 8).ok();
        let size = sizes.filter(|size| *size <= ARTIFACT_BYTES_MAX);
        let size = size.and_then(|size| usize::try_from(size).ok());
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
        let (Some(size), b"ustar", b'0', true) = (size, &header[257..262], header[156], plain)
        else {
            return Err(format!("the header of '{name}' is damaged"));
        };
        if files.len() >= TPM_FILES_MAX {
            return Err(format!("it has more than {TPM_FILES_MAX} files"));
        }
        let padded = size.next_multiple_of(512);
        let cut = || format!("file '{name}' is cut short");
        files.push((name, rest.get(..size).ok_or_else(cut)?));
        archive = rest.get(padded..).ok_or_else(cut)?;
    }
}

/// Header of a regular file, mode 0600, owner 0 (POSIX.1-1988 ustar: fields at 0 name, 100 mode,
/// 124 size, 148 checksum, 156 type, 257 magic).
fn tar_header(name: &str, size: usize) -> Option<[u8; 512]> {
    let mut header = [0_u8; 512];
    header
        .get_mut(..name.len())
        .filter(|field| field.len() < 100)?
        .copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000600");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[148..156].copy_from_slice(b"        ");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(xml: &str) -> Wanted {
        Wanted::from_xml(&Element::parse("test", xml).unwrap(), Uuid::from_u128(1))
    }

    #[test]
    fn the_xml_names_what_belongs_to_a_point() {
        let found = wanted(
            "<domain><os><kernel>/k</kernel><nvram template='/t'>/n.fd</nvram></os><devices>\
             <tpm><backend type='emulator' version='2.0'/></tpm>\
             <hostdev type='pci'/><filesystem><source dir='/srv'/></filesystem></devices></domain>",
        );
        assert_eq!(
            found.files,
            [(ArtifactKind::Nvram, "/n.fd".into()), (ArtifactKind::Kernel, "/k".into())]
        );
        let uuid = Uuid::from_u128(1);
        assert_eq!(found.tpm, Some(format!("/var/lib/libvirt/swtpm/{uuid}/tpm2").into()));
        assert_eq!(found.beyond.len(), 2);
        let network = wanted(
            "<domain><os><nvram type='network'><source protocol='nbd'/></nvram></os></domain>",
        );
        assert_eq!((network.files.len(), network.beyond.len()), (0, 1));
        let file =
            wanted("<domain><os><nvram type='file'><source file='/f'/></nvram></os></domain>");
        assert_eq!(file.files, [(ArtifactKind::Nvram, "/f".into())]);
    }

    #[test]
    fn tar_reads_what_was_packed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tpm2-00.permall"), [7; 700]).unwrap();
        std::fs::write(dir.path().join(".lock"), "").unwrap();
        let archive = dir.path().join("out.tar");
        std::fs::write(&archive, tar_directory(dir.path()).unwrap()).unwrap();
        let into = tempfile::tempdir().unwrap();
        let status = std::process::Command::new("tar")
            .arg("-xf")
            .arg(&archive)
            .arg("-C")
            .arg(into.path())
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!(std::fs::read(into.path().join("tpm2-00.permall")).unwrap(), [7; 700]);
        assert!(!into.path().join(".lock").exists());
    }
}
