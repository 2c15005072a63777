//! Sizes that are no whole number of sectors: a raw file keeps its own at whatever end, images of
//! other formats have whole sectors.

use std::fs::{self, File};

use crate::support::{NbdServer, Outcome, TestEnv, virtual_size};

const BYTES: usize = 1_000_001;
const IN_SECTORS: usize = 1_000_448;

/// `odd.raw`, without a zero; what is in it.
fn source(env: &TestEnv) -> Vec<u8> {
    let bytes: Vec<u8> = (0..BYTES).map(|at| u8::try_from(at % 255 + 1).unwrap()).collect();
    fs::write(env.path("odd.raw"), &bytes).unwrap();
    bytes
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(IN_SECTORS, 0);
    padded
}

#[test]
fn a_raw_file_keeps_its_length_in_new_files() {
    let env = TestEnv::new();
    let bytes = source(&env);
    for (how, verify) in [(&[][..], "--verify"), (&["--force"], "--quiet")] {
        let args = [&["copy", "odd.raw", "new.raw", verify, "--json"][..], how].concat();
        let report = env.vmbackup(&args).json();
        assert_eq!(report["size_bytes"], BYTES);
        assert!(fs::read(env.path("new.raw")).unwrap() == bytes, "{how:?}");
    }
    env.vmbackup(&["copy", "odd.raw", "large.raw", "--target-size", "1000003"]).ok();
    assert!(fs::read(env.path("large.raw")).unwrap() == [&bytes[..], &[0, 0]].concat());
}

#[test]
fn what_is_behind_a_raw_file_in_place_stays() {
    let env = TestEnv::new();
    let bytes = source(&env);
    for behind in [0, 1, IN_SECTORS - BYTES, 4096] {
        fs::write(env.path("there.raw"), vec![0xaa; BYTES + behind]).unwrap();
        env.vmbackup(&["copy", "odd.raw", "there.raw", "--in-place", "--verify"]).ok();
        let expected = [&bytes[..], &vec![0xaa; behind]].concat();
        assert!(fs::read(env.path("there.raw")).unwrap() == expected, "{behind}");
    }
}

#[test]
fn what_is_behind_a_raw_file_on_a_device_stays() {
    let env = TestEnv::new();
    let bytes = source(&env);
    fs::write(env.path("disk"), vec![0xaa; 2 << 20]).unwrap();
    let device = env.run("losetup", &["-f", "--show", "disk"]).text();
    let outcome = env.vmbackup(&["copy", "odd.raw", &device, "--verify"]);
    env.run("losetup", &["-d", &device]).ok();
    outcome.ok();
    let found = fs::read(env.path("disk")).unwrap();
    assert!(found[..BYTES] == bytes && found[BYTES..].iter().all(|byte| *byte == 0xaa));
}

#[test]
fn a_raw_file_keeps_its_length_through_pipes() {
    let env = TestEnv::new();
    let bytes = source(&env);
    let out = File::create(env.path("out")).unwrap();
    let mut command = env.vmbackup_command(&["copy", "odd.raw", "-"]);
    assert!(command.stdout(out).status().unwrap().success());
    assert!(fs::read(env.path("out")).unwrap() == bytes, "out");
    let mut command = env.vmbackup_command(&["copy", "-", "in.raw"]);
    Outcome::of(command.stdin(File::open(env.path("odd.raw")).unwrap())).ok();
    assert!(fs::read(env.path("in.raw")).unwrap() == bytes, "in");
}

#[test]
fn a_raw_file_keeps_its_length_to_and_from_exports() {
    let env = TestEnv::new();
    let bytes = source(&env);
    let server = NbdServer::nbdkit(&env, &["memory", &BYTES.to_string()]);
    let uri = server.uri("");
    env.vmbackup(&["copy", "odd.raw", &uri, "--verify"]).ok();
    env.run("nbdcopy", &[&uri, "out"]).ok();
    assert!(fs::read(env.path("out")).unwrap() == bytes, "as nbdcopy reads it");
    env.vmbackup(&["copy", &uri, "back.raw", "--verify"]).ok();
    assert!(fs::read(env.path("back.raw")).unwrap() == bytes, "back");
    fs::write(env.path("there.raw"), vec![0xaa; BYTES]).unwrap();
    env.vmbackup(&["copy", "odd.raw", "[ nbdkit file there.raw ]"]).ok();
    assert!(fs::read(env.path("there.raw")).unwrap() == bytes, "a server of ours");
}

#[test]
fn images_are_padded_to_whole_sectors_as_qemu_img_pads_them() {
    let env = TestEnv::new();
    let expected = padded(&source(&env));
    for format in ["qcow2", "vmdk", "vdi"] {
        let (name, target) = (format!("new.{format}"), format!("{format}:new.{format}"));
        let check = |how: &str| {
            env.vmbackup(&["copy", "odd.raw", &target, how, "--verify"]).ok();
            assert_eq!(virtual_size(&env, (&env.path(&name), format)), IN_SECTORS as u64);
            env.run("qemu-img", &["convert", "-f", format, "-O", "raw", &name, "back"]).ok();
            assert!(fs::read(env.path("back")).unwrap() == expected, "{format} {how}");
        };
        check("--quiet");
        env.run("qemu-img", &["create", "-q", "-f", format, &name, "1000448"]).ok();
        check("--in-place");
    }
}
