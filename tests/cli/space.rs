//! A repository whose file system is full: what cannot be done says what to do, and the way out
//! works.

use std::fs;

use crate::fixture::Fixture;
use crate::support::SmallDisk;

/// Fills a file system up to so many free bytes.
fn fill(small: &SmallDisk, name: &str, free: u64) {
    let space = rustix::fs::statvfs(&small.path).unwrap();
    let bytes = (space.f_bavail * space.f_frsize).checked_sub(free).unwrap();
    fs::write(small.path.join(name), vec![1; usize::try_from(bytes).unwrap()]).unwrap();
}

#[test]
fn a_full_repository_is_emptied_by_forget_and_gc_once_there_is_a_little_room() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let small = SmallDisk::mount(env.dir(), "10M");
    let repo = small.path.join("repo").display().to_string();
    env.vmbackup(&["repo", "init", "--no-key", "--repo", &repo]).ok();
    let run = |args: &[&str]| env.vmbackup(&[args, &["--repo", &repo]].concat());
    // The first point's data is its own; a third of the second's is the third's, too.
    let point = |seed: &[u8], len| {
        fixture.write(0, seed, len);
        let report = fixture.back_up(&["full", "--json", "--repo", &repo]).json();
        report["point"].as_str().unwrap().to_owned()
    };
    let first = point(b"first", 2_500_000);
    let second = point(b"second", 2_500_000);
    let third = point(b"third", 1_700_000);
    fill(&small, "some", 256 << 10);
    fill(&small, "rest", 0);
    for args in [&["forget", &first][..], &["gc"]] {
        let outcome = run(args).fails_with(&[&repo, "make room", "'forget' and 'gc' free more"]);
        assert_eq!(outcome.code, Some(9), "{outcome:?}");
    }
    run(&["verify", &first]).ok();
    fs::remove_file(small.path.join("rest")).unwrap();
    run(&["forget", &first, &second]).ok();
    // What is left of the second fits nowhere until the first is gone.
    let report = run(&["gc", "--json"]).json();
    assert_eq!(report["forgotten"], 2, "{report}");
    assert!(report["freed_bytes"].as_u64().unwrap() > 4_800_000, "{report}");
    assert!(report["repacked_bytes"].as_u64().unwrap() > 500_000, "{report}");
    let again = run(&["gc", "--json"]).json();
    assert_eq!(again["repacked_bytes"], 0, "{again}");
    run(&["verify", &third]).ok();
    run(&["check", "--read-data"]).ok();
}
