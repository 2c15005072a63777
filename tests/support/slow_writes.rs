//! A file system that takes what is written at once, and a while to write it back.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::tools::{Process, wait_until};

/// Bits per second: 8 MiB.
const RATE: &str = "rate=64M";

/// Of a second, that it may be faster after a pause.
const BURST: &str = "burstiness=0.1";

/// Longest wait until it can be unmounted.
const UNMOUNT: Duration = Duration::from_secs(20);

/// A file system on a slow disk, unmounted with its guard. Every sync(2) of the machine waits for it.
pub(crate) struct SlowWrites {
    /// A directory in it; everybody may write to it.
    pub(crate) path: PathBuf,
    /// Where the disk is a file.
    disk: PathBuf,
    _server: Process,
}

fn run(program: &str, arguments: &[&str], path: &Path) {
    let status = Command::new(program).args(arguments).arg(path).status();
    assert!(status.expect("it runs").success(), "{program} {arguments:?} {}", path.display());
}

impl SlowWrites {
    /// Mounts one in `directory`. Before a domain starts: its QEMU sees no later mounts.
    pub(crate) fn mount(directory: &Path) -> Self {
        let [image, disk, mounted] =
            ["slow.img", "slow.disk", "slow"].map(|name| directory.join(name));
        File::create_new(&image).expect("own directory").set_len(256 << 20).expect("a hole");
        run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0"], &image);
        std::fs::create_dir(&disk).expect("own directory");
        std::fs::create_dir(&mounted).expect("own directory");
        let mut command = Command::new("nbdfuse");
        command.arg(&disk).args([
            "--command",
            "nbdkit",
            "-s",
            "--exit-with-parent",
            "--filter=rate",
            "file",
        ]);
        let mut server = Process::spawn(command.arg(&image).args([RATE, BURST]));
        let file = disk.join("nbd");
        wait_until("the slow disk", 20, || {
            assert!(server.is_running(), "nbdfuse ended at once");
            file.exists()
        });
        run("mount", &["-o", "loop", file.to_str().expect("text")], &mounted);
        run("chmod", &["777"], &mounted);
        Self { path: mounted, disk, _server: server }
    }
}

impl Drop for SlowWrites {
    fn drop(&mut self) {
        let unmounted =
            |path| Command::new("umount").arg("-q").arg(path).status().is_ok_and(|s| s.success());
        let begun = Instant::now();
        // The disk goes when the loop device lets go of it, a moment after the file system.
        for path in [&self.path, &self.disk] {
            while !unmounted(path) {
                if begun.elapsed() > UNMOUNT {
                    assert!(std::thread::panicking(), "{} stays mounted", path.display());
                    break;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}
