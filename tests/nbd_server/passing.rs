//! Whole disks through the server, read and written by each tool over each transport.

use std::sync::Arc;

use vmbackup::block::memory::MemoryDisk;
use vmbackup::nbd::server::Export;

use crate::rig::{Rig, Transport, pattern};

const LEN: usize = (1 << 20) + 512;
/// The name of the export.
const EXPORT: &str = "vda";

/// Who reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tool {
    Nbdcopy,
    QemuImg,
    /// nbdkit's plugin `nbd`, and nbdcopy in front of it.
    NbdkitPlugin,
    /// The same over one connection for all its clients.
    NbdkitShared,
    /// QEMU's driver in a daemon that exports it, and nbdcopy in front of it.
    StorageDaemon,
}

/// The command by which `tool` copies the export to `out`.
fn reading(tool: Tool, rig: &Rig) -> Vec<String> {
    let uri = rig.text(EXPORT);
    match tool {
        Tool::Nbdcopy => words(&["nbdcopy", "--connections=4", "--threads=4", &uri, "out"]),
        Tool::QemuImg => words(&["qemu-img", "convert", "-f", "raw", "-O", "raw", &uri, "out"]),
        Tool::NbdkitPlugin => nbdkit(&["-r", &format!("uri={uri}")], "nbdcopy \"$uri\" out"),
        Tool::NbdkitShared => {
            nbdkit(&["-r", "shared=1", &format!("uri={uri}")], "nbdcopy \"$uri\" out")
        }
        Tool::StorageDaemon => {
            [words(&["nbdcopy", "--"]), daemon(rig, "read-only=on", "off"), words(&["out"])]
                .concat()
        }
    }
}

/// The command by which it copies `in` to the export.
fn writing(tool: Tool, rig: &Rig) -> Vec<String> {
    let uri = rig.text(EXPORT);
    match tool {
        Tool::Nbdcopy => {
            words(&["nbdcopy", "--connections=4", "--threads=4", "--flush", "in", &uri])
        }
        Tool::QemuImg => {
            words(&["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "in", &uri])
        }
        Tool::NbdkitPlugin => nbdkit(&[&format!("uri={uri}")], "nbdcopy --flush in \"$uri\""),
        Tool::NbdkitShared => {
            nbdkit(&["shared=1", &format!("uri={uri}")], "nbdcopy --flush in \"$uri\"")
        }
        Tool::StorageDaemon => {
            [words(&["nbdcopy", "--flush", "--", "in"]), daemon(rig, "read-only=off", "on")]
                .concat()
        }
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().copied().map(str::to_owned).collect()
}

fn nbdkit(args: &[&str], run: &str) -> Vec<String> {
    words(&[&["nbdkit", "-U", "-", "nbd"], args, &["--run", run]].concat())
}

/// As nbdcopy starts it: with a socket at hand (sd_listen_fds(3)).
fn daemon(rig: &Rig, access: &str, writable: &str) -> Vec<String> {
    let disk = format!("{},node-name=n,{access}", rig.qemu_disk(EXPORT));
    let export = format!("type=nbd,id=e,node-name=n,name=,writable={writable}");
    let server = "addr.type=fd,addr.str=3";
    let command = ["qemu-storage-daemon", "--blockdev", &disk, "--nbd-server", server];
    words(&[&["["], &command[..], &["--export", &export, "]"]].concat())
}

fn run(rig: &Rig, command: &[String]) {
    let args: Vec<&str> = command[1..].iter().map(String::as_str).collect();
    rig.run(&command[0], &args);
}

fn reads(tool: Tool, transport: Transport) {
    let (disk, content) = pattern(LEN);
    let rig = Rig::over(transport, [Export::read_only(EXPORT, disk)]);
    run(&rig, &reading(tool, &rig));
    assert!(std::fs::read(rig.dir.path().join("out")).unwrap() == content, "it differs");
}

fn writes(tool: Tool, transport: Transport) {
    let (_, content) = pattern(LEN);
    let disk = Arc::new(MemoryDisk::with_content(vec![0x5a; LEN]));
    let export = Export::writable(EXPORT, Arc::clone(&disk) as _, Arc::clone(&disk) as _);
    let rig = Rig::over(transport, [export]);
    std::fs::write(rig.dir.path().join("in"), &content).unwrap();
    run(&rig, &writing(tool, &rig));
    assert!(disk.content() == content, "it differs");
}

/// One test per cell, named after its claim.
macro_rules! cells {
    ($($name:ident: $does:ident $tool:ident $transport:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            $does(Tool::$tool, Transport::$transport);
        }
    )*};
}

cells! {
    nbdcopy_reads_over_unix: reads Nbdcopy Unix;
    nbdcopy_reads_over_tcp: reads Nbdcopy Tcp;
    nbdcopy_writes_over_unix: writes Nbdcopy Unix;
    nbdcopy_writes_over_tcp: writes Nbdcopy Tcp;
    qemu_img_reads_over_unix: reads QemuImg Unix;
    qemu_img_reads_over_tcp: reads QemuImg Tcp;
    qemu_img_writes_over_unix: writes QemuImg Unix;
    qemu_img_writes_over_tcp: writes QemuImg Tcp;
    nbdkit_reads_over_unix: reads NbdkitPlugin Unix;
    nbdkit_reads_over_tcp: reads NbdkitPlugin Tcp;
    nbdkit_reads_over_one_connection: reads NbdkitShared Unix;
    nbdkit_writes_over_unix: writes NbdkitPlugin Unix;
    nbdkit_writes_over_tcp: writes NbdkitPlugin Tcp;
    nbdkit_writes_over_one_connection: writes NbdkitShared Unix;
    qemu_storage_daemon_reads_over_unix: reads StorageDaemon Unix;
    qemu_storage_daemon_reads_over_tcp: reads StorageDaemon Tcp;
    qemu_storage_daemon_writes_over_unix: writes StorageDaemon Unix;
    qemu_storage_daemon_writes_over_tcp: writes StorageDaemon Tcp;
}

/// Writes, zeroes, trims and reads at places that are no blocks.
fn qemu_io_changes(transport: Transport) {
    let disk = Arc::new(MemoryDisk::with_content(vec![0x5a; 1 << 20]));
    let export = Export::writable(EXPORT, Arc::clone(&disk) as _, Arc::clone(&disk) as _);
    let rig = Rig::over(transport, [export]);
    let uri = rig.text(EXPORT);
    let io = |command: &str| {
        rig.run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", command, "-c", "flush", &uri])
    };
    io("write -P 7 4096 8192");
    io("write -f -P 8 12345 100");
    io("write -z 65536 4096");
    io("write -z -u 131072 4096");
    io("write -z -n 196608 4096");
    io("discard 262144 65536");
    io("read -P 7 4096 8192");
    let content = disk.content();
    assert!(content[4096..12288].iter().all(|byte| *byte == 7));
    assert!(content[12345..12445].iter().all(|byte| *byte == 8));
    for zeroed in [65536..69632, 131_072..135_168, 196_608..200_704] {
        assert!(content[zeroed].iter().all(|byte| *byte == 0));
    }
    assert_eq!(content[12288], 0x5a, "nothing else changes");
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_writes_zeroes_trims_and_flushes_over_unix() {
    qemu_io_changes(Transport::Unix);
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_writes_zeroes_trims_and_flushes_over_tcp() {
    qemu_io_changes(Transport::Tcp);
}
