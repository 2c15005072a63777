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
    let scratch: Vec<_> = left[0].objects(Phase::Scratch).collect();
    assert_eq!(scratch, [Path::new("/s/a"), Path::new("/s/b")]);
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
    // Whoever writes over it leaves it to people.
    let mut journal = journals.open(VM).unwrap();
    journal.begin(run(1));
    journal.note([Entry::of(Phase::Job)]).unwrap();
    let aside = journals.path(VM).with_extension("unreadable");
    assert_eq!(std::fs::read_to_string(aside).unwrap(), "{\"version\":2,\"runs\":[]}");
    assert!(!journals.open(VM).unwrap().is_unreadable());
    assert_eq!(journals.vms().unwrap(), [VM]);
}

#[test]
fn paths_that_are_no_text_come_back_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let journals = journals(dir.path());
    let odd = || PathBuf::from(std::ffi::OsString::from_vec(b"/s/\xe9".to_vec()));
    for place in [
        Place::Qemu { monitor: odd(), agent: Some(odd()), name: None },
        Place::Images { images: vec![(odd(), "raw".into()), ("/s/b".into(), "qcow2".into())] },
    ] {
        let mut journal = journals.open(VM).unwrap();
        journal.begin(Run { place, ..run(1) });
        journal.note([Entry::files(Phase::Scratch, [odd()])]).unwrap();
        let left = journals.open(VM).unwrap();
        assert_eq!(left.runs, journal.runs);
        assert_eq!(left.runs[0].objects(Phase::Scratch).collect::<Vec<_>>(), [odd()]);
        journal.finish().unwrap();
    }
}

#[test]
fn runs_for_another_repository_stay_open_when_one_has_judged_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let journals = journals(dir.path());
    for (id, repository) in [(1, "00c0ffee"), (2, "0000cafe")] {
        let mut journal = journals.open(VM).unwrap();
        journal.begin(Run { repository: repository.into(), ..run(id) });
        journal.note([Entry::of(Phase::Bitmap)]).unwrap();
    }
    let mut journal = journals.open(VM).unwrap();
    journal.begin(run(3));
    journal.undone_for_repository(&Phase::ALL).unwrap();
    let left: Vec<_> = journals.open(VM).unwrap().earlier().map(|run| run.point).collect();
    assert_eq!(left, [PointId([2; 16])]);
}

#[test]
fn what_is_handed_over_is_kept_for_its_repository_until_nothing_of_it_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let journals = journals(dir.path());
    let [a, b, c] = [1, 2, 3].map(|id| PointId([id; 16]));
    let mut journal = journals.open(VM).unwrap();
    // Nobody's.
    journal.hand_over("00c0ffee", &[a]).unwrap();
    assert_eq!(journals.vms().unwrap(), Vec::<Uuid>::new());
    for (id, repository, points) in [(4, "0000cafe", &[c][..]), (5, "00c0ffee", &[a, b])] {
        let mut journal = journals.open(VM).unwrap();
        journal.begin(Run { repository: repository.into(), ..run(id) });
        journal.hand_over(repository, points).unwrap();
    }
    let mut journal = journals.open(VM).unwrap();
    assert_eq!(journal.handed_over("00c0ffee"), [a, b]);
    journal.begin(run(6));
    journal.hand_over("00c0ffee", &[b]).unwrap();
    journal.undone(PointId([6; 16]), &Phase::all_but(&[Phase::Handover])).unwrap();
    let mut journal = journals.open(VM).unwrap();
    assert_eq!(journal.handed_over("00c0ffee"), [b]);
    assert_eq!(journal.earlier().count(), 2, "the run that had them before is over");
    for repository in ["00c0ffee", "0000cafe"] {
        assert_eq!(journals.vms().unwrap(), [VM]);
        journal.hand_over(repository, &[]).unwrap();
    }
    assert_eq!(journals.vms().unwrap(), Vec::<Uuid>::new());
}

#[test]
fn a_file_that_cannot_be_removed_is_said_to_stay() {
    let dir = tempfile::tempdir().unwrap();
    let journals = journals(dir.path());
    let point = PointId([1; 16]);
    // Below a file nothing can be looked for, not even by root.
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "").unwrap();
    let there = dir.path().join(format!("vmb-{}.scratch", point.short()));
    std::fs::write(&there, "").unwrap();
    let not = plain.join(format!("vmb-{}.scratch", point.short()));
    let mut journal = journals.open(VM).unwrap();
    journal.begin(run(1));
    journal.note([Entry::files(Phase::Scratch, [&there, &not])]).unwrap();
    let next = journals.open(VM).unwrap();
    let mut recovery = Recovery::new(Mode::Undo);
    let noted = next.noted_files(&[Phase::Scratch]);
    let stays = |directory: &Path, recovery: &mut Recovery| {
        noted[directory].iter().map(|file| file.remove(recovery)).collect::<Vec<_>>()
    };
    assert_eq!(stays(dir.path(), &mut recovery), [false]);
    assert_eq!(stays(&plain, &mut recovery), [true]);
    let items = recovery.into_items();
    assert_eq!(items[0].action, Action::Undone);
    assert_eq!((items[1].action, items[1].what.contains("plain")), (Action::Kept, true));
    assert!(!there.exists());
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
