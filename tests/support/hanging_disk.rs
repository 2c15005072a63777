//! A file system that stops answering when it is told to, and answers again.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A file system on a file. Frozen, its writes hang; what is asked of [`Self::path`] by name hangs as
/// well while a file system that answers nothing is mounted over it.
pub(crate) struct HangingDisk {
    /// A directory in it; everybody may write to it.
    pub(crate) path: PathBuf,
    mounted: PathBuf,
    silent: Option<Silence>,
    /// Has all of it answer should this process be killed or take too long: every sync(2) of the
    /// machine waits for it.
    guard: Child,
}

/// Seconds, longer than a test that uses it takes: at most the five times 60 and 15 to end that the
/// runner allows those with libvirt (`.config/nextest.toml`). The soak tier allows an hour, but has no
/// other tests that use it. Whoever is ended by the runner has it answer at once.
const GUARD: &str = "n=0; while [ $n -lt 330 ] && kill -0 $1 2>/dev/null; do sleep 1; n=$((n+1)); \
                     done; fsfreeze -u \"$2\"; umount -l \"$2\"";

/// `EXT4_IOC_SHUTDOWN` of Linux (fs/ext4/ext4.h) with `EXT4_GOING_FLAGS_NOLOGFLUSH`: what is not on the disk
/// yet does not get there, and every call ends with EIO.
const PULL_OUT: &str = "import fcntl, os, struct, sys; \
    fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";

fn run(program: &str, arguments: &[&str], path: &Path) {
    let status = Command::new(program).args(arguments).arg(path).status();
    assert!(status.expect("it runs").success(), "{program} {arguments:?} {}", path.display());
}

impl HangingDisk {
    /// Mounts one in `directory`. Before a domain starts: its QEMU sees no later mounts.
    pub(crate) fn mount(directory: &Path) -> Self {
        let (image, mounted) = (directory.join("hanging.img"), directory.join("hanging"));
        File::create_new(&image).expect("own directory").set_len(128 << 20).expect("a hole");
        std::fs::create_dir(&mounted).expect("own directory");
        run("mkfs.ext4", &["-q", "-F"], &image);
        run("mount", &["-o", "loop", image.to_str().expect("text")], &mounted);
        let pid = std::process::id().to_string();
        let guard = Command::new("setsid")
            .args(["sh", "-c", GUARD, "sh", &pid])
            .arg(&mounted)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setsid runs");
        let disk = Self { path: mounted.join("scratch"), mounted, silent: None, guard };
        std::fs::create_dir(&disk.path).expect("own file system");
        run("chmod", &["777"], &disk.path);
        disk
    }

    /// Has its writes hang.
    pub(crate) fn freeze(&self) {
        run("fsfreeze", &["-f"], &self.mounted);
    }

    /// Has all of it hang, as a disk or a network that is gone.
    pub(crate) fn stall(&mut self) {
        self.freeze();
        self.silent = Some(Silence::over(&self.path));
    }

    /// Has it answer again.
    pub(crate) fn answer(&mut self) {
        run("fsfreeze", &["-u"], &self.mounted);
        self.silent = None;
    }

    /// Takes it away as a disk that is pulled out: whatever it is asked fails from now on.
    pub(crate) fn pull_out(&self) {
        run("python3", &["-c", PULL_OUT], &self.mounted);
    }

    /// Brings it back, with what it held when it went. Nobody here may use it any more.
    pub(crate) fn put_back(&self) {
        run("umount", &[], &self.mounted);
        let image = self.mounted.with_extension("img");
        // A device of its own: in other namespaces, of domains that others began, the old one is still there.
        let device = Command::new("losetup").args(["--find", "--show"]).arg(image).output();
        let device = String::from_utf8(device.expect("losetup runs").stdout).expect("a path");
        run("mount", &[device.trim()], &self.mounted);
        // Goes with the mount.
        run("losetup", &["--detach"], Path::new(device.trim()));
    }

    /// How many processes ask whether it answers.
    pub(crate) fn asked(&self) -> usize {
        let of = |entry: std::fs::DirEntry| std::fs::read(entry.path().join("cmdline")).ok();
        let lines = std::fs::read_dir("/proc").expect("there").flatten().filter_map(of);
        let lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
        let path = self.path.to_str().expect("text");
        lines.filter(|line| line.starts_with("touch\0") && line.contains(path)).count()
    }

    /// What is in it.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.path).expect("mounted");
        entries.map(|entry| entry.expect("readable").path()).collect()
    }
}

impl Drop for HangingDisk {
    fn drop(&mut self) {
        // Not frozen, in most cases.
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.mounted).output();
        self.silent = None;
        let _ = Command::new("umount").arg("-l").arg(&self.mounted).status();
        let _ = self.guard.kill();
        let _ = self.guard.wait();
    }
}

/// A file system over a directory that answers what it was asked when it goes.
struct Silence {
    over: PathBuf,
    answers: Arc<AtomicBool>,
}

impl Silence {
    fn over(path: &Path) -> Self {
        let device = File::options().read(true).write(true).open("/dev/fuse").expect("FUSE");
        let options = "fd=0,rootmode=40000,user_id=0,group_id=0,allow_other";
        let mounted = Command::new("mount")
            .args(["-i", "-t", "fuse", "-o", options, "vmbtest"])
            .arg(path)
            .stdin(device.try_clone().expect("own file"))
            .status();
        assert!(mounted.expect("mount runs").success(), "no FUSE over {}", path.display());
        let answers = Arc::<AtomicBool>::default();
        let told = Arc::clone(&answers);
        // Ends with the mount, or with the test's process, and then fails who still asks.
        std::thread::spawn(move || serve(device, &told));
        Self { over: path.to_owned(), answers }
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        self.answers.store(true, Ordering::SeqCst);
        // Whoever asks is answered although it is not there any more.
        let _ = Command::new("umount").arg("-l").arg(&self.over).status();
    }
}

/// Requests of `linux/fuse.h` that the root directory of a file system gets.
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const STATFS: u32 = 17;
const INIT: u32 = 26;
/// Those that get no answer.
const FORGET: [u32; 3] = [2, 36, 42];
const ENOSYS: i32 = 38;

fn serve(mut device: File, answers: &AtomicBool) {
    let mut request = vec![0; 256 << 10];
    while let Ok(length) = device.read(&mut request) {
        assert!(length >= 40, "a header");
        let opcode = u32::from_ne_bytes(request[4..8].try_into().expect("four"));
        let unique = &request[8..16];
        while opcode != INIT && !answers.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
        if FORGET.contains(&opcode) {
            continue;
        }
        let body = match opcode {
            INIT => words(&[7, 31, 4096, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            GETATTR | SETATTR => {
                // A directory that everybody may write to, with two links and blocks of 4 KiB.
                let mut body = words(&[0; 26]);
                body[16..24].copy_from_slice(&1_u64.to_ne_bytes());
                body[76..84].copy_from_slice(&words(&[0o40777, 2]));
                body[96..100].copy_from_slice(&4096_u32.to_ne_bytes());
                body
            }
            // Blocks, and free ones, in two words each; sizes of blocks.
            STATFS => words(&[
                65536, 0, 60000, 0, 60000, 0, 1000, 0, 1000, 0, 4096, 255, 4096, 0, 0, 0, 0, 0, 0,
                0,
            ]),
            _ => Vec::new(),
        };
        let error = if body.is_empty() { -ENOSYS } else { 0 };
        let length = u32::try_from(16 + body.len()).expect("small");
        let header = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), unique].concat();
        // Whoever asked may have been killed.
        let _ = device.write(&[header, body].concat());
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
