//! The hermetic environment of one test: a directory, a unique name, a cleared environment.
//!
//! The directory can be traversed by libvirt's QEMU user, so that disks and sockets in it work.
//! It is removed on drop; set `VMBACKUP_TEST_KEEP=1` to look at it after a failure.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use tempfile::TempDir;

use super::outcome::Outcome;
use super::own_libvirt::outside_id;
use super::tools::{Process, wait_until};

/// Where one test lives.
pub(crate) struct TestEnv {
    dir: TempDir,
    name: String,
    repo: PathBuf,
    /// A process in the namespaces of another host, where all commands run then.
    host: Option<String>,
}

impl TestEnv {
    /// A new, empty environment.
    pub(crate) fn new() -> Self {
        Self::new_in(&std::env::temp_dir())
    }

    /// A new, empty environment in a directory below `parent`.
    pub(crate) fn new_in(parent: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mut dir = tempfile::Builder::new()
            .prefix("vmbackup-test-")
            .tempdir_in(parent)
            .expect("a temporary directory can be made");
        if std::env::var_os("VMBACKUP_TEST_KEEP").is_some() {
            dir.disable_cleanup(true);
        }
        fs::set_permissions(dir.path(), Permissions::from_mode(0o711)).expect("own directory");
        for sub in ["home", "run", "state"] {
            fs::create_dir(dir.path().join(sub)).expect("own directory");
        }
        let serial = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = outside_id().unwrap_or_else(|| std::process::id().to_string());
        let (name, repo) = (format!("vmbtest-{id}-{serial}"), dir.path().join("repo"));
        Self { dir, name, repo, host: None }
    }

    /// A new environment with the same repository, whose commands run in the namespaces of a process.
    pub(super) fn on_host_of(&self, process: &str) -> Self {
        Self { repo: self.repo.clone(), host: Some(process.to_owned()), ..Self::new() }
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A directory in it that everybody may write to, QEMU's user among them.
    pub(crate) fn open_dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("own directory");
        fs::set_permissions(&path, Permissions::from_mode(0o777)).expect("own directory");
        path
    }

    /// A name nothing else on this machine has, for domains and the like.
    pub(crate) fn name(&self, suffix: &str) -> String {
        if suffix.is_empty() { self.name.clone() } else { format!("{}-{suffix}", self.name) }
    }

    /// The directory repository most tests use.
    pub(crate) fn repo(&self) -> PathBuf {
        self.repo.clone()
    }

    /// A command with a cleared environment and this directory as its home. Programs in `bin` there come first.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = match &self.host {
            None => Command::new(program),
            Some(process) => {
                let mut command = Command::new("nsenter");
                command.args(["--target", process, "--mount", "--uts", "--"]).arg(program);
                command
            }
        };
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env_clear()
            .env("PATH", format!("{}:{path}:/usr/sbin:/sbin", self.path("bin").display()))
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC")
            .env("HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_STATE_HOME", self.path("state"))
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs a tool.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, program: &str, args: &[S]) -> Outcome {
        Outcome::of(self.command(program).args(args))
    }

    /// The built program with the test's repository as the default one.
    pub(crate) fn vmbackup_command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_vmbackup"));
        command
            .env("VMBACKUP_REPO", self.repo())
            .env("VMBACKUP_STATE_DIR", self.path("state"))
            .env("VMBACKUP_RUNTIME_DIR", self.path("run"))
            .env("VMBACKUP_CACHE_DIR", self.path("cache"))
            .args(args);
        command
    }

    /// Runs the built program to its end.
    pub(crate) fn vmbackup<S: AsRef<OsStr>>(&self, args: &[S]) -> Outcome {
        Outcome::of(&mut self.vmbackup_command(args))
    }

    /// Starts the built program; it is killed when the guard is dropped before its end.
    pub(crate) fn spawn_vmbackup<S: AsRef<OsStr>>(&self, args: &[S]) -> Process {
        Process::spawn(&mut self.vmbackup_command(args))
    }

    /// Starts the built program and waits until it has stopped itself at a step of the journal
    /// (`before:freeze`): to be killed there, or to go on when it is sent CONT.
    #[track_caller]
    pub(crate) fn stopped_at<S: AsRef<OsStr>>(&self, step: &str, args: &[S]) -> Process {
        self.stopped_in(&self.path("."), step, args)
    }

    /// [`Self::stopped_at`], started in `directory`.
    #[track_caller]
    pub(crate) fn stopped_in<S: AsRef<OsStr>>(
        &self,
        directory: &Path,
        step: &str,
        args: &[S],
    ) -> Process {
        let mut command = self.vmbackup_command(args);
        let command = command.current_dir(directory).env("VMBACKUP_STOP_AT", step);
        let process = Process::spawn(command);
        process.wait_until_stopped(step);
        process
    }

    /// Processes that were started by commands of this environment, and their children.
    pub(crate) fn processes(&self) -> Vec<String> {
        let entries = fs::read_dir("/proc").expect("mounted").flatten();
        let ours = entries.filter(|entry| {
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            let state = format!("VMBACKUP_STATE_DIR={}", self.path("state").display());
            environment.split(|byte| *byte == 0).any(|variable| variable == state.as_bytes())
        });
        let line = |entry: fs::DirEntry| fs::read(entry.path().join("cmdline")).unwrap_or_default();
        ours.map(|entry| String::from_utf8_lossy(&line(entry)).replace('\0', " ")).collect()
    }

    /// Requires that the commands of this environment left no process, and no socket where they put theirs.
    #[track_caller]
    pub(crate) fn assert_nothing_runs(&self, step: &str) {
        // What was started to end with its owner ends by itself, soon.
        wait_until(&format!("{step}: processes end"), 20, || self.processes().is_empty());
        let mut sockets = Vec::new();
        let mut open = vec![self.path("run"), self.path("state")];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(directory).expect("own directory").flatten() {
                let kind = entry.file_type().expect("own file");
                if kind.is_dir() {
                    open.push(entry.path());
                } else if kind.is_socket() {
                    sockets.push(entry.path());
                }
            }
        }
        assert_eq!(sockets, Vec::<PathBuf>::new(), "{step}: sockets");
    }

    /// Makes a repository without a key at [`Self::repo`].
    pub(crate) fn init_repo(&self) {
        self.vmbackup(&["repo", "init", "--no-key"]).ok();
    }
}
