//! From what was typed to what is meant: the one resolver between arguments and the job layer.
//!
//! Everything that depends on the environment (who runs it, the XDG directories, extensions of
//! file names) is decided here, once, with errors that name the option. Nothing below this file
//! sees a raw string or asks the environment.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::RepositoryArgs;
use super::vm_settings::duration;
use crate::error::{Error, Kind, Result};
use crate::job::serve::Served;
use crate::job::source::{DiskSpec, ImageSpec};
use crate::job::{REPOSITORY_ANSWER, RepositoryChoice};
use crate::nbd::tls::Credentials;
use crate::nbd::{NbdUri, Origin};

/// Longest wait for a call to a repository: `VMBACKUP_REPO_TIMEOUT`, as options have times.
pub(crate) fn repository_answer() -> Result<Duration> {
    const NAME: &str = "VMBACKUP_REPO_TIMEOUT";
    match std::env::var(NAME) {
        Ok(text) if !text.is_empty() => match duration(NAME, &text)? {
            Duration::ZERO => Err(Error::new(Kind::Usage, format!("{NAME} is no time at all"))
                .hint("name how long a repository is waited for, as in 10m")),
            answer => Ok(answer),
        },
        _ => Ok(REPOSITORY_ANSWER),
    }
}

/// Directories of this user (FHS for root, XDG base directories otherwise). `VMBACKUP_STATE_DIR`,
/// `VMBACKUP_RUNTIME_DIR` and `VMBACKUP_CACHE_DIR` replace the last three. Two programs that are
/// to keep out of each other's way on a VM have to share the first two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Paths {
    /// The repository used when none is named.
    pub(crate) repository: PathBuf,
    /// Locks and journals.
    pub(crate) state: PathBuf,
    /// Locks and sockets of running backups; empty after a boot.
    pub(crate) runtime: PathBuf,
    /// Copies of what a repository can give again.
    pub(crate) cache: PathBuf,
}

impl Paths {
    /// The directories of the user who runs this.
    pub(crate) fn from_environment() -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name);
        Self::resolve(rustix::process::geteuid().is_root(), variable)?.replaced(variable)
    }

    /// These, with those replaced that variables of our own name.
    fn replaced(mut self, variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        for (name, place) in [
            ("VMBACKUP_STATE_DIR", &mut self.state),
            ("VMBACKUP_RUNTIME_DIR", &mut self.runtime),
            ("VMBACKUP_CACHE_DIR", &mut self.cache),
        ] {
            let Some(path) = variable(name).filter(|value| !value.is_empty()) else { continue };
            *place = path.into();
            if !place.is_absolute() {
                let message = format!("{name} is not an absolute path: {}", place.display());
                return Err(Error::new(Kind::Usage, message)
                    .hint(format!("start the path in {name} with a slash, or unset it")));
            }
        }
        Ok(self)
    }

    fn resolve(root: bool, variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        if root {
            return Ok(Self {
                repository: "/var/lib/vmbackup/repo".into(),
                state: "/var/lib/vmbackup/state".into(),
                runtime: "/run/vmbackup".into(),
                cache: "/var/cache/vmbackup".into(),
            });
        }
        // Relative paths in these variables are to be ignored (XDG base directory specification).
        let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let base = |name: &str, below_home: &str| {
            let base = absolute(name).or_else(|| Some(absolute("HOME")?.join(below_home)));
            base.map(|base| base.join("vmbackup")).ok_or_else(|| {
                Error::new(Kind::Usage, format!("neither {name} nor HOME is set"))
                    .hint("set HOME, so that vmbackup knows where to keep its files")
            })
        };
        let state = base("XDG_STATE_HOME", ".local/state")?;
        let runtime = absolute("XDG_RUNTIME_DIR").map(|dir| dir.join("vmbackup"));
        Ok(Self {
            repository: base("XDG_DATA_HOME", ".local/share")?.join("repo"),
            runtime: runtime.unwrap_or_else(|| state.join("run")),
            state,
            cache: base("XDG_CACHE_HOME", ".cache")?,
        })
    }
}

/// How a repository is to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeySource {
    /// Ask on the terminal if the repository needs a password.
    Ask,
    /// The password in this file.
    PasswordFile(PathBuf),
    /// The key in this file.
    KeyFile(PathBuf),
}

/// What opens the repository: what the options name, else the file the environment names.
pub(crate) fn repository_key(password: Option<&PathBuf>, key: Option<&PathBuf>) -> KeySource {
    match key_source(password, key) {
        KeySource::Ask => {
            let named = std::env::var_os("VMBACKUP_PASSWORD_FILE");
            let named = named.filter(|file| !file.is_empty());
            named.map_or(KeySource::Ask, |file| KeySource::PasswordFile(file.into()))
        }
        given => given,
    }
}

/// The key the options name.
pub(crate) fn key_source(password: Option<&PathBuf>, key: Option<&PathBuf>) -> KeySource {
    match (password, key) {
        // The parser takes only one of them.
        (_, Some(file)) => KeySource::KeyFile(file.clone()),
        (Some(file), None) => KeySource::PasswordFile(file.clone()),
        (None, None) => KeySource::Ask,
    }
}

/// The repository that is meant.
pub(crate) fn repository(args: &RepositoryArgs, paths: &Paths) -> Result<RepositoryChoice> {
    let Some(text) = args.repo.as_deref().filter(|text| !text.is_empty()) else {
        return Ok(RepositoryChoice::Default(paths.repository.clone()));
    };
    let path = match text.split_once("://") {
        None => text,
        Some(("file", path)) if path.starts_with('/') => path,
        Some((scheme, _)) => {
            return Err(Error::new(
                Kind::Unsupported,
                format!("a repository at {scheme}:// is not supported"),
            )
            .hint("name a directory; network file systems are fine"));
        }
    };
    let path = std::path::absolute(path)
        .map_err(|e| Error::io(format!("cannot resolve the repository path '{path}'"), e))?;
    Ok(RepositoryChoice::Named(path))
}

/// `FILE[,format=F]` or an NBD URI.
pub(crate) fn disk(text: &str) -> Result<DiskSpec> {
    // Schemes that are not supported are refused as URIs, not looked for as files.
    match text.split_once("://") {
        Some((scheme, _)) if scheme.starts_with("nbd") => nbd_uri(text).map(DiskSpec::Nbd),
        _ => image(text).map(DiskSpec::Image),
    }
}

/// What `serve` is to serve: an image or a URI if it looks like one, else a point.
pub(crate) fn served(text: &str) -> Result<Served> {
    if let Some(point) = text.strip_prefix("point:") {
        return Ok(Served::Point(point.to_owned()));
    }
    // A path has a slash, or an extension or option that says which format it is; names of points
    // have neither.
    if text.contains('/') || image(text).is_ok() {
        return disk(text).map(Served::Disk);
    }
    Ok(Served::Point(text.to_owned()))
}

/// An NBD URI of the command line; without credentials in it, they are those libnbd's tools use.
pub(crate) fn nbd_uri(text: &str) -> Result<NbdUri> {
    let mut uri = NbdUri::parse(text, Origin::CommandLine)?;
    if let Some(tls) = uri.tls.as_mut().filter(|t| t.credentials == Credentials::SystemAuthorities)
    {
        let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
        tls.credentials = Credentials::search(home.as_deref());
    }
    Ok(uri)
}

/// Formats that may stand before a path, as in `qcow2:disk.img`: those of QEMU's block drivers.
const FORMATS: [&str; 12] = [
    "raw",
    "qcow2",
    "qcow",
    "qed",
    "vmdk",
    "vdi",
    "vhdx",
    "vpc",
    "parallels",
    "bochs",
    "cloop",
    "dmg",
];

/// `FORMAT:PATH`, or `PATH[,format=F]`, where a comma in PATH is written twice, as QEMU has it.
pub(crate) fn image(text: &str) -> Result<ImageSpec> {
    if let Some((format, path)) = text.split_once(':').filter(|(head, _)| FORMATS.contains(head)) {
        if path.is_empty() {
            return Err(Error::new(Kind::Usage, format!("'{text}' names no file")));
        }
        return Ok(ImageSpec { path: path.into(), format: format.to_owned() });
    }
    let bad = |what: String| {
        Error::new(Kind::Usage, format!("in '{text}': {what}"))
            .hint("write PATH,format=qcow2 or PATH,format=raw; a comma in PATH is written twice")
    };
    let mut parts = split_commas(text).into_iter();
    let path = PathBuf::from(parts.next().unwrap_or_default());
    if path.as_os_str().is_empty() {
        return Err(bad("no path".into()));
    }
    let mut format = None;
    for part in parts {
        match part.split_once('=') {
            Some(("format", value)) if !value.is_empty() => format = Some(value.to_owned()),
            _ => return Err(bad(format!("'{part}' is not an option of an image"))),
        }
    }
    let format = format.or_else(|| format_by_name(&path)).ok_or_else(|| {
        bad("the image format is not given, and it is never guessed from content".into())
    })?;
    Ok(ImageSpec { path, format })
}

/// The format an extension of a file named by the user says, or raw for a device.
fn format_by_name(path: &Path) -> Option<String> {
    if path.starts_with("/dev") {
        return Some("raw".into());
    }
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    let format = match extension.as_str() {
        "raw" | "qcow2" | "vmdk" | "vdi" | "vhdx" | "qed" => return Some(extension),
        "vhd" => "vpc",
        _ => return None,
    };
    Some(format.into())
}

/// Splits at single commas; a doubled comma is one comma of the part.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        if char != ',' {
            parts.last_mut().expect("never empty").push(char);
        } else if chars.next_if_eq(&',').is_some() {
            parts.last_mut().expect("never empty").push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_users_have_their_own_directories() {
        let root = Paths::resolve(true, |_| None).unwrap();
        assert_eq!(root.repository, Path::new("/var/lib/vmbackup/repo"));
        let home = |name: &str| match name {
            "HOME" => Some("/u".into()),
            "XDG_CACHE_HOME" => Some("relative".into()),
            "XDG_STATE_HOME" => Some("/state".into()),
            _ => None,
        };
        let user = Paths::resolve(false, home).unwrap();
        assert_eq!(user.repository, Path::new("/u/.local/share/vmbackup/repo"));
        assert_eq!(user.state, Path::new("/state/vmbackup"));
        assert_eq!(user.cache, Path::new("/u/.cache/vmbackup"));
        assert_eq!(Paths::resolve(false, |_| None).unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn variables_of_our_own_replace_the_directories() {
        let root = || Paths::resolve(true, |_| None).unwrap();
        let state = |value: &'static str| {
            root().replaced(move |name| (name == "VMBACKUP_STATE_DIR").then(|| value.into()))
        };
        let moved = state("/elsewhere").unwrap();
        assert_eq!((moved.state.as_path(), moved.cache), (Path::new("/elsewhere"), root().cache));
        assert_eq!(state("").unwrap(), root());
        assert_eq!(state("relative").unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn an_image_format_is_given_by_option_or_extension_and_never_guessed() {
        for (text, path, format) in [
            ("a.qcow2", "a.qcow2", "qcow2"),
            ("a.img,format=raw", "a.img", "raw"),
            ("a.qcow2,format=raw", "a.qcow2", "raw"),
            ("a,,b.RAW", "a,b.RAW", "raw"),
            ("/dev/vg/lv", "/dev/vg/lv", "raw"),
            ("vpc:a,b.img", "a,b.img", "vpc"),
            ("./raw:a.qcow2", "./raw:a.qcow2", "qcow2"),
        ] {
            let expected = ImageSpec { path: path.into(), format: format.into() };
            assert_eq!(image(text).unwrap(), expected, "{text}");
        }
        for text in
            ["a.img", "a", "", ",format=raw", "a.raw,format=", "a.raw,size=1", "a.raw,", "raw:"]
        {
            assert_eq!(image(text).unwrap_err().kind(), Kind::Usage, "{text}");
        }
    }

    #[test]
    fn a_disk_is_a_file_or_an_nbd_uri() {
        let uri = "nbd+unix:///vda?socket=/run/s";
        assert_eq!(disk(uri).unwrap(), DiskSpec::Nbd(uri.parse().unwrap()));
        let DiskSpec::Nbd(uri) = disk("nbds://h/?tls-psk-file=/k").unwrap() else { panic!() };
        assert_eq!(uri.tls.unwrap().credentials, Credentials::Psk("/k".into()));
        assert_eq!(disk("nbds+ssh://h/").unwrap_err().kind(), Kind::Unsupported);
        assert!(matches!(disk("nbd.raw").unwrap(), DiskSpec::Image(_)));
    }

    #[test]
    fn what_is_served_is_a_point_unless_it_looks_like_an_image() {
        for text in ["web1@latest", "web1.example.com@latest", "3f9a", "web1.raw@latest"] {
            assert_eq!(served(text).unwrap(), Served::Point(text.into()));
        }
        assert_eq!(served("point:a/b@latest").unwrap(), Served::Point("a/b@latest".into()));
        for text in ["a.raw", "./3f9a,format=raw", "/dev/vda", "nbd://host/x"] {
            assert!(matches!(served(text).unwrap(), Served::Disk(_)), "{text}");
        }
        assert_eq!(served("./3f9a").unwrap_err().kind(), Kind::Usage, "a format is never guessed");
    }

    #[test]
    fn a_repository_elsewhere_than_in_a_directory_is_refused() {
        let paths = Paths::resolve(true, |_| None).unwrap();
        let args = |repo: Option<&str>| RepositoryArgs {
            repo: repo.map(str::to_owned),
            password_file: None,
            key_file: None,
        };
        let is = |text: &str| repository(&args(Some(text)), &paths);
        assert_eq!(is("/r").unwrap(), RepositoryChoice::Named("/r".into()));
        assert_eq!(is("file:///r").unwrap(), RepositoryChoice::Named("/r".into()));
        assert_eq!(is("s3://bucket").unwrap_err().kind(), Kind::Unsupported);
        assert!(matches!(repository(&args(None), &paths).unwrap(), RepositoryChoice::Default(_)));
    }
}
