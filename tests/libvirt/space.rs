//! Forgetting points and freeing their space while backups run.

use crate::rig::{prove, take};
use crate::support::{DiskFormat, Domain, DomainSpec, TestEnv};

#[test]
fn forget_and_gc_beside_a_running_backup_cost_no_point() {
    let env = TestEnv::new();
    env.init_repo();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("fill vda 0 32");
    let first = take(&env, &domain, &mut guest, &["full"]);
    guest.run("fill vda 0 32");
    let second = take(&env, &domain, &mut guest, &["incremental"]);
    let third = std::thread::scope(|scope| {
        let tidy = scope.spawn(|| {
            env.vmbackup(&["forget", &first.id]).ok();
            for _ in 0..3 {
                env.vmbackup(&["gc"]).ok();
            }
        });
        let third = take(&env, &domain, &mut guest, &["full"]);
        tidy.join().expect("forget and gc");
        third
    });
    env.vmbackup(&["gc"]).ok();
    prove(&env, &second);
    prove(&env, &third);
    env.vmbackup(&["show", &first.id]).fails();
    for taken in [&second, &third] {
        env.vmbackup(&["verify", &taken.id]).ok();
    }
}
