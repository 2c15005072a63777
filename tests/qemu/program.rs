//! The program, end to end: `--qmp` in, images out.

use vmbackup::platform::BackupMode;

use crate::machine::Machine;
use crate::reading::Points;
use crate::support::TestEnv;

#[tokio::test]
async fn points_of_a_plain_qemu_restore_byte_for_byte() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::start().await;
    let monitor = machine.path("qmp.sock");
    let scratch = machine.path("scratch");
    let back_up = |command: &str| {
        let source = ["--qmp", monitor.to_str().unwrap(), "--scratch-dir"];
        let arguments =
            [&[command][..], &source[..], &[scratch.to_str().unwrap(), "--json"][..]].concat();
        let report = env.vmbackup(&arguments).json();
        report["point"].as_str().expect("the report names the point").to_owned()
    };
    machine.guest("disk-a", "write -P 1 1M 2M").await;
    machine.guest("disk-b", "write -P 2 3M 1M").await;
    let mut taken = vec![(machine.oracle().await, back_up("full"))];
    machine.guest("disk-a", "discard 1M 1M").await;
    machine.guest("disk-b", "write -P 3 3584k 1M").await;
    taken.push((machine.oracle().await, back_up("incremental")));
    machine.guest("disk-b", "write -z 0 16M").await;
    taken.push((machine.oracle().await, back_up("backup")));

    for (oracle, point) in &taken {
        let to = env.path(point);
        env.vmbackup(&["restore", point, "--to", to.to_str().unwrap()]).ok();
        for (disk, content) in ["disk-a", "disk-b"].iter().zip(oracle) {
            let restored = std::fs::read(to.join(format!("{disk}.raw"))).unwrap();
            assert!(restored == *content, "{disk} of {point} equals the oracle");
        }
        env.vmbackup(&["verify", point]).ok();
    }
    // The chain of the program's repository does not disturb another's.
    let mut machine = machine;
    let mut points = Points::default();
    points.back_up(&mut machine, BackupMode::Full, &[]).await;
    assert_eq!(machine.ours().await.len(), 4);
}
