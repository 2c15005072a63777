//! Freezing a real guest: it thaws in time, whatever happens.

use std::time::Duration;

use vmbackup::control::Control;
use vmbackup::journal::{Entry, Journals, Phase, Place, Run};
use vmbackup::platform::libvirt::{CheckpointMetadata, Libvirt, LibvirtOptions};
use vmbackup::platform::{Platform, Quiesce};
use vmbackup::vm::Consistency;

use crate::bare::{REPOSITORY, point, request};
use crate::support::{DiskFormat, Domain, DomainSpec, TestEnv};

fn journals(env: &TestEnv) -> Journals {
    Journals::new(env.path("state/journal"), None)
}

pub(crate) fn options(env: &TestEnv, domain: &Domain<'_>) -> LibvirtOptions {
    LibvirtOptions {
        uri: None,
        domain: domain.name().to_owned(),
        runtime_dir: env.path("run"),
        journals: journals(env),
        metadata: CheckpointMetadata::Remove,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guest_is_thawed_whatever_the_budget_and_the_level_is_honest() {
    let env = TestEnv::new();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    domain.wait_for_agent();
    guest.run("mke2fs /dev/vda && mount /dev/vda /mnt && echo hello >/mnt/file");
    let platform = Libvirt::open(options(&env, &domain)).await.expect("connects");
    let mut budget = Duration::from_millis(1);
    for id in 1..6 {
        let mut wanted = request(id);
        wanted.quiesce = Quiesce::Auto;
        wanted.freeze_budget = budget;
        // A thread and a process take turns.
        wanted.guardian = (id % 2 == 1).then(|| env!("CARGO_BIN_EXE_vmbackup").into());
        let snapshot = platform.open_snapshot(&wanted, &Control::new()).await.expect("opens");
        let achieved = snapshot.quiescence().clone();
        // Answers only if nothing is frozen; an unthawed guest hangs the test into its deadline.
        guest.run("echo again >>/mnt/file && sync");
        match achieved.level {
            Consistency::Filesystem => {
                let frozen_ms = achieved.frozen_ms.expect("measured");
                assert!(u128::from(frozen_ms) <= budget.as_millis(), "{frozen_ms} over {budget:?}");
            }
            _ => assert!(achieved.reason.is_some(), "{achieved:?}"),
        }
        assert!(id > 1 || achieved.level == Consistency::Crash, "{achieved:?}");
        assert!(id < 5 || achieved.level == Consistency::Filesystem, "{achieved:?}");
        snapshot.abort().await.expect("aborts");
        budget *= 8;
        if id == 4 {
            budget = Duration::from_secs(10);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_a_killed_run_left_frozen_is_thawed_by_the_next() {
    let env = TestEnv::new();
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    domain.wait_for_agent();
    guest.run("mke2fs /dev/vda && mount /dev/vda /mnt");
    let platform = Libvirt::open(options(&env, &domain)).await.expect("connects");
    let uuid = platform.identify().await.expect("identified").uuid;
    // What a run that is killed between freeze and thaw leaves: its journal and a frozen guest.
    let mut journal = journals(&env).open(uuid).expect("none yet");
    let place = Place::Libvirt { uri: "qemu:///system".into() };
    journal.begin(Run::new(point(1), domain.name(), REPOSITORY, place));
    journal.note([Entry::of(Phase::Freeze)]).expect("own directory");
    domain.virsh(&["domfsfreeze", domain.name()]).ok();
    let mut wanted = request(2);
    wanted.quiesce = Quiesce::Never;
    let snapshot = platform.open_snapshot(&wanted, &Control::new()).await.expect("opens");
    guest.run("echo alive >/mnt/file && sync");
    snapshot.abort().await.expect("aborts");
}
