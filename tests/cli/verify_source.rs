//! `--verify-source`: what reads differently the second time becomes no point.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::{Outcome, Process, TestEnv, is_listening, wait_until};

/// A QEMU whose disk is an export of nbdkit that lies: block `at` of it reads with another content each
/// time, all others are all right.
struct Bed {
    env: TestEnv,
    uuid: uuid::Uuid,
}

/// Size of the disk.
const DISK_BYTES: u64 = 8 << 20;

/// Where it lies, if it does.
const LIE_AT: u64 = 3 << 20;

impl Bed {
    fn new() -> Self {
        let env = TestEnv::new();
        env.init_repo();
        Self { env, uuid: uuid::Uuid::new_v4() }
    }

    /// nbdkit with a plugin in shell: each block is its offset, repeated; the lie is a counter.
    fn disk(&self, lies: &str) -> (Process, PathBuf) {
        let socket = self.env.path("run/disk.sock");
        let _ = std::fs::remove_file(&socket);
        let counter = self.env.path("counter");
        let read = format!(
            "if [ {lies} = yes ] && [ $4 -le {LIE_AT} ] && [ $(($4 + $3)) -gt {LIE_AT} ]; then \
               echo x >>{counter}; lie=$(wc -l <{counter}); \
               head -c $(({LIE_AT} - $4)) /dev/zero | tr '\\0' a; \
               head -c 1 /dev/zero | tr '\\0' \"\\\\$(printf %o $((lie + 64)))\"; \
               head -c $(($4 + $3 - {LIE_AT} - 1)) /dev/zero | tr '\\0' a; \
             else head -c $3 /dev/zero | tr '\\0' a; fi",
            counter = counter.display(),
        );
        let mut command = self.env.command("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).args(["eval"]);
        command.arg(format!("get_size=echo {DISK_BYTES}")).arg(format!("pread={read}"));
        // QEMU wants to write to a disk; nobody does.
        command.args(["can_write=exit 0", "pwrite=cat >/dev/null"]);
        let process = Process::spawn(&mut command);
        wait_until("nbdkit's socket", 20, || is_listening(&socket));
        (process, socket)
    }

    fn back_up(&self, lies: &str, args: &[&str]) -> Outcome {
        let (_disk, socket) = self.disk(lies);
        let qmp = self.env.path("run/qmp.sock");
        let _ = std::fs::remove_file(&qmp);
        let _vm = self.start(&qmp, &socket);
        let scratch = self.env.path("scratch");
        std::fs::create_dir_all(&scratch).unwrap();
        let mut command = self.env.vmbackup_command(args);
        command.args(["--name", "foo", "--no-progress", "--json"]);
        Outcome::of(command.arg("--qmp").arg(&qmp).arg("--scratch-dir").arg(&scratch))
    }

    fn start(&self, qmp: &Path, disk: &Path) -> Process {
        let mut command: Command = self.env.command("qemu-system-x86_64");
        command
            .args(["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S"])
            .args(["-m", "16", "-name", "foo", "-uuid", &self.uuid.to_string()])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(["-blockdev"])
            .arg(format!(
                "raw,node-name=d,file.driver=nbd,file.server.type=unix,file.server.path={}",
                disk.display()
            ))
            .args(["-device", "virtio-blk-pci,drive=d,id=disk"]);
        let process = Process::spawn(&mut command);
        wait_until("the monitor's socket", 60, || is_listening(qmp));
        process
    }

    fn points(&self) -> usize {
        let list = self.env.vmbackup(&["list", "--json"]).json();
        list["points"].as_array().unwrap().len()
    }
}

#[test]
fn a_source_that_reads_differently_the_second_time_becomes_no_point() {
    let bed = Bed::new();
    let outcome = bed.back_up("yes", &["full", "--verify-source=100%"]);
    assert_eq!(outcome.code, Some(18), "{outcome:?}");
    let told = format!("differently the second time: 1 of 32 chunks looked at, at offset {LIE_AT}");
    assert!(outcome.stderr.contains(&told), "{outcome:?}");
    assert!(outcome.stderr.contains("disk of foo"), "{outcome:?}");
    assert_eq!(bed.points(), 0, "no point was made");
    // Unasked nobody looks: this is what it is for.
    bed.back_up("yes", &["full"]).ok();
}

#[test]
fn an_honest_source_passes_and_the_report_says_what_was_looked_at() {
    let bed = Bed::new();
    let report = bed.back_up("no", &["full", "--verify-source"]).json();
    assert_eq!(report["disks"][0]["source_check"]["chunks"], 32, "{report}");
    let report = bed.back_up("no", &["backup"]).json();
    assert_eq!(report["disks"][0]["source_check"], Value::Null, "{report}");
    let refused = bed.back_up("no", &["full", "--verify-source=101"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
}

/// What changed is read a second time, what did not is the audit's.
#[test]
fn an_incremental_verifies_what_it_stored() {
    let env = TestEnv::new();
    env.init_repo();
    let image = env.path("a.qcow2");
    let path = image.to_str().unwrap();
    env.run("qemu-img", &["create", "-q", "-f", "qcow2", path, "8M"]).ok();
    env.run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 8M", path]).ok();
    let back_up = |extra: &[&str]| {
        let common = ["backup", "--image", path, "--name", "bar", "--json"];
        env.vmbackup(&[&common[..], extra].concat()).json()
    };
    back_up(&[]);
    env.run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 1M 512k", path]).ok();
    let report = back_up(&["--verify-source=100"]);
    let disk = &report["disks"][0];
    assert_eq!(disk["read"]["mode"], "incremental", "{report}");
    assert_eq!(disk["source_check"]["chunks"], 2, "{report}");
    assert_eq!(disk["audit"]["chunks"], 30, "{report}");
}
