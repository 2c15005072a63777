//! How much of a backup is ahead of what the guest itself reads and writes.

use crate::machine::UUID;
use crate::support::{NbdLog, NbdServer, Process, TestEnv, is_listening, wait_until};

const MIB: usize = 1 << 20;

/// Until that has paid: three measurements of nine requests. A QEMU before 8.0, which is read by clusters,
/// gets more of them for this disk, and then more than two at once.
const READS: usize = 27;

/// The same of libvirt: tests/libvirt/paced.rs.
#[test]
fn a_running_vm_is_not_read_by_many_requests_at_once_before_that_has_paid() {
    let env = TestEnv::new();
    env.init_repo();
    let log = env.path("reads.log");
    let logfile = format!("logfile={}", log.display());
    let disk = [
        "--filter=log",
        "--filter=delay",
        "--filter=cow",
        "pattern",
        "8M",
        "rdelay=20ms",
        &logfile,
    ];
    let server = NbdServer::nbdkit(&env, &disk);
    let disk = server.socket().display();
    let monitor = env.path("run/qmp.sock");
    let mut command = env.command("qemu-system-x86_64");
    command
        .args(["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S", "-m", "16"])
        .args(["-name", "paced", "-uuid", UUID])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())])
        .args(["-blockdev", &format!("nbd,node-name=d,server.type=unix,server.path={disk}")])
        .args(["-device", "virtio-blk-pci,drive=d,id=disk"]);
    let mut vm = Process::spawn(&mut command);
    wait_until("the monitor", 60, || {
        assert!(vm.is_running(), "QEMU ended at once");
        is_listening(&monitor)
    });
    let scratch = env.open_dir("scratch");
    let from = ["--qmp", &monitor.to_string_lossy(), "--scratch-dir", &scratch.to_string_lossy()];
    env.vmbackup(&[&["full"], &from[..]].concat()).ok();
    let reads = NbdLog::of(&log);
    assert!(reads.bytes("Read") >= 8 * MIB, "{}", reads.0);
    assert!(reads.until("Read", READS).open("Read").1 <= 2, "{}", reads.0);
}
