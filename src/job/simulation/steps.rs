//! What processes do, and what must be true after each.

use std::collections::BTreeSet;
use std::time::Duration;

use super::oracle::{assert_file_holds, assert_holds};
use super::world::{DEPOTS, Depot, Ended, Fate, World};
use crate::block::file::Existing;
use crate::error::{Error, Kind};
use crate::job::backup::{self, Request, Sample};
use crate::job::lock::Wait;
use crate::job::source::{SnapshotOptions, SourceSpec};
use crate::job::{check, forget, gc, recover, restore};
use crate::platform::simulated::guest::Instant;
use crate::platform::simulated::life::{Due, Fault, Happening, Place};
use crate::platform::{BackupMode, Quiesce};
use crate::repo::PointName;
use crate::vm::{PointId, ReadMode};

/// Where a fault may leave something to the next run.
const TAKING_DOWN: [Place; 6] = [
    "guest: thaw",
    "guest: thaw what was left",
    "guest: remove exports",
    "guest: end job",
    "guest: stop server",
    "guest: remove scratch",
];

const QEMU_DIES: Fault = Fault::Elsewhere(Happening::QemuDies);

impl World<'_> {
    pub(super) fn back_up(&mut self) {
        let depot = usize::from(self.dice.once_in(3));
        let (request, due) = (self.request(), self.trouble());
        self.back_up_to(depot, &request, due);
    }

    fn request(&mut self) -> Request {
        let (modes, quiesces) = (
            [BackupMode::Auto, BackupMode::Auto, BackupMode::Incremental, BackupMode::Full],
            [Quiesce::Auto, Quiesce::Auto, Quiesce::Require, Quiesce::Never],
        );
        let mut request = request(self.dice.one_of(&modes), self.dice.one_of(&quiesces));
        request.options.guest_first = self.dice.once_in(3);
        request
    }

    /// The point, if it was made.
    pub(super) fn back_up_to(
        &mut self,
        depot: usize,
        request: &Request,
        due: Vec<Due>,
    ) -> Option<PointId> {
        self.note(|| format!("backup {:?} into {depot}: {due:?}", request.mode));
        let (was_clean, bases) = (self.is_clean(), self.bases(depot));
        let ended = self.run((depot, due), async |process| {
            let repository = process.open(depot).await?;
            let platform = process.platform().await?;
            backup::run_on(&repository, &platform, request, process.surroundings()).await
        });
        self.note(|| format!("  {}", outcome(&ended)));
        self.take_in(depot);
        match &ended.result {
            Some(Ok(report)) => {
                self.judge_point(depot, request, report);
                let whole = report.unfinished.is_none();
                assert!(whole || ended.was_disturbed(), "{:?}", report.unfinished);
            }
            Some(Err(error)) => {
                self.tally.count("backup: failed");
                let no_agent = request.options.quiesce == Quiesce::Require
                    && !self.guest.lock().has_agent
                    && error.kind() == Kind::Unsupported;
                let no_base =
                    request.mode == BackupMode::Incremental && error.kind() == Kind::NoBase;
                let expected = ended.was_disturbed() || self.depots[depot].is_damaged;
                assert!(expected || no_agent || no_base, "{error:?}");
            }
            None => self.tally.count("backup: killed"),
        }
        // Of a point that the store lost, the bitmap goes as well.
        let may_cost = ended.met(QEMU_DIES) || self.depots[depot].is_damaged;
        if ended.error().is_some() && !may_cost {
            assert_eq!(self.bases(depot), bases, "a failure cost a checkpoint");
        }
        let left = ended.life.is_dead || ended.met_at(&TAKING_DOWN);
        assert!(!was_clean || left || self.is_clean(), "left: {:?}", self.guest.lock());
        if !ended.is_done() || self.dice.once_in(4) {
            let unsure = self.unsure(depot);
            self.look(depot);
            let there = |id: &PointId| self.depots[depot].points[id] == Fate::There;
            if ended.life.is_dead && unsure.iter().any(there) {
                self.tally.count("backup: killed after its commit");
            }
        }
        let ready = ended.is_done() && !ended.was_disturbed();
        self.depots[depot].is_ready = ready;
        ended.result?.ok().map(|report| report.point)
    }

    /// What incrementals can build on: by file, the points of bitmaps that are there.
    fn bases(&self, depot: usize) -> BTreeSet<(u64, PointId)> {
        let Depot { id, points, .. } = &self.depots[depot];
        let guest = self.guest.lock();
        let all = guest
            .disks
            .iter()
            .flat_map(|disk| disk.image.bitmaps.keys().map(|name| (disk.image.file, name)));
        let is_there = |point| points.get(point) == Some(&Fate::There);
        let ours = all.filter(|(_, name)| name.repository == *id && is_there(&name.point));
        ours.map(|(file, name)| (file, name.point)).collect()
    }

    /// Takes in the points whose instants were taken.
    fn take_in(&mut self, depot: usize) {
        let guest = self.guest.lock();
        let Self { depots, .. } = self;
        let depot = &mut depots[depot];
        for (point, instant) in &guest.instants {
            if instant.repository == depot.id {
                depot.points.entry(*point).or_insert(Fate::Unsure);
            }
        }
    }

    fn unsure(&self, depot: usize) -> Vec<PointId> {
        let points = self.depots[depot].points.iter();
        points.filter(|(_, fate)| **fate == Fate::Unsure).map(|(id, _)| *id).collect()
    }

    fn judge_point(&mut self, depot: usize, request: &Request, report: &backup::Report) {
        self.tally.count("backup: committed");
        let Self { depots, tally, guest, .. } = self;
        let depot = &mut depots[depot];
        let fate = depot.points.get_mut(&report.point);
        *fate.expect("no point without its instant") = Fate::There;
        let (has_lied, all) = {
            let guest = guest.lock();
            (guest.has_lied, guest.instants[&report.point].disks.len())
        };
        assert_eq!(report.disks.len(), all, "{report:?}");
        for disk in &report.disks {
            if disk.audit.is_some_and(|audit| audit.differs_at.is_some()) {
                tally.count("disk: audit found a lie");
                assert!(has_lied, "a bitmap was believed that is not this base's: {disk:?}");
            }
            match &disk.read {
                ReadMode::Incremental { .. } => tally.count("disk: incremental"),
                ReadMode::Full { reason } => {
                    let reason = serde_json::to_string(reason).unwrap();
                    tally.count(format!("disk: full, {}", reason.trim_matches('"')));
                    let needless = depot.is_ready && request.mode != BackupMode::Full;
                    assert!(!needless, "a needless full read: {disk:?}");
                }
            }
        }
    }

    /// A point that is there, of a repository.
    fn any_point(&mut self) -> Option<(usize, PointId)> {
        let depot = self.dice.below(DEPOTS);
        let points = self.depots[depot].points.iter();
        let there: Vec<_> = points.filter(|(_, fate)| **fate == Fate::There).collect();
        if there.is_empty() {
            return None;
        }
        let (id, _) = there[self.dice.below(there.len())];
        Some((depot, *id))
    }

    pub(super) fn forget(&mut self) {
        let Some((depot, id)) = self.any_point() else { return };
        let due = self.trouble();
        self.note(|| format!("forget {id} in {depot}: {due:?}"));
        let what = forget::What::Points(vec![id.to_string()]);
        let request = forget::Request { what, effect: forget::Effect::Forget };
        let ended = self.run((depot, due), async |process| {
            let repository = process.open(depot).await?;
            forget::run(&repository, request.clone(), process.surroundings()).await
        });
        self.note(|| format!("  {}", outcome(&ended)));
        let fate = if ended.is_done() { Fate::Gone } else { Fate::Unsure };
        let depot_of = &mut self.depots[depot];
        depot_of.points.insert(id, fate);
        depot_of.is_ready = false;
        assert!(ended.is_excused(depot_of.is_damaged, &[]), "{:?}", ended.error());
        if ended.is_done() {
            self.tally.count("forget: done");
        }
        self.look(depot);
    }

    pub(super) fn collect(&mut self) {
        let (depot, due) = (self.dice.below(DEPOTS), self.trouble());
        self.note(|| format!("gc of {depot}: {due:?}"));
        let ended = self.run((depot, due), async |process| {
            gc::run(&process.open(depot).await?, process.control()).await
        });
        self.note(|| format!("  {}", outcome(&ended)));
        if ended.is_done() {
            self.tally.count("gc: done");
        }
        // One that was killed has a lease still.
        let excused = ended.is_excused(self.depots[depot].is_damaged, &[Kind::Busy]);
        assert!(excused, "{:?}", ended.error());
        self.look(depot);
    }

    pub(super) fn check(&mut self) {
        let (depot, due) = (self.dice.below(DEPOTS), self.trouble());
        self.note(|| format!("check of {depot}: {due:?}"));
        let options =
            check::CheckOptions { depth: check::Depth::Structure, repair: check::Repair::Nothing };
        let ended = self.run((depot, due), async |process| {
            check::run(&process.open(depot).await?, options, process.control()).await
        });
        let is_damaged = self.depots[depot].is_damaged;
        assert!(ended.is_excused(is_damaged, &[]), "{:?}", ended.error());
        if let Some(Ok(report)) = &ended.result {
            let fine = report.is_fine() || ended.was_disturbed() || is_damaged;
            assert!(fine, "{report:?}");
        }
    }

    /// Somebody asks for what the next backup would do anyway.
    pub(super) fn recover_vm(&mut self) {
        let (depot, due) = (self.dice.below(DEPOTS), self.trouble());
        self.recover_from(depot, due);
    }

    pub(super) fn recover_from(&mut self, depot: usize, due: Vec<Due>) {
        self.note(|| format!("recovery with {depot}: {due:?}"));
        let ended = self.run((depot, due), async |process| {
            let repository = process.open(depot).await?;
            let platform = process.platform().await?;
            recover::run_on(&repository, &platform, process.surroundings()).await
        });
        self.note(|| format!("  {}", outcome(&ended)));
        let excused = ended.is_excused(self.depots[depot].is_damaged, &[]);
        assert!(excused, "{:?}", ended.error());
        if ended.is_done() {
            self.tally.count("recovery: done");
            let met = ended.met_at(&["guest: thaw what was left"]);
            assert!(met || self.is_clean(), "left: {:?}", self.guest.lock());
        }
    }

    /// The job itself, to files.
    pub(super) fn restore(&mut self) {
        let Some((depot, id)) = self.any_point() else { return };
        let mut due = self.trouble();
        due.retain(|due| !matches!(due.fault, Fault::Elsewhere(_) | Fault::Delay(_)));
        self.note(|| format!("restore {id} from {depot}: {due:?}"));
        let instant = self.guest.lock().instants[&id].clone();
        let directory = self.bench.directory.path().join("restored");
        let request = restore::Request {
            point: id.to_string(),
            disks: Vec::new(),
            directory: Some(directory.clone()),
            format: Some(restore::ImageFormat::Raw),
            devices: Vec::new(),
            existing: Existing::Refuse,
            define: None,
            damaged: restore::salvage::Damaged::Fails,
            wait: Wait::No,
        };
        self.is_exact = false;
        let ended = self.run((depot, due), async |process| {
            let repository = process.open(depot).await?;
            restore::run(&repository, request.clone(), process.surroundings()).await
        });
        self.is_exact = true;
        assert!(ended.is_excused(self.depots[depot].is_damaged, &[]), "{:?}", ended.error());
        judge_files(&ended, &instant, &directory);
        self.tally.count(if ended.is_done() { "restore: done" } else { "restore: failed" });
        // What a killed one left, with its journal: the next backup would clear it away with threads.
        for left in [directory, self.bench.directory.path().join("restores")] {
            if left.exists() {
                std::fs::remove_dir_all(left).unwrap();
            }
        }
    }

    /// The points a repository lists are those that must be there.
    pub(super) fn look(&mut self, depot: usize) {
        let ended = self.run((depot, Vec::new()), async |process| {
            process.open(depot).await?.point_names(None).await
        });
        let Depot { points, is_damaged, .. } = &mut self.depots[depot];
        let names: Vec<PointName> = match ended.result.expect("nobody kills it") {
            Err(_) if *is_damaged => return,
            names => names.unwrap(),
        };
        let listed: Vec<PointId> = names.iter().map(|name| name.point).collect();
        assert!(listed.iter().all(|id| points.contains_key(id)), "a point nobody made");
        for (id, fate) in points {
            let is_there = listed.contains(id);
            match *fate {
                Fate::There => assert!(is_there || *is_damaged, "point {id} is gone"),
                Fate::Gone => assert!(!is_there || *is_damaged, "point {id} is back"),
                Fate::Unsure => {}
            }
            *fate = if is_there { Fate::There } else { Fate::Gone };
        }
    }

    /// Every point of a repository holds what its VM's disks held.
    pub(super) fn read_all(&mut self, depot: usize) {
        let instants = self.guest.lock().instants.clone();
        let is_damaged = self.depots[depot].is_damaged;
        let ended = self.run((depot, Vec::new()), async |process| {
            let repository = process.open(depot).await?;
            let mut unread = Vec::new();
            for manifest in repository.manifests(None).await? {
                let instant = &instants[&manifest.point];
                if let Err(error) = assert_holds(&repository, &manifest, instant).await {
                    unread.push((manifest.point, error));
                }
            }
            let options =
                check::CheckOptions { depth: check::Depth::Data, repair: check::Repair::Nothing };
            Ok((unread, check::run(&repository, options, process.control()).await?))
        });
        let result = ended.result.expect("nobody kills it");
        if is_damaged && result.is_err() {
            return;
        }
        let (unread, report) = result.unwrap();
        if is_damaged {
            assert!(
                unread.is_empty() || !report.is_fine(),
                "damage that no check tells: {unread:?}"
            );
        } else {
            assert!(unread.is_empty() && report.is_fine(), "{unread:?} {report:?}");
        }
    }
}

/// A backup of all disks.
pub(super) fn request(mode: BackupMode, quiesce: Quiesce) -> Request {
    Request {
        source: SourceSpec::Images { name: "foo".to_owned(), images: Vec::new() },
        mode,
        options: SnapshotOptions {
            quiesce,
            freeze_budget: Duration::from_secs(10),
            scratch_dir: None,
            exclude_disks: Vec::new(),
            insecure_tcp: false,
            guest_first: false,
        },
        audit: Sample::default(),
        verify_source: Sample::None,
        wait: Wait::No,
    }
}

impl<T> Ended<T> {
    /// Whether it may have ended as it did: it did what it should, or was disturbed.
    fn is_excused(&self, is_damaged: bool, kinds: &[Kind]) -> bool {
        let error = self.error();
        let kind = |error: &Error| kinds.contains(&error.kind());
        is_damaged || self.was_disturbed() || error.is_none_or(kind)
    }
}

/// Whole files under their names, or none; after a failure those that the error names.
fn judge_files(ended: &Ended<restore::Report>, instant: &Instant, directory: &std::path::Path) {
    let files = instant
        .disks
        .iter()
        .map(|(name, content)| (directory.join(format!("{name}.raw")), content));
    for (path, content) in files {
        if path.exists() {
            let named = |error: &Error| error.to_string().contains(&*path.to_string_lossy());
            let error = ended.error();
            assert!(
                ended.is_done() || ended.life.is_dead || error.is_some_and(named),
                "{path:?} after a failure: {error:?}"
            );
            assert_file_holds(&path, content);
        } else {
            assert!(!ended.is_done(), "{path:?} is missing");
        }
    }
}

fn outcome<T>(ended: &Ended<T>) -> String {
    match &ended.result {
        None => "killed".to_owned(),
        Some(Ok(_)) => "done".to_owned(),
        Some(Err(error)) => error.in_one_line(),
    }
}
