//! Forgetting points and freeing their space while backups run.

use crate::rig::{prove, take, take_held};
use crate::support::{DiskFormat, Domain, DomainSpec, TestEnv};

/// The backup has found the data of the second point stored, and relies on it.
#[test]
fn forget_and_gc_beside_a_running_backup_cost_no_point() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 32");
    let first = take(&env, &domain, &mut guest, &["full"]);
    // Past what the guest keeps writing to: of the second point's alone, and then of the third's.
    guest.run("fill vda 0 32; fill vda 60 4");
    let second = take(&env, &domain, &mut guest, &["incremental"]);
    let third = take_held(&env, &domain, &mut guest, &["full"], || {
        env.vmbackup(&["forget", &second.id]).ok();
        for _ in 0..3 {
            let report = env.vmbackup(&["gc", "--json"]).json();
            let waits = report["waiting_for"].as_array().is_some_and(|runs| !runs.is_empty());
            assert!(waits, "{report}");
        }
    });
    let bytes = |what: &str| third.report["disks"][0][what].as_u64().expect("a number");
    assert!(bytes("stored_bytes") + (4 << 20) <= bytes("read_bytes"), "{}", third.report);
    env.vmbackup(&["gc"]).ok();
    prove(&env, &first);
    prove(&env, &third);
    env.vmbackup(&["show", &second.id]).fails();
    for taken in [&first, &third] {
        env.vmbackup(&["verify", &taken.id]).ok();
    }
}
