//! The journal: durable before, gone after, never lost by what cannot be read.

use std::os::unix::ffi::OsStringExt;

use super::*;

const VM: Uuid = Uuid::from_u128(7);

fn run(id: u8) -> Run {
    let place = Place::Libvirt { uri: "qemu:///system".into() };
    Run::new(PointId([id; 16]), "foo", "00c0ffee", place)
}

fn journals(directory: &Path) -> Journals {
    Journals::new(directory.join("journal"), None)
}

#[test]
fn every_phase_is_listed_once_and_called_as_in_the_file() {
    for (at, phase) in Phase::ALL.into_iter().enumerate() {
        // A variant that is not in the list has its discriminant here.
        assert_eq!(phase as usize, at, "{phase}");
        assert_eq!(serde_json::to_string(&phase).unwrap(), format!("\"{phase}\""));
    }
    // The match of `word` makes whoever adds one come by; this is the last.
    assert_eq!(Phase::ALL.len(), Phase::Discard as usize + 1);
}

#[test]
fn what_a_run_noted_is_there_for_the_next_and_gone_when_it_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let journals = journals(dir.path());
    let mut journal = journals.open(VM).unwrap();
    journal.begin(run(1));
    assert_eq!(journals.vms().unwrap(), Vec::<Uuid>::new(), "nothing to undo yet");
    journal.note([Entry::files(Phase::Scratch, ["/s/a"]), Entry::of(Phase::Job)]).unwrap();
    journal.note([Entry::files(Phase::Scratch, ["/s/a", "/s/b"])]).unwrap();
    assert_eq!(journals.vms().unwrap(), [VM]);
    // Killed here.
    let mut next = journals.open(VM).unwrap();
    let left: Vec<_> = next.earlier().cloned().collect();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].objects(Phase::Scratch).collect::<Vec<_>>(), ["/s/a", "/s/b"]);
    assert!(left[0].has(Phase::Job) && !left[0].is_before_boot());
    assert!(next.owns(PointId([1; 16])) && !next.owns(PointId([2; 16])));
    next.begin(run(2));
    next.note([Entry::of(Phase::Freeze)]).unwrap();
    next.undone_earlier(&[Phase::Scratch]).unwrap();
    next.finish().unwrap();
    // The job of the first may still begin.
    let last = journals.open(VM).unwrap();
    assert_eq!(
        last.earlier().map(|run| run.entries.clone()).collect::<Vec<_>>(),
        [[Entry::of(Phase::Job)]]
    );
    next.undone(PointId([1; 16]), &[Phase::Job]).unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("journal")).unwrap().count(), 0);
}

#[test]
fn a_journal_that_makes_no_sense_is_not_taken_for_none() {
    let dir = tempfile::tempdir().unwrap();
    let journals = journals(dir.path());
    std::fs::create_dir(dir.path().join("journal")).unwrap();
    for text in ["", "{\"runs\":", "\u{0}\u{0}", "{\"version\":2,\"runs\":[]}"] {
        std::fs::write(journals.path(VM), text).unwrap();
        assert!(journals.open(VM).unwrap().is_unreadable(), "{text:?}");
    }
}

#[test]
fn runs_that_are_never_undone_do_not_grow_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let journals = journals(dir.path());
    for id in 0..100 {
        let mut journal = journals.open(VM).unwrap();
        journal.begin(run(id));
        journal.note([Entry::of(Phase::Job)]).unwrap();
    }
    let journal = journals.open(VM).unwrap();
    assert_eq!(journal.earlier().count(), file::RUNS_MAX);
    assert!(journal.owns(PointId([99; 16])) && !journal.owns(PointId([0; 16])));
}

#[test]
fn a_boot_is_told_from_the_one_before() {
    let mut old = run(1);
    assert!(!old.is_before_boot());
    old.boot = "another".into();
    assert!(old.is_before_boot());
}

fn restore_run() -> RestoreRun {
    let text = |text: &str| text.to_owned();
    let (name, host, platform) = (text("foo"), text("h"), text("libvirt"));
    RestoreRun::new(PointId([1; 16]), crate::vm::VmIdentity { uuid: VM, name, host, platform })
}

/// The steps of the restores that were killed.
fn abandoned(journals: &Journals) -> Vec<Vec<Step>> {
    let found = journals.abandoned_restores().unwrap().into_iter();
    found
        .map(|found| match found {
            Abandoned::Restore(journal) => {
                assert_eq!(*journal.run(), restore_run());
                journal.steps().to_vec()
            }
            Abandoned::Unreadable(path) => panic!("{}", path.display()),
        })
        .collect()
}

#[test]
fn a_restore_is_found_once_it_is_gone_and_its_steps_are_whole() {
    let dir = tempfile::tempdir().unwrap();
    let journals = journals(dir.path());
    let mut journal = journals.begin_restore(restore_run(), 7).unwrap();
    let file = journal.path().to_owned();
    let name = std::ffi::OsString::from_vec(b"/\xff/image".to_vec());
    let temporary = journal.temporary(Path::new(&name)).unwrap();
    let steps = vec![Step::Temporary { temporary }];
    assert_eq!(abandoned(&journals), Vec::<Vec<Step>>::new(), "it lives");
    drop(journal);
    assert_eq!(abandoned(&journals), std::slice::from_ref(&steps));
    // Killed while it wrote the next: that step was not taken.
    let mut torn = std::fs::OpenOptions::new().append(true).open(&file).unwrap();
    std::io::Write::write_all(&mut torn, b"{\"step\":\"dis").unwrap();
    assert_eq!(abandoned(&journals), [steps]);
    for text in ["not a restore\n", "{\"version\":9}\n"] {
        std::fs::write(&file, text).unwrap();
        let found = journals.abandoned_restores().unwrap();
        assert!(matches!(found[..], [Abandoned::Unreadable(_)]), "{text}");
    }
    // Killed before it did anything.
    std::fs::write(&file, "{\"ver").unwrap();
    assert_eq!(abandoned(&journals), Vec::<Vec<Step>>::new());
    assert!(!file.exists());
}

#[test]
fn the_journal_of_a_restore_ends_with_its_last_temporary_name() {
    let dir = tempfile::tempdir().unwrap();
    let journals = journals(dir.path());
    let mut journal = journals.begin_restore(restore_run(), 7).unwrap();
    let temporary = journal.temporary(&dir.path().join("image")).unwrap();
    std::fs::write(&temporary, "").unwrap();
    journal.close().unwrap();
    assert_eq!(abandoned(&journals).len(), 1);
    let mut journal = journals.begin_restore(restore_run(), 8).unwrap();
    journal.temporary(&dir.path().join("image")).unwrap();
    journal.close().unwrap();
    assert_eq!(abandoned(&journals).len(), 1);
}
