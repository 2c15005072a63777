//! Two runs on one VM at the same time, with real processes: the second fails at once, or waits.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::support::{Process, TestEnv, is_listening, wait_until};

/// What a run says once it waits.
const WAITING: &str = "waiting up to";

/// A VM whose backup takes long enough to be stopped in the middle of.
struct Bed {
    env: TestEnv,
    image: PathBuf,
}

impl Bed {
    fn new() -> Self {
        let env = TestEnv::new();
        let image = env.path("a.raw");
        let mut bytes = vec![0; 64 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        std::fs::write(&image, bytes).unwrap();
        env.init_repo();
        Self { env, image }
    }

    fn args(&self, extra: &[&str]) -> Vec<String> {
        let spec = format!("{},format=raw", self.image.display());
        let common = ["full", "--image", &spec, "--name", "foo", "--no-progress"];
        [&common[..], extra].concat().into_iter().map(str::to_owned).collect()
    }

    /// A backup that stands still in the middle, holding the VM.
    fn held(&self) -> Process {
        let process = self.env.spawn_vmbackup(&self.args(&[]));
        let locks = self.env.path("state/locks");
        let is_held = || {
            let mut entries = std::fs::read_dir(&locks).into_iter().flatten();
            let lock = entries.next().map(|entry| entry.unwrap().path());
            lock.is_some_and(|lock| std::fs::read(lock).is_ok_and(|holder| !holder.is_empty()))
        };
        let began = Instant::now();
        while !is_held() {
            assert!(began.elapsed() < Duration::from_secs(60), "the backup never began");
        }
        process.signal("STOP");
        assert!(is_held(), "the backup ended before it was stopped");
        process
    }
}

#[test]
fn a_second_run_is_refused_at_once_and_told_who_is_at_work() {
    let bed = Bed::new();
    let first = bed.held();
    let began = Instant::now();
    let refused = bed.env.vmbackup(&bed.args(&[]));
    assert_eq!(refused.code, Some(7), "{refused:?}");
    assert!(began.elapsed() < Duration::from_secs(20));
    assert!(refused.stderr.contains(&format!("process {}", first.id())), "{refused:?}");
    assert!(refused.stderr.contains("--wait"), "{refused:?}");
    first.signal("CONT");
    first.wait().ok();
}

#[test]
fn a_second_run_that_waits_runs_once_the_first_has_ended() {
    let bed = Bed::new();
    let first = bed.held();
    let mut second = bed.env.spawn_vmbackup(&bed.args(&["--wait"]));
    second.wait_until_said(WAITING, 60);
    first.signal("CONT");
    let first_id = first.id();
    first.wait().ok();
    let second = second.wait().ok();
    let told = format!("process {first_id}");
    assert_eq!(second.stderr.matches(&told).count(), 1, "one word about it: {second:?}");
    let list = bed.env.vmbackup(&["list", "--json"]).json();
    assert_eq!(list["points"].as_array().unwrap().len(), 2, "{list}");
}

#[test]
fn the_wait_is_bounded_and_can_be_stopped() {
    let bed = Bed::new();
    let first = bed.held();
    let began = Instant::now();
    let late = bed.env.vmbackup(&bed.args(&["--wait=1"]));
    assert_eq!(late.code, Some(7), "{late:?}");
    assert!(began.elapsed() >= Duration::from_secs(1), "it waited");
    assert!(late.stderr.contains("waited 1 s"), "{late:?}");

    let mut waiting = bed.env.spawn_vmbackup(&bed.args(&["--wait=600"]));
    waiting.wait_until_said(WAITING, 60);
    waiting.signal("INT");
    wait_until("the end of the wait", 10, || !waiting.is_running());
    let stopped = waiting.wait();
    assert_eq!(stopped.code, Some(130), "{stopped:?}");
    first.signal("CONT");
    first.wait().ok();
}

#[test]
fn a_recovery_waits_for_the_run_that_works_on_its_vm_if_it_is_to() {
    let bed = Bed::new();
    let image = bed.env.path("b.qcow2").display().to_string();
    bed.env.run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]).ok();
    // It has added a bitmap to the image, which is in its journal.
    let backup = ["full", "--image", &image, "--name", "foo"];
    let stopped = bed.env.stopped_at("before:manifest", &backup);
    let look = bed.env.vmbackup(&["recover", "--json"]).json();
    let items = look["vms"][0]["items"].to_string();
    assert!(items.contains("kept") && items.contains("another run"), "{look}");
    let mut recovery = bed.env.spawn_vmbackup(&["recover", "--wait=600", "--json"]);
    std::thread::sleep(Duration::from_secs(2));
    assert!(recovery.is_running(), "it waits");
    stopped.signal("KILL");
    let report = recovery.wait().json();
    assert_eq!(report["vms"][0]["problem"], serde_json::Value::Null, "{report}");
    let items = report["vms"][0]["items"].to_string();
    assert!(items.contains("undone") && !items.contains("another run"), "{report}");
}

/// The monitor of a plain QEMU serves one client, which came before the lock of the VM: the second run
/// once failed at once.
#[test]
fn a_second_run_waits_for_the_monitor_of_a_plain_qemu() {
    let env = TestEnv::new();
    env.init_repo();
    let qmp = env.path("run/qmp.sock");
    std::fs::write(env.path("a.raw"), vec![7; 1 << 20]).unwrap();
    let mut command = env.command("qemu-system-x86_64");
    command.args(["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S"]);
    command.args(["-m", "16"]);
    command.args(["-name", "foo", "-uuid", &uuid::Uuid::new_v4().to_string()]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
    command.args(["-blockdev", "raw,node-name=d,file.driver=file,file.filename=a.raw"]);
    command.args(["-device", "virtio-blk-pci,drive=d,id=disk"]);
    let _vm = Process::spawn(&mut command);
    wait_until("the monitor's socket", 60, || is_listening(&qmp));
    // As the first run does from its first question on.
    let mut held = UnixStream::connect(&qmp).unwrap();
    held.read_exact(&mut [0]).unwrap();
    let scratch = env.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let (qmp, scratch) = (qmp.to_str().unwrap(), scratch.to_str().unwrap());
    let args = ["full", "--qmp", qmp, "--scratch-dir", scratch, "--no-progress"];
    let refused = env.vmbackup(&args);
    assert_eq!(refused.code, Some(7), "{refused:?}");
    let mut second = env.spawn_vmbackup(&[&args[..], &["--wait=10m"]].concat());
    second.wait_until_said(WAITING, 60);
    drop(held);
    second.wait().ok();
    let list = env.vmbackup(&["list", "--json"]).json();
    assert_eq!(list["points"].as_array().unwrap().len(), 1, "{list}");
}
