//! Running domains: full, incremental, and everything that goes wrong around them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmbackup::clock::{Clock, SystemClock};
use vmbackup::control::Control;
use vmbackup::error::Kind;
use vmbackup::platform::{BackupMode, KnownPoint, Platform, Quiesce};
use vmbackup::vm::{ArtifactKind, Consistency, FullReason, ReadMode};

use crate::bare::{Bare, Taken, backup, data_file, image, known, point, qcow2, request, take};
use crate::support::{Outcome, TestEnv, wait_until};

const MIB: u64 = 1 << 20;

fn full(reason: FullReason) -> ReadMode {
    ReadMode::Full { reason }
}

/// Writes, zeroes and requires that an incremental sees these two ranges; what it saw.
async fn next_sees_what_is_written(bare: &Bare<'_>, first: KnownPoint) -> Vec<Taken> {
    bare.io(0, "write -P 0xbb 2M 64k");
    bare.io(0, "write -z 3M 1M");
    let mut next = request(2);
    next.known_points = vec![first];
    next.mode = BackupMode::Incremental;
    let (_, taken) = backup(bare, &next).await.expect("a backup");
    assert_eq!(taken[0].read, ReadMode::Incremental { base: point(1) });
    assert_eq!(taken[0].changed, [(2 * MIB, 2 * MIB + 65536), (3 * MIB, 4 * MIB)]);
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_sees_exactly_what_was_written_since_its_base() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "16M"));
    bare.io(0, "write -P 0xaa 1M 4M");
    let (first, taken) = backup(&bare, &request(1)).await.unwrap();
    assert_eq!(taken[0].read, full(FullReason::FirstBackup));
    assert_eq!(taken[0].bytes[usize::try_from(MIB).unwrap()], 0xaa);

    let taken = next_sees_what_is_written(&bare, first).await;
    let at = |offset: u64| taken[0].bytes[usize::try_from(offset).unwrap()];
    assert_eq!((at(2 * MIB), at(3 * MIB), at(4 * MIB)), (0xbb, 0, 0xaa));
    // Nothing but the newest bitmap is left, and libvirt has no record of it.
    assert_eq!(bare.checkpoints(), Vec::<String>::new());
    assert_eq!(bare.bitmaps(), [bare.checkpoint(point(2))]);
}

/// How a raw disk is tracked under libvirt: the bitmaps are in a qcow2, the data is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_with_a_raw_data_file_is_read_incrementally() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &data_file(&env, "8M"));
    bare.io(0, "write -P 1 1M 4M");
    let (first, taken) = backup(&bare, &request(1)).await.unwrap();
    assert_eq!(taken[0].read, full(FullReason::FirstBackup));
    bare.io(0, "flush");
    assert!(taken[0].bytes == std::fs::read(env.path("vda.raw")).unwrap(), "it is the raw disk");

    let taken = next_sees_what_is_written(&bare, first).await;
    bare.io(0, "flush");
    assert!(taken[0].bytes == std::fs::read(env.path("vda.raw")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_export_stays_at_the_instant_while_the_guest_writes() {
    let env = TestEnv::new();
    let disks = qcow2(&env, 'a', "8M") + &image(&env, 'b', "raw", "4M");
    let bare = Bare::start(&env, &disks);
    bare.io(0, "write -P 1 0 8M");
    bare.io(1, "write -P 2 0 4M");
    let platform = bare.platform().await;
    let before = SystemClock.now();
    let mut snapshot = platform.open_snapshot(&request(1), &Control::new()).await.unwrap();
    assert!(before <= snapshot.taken() && snapshot.taken() < SystemClock.now());
    bare.io(0, "write -P 3 0 8M");
    bare.io(1, "write -z 0 4M");
    let taken = take(&mut *snapshot).await;
    assert!(taken[0].bytes.iter().all(|byte| *byte == 1));
    assert!(taken[1].bytes.iter().all(|byte| *byte == 2));
    assert_eq!(taken[1].read, full(FullReason::FormatWithoutBitmaps));
    assert_eq!(snapshot.quiescence().level, Consistency::Crash);
    let kinds: Vec<_> = snapshot.artifacts().iter().map(|a| a.kind).collect();
    assert_eq!(
        kinds,
        [ArtifactKind::DomainXmlLive, ArtifactKind::DomainXmlInactive, ArtifactKind::CheckpointXml]
    );
    snapshot.still_valid().await.unwrap();
    snapshot.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_run_leaves_the_base_and_nothing_else() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let (first, _) = backup(&bare, &request(1)).await.unwrap();
    bare.io(0, "write -P 7 1M 1M");
    let mut next = request(2);
    next.known_points = vec![first.clone()];
    let snapshot = bare.platform().await.open_snapshot(&next, &Control::new()).await.unwrap();
    snapshot.abort().await.unwrap();
    assert_eq!(bare.bitmaps(), [bare.checkpoint(point(1))]);
    assert_eq!(bare.checkpoints(), Vec::<String>::new());
    // The next run covers what the aborted one would have.
    let mut retry = request(3);
    retry.known_points = vec![first];
    let (_, taken) = backup(&bare, &retry).await.unwrap();
    assert_eq!(taken[0].changed, [(MIB, 2 * MIB)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_disk_without_its_bitmap_is_read_in_full_and_the_other_is_not() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &(qcow2(&env, 'a', "8M") + &qcow2(&env, 'b', "8M")));
    let (first, _) = backup(&bare, &request(1)).await.unwrap();
    // Somebody removes the bitmap of vdb behind everybody's back.
    let name = bare.checkpoint(point(1));
    bare.change_bitmap("block-dirty-bitmap-remove", "vdb.qcow2", &name);

    let mut next = request(2);
    next.known_points = vec![first];
    let plan = bare.platform().await.plan(&next).await.unwrap();
    let planned: Vec<_> = plan.disks.iter().map(|disk| disk.read.clone().unwrap()).collect();
    let (_, taken) = backup(&bare, &next).await.unwrap();
    let read: Vec<_> = taken.iter().map(|disk| disk.read.clone()).collect();
    let missing = full(FullReason::BitmapMissing);
    assert_eq!(read, [ReadMode::Incremental { base: point(1) }, missing]);
    assert_eq!(planned, read);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_repositories_keep_their_own_chains() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let (here, _) = backup(&bare, &request(1)).await.unwrap();
    let mut offsite = request(2);
    offsite.repository = "deadbeef".into();
    let (there, _) = backup(&bare, &offsite).await.unwrap();
    assert_eq!(bare.bitmaps().len(), 2);
    bare.io(0, "write -P 9 5M 64k");
    for (id, repository, base) in [(3, "00c0ffee", here), (4, "deadbeef", there)] {
        let mut next = request(id);
        next.repository = repository.into();
        next.mode = BackupMode::Incremental;
        next.known_points = vec![base];
        let (_, taken) = backup(&bare, &next).await.unwrap();
        assert_eq!(taken[0].changed, [(5 * MIB, 5 * MIB + 65536)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_without_a_base_is_refused_with_the_reason() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let mut wanted = request(1);
    wanted.mode = BackupMode::Incremental;
    let error = backup(&bare, &wanted).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoBase);
    assert!(error.to_string().contains("vda: first backup"), "{error}");
    assert_eq!(bare.bitmaps(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_ends_early_is_noticed_although_the_export_reads_on() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let platform = bare.platform().await;
    let mut snapshot = platform.open_snapshot(&request(1), &Control::new()).await.unwrap();
    take(&mut *snapshot).await;
    bare.virsh(&["domjobabort", &bare.name]).ok();
    assert_eq!(snapshot.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);
    snapshot.abort().await.unwrap();
    assert_eq!(bare.bitmaps(), Vec::<String>::new());
}

/// libvirt takes note of the end of a job when it comes round to it; QEMU lists the job until then
/// and serves live data. A check that trusted the list called a dead job alive on a busy machine.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_ended_is_noticed_before_libvirt_has_taken_note_of_it() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let platform = bare.platform().await;
    let busy = Busy::keep(&bare);
    for id in 1..=8 {
        let mut snapshot = platform.open_snapshot(&request(id), &Control::new()).await.unwrap();
        snapshot.still_valid().await.unwrap();
        bare.virsh(&["domjobabort", &bare.name]).ok();
        let error = snapshot.still_valid().await.unwrap_err();
        assert_eq!(error.kind(), Kind::SnapshotLost, "{error:?}");
        snapshot.abort().await.unwrap();
    }
    drop(busy);
    assert_eq!(bare.bitmaps(), Vec::<String>::new());
}

/// Keeps libvirt busy with a domain: whoever wants to note something about it waits for a turn.
struct Busy {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Busy {
    fn keep(bare: &Bare<'_>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..16).map(|_| {
            let (stop, name) = (Arc::clone(&stop), bare.name.clone());
            // One process that asks again and again: starting one each takes longer than the answer.
            let asks = format!("domblkinfo {name} vda; ").repeat(200);
            let mut command = bare.env.command("virsh");
            command.args(["-q", "-c", "qemu:///system", &asks]);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    Outcome::of(&mut command);
                }
            })
        });
        Self { threads: threads.collect(), stop }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().expect("ends"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_domain_ends_the_snapshot() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let platform = bare.platform().await;
    let mut snapshot = platform.open_snapshot(&request(1), &Control::new()).await.unwrap();
    bare.virsh(&["destroy", &bare.name]).ok();
    assert_eq!(snapshot.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);
    // Its checkpoint cannot be deleted while it is stopped; that it goes later is tested below.
    drop(snapshot.abort().await);
    assert_eq!(bare.checkpoints(), Vec::<String>::new());
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    let (_, taken) = backup(&bare, &request(2)).await.unwrap();
    assert_eq!(taken[0].read, full(FullReason::FirstBackup));
    assert_eq!(bare.bitmaps(), [bare.checkpoint(point(2))]);
}

/// A backup job as somebody else begins it.
fn begin_foreign_job(bare: &Bare<'_>) {
    let xml = bare.env.path("foreign.xml");
    // With a scratch file: libvirt 9.0 has no default name for it.
    let text = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/>\
         <disks><disk name='vda' type='file'><scratch file='{}'/></disk></disks></domainbackup>",
        bare.env.open_dir("foreign").join("nbd.sock").display(),
        bare.env.path("foreign-scratch.qcow2").display()
    );
    std::fs::write(&xml, text).expect("own directory");
    bare.virsh(&["backup-begin", &bare.name, &xml.to_string_lossy()]).ok();
}

/// Found in review: whatever the domain was doing by then was ended, a migration as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_somebody_else_in_the_place_of_ours_is_left_alone() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let platform = bare.platform().await;
    let mut snapshot = platform.open_snapshot(&request(1), &Control::new()).await.unwrap();
    bare.virsh(&["domjobabort", &bare.name]).ok();
    wait_until("the job is gone", 30, || !bare.has_backup_job());
    begin_foreign_job(&bare);
    assert_eq!(snapshot.still_valid().await.unwrap_err().kind(), Kind::SnapshotLost);
    // Its checkpoint may have to stay as long as that.
    let _ = snapshot.abort().await;
    assert!(bare.has_backup_job(), "somebody else's backup was ended");
    bare.virsh(&["domjobabort", &bare.name]).ok();
    wait_until("the job is gone", 30, || !bare.has_backup_job());
    backup(&bare, &request(2)).await.unwrap();
    assert_eq!(bare.bitmaps(), [bare.checkpoint(point(2))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_job_is_busy_and_a_killed_run_of_ours_is_cleared_away() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let platform = bare.platform().await;
    let snapshot = platform.open_snapshot(&request(1), &Control::new()).await.unwrap();
    assert_eq!(backup(&bare, &request(2)).await.unwrap_err().kind(), Kind::Busy);
    // As kill -9 would: the lock is released, everything else stays.
    drop(snapshot);
    assert_eq!(bare.sockets().len(), 1);
    let (_, taken) = backup(&bare, &request(3)).await.unwrap();
    assert_eq!(bare.sockets(), Vec::<PathBuf>::new());
    assert_eq!(taken[0].read, full(FullReason::FirstBackup));
    assert_eq!(bare.bitmaps(), [bare.checkpoint(point(3))]);

    begin_foreign_job(&bare);
    let error = backup(&bare, &request(4)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.hint_text().unwrap().contains("domjobabort"));
    // Nobody can ask for the bitmaps now: that is not "no bitmap".
    let plan = platform.plan(&request(5)).await.unwrap();
    let fatal: Vec<_> = plan.problems.iter().filter_map(|problem| problem.fatal).collect();
    assert_eq!((fatal, &plan.disks[0].read), (vec![Kind::Busy], &None));
    assert_eq!(bare.bitmaps().len(), 1);
    bare.virsh(&["domjobabort", &bare.name]).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn bitmaps_survive_a_restart_and_a_crash_is_a_reason() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let (first, _) = backup(&bare, &request(1)).await.unwrap();
    bare.io(0, "write -P 5 2M 64k");
    bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    let mut next = request(2);
    next.known_points = vec![first.clone()];
    let (second, taken) = backup(&bare, &next).await.unwrap();
    assert_eq!(taken[0].changed, [(2 * MIB, 2 * MIB + 65536)]);

    // A bitmap made since the start is only in memory; the next graceful stop writes it down.
    bare.virsh(&["destroy", "--graceful", &bare.name]).ok();
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    let pid = std::fs::read_to_string(format!("/run/libvirt/qemu/{}.pid", bare.name)).unwrap();
    env.run("kill", &["-9", pid.trim()]).ok();
    crate::support::wait_until("the domain to be gone", 20, || {
        bare.virsh(&["domstate", &bare.name]).stdout.contains("shut off")
    });
    bare.virsh(&["start", "--paused", &bare.name]).ok();
    let mut next = request(3);
    next.known_points = vec![second, first];
    let (_, taken) = backup(&bare, &next).await.unwrap();
    assert_eq!(taken[0].read, full(FullReason::BitmapInconsistent));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resized_disk_is_read_in_full() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let (first, _) = backup(&bare, &request(1)).await.unwrap();
    bare.virsh(&["blockresize", &bare.name, "vda", "12M"]).ok();
    let mut next = request(2);
    next.known_points = vec![first];
    let (known, taken) = backup(&bare, &next).await.unwrap();
    assert_eq!(taken[0].read, full(FullReason::Resized));
    assert_eq!((known.disks[0].name.as_str(), known.disks[0].size_bytes), ("vda", 12 * MIB));
    assert_eq!(taken[0].bytes.len(), 12 << 20);
    // And the other way.
    bare.virsh(&["blockresize", &bare.name, "vda", "4M"]).ok();
    bare.io(0, "write -P 1 3M 1M");
    let mut next = request(3);
    next.known_points = vec![known];
    let (known, taken) = backup(&bare, &next).await.unwrap();
    assert_eq!(taken[0].read, full(FullReason::Resized));
    assert_eq!((known.disks[0].size_bytes, taken[0].bytes.len()), (4 * MIB, 4 << 20));
    assert_eq!((taken[0].bytes[(3 << 20) - 1], taken[0].bytes[3 << 20]), (0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_domains_and_required_agents_fail_with_the_next_step() {
    let env = TestEnv::new();
    let bare = Bare::start(&env, &qcow2(&env, 'a', "8M"));
    let mut options = bare.options();
    options.domain = "no-such-domain".into();
    let error = vmbackup::platform::libvirt::Libvirt::open(options).await.err().unwrap();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.hint_text().unwrap().contains(&bare.name));
    let mut options = bare.options();
    options.domain = bare.uuid.to_string();
    let by_uuid = vmbackup::platform::libvirt::Libvirt::open(options).await.unwrap();
    assert_eq!(by_uuid.identify().await.unwrap().name, bare.name);
    let mut wanted = request(1);
    wanted.quiesce = Quiesce::Require;
    let error = backup(&bare, &wanted).await.unwrap_err();
    assert!(error.to_string().contains("paused"), "{error}");
    assert_eq!(bare.bitmaps(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_tells_what_the_backup_does_and_leaves_no_trace() {
    let env = TestEnv::new();
    let cdrom = "<disk type='file' device='cdrom'><target dev='hdc' bus='ide'/></disk>";
    let bare = Bare::start(&env, &(qcow2(&env, 'a', "8M") + cdrom));
    let platform = bare.platform().await;
    let (first, _) = backup(&bare, &request(1)).await.unwrap();
    bare.io(0, "write -P 5 2M 128k");
    let mut next = request(2);
    next.known_points = vec![first];
    let plan = platform.plan(&next).await.unwrap();
    assert!(plan.running);
    assert_eq!(plan.disks[0].read, Some(ReadMode::Incremental { base: point(1) }));
    assert_eq!(plan.disks[0].expected_bytes, Some(128 << 10));
    assert_eq!(plan.excluded[0].name, "hdc");
    assert_eq!(plan.scratch.as_ref().unwrap().bytes_max, 8 * MIB);
    assert!(plan.problems.iter().all(|problem| problem.fatal.is_none()), "{:?}", plan.problems);
    assert_eq!(bare.checkpoints(), Vec::<String>::new());
    let snapshot = platform.open_snapshot(&next, &Control::new()).await.unwrap();
    let busy = platform.plan(&next).await.unwrap();
    let fatal: Vec<_> = busy.problems.iter().filter_map(|problem| problem.fatal).collect();
    assert_eq!((fatal, &busy.disks[0].read), (vec![Kind::Busy], &None));
    let _ = known(point(2), &*snapshot);
    snapshot.abort().await.unwrap();
}
