//! A backup of a plain QEMU that is killed at any step: the next command undoes what is left and
//! says so, the next incremental is right, and nothing of ours remains.

use std::time::{Duration, Instant};

use vmbackup::journal::Phase;

use crate::machine::{Guest, Machine};
use crate::support::{TestEnv, is_asked_for, steps};

/// Whether such a backup takes this step; there is no guest to freeze (see [`crate::frozen`]).
fn takes(phase: Phase, way: &[&str]) -> bool {
    match phase {
        Phase::Job => way.is_empty(),
        Phase::Pause | Phase::Filter => !way.is_empty(),
        Phase::Scratch
        | Phase::Node
        | Phase::Socket
        | Phase::Bitmap
        | Phase::Export
        | Phase::Manifest
        | Phase::Handover => true,
        Phase::Checkpoint
        | Phase::Freeze
        | Phase::Process
        | Phase::Temporary
        | Phase::Overwrite
        | Phase::Place
        | Phase::Define
        | Phase::Discard => false,
    }
}

/// Its monitor was named by a path that means nothing elsewhere: it is not taken for gone.
#[tokio::test]
async fn a_qemu_that_was_named_in_another_directory_is_found_again() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::start().await;
    let scratch = machine.path("scratch");
    let args = ["full", "--qmp", "qmp.sock", "--scratch-dir", scratch.to_str().unwrap()];
    let backup = env.stopped_in(&machine.path("."), "after:export", &args);
    backup.signal("KILL");
    backup.wait();
    assert!(machine.ours().await.len() > 2, "a job, nodes and bitmaps");
    let said = env.vmbackup(&["recover"]).ok().stdout;
    assert!(said.contains("undone: job") && !said.contains("gone"), "{said}");
    machine.holds_only(&[]).await;
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

#[tokio::test]
async fn a_backup_of_a_plain_qemu_can_be_killed_at_any_step() {
    kill_at_every_step(Machine::start().await, &[], &["before", "after"]).await;
}

#[tokio::test]
async fn a_backup_that_puts_the_guest_first_can_be_killed_before_any_step_and_the_guest_runs() {
    kill_at_every_step(Machine::with(Guest::Idle).await, &["--guest-first"], &["before"]).await;
}

#[tokio::test]
async fn a_backup_that_puts_the_guest_first_can_be_killed_after_any_step_and_the_guest_runs() {
    kill_at_every_step(Machine::with(Guest::Idle).await, &["--guest-first"], &["after"]).await;
}

async fn kill_at_every_step(machine: Machine, way: &[&str], moments: &[&str]) {
    let runs = machine.runs().await;
    let env = TestEnv::new();
    env.init_repo();
    let (monitor, scratch) = (machine.path("qmp.sock"), machine.path("scratch"));
    let (monitor, scratch) = (monitor.to_str().unwrap(), scratch.to_str().unwrap());
    let args = |command| {
        let all = [command, "--qmp", monitor, "--scratch-dir", scratch, "--json"];
        [&all[..], way].concat()
    };
    machine.guest("disk-a", "write -P 1 1M 2M").await;
    env.vmbackup(&args("full")).ok();
    let steps = steps(|phase| takes(phase, way)).into_iter().enumerate();
    let steps = steps.filter(|(_, step)| moments.iter().any(|moment| step.starts_with(moment)));
    for (at, step) in steps {
        let offset = at * 150_000;
        machine.guest("disk-a", &format!("write -P 3 {offset} 512")).await;
        let backup = env.stopped_at(&step, &args("backup"));
        machine.guest("disk-b", &format!("write -P 4 {offset} 512")).await;
        backup.signal("KILL");
        backup.wait();
        // Whoever comes next, or nobody: a guest that we paused goes on.
        let deadline = Instant::now() + Duration::from_secs(10);
        while machine.runs().await != runs {
            assert!(Instant::now() < deadline, "{step}: the guest stands still");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        machine.guest("disk-a", &format!("write -P 5 {} 512", offset + 8192)).await;
        let mut said = String::new();
        if is_asked_for(at) {
            said = env.vmbackup(&["recover"]).ok().stdout;
            assert_eq!(std::fs::read_dir(scratch).unwrap().count(), 0, "{step}");
            let left = machine.ours().await;
            assert_eq!(machine.tops().await, ["a", "b"], "{step}");
            assert!(left.len() <= 4 && left.iter().all(|name| name.len() > 60), "{step}: {left:?}");
        }
        let next = env.vmbackup(&args("incremental"));
        said.push_str(&next.stderr);
        let left = !["before:scratch", "after:manifest", "before:handover", "after:handover"]
            .contains(&step.as_str());
        assert!(said.contains("undone") || !left, "{step}: {said}");
        let report = next.json();
        let point = report["point"].as_str().expect("a point id").to_owned();
        assert_eq!(report["disks"][0]["read"]["mode"], "incremental", "{step}: {report}");
        let oracle = machine.oracle().await;
        let to = env.path(&point);
        env.vmbackup(&["restore", &point, "--to", to.to_str().unwrap()]).ok();
        for (disk, content) in ["disk-a", "disk-b"].iter().zip(&oracle) {
            let restored = std::fs::read(to.join(format!("{disk}.raw"))).unwrap();
            assert!(restored == *content, "{step}: {disk} equals the oracle");
        }
        std::fs::remove_dir_all(to).unwrap();
        assert_eq!(machine.tops().await, ["a", "b"], "{step}");
        assert_eq!(machine.runs().await, runs, "{step}");
        machine.holds_only(&[point.parse().expect("an id")]).await;
        let journals = std::fs::read_dir(env.path("state/journal")).unwrap().count();
        assert_eq!((journals, env.processes().len()), (0, 0), "{step}");
    }
}
