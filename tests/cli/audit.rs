//! The audit of dirty bitmaps: what an incremental looks at besides what changed.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use crate::support::{TestEnv, assert_same_content};

/// A qcow2 disk of 16 MiB, all data, with one full backup in the repository.
fn disk_with_a_point() -> (TestEnv, std::path::PathBuf) {
    let env = TestEnv::new();
    let raw: Vec<u8> = (0..4 << 20_u32).flat_map(|n: u32| (n * 7).to_le_bytes()).collect();
    fs::write(env.path("a.raw"), raw).unwrap();
    let (from, image) = (env.path("a.raw"), env.path("a.qcow2"));
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    let paths = [from.to_str().unwrap(), image.to_str().unwrap()];
    env.run("qemu-img", &[&convert[..], &paths].concat()).ok();
    env.vmbackup(&["repo", "init", "--no-key"]).ok();
    assert_eq!(backup(&env, &image, &[])["disks"][0]["read"]["mode"], "full");
    (env, image)
}

fn backup(env: &TestEnv, image: &Path, extra: &[&str]) -> Value {
    let image = image.to_str().unwrap();
    let common = ["backup", "--image", image, "--name", "foo", "--json"];
    env.vmbackup(&[&common[..], extra].concat()).json()
}

/// Where the cluster at this offset of the disk lies in the image.
fn host_offset(env: &TestEnv, image: &Path, offset: u64) -> u64 {
    let map = env.run("qemu-img", &["map", "--output=json", image.to_str().unwrap()]).json();
    let extents = map.as_array().unwrap().iter();
    let start = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let found = extents.rev().find(|extent| start(extent, "start") <= offset).unwrap();
    start(found, "offset") + offset - start(found, "start")
}

fn write_behind_the_bitmap(env: &TestEnv, image: &Path, offset: u64) {
    let host = host_offset(env, image, offset);
    let file = fs::File::options().write(true).open(image).unwrap();
    file.write_all_at(b"written behind the bitmap's back", host).unwrap();
}

#[test]
fn a_bitmap_that_lies_is_caught_and_the_disk_read_whole() {
    let (env, image) = disk_with_a_point();
    let write = ["-f", "qcow2", "-c", "write -P 9 1M 64k", image.to_str().unwrap()];
    env.run("qemu-io", &write).ok();
    write_behind_the_bitmap(&env, &image, 9 << 20);
    let image_arg = image.to_str().unwrap();
    let outcome = env.vmbackup(&["backup", "--image", image_arg, "--name", "foo", "--json"]);
    assert!(outcome.stderr.contains("wrong: it calls the block at offset 9437184"), "{outcome:?}");
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let disk = &report["disks"][0];
    assert_eq!(disk["read"]["reason"], "bitmap-distrusted", "{report}");
    assert_eq!(disk["audit"]["differs_at"], 9 << 20, "{report}");

    let to = env.path("restored");
    env.vmbackup(&["restore", "foo@latest", "--to", to.to_str().unwrap()]).ok();
    assert_same_content(&env, (&image, "qcow2"), (&to.join("a.raw"), "raw"));
    let show = env.vmbackup(&["show", "foo@latest", "--json"]).json();
    assert_eq!(show["disks"][0]["audit"], disk["audit"], "recorded in the point");
}

#[test]
fn an_honest_bitmap_passes_and_can_be_trusted_unseen() {
    let (env, image) = disk_with_a_point();
    let report = backup(&env, &image, &[]);
    let disk = &report["disks"][0];
    assert_eq!(disk["read"]["mode"], "incremental", "{report}");
    assert_eq!(disk["audit"]["chunks"], 64, "{report}");
    assert_eq!(disk["read_bytes"], 0, "what the audit reads is not what changed");
    let report = backup(&env, &image, &["--audit", "0"]);
    assert_eq!(report["disks"][0]["audit"], Value::Null, "{report}");

    // Without the audit a lie goes unseen: this is what it is for.
    write_behind_the_bitmap(&env, &image, 9 << 20);
    let report = backup(&env, &image, &["--audit", "0"]);
    assert_eq!(report["disks"][0]["read"]["mode"], "incremental", "{report}");
}

#[test]
fn a_share_that_is_none_is_refused() {
    let env = TestEnv::new();
    for wrong in ["101", "-1", "much", "nan%"] {
        let audit = format!("--audit={wrong}");
        let outcome =
            env.vmbackup(&["full", "--image", "a.raw,format=raw", "--name", "foo", &audit]);
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        assert!(outcome.stderr.contains("percentage"), "{outcome:?}");
    }
}

/// An incremental that cannot read its base's tree is none; what is read in full heals.
#[test]
fn a_damaged_base_is_read_in_full_and_healed() {
    let (env, image) = disk_with_a_point();
    let packs = env.run("find", &[env.repo().join("packs").to_str().unwrap(), "-type", "f"]).text();
    let size = |path: &&str| fs::metadata(path).unwrap().len();
    let nodes = packs.lines().min_by_key(size).unwrap();
    let mut bytes = fs::read(nodes).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle] ^= 1;
    env.run("chmod", &["u+w", nodes]).ok();
    fs::write(nodes, bytes).unwrap();
    let report = backup(&env, &image, &[]);
    assert_eq!(report["disks"][0]["read"]["reason"], "base-damaged", "{report}");
    let to = env.path("restored");
    env.vmbackup(&["restore", "foo@latest", "--to", to.to_str().unwrap()]).ok();
    assert_same_content(&env, (&image, "qcow2"), (&to.join("a.raw"), "raw"));
}
