//! Memory stays bounded whatever the size: a disk of 4 TiB with more noise in it than the bound, through
//! every command that touches disks or the repository.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::support::{TestEnv, with_peak_mib};

/// No command takes more than this, whatever it works on.
const PEAK_MIB_MAX: u64 = 256;

const DISK_BYTES: u64 = 4 << 40;
const NOISE_BYTES: u64 = 320 << 20;

/// The noise lies in so many pieces all over the disk.
const PIECES: u64 = 64;

fn make_disk(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut buffer = vec![0; 1 << 20];
    for piece in 0..PIECES {
        for at in (0..NOISE_BYTES / PIECES).step_by(1 << 20) {
            for word in buffer.as_chunks_mut::<8>().0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state.to_le_bytes();
            }
            file.write_all_at(&buffer, piece * (DISK_BYTES / PIECES) + at).unwrap();
        }
    }
}

#[test]
fn no_command_takes_more_than_256_mib_on_a_disk_of_4_tib() {
    // On a disk: /tmp may be memory.
    let env = TestEnv::new_in(Path::new("/var/tmp"));
    env.init_repo();
    let (raw, image) = (env.path("big.raw"), env.path("big.qcow2"));
    make_disk(&raw);
    let (raw, image) = (raw.to_str().unwrap(), image.to_str().unwrap());
    env.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", raw, image]).ok();
    std::fs::remove_file(raw).unwrap();
    let (to, vm) = (env.path("restored"), ["--image", image, "--name", "big"]);
    let to = to.to_str().unwrap();
    let mut peaks = Vec::new();
    let mut run = |args: &[&str]| {
        let (outcome, peak_mib) = with_peak_mib(&mut env.vmbackup_command(args));
        peaks.push(format!("{} {peak_mib} MiB", args[0]));
        let outcome = outcome.ok();
        assert!(peak_mib < PEAK_MIB_MAX, "{peaks:?}");
        outcome
    };
    run(&[&["full"], &vm[..]].concat());
    let report = run(&[&["incremental", "--json"], &vm[..]].concat()).json();
    assert_eq!(report["disks"][0]["read"]["mode"], "incremental");
    run(&["restore", "big@latest", "--to", to]);
    std::fs::remove_dir_all(to).unwrap();
    run(&["verify", "big@latest"]);
    run(&["list", "--json"]);
    run(&["show", "big@latest"]);
    run(&["hash", image]);
    run(&["forget", "--keep-last", "1"]);
    run(&["gc"]);
    run(&["check", "--read-data"]);
}
