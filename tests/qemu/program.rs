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

/// A bitmap under the base's name that has not recorded all along does not show it: the audit, which looks at
/// every block of disks as small as these, finds out.
#[tokio::test]
async fn a_bitmap_of_the_name_of_the_base_of_a_plain_qemu_that_is_not_its_bitmap_is_caught() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::start().await;
    let (monitor, scratch) = (machine.path("qmp.sock"), machine.path("scratch"));
    let args = ["--qmp", monitor.to_str().unwrap(), "--scratch-dir", scratch.to_str().unwrap()];
    let back_up = |command: &str| {
        let report = env.vmbackup(&[&[command][..], &args[..], &["--json"][..]].concat()).json();
        (report["point"].as_str().unwrap().to_owned(), report["disks"].clone())
    };
    machine.guest("disk-a", "write -P 1 0 16M").await;
    back_up("full");
    for (at, lie) in ["off and on", "made anew", "emptied"].iter().enumerate() {
        let name = machine.ours().await.into_iter().find(|name| name.ends_with("disk-a")).unwrap();
        let bitmap = qmp::block::BitmapRef { node: "a".into(), name };
        let side = &machine.side;
        if *lie == "off and on" {
            side.bitmap_disable(&bitmap).await.unwrap();
        }
        machine.guest("disk-a", &format!("write -P {} {at}M 64k", 4 + at)).await;
        match *lie {
            "off and on" => side.bitmap_enable(&bitmap).await.unwrap(),
            "made anew" => {
                side.bitmap_remove(&bitmap).await.unwrap();
                side.bitmap_add(&bitmap, &qmp::block::NewBitmap::default()).await.unwrap();
            }
            _ => {
                let of = serde_json::json!({ "node": bitmap.node, "name": bitmap.name });
                side.execute_raw("block-dirty-bitmap-clear", of).await.unwrap();
            }
        }
        machine.guest("disk-a", "write -P 9 9M 64k").await;
        let oracle = machine.oracle().await;
        let (point, disks) = back_up("incremental");
        assert_eq!(disks[0]["read"]["reason"], "bitmap-distrusted", "{lie}: {disks}");
        assert_eq!(disks[1]["read"]["mode"], "incremental", "{lie}: {disks}");
        let to = env.path(&point);
        env.vmbackup(&["restore", &point, "--to", to.to_str().unwrap()]).ok();
        assert!(std::fs::read(to.join("disk-a.raw")).unwrap() == oracle[0], "{lie}");
    }
    let (_, disks) = back_up("incremental");
    assert_eq!(disks[0]["read"]["mode"], "incremental", "{disks}");
}
