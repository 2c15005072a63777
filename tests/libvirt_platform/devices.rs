//! Disks on block devices: libvirt's QEMU has a `/dev` of its own, where no lock of ours reaches it.

use std::path::PathBuf;

use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::Platform;

use crate::bare::{Bare, request};
use crate::support::TestEnv;

/// A loop device over a file of 8 MiB, detached on drop.
struct LoopDevice<'env> {
    env: &'env TestEnv,
    path: PathBuf,
}

impl<'env> LoopDevice<'env> {
    fn new(env: &'env TestEnv) -> Self {
        let file = env.path("device.img");
        std::fs::write(&file, vec![0x41; 8 << 20]).expect("in the test directory");
        let path = env.run("losetup", &["-f", "--show", &file.to_string_lossy()]).text();
        Self { env, path: path.into() }
    }

    fn path(&self) -> &str {
        self.path.to_str().expect("a path in /dev")
    }

    fn disk(&self) -> String {
        format!(
            "<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/>\
             <source dev='{}'/><target dev='vda' bus='virtio'/></disk>",
            self.path()
        )
    }
}

impl Drop for LoopDevice<'_> {
    fn drop(&mut self) {
        self.env.run("losetup", &["-d", self.path()]);
    }
}

#[test]
fn a_device_that_a_running_domain_uses_is_neither_overwritten_nor_taken_for_stopped() {
    let env = TestEnv::new();
    let device = LoopDevice::new(&env);
    let domain = Bare::start(&env, &device.disk());
    env.vmbackup(&["repo", "init", "--no-key"]).ok();
    let small = env.path("a.raw");
    std::fs::write(&small, vec![0x42; 8 << 20]).unwrap();
    let small = small.to_str().unwrap();
    let image = format!("{small},format=raw");
    env.vmbackup(&["full", "--image", &image, "--name", "foo"]).ok();

    let (to, read) = (format!("a={}", device.path()), format!("{},format=raw", device.path()));
    let refused: [&[&str]; 4] = [
        &["restore", "foo@latest", "--to-device", &to],
        &["copy", small, device.path()],
        &["serve", device.path(), "--writable", "--socket", "s.sock"],
        &["full", "--image", &read, "--name", "bar"],
    ];
    for args in refused {
        let outcome = env.vmbackup(args);
        assert_eq!(outcome.code, Some(7), "{args:?}: {outcome:?}");
        assert!(outcome.stderr.contains("is in use by qemu"), "{args:?}: {outcome:?}");
    }
    drop(domain);
    // One that only looks for a moment, as udev's programs do, is waited for.
    let mut reader = env.command("sh");
    reader.args(["-c", &format!("exec 3<{}; sleep 1", device.path())]);
    let mut reader = reader.spawn().unwrap();
    let now = std::fs::read(&device.path).unwrap();
    assert!(now.iter().all(|byte| *byte == 0x41), "the device was overwritten");
    env.vmbackup(refused[0]).ok();
    reader.wait().unwrap();
    assert!(std::fs::read(&device.path).unwrap().iter().all(|byte| *byte == 0x42));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_writes_its_device_during_the_backup_makes_the_snapshot_lost() {
    let env = TestEnv::new();
    let device = LoopDevice::new(&env);
    let bare = Bare::define(&env, "", &device.disk(), "");
    let platform = bare.platform().await;
    let mut snapshot = platform.open_snapshot(&request(1), &Control::new()).await.unwrap();
    // As udev does when somebody closed the device.
    env.run("touch", &[device.path()]).ok();
    snapshot.still_valid().await.unwrap();
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    bare.io(0, "write -P 9 1M 64k");
    assert_eq!(snapshot.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);
    // Stopped again, only the device itself remembers.
    bare.virsh(&["destroy", &bare.name]).ok();
    assert_eq!(snapshot.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);
    snapshot.abort().await.unwrap();
}

/// The second of two devices is looked at before the first is written.
#[test]
fn no_device_is_written_before_all_of_them_can_be() {
    let env = TestEnv::new();
    let (first, second) = (LoopDevice::new(&env), env.path("wrong-size.raw"));
    std::fs::write(&second, b"short").unwrap();
    env.vmbackup(&["repo", "init", "--no-key"]).ok();
    for name in ["a.raw", "b.raw"] {
        std::fs::write(env.path(name), vec![0x42; 8 << 20]).unwrap();
    }
    let images = ["a.raw", "b.raw"].map(|name| env.path(name).to_str().unwrap().to_owned());
    let both = ["full", "--image", &images[0], "--image", &images[1], "--name", "foo"];
    env.vmbackup(&both).ok();
    let to = [format!("a={}", first.path()), format!("b={}", second.display())];
    let restore = ["restore", "foo@latest", "--to-device", &to[0], "--to-device", &to[1]];
    let outcome = env.vmbackup(&restore);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(std::fs::read(&first.path).unwrap().iter().all(|byte| *byte == 0x41));
}
