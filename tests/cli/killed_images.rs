//! A backup of the images of a stopped VM that is killed at any step: nobody is kept from the images, the
//! next command undoes what is left, the next incremental is right, and nothing of ours remains.

use std::path::{Path, PathBuf};

use crate::support::{
    TestEnv, assert_same_content, is_asked_for, steps, stopped_takes, wait_until,
};

const IMAGES: [&str; 2] = ["a.qcow2", "b.qcow2"];

fn write(env: &TestEnv, image: &str, offset: usize) {
    let write = format!("write -q -P 0x77 {offset} 20k");
    env.run("qemu-io", &["-f", "qcow2", "-c", &write, image]).ok();
}

/// Names of the bitmaps in an image, which nobody has open.
fn bitmaps(env: &TestEnv, image: &str) -> Vec<String> {
    let info = env.run("qemu-img", &["info", "--output=json", image]).json();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned();
    let name = |bitmap: &serde_json::Value| bitmap["name"].as_str().expect("a name").to_owned();
    bitmaps.unwrap_or_default().iter().map(name).collect()
}

#[test]
fn a_backup_of_images_can_be_killed_at_any_step() {
    let env = TestEnv::new();
    env.init_repo();
    for image in IMAGES {
        env.run("qemu-img", &["create", "-q", "-f", "qcow2", image, "8M"]).ok();
        write(&env, image, 1 << 20);
    }
    let backup = |command: &'static str| {
        vec![command, "--name", "web", "--image", IMAGES[0], "--image", IMAGES[1], "--json"]
    };
    env.vmbackup(&backup("full")).ok();
    for (at, step) in steps(stopped_takes).iter().enumerate() {
        write(&env, IMAGES[0], at * 300_000);
        let run = env.stopped_at(step, &backup("backup"));
        run.signal("KILL");
        run.wait();
        // Its locks ended with it.
        wait_until(&format!("{step}: processes end"), 20, || env.processes().is_empty());
        write(&env, IMAGES[0], at * 300_000 + 100_000);
        if is_asked_for(at) {
            env.vmbackup(&["recover"]).ok();
        }
        let report = env.vmbackup(&backup("incremental")).json();
        let point = report["point"].as_str().expect("a point id");
        let to = env.path(point).to_string_lossy().into_owned();
        env.vmbackup(&["restore", point, "--to", &to, "--format", "qcow2"]).ok();
        for (disk, image) in IMAGES.iter().enumerate() {
            assert_eq!(report["disks"][disk]["read"]["mode"], "incremental", "{step}: {report}");
            let restored = Path::new(&to).join(image);
            assert_same_content(&env, (&restored, "qcow2"), (&env.path(image), "qcow2"));
            let held = bitmaps(&env, image);
            assert!(held.len() == 1 && held[0].contains(point), "{step}: {held:?}");
        }
        let journals = std::fs::read_dir(env.path("state/journal")).into_iter().flatten().flatten();
        let journals: Vec<PathBuf> = journals.map(|entry| entry.path()).collect();
        assert_eq!(journals, Vec::<PathBuf>::new(), "{step}");
        env.assert_nothing_runs(step);
    }
}
