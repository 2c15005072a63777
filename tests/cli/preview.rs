//! `restore --dry-run`: what it says is what the restore then does, and it changes nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::fixture::{DISK, DISK_BYTES, Fixture};
use crate::support::{Process, SmallDisk, TestEnv, is_listening, wait_until};

/// Everything below a directory.
fn tree(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(tree(&path));
        }
        found.push(path);
    }
    found.sort();
    found
}

/// The document of a dry run, whatever it found; and the exit code.
fn preview(env: &TestEnv, args: &[&str]) -> (Value, Option<i32>) {
    let outcome = env.vmbackup(&[args, &["--dry-run", "--json"]].concat());
    let document: Value = serde_json::from_str(&outcome.stdout).expect("one document");
    assert_eq!(document["document"], "restore-plan");
    (document, outcome.code)
}

fn problems(document: &Value) -> Vec<String> {
    let text = |problem: &Value| format!("{}: {}", problem["what"], problem["fix"]);
    document["problems"].as_array().unwrap().iter().map(text).collect()
}

#[test]
fn a_dry_run_foretells_the_restore_and_makes_nothing() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    let to = env.path("to");
    let args = ["restore", &point, "--to", to.to_str().unwrap()];
    // The cache of the repository is filled by whatever reads it.
    env.vmbackup(&["show", &point]).ok();
    let before = tree(env.dir());
    let (plan, code) = preview(env, &args);
    assert_eq!(code, Some(0), "{plan}");
    assert_eq!(tree(env.dir()), before);
    assert_eq!(problems(&plan), Vec::<String>::new());
    assert_eq!(plan["domain"], Value::Null);
    let disk = &plan["disks"][0];
    assert_eq!((&disk["replaces"], &disk["size_bytes"]), (&false.into(), &DISK_BYTES.into()));
    let done = env.vmbackup(&[&args[..], &["--json"]].concat()).json();
    for field in ["name", "size_bytes", "path", "format"] {
        assert_eq!(disk[field], done["disks"][0][field], "{field}");
    }
    let (expected, written) = (disk["expected_bytes"].as_u64(), &done["disks"][0]["written_bytes"]);
    assert!(expected >= written.as_u64() && expected < Some(DISK_BYTES), "{expected:?} {written}");

    // Now it is there: refused, or replaced.
    let image = PathBuf::from(disk["path"].as_str().unwrap());
    let (plan, code) = preview(env, &args);
    assert_eq!(code, Some(5), "{plan}");
    assert_eq!(problems(&plan).len(), 1, "{plan}");
    fs::write(&image, b"mine").unwrap();
    let (plan, code) = preview(env, &[&args[..], &["--force"]].concat());
    assert_eq!((code, &plan["disks"][0]["replaces"]), (Some(0), &true.into()), "{plan}");
    assert_eq!(fs::read(&image).unwrap(), b"mine");
    let text = env.vmbackup(&[&args[..], &["--dry-run", "--force"]].concat()).ok().stdout;
    assert!(text.contains("replaces what is there"), "{text}");
}

#[test]
fn all_that_is_in_the_way_is_told_at_once_each_with_its_fix() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let (first, second) = (env.path("a.raw"), env.path("b.raw"));
    for (image, mib) in [(&first, 3), (&second, 4)] {
        fs::write(image, vec![0x5a; mib << 20]).unwrap();
    }
    let spec = |image: &Path| format!("{},format=raw", image.display());
    let images = [spec(&first), spec(&second)];
    let backup = ["full", "--image", &images[0], "--image", &images[1], "--name", "pair", "--json"];
    let report = env.vmbackup(&backup).json();
    let name = |at: usize| report["disks"][at]["name"].as_str().unwrap();
    let device = env.path("device");
    File::create(&device).unwrap().set_len(1 << 20).unwrap();
    let small = SmallDisk::mount(&fixture.env.path("."), "2M");
    let to = small.path.join("missing/to");
    let devices = [format!("{}={}", name(0), device.display()), "vdx=/dev/null".to_owned()];
    let mut args = vec!["restore", "pair@latest", "--to", to.to_str().unwrap()];
    args.extend(devices.iter().flat_map(|device| ["--to-device", device]));
    let (plan, code) = preview(env, &args);
    let found = problems(&plan);
    for (what, fix) in [
        ("no disk 'vdx'", name(0)),
        ("the disks hold 4.0 MiB", "another directory"),
        ("cannot make", "mkdir -p"),
        ("the disk has 3145728", "at least 3145728 bytes"),
    ] {
        let told = found.iter().any(|text| text.contains(what) && text.contains(fix));
        assert!(told, "{what}\n{found:#?}");
    }
    assert_eq!(found.len(), 4, "{found:#?}");
    // As the restore: it fails at the first.
    let failed = env.vmbackup(&args).fails_with(&["no disk 'vdx'"]);
    assert_eq!((failed.code, code), (Some(3), Some(3)));
    assert_eq!(fs::metadata(&device).unwrap().len(), 1 << 20);
}

#[test]
fn two_links_to_one_file_are_no_places_for_two_disks() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let second = env.path("second.raw");
    fs::copy(&fixture.image, &second).unwrap();
    let images = [&fixture.image, &second].map(|image| format!("{},format=raw", image.display()));
    let backup = ["full", "--image", &images[0], "--image", &images[1], "--name", "pair"];
    let report = env.vmbackup(&[&backup[..], &["--json"]].concat()).json();
    let (to, shared) = (env.path("to"), env.path("shared.raw"));
    fs::create_dir(&to).unwrap();
    fs::write(&shared, b"mine").unwrap();
    for disk in report["disks"].as_array().unwrap() {
        let link = to.join(format!("{}.raw", disk["name"].as_str().unwrap()));
        std::os::unix::fs::symlink(&shared, link).unwrap();
    }
    let args = ["restore", "pair@latest", "--to", to.to_str().unwrap(), "--force"];
    let (plan, code) = preview(env, &args);
    let found = problems(&plan);
    assert!(found.len() == 1 && found[0].contains("two disks would both go to"), "{found:#?}");
    let failed = env.vmbackup(&args).fails_with(&["two disks would both go to"]);
    assert_eq!((failed.code, code), (Some(2), Some(2)));
    assert_eq!(fs::read(&shared).unwrap(), b"mine");
}

#[test]
fn what_a_vm_uses_is_no_place_to_restore_to() {
    let fixture = Fixture::new();
    let env = &fixture.env;
    let point = fixture.point();
    let to = env.path("to");
    fs::create_dir(&to).unwrap();
    let image = to.join(format!("{DISK}.raw"));
    File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
    let socket = env.path("use.sock");
    let mut user = Process::spawn(
        env.command("qemu-nbd").args(["-f", "raw", "-t", "-k"]).arg(&socket).arg(&image),
    );
    wait_until("qemu-nbd", 30, || {
        assert!(user.is_running());
        is_listening(&socket)
    });
    let device = format!("{DISK}={}", image.display());
    for args in [["--to", to.to_str().unwrap(), "--force"], ["--to-device", &device, "--force"]] {
        let (plan, code) = preview(env, &[&["restore", &point][..], &args].concat());
        let found = problems(&plan);
        assert!(found.len() == 1 && found[0].contains("is in use"), "{found:#?}");
        assert!(found[0].contains("stop the VM"), "{found:#?}");
        assert_eq!(code, Some(7), "{plan}");
    }
}
