//! The call that begins a job, which reaches libvirt when nobody waits for it any more.

use std::path::PathBuf;

use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::journal::{Moment, Phase};
use vmbackup::platform::Platform;

use crate::bare::{Bare, backup, point, qcow2, recover, request};
use crate::proxy::Proxy;
use crate::support::{TestEnv, wait_until};

/// What the job of a point has outside of QEMU.
fn files(bare: &Bare<'_>, id: u8) -> Vec<PathBuf> {
    let directory = std::fs::read_dir("/var/lib/libvirt/qemu").expect("libvirt's own");
    let paths = directory.map(|entry| entry.expect("readable").path());
    let of_point = point(id).to_string();
    paths.filter(|path| path.to_string_lossy().contains(&of_point)).chain(bare.sockets()).collect()
}

/// The run is cut off while its call is on its way. The call arrives when the run is over.
async fn begins_too_late(bare: &Bare<'_>, proxy: &Proxy, id: u8) {
    let had = bare.bitmaps();
    let cut = proxy.clone();
    let before = move || {
        cut.hold_next_call();
        let cut = cut.clone();
        std::thread::spawn(move || {
            wait_until("the call", 20, || cut.has_call());
            cut.cut_callers();
        });
    };
    let platform = proxy.at(bare, (Phase::Job, Moment::Before), before).await;
    let opened = platform.open_snapshot(&request(id), &Control::new()).await;
    assert_eq!(opened.err().expect("it is cut off").kind(), Kind::Connection);
    // Nothing is there to undo, but for the record.
    recover(bare, request(9)).await;
    assert!(!bare.has_backup_job());
    assert_eq!((bare.bitmaps(), files(bare, id), bare.journals()), (had, Vec::new(), 1));
    proxy.call_arrives();
    wait_until("the job", 20, || bare.has_backup_job());
    assert_eq!(files(bare, id).len(), 2);
    assert!(bare.bitmaps().contains(&bare.checkpoint(point(id))));
}

/// Nobody would have known whose it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_begins_when_its_run_is_over_is_ended_by_the_next_command() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let proxy = Proxy::start(&env);
    begins_too_late(&bare, &proxy, 1).await;
    let undone = recover(&bare, request(9)).await;
    assert!(undone.contains("backup job of domain"), "{undone}");
    assert!(!bare.has_backup_job());
    assert_eq!((bare.checkpoints(), bare.bitmaps()), (Vec::new(), Vec::new()));
    assert_eq!((files(&bare, 1), bare.journals()), (Vec::new(), 0));

    begins_too_late(&bare, &proxy, 2).await;
    backup(&bare, &request(3)).await.expect("the late job is not in the way");
    assert!(!bare.has_backup_job());
    assert_eq!((bare.checkpoints(), bare.bitmaps()), (Vec::new(), vec![bare.checkpoint(point(3))]));
    assert_eq!((files(&bare, 2), bare.journals()), (Vec::new(), 0));
}

/// The run waits for a minute, and lives on for some time after that.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_begins_when_it_is_not_waited_for_any_more_ends_at_once() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let proxy = Proxy::start(&env);
    let hold = proxy.clone();
    let before = move || hold.hold_next_call();
    let platform = proxy.at(&bare, (Phase::Job, Moment::Before), before).await;
    let error = platform.open_snapshot(&request(1), &Control::new()).await.err();
    let error = error.expect("it is not answered");
    assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
    assert!(!bare.has_backup_job());
    assert_eq!((bare.bitmaps(), bare.journals()), (Vec::new(), 1));
    proxy.call_arrives();
    wait_until("it begins and ends", 20, || {
        let told = bare.virsh(&["domjobinfo", "--completed", "--keep-completed", &bare.name]);
        told.stdout.contains("Backup") && !bare.has_backup_job()
    });
    wait_until("its bitmap goes", 20, || bare.bitmaps().is_empty());
    assert_eq!((bare.checkpoints(), bare.journals()), (Vec::new(), 1));
    backup(&bare, &request(2)).await.expect("nothing is in the way");
    assert_eq!((bare.checkpoints(), bare.bitmaps()), (Vec::new(), vec![bare.checkpoint(point(2))]));
    assert_eq!((files(&bare, 1), bare.journals()), (Vec::new(), 0));
}
