//! `restore --salvage`: all that can be read is restored, damage is zeroes and on a list, and nothing
//! else ever becomes zeroes.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{Outcome, TestEnv, assert_same_content};

/// Size of the disk: three nodes of its tree over chunks, and an odd tail.
const DISK_BYTES: u64 = (160 << 20) + 4096;

/// A repository with one point of a raw image: 1.5 MiB of data in each 64 MiB.
struct Bed {
    env: TestEnv,
    image: PathBuf,
    point: String,
}

impl Bed {
    fn new() -> Self {
        let env = TestEnv::new();
        let image = env.path("a.raw");
        let file = fs::File::create(&image).unwrap();
        file.set_len(DISK_BYTES).unwrap();
        let mut bytes = vec![0; 3 << 19];
        for (seed, offset) in [(1_u8, 5 << 20), (2, 70 << 20), (3, DISK_BYTES - (3 << 19))] {
            blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
            file.write_all_at(&bytes, offset).unwrap();
        }
        env.init_repo();
        let bed = Self { env, image, point: String::new() };
        let point = bed.back_up("full")["point"].as_str().unwrap().to_owned();
        Self { point, ..bed }
    }

    fn back_up(&self, command: &str) -> Value {
        let spec = format!("{},format=raw", self.image.display());
        self.env.vmbackup(&[command, "--image", &spec, "--name", "foo", "--json"]).json()
    }

    fn packs(&self) -> Vec<PathBuf> {
        let packs = self.env.repo().join("packs");
        let packs = self.env.run("find", &[packs.to_str().unwrap(), "-type", "f"]).text();
        packs.lines().map(PathBuf::from).collect()
    }

    /// The pack of chunks: by far the largest.
    fn data_pack(&self) -> PathBuf {
        self.packs().into_iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap()
    }

    /// The pack of tree nodes: the one that says so in its header.
    fn tree_pack(&self) -> PathBuf {
        let of_disk = |path: &PathBuf| fs::read(path).unwrap()[6] == 3;
        let packs = self.packs().into_iter().filter(of_disk);
        packs.max_by_key(|path| path.metadata().unwrap().len()).unwrap()
    }

    fn salvage(&self, args: &[&str]) -> Outcome {
        let common = ["restore", &self.point, "--salvage", "--json"];
        self.env.vmbackup(&[&common[..], args].concat())
    }

    /// What the disk held, with zeroes in the ranges.
    fn with_zeroes(&self, ranges: &[Value]) -> PathBuf {
        let copy = self.env.path("expected.raw");
        let paths = [self.image.to_str().unwrap(), copy.to_str().unwrap()];
        self.env.run("cp", &[&["--sparse=always"][..], &paths].concat()).ok();
        let file = fs::File::options().write(true).open(&copy).unwrap();
        for range in ranges {
            let (offset, bytes) = (range["offset"].as_u64().unwrap(), &range["bytes"]);
            let zeroes = vec![0; usize::try_from(bytes.as_u64().unwrap()).unwrap()];
            file.write_all_at(&zeroes, offset).unwrap();
        }
        copy
    }
}

fn rot(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Salvages, and holds the disk against the list; the list.
fn assert_salvages(bed: &Bed, told: &str, format: &str) -> Vec<Value> {
    let to = bed.env.path(&format!("salvaged-{format}"));
    let outcome = bed.salvage(&["--to", to.to_str().unwrap(), "--format", format]);
    assert_eq!(outcome.code, Some(10), "{told}: {outcome:?}");
    assert!(outcome.stderr.contains("damaged and restored as zeroes"), "{told}: {outcome:?}");
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let ranges = report["salvage"]["ranges"].as_array().unwrap().clone();
    assert!(!ranges.is_empty(), "{told}: {report}");
    let sum: u64 = ranges.iter().map(|range| range["bytes"].as_u64().unwrap()).sum();
    assert_eq!(report["disks"][0]["damaged_bytes"], sum, "{told}: {report}");
    assert_eq!(report["salvage"]["damaged_bytes"], sum, "{told}: {report}");
    let list: Value = serde_json::from_slice(&fs::read(to.join("damaged.json")).unwrap()).unwrap();
    assert_eq!(list["ranges"], report["salvage"]["ranges"], "{told}");
    assert_eq!(
        (&list["document"], &list["point"]),
        (&"damaged".into(), &bed.point.as_str().into())
    );
    let restored = to.join(format!("a.{format}"));
    let expected = bed.with_zeroes(&ranges);
    assert_same_content(&bed.env, (&expected, "raw"), (&restored, format));
    fs::remove_dir_all(&to).unwrap();
    ranges
}

#[test]
fn all_but_the_listed_ranges_is_restored_and_those_are_zeroes() {
    for damage in ["a rotten chunk", "a missing pack", "a rotten node"] {
        let bed = Bed::new();
        match damage {
            "a rotten chunk" => rot(&bed.data_pack(), 1 << 20),
            "a missing pack" => fs::remove_file(bed.data_pack()).unwrap(),
            _ => rot(&bed.tree_pack(), 50),
        }
        let to = bed.env.path("refused");
        let refused = bed.env.vmbackup(&["restore", &bed.point, "--to", to.to_str().unwrap()]);
        assert_eq!(refused.code, Some(10), "{damage}: {refused:?}");
        assert!(refused.stderr.contains("--salvage"), "{damage}: {refused:?}");
        assert!(refused.stderr.contains("check --read-data"), "{damage}: {refused:?}");
        assert!(!to.exists(), "{damage}");

        let ranges = assert_salvages(&bed, damage, "raw");
        assert_eq!(ranges, assert_salvages(&bed, damage, "qcow2"), "{damage}");
        let bytes: u64 = ranges.iter().map(|range| range["bytes"].as_u64().unwrap()).sum();
        match damage {
            "a rotten chunk" => assert_eq!(bytes, 256 << 10, "{ranges:?}"),
            "a missing pack" => assert!((4 << 20..6 << 20).contains(&bytes), "{ranges:?}"),
            _ => assert_eq!(bytes, 64 << 20, "{ranges:?}"),
        }
    }
}

/// A disk can hold its list nowhere, so this host does.
#[test]
fn a_device_is_salvaged_whole_and_the_list_is_where_it_is_said() {
    let bed = Bed::new();
    rot(&bed.data_pack(), 1 << 20);
    let device = bed.env.path("device");
    fs::write(&device, vec![0xee; usize::try_from(DISK_BYTES).unwrap()]).unwrap();
    let outcome = bed.salvage(&["--to-device", &format!("a={}", device.display())]);
    assert_eq!(outcome.code, Some(10), "{outcome:?}");
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let list = report["salvage"]["list"].as_str().unwrap();
    assert!(outcome.stderr.contains(list), "{outcome:?}");
    let written: Value = serde_json::from_slice(&fs::read(list).unwrap()).unwrap();
    assert_eq!(written["ranges"], report["salvage"]["ranges"]);
    let expected = bed.with_zeroes(report["salvage"]["ranges"].as_array().unwrap());
    assert!(fs::read(device).unwrap() == fs::read(expected).unwrap());
}

#[test]
fn a_sound_point_is_salvaged_with_an_empty_list_and_success() {
    let bed = Bed::new();
    let to = bed.env.path("to");
    let report = bed.salvage(&["--to", to.to_str().unwrap()]).json();
    assert_eq!(report["salvage"]["ranges"], serde_json::json!([]), "{report}");
    let list: Value = serde_json::from_slice(&fs::read(to.join("damaged.json")).unwrap()).unwrap();
    assert_eq!(list["ranges"], serde_json::json!([]));
    assert_same_content(&bed.env, (&bed.image, "raw"), (&to.join("a.raw"), "raw"));
    // A list of another restore is not replaced unasked, and neither is it left to lie.
    fs::remove_file(to.join("a.raw")).unwrap();
    let again = bed.salvage(&["--to", to.to_str().unwrap()]);
    assert_eq!(again.code, Some(5), "{again:?}");
    fs::write(to.join("damaged.json"), "old").unwrap();
    bed.salvage(&["--to", to.to_str().unwrap(), "--force"]).ok();
    assert!(fs::read(to.join("damaged.json")).unwrap().starts_with(b"{"));
}

#[test]
fn a_damaged_index_is_rebuilt_first_and_not_taken_for_damaged_data() {
    let bed = Bed::new();
    fs::remove_dir_all(bed.env.repo().join("index")).unwrap();
    let to = bed.env.path("to");
    let args = ["--to", to.to_str().unwrap()];
    let refused = bed.salvage(&args);
    assert_eq!(refused.code, Some(10), "{refused:?}");
    assert!(refused.stderr.contains("--rebuild-index"), "{refused:?}");
    assert!(!to.exists());
    bed.env.vmbackup(&["check", "--rebuild-index"]).ok();
    let report = bed.salvage(&args).json();
    assert_eq!(report["salvage"]["ranges"], serde_json::json!([]), "{report}");
}

/// What makes the repository sound again, as far as the VM still has it.
#[test]
fn the_next_full_backup_heals_what_was_salvaged() {
    let bed = Bed::new();
    rot(&bed.data_pack(), 1 << 20);
    assert_salvages(&bed, "before", "raw");
    bed.back_up("backup");
    let to = bed.env.path("healed");
    let report = bed.salvage(&["--to", to.to_str().unwrap()]).json();
    assert_eq!(report["salvage"]["ranges"], serde_json::json!([]), "{report}");
    assert_same_content(&bed.env, (&bed.image, "raw"), (&to.join("a.raw"), "raw"));
}

#[test]
fn what_is_salvaged_is_never_started_unseen() {
    let bed = Bed::new();
    let outcome = bed.salvage(&["--define", "--start"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
}

/// A path that JSON cannot hold once failed a restore that had done its work.
#[test]
fn a_restore_to_a_path_that_is_no_text_reports_like_any_other() {
    use std::os::unix::ffi::OsStrExt;
    let bed = Bed::new();
    let to = bed.env.dir().join(std::ffi::OsStr::from_bytes(b"to-\xff"));
    let mut command = bed.env.vmbackup_command(&["restore", &bed.point, "--json", "--to"]);
    let report = Outcome::of(command.arg(&to)).json();
    assert!(report["disks"][0]["path"].as_str().unwrap().ends_with("to-\u{fffd}/a.raw"));
    assert_same_content(&bed.env, (&bed.image, "raw"), (&to.join("a.raw"), "raw"));
}
