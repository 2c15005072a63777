//! A guest that boots with a served restore point as its disk.

use std::process::Command;

use crate::rig::{Serve, back_up};
use crate::support::{Guest, GuestFiles, Process, TestEnv};

fn sha256(env: &TestEnv, file: &str) -> String {
    let text = env.run("sha256sum", &[file]).ok().stdout;
    text.split_whitespace().next().unwrap().to_owned()
}

fn boot(env: &TestEnv, serve: &Serve) -> (Process, Guest) {
    let files = GuestFiles::into_dir(env.dir());
    let serial = env.path("run/serial.sock");
    let export = serve.report["exports"][0]["name"].as_str().unwrap();
    let disk = format!(
        "driver=nbd,node-name=d,server.type=unix,server.path={},export={export}",
        serve.socket().display()
    );
    let mut command: Command = env.command("qemu-system-x86_64");
    command
        .args(["-machine", "pc,accel=tcg", "-cpu", "max", "-nodefaults", "-display", "none"])
        .args(["-m", "256"])
        .arg("-kernel")
        .arg(&files.kernel)
        .arg("-initrd")
        .arg(&files.initrd)
        .args(["-append", "console=ttyS0 quiet panic=-1", "-serial", "null"])
        .args(["-serial", &format!("unix:{},server=on,wait=off", serial.display())])
        .args(["-blockdev", &disk, "-device", "virtio-blk-pci,drive=d"]);
    let process = Process::spawn(&mut command);
    let guest = Guest::connect(&serial);
    (process, guest)
}

#[test]
fn a_guest_boots_from_a_served_point_reads_what_was_backed_up_and_writes() {
    let env = TestEnv::new();
    env.init_repo();
    let mut content = crate::rig::content(3);
    content.resize(24 << 20, 0);
    content.extend(crate::rig::content(4));
    std::fs::write(env.path("disk.raw"), &content).unwrap();
    let point = back_up(&env);
    let expected = sha256(&env, "disk.raw");
    let serve = Serve::start(&env, &[&point, "--writable", "--overlay", "o"]);
    let (vm, mut guest) = boot(&env, &serve);
    assert_eq!(guest.run("sum vda"), expected, "the guest reads what was backed up");
    guest.run("rnd vda 1000 64");
    guest.run("discard vda 8192 1024");
    let changed = guest.run("sum vda");
    assert_ne!(changed, expected);
    drop((guest, vm));
    serve.stop();
    // The overlay holds what the guest wrote, the point what it always held.
    let serve = Serve::start(&env, &[&point, "--writable", "--overlay", "o"]);
    env.run("nbdcopy", &[&serve.uri(0), "out"]).ok();
    assert_eq!(sha256(&env, "out"), changed);
    env.vmbackup(&["verify", &point, "--against", "disk.raw"]).ok();
}
