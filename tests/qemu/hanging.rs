//! Scratch that hangs: with `--guest-first` the guest's write completes, and the backup gives up in
//! bounded time and leaves QEMU, which would hang with it, alone until scratch answers. Jobs are
//! ended although it hangs for a while, and at once where it is full.

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::journal::{Journals, Mode, Moment, Phase};
use vmbackup::platform::qemu::{Qemu, QemuOptions};
use vmbackup::platform::{Asked, Platform, RecoverRequest, SnapshotRequest};

use crate::disturbed::agent;
use crate::machine::{Guest, Machine};
use crate::reading::{Points, open};
use crate::support::{HangingDisk, SlowWrites, TestEnv};

/// How many backups have a directory in it.
fn runs(disk: &HangingDisk) -> usize {
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    disk.files().iter().filter(|path| name(path).starts_with("vmb-")).count()
}

/// Asks for a point whose scratch is on a file system that may hang.
fn scratch_that_hangs(machine: &mut Machine) -> (HangingDisk, SnapshotRequest) {
    let disk = HangingDisk::mount(&machine.path("."));
    let point = machine.next_point();
    let request = Points::default().request(machine, point);
    let request = SnapshotRequest { scratch_dir: Some(disk.path.clone()), ..request };
    (disk, request)
}

#[tokio::test]
async fn scratch_that_hangs_holds_up_neither_the_guest_nor_the_backup_and_is_undone_later() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::with(Guest::Idle).await;
    let mut disk = HangingDisk::mount(&machine.path("."));
    let (monitor, scratch) = (machine.path("qmp.sock"), disk.path.clone());
    let (monitor, scratch) = (monitor.to_str().unwrap(), scratch.to_str().unwrap());
    let args = ["full", "--qmp", monitor, "--scratch-dir", scratch, "--guest-first"];
    let backup = env.stopped_at("after:export", &args);
    disk.freeze();
    let begun = Instant::now();
    // QEMU's cbw-timeout is 4 s.
    machine.guest("disk-a", "write -P 2 1M 1M").await;
    let waited = begun.elapsed();
    assert!((3..60).contains(&waited.as_secs()), "{waited:?}");
    backup.signal("CONT");
    let outcome = backup.wait();
    assert!(begun.elapsed() < Duration::from_secs(80), "it gives up: {:?}", begun.elapsed());
    assert!(outcome.code.is_some_and(|code| code > 0), "{outcome:?}");
    assert!(outcome.stderr.contains("does not answer"), "{outcome:?}");
    // QEMU answers and the guest works.
    let begun = Instant::now();
    machine.guest("disk-a", "write -P 3 2M 1M").await;
    assert!(machine.runs().await && machine.tops().await[0].starts_with("vmb-cbw-"));
    let recover = env.vmbackup(&["recover"]);
    assert!(recover.code.is_some_and(|code| code > 0), "{recover:?}");
    machine.guest("disk-a", "write -P 4 3M 1M").await;
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert_eq!(runs(&disk), 1);
    disk.answer();
    let said = env.vmbackup(&["recover"]).ok().stdout;
    assert!(said.contains("undone: filter"), "{said}");
    assert_eq!((runs(&disk), machine.tops().await), (0, vec!["a".into(), "b".into()]));
    assert!(machine.reads("disk-a", "read -P 4 3M 1M").await && machine.runs().await);
    machine.holds_only(&[]).await;
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

#[tokio::test]
async fn scratch_that_does_not_answer_for_a_while_is_waited_for_at_the_end_of_a_backup() {
    let mut machine = Machine::with(Guest::Idle).await;
    let (mut disk, request) = scratch_that_hangs(&mut machine);
    let platform = machine.platform().await;
    let snapshot = open(&platform, &request).await;
    disk.freeze();
    let (committed, asked) = tokio::join!(snapshot.commit(), async {
        // More than the first question takes.
        tokio::time::sleep(Duration::from_secs(14)).await;
        let asked = disk.asked();
        disk.answer();
        asked
    });
    committed.unwrap();
    assert_eq!(asked, 1, "those that hang do not pile up");
    assert_eq!((disk.asked(), runs(&disk)), (0, 0));
    machine.holds_only(&[request.point]).await;
}

/// Found in review: the end was tried for more than a minute, of what had not begun.
#[tokio::test]
async fn an_open_that_fails_before_its_instant_does_not_wait_for_scratch_that_hangs() {
    let mut machine = Machine::with(Guest::Idle).await;
    let (disk, request) = scratch_that_hangs(&mut machine);
    let disk = Arc::new(Mutex::new(disk));
    let (control, hangs) = (Control::new(), Arc::clone(&disk));
    let stops = control.clone();
    let probe = move |phase, moment| {
        if (phase, moment) == (Phase::Socket, Moment::After) {
            hangs.lock().unwrap().freeze();
            stops.cancel();
        }
    };
    let journals = Journals::new(machine.path("journal"), Some(Arc::new(probe)));
    let options = QemuOptions { journals, ..machine.options("qmp.sock") };
    let platform = Qemu::connect(options).await.unwrap();
    let begun = Instant::now();
    let error = platform.open_snapshot(&request, &control).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Cancelled, "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    let told = control.notices_from(0);
    assert!(told.iter().any(|told| told.text.contains("does not answer")), "{told:?}");
    disk.lock().unwrap().answer();
    drop(platform);
    let platform = machine.platform().await;
    open(&platform, &request).await.abort().await.unwrap();
    assert_eq!(runs(&disk.lock().unwrap()), 0);
    machine.holds_only(&[]).await;
}

/// The guest's next write fails where its old content finds no room.
#[tokio::test]
async fn jobs_whose_scratch_is_full_end_at_once_although_it_takes_no_writes() {
    let mut machine = Machine::with(Guest::Idle).await;
    let (mut disk, request) = scratch_that_hangs(&mut machine);
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &request).await;
    // No await: it is not seen to be full before it is frozen.
    let mut filler = std::fs::File::create_new(disk.path.join("theirs")).unwrap();
    while filler.write_all(&vec![1; 1 << 20]).is_ok() {}
    disk.freeze();
    let begun = Instant::now();
    while machine.side.query_jobs().await.unwrap().iter().any(|job| job.status == "running") {
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    machine.guest("disk-a", "write -P 2 0 1M").await;
    disk.answer();
    let error = snapshot.still_valid().await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    snapshot.abort().await.unwrap();
    assert_eq!(runs(&disk), 0);
    machine.holds_only(&[]).await;
}

/// Does `work`, which takes the slow disk more than two seconds; how long QEMU takes to answer meanwhile, at most.
async fn longest_answer_beside(machine: &Machine, work: impl Future<Output = ()>) -> Duration {
    let (begun, ended) = (Instant::now(), AtomicBool::new(false));
    let work = async {
        work.await;
        ended.store(true, Ordering::SeqCst);
    };
    let ((), longest) = tokio::join!(work, async {
        let mut longest = Duration::ZERO;
        while !ended.load(Ordering::SeqCst) {
            let asked = Instant::now();
            assert!(machine.runs().await);
            longest = longest.max(asked.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        longest
    });
    // At 8 MiB a second.
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(2), "the disk was not slow: {took:?}");
    longest
}

/// QEMU writes a node back before it closes it, and answers nobody meanwhile.
#[tokio::test]
async fn what_went_to_scratch_is_on_disk_before_qemu_and_its_guest_would_wait_for_it() {
    let mut machine = Machine::filled(Guest::Idle, 64).await;
    let slow = SlowWrites::mount(&machine.path("."));
    let killed = machine.next_point();
    let scratch_dir = Some(slow.path.clone());
    let request = Points::default().request(&machine, killed);
    let request = SnapshotRequest { scratch_dir: scratch_dir.clone(), ..request };
    let platform = machine.platform().await;
    // As a run that is killed leaves it.
    drop(open(&platform, &request).await);
    machine.guest("disk-a", "write -P 2 0 32M").await;
    let (repository, mode) = (Asked::Yes, Mode::Undo);
    let recover = RecoverRequest { snapshot: request, repository, mode };
    let (control, begun) = (Control::new(), Instant::now());
    let (stopped, ()) = tokio::join!(platform.recover(&recover, &control), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        control.cancel();
    });
    assert_eq!(stopped.unwrap_err().kind(), Kind::Cancelled);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let longest = longest_answer_beside(&machine, async {
        let items = platform.recover(&recover, &Control::new()).await.unwrap();
        assert!(items.iter().any(|item| item.what.starts_with("job ")), "{items:?}");
    });
    let longest = longest.await;
    assert!(longest < Duration::from_secs(1), "QEMU waited for {longest:?} after a killed run");
    machine.holds_only(&[]).await;

    let point = machine.next_point();
    let request = Points::default().request(&machine, point);
    let request = SnapshotRequest { scratch_dir, ..request };
    let snapshot = open(&platform, &request).await;
    machine.guest("disk-a", "write -P 3 24M 24M").await;
    let longest = longest_answer_beside(&machine, async { snapshot.commit().await.unwrap() }).await;
    assert!(longest < Duration::from_secs(1), "QEMU waited for {longest:?}");
    machine.holds_only(&[point]).await;
}

/// It waited for the disk, with its lock, and so did who waited for its exit code.
#[tokio::test]
async fn a_recovery_that_is_stopped_ends_although_the_disk_of_scratch_is_busy() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::filled(Guest::Idle, 64).await;
    let slow = SlowWrites::mount(&machine.path("."));
    let (monitor, socket) = (machine.path("qmp.sock"), machine.path("agent.sock"));
    agent(&socket, Arc::new(AtomicBool::new(true)));
    let [monitor, scratch, socket] = [&monitor, &slow.path, &socket].map(|p| p.to_str().unwrap());
    let args = ["full", "--qmp", monitor, "--agent", socket, "--scratch-dir", scratch];
    let backup = env.stopped_at("after:job", &args);
    machine.guest("disk-a", "write -P 2 0 32M").await;
    backup.signal("KILL");
    backup.wait();
    let recover = env.spawn_vmbackup(&["recover"]);
    // It is written back by now.
    tokio::time::sleep(Duration::from_millis(700)).await;
    let begun = Instant::now();
    recover.signal("INT");
    let stopped = recover.wait();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}: {stopped:?}", begun.elapsed());
    assert_eq!(stopped.code, Some(130), "{stopped:?}");
    assert!(stopped.stderr.contains("thawed"), "what it did is told: {stopped:?}");
    assert!(stopped.stderr.contains("left by an earlier run: job "), "{stopped:?}");
    let said = env.vmbackup(&["recover"]).ok().stdout;
    // Who has frozen it since would be somebody else.
    assert!(said.contains("undone: job") && !said.contains("thawed"), "{said}");
    machine.holds_only(&[]).await;
}
