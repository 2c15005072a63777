//! Sizes that are no whole number of sectors: a raw file keeps its own at whatever end, images of
//! other formats have whole sectors.

use std::fs::{self, File};

use crate::support::{NbdLog, NbdServer, Outcome, TestEnv, virtual_size};

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

/// `there.raw`, all 0xaa, behind a server that refuses what is not whole blocks.
fn blocks(env: &TestEnv, (bytes, block): (usize, usize), filters: &[&str]) -> NbdServer {
    fs::write(env.path("there.raw"), vec![0xaa; bytes]).unwrap();
    let sizes = ["minimum", "preferred", "maximum"].iter().zip([block, block.max(4096), 1 << 20]);
    let sizes: Vec<_> = sizes.map(|(name, bytes)| format!("blocksize-{name}={bytes}")).collect();
    let mut args = vec!["--filter=blocksize-policy"];
    args.extend(filters);
    args.extend(["file", "there.raw", "blocksize-error-policy=error"]);
    args.extend(sizes.iter().map(String::as_str));
    NbdServer::nbdkit(env, &args)
}

#[test]
fn the_last_block_of_an_export_is_filled_with_zeroes_and_what_is_behind_it_stays() {
    let env = TestEnv::new();
    let data = source(&env);
    let mut holes = data.clone();
    holes[600_000..].fill(0);
    fs::write(env.path("holes.raw"), &holes[..600_000]).unwrap();
    File::options().write(true).open(env.path("holes.raw")).unwrap().set_len(BYTES as u64).unwrap();
    for (block, filters) in [
        (512, &[][..]),
        (512, &["--filter=noextents"]),
        (4096, &["--filter=nozero"]),
        (65536, &["--filter=noextents"]),
    ] {
        let end = BYTES.next_multiple_of(block);
        for (from, bytes) in [("odd.raw", &data), ("holes.raw", &holes)] {
            for (piped, behind, options) in [
                (false, 1 << 20, &["--verify"][..]),
                (false, 0, &["--verify"]),
                (false, 1 << 20, &["--verify", "--retries", "1"]),
                (true, 1 << 20, &[]),
                (true, 0, &[]),
            ] {
                let server = blocks(&env, (end + behind, block), filters);
                let uri = server.uri("");
                let first = if piped { "-" } else { from };
                let mut command = env.vmbackup_command(&[&["copy", first, &uri], options].concat());
                Outcome::of(command.stdin(File::open(env.path(from)).unwrap())).ok();
                let expected = [&bytes[..], &vec![0; end - BYTES], &vec![0xaa; behind]].concat();
                let case = format!("{from} {block} {filters:?} {behind} {options:?}");
                assert!(fs::read(env.path("there.raw")).unwrap() == expected, "{case}");
            }
        }
    }
}

/// One for which trials tell whether clearing is fast, and one that is cleared at once, to the end of the
/// block.
#[test]
fn an_export_with_blocks_is_cleared_in_advance_for_a_disk_of_odd_size() {
    let env = TestEnv::new();
    for (disk, export, first) in
        [((20 << 20) + 1, 24 << 20, "0x100000"), ((12 << 20) + 1, 16 << 20, "0xc00200")]
    {
        let mut expected = vec![0; disk];
        expected[8 << 20..9 << 20].fill(7);
        fs::write(env.path("large.raw"), &expected).unwrap();
        env.vmbackup(&["copy", "large.raw", "sparse.raw", "--force"]).ok();
        let _ = fs::remove_file(env.path("log"));
        let filters = ["--filter=noextents", "--filter=log"];
        let data = format!("data=0xaa*{export}");
        let server = NbdServer::nbdkit(
            &env,
            &[
                &["--filter=blocksize-policy"][..],
                &filters,
                &["data", &data, "blocksize-error-policy=error", "logfile=log"],
                &["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=1M"],
            ]
            .concat(),
        );
        env.vmbackup(&["copy", "sparse.raw", &server.uri(""), "--verify"]).ok();
        let log = NbdLog::of(&env.path("log"));
        let cleared = format!("offset=0x0 count={first} trim=1 fua=0 fast=1");
        let cleared = log.requests("Zero").filter(|line| line.contains(&cleared)).count();
        assert_eq!(cleared, 1, "{}", log.0);
        expected.resize(disk.next_multiple_of(512), 0);
        expected.resize(export, 0xaa);
        env.run("nbdcopy", &[&server.uri(""), "out"]).ok();
        assert!(fs::read(env.path("out")).unwrap() == expected, "{export}");
    }
}

#[test]
fn an_export_without_room_for_the_last_block_is_refused_before_the_first_write() {
    let env = TestEnv::new();
    source(&env);
    let bytes = BYTES / 512 * 512;
    let server = blocks(&env, (bytes, 512), &[]);
    let outcome = env.vmbackup(&["copy", "odd.raw", &server.uri("")]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    outcome.fails_with(&["does not fit", &bytes.to_string(), "make the target"]);
    assert!(fs::read(env.path("there.raw")).unwrap().iter().all(|byte| *byte == 0xaa));
}
