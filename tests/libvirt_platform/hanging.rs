//! Scratch that hangs: the guest goes on, and the job is ended when scratch answers, not before.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::journal::{Journals, Mode, Moment, Phase};
use vmbackup::platform::libvirt::{Libvirt, LibvirtOptions};
use vmbackup::platform::{Asked, Platform, Quiesce, RecoverRequest, SnapshotRequest};

use crate::bare::{Bare, qcow2, request, take};
use crate::proxy::Proxy;
use crate::quiesce::options;
use crate::support::{
    DiskFormat, Domain, DomainSpec, Guest, HangingDisk, Outcome, SlowWrites, TestEnv, wait_until,
};

/// Whether QEMU answers. One that waits for a disk answers nobody.
fn answers(env: &TestEnv, name: &str) -> bool {
    let mut virsh = env.command("timeout");
    virsh.args(["15", "virsh", "-c", "qemu:///system", "qemu-monitor-command", name]);
    let outcome = Outcome::of(virsh.arg(r#"{"execute":"query-status"}"#));
    outcome.stdout.contains("\"status\"")
}

/// A guest with a disk to back up and another one, and scratch that may hang.
fn booted<'env>(env: &'env TestEnv, disk: &HangingDisk) -> (Domain<'env>, Guest, SnapshotRequest) {
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Qcow2]);
    let (domain, mut guest) = Domain::boot(env, &spec);
    guest.run("fill vda 0 32");
    let mut wanted = request(1);
    wanted.quiesce = Quiesce::Never;
    wanted.scratch_dir = Some(disk.path.clone());
    wanted.exclude_disks = vec!["vdb".into()];
    (domain, guest, wanted)
}

/// Has the guest overwrite some of its first disk, which takes as long as scratch hangs.
fn overwrite(guest: &mut Guest) {
    guest.run("(rnd vda 8192 4096; echo $? >/tmp/written) >/dev/null 2>&1 &");
}

#[track_caller]
fn assert_goes_on(env: &TestEnv, domain: &Domain<'_>, guest: &mut Guest) {
    guest.run("rnd vdb 0 256");
    assert!(answers(env, domain.name()), "QEMU waits for scratch");
    assert_eq!(guest.run("cat /tmp/written 2>/dev/null || true"), "", "scratch does not hang");
}

/// The watch ended the job after ten seconds, and the whole guest stood still.
#[tokio::test(flavor = "multi_thread")]
async fn scratch_that_hangs_for_a_while_costs_neither_the_guest_nor_its_backup_anything() {
    let env = TestEnv::new();
    let mut disk = HangingDisk::mount(&env.path("."));
    let (domain, mut guest, wanted) = booted(&env, &disk);
    domain.suspend();
    let oracle = domain.oracle(0, "at");
    domain.resume();
    let platform = Libvirt::open(options(&env, &domain)).await.expect("connects");
    let mut snapshot = platform.open_snapshot(&wanted, &Control::new()).await.expect("opens");
    disk.stall();
    overwrite(&mut guest);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(18) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_goes_on(&env, &domain, &mut guest);
    }
    assert!(domain.has_backup_job());
    disk.answer();
    wait_until("the write", 30, || guest.run("cat /tmp/written 2>/dev/null || true") == "0");
    let taken = take(snapshot.as_mut()).await;
    snapshot.still_valid().await.expect("the job is still there");
    assert!(taken[0].bytes == std::fs::read(oracle).expect("own file"), "not as at the instant");
    snapshot.commit().await.expect("commits");
    assert!(!domain.has_backup_job() && disk.files().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn scratch_that_goes_on_hanging_ends_the_backup_and_not_the_job_until_it_answers() {
    let env = TestEnv::new();
    let mut disk = HangingDisk::mount(&env.path("."));
    let (domain, mut guest, wanted) = booted(&env, &disk);
    let platform = Libvirt::open(options(&env, &domain)).await.expect("connects");
    let mut snapshot = platform.open_snapshot(&wanted, &Control::new()).await.expect("opens");
    disk.stall();
    overwrite(&mut guest);
    let begun = Instant::now();
    let lost = loop {
        if let Err(error) = snapshot.still_valid().await {
            break error;
        }
        assert!(begun.elapsed() < Duration::from_secs(90), "it is not given up");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_goes_on(&env, &domain, &mut guest);
    };
    assert_eq!(lost.kind(), Kind::SnapshotLost, "{lost:?}");
    assert!(lost.in_one_line().contains("does not answer"), "{lost:?}");
    assert!(lost.hint_text().is_some_and(|hint| hint.contains("--scratch-dir")), "{lost:?}");
    let left = snapshot.abort().await.expect_err("nobody touches QEMU").in_one_line();
    assert!(begun.elapsed() < Duration::from_secs(110), "{:?}", begun.elapsed());
    for word in [domain.name(), disk.path.to_str().expect("text"), "'vmbackup recover'"] {
        assert!(left.contains(word), "{left}");
    }
    assert_goes_on(&env, &domain, &mut guest);

    // Nor does whoever comes next, as long as it hangs.
    let (repository, mode) = (Asked::Yes, Mode::Undo);
    let recover = RecoverRequest { snapshot: wanted, repository, mode };
    let stuck = platform.recover(&recover, &Control::new()).await.expect_err("it hangs yet");
    assert!(stuck.in_one_line().contains("does not answer"), "{stuck:?}");
    assert_goes_on(&env, &domain, &mut guest);
    assert!(domain.has_backup_job());
    disk.answer();
    platform.recover(&recover, &Control::new()).await.expect("recovers");
    wait_until("the write", 30, || guest.run("cat /tmp/written 2>/dev/null || true") == "0");
    assert!(!domain.has_backup_job() && disk.files().is_empty());
    assert_eq!(domain.checkpoints(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_backup_waits_for_scratch_that_takes_no_writes_for_a_while() {
    let env = TestEnv::new();
    let disk = HangingDisk::mount(&env.path("."));
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let mut wanted = request(1);
    wanted.scratch_dir = Some(disk.path.clone());
    let platform = bare.platform().await;
    let snapshot = platform.open_snapshot(&wanted, &Control::new()).await.expect("opens");
    let disk = Mutex::new(disk);
    disk.lock().expect("whole").freeze();
    let (committed, there) = tokio::join!(snapshot.commit(), async {
        // More than the first question takes.
        tokio::time::sleep(Duration::from_secs(14)).await;
        let there = answers(&env, &bare.name) && bare.has_backup_job();
        disk.lock().expect("whole").answer();
        there
    });
    assert!(there, "the job was told to end");
    committed.expect("commits");
    assert!(!bare.has_backup_job() && disk.lock().expect("whole").files().is_empty());
    assert_eq!(bare.bitmaps(), [bare.checkpoint(wanted.point)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_that_fails_while_scratch_hangs_leaves_the_job_alone_and_says_so() {
    let env = TestEnv::new();
    let mut disk = HangingDisk::mount(&env.path("."));
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let scratch = disk.path.clone();
    let hanging = Arc::new(Mutex::new(disk));
    let (journal, aside) = (env.path("journal"), env.path("aside"));
    let (there, away, hangs) = (journal.clone(), aside.clone(), Arc::clone(&hanging));
    // The job has begun; the run cannot go on without its journal.
    let probe = move |phase, moment| {
        if (phase, moment) == (Phase::Job, Moment::After) {
            hangs.lock().expect("whole").freeze();
            std::fs::rename(&there, &away).expect("own directory");
            std::fs::write(&there, "").expect("own file");
        }
    };
    let mut options = bare.options();
    options.journals = Journals::new(journal.clone(), Some(Arc::new(probe)));
    let mut wanted = request(1);
    wanted.scratch_dir = Some(scratch.clone());
    let (control, begun) = (Control::new(), Instant::now());
    let platform = Libvirt::open(options.clone()).await.expect("connects");
    let opened = platform.open_snapshot(&wanted, &control).await;
    opened.err().expect("there is no journal");
    assert!(begun.elapsed() < Duration::from_secs(110), "{:?}", begun.elapsed());
    let told: Vec<String> = control.notices_from(0).into_iter().map(|told| told.text).collect();
    let words = [&*bare.name, scratch.to_str().expect("text"), "'vmbackup recover'"];
    let whole = |text: &String| words.iter().all(|word| text.contains(word));
    assert!(told.iter().any(whole), "{told:?}");
    assert!(answers(&env, &bare.name) && bare.has_backup_job());

    options.journals = Journals::new(journal.clone(), None);
    drop(platform);
    disk = Arc::into_inner(hanging).expect("nobody else has it").into_inner().expect("whole");
    disk.answer();
    std::fs::remove_file(&journal).expect("own file");
    std::fs::rename(&aside, &journal).expect("own directory");
    let platform = Libvirt::open(options).await.expect("connects");
    wanted.point = request(2).point;
    let next = platform.open_snapshot(&wanted, &Control::new()).await;
    next.expect("the job of the first is not in the way").abort().await.expect("aborts");
    assert!(!bare.has_backup_job() && disk.files().is_empty());
}

/// It was asked on a thread that had other things to do, and for as long as it hung.
#[tokio::test(flavor = "multi_thread")]
async fn scratch_that_hangs_when_a_backup_begins_is_named_in_time() {
    let env = TestEnv::new();
    let mut disk = HangingDisk::mount(&env.path("."));
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let mut wanted = request(1);
    wanted.scratch_dir = Some(disk.path.clone());
    let platform = Arc::new(bare.platform().await);
    disk.stall();
    let (asked, request) = (Arc::clone(&platform), wanted.clone());
    let planned = tokio::spawn(async move { asked.plan(&request).await });
    let planned = tokio::time::timeout(Duration::from_secs(30), planned).await;
    let plan = planned.expect("in time").expect("no panic").expect("planned");
    let problem = plan.problems.iter().find(|problem| problem.what.contains("does not answer"));
    let problem = problem.expect("it is named");
    assert_eq!(problem.fatal, Some(Kind::Timeout));
    assert!(problem.fix.contains("--scratch-dir"), "{problem:?}");

    let control = Control::new();
    let (stops, asked, request) = (control.clone(), Arc::clone(&platform), wanted.clone());
    let stopped =
        tokio::spawn(async move { asked.open_snapshot(&request, &stops).await.map(drop) });
    tokio::time::sleep(Duration::from_secs(3)).await;
    control.cancel();
    let stopped = tokio::time::timeout(Duration::from_secs(5), stopped).await;
    let error = stopped.expect("at once").expect("no panic").expect_err("it is stopped");
    assert_eq!(error.kind(), Kind::Cancelled, "{error:?}");

    let opened =
        tokio::spawn(
            async move { platform.open_snapshot(&wanted, &Control::new()).await.map(drop) },
        );
    let opened = tokio::time::timeout(Duration::from_secs(55), opened).await;
    let error = opened.expect("in time").expect("no panic").expect_err("it hangs");
    assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
    assert!(error.to_string().contains(disk.path.to_str().expect("text")), "{error}");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("--scratch-dir")), "{error:?}");
    assert!(!bare.has_backup_job());
    disk.answer();
}

/// QEMU writes scratch back before it closes it, and frees it if nobody else has it open: the guest stood
/// still for as long as that takes.
#[tokio::test(flavor = "multi_thread")]
async fn the_guest_does_not_wait_for_what_went_to_scratch_when_its_job_ends() {
    let env = TestEnv::new();
    let slow = SlowWrites::mount(&env.path("."));
    let spec = DomainSpec::with_disks(&[DiskFormat::Qcow2, DiskFormat::Qcow2]);
    let (domain, mut guest) = Domain::boot(&env, &spec);
    guest.run("fill vda 0 32");
    let mut wanted = request(1);
    wanted.quiesce = Quiesce::Never;
    wanted.scratch_dir = Some(slow.path.clone());
    // A write that has to go to scratch waits for a disk that is busy.
    wanted.exclude_disks = vec!["vdb".into()];
    let platform = Libvirt::open(options(&env, &domain)).await.expect("connects");
    let snapshot = platform.open_snapshot(&wanted, &Control::new()).await.expect("opens");
    guest.run("fill vda 0 24");
    goes_on_beside(&mut guest, snapshot.commit()).await.expect("commits");
    assert!(!domain.has_backup_job());

    // Nor when it was killed, and somebody else ends it, whose connection does not live as long.
    let proxy = Proxy::start(&env);
    let through = LibvirtOptions { uri: Some(proxy.uri()), ..options(&env, &domain) };
    let platform = Libvirt::open(through).await.expect("connects");
    wanted.point = request(2).point;
    drop(platform.open_snapshot(&wanted, &Control::new()).await.expect("opens"));
    guest.run("fill vda 0 24");
    let (repository, mode) = (Asked::Yes, Mode::Undo);
    let recover = RecoverRequest { snapshot: wanted, repository, mode };
    let recover = async move {
        let cut = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            proxy.cut();
        };
        let control = Control::new();
        tokio::join!(platform.recover(&recover, &control), cut).0
    };
    goes_on_beside(&mut guest, recover).await.expect("recovers");
    assert!(!domain.has_backup_job());
}

/// Requires that the guest goes on while something waits for a disk of 8 MiB a second.
async fn goes_on_beside<T: Send + 'static>(
    guest: &mut Guest,
    waits: impl Future<Output = T> + Send + 'static,
) -> T {
    let begun = Instant::now();
    let waits = tokio::spawn(waits);
    let mut longest = Duration::ZERO;
    while !waits.is_finished() {
        let asked = Instant::now();
        guest.run("rnd vdb 0 8");
        longest = longest.max(asked.elapsed());
    }
    let done = waits.await.expect("no panic");
    assert!(begun.elapsed() > Duration::from_secs(2), "not slow: {:?}", begun.elapsed());
    assert!(longest < Duration::from_secs(1), "the guest waited for {longest:?}");
    done
}
