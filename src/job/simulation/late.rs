//! Damage that a backup meets once it has given scratch up.

use super::steps::request;
use super::world::World;
use super::{Bench, Trace};
use crate::dice::{Dice, simulate};
use crate::error::Kind;
use crate::job::backup::{self, Sample};
use crate::platform::simulated::guest::Guest;
use crate::platform::simulated::image::{BLOCK_BYTES, Content};
use crate::platform::simulated::life::{At, Due, Fault, Happening};
use crate::platform::{BackupMode, Quiesce};
use crate::units::MIB;

/// The first MiB of the disk, which become zeroes: enough for scratch to be given up.
const ZEROED_MIB: u64 = 18;

/// MiB behind them, which become something new: what is given up, is meanwhile.
const NEW_MIB: u64 = 3;

/// MiB behind those, which are written as they were: their chunks are in the repository.
const SAME_MIB: u64 = 2;

/// The guest writes so many MiB from so many on, each block with its number added to `base`; zeroes
/// where there is none.
fn write(guest: &mut Guest, (from, len): (u64, u64), base: Option<u32>) {
    for block in from * MIB / BLOCK_BYTES..(from + len) * MIB / BLOCK_BYTES {
        let number = u32::try_from(block).unwrap();
        let value = base.map_or(0, |base| base + number);
        guest.disks[0].image.write(usize::try_from(block).unwrap(), value);
    }
}

/// What was given up reads no second time: the rest of the disk alone must not become its content.
#[test]
fn damage_that_is_met_after_scratch_was_given_up_fails_the_backup_and_makes_no_point() {
    let bench = Bench::new();
    simulate(7, || {
        let mut world = World::new(Dice::new(7), &bench, Trace::Off);
        {
            let mut guest = world.guest.lock();
            guest.disks.truncate(1);
            guest.disks[0].image.format = "qcow2";
        }
        // What every point has goes to a segment of its own: looking for it must not cache the other.
        let mut request = request(BackupMode::Auto, Quiesce::Never);
        request.audit = Sample::None;
        world.back_up_to(0, &request, vec![]).unwrap();
        {
            let mut guest = world.guest.lock();
            guest.disks[0].image.bitmaps.clear();
            let size_mib = ZEROED_MIB + NEW_MIB + SAME_MIB;
            guest.disks[0].image.content = Content::zeroes(size_mib * MIB);
            write(&mut guest, (0, size_mib), Some(1_000_000));
        }
        world.depots[0].is_ready = false;
        world.back_up_to(0, &request, vec![]).unwrap();
        {
            let mut guest = world.guest.lock();
            write(&mut guest, (0, ZEROED_MIB), None);
            write(&mut guest, (ZEROED_MIB, NEW_MIB), Some(2_000_000));
            write(&mut guest, (ZEROED_MIB + NEW_MIB, SAME_MIB), Some(1_000_000));
        }
        request.mode = BackupMode::Incremental;
        request.options.guest_first = true;
        let torn = Fault::Elsewhere(Happening::TornIndex);
        let due = vec![Due { at: At::Place("guest: release", 0), fault: torn }];
        let points = world.depots[0].points.len();
        let ended = world.run((0, due), async |process| {
            let repository = process.open(0).await?;
            let platform = process.platform().await?;
            backup::run_on(&repository, &platform, &request, process.surroundings()).await
        });
        assert!(ended.met(torn), "nothing was given up");
        let error = ended.error().expect("it cannot be made");
        assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
        let told = error.in_one_line();
        assert!(told.contains("too late") && told.contains("without --guest-first"), "{told}");
        let manifests = world.depots[0].kept.store.names();
        let manifests = manifests.iter().filter(|name| name.as_str().starts_with("points/"));
        assert_eq!(manifests.count(), points);
        assert!(world.is_clean(), "left: {:?}", world.guest.lock());
    });
}
