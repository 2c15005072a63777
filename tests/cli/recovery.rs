//! `recover` where something is in its way: somebody else's job, a monitor that is not free, a VM
//! that goes while it is waited for. With a plain QEMU, which nothing but its monitor knows.

use std::io::Read;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp::{Address, Monitor};
use serde_json::{Value, json};

use crate::support::{HangingDisk, Process, TestEnv, is_listening, wait_until};

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// A QEMU with a disk, its monitor, and another one for the test.
struct Machine {
    process: Process,
    monitor: PathBuf,
    side: PathBuf,
    uuid: String,
}

impl Machine {
    fn start(env: &TestEnv, name: &str) -> Self {
        let socket = |of: &str| env.path(&format!("run/{name}-{of}.sock"));
        let (monitor, side) = (socket("qmp"), socket("side"));
        let uuid = uuid::Uuid::new_v4().to_string();
        let image = env.path(&format!("{name}.raw")).display().to_string();
        std::fs::write(&image, vec![7; 1 << 20]).unwrap();
        let mut command = env.command("qemu-system-x86_64");
        command.args(["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-m", "16"]);
        command.args(["-name", name, "-uuid", &uuid]);
        for socket in [&monitor, &side] {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        }
        let blockdev = format!("raw,node-name=d,file.driver=file,file.filename={image}");
        command.args(["-blockdev", &blockdev, "-device", "virtio-blk-pci,drive=d,id=disk"]);
        let process = Process::spawn(&mut command);
        wait_until("the monitors", 60, || is_listening(&monitor) && is_listening(&side));
        Self { process, monitor, side, uuid }
    }

    /// One command at the test's own monitor.
    fn execute(&self, command: &str, arguments: Value) -> Value {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let address = Address::Unix(self.side.clone());
            let monitor = Monitor::connect(&address, qmp::Options::default()).await.unwrap();
            monitor.execute_raw(command, arguments).await.unwrap()
        })
    }

    /// Names of nodes that backups of ours have made.
    fn nodes(&self) -> Vec<String> {
        let nodes = self.execute("query-named-block-nodes", json!({}));
        let names =
            nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap());
        names.filter(|name| name.starts_with("vmb-")).map(str::to_owned).collect()
    }
}

/// A backup of the QEMU behind `monitor` that is killed at a step.
fn killed_backup(env: &TestEnv, of: (&Path, &str), options: &[&str]) {
    let scratch = env.path("scratch");
    std::fs::create_dir_all(&scratch).unwrap();
    killed_backup_with(&scratch, env, of, options);
}

fn killed_backup_with(
    scratch: &Path,
    env: &TestEnv,
    (monitor, step): (&Path, &str),
    options: &[&str],
) {
    let (monitor, scratch) = (monitor.to_str().unwrap(), scratch.to_str().unwrap());
    let backup = ["full", "--qmp", monitor, "--scratch-dir", scratch];
    let run = env.stopped_at(step, &[&backup[..], options].concat());
    run.signal("KILL");
    run.wait();
}

/// Found in review: it was taken for another run at work, which sees to what it leaves.
#[test]
fn what_a_job_of_somebody_else_keeps_from_being_undone_is_a_problem_and_not_another_run() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::start(&env, "foo");
    killed_backup(&env, (&machine.monitor, "after:filter"), &["--guest-first"]);
    let filters = machine.nodes();
    assert!(!filters.is_empty());
    for name in ["ours", "theirs"] {
        let node = json!({ "driver": "null-co", "node-name": name, "size": 65536,
            "read-zeroes": true });
        machine.execute("blockdev-add", node);
    }
    let mirror = json!({ "device": "ours", "target": "theirs", "sync": "none",
        "job-id": "their-job" });
    machine.execute("blockdev-mirror", mirror);
    let outcome = env.vmbackup(&["recover", "--json"]).fails_with(&["their-job", "not recovered"]);
    let report = parsed(&outcome.stdout);
    let problem = report["vms"][0]["problem"].as_str().unwrap();
    for told in ["cannot remove what an earlier backup left", "their-job", "hint: "] {
        assert!(problem.contains(told), "{problem}");
    }
    assert!(!report["vms"][0]["items"].to_string().contains("journal of VM"), "{report}");
    assert_eq!(machine.nodes(), filters);
    machine.execute("job-cancel", json!({ "id": "their-job" }));
    wait_until("the end of their job", 60, || {
        machine.execute("query-jobs", json!({})).as_array().unwrap().is_empty()
    });
    env.vmbackup(&["recover"]).ok();
    assert_eq!(machine.nodes(), Vec::<String>::new());
}

/// A machine with what a killed backup left on it, and its monitor held.
fn left_and_held(env: &TestEnv) -> (Machine, UnixStream) {
    env.init_repo();
    let machine = Machine::start(env, "foo");
    killed_backup(env, (&machine.monitor, "after:bitmap"), &[]);
    let held = hold(&machine.monitor);
    (machine, held)
}

/// As whoever talks to it does from the first question on.
fn hold(monitor: &Path) -> UnixStream {
    let mut held = UnixStream::connect(monitor).unwrap();
    held.read_exact(&mut [0]).unwrap();
    held
}

#[test]
fn a_vm_that_ends_while_it_is_waited_for_is_gone() {
    let env = TestEnv::new();
    let (machine, _held) = left_and_held(&env);
    let mut recovery = env.spawn_vmbackup(&["recover", "--wait=10m", "--json"]);
    recovery.wait_until_said("waiting up to", 60);
    machine.process.signal("KILL");
    let report = recovery.wait().ok().json();
    assert_eq!(report["vms"][0]["problem"], Value::Null, "{report}");
    assert!(report["vms"][0]["items"].to_string().contains("which is gone"), "{report}");
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

/// Two machines: the first, on which a killed backup left something, is at the monitor `monitor`, the
/// second at `next`, which is to take its name.
struct Swapped {
    first: Machine,
    second: Machine,
    monitor: PathBuf,
    next: PathBuf,
}

impl Swapped {
    fn new(env: &TestEnv) -> Self {
        env.init_repo();
        let (first, second) = (Machine::start(env, "foo"), Machine::start(env, "bar"));
        let (monitor, next) = (env.path("run/monitor"), env.path("run/next"));
        symlink(&first.monitor, &monitor).unwrap();
        symlink(&second.monitor, &next).unwrap();
        killed_backup(env, (&monitor, "after:bitmap"), &[]);
        Self { first, second, monitor, next }
    }
}

#[test]
fn another_vm_at_the_monitor_that_was_waited_for_is_not_taken_for_the_one_of_the_journal() {
    let env = TestEnv::new();
    let Swapped { first, second, monitor, next } = Swapped::new(&env);
    let _held = hold(&first.monitor);
    let mut recovery = env.spawn_vmbackup(&["recover", "--wait=10m", "--json"]);
    recovery.wait_until_said("waiting up to", 60);
    std::fs::rename(&next, &monitor).unwrap();
    let report = recovery.wait().ok().json();
    let found = |uuid: &str| {
        let mut vms = report["vms"].as_array().unwrap().iter();
        vms.find(|vm| vm["uuid"] == uuid).unwrap_or_else(|| panic!("{report}")).clone()
    };
    let (gone, there) = (found(&first.uuid), found(&second.uuid));
    assert_eq!((&gone["problem"], &there["problem"]), (&Value::Null, &Value::Null), "{report}");
    assert!(gone["items"].to_string().contains("which is gone"), "{report}");
    assert_eq!(there["name"], "bar", "{report}");
    assert_eq!(report["vms"].as_array().unwrap().len(), 2, "{report}");
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

/// Found in review: the one that was there was told of twice.
#[test]
fn a_vm_that_is_gone_and_the_one_at_its_monitor_are_told_of_once() {
    let env = TestEnv::new();
    let Swapped { first, second, monitor, next } = Swapped::new(&env);
    std::fs::rename(&next, &monitor).unwrap();
    let report = env.vmbackup(&["recover", "--json"]).ok().json();
    let vms = report["vms"].as_array().unwrap();
    let found: Vec<_> = vms.iter().map(|vm| vm["uuid"].as_str().unwrap()).collect();
    assert_eq!(found, [&second.uuid, &first.uuid], "{report}");
    assert!(vms[1]["items"].to_string().contains("which is gone"), "{report}");
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

#[test]
fn a_client_of_the_monitor_that_is_no_run_leaves_a_problem() {
    let env = TestEnv::new();
    let (machine, held) = left_and_held(&env);
    let outcome = env.vmbackup(&["recover", "--json"]);
    assert_eq!(outcome.code, Some(13), "{outcome:?}");
    assert!(outcome.stderr.contains("another client"), "{outcome:?}");
    drop(held);
    let said = env.vmbackup(&["recover"]).ok().stdout;
    assert!(said.contains("undone"), "{said}");
    assert_eq!(machine.nodes(), Vec::<String>::new());
}

#[test]
fn a_client_of_the_monitor_that_leaves_in_time_is_in_nobodys_way() {
    let env = TestEnv::new();
    let (machine, held) = left_and_held(&env);
    let recovery = env.spawn_vmbackup(&["recover"]);
    std::thread::sleep(Duration::from_secs(3));
    drop(held);
    let said = recovery.wait().ok().stdout;
    assert!(said.contains("undone"), "{said}");
    assert_eq!(machine.nodes(), Vec::<String>::new());
}

/// Two machines with what killed backups left on them, in the order of their journals; scratch of the
/// first is on a disk that may hang.
fn two_left(env: &TestEnv) -> (HangingDisk, [Machine; 2]) {
    env.init_repo();
    let disk = HangingDisk::mount(&env.path("."));
    let mut machines = [Machine::start(env, "foo"), Machine::start(env, "bar")];
    machines.sort_by(|one, other| one.uuid.cmp(&other.uuid));
    let (step, options) = ("after:filter", ["--guest-first"]);
    killed_backup_with(&disk.path, env, (&machines[0].monitor, step), &options);
    killed_backup(env, (&machines[1].monitor, step), &options);
    (disk, machines)
}

/// Found in review: one was recovered after the other, and the guest of the second may stand still.
#[test]
fn a_vm_whose_scratch_hangs_keeps_no_other_from_being_recovered() {
    let env = TestEnv::new();
    let (mut disk, [first, second]) = two_left(&env);
    disk.freeze();
    let recovery = env.spawn_vmbackup(&["recover"]);
    wait_until("the recovery of the second", 7, || second.nodes().is_empty());
    assert!(!first.nodes().is_empty());
    disk.answer();
    recovery.wait();
    env.vmbackup(&["recover"]).ok();
    assert_eq!(first.nodes(), Vec::<String>::new());
}

/// Found in review: what is left of a VM that is gone was removed without a question, on the thread
/// that all the others are recovered on.
#[test]
fn a_vm_that_is_gone_and_whose_scratch_hangs_keeps_no_other_from_being_recovered() {
    let env = TestEnv::new();
    let (mut disk, [first, second]) = two_left(&env);
    first.process.signal("KILL");
    disk.stall();
    let recovery = env.spawn_vmbackup(&["recover"]);
    wait_until("the recovery of the second", 7, || second.nodes().is_empty());
    std::thread::sleep(Duration::from_secs(2));
    recovery.signal("INT");
    assert_eq!(recovery.wait().code, Some(130));
    disk.answer();
    let said = env.vmbackup(&["recover"]).ok().stdout;
    assert!(said.contains("which is gone"), "{said}");
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

fn only_journal(env: &TestEnv) -> PathBuf {
    let mut entries = std::fs::read_dir(env.path("state/journal")).unwrap();
    entries.next().unwrap().unwrap().path()
}

fn journal(env: &TestEnv, uuid: &str) -> PathBuf {
    env.path("state/journal").join(format!("{uuid}.json"))
}

/// Found in review: those that hang were waited for by all that are not among the first eight.
#[test]
fn many_vms_that_hang_keep_no_other_from_being_recovered() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::start(&env, "foo");
    killed_backup(&env, (&machine.monitor, "after:filter"), &["--guest-first"]);
    // Nobody answers there.
    let silent = env.path("run/silent.sock");
    let _listener = UnixListener::bind(&silent).unwrap();
    let text = std::fs::read_to_string(journal(&env, &machine.uuid)).unwrap();
    let text = text.replace(machine.monitor.to_str().unwrap(), silent.to_str().unwrap());
    for n in 0..40 {
        let other = format!("00000000-0000-4000-8000-{n:012}");
        std::fs::write(journal(&env, &other), &text).unwrap();
    }
    assert!(!machine.nodes().is_empty());
    let recovery = env.spawn_vmbackup(&["recover"]);
    // A monitor that says nothing is waited for for five seconds.
    wait_until("the recovery of the last", 10, || machine.nodes().is_empty());
    recovery.signal("INT");
    recovery.wait();
}

/// A machine that is gone with its scratch on a disk that may hang, and so many journals of it.
fn gone(env: &TestEnv, journals: usize) -> HangingDisk {
    gone_with_scratch_in(env, "hanging/scratch", journals)
}

/// The same with its scratch elsewhere.
fn gone_with_scratch_in(env: &TestEnv, scratch: &str, journals: usize) -> HangingDisk {
    env.init_repo();
    let disk = HangingDisk::mount(&env.path("."));
    let machine = Machine::start(env, "foo");
    std::fs::create_dir_all(env.path(scratch)).unwrap();
    killed_backup_with(&env.path(scratch), env, (&machine.monitor, "after:bitmap"), &[]);
    machine.process.signal("KILL");
    for n in 1..journals {
        let other = format!("00000000-0000-4000-8000-{n:012}");
        std::fs::copy(journal(env, &machine.uuid), journal(env, &other)).unwrap();
    }
    disk
}

/// Found in review: to tell what is there, it was looked at on the thread that does everything, for as
/// long as it hung; and where VMs are undone each asked anew whether it answers.
#[test]
fn scratch_of_vms_that_are_gone_is_looked_at_once_and_for_some_seconds_only() {
    let env = TestEnv::new();
    let mut disk = gone(&env, 5);
    disk.stall();
    let mut look = env.spawn_vmbackup(&["recover", "--dry-run"]);
    // It has looked and said so; until the look returns the kernel does not let the process end.
    look.wait_until_said("not recovered: foo, foo, foo, foo, foo", 25);
    disk.answer();
    look.wait().fails_with(&["does not answer"]);
    let found = env.vmbackup(&["recover", "--dry-run"]).ok().stdout;
    assert_eq!(found.matches("would undo: journal of VM 'foo', which is gone").count(), 5);
    assert_eq!(found.matches("/hanging/scratch/vmb-").count(), 5, "{found}");
    env.vmbackup(&["recover"]).ok();
    assert_eq!(disk.files(), Vec::<PathBuf>::new());
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

/// Found in review: of what was found before, nothing was told.
#[test]
fn what_is_left_of_a_vm_that_is_gone_is_told_up_to_the_directory_that_hangs() {
    let env = TestEnv::new();
    let mut disk = gone_with_scratch_in(&env, "answering", 1);
    let path = only_journal(&env);
    let mut text = parsed(&std::fs::read_to_string(&path).unwrap());
    let entries = text["runs"][0]["entries"].as_array_mut().unwrap();
    let mut socket = entries.iter().find(|entry| entry["phase"] == "scratch").unwrap().clone();
    let there = socket["objects"].to_string();
    let hanging =
        there.replace(env.path("answering").to_str().unwrap(), disk.path.to_str().unwrap());
    assert_ne!(hanging, there);
    socket["phase"] = json!("socket");
    socket["objects"] = parsed(&hanging);
    entries.push(socket);
    std::fs::write(&path, text.to_string()).unwrap();
    disk.stall();
    let mut look = env.spawn_vmbackup(&["recover", "--dry-run"]);
    look.wait_until_said("not recovered: foo", 25);
    disk.answer();
    let said = look.wait().fails_with(&["does not answer"]).stdout;
    assert!(said.contains("would undo: ") && said.contains("/answering/vmb-"), "{said}");
    assert!(!said.contains("which is gone"), "{said}");
    env.vmbackup(&["recover"]).ok();
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

/// Found in review: whether they are there was asked on the thread that recovers all.
#[test]
fn images_whose_file_system_hangs_keep_no_vm_from_being_recovered() {
    let env = TestEnv::new();
    env.init_repo();
    let mut disk = HangingDisk::mount(&env.path("."));
    let image = disk.path.join("a.qcow2").display().to_string();
    env.run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]).ok();
    let spec = format!("{image},format=qcow2");
    let run = env.stopped_at("after:bitmap", &["full", "--image", &spec, "--name", "still"]);
    run.signal("KILL");
    run.wait();
    let machine = Machine::start(&env, "foo");
    killed_backup(&env, (&machine.monitor, "after:filter"), &["--guest-first"]);
    disk.stall();
    let mut recovery = env.spawn_vmbackup(&["recover"]);
    wait_until("the recovery of the guest", 7, || machine.nodes().is_empty());
    recovery.wait_until_said("not recovered: still", 25);
    disk.answer();
    recovery.wait().fails_with(&["does not answer"]);
    let said = env.vmbackup(&["recover"]).ok().stdout;
    assert!(said.contains("undone: bitmap in"), "{said}");
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

/// Found in review: its files were looked at on the thread that does everything, before the repository
/// was opened.
#[test]
fn a_restore_whose_target_hangs_keeps_nothing_else_from_being_recovered() {
    let env = TestEnv::new();
    env.init_repo();
    let mut disk = HangingDisk::mount(&env.path("."));
    std::fs::write(env.path("a.raw"), vec![7; 1 << 20]).unwrap();
    let report = env.vmbackup(&["full", "--image", "a.raw", "--name", "web", "--json"]).json();
    let out = disk.path.join("out").display().to_string();
    let restore = ["restore", report["point"].as_str().unwrap(), "--to", &out];
    let run = env.stopped_at("after:temporary", &restore);
    run.signal("KILL");
    run.wait();
    let machine = Machine::start(&env, "foo");
    killed_backup(&env, (&machine.monitor, "after:filter"), &["--guest-first"]);
    for options in [&["--dry-run"][..], &[]] {
        disk.stall();
        let mut recovery = env.spawn_vmbackup(&[&["recover"], options].concat());
        recovery.wait_until_said("not recovered: web", 55);
        disk.answer();
        let said = recovery.wait().fails_with(&["does not answer"]).stdout;
        assert!(said.contains("'foo'"), "{said}");
    }
    assert_eq!(machine.nodes(), Vec::<String>::new());
    let said = env.vmbackup(&["recover"]).ok().stdout;
    assert!(said.contains("of the killed restore of"), "{said}");
    assert_eq!(disk.files(), Vec::<PathBuf>::new());
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}
