//! A restore into a directory that is killed at any step: each file is wholly the old one or the
//! new one, the next command clears away and says so, and a restore done again succeeds.

use std::fs;
use std::path::Path;

use crate::support::{Restored, TestEnv, assert_same_content, is_asked_for, steps, write_pattern};

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A repository with a point of two disks (three with the one that goes to a device), and how the
/// images in `out` look like before the restore.
fn prepare(env: &TestEnv) -> String {
    env.init_repo();
    for (name, byte) in [("a.raw", 1), ("b.raw", 2), ("c.raw", 3)] {
        let path = env.path(name);
        fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
        write_pattern(env, (&env.path(name), "raw"), byte);
    }
    let images = ["--image", "a.raw", "--image", "b.raw", "--image", "c.raw"];
    let full = ["full", "--name", "web", "--json"];
    let report = env.vmbackup(&[&full[..], &images].concat()).json();
    report["point"].as_str().unwrap().to_owned()
}

/// `out` with images of before, and a file that stands for a device.
fn reset(env: &TestEnv) {
    let out = env.path("out");
    let _ = fs::remove_dir_all(&out);
    fs::create_dir(&out).unwrap();
    for name in ["out/a.raw", "out/b.raw", "device"] {
        fs::File::create(env.path(name)).unwrap().set_len(8 << 20).unwrap();
        write_pattern(env, (&env.path(name), "raw"), 9);
    }
    fs::copy(env.path("device"), env.path("before.raw")).unwrap();
}

#[test]
fn a_restore_into_a_directory_can_be_killed_at_any_step() {
    let env = TestEnv::new();
    let point = prepare(&env);
    let device = format!("c={}", env.path("device").display());
    let restore = ["restore", &point, "--to", "out", "--to-device", &device, "--force"];
    for (at, step) in steps(|phase| Restored::Disks.takes(phase)).into_iter().enumerate() {
        reset(&env);
        let run = env.stopped_at(&step, &restore);
        run.signal("KILL");
        run.wait();
        // Asked for, or found by whoever comes next.
        let said = if is_asked_for(at) {
            let recover = |args: &[&str]| env.vmbackup(&[&["recover"], args].concat()).ok().stdout;
            let looked = recover(&["--dry-run"]);
            let said = recover(&[]);
            assert_eq!(looked.replace("would undo", "undone"), said, "{step}");
            said
        } else {
            let images = ["--image", "a.raw", "--image", "b.raw", "--image", "c.raw"];
            env.vmbackup(&[&["backup", "--name", "web"], &images[..]].concat()).ok().stderr
        };
        assert_eq!(names(&env.path("out")), ["a.raw", "b.raw"], "{step}: {said}");
        let of = if step.ends_with(":discard") { ["a.raw", "b.raw"] } else { ["before.raw"; 2] };
        for (name, of) in ["out/a.raw", "out/b.raw"].iter().zip(of) {
            assert_same_content(&env, (&env.path(name), "raw"), (&env.path(of), "raw"));
        }
        if step != "before:temporary" && step != "after:discard" {
            assert!(said.contains("killed restore"), "{step}: {said}");
        }
        assert_eq!(said.contains("device "), !step.ends_with(":discard"), "{step}: {said}");
        assert_eq!(names(&env.path("state/journal")), Vec::<String>::new(), "{step}");
        assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
        env.assert_nothing_runs(&step);

        env.vmbackup(&restore).ok();
        for (name, of) in [("out/a.raw", "a.raw"), ("out/b.raw", "b.raw"), ("device", "c.raw")] {
            assert_same_content(&env, (&env.path(name), "raw"), (&env.path(of), "raw"));
        }
        assert_eq!(names(&env.path("out")), ["a.raw", "b.raw"], "{step}");
        assert_eq!(names(&env.path("state/journal")), Vec::<String>::new(), "{step}");
    }
}

/// Nothing has a name yet that anybody knows: all of it goes, and the directory that was made for
/// it.
#[test]
fn a_killed_restore_that_had_put_nothing_in_place_leaves_nothing() {
    let env = TestEnv::new();
    let point = prepare(&env);
    for (at, step) in ["before:temporary", "after:temporary", "before:place"].iter().enumerate() {
        let restore = ["restore", &point, "--to", "fresh"];
        let run = env.stopped_at(step, &restore);
        run.signal("KILL");
        run.wait();
        assert!(*step == "before:temporary" || !names(&env.path("fresh")).is_empty());
        // Asked for, or by the restore that is done again.
        if at % 2 == 0 {
            env.vmbackup(&["recover"]).ok();
            assert!(!env.path("fresh").exists(), "{step}: {:?}", names(&env.path("fresh")));
        }
        env.vmbackup(&restore).ok();
        assert_eq!(names(&env.path("fresh")), ["a.raw", "b.raw", "c.raw"], "{step}");
        assert_eq!(names(&env.path("state/journal")), Vec::<String>::new(), "{step}");
        fs::remove_dir_all(env.path("fresh")).unwrap();
    }
}

/// Somebody takes what lies there for good and writes to it: no recovery may take it away.
#[test]
fn what_is_used_after_a_killed_restore_is_never_taken_away() {
    let env = TestEnv::new();
    let point = prepare(&env);
    let restore = ["restore", &point, "--to", "out", "--disk", "a", "--disk", "b", "--force"];
    reset(&env);
    let run = env.stopped_at("after:place", &restore);
    run.signal("KILL");
    run.wait();
    let new: Vec<_> = ["out/a.raw", "out/b.raw"]
        .into_iter()
        .filter(|name| {
            fs::read(env.path(name)).unwrap() != fs::read(env.path("before.raw")).unwrap()
        })
        .collect();
    assert_eq!(new.len(), 1, "one of two has its name");
    write_pattern(&env, (&env.path(new[0]), "raw"), 77);
    let used = fs::read(env.path(new[0])).unwrap();
    for _ in 0..2 {
        let said = env.vmbackup(&["recover"]).ok().stdout;
        assert!(said.contains("stays: ") && said.contains("used since"), "{said}");
        assert!(said.contains("puts it back"), "{said}");
        assert_eq!(fs::read(env.path(new[0])).unwrap(), used);
    }
    // What it replaced is whole, under the name that was told.
    let kept = names(&env.path("out"));
    let kept: Vec<_> =
        kept.iter().filter(|name| name.starts_with(&format!(".{}", &new[0][4..]))).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    let kept = env.path("out").join(kept[0]);
    assert_eq!(fs::read(&kept).unwrap(), fs::read(env.path("before.raw")).unwrap());
    // Whoever does as he was told is rid of it.
    fs::rename(&kept, env.path(new[0])).unwrap();
    env.vmbackup(&["recover"]).ok();
    assert_eq!(names(&env.path("out")), ["a.raw", "b.raw"]);
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
}

#[test]
fn a_restore_that_lives_is_not_taken_for_killed() {
    let env = TestEnv::new();
    let point = prepare(&env);
    reset(&env);
    let restore = ["restore", &point, "--to", "out", "--disk", "a", "--force"];
    let run = env.stopped_at("before:discard", &restore);
    assert_eq!(env.vmbackup(&["recover"]).ok().stdout, "nothing is left to undo\n");
    assert_eq!(names(&env.path("out")).len(), 3);
    run.signal("CONT");
    assert_eq!(run.wait().code, Some(0));
    assert_eq!(names(&env.path("out")), ["a.raw", "b.raw"]);
}

/// A seed that is new each time.
fn seed() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().subsec_nanos() | 1
}

/// Moments between 0 and `limit` ms.
fn moments(seed: u32, limit: u64) -> impl Iterator<Item = std::time::Duration> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        // xorshift32 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        std::time::Duration::from_millis(u64::from(state) % limit)
    })
}

#[test]
#[ignore = "soak: two hundred restores are killed"]
fn a_restore_into_a_directory_can_be_killed_at_any_moment() {
    let env = TestEnv::new();
    let point = prepare(&env);
    let restore = ["restore", &point, "--to", "out", "--disk", "a", "--disk", "b", "--force"];
    let seed = seed();
    for moment in moments(seed, 400).take(200) {
        reset(&env);
        let run = env.spawn_vmbackup(&restore);
        std::thread::sleep(moment);
        run.signal("KILL");
        run.wait();
        let said = env.vmbackup(&["recover"]).ok().stdout;
        assert_eq!(names(&env.path("out")), ["a.raw", "b.raw"], "seed {seed}, {moment:?}: {said}");
        assert_eq!(
            names(&env.path("state/journal")),
            Vec::<String>::new(),
            "seed {seed}, {moment:?}: {said}"
        );
        let read = |name: &str| fs::read(env.path(name)).unwrap();
        let is_new = ["a.raw", "b.raw"].map(|name| read(&format!("out/{name}")) == read(name));
        let is_old = ["out/a.raw", "out/b.raw"].map(|name| read(name) == read("before.raw"));
        assert!(
            is_new == [true; 2] || is_old == [true; 2],
            "seed {seed}, {moment:?}: {is_new:?} {is_old:?}"
        );
    }
}
