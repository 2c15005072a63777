//! The guardian in a thread, over a guest whose agent fails on cue.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;

use super::{FileSystem, Freezable, Guardian, Subject, Thaw};
use crate::vm::{Consistency, Uuid};

/// What a guest went through, and what it will do.
#[derive(Default)]
struct State {
    frozen: bool,
    thaws: u32,
    /// So many thaws fail first.
    thaws_that_fail: u32,
    /// The freeze fails for the one who asked, and happens all the same.
    late: bool,
    gone: bool,
}

#[derive(Clone, Default)]
struct Guest(Arc<Mutex<State>>);

impl Guest {
    fn with(change: impl FnOnce(&mut State)) -> Self {
        let guest = Self::default();
        change(&mut guest.0.lock().unwrap());
        guest
    }

    fn is_frozen(&self) -> bool {
        self.0.lock().unwrap().frozen
    }

    async fn guardian(&self) -> Guardian {
        let subject = Subject::Libvirt { uri: String::new(), domain: Uuid::nil() };
        Guardian::start(None, subject, Box::new(self.clone())).await.unwrap()
    }

    async fn is_thawed_soon(&self) -> bool {
        for _ in 0..500 {
            if !self.is_frozen() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }
}

#[async_trait]
impl Freezable for Guest {
    async fn prepare(&mut self) -> Result<(), String> {
        Ok(())
    }

    async fn file_systems(&mut self) -> Option<Vec<FileSystem>> {
        None
    }

    async fn freeze(&mut self, _: Duration) -> Result<u32, String> {
        let mut state = self.0.lock().unwrap();
        state.frozen = true;
        if state.late { Err("no answer".into()) } else { Ok(2) }
    }

    async fn thaw(&mut self) -> Result<u32, String> {
        let mut state = self.0.lock().unwrap();
        state.thaws += 1;
        if state.thaws <= state.thaws_that_fail {
            return Err("the agent is stuck".into());
        }
        let count = if state.frozen { 2 } else { 0 };
        state.frozen = false;
        Ok(count)
    }

    async fn is_gone(&mut self) -> bool {
        self.0.lock().unwrap().gone
    }
}

const LONG: Duration = Duration::from_secs(600);

#[tokio::test]
async fn a_freeze_within_its_budget_is_file_system_consistent() {
    let guest = Guest::default();
    let frozen = guest.guardian().await.freeze(LONG).await.ok().unwrap();
    assert!(guest.is_frozen());
    let thawed = frozen.thaw().await;
    assert_eq!(thawed.quiescence.level, Consistency::Filesystem);
    assert!(matches!(thawed.thaw, Thaw::Done) && !guest.is_frozen());
}

#[tokio::test]
async fn a_thaw_that_fails_is_tried_again() {
    let guest = Guest::with(|state| state.thaws_that_fail = 2);
    let frozen = guest.guardian().await.freeze(LONG).await.ok().unwrap();
    let thawed = frozen.thaw().await;
    assert!(matches!(thawed.thaw, Thaw::Done) && !guest.is_frozen());
}

#[tokio::test]
async fn a_thaw_that_keeps_failing_is_told_and_goes_on_until_it_succeeds() {
    let guest = Guest::with(|state| state.thaws_that_fail = 4);
    let frozen = guest.guardian().await.freeze(LONG).await.ok().unwrap();
    let thawed = frozen.thaw().await;
    assert_eq!(thawed.quiescence.level, Consistency::Crash);
    assert!(thawed.quiescence.reason.unwrap().contains("the agent is stuck"));
    let Thaw::Pending(mut pending) = thawed.thaw else { panic!("is not thawed") };
    assert!(!pending.is_done().await && guest.is_frozen());
    assert!(guest.is_thawed_soon().await);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(pending.is_done().await);
}

#[tokio::test]
async fn the_end_of_the_budget_and_the_end_of_the_run_both_thaw() {
    let guest = Guest::default();
    let budget = Duration::from_millis(100);
    let frozen = guest.guardian().await.freeze(budget).await.ok().unwrap();
    assert!(guest.is_thawed_soon().await, "nobody asked, the budget is over");
    let thawed = frozen.thaw().await;
    assert!(thawed.quiescence.reason.unwrap().contains("longer"));
    assert!(matches!(thawed.thaw, Thaw::Done));

    let guest = Guest::default();
    drop(guest.guardian().await.freeze(LONG).await);
    assert!(guest.is_thawed_soon().await, "the one who froze is gone");
}

#[tokio::test]
async fn a_freeze_that_happens_after_it_failed_is_undone() {
    let guest = Guest::with(|state| (state.late, state.thaws_that_fail) = (true, 1));
    let failed = guest.guardian().await.freeze(LONG).await.err().unwrap();
    assert_eq!(failed.reason, "no answer");
    assert!(matches!(failed.thaw, Thaw::Done) && !guest.is_frozen());
}

#[tokio::test]
async fn a_guest_that_is_gone_needs_no_thaw() {
    let guest = Guest::with(|state| (state.thaws_that_fail, state.gone) = (u32::MAX, true));
    let frozen = guest.guardian().await.freeze(LONG).await.ok().unwrap();
    let thawed = frozen.thaw().await;
    assert!(matches!(thawed.thaw, Thaw::Done));
    assert_eq!(thawed.quiescence.level, Consistency::Crash);
}

#[tokio::test]
async fn a_program_that_is_no_guardian_is_replaced_by_a_thread() {
    let guest = Guest::default();
    for program in ["/bin/true", "/nonexistent/program"] {
        let subject = Subject::Libvirt { uri: String::new(), domain: Uuid::nil() };
        let own = Box::new(guest.clone());
        let program = Some(std::path::Path::new(program));
        let guardian = Guardian::start(program, subject, own).await.unwrap();
        let thawed = guardian.freeze(LONG).await.ok().unwrap().thaw().await;
        assert_eq!(thawed.quiescence.level, Consistency::Filesystem);
    }
}
