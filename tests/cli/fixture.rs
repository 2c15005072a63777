//! A repository and a VM "foo" whose disk tests write to, for tests that need points.
//!
//! The VM is a QEMU that never runs a guest: it is started for each backup and killed after it, so
//! that a test may write to its raw image in between and knows every byte of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::Value;

use crate::support::{Outcome, Process, TestEnv, is_listening, wait_until};

/// Size of the disk: several chunks and an odd tail.
pub(crate) const DISK_BYTES: u64 = (3 << 20) + 4096;

/// What the VM calls its disk.
pub(crate) const DISK: &str = "disk";

/// A VM with one raw disk, and a repository without a key.
pub(crate) struct Fixture {
    pub(crate) env: TestEnv,
    pub(crate) image: PathBuf,
    /// Its own, because a host lets one run at a time work on a VM, whichever the repository.
    pub(crate) uuid: uuid::Uuid,
}

impl Fixture {
    /// The disk has data at both ends and a hole between; nothing is backed up yet.
    pub(crate) fn new() -> Self {
        let env = TestEnv::new();
        let image = env.path("foo.raw");
        let fixture = Self { env, image, uuid: uuid::Uuid::new_v4() };
        File::create(&fixture.image).unwrap().set_len(DISK_BYTES).unwrap();
        fixture.write(0, b"first", 300_000);
        fixture.write(DISK_BYTES - 5000, b"tail", 5000);
        fixture.env.init_repo();
        fixture
    }

    /// Writes `len` bytes that depend on `seed` and their place.
    pub(crate) fn write(&self, offset: u64, seed: &[u8], len: usize) {
        let mix = |hash: u64, byte: &u8| hash.wrapping_mul(31).wrapping_add(u64::from(*byte));
        let mut state = seed.iter().fold(1, mix) | 1;
        let bytes: Vec<u8> = (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[2]
            })
            .collect();
        let file = File::options().write(true).open(&self.image).unwrap();
        file.write_all_at(&bytes, offset).unwrap();
    }

    /// Runs a backup command with further arguments while the VM is up.
    pub(crate) fn back_up(&self, args: &[&str]) -> Outcome {
        let socket = self.env.path("run/qmp.sock");
        let _ = std::fs::remove_file(&socket);
        let mut vm = Process::spawn(
            self.env
                .command("qemu-system-x86_64")
                .args(["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S"])
                .args(["-m", "16", "-name", "foo"])
                .args(["-uuid", &self.uuid.to_string()])
                .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
                .arg("-blockdev")
                .arg(format!(
                    "raw,node-name=d,file.driver=file,file.filename={}",
                    self.image.display()
                ))
                .args(["-device", &format!("virtio-blk-pci,drive=d,id={DISK}")]),
        );
        wait_until("the monitor's socket", 60, || {
            assert!(vm.is_running(), "QEMU ended at once");
            is_listening(&socket)
        });
        let mut command = self.env.vmbackup_command(args);
        let scratch = self.env.path("scratch");
        std::fs::create_dir_all(&scratch).unwrap();
        if !args.contains(&"--scratch-dir") {
            command.arg("--scratch-dir").arg(&scratch);
        }
        Outcome::of(command.arg("--qmp").arg(&socket))
    }

    /// Runs a backup command and gives its JSON report.
    pub(crate) fn backup(&self, command: &str) -> Value {
        self.back_up(&[command, "--json"]).json()
    }

    /// Runs a full backup; the id of its point.
    pub(crate) fn point(&self) -> String {
        self.backup("full")["point"].as_str().expect("a point id").to_owned()
    }
}
