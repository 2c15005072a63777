//! Every kind of source and target.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::support::{NbdServer, Outcome, TestEnv, assert_same_content};

/// A raw file of an odd size with data, holes, and zeroes written as data.
fn source(env: &TestEnv) -> PathBuf {
    let path = env.path("source.raw");
    let mut bytes = vec![0; (5 << 20) + 4096 + 512];
    for (index, byte) in bytes.iter_mut().enumerate() {
        let block = index >> 16;
        if block % 3 != 1 {
            *byte = u8::try_from((index * 31 + block * 7) & 0xff).unwrap();
        }
    }
    fs::write(&path, &bytes).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn every_image_format_gives_back_what_was_copied_to_it() {
    let env = TestEnv::new();
    let source = source(&env);
    for (name, format) in
        [("a.qcow2", "qcow2"), ("a.vmdk", "vmdk"), ("a.vdi", "vdi"), ("a.raw", "raw")]
    {
        let target = env.path(name);
        let report =
            env.vmbackup(&["copy", text(&source), text(&target), "--verify", "--json"]).json();
        assert_same_content(&env, (&source, "raw"), (&target, format));
        let root = env.vmbackup(&["hash", text(&source)]).text();
        assert_eq!(report["content_root"], root.as_str());
        assert_eq!(report["durable"], true);
        let sum =
            report["written_bytes"].as_u64().unwrap() + report["zero_bytes"].as_u64().unwrap();
        assert_eq!(sum, source.metadata().unwrap().len());
        // And back.
        let back = env.path(&format!("{name}.back"));
        env.vmbackup(&["copy", text(&target), &format!("raw:{}", text(&back))]).ok();
        assert!(fs::read(&source).unwrap() == fs::read(&back).unwrap(), "{name}");
        let blocks = back.metadata().unwrap().blocks();
        assert!(blocks * 512 < source.metadata().unwrap().len() * 3 / 4, "{name} is sparse");
    }
    let left: Vec<_> = fs::read_dir(env.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().ends_with(".part")), "{left:?}");
}

#[test]
fn a_compressed_image_is_smaller_and_equal() {
    let env = TestEnv::new();
    let odd = source(&env);
    let even = env.path("even.raw");
    env.vmbackup(&["copy", text(&odd), text(&even), "--target-size", "6M"]).ok();
    let (plain, small) = (env.path("plain.qcow2"), env.path("small,1.qcow2"));
    env.vmbackup(&["copy", text(&even), text(&plain)]).ok();
    // The last cluster of the odd one is padded, the disk is not.
    for source in [&even, &odd] {
        let target = format!("qcow2:{}", text(&small));
        env.vmbackup(&["copy", text(source), &target, "--compressed", "--verify", "--force"]).ok();
        assert_same_content(&env, (source, "raw"), (&small, "qcow2"));
        assert_eq!(virtual_size(&env, &small), source.metadata().unwrap().len());
        env.run("qemu-img", &["check", "-q", "-f", "qcow2", text(&small)]).ok();
        let (plain, small) = (plain.metadata().unwrap().len(), small.metadata().unwrap().len());
        assert!(small < plain / 2, "{small} of {plain}");
    }
}

/// The size of the disk in an image.
fn virtual_size(env: &TestEnv, image: &Path) -> u64 {
    let info = env.run("qemu-img", &["info", "--output=json", "-f", "qcow2", text(image)]).ok();
    let info: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

#[test]
fn a_compressed_image_of_any_size_is_rounded_to_sectors_only() {
    let env = TestEnv::new();
    let bytes = fs::read(source(&env)).unwrap();
    for len in [1, 511, 1000, (64 << 10) + 1, (3 << 20) + 77, (5 << 20) + 4096 + 512] {
        let expected = |size: u64| {
            let mut expected = bytes[..len].to_vec();
            expected.resize(usize::try_from(size).unwrap(), 0);
            expected
        };
        let check = |name: &str, size: u64| {
            let image = env.path(name);
            assert_eq!(virtual_size(&env, &image), size, "{name} of {len}");
            env.run("qemu-img", &["check", "-q", "-f", "qcow2", name]).ok();
            env.run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", name, "back"]).ok();
            assert!(fs::read(env.path("back")).unwrap() == expected(size), "{name} of {len}");
        };
        fs::write(env.path("disk"), &bytes[..len]).unwrap();
        let size = (len as u64).next_multiple_of(512);
        // A server of ours, and one of somebody else.
        for (index, from) in ["raw:disk", "[ nbdkit file disk ]"].iter().enumerate() {
            for compressed in [true, false] {
                let name = format!("{len}-{index}-{compressed}.qcow2");
                let how = if compressed { &["--compressed"][..] } else { &[] };
                env.vmbackup(&[&["copy", from, &name, "--verify"][..], how].concat()).ok();
                check(&name, size);
            }
        }
        // With room behind it, and from a pipe, whose size nobody knows before its end.
        let name = format!("{len}-room.qcow2");
        let room = ["--target-size", "6000000"];
        env.vmbackup(&[&["copy", "raw:disk", &name, "--compressed"][..], &room].concat()).ok();
        check(&name, 6_000_128);
        let name = format!("{len}-pipe.qcow2");
        let args = [&["copy", "-", &name, "--compressed"][..], &room].concat();
        let disk = File::open(env.path("disk")).unwrap();
        Outcome::of(env.vmbackup_command(&args).stdin(disk)).ok();
        check(&name, 6_000_128);
    }
    let disk = File::open(env.path("disk")).unwrap();
    let args = ["copy", "-", "cut.qcow2", "--compressed", "--target-size", "5M"];
    let outcome = Outcome::of(env.vmbackup_command(&args).stdin(disk));
    assert_eq!(outcome.code, Some(9), "{outcome:?}");
    outcome.fails_with(&["goes on after the 5242880 bytes"]);
}

#[test]
fn pipes_carry_a_disk_out_and_in() {
    let env = TestEnv::new();
    let source = source(&env);
    let out = env.path("out");
    let mut command = env.vmbackup_command(&["copy", text(&source), "-"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    std::io::copy(&mut child.stdout.take().unwrap(), &mut File::create(&out).unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(fs::read(&source).unwrap() == fs::read(&out).unwrap(), "out");

    for (target, size) in [("in.raw", None), ("in.qcow2", Some("6M")), ("null:", None)] {
        let mut cat = env.command("cat").arg(&source).stdout(Stdio::piped()).spawn().unwrap();
        let mut args = vec!["copy", "-", target, "--json"];
        args.extend(size.iter().flat_map(|size| ["--target-size", size]));
        let mut command = env.vmbackup_command(&args);
        let report = Outcome::of(command.stdin(cat.stdout.take().unwrap())).json();
        assert!(cat.wait().unwrap().success());
        assert_eq!(report["size_bytes"], source.metadata().unwrap().len());
    }
    assert!(fs::read(&source).unwrap() == fs::read(env.path("in.raw")).unwrap(), "in");
    let back = env.path("back.raw");
    env.vmbackup(&["copy", "in.qcow2", text(&back)]).ok();
    let mut expected = fs::read(&source).unwrap();
    expected.resize(6 << 20, 0);
    assert!(expected == fs::read(&back).unwrap(), "in, with more room");
}

#[test]
fn a_file_in_place_keeps_its_tail_and_its_inode() {
    let env = TestEnv::new();
    let source = source(&env);
    let len = usize::try_from(source.metadata().unwrap().len()).unwrap();
    let target = env.path("target.raw");
    fs::write(&target, vec![0xaa; len + 8192]).unwrap();
    let inode = target.metadata().unwrap().ino();
    env.vmbackup(&["copy", text(&source), text(&target)]).fails_with(&["exists", "--force"]);
    env.vmbackup(&["copy", text(&source), text(&target), "--in-place", "--verify"]).ok();
    let bytes = fs::read(&target).unwrap();
    assert!(bytes[..len] == fs::read(&source).unwrap()[..], "content");
    assert!(bytes[len..].iter().all(|byte| *byte == 0xaa) && bytes.len() == len + 8192, "tail");
    assert_eq!(target.metadata().unwrap().ino(), inode);
    env.vmbackup(&["copy", text(&source), text(&target), "--force"]).ok();
    assert_eq!(target.metadata().unwrap().len(), len as u64);

    let image = env.path("image.qcow2");
    env.run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "8M"]).ok();
    env.run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 8M", text(&image)]).ok();
    env.vmbackup(&["copy", text(&source), text(&image), "--in-place", "--verify"]).ok();
    let read = format!("read -P 7 {} 1M", 6 << 20);
    env.run("qemu-io", &["-f", "qcow2", "-c", &read, text(&image)]).ok();
}

#[test]
fn servers_are_started_from_a_command_line_and_ended() {
    let env = TestEnv::new();
    let source = source(&env);
    let archive = env.path("a.tar");
    env.run("tar", &["-cf", text(&archive), "source.raw"]).ok();
    let pid = env.path("pid");
    let from = format!(
        "[ nbdkit -P '{}' --filter=tar file {} tar-entry=source.raw ]",
        text(&pid),
        text(&archive)
    );
    let target = env.path("b.raw");
    env.vmbackup(&["copy", &from, text(&target)]).ok();
    assert!(fs::read(&source).unwrap() == fs::read(&target).unwrap());
    assert!(!is_running(&pid), "the server is left behind");

    let disk = env.path("disk.raw");
    File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    let to = format!("[ nbdkit -P {} file {} ]", text(&pid), text(&disk));
    env.vmbackup(&["copy", text(&source), &to, "--verify"]).ok();
    assert!(!is_running(&pid), "the server is left behind");
    let bytes = fs::read(&disk).unwrap();
    assert!(
        fs::read(&source).unwrap()[..]
            == bytes[..usize::try_from(source.metadata().unwrap().len()).unwrap()]
    );
}

#[test]
fn a_compressed_file_is_unpacked_by_nbdkit() {
    let env = TestEnv::new();
    let source = source(&env);
    env.run("gzip", &["-k", text(&source)]).ok();
    env.vmbackup(&["copy", "[ nbdkit --filter=gzip file source.raw.gz ]", "new.raw"]).ok();
    assert!(fs::read(&source).unwrap() == fs::read(env.path("new.raw")).unwrap());
}

#[test]
fn a_single_partition_is_cut_out_by_nbdkit() {
    let env = TestEnv::new();
    let content = fs::read(source(&env)).unwrap();
    // One of Linux from sector 2048 on, and a second behind it.
    let mut disk = vec![0xaa; 1 << 20];
    disk[446..510].fill(0);
    let sectors = u32::try_from(content.len() / 512).unwrap();
    for (index, start, sectors) in [(0, 2048, sectors), (1, 2048 + sectors, 8)] {
        let entry = &mut disk[446 + 16 * index..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&u32::to_le_bytes(start));
        entry[12..16].copy_from_slice(&u32::to_le_bytes(sectors));
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(&content);
    disk.extend([0xaa; 4096]);
    fs::write(env.path("disk"), &disk).unwrap();
    let from = "[ nbdkit --filter=partition file disk partition=1 ]";
    env.vmbackup(&["copy", from, "new.raw", "--verify"]).ok();
    assert!(content == fs::read(env.path("new.raw")).unwrap());
}

/// Whether the process whose id is in the file is there.
pub(crate) fn is_running(pid: &Path) -> bool {
    let pid = fs::read_to_string(pid).unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

#[test]
fn options_of_speed_change_nothing_but_speed() {
    let env = TestEnv::new();
    let source = source(&env);
    for options in [
        &["--connections", "4", "--requests", "3"][..],
        &["--request-size", "1M", "--queue-size", "64k"],
        &["--synchronous", "--sparse", "0", "--no-flush"],
        &["--allocated", "--flush"],
        &["--rate-limit", "64M", "--sparse", "64k"],
    ] {
        let server = NbdServer::nbdkit(&env, &["memory", "6M"]);
        let uri = server.uri("");
        let mut args = vec!["copy", text(&source), &uri, "--verify"];
        args.extend(options);
        env.vmbackup(&args).ok();
        let back = env.path("back.raw");
        let mut args = vec!["copy", &uri, text(&back), "--force"];
        args.extend(options);
        env.vmbackup(&args).ok();
        let mut expected = fs::read(&source).unwrap();
        expected.resize(6 << 20, 0);
        assert!(expected == fs::read(&back).unwrap(), "{options:?}");
    }
}

#[test]
fn a_target_may_be_made_larger_than_the_source() {
    let env = TestEnv::new();
    let source = source(&env);
    env.vmbackup(&["copy", text(&source), "large.raw", "--target-size", "7M", "--verify"]).ok();
    let mut expected = fs::read(&source).unwrap();
    expected.resize(7 << 20, 0);
    assert!(expected == fs::read(env.path("large.raw")).unwrap());
}
