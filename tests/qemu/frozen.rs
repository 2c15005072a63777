//! A real guest with its agent under a plain QEMU: whatever becomes of a backup, it is not left
//! frozen.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::machine::UUID;
use crate::support::{Guest, GuestFiles, Process, SmallDisk, TestEnv, is_listening, wait_for};

/// Boots a guest with its file system on `a.qcow2`; its sockets lie in `dir`.
fn boot(dir: &Path) -> (Process, Guest) {
    GuestFiles::into_dir(dir);
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "a.qcow2", "64M"])
        .current_dir(dir)
        .status();
    assert!(made.expect("qemu-img runs").success());
    let socket = dir.join("guest.sock");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "q35,accel=tcg", "-cpu", "max", "-m", "192", "-uuid", UUID])
        .args(["-nodefaults", "-display", "none", "-kernel", "vmlinuz", "-initrd", "initrd"])
        .args(["-append", "console=ttyS0 quiet panic=-1", "-serial", "null"])
        .args(["-serial", &format!("unix:{},server=on,wait=off", socket.display())])
        .args(["-qmp", "unix:qmp.sock,server=on,wait=off", "-device", "virtio-serial-pci"])
        .args(["-chardev", "socket,id=agent,path=agent.sock,server=on,wait=off"])
        .args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"])
        .args(["-blockdev", "qcow2,node-name=a,file.driver=file,file.filename=a.qcow2"])
        .args(["-device", "virtio-blk-pci,drive=a,id=disk-a"])
        .current_dir(dir);
    let qemu = Process::spawn(&mut command);
    wait_for("the guest's serial port", 30, || is_listening(&socket).then_some(()));
    let mut guest = Guest::connect(&socket);
    guest.run("mke2fs /dev/vda && mount /dev/vda /mnt && echo hello >/mnt/file && sync");
    guest.run("while ! pidof qemu-ga; do sleep 0.2; done");
    (qemu, guest)
}

/// What the guest's agent did: "freeze", "thaw", in order.
fn hooked(guest: &mut Guest) -> Vec<String> {
    let lines = guest.run("cat /tmp/hooked 2>/dev/null || true");
    lines.lines().map(str::to_owned).collect()
}

#[track_caller]
fn assert_thawed(guest: &mut Guest, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let hooked = hooked(guest);
        if hooked.last().is_some_and(|what| what == "thaw") {
            break;
        }
        assert!(Instant::now() < deadline, "{what}: not thawed: {hooked:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    guest.run("echo again >/mnt/file; sync; : >/tmp/hooked");
}

fn journal(env: &TestEnv) -> String {
    let path = env.path("state/journal").join(format!("{UUID}.json"));
    std::fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn a_real_guest_of_a_plain_qemu_is_not_left_frozen() {
    let env = TestEnv::new();
    env.init_repo();
    let dir = env.path("vm");
    std::fs::create_dir_all(dir.join("scratch")).unwrap();
    let (_qemu, mut guest) = boot(&dir);
    // Relative: the guardian works in another directory.
    let sockets = ["--qmp", "qmp.sock", "--agent", "agent.sock", "--scratch-dir", "scratch"];
    let args = |command| [&[command], &sockets[..]].concat();
    for (command, step) in
        [("full", "before:freeze"), ("full", "after:freeze"), ("backup", "before:job")]
    {
        let backup = env.stopped_in(&dir, step, &args(command));
        backup.signal("KILL");
        backup.wait();
        assert!(journal(&env).contains("\"freeze\""), "{step}: the journal tells");
        if step != "before:freeze" {
            // By the guardian; nobody runs another command.
            assert_thawed(&mut guest, step);
        }
        let said = env.vmbackup(&["recover"]).ok().stdout;
        assert!(said.contains("which may be frozen: thawed"), "{step}: {said}");
        assert_eq!(journal(&env), "", "{step}");
        guest.run("echo again >/mnt/file; sync; : >/tmp/hooked");
    }

    // A freeze that comes when nobody waits for it any more: it stays in the journal.
    guest.run("echo 4 >/tmp/slow.freeze");
    let mut late = env.vmbackup_command(&args("full"));
    let report = crate::support::Outcome::of(
        late.args(["--freeze-budget", "500ms", "--json"]).current_dir(&dir),
    );
    let report = report.json();
    assert_eq!(report["quiescence"]["level"], "crash", "{report}");
    assert!(journal(&env).contains("\"freeze\""), "a freeze is under way: {report}");
    assert_thawed(&mut guest, "late");
    guest.run("rm /tmp/slow.freeze");
    let said = env.vmbackup(&["recover"]).ok().stdout;
    assert!(said.contains("which may be frozen: thawed"), "{said}");

    // A journal that makes no sense may tell of a freeze.
    let path = env.path("state/journal").join(format!("{UUID}.json"));
    std::fs::write(&path, "{\"version\":99,\"runs\":[]}").unwrap();
    let monitor = dir.join("qmp.sock");
    let (monitor, agent) = (monitor.to_str().unwrap(), dir.join("agent.sock"));
    let said = env.vmbackup(&["recover", "--qmp", monitor]).ok().stdout;
    assert!(said.contains("name its agent") && path.exists(), "{said}");
    // Nor does a backup take its place.
    env.vmbackup(&["backup", "--qmp", monitor]).fails_with(&["may be frozen", "--agent"]);
    assert!(path.exists());
    let named = ["recover", "--qmp", monitor, "--agent", agent.to_str().unwrap()];
    let said = env.vmbackup(&named).ok().stdout;
    assert!(said.contains(".unreadable") && said.contains("thawed"), "{said}");
    assert!(!path.exists() && path.with_extension("unreadable").exists());
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

/// Nobody is asked anything while the agent is waited for, but scratch is watched.
#[test]
fn a_guest_that_fills_scratch_while_its_thaw_is_waited_for_writes_on() {
    let env = TestEnv::new();
    env.init_repo();
    let dir = env.path("vm");
    std::fs::create_dir_all(&dir).unwrap();
    let small = SmallDisk::mount(&dir, "4m");
    let (_qemu, mut guest) = boot(&dir);
    guest.run("dd if=/dev/urandom of=/mnt/big bs=1M count=12 && sync");
    guest.run("echo 40 >/tmp/slow.thaw");
    let args = ["full", "--qmp", "qmp.sock", "--agent", "agent.sock", "--scratch-dir", "small"];
    let mut backup = Process::spawn(env.vmbackup_command(&args).current_dir(&dir));
    wait_for("the thaw", 60, || hooked(&mut guest).iter().any(|did| did == "thaw").then_some(()));
    let begun = Instant::now();
    // Where it lies; thawed again, the agent answers at once.
    guest.run("rm /tmp/slow.thaw; dd if=/dev/zero of=/mnt/big bs=1M count=12 conv=notrunc,fsync");
    assert!(begun.elapsed() < Duration::from_secs(20), "it stood still: {:?}", begun.elapsed());
    assert!(backup.is_running(), "it waits for the agent");
    let outcome = backup.wait();
    assert_eq!(outcome.code, Some(9), "no space: {outcome:?}");
    assert!(outcome.stderr.contains("the guest comes first"), "{outcome:?}");
    assert!(small.files().is_empty());
}
