//! Scratch that hangs: with `--guest-first` the guest's write completes, and the backup gives up in
//! bounded time and leaves QEMU, which would hang with it, alone until scratch answers. Jobs are
//! ended although it hangs for a while, and at once where it is full.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmbackup::error::Kind;
use vmbackup::platform::SnapshotRequest;

use crate::machine::{Guest, Machine};
use crate::reading::{Points, open};
use crate::support::TestEnv;

/// A file system on a file, whose writes hang while it is frozen.
struct Freezer {
    path: PathBuf,
    /// Thaws it should this process be killed or take too long: every sync(2) of the machine waits
    /// for it.
    guard: Child,
}

// Longer than the tests allow together, which the runner ends before.
const GUARD: &str = "n=0; while [ $n -lt 170 ] && kill -0 $1 2>/dev/null; do sleep 1; n=$((n+1)); \
                     done; fsfreeze -u \"$2\"; umount -l \"$2\"";

fn run(program: &str, arguments: &[&str], path: &Path) {
    let status = Command::new(program).args(arguments).arg(path).status();
    assert!(status.expect("it runs").success(), "{program} {arguments:?} {}", path.display());
}

impl Freezer {
    fn mount(machine: &Machine) -> Self {
        let (image, path) = (machine.path("freezer.img"), machine.path("freezer"));
        std::fs::File::create_new(&image).unwrap().set_len(64 << 20).unwrap();
        std::fs::create_dir(&path).unwrap();
        run("mkfs.ext4", &["-q", "-F"], &image);
        run("mount", &["-o", "loop", image.to_str().unwrap()], &path);
        let pid = std::process::id().to_string();
        let guard = Command::new("setsid")
            .args(["sh", "-c", GUARD, "sh", &pid])
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { path, guard }
    }

    fn freeze(&self) {
        run("fsfreeze", &["-f"], &self.path);
    }

    fn thaw(&self) {
        run("fsfreeze", &["-u"], &self.path);
    }

    /// How many processes ask whether it answers.
    fn asked(&self) -> usize {
        let of = |entry: std::fs::DirEntry| std::fs::read(entry.path().join("cmdline")).ok();
        let lines = std::fs::read_dir("/proc").unwrap().flatten().filter_map(of);
        let lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
        let path = self.path.to_str().unwrap();
        lines.filter(|line| line.starts_with("touch\0") && line.contains(path)).count()
    }

    fn runs(&self) -> usize {
        let entries = std::fs::read_dir(&self.path).unwrap().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("vmb-")).count()
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        // Not frozen, in most cases.
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.path).output();
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
        let _ = self.guard.kill();
        let _ = self.guard.wait();
    }
}

/// Asks for a point whose scratch is on a file system that may hang.
fn scratch_that_hangs(machine: &mut Machine) -> (Freezer, SnapshotRequest) {
    let freezer = Freezer::mount(machine);
    let point = machine.next_point();
    let request = Points::default().request(machine, point);
    let request = SnapshotRequest { scratch_dir: Some(freezer.path.clone()), ..request };
    (freezer, request)
}

#[tokio::test]
async fn scratch_that_hangs_holds_up_neither_the_guest_nor_the_backup_and_is_undone_later() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::with(Guest::Idle).await;
    let freezer = Freezer::mount(&machine);
    let (monitor, scratch) = (machine.path("qmp.sock"), freezer.path.clone());
    let (monitor, scratch) = (monitor.to_str().unwrap(), scratch.to_str().unwrap());
    let args = ["full", "--qmp", monitor, "--scratch-dir", scratch, "--guest-first"];
    let backup = env.stopped_at("after:export", &args);
    freezer.freeze();
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
    assert_eq!(freezer.runs(), 1);
    freezer.thaw();
    let said = env.vmbackup(&["recover"]).ok().stdout;
    assert!(said.contains("undone: filter"), "{said}");
    assert_eq!((freezer.runs(), machine.tops().await), (0, vec!["a".into(), "b".into()]));
    assert!(machine.reads("disk-a", "read -P 4 3M 1M").await && machine.runs().await);
    machine.holds_only(&[]).await;
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

#[tokio::test]
async fn scratch_that_does_not_answer_for_a_while_is_waited_for_at_the_end_of_a_backup() {
    let mut machine = Machine::with(Guest::Idle).await;
    let (freezer, request) = scratch_that_hangs(&mut machine);
    let platform = machine.platform().await;
    let snapshot = open(&platform, &request).await;
    freezer.freeze();
    let (committed, asked) = tokio::join!(snapshot.commit(), async {
        // More than the first question takes.
        tokio::time::sleep(Duration::from_secs(14)).await;
        let asked = freezer.asked();
        freezer.thaw();
        asked
    });
    committed.unwrap();
    assert_eq!(asked, 1, "those that hang do not pile up");
    assert_eq!((freezer.asked(), freezer.runs()), (0, 0));
    machine.holds_only(&[request.point]).await;
}

/// The guest's next write fails where its old content finds no room.
#[tokio::test]
async fn jobs_whose_scratch_is_full_end_at_once_although_it_takes_no_writes() {
    let mut machine = Machine::with(Guest::Idle).await;
    let (freezer, request) = scratch_that_hangs(&mut machine);
    let platform = machine.platform().await;
    let mut snapshot = open(&platform, &request).await;
    // No await: it is not seen to be full before it is frozen.
    let mut filler = std::fs::File::create_new(freezer.path.join("theirs")).unwrap();
    while filler.write_all(&vec![1; 1 << 20]).is_ok() {}
    freezer.freeze();
    let begun = Instant::now();
    while machine.side.query_jobs().await.unwrap().iter().any(|job| job.status == "running") {
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    machine.guest("disk-a", "write -P 2 0 1M").await;
    freezer.thaw();
    let error = snapshot.still_valid().await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{error:?}");
    snapshot.abort().await.unwrap();
    assert_eq!(freezer.runs(), 0);
    machine.holds_only(&[]).await;
}
