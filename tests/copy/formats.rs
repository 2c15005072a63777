//! The formats beyond the usual four, as qemu-img sees them.

use std::fs;

use crate::support::{TestEnv, virtual_size};

/// No size of whole cylinders (vpc) nor of whole blocks of any format.
const BYTES: usize = (20 << 20) + 512;

/// `source.raw`: data, holes, and data to the last byte.
fn source(env: &TestEnv) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    for (index, byte) in bytes.iter_mut().enumerate() {
        if (index >> 18) % 3 != 1 {
            *byte = u8::try_from((index * 31 + (index >> 16)) & 0xff).unwrap();
        }
    }
    bytes[BYTES - 1] = 0x5a;
    fs::write(env.path("source.raw"), &bytes).unwrap();
    bytes
}

/// Copies to a new image named `name`, lets qemu-img read it, and copies an image of qemu-img's back.
fn round_trip(format: &str, name: &str, options: &[&str]) {
    let env = TestEnv::new();
    let bytes = source(&env);
    env.vmbackup(&["copy", "source.raw", name, "--verify"]).ok();
    let file = name.split_once(':').map_or(name, |(_, file)| file);
    assert_eq!(virtual_size(&env, (&env.path(file), format)), BYTES as u64);
    env.run("qemu-img", &["convert", "-f", format, "-O", "raw", file, "back"]).ok();
    assert!(fs::read(env.path("back")).unwrap() == bytes, "as qemu-img reads it");
    env.vmbackup(&["copy", name, "back.raw"]).ok();
    assert!(fs::read(env.path("back.raw")).unwrap() == bytes, "as we read it");

    let convert = ["convert", "-f", "raw", "-O", format];
    env.run("qemu-img", &[&convert[..], options, &["source.raw", "theirs"]].concat()).ok();
    let theirs = format!("{format}:theirs");
    env.vmbackup(&["copy", &theirs, "back.raw", "--force"]).ok();
    assert!(fs::read(env.path("back.raw")).unwrap() == bytes, "theirs as we read it");
}

#[test]
fn vhd_images_have_the_size_of_the_source() {
    round_trip("vpc", "disk.vhd", &["-o", "force_size=on"]);
}

#[test]
fn vhdx_images_are_written_and_read() {
    round_trip("vhdx", "disk.vhdx", &[]);
}

#[test]
fn qed_images_are_written_and_read() {
    round_trip("qed", "disk.qed", &[]);
}

#[test]
fn qcow_images_are_written_and_read() {
    round_trip("qcow", "qcow:disk.qcow", &[]);
}

#[test]
fn parallels_images_are_written_and_read() {
    round_trip("parallels", "parallels:disk.hdd", &[]);
}

#[test]
fn what_qemu_only_reads_is_refused_as_a_target() {
    let env = TestEnv::new();
    fs::write(env.path("source.raw"), vec![7; 4096]).unwrap();
    for format in ["dmg", "bochs", "cloop"] {
        let outcome = env.vmbackup(&["copy", "source.raw", &format!("{format}:new")]);
        assert_eq!(outcome.code, Some(8), "{outcome:?}");
        outcome.fails_with(&["cannot create", format, "choose qcow2 or raw"]);
        assert!(!env.path("new").exists());
    }
}

/// A guest writes what it likes to its raw disk: the header of an image, whose backing file would be
/// one of the host's.
#[test]
fn a_raw_disk_that_begins_with_the_header_of_an_image_is_copied_as_it_is() {
    let env = TestEnv::new();
    fs::write(env.path("secret"), vec![0x5e; 1 << 20]).unwrap();
    let forged = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "secret", "forged"];
    env.run("qemu-img", &forged).ok();
    // In sectors, which its copies in other formats have.
    fs::File::options().write(true).open(env.path("forged")).unwrap().set_len(256 << 10).unwrap();
    let bytes = fs::read(env.path("forged")).unwrap();
    assert_eq!(&bytes[..4], b"QFI\xfb");
    fs::copy(env.path("forged"), env.path("forged.raw")).unwrap();
    for from in ["raw:forged", "forged.raw", "forged,format=raw", "[ nbdkit file forged ]"] {
        env.vmbackup(&["copy", from, "new.raw", "--force", "--verify"]).ok();
        assert!(fs::read(env.path("new.raw")).unwrap() == bytes, "{from}");
        env.vmbackup(&["copy", from, "new.qcow2", "--force", "--verify"]).ok();
        env.run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "new.qcow2", "back"]).ok();
        assert!(fs::read(env.path("back")).unwrap() == bytes, "{from} as qcow2");
        // Nor is what is written over looked into.
        env.vmbackup(&["copy", from, "new.raw", "--in-place", "--verify"]).ok();
        assert!(fs::read(env.path("new.raw")).unwrap() == bytes, "{from} over itself");
    }
    // The last one is an image of an image: unpacked once.
    env.vmbackup(&["copy", "new.qcow2", "once.raw"]).ok();
    assert!(fs::read(env.path("once.raw")).unwrap() == bytes);
}
