//! The real guest: a Linux kernel that writes to its disks on command (`guest/init`).
//!
//! One line to the second serial port runs a shell command inside; the answer ends with
//! `@done ID STATUS`. The helpers `rnd`, `pat`, `zero`, `discard`, `busy`, `quiet` and `sum` are
//! described in `guest/init`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::tools::wait_for;

/// Kernel and initramfs, for direct boot.
pub(crate) struct GuestFiles {
    /// The kernel.
    pub(crate) kernel: PathBuf,
    /// The initramfs.
    pub(crate) initrd: PathBuf,
}

impl GuestFiles {
    /// Copies them into `dir`, building them first if need be. A copy, because libvirt changes the
    /// owner of what it hands to QEMU.
    pub(crate) fn into_dir(dir: &Path) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let built = root.join("target/testbed/guest");
        let status = Command::new(root.join("tests/support/guest/build.sh")).arg(&built).status();
        assert!(status.expect("build.sh runs").success(), "the guest cannot be built");
        let files = Self { kernel: dir.join("vmlinuz"), initrd: dir.join("initrd") };
        std::fs::copy(built.join("vmlinuz"), &files.kernel).expect("own directory");
        std::fs::copy(built.join("initrd"), &files.initrd).expect("own directory");
        files
    }
}

/// The command channel of a running guest.
pub(crate) struct Guest {
    stream: BufReader<UnixStream>,
    last_id: u32,
}

impl Guest {
    /// Connects to the guest's second serial port and waits until it is up.
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = wait_for("the guest's serial port", 20, || UnixStream::connect(socket).ok());
        stream.set_read_timeout(Some(Duration::from_secs(1))).expect("own socket");
        let mut guest = Self { stream: BufReader::new(stream), last_id: 0 };
        guest.wait_until_up();
        guest
    }

    /// Reboots it from inside, at once, and waits until it is up again.
    #[track_caller]
    pub(crate) fn reboot(&mut self) {
        self.run("touch /tmp/before");
        self.start("reboot -f");
        self.wait_until_up();
        self.run("test ! -e /tmp/before");
    }

    #[track_caller]
    fn wait_until_up(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(180);
        // A guest that was up before we connected has said `@ready` to nobody: ask again.
        loop {
            self.send("hello -");
            let patience = Instant::now() + Duration::from_secs(2);
            while let Some(line) = self.line(patience) {
                if line == "@ready" {
                    return;
                }
            }
            assert!(Instant::now() < deadline, "the guest is not up after 180 s");
        }
    }

    /// Runs a shell command and requires success; gives what it printed.
    #[track_caller]
    pub(crate) fn run(&mut self, command: &str) -> String {
        let id = self.start(command);
        self.finish(id, command)
    }

    /// Sends a shell command without waiting for its end; for [`Self::finish`].
    pub(crate) fn start(&mut self, command: &str) -> u32 {
        assert!(!command.contains('\n'), "one line");
        self.last_id += 1;
        let id = self.last_id;
        self.send(&format!("{id} {command}"));
        id
    }

    /// Waits for the end of a command and requires success; gives what it printed.
    #[track_caller]
    pub(crate) fn finish(&mut self, id: u32, command: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(90);
        let end = format!("@done {id} ");
        let mut printed = String::new();
        loop {
            let line = self.line(deadline).unwrap_or_else(|| {
                panic!("guest: no answer to {command:?}; it printed so far: {printed}")
            });
            if let Some(status) = line.strip_prefix(&end) {
                assert!(status == "0", "guest: {command:?} failed ({status}): {printed}");
                return printed.trim_end().to_owned();
            }
            // A greeting that came while the port was being set up arrives in pieces, which the
            // guest takes for a command (`lo -`): what it says to that is nobody's.
            if line.starts_with("@done ") {
                printed.clear();
            } else if line != "@ready" {
                printed.push_str(&line);
                printed.push('\n');
            }
        }
    }

    fn send(&mut self, line: &str) {
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes()).expect("guest connected");
    }

    /// The next line, or `None` at the deadline.
    fn line(&mut self, deadline: Instant) -> Option<String> {
        let mut line = Vec::new();
        loop {
            match self.stream.read_until(b'\n', &mut line) {
                Ok(0) => panic!("the guest's serial port was closed"),
                Ok(_) if line.ends_with(b"\n") => {
                    return Some(String::from_utf8_lossy(&line).trim_end().to_owned());
                }
                // A time-out in the middle of a line: what came is kept in `line`.
                _ if Instant::now() >= deadline => return None,
                _ => {}
            }
        }
    }
}
