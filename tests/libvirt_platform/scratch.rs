//! Scratch that runs short, and a watch that loses sight: the guest comes first.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vmbackup::control::Control;
use vmbackup::error::{Error, Kind};
use vmbackup::journal::{Moment, Phase};
use vmbackup::platform::libvirt::Libvirt;
use vmbackup::platform::{Platform, Quiesce, VmSnapshot};

use crate::bare::{Bare, known, point, qcow2, request, take};
use crate::proxy::Proxy;
use crate::quiesce::options;
use crate::support::{DiskFormat, Domain, DomainSpec, Outcome, SmallDisk, TestEnv, wait_until};

/// Waits until the snapshot says that it was lost.
async fn loss(snapshot: &mut dyn VmSnapshot) -> Error {
    for _ in 0..100 {
        if let Err(error) = snapshot.still_valid().await {
            return error;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the snapshot was not given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_fills_scratch_writes_on_and_the_backup_is_given_up() {
    let env = TestEnv::new();
    // Before the domain starts: its QEMU lives in a mount namespace of its own.
    let small = SmallDisk::mount(&env.path("."), "48M");
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("dd if=/dev/zero of=/dev/vda bs=1M count=64 conv=notrunc,fsync 2>/dev/null");
    let platform = Libvirt::open(options(&env, &domain)).await.expect("connects");
    let mut wanted = request(1);
    wanted.quiesce = Quiesce::Never;
    wanted.scratch_dir = Some(small.path.clone());
    let mut snapshot = platform.open_snapshot(&wanted, &Control::new()).await.expect("opens");
    assert_eq!(small.files().len(), 1);
    // Nobody reads; the guest overwrites more than fits. Fails if one of its writes fails.
    guest.run("dd if=/dev/zero of=/dev/vda bs=1M count=64 conv=notrunc,fsync 2>/dev/null");
    let error = loss(&mut *snapshot).await;
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    assert!(error.to_string().contains("the guest comes first"), "{error}");
    // One that is faster than the job ends stands still meanwhile, and libvirt learns that it runs on a
    // moment later than the guest.
    wait_until("the guest runs without a job", 30, || {
        domain.state() == "running" && !domain.has_backup_job()
    });
    snapshot.abort().await.expect("aborts");
    assert_eq!(small.files(), Vec::<PathBuf>::new());
    assert_eq!(domain.checkpoints(), Vec::<String>::new());
    guest.run("rnd vda 100 100");
}

/// With nobody to end the job in time the guest stands still; its writes are not lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_a_killed_run_left_without_scratch_runs_on_with_the_next() {
    let env = TestEnv::new();
    let small = SmallDisk::mount(&env.path("."), "48M");
    let (domain, mut guest) = Domain::boot(&env, &DomainSpec::with_disks(&[DiskFormat::Qcow2]));
    guest.run("dd if=/dev/zero of=/dev/vda bs=1M count=64 conv=notrunc,fsync 2>/dev/null");
    let platform = Libvirt::open(options(&env, &domain)).await.expect("connects");
    let mut wanted = request(1);
    wanted.quiesce = Quiesce::Never;
    wanted.scratch_dir = Some(small.path.clone());
    // Dropped, nobody watches; the job goes on.
    drop(platform.open_snapshot(&wanted, &Control::new()).await.expect("opens"));
    let write = "tr '\\000' '\\377' </dev/zero | head -c 67108864 | \
                 dd of=/dev/vda bs=64k conv=notrunc,fsync 2>/dev/null";
    let written = guest.start(write);
    wait_until("the guest stands still", 60, || domain.state() == "paused");
    wanted.point = point(2);
    wanted.scratch_dir = None;
    let next = platform.open_snapshot(&wanted, &Control::new()).await.expect("opens");
    guest.finish(written, write);
    assert_eq!(small.files(), Vec::<PathBuf>::new());
    next.abort().await.expect("aborts");
    domain.suspend();
    let disk = std::fs::read(domain.oracle(0, "after")).expect("own file");
    assert!(disk.iter().all(|byte| *byte == 0xff), "every write arrived");
}

#[tokio::test(flavor = "multi_thread")]
async fn scratch_that_cannot_be_looked_at_gives_the_backup_up() {
    let env = TestEnv::new();
    let scratch = env.path("scratch");
    std::fs::create_dir(&scratch).expect("own directory");
    Outcome::of(env.command("chmod").arg("777").arg(&scratch)).ok();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let mut wanted = request(1);
    wanted.scratch_dir = Some(scratch.clone());
    let platform = bare.platform().await;
    let mut snapshot = platform.open_snapshot(&wanted, &Control::new()).await.expect("opens");
    std::fs::rename(&scratch, env.path("moved")).expect("own directory");
    let error = loss(&mut *snapshot).await;
    let text = format!("{error:?}");
    assert!(text.contains("space for scratch is not known"), "{text}");
    snapshot.abort().await.expect("aborts");
    assert_eq!(bare.bitmaps(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_is_replaced_and_the_point_is_whole() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    bare.io(0, "write -P 1 0 8M");
    let proxy = Proxy::start(&env);
    let mut snapshot = proxy.snapshot(&bare).await;
    proxy.cut();
    bare.io(0, "write -P 2 0 8M");
    let taken = take(&mut *snapshot).await;
    assert!(taken[0].bytes.iter().all(|byte| *byte == 1));
    snapshot.still_valid().await.expect("the job is still there");
    drop(known(point(1), &*snapshot));
    snapshot.commit().await.expect("commits");
    assert_eq!(bare.bitmaps(), [bare.checkpoint(point(1))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_ends_while_the_connection_is_cut_is_noticed() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let proxy = Proxy::start(&env);
    let mut snapshot = proxy.snapshot(&bare).await;
    proxy.cut();
    bare.virsh(&["domjobabort", &bare.name]).ok();
    assert_eq!(loss(&mut *snapshot).await.kind(), Kind::SnapshotLost);
    snapshot.abort().await.expect("aborts");
    assert_eq!(bare.bitmaps(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_away_for_seconds_costs_no_backup() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let proxy = Proxy::start(&env);
    let mut snapshot = proxy.snapshot(&bare).await;
    proxy.stop_for(Duration::from_secs(3));
    snapshot.still_valid().await.expect("the job is still there");
    proxy.stop_for(Duration::from_secs(3));
    snapshot.commit().await.expect("commits");
    assert!(!bare.has_backup_job());
}

/// The daemon goes away for some seconds just when it has begun the job.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_ends_when_the_job_has_begun_costs_no_backup() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let proxy = Proxy::start(&env);
    let cut = proxy.clone();
    let begun = move || cut.stop_for(Duration::from_secs(4));
    let platform = proxy.at(&bare, (Phase::Job, Moment::After), begun).await;
    let opened = platform.open_snapshot(&request(1), &Control::new()).await;
    let mut snapshot = opened.expect("it is connected anew");
    snapshot.still_valid().await.expect("still valid");
    snapshot.abort().await.expect("aborts");
    assert!(!bare.has_backup_job());
    assert_eq!(bare.bitmaps(), Vec::<String>::new());
    assert_eq!(std::fs::read_dir(env.path("state/journal")).expect("there").count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_could_not_be_ended_stays_on_record_and_is_ended_by_the_next_run() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let proxy = Proxy::start(&env);
    let snapshot = proxy.snapshot(&bare).await;
    let known = known(point(1), &*snapshot);
    proxy.stop();
    snapshot.commit().await.expect_err("nobody could end the job");
    assert!(bare.has_backup_job());

    let platform = bare.platform().await;
    let mut wanted = request(2);
    wanted.point_ids = [point(1)].into();
    wanted.known_points = vec![known];
    let next = platform.open_snapshot(&wanted, &Control::new()).await.expect("ends what is ours");
    next.commit().await.expect("commits");
    assert!(!bare.has_backup_job());
}

/// What is to be told of a job that runs on was only logged, where nobody looks.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_a_failed_open_could_not_end_is_told_of_with_its_scratch_and_the_next_step() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let proxy = Proxy::start(&env);
    let cut = proxy.clone();
    let platform = proxy.at(&bare, (Phase::Job, Moment::After), move || cut.stop()).await;
    let control = Control::new();
    let opened = platform.open_snapshot(&request(1), &control).await;
    opened.err().expect("the connection is gone");
    assert!(bare.has_backup_job());
    let told: Vec<String> = control.notices_from(0).into_iter().map(|told| told.text).collect();
    let words = [&*bare.name, "the guest's writes still go", "/var/lib/libvirt/qemu", "recover'"];
    let whole = |text: &String| words.iter().all(|word| text.contains(word));
    assert!(told.iter().any(whole), "{told:?}");

    let next = bare.platform().await.open_snapshot(&request(2), &Control::new()).await;
    next.expect("the job of the first is not in the way").abort().await.expect("aborts");
    assert!(!bare.has_backup_job());
}

/// The room was not looked at while libvirt was asked for anything.
#[tokio::test(flavor = "multi_thread")]
async fn scratch_is_watched_although_libvirt_is_slow_to_answer() {
    let env = TestEnv::new();
    let small = SmallDisk::mount(&env.path("."), "16M");
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let proxy = Proxy::start(&env);
    let (slow, theirs) = (proxy.clone(), small.path.join("theirs"));
    // From the moment the job runs the daemon is slow, and scratch is full for a while.
    let begun = move || {
        slow.holds.store(true, Ordering::SeqCst);
        let (holds, theirs) = (Arc::clone(&slow.holds), theirs.clone());
        std::thread::spawn(move || {
            std::fs::write(&theirs, vec![1; 15 << 20 | 1]).expect("there is room");
            std::thread::sleep(Duration::from_secs(8));
            std::fs::remove_file(&theirs).expect("own file");
            holds.store(false, Ordering::SeqCst);
        });
    };
    let platform = proxy.at(&bare, (Phase::Job, Moment::After), begun).await;
    let mut wanted = request(1);
    wanted.scratch_dir = Some(small.path.clone());
    let error = match platform.open_snapshot(&wanted, &Control::new()).await {
        Err(error) => error,
        Ok(mut snapshot) => {
            let lost = snapshot.still_valid().await;
            snapshot.abort().await.expect("aborts");
            lost.expect_err("somebody saw that it was full")
        }
    };
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    assert!(!bare.has_backup_job());
    assert!(small.files().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn scratch_that_qemu_may_not_write_to_names_the_user_and_the_path() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let scratch = env.path("locked");
    std::fs::create_dir(&scratch).expect("own directory");
    env.run("chmod", &["700", scratch.to_str().expect("text")]).ok();
    let mut wanted = request(1);
    wanted.scratch_dir = Some(scratch.clone());
    let error = bare.platform().await.open_snapshot(&wanted, &Control::new()).await.err();
    let error = error.expect("the directory is root's");
    assert_eq!(error.kind(), Kind::Permission, "{error:?}");
    let hint = error.hint_text().expect("a next step");
    let user = env.run("stat", &["-c", "%U", "/var/lib/libvirt/qemu"]).text();
    let chown = format!("chown {} {}", user.trim(), scratch.display());
    assert!(hint.contains(&chown) && hint.contains("AppArmor"), "{hint}");
    assert_eq!((bare.bitmaps(), bare.sockets()), (Vec::new(), Vec::new()));
}
