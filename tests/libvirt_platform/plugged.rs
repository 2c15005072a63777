//! Disks that come and go while their domain runs: each disk is read from the newest point that it was
//! part of, and in full if there is none.

use serde_json::Value;

use crate::bare::{Bare, qcow2};
use crate::support::{TestEnv, assert_same_content};

/// The size of each disk.
const SIZE: &str = "4M";

/// A running domain of SCSI disks: those are plugged and unplugged without the guest's consent.
struct Plugged<'env> {
    bare: Bare<'env>,
}

impl<'env> Plugged<'env> {
    fn start(env: &'env TestEnv) -> Self {
        env.init_repo();
        let disks = (qcow2(env, 'a', SIZE) + &qcow2(env, 'b', SIZE)).replace("dev='vd", "dev='sd");
        let disks = disks.replace("bus='virtio'", "bus='scsi'");
        let controller = "<controller type='scsi' model='virtio-scsi'/>";
        let bare = Bare::define(env, "", &disks, controller);
        bare.virsh(&["start", "--paused", &bare.name]).ok();
        Self { bare }
    }

    fn plug(&self, letter: char) {
        let image = self.image(letter);
        let attach = ["attach-disk", &self.bare.name, &image, &format!("sd{letter}"), "--live"];
        let how = ["--targetbus", "scsi", "--driver", "qemu", "--subdriver", "qcow2"];
        self.bare.virsh(&[&attach[..], &how].concat()).ok();
    }

    fn unplug(&self, letter: char) {
        self.bare.virsh(&["detach-disk", &self.bare.name, &format!("sd{letter}"), "--live"]).ok();
    }

    fn image(&self, letter: char) -> String {
        self.bare.env.path(&format!("vd{letter}.qcow2")).to_string_lossy().into_owned()
    }

    /// Writes to a disk as the guest would.
    fn write(&self, letter: char, what: &str) {
        let unit = u32::from(letter) - u32::from('a');
        for command in [what, "flush"] {
            let line = format!("qemu-io -d scsi0-0-0-{unit} \"{command}\"");
            let said =
                self.bare.virsh(&["qemu-monitor-command", "--hmp", &self.bare.name, &line]).ok();
            assert!(!said.stdout.contains("rror"), "{said:?}");
        }
    }

    /// Takes a point of exactly these disks and restores it: each equals what its image holds, which
    /// nobody writes to meanwhile. Why each was read as it was: the base, or the reason for a full read.
    fn take(&self, command: &str, letters: &[char]) -> (String, Vec<String>) {
        let env = self.bare.env;
        let report = env.vmbackup(&[command, "--domain", &self.bare.name, "--json"]).json();
        let disks = report["disks"].as_array().expect("disks");
        assert_eq!(disks.len(), letters.len(), "{report}");
        let point = report["point"].as_str().expect("a point id").to_owned();
        let to = env.path(&point);
        let restore = ["restore", &point, "--to", &to.to_string_lossy(), "--format", "raw"];
        env.vmbackup(&restore).ok();
        for letter in letters {
            let (restored, oracle) = (to.join(format!("sd{letter}.raw")), env.path("oracle.raw"));
            let convert = ["convert", "-U", "-f", "qcow2", "-O", "raw", &self.image(*letter)];
            env.run("qemu-img", &[&convert[..], &[&oracle.to_string_lossy()]].concat()).ok();
            assert_same_content(env, (&restored, "raw"), (&oracle, "raw"));
        }
        (point, disks.iter().map(why).collect())
    }
}

fn why(disk: &Value) -> String {
    let read = &disk["read"];
    let why = if read["mode"] == "incremental" { &read["base"] } else { &read["reason"] };
    why.as_str().expect("a point or a reason").to_owned()
}

#[test]
fn disks_that_are_plugged_in_and_removed_while_the_domain_runs() {
    let env = TestEnv::new();
    let domain = Plugged::start(&env);
    domain.write('a', "write -P 1 0 4M");
    domain.write('b', "write -P 2 0 4M");
    let (first, _) = domain.take("full", &['a', 'b']);

    // A new one, with content of its own.
    qcow2(&env, 'c', SIZE);
    let fill = ["-f", "qcow2", "-c", "write -q -P 3 0 4M", &domain.image('c')];
    env.run("qemu-io", &fill).ok();
    domain.write('a', "write -P 4 1M 64k");
    domain.plug('c');
    domain.write('b', "write -P 5 1M 64k");
    domain.write('c', "write -P 6 1M 64k");
    let (second, why) = domain.take("incremental", &['a', 'b', 'c']);
    assert_eq!(why, [&*first, &*first, "new-disk"]);

    // One is gone.
    domain.write('b', "write -P 7 2M 64k");
    domain.unplug('b');
    domain.write('a', "write -P 8 2M 64k");
    domain.write('c', "write -P 9 2M 64k");
    let (third, why) = domain.take("incremental", &['a', 'c']);
    assert_eq!(why, [&*second, &*second]);

    // It is back: what was written before it went, and elsewhere, is in its bitmap.
    let elsewhere = ["-f", "qcow2", "-c", "write -q -P 10 3M 64k", &domain.image('b')];
    env.run("qemu-io", &elsewhere).ok();
    domain.plug('b');
    domain.write('b', "write -P 11 512k 64k");
    domain.write('c', "write -P 12 3M 64k");
    let (_, why) = domain.take("incremental", &['a', 'b', 'c']);
    assert_eq!(why, [&*third, &*second, &*third]);
    assert_eq!(domain.bare.checkpoints(), Vec::<String>::new());
    assert_eq!(domain.bare.bitmaps().len(), 1, "{:?}", domain.bare.bitmaps());
}

/// Another disk under the same name has nothing to build on, though it has the same size.
#[test]
fn a_disk_that_is_replaced_by_another_while_the_domain_runs() {
    let env = TestEnv::new();
    let domain = Plugged::start(&env);
    domain.write('a', "write -P 1 0 4M");
    domain.write('b', "write -P 2 0 4M");
    let (first, _) = domain.take("full", &['a', 'b']);
    domain.unplug('b');
    std::fs::rename(domain.image('b'), env.path("away.qcow2")).expect("own directory");
    qcow2(&env, 'b', SIZE);
    domain.plug('b');
    domain.write('a', "write -P 3 1M 64k");
    domain.write('b', "write -P 4 1M 64k");
    let (second, why) = domain.take("incremental", &['a', 'b']);
    assert_eq!(why, [&*first, "image-replaced"]);
    domain.write('b', "write -P 5 2M 64k");
    let (_, why) = domain.take("incremental", &['a', 'b']);
    assert_eq!(why, [&*second, &*second]);
}
