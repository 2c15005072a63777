//! What a repository is asked when the VM needs nothing of it any more.

use super::steps::request;
use super::world::World;
use super::{Bench, Trace};
use crate::dice::{Dice, simulate};
use crate::job::backup;
use crate::platform::simulated::life::{At, Due, Fault, Place};
use crate::platform::{BackupMode, Quiesce};

/// Backs up with `due`, and is killed at a call to the repository, which need never answer. The VM must
/// have been let go by then.
fn dies_with_the_vm_let_go(due: &[Due], at: (Place, usize)) {
    let bench = Bench::new();
    simulate(7, || {
        let mut world = World::new(Dice::new(7), &bench, Trace::Off);
        let request = request(BackupMode::Full, Quiesce::Never);
        let last = Due { at: At::Place(at.0, at.1), fault: Fault::DieBefore };
        let due = due.iter().copied().chain([last]).collect();
        let ended = world.run((0, due), async |process| {
            let repository = process.open(0).await?;
            let platform = process.platform().await?;
            backup::run_on(&repository, &platform, &request, process.surroundings()).await
        });
        assert!(ended.life.is_dead, "{at:?} was not asked for: {:?}", ended.life.calls);
        assert!(world.is_clean(), "left: {:?}", world.guest.lock());
    });
}

/// The objects of a run: it begins, makes sure of its lease before its manifest and before it merges
/// indexes, and ends.
const LEASE: Place = "store: create runs";

/// A repository that hung when the point was there kept the job on the VM for as long as it was waited for.
#[test]
fn a_vm_waits_for_nothing_that_follows_the_point() {
    dies_with_the_vm_let_go(&[], (LEASE, 2));
    dies_with_the_vm_let_go(&[], (LEASE, 3));
}

#[test]
fn a_vm_waits_for_nothing_that_follows_a_commit_that_failed() {
    let fail = |place| Due { at: At::Place(place, 0), fault: Fault::Fail };
    dies_with_the_vm_let_go(&[fail("store: finish packs")], (LEASE, 1));
    dies_with_the_vm_let_go(&[fail("store: now")], ("store: create tombstones", 0));
}
