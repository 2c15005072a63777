//! What must be true of the repository, whatever happened.

use std::collections::HashSet;
use std::time::Duration;

use super::world::{Fate, World, assert_holds};
use crate::control::Control;
use crate::repo::store::Folder;
use crate::repo::{CheckOptions, CollectOptions, Depth, Repair, Repository};
use crate::vm::PointId;

/// Longer than any clock was set on or back, and any lease.
const LONG: Duration = Duration::from_secs(30 * 24 * 3600);

impl World {
    /// Every point that must be there is, and nothing else, and all of it can be read.
    pub(super) async fn look(&mut self) {
        let fresh = self.bed.open().await;
        let names = fresh.point_names(None).await.unwrap();
        let listed: HashSet<PointId> = names.iter().map(|name| name.point).collect();
        assert!(listed.iter().all(|id| self.points.contains_key(id)), "a point nobody made");
        for (id, point) in &mut self.points {
            let is_there = listed.contains(id);
            match point.fate {
                Fate::There => assert!(is_there, "point {id} is gone"),
                Fate::Gone => assert!(!is_there, "point {id} is back"),
                Fate::Unsure => point.fate = if is_there { Fate::There } else { Fate::Gone },
            }
        }
        let options = CheckOptions { depth: Depth::Structure, repair: Repair::Nothing };
        let report = fresh.check(options, &Control::new()).await.unwrap();
        assert!(report.is_fine(), "{report:?}");
        if self.dice.once_in(8) {
            self.read_all(&fresh).await;
        }
    }

    async fn read_all(&self, repository: &Repository) {
        for point in self.points.values().filter(|point| point.fate == Fate::There) {
            assert_holds(repository, &point.stored, point.contents).await;
        }
    }

    /// Everybody is gone: what the points need stays, the rest goes, and without points all goes.
    pub(super) async fn end(&mut self) {
        self.backups.clear();
        self.holds.clear();
        self.processes.clear();
        self.bed.pass(LONG);
        self.tidy_up().await;
        self.look().await;
        self.read_all(&self.bed.open().await).await;
        let fresh = self.bed.open().await;
        for (id, point) in &mut self.points {
            if point.fate == Fate::There {
                fresh.forget(*id).await.unwrap();
                point.fate = Fate::Gone;
            }
        }
        self.tidy_up().await;
        for folder in [Folder::Packs, Folder::Points, Folder::Tombstones, Folder::Condemned] {
            assert_eq!(self.bed.count(folder), 0, "{folder:?}");
        }
        self.look().await;
    }

    async fn tidy_up(&self) {
        let repository = self.bed.open().await;
        for _ in 0..2 {
            self.bed.pass(Duration::from_secs(60));
            let report =
                repository.collect(CollectOptions::default(), &Control::new()).await.unwrap();
            assert!(report.waiting_for.is_empty(), "{report:?}");
        }
    }
}
